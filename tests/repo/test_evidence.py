"""The experiments' own arithmetic, what they found, and that they notice when something does not hold."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from benchmarks.evidence import budgets, recovery, teachers
from benchmarks.evidence.__main__ import check, experiments, gather
from benchmarks.evidence.experiment import FOLDER, Claim, read_json, report
from benchmarks.evidence.plot import Plot, Series
from lora2.method.factors import Factors

# -- arithmetic ----------------------------------------------------------------------------------------------


def test_spearman_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        one, other = (torch.randint(1, 8, (10,), generator=generator).tolist() for _ in range(2))
        if len(set(one)) > 1 < len(set(other)):
            assert recovery.spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)
    assert recovery.spearman(recovery.RANKS, [3] * 10) == 0.0
    assert recovery.spearman(recovery.RANKS, recovery.RANKS) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("decay", [1.0, 4.0])
def test_teachers_have_their_ranks_and_the_loss_is_what_is_missing(decay: float) -> None:
    ranks, shapes = (1, 3, 6), ((24, 16), (16, 24), (12, 12))
    model = teachers.Teachers(ranks, shapes, seed=0, decay=decay)
    for rank, shape, truth in zip(ranks, shapes, model.truths, strict=True):
        values = torch.linalg.svdvals(truth)
        assert truth.shape == shape
        assert int((values > 1e-12).sum()) == rank
        assert values[0] / values[rank - 1] == pytest.approx(decay if rank > 1 else 1.0)
    noise = torch.randn(20_000, 1, model.size, generator=torch.Generator().manual_seed(1))
    loss = float(model.denoise(noise, torch.ones(()), [0]).square().mean())
    # A mean over 20,000 samples of sums of some tens of squares: known to about 1 / √(20,000 · 5).
    assert loss == pytest.approx(1.0, rel=0.01)
    unexplained = teachers.Teachers(ranks, shapes, seed=0, decay=decay, noise=0.5)
    assert float(unexplained.denoise(noise, torch.ones(()), [0]).square().mean()) == pytest.approx(1.5, rel=0.01)


def test_what_is_missing_is_that_of_a_dense_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(truth, full_matrices=False)
    best = Factors((u[:, :4] * s[:4]).float(), vh[:4].float(), 4.0)
    # Factors in float32.
    assert teachers.residuals({"a": best}, [truth]) == [
        pytest.approx(float((s[4:] ** 2).sum() / (s**2).sum()), rel=1e-5)
    ]


def test_budgets_asked_for_are_ten_in_equal_ratios() -> None:
    layers = {str(i): torch.nn.Linear(64, 32) for i in range(4)}
    sizes = budgets.asked(layers, 1000, 2, 10)
    assert sizes[-1] == pytest.approx(0.9 * (2 * 4 * 96 * 32 + 1000))
    assert sizes[0] == pytest.approx(2 * 96 / budgets.RESOLUTION)
    assert [b / a for a, b in itertools.pairwise(sizes)] == pytest.approx([(sizes[9] / sizes[0]) ** (1 / 9)] * 9)


# -- the harness ---------------------------------------------------------------------------------------------


def test_a_claim_holds_up_to_its_limit_and_nothing_else_does() -> None:
    assert Claim("", 1.0, 1.0).holds
    assert Claim("", 1.0, 1.0, above=True).holds
    assert not Claim("", 1.01, 1.0).holds
    assert not Claim("", 0.99, 1.0, above=True).holds
    assert not Claim("", math.nan, 1.0).holds
    assert not Claim("", math.nan, 1.0, above=True).holds


def test_a_claim_that_does_not_hold_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report([Claim("one", 0.5, 1.0)])
    assert not report([Claim("one", 0.5, 1.0), Claim("two", 1.5, 1.0)])
    assert "NO     two    1.5       at most 1" in capsys.readouterr().out
    assert report([Claim("a goal", 0.5, 1.0, above=True, open=True)]), "shown, not demanded"
    assert "NO     a goal  0.5       at least 1" in capsys.readouterr().out
    for ranks, good in ((recovery.RANKS, True), (recovery.RANKS[::-1], False)):
        monkeypatch.setattr(recovery, "run", lambda full, ranks=ranks: pretended(list(ranks)))
        assert check(["recovery"]) is good
    assert "A claim does not hold." in capsys.readouterr().out


def pretended(ranks: list[int]) -> dict[str, Any]:
    """Results as if these ranks had been learned in every run."""
    runs = []
    for case in recovery.cases(full=False):
        missing = 1e-2 if case.group == "rest" else 1e-5
        entry = {"spearman": recovery.spearman(recovery.RANKS, ranks), "residual": missing, "kept": 1.0, "ranks": ranks}
        runs.append({**vars(case), **entry})
    return {"true_ranks": list(recovery.RANKS), "steps": recovery.STEPS, "runs": runs}


def test_a_short_run_gives_what_the_page_needs() -> None:
    case = recovery.Case("shapes", recovery.SETTLED, "64 x 64", 0)
    measured = recovery.measure(case)
    assert measured["ranks"][:8] == list(recovery.RANKS[:8])
    assert measured["parameters"] <= measured["budget"] == 11 * 10 * 128
    assert measured["residual"] == max(measured["residual_of"])
    assert measured["residual"] < 1e-4
    json.dumps(measured)


def test_plots_are_small_pictures_that_hold_their_points(tmp_path: Path) -> None:
    plot = Plot(
        "A title", "x", "y", [Series("one", [1, 10, 100], [1e-6, 1e-3, 1])], x_log=10, y_log=10, limit=(1e-2, "limit")
    )
    path = plot.save(tmp_path / "new" / "plot.png")
    with Image.open(path) as picture:
        assert picture.size == (880, 520)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert path.stat().st_size < 60_000
    assert (255, 178, 92) in colours, "the first series is in the accent colour"


# -- what was found ------------------------------------------------------------------------------------------


def found() -> list[Any]:
    return [e for e in experiments().values() if (FOLDER / e.FILE).exists()]


def test_every_experiment_has_its_results() -> None:
    assert {e.FILE for e in experiments().values()} == {e.FILE for e in found()}


@pytest.mark.parametrize("experiment", found(), ids=lambda e: e.KEY)
def test_the_claims_of_the_full_runs_hold_but_for_goals_not_reached(experiment: Any) -> None:
    results = read_json(FOLDER / experiment.FILE)
    assert results["about"]["size"] == "full"
    assert all(results["about"][key] for key in ("device", "torch", "date"))
    claims = experiment.claims(results)
    assert [claim.row() for claim in claims if not claim.holds and not claim.open] == []
    assert [claim.row() for claim in claims if claim.holds and claim.open] == [], (
        "a goal that is reached is not open any more"
    )


def test_results_and_page_are_those_of_the_files(tmp_path: Path) -> None:
    """Where this fails, run python -m benchmarks.evidence."""
    results, page = gather(FOLDER, tmp_path)
    assert read_json(FOLDER / "results.json") == results
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == page
    for picture in tmp_path.iterdir():
        assert (FOLDER / picture.name).exists()
        assert f"({picture.name})" in page


def test_the_results_hold_the_figures_in_one_place() -> None:
    results = read_json(FOLDER / "results.json")
    assert results["rank_recovery"]["spearman_mean"] >= 0.95
    assert results["rank_recovery"]["residual_max"] <= 1e-3
    assert results["budget"]["worst_error"] <= 0.02
    assert results["budget"]["worst_overshoot"] == 0
    assert results["pareto"]["subjects"] == 10
    assert results["pareto"]["seeds"] >= 3
    for count in (24, 5):
        told = results["pareto"][f"pictures_{count}"]
        assert 0 <= told["pairs_better"] <= told["pairs"] == 70
        assert -1 < told["mean_difference"] < 1
    assert 0 <= results["pareto"]["beats_resize"] <= 10 >= results["pareto"]["beats_fixed"] >= 0
    assert -1 <= results["complexity"]["spearman"] <= 1
    assert 0 <= results["truncation"]["ordered_beats_unordered"] <= 10

"""The experiments on subjects: their arithmetic on made-up records, the twists of the method, and what pages make of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_records import BEST_RATE, Made, everything, record

from benchmarks.evidence import (
    ablations,
    comparison,
    complexity,
    cuts,
    decay,
    entropy,
    equal_bytes,
    keep_records,
    keeping,
    needs,
    pareto,
    records,
    truncation,
    twists,
    variants,
)
from benchmarks.evidence.__main__ import page_of
from benchmarks.evidence.comparison import RESIZED, UNIT, Choice
from benchmarks.evidence.effects import effects, mixtures, standard_error
from benchmarks.evidence.equal_bytes import Point
from benchmarks.evidence.experiment import Experiment
from benchmarks.evidence.measuring import rounded
from benchmarks.evidence.personal import FIXED, PAPER, SETTLING
from benchmarks.models import pack

run_of = cache(everything)


# -- twists --------------------------------------------------------------------------------------------------


def test_a_twist_changes_what_it_says_and_is_undone() -> None:
    network, imp = pack("lora2.adapters.network"), pack("lora2.method.importance")
    schedule, sensitivity = pack("lora2.method.schedule"), pack("lora2.method.sensitivity")
    settings = pack("lora2.config").TrainingConfig()
    own = {name: [getattr(pack(m), a) for m, a, _ in patches] for name, patches in twists.TWISTS.items()}
    j, nu = torch.arange(4.0), torch.tensor([0.3])
    expected, slope = imp.importance(j + 1, nu), imp.log_importance_slope(j + 1, nu)
    with twists.twisted("no gain"):
        deviation, gain = network.init_scale((48, 32), 16, settings)
    c = -math.log(1 - settings.q)
    energy = sum((math.exp(-c / 16 * i) * (1 - math.exp(-c / 16))) ** 2 for i in range(16))
    assert gain == 1.0
    assert deviation == pytest.approx(math.sqrt(16 / (3 * 32 * energy)), rel=1e-9)
    plain, factor = network.init_scale((48, 32), 16, settings)
    assert plain * factor == pytest.approx(deviation, rel=1e-9), "ΛA starts as large either way"
    with twists.twisted("positions from 1"):
        assert torch.equal(imp.importance(j, nu), expected)
        assert torch.equal(imp.log_importance_slope(j, nu), slope)
    with twists.twisted("energy only"):
        assert sensitivity.sensitivities(object()) is None
    rows, mixing = torch.eye(8), pack("lora2.adapters.layer")
    with twists.twisted("not mixed, rate as given"):
        assert mixing.rotate(rows, rows.device) is rows
        assert schedule.size_factor(400, 100) == 1.0
    assert not torch.equal(mixing.rotate(rows, rows.device), rows)
    with twists.twisted("rate as given"):
        assert schedule.size_factor(400, 100) == 1.0
    assert schedule.size_factor(400, 100) == 0.5
    with pytest.raises(ZeroDivisionError), twists.twisted("rate as given"):
        raise ZeroDivisionError
    for name, patches in twists.TWISTS.items():
        assert [getattr(pack(m), a) for m, a, _ in patches] == own[name]


def test_every_twist_that_is_asked_for_is_there() -> None:
    asked = {one for v in variants.variants(comparison.COUNTS[0]) for one in v.twist.split(twists.AND)}
    assert asked == set(twists.TWISTS)
    with pytest.raises(KeyError, match="no such"), twists.twisted("no such"):
        pass


@pytest.mark.parametrize("variant", variants.variants(comparison.COUNTS[0]), ids=lambda v: f"{v.setting} {v.name}")
def test_every_change_is_one_of_a_setting(variant: variants.Variant) -> None:
    settings = pack("lora2.config").TrainingConfig(target_rank=variants.RANK)
    changed = replace(settings, **dict(variant.changes))
    if not variant.twist and variant.changes and "rank_weight" not in dict(variant.changes):
        assert changed != settings, "a change to the default shows nothing"


def test_where_the_papers_form_starts() -> None:
    settings = pack("lora2.config").TrainingConfig(target_rank=variants.PAPER_RANK)
    assert pack("lora2.method.init").initial_ranks(float(variants.PAPER_RANK), [256], settings) == [ablations.START]


# -- cutting and counting ------------------------------------------------------------------------------------


def layers(ranks: dict[str, int], d_out: int = 24, d_in: int = 20) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    factors = pack("lora2.method.factors").Factors
    return {
        name: factors(torch.randn(d_out, r, generator=generator), torch.randn(r, d_in, generator=generator), float(r))
        for name, r in ranks.items()
    }


def test_what_is_cut_fits() -> None:
    whole = layers({"a": 12, "b": 12, "c": 12})
    unit = 3 * 44
    for way in (cuts.resized, cuts.allocated):
        for size, cut in way(whole):
            assert cuts.size_of(cut) <= size * unit
    for share, cut in cuts.shared_out(whole):
        assert share * 0.9 * 12 * unit <= cuts.size_of(cut) <= share * 12 * unit
    for share, cut in cuts.shortened({**whole, **layers({"none": 0})}):
        assert torch.equal(cut["b"].down, whole["b"].down[: round(share * 12)]), "the first positions, as they lie"
        assert cut["none"].rank == 0
    shares = [
        {n: float(f.delta().norm() / whole[n].delta().norm()) for n, f in cut.items()} for _, cut in cuts.resized(whole)
    ]
    # One position of twelve is at most that much of a layer's norm.
    assert all(max(s.values()) - min(s.values()) < 0.35 for s in shares)


def test_positions_in_use() -> None:
    assert needs.count(torch.tensor([5.0, 4.0, 0.5, 0.5])) == 2
    assert needs.count(torch.tensor([5.0, 3.9, 0.6, 0.5])) == 3
    assert needs.count(torch.zeros(3)) == 0
    energies = {"a": torch.tensor([8.0, 0.4]), "b": torch.tensor([1.5, 0.1])}
    assert needs.together(energies, {"a": 10, "b": 100}) == [2, 110]
    weighed = needs.in_use(layers({"a": 4, "b": 0}), {"a": 2.0, "b": 1.0})
    assert weighed["layers"]["b"] == 0
    assert weighed["together"] == weighed["weighed"] == [weighed["layers"]["a"], 44 * weighed["layers"]["a"]]


# -- tuning --------------------------------------------------------------------------------------------------


def test_tuning_walks_until_the_best_lies_inside() -> None:
    made = Made()
    wanted = [(FIXED, 4, 24), (SETTLING, 4, 24), (RESIZED, 2, 24), (PAPER, 2, 24)]
    tuned = comparison.tune(made, wanted, ["tune 1x1", "tune 3x3"])
    for config in wanted:
        assert tuned[config].rate == BEST_RATE
        assert tuned[config].inside
        assert tuned[config].step == comparison.STEPS
        assert all(
            any(rate == pytest.approx(BEST_RATE * f) for rate in tuned[config].tried) for f in (10**-0.25, 10**0.25)
        )
        halves = [
            rate for rate in tuned[config].tried if math.log10(rate) * 2 == pytest.approx(round(math.log10(rate) * 2))
        ]
        assert halves == pytest.approx([1e-3, BEST_RATE, 1e-2]), "by half powers of ten until the best lies inside"
        assert len(tuned[config].tried) == 5, "then a quarter to both sides"


def test_tuning_leaves_out_what_failed_or_is_missing() -> None:
    config = (FIXED, 4, 24)
    made = Made()
    bad = comparison.job(config, "tune 1x1", BEST_RATE, 0)
    made.failed[bad.key] = "it broke"
    tuned = comparison.tune(made, [config], ["tune 1x1"])
    assert tuned[config].coarse in (10**-3.0, 10**-2.0)
    assert tuned[config].rate == pytest.approx(BEST_RATE * 10**-0.25), "the nearest to the best of those that went well"
    stored = records.Stored(made.records)
    assert comparison.tune(stored, [(FIXED, 8, 24)], ["tune 1x1"]) == {}


def test_a_mark_counts_only_at_the_files_size() -> None:
    ours = record(comparison.job((SETTLING, 4, 24), "grid 2x2", BEST_RATE, 0))
    assert [mark["step"] for mark in comparison.usable(ours)] == [100, 150, 200]
    paper = record(comparison.job((PAPER, 2, 24), "grid 2x2", BEST_RATE, 0))
    assert [mark["step"] for mark in comparison.usable(paper)] == [60, 100, 150, 200]
    held = {**paper, "changes": {"budget_mb": 0.1}}
    assert comparison.usable(held) == []
    ours["marks"][1]["loss"] = 0.001
    assert comparison.best((SETTLING, 4, 24), [(1e-3, ours)]) == Choice(1e-3, 100, 0.001, (1e-3,))
    other = record(comparison.job((SETTLING, 4, 24), "grid 3x3", BEST_RATE, 0))
    other["marks"] = other["marks"][-1:]
    choice = comparison.best((SETTLING, 4, 24), [(1e-3, ours), (1e-3, other)])
    assert choice is not None
    assert choice.step == 200, "a step that every run has"
    gone = {**other, "marks": [], "diverged": "no numbers"}
    assert comparison.best((SETTLING, 4, 24), [(1e-3, ours), (1e-3, gone)]) is None


# -- statistics ----------------------------------------------------------------------------------------------


def at(loss: float, rank: float, tuned: float | None = None) -> Point:
    """tuned: on the subjects that settings are tuned on; by default better the larger it is."""
    return Point(loss, 0.05, rank * UNIT, 0.3, 0.05, (loss,), 1 / rank if tuned is None else tuned)


def test_equal_bytes_take_of_ours_that_fit_the_one_that_tuning_chose() -> None:
    """By its loss on the tuning subjects, whatever it does on the one that is reported."""
    found = {("s", (SETTLING, t, 24)): at(1.0 / t, t) for t in (1, 2, 4)}
    found["s", (SETTLING, 8, 24)] = at(0.0, 8, tuned=0.4)  # good here, but tuning could not know
    found["s", (SETTLING, 4, 5)] = found["other", (SETTLING, 4, 24)] = at(0.0, 4, tuned=0.0)
    assert equal_bytes.ours_within(found, "s", 4 * UNIT, 24) == at(0.25, 4)
    assert equal_bytes.ours_within(found, "s", 4 * UNIT - 1, 24) == at(0.5, 2)
    assert equal_bytes.ours_within(found, "s", 0.5 * UNIT, 24) is None
    assert equal_bytes.ours_within(found, "s", 64 * UNIT, 24) == at(0.25, 4)


def test_a_subject_is_beaten_at_every_size_or_not() -> None:
    found = {(s, (SETTLING, t, 24)): at(1.0, t) for s in ("one", "two") for t in (1, 2)}
    found |= {("one", (FIXED, 1, 24)): at(1.25, 1), ("one", (FIXED, 2, 24)): at(1.0, 2)}
    found |= {("two", (FIXED, 1, 24)): at(1.25, 1), ("two", (FIXED, 2, 24)): at(0.8, 2)}
    compared = equal_bytes.pairs(found, FIXED, 24)
    assert equal_bytes.beaten(compared) == {"one": True, "two": False}
    tally = equal_bytes.tally(compared)
    assert (tally["subjects"], tally["beaten"], tally["share"]) == (2, 1, 0.75)
    assert tally["difference"] == pytest.approx((-0.2 + 0 - 0.2 + 0.25) / 4)
    assert tally["worst"] == pytest.approx(0.25)
    cut = {**found, ("one", (RESIZED, 2, 24)): at(0.9, 1.9)}
    assert [p.ours.parameters for p in equal_bytes.pairs(cut, RESIZED, 24)] == [2 * UNIT], (
        "both may have the size of rank 2"
    )
    paper = {**found, ("one", (PAPER, 2, 24)): at(0.9, 1.9)}
    assert [p.ours.parameters for p in equal_bytes.pairs(paper, PAPER, 24)] == [UNIT], (
        "no larger than the paper's form is"
    )
    assert [p.ours.parameters for p in equal_bytes.same_target(found, FIXED, 24)] == [UNIT, 2 * UNIT] * 2
    del found["one", (SETTLING, 1, 24)]
    found["two", (SETTLING, 1, 24)] = at(1.0, 1.1)
    left = [(p.subject, p.rank) for p in equal_bytes.same_target(found, FIXED, 24)]
    assert left == [("one", 2), ("two", 2)], "neither what is missing nor what is larger"


def test_the_error_of_a_pair_is_that_over_seeds() -> None:
    def seeds(*losses: float) -> Point:
        return Point(float(np.mean(losses)), 0.05, UNIT, 0.3, 0.05, losses)

    one, flat = (FIXED, 1, 24), seeds(1.0, 1.0, 1.0)
    found = {("a", (SETTLING, 1, 24)): seeds(1.01, 1.03, 1.05), ("a", one): flat}
    found |= {("b", (SETTLING, 1, 24)): seeds(0.89, 0.90, 0.91), ("b", one): flat}
    compared = equal_bytes.pairs(found, FIXED, 24)
    # Variances 0.02² and 0.01²; their mean over 3 seeds.
    error = math.sqrt((4e-4 + 1e-4) / 2 / 3)
    assert equal_bytes.pair_error(compared) == pytest.approx(error)
    assert [p.subject for p in equal_bytes.surely_worse(compared)] == ["a"], "3 % is more than twice 0.9 %"
    assert [p.subject for p in equal_bytes.surely_better(compared)] == ["b"]
    found["a", (SETTLING, 1, 24)] = seeds(1.00, 1.01, 1.02)
    assert equal_bytes.surely_worse(equal_bytes.pairs(found, FIXED, 24)) == []


def test_rank_by_parts_and_its_largest_fall() -> None:
    """Two subjects of each number of parts, two seeds: the error is over subjects, of their means over seeds."""
    ranks = {1: [(1.0, 1.2), (1.2, 1.4)], 4: [(3.0, 3.0), (5.0, 5.0)], 9: [(2.0, 4.0), (4.0, 4.0)]}
    rows = [{"parts": parts, "ranks": list(seeds)} for parts, many in ranks.items() for seeds in many]
    results = {"graded": [*rows, {"parts": 9, "ranks": []}, {"parts": 16, "ranks": [0.1]}]}
    of = (1, 4, 9)
    levels = complexity.levels(results, of)
    assert [mean for mean, _ in levels.values()] == pytest.approx([1.2, 4.0, 3.5])
    assert [error for _, error in levels.values()] == pytest.approx([0.1, 1.0, 0.5])
    assert complexity.ordered(results, of) == pytest.approx(0.5), "one of three out of its place"
    assert complexity.largest_fall(results, of) == pytest.approx(0.5 / math.hypot(1.0, 0.5))
    assert list(complexity.levels(results)) == [1, 4, 9, 16]
    needs = {"graded": [{**row, "needs": row["ranks"][:1]} for row in rows]}
    assert [mean for mean, _ in complexity.levels(needs, of, "needs").values()] == pytest.approx([1.1, 4.0, 3.0])


def test_a_change_is_measured_pair_by_pair() -> None:
    kept, tuned = run_of()
    kept = dict(kept)
    [variant] = [v for v in variants.OURS if v.setting == "min_rank"]
    jobs = variants.jobs_of(variant, 24, BEST_RATE)
    base = {(j.subject, j.seed): kept[j.key] for j in variants.jobs_of(variants.AS_IT_IS, 24, BEST_RATE)}
    worse = dict(zip(((j.subject, j.seed) for j in jobs), np.linspace(0.98, 1.06, len(jobs)), strict=True))
    for job in jobs:
        changed = json.loads(json.dumps(kept[job.key]))
        for mark, own in zip(changed["marks"], base[job.subject, job.seed]["marks"], strict=True):
            mark["loss"] = own["loss"] * worse[job.subject, job.seed]
        kept[job.key] = changed
    [effect] = [e for e in effects(kept, tuned, 24) if e.variant == variant]
    values = np.array(list(worse.values()))
    assert effect.difference == pytest.approx(float(values.mean()) - 1)
    assert effect.error == pytest.approx(float(values.std(ddof=1)) / len(values) ** 0.5)
    assert (effect.pairs, effect.step, effect.rank) == (8, 200, 4.0)
    assert math.isnan(standard_error([1.0]))
    del kept[jobs[0].key]
    assert variant not in [e.variant for e in effects(kept, tuned, 24)], "not told of until every run is there"


def test_what_is_judged_on_the_same_runs_shares_their_rates() -> None:
    """A cut of rank 64 may have walked to a better rate of rank 64 than rank 64 itself."""
    kept, tuned = dict(run_of()[0]), dict(run_of()[1])
    names, large, cut, other = comparison.tuning_names(), (FIXED, 64, 5), (RESIZED, 1, 5), (FIXED, 32, 5)
    for seed in comparison.TUNING_SEEDS:
        for name in names:
            one = comparison.job(large, name, 1e-2, seed)
            kept[one.key] = {**kept[one.key], "marks": [{**mark, "loss": 0.01} for mark in kept[one.key]["marks"]]}
    assert comparison._shared(tuned, kept, names) == tuned, "none of them has come to that rate"
    found = comparison._shared({**tuned, cut: replace(tuned[cut], rate=1e-2)}, kept, names)
    assert (found[large].rate, found[large].loss) == (1e-2, pytest.approx(0.01))
    assert found[other] == tuned[other], "of runs of its own"
    assert comparison.beyond(large, tuned, kept, names) == pytest.approx(1 - 0.01 / tuned[large].loss), (
        "what was left there"
    )
    assert comparison.beyond(large, found, kept, names) == comparison.beyond(other, tuned, kept, names) == 0


def test_the_size_that_is_needed() -> None:
    curve = {1.0: 0.8, 4.0: 0.4, 16.0: 0.2}
    # Of 0.8 that the best takes off, 75 % leave a loss of 0.4, and 62.5 % one of 0.5: three quarters of the way from 1 to 4.
    assert complexity.needed(curve, 1.0, 0.75) == pytest.approx(4.0)
    assert complexity.needed(curve, 1.0, 0.625) == pytest.approx(4.0**0.75)
    assert complexity.needed(curve, 1.0, 0.2) == 1.0


def test_cuts_are_compared_at_every_share_and_both_ways() -> None:
    rows = []
    for name, gap in (("good", 0.1), ("bad", -0.1)):
        for share in cuts.SHARES:
            for method, kind, loss in (
                (SETTLING, "shortened", 1.0), (SETTLING, "shared_out", 1.0), (FIXED, "shortened", 1.0 + gap),
            ):  # fmt: skip
                rows.append(
                    {"subject": name, "method": method, "pictures": 24, "kind": kind, "share": share, "loss": loss}
                )
    for share in cuts.SHARES:
        more = {"subject": "good", "method": FIXED, "pictures": 24, "kind": "shared_out", "share": share, "loss": 1.0}
        rows += [more, {**more, "subject": "bad", "loss": 1.1}]
    results = {"rows": rows}
    assert truncation.both_ways(results, 24) == ["good"]
    assert truncation.ordered_wins(results, 24, "shared_out", "shared_out") == ["bad"], "as good is not better"
    rows[1]["loss"] = 2.0  # by the loader, at one share
    assert truncation.ordered_wins(results, 24, "shortened") == ["good"]
    assert truncation.both_ways(results, 24) == []


# -- pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", [pareto, keeping, complexity, truncation, ablations, decay], ids=lambda e: e.KEY)
def test_a_page_and_its_figures_from_records(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept, _ = run_of()
    path = tmp_path / "records.jsonl.gz"
    about, slim, missing = keep_records.compact(kept)
    keep_records.write(path, about, slim)
    assert not missing
    told, read = records.read.__wrapped__(path)
    tuned = records.choices(records.Stored(read))
    assert tuned == run_of()[1], "what is kept is enough to tune by"
    monkeypatch.setattr(records, "full", lambda: (told, read, tuned))
    looked = [{"loss": 1.0, "entropy": e} for e in (1.0, 0.8)]
    made = [{"weight": w, "before": looked[0], "after": looked[w > 0], "ranks": [0, 1.0, 2]} for w in entropy.WEIGHTS]
    monkeypatch.setattr(entropy, "run", lambda full: {"steps": 1, "seeds": [0], "runs": made})
    results = json.loads(json.dumps(experiment.run(full=True)))
    write_page = page_of(experiment.__name__.rpartition(".")[2])
    page = write_page(results, tmp_path)
    for picture in tmp_path.glob("*.png"):
        assert f"({picture.name})" in page
    assert results["about"]["device"] == "a GPU"
    summary, claims = experiment.summary(results), experiment.claims(results)
    if experiment is pareto:
        assert (summary["beats_fixed"], summary["beats_resize"], summary["subjects"]) == (10, 10, 10)
        assert summary["seeds"] == len(comparison.SEEDS)
        assert [claim.words for claim in claims if not claim.holds] == [
            c.words for c in claims if "stopping points" in c.words
        ]
        worse = [
            row
            for row in results["points"]
            if (row["subject"], row["method"], row["rank"]) == ("grid 4x4", SETTLING, 8)
        ]
        for row in worse:
            row["loss"] = 1.0
        assert experiment.summary(results)["beats_fixed"] == 9
        assert "Not better than every fixed rank at every size: grid 4x4." in page_of(
            experiment.__name__.rpartition(".")[2]
        )(results, tmp_path)
        # The made-up loss at the end does not depend on the steps, and ours is 3 % lower.
        assert [(row["pictures"], row["rank"]) for row in results["longer"]] == [(24, 8), (24, 32), (5, 8), (5, 32)]
        for row in results["longer"]:
            assert row[FIXED][0] == row[SETTLING][0] == pytest.approx(0.0, abs=1e-6)
            assert row["ours_200"][0] == row["ours_400"][0] == pytest.approx(-0.03, abs=1e-6)
        assert "+0.0 ± 0.0 % | -3.0 ± 0.0 % | -3.0 ± 0.0 % |" in page
    if experiment is complexity:
        # The made-up ranks and losses rise with the number of parts.
        assert summary["spearman"] == pytest.approx(1.0)
        assert summary["largest_fall"] < 0
        assert summary["spearman_to_100"] == pytest.approx(1.0)
        assert list(summary["needs"]) == list(summary["mean_rank"])
        assert summary["ten_subjects_24"]["needed"] == pytest.approx(1.0)
        assert all(claim.holds for claim in claims)
    if experiment is keeping:
        # 8 to 10 by the subject's parts; equal for both shares and both numbers of pictures.
        assert summary["pictures_5_keep_0.95"]["mean_rank"] == [8.02, pytest.approx(8.77, abs=0.005), 10.0]
        against = summary["pictures_24_keep_0.98"]["difference"]
        assert against["fixed_64"] > -0.03 > against["fixed_8"]
    if experiment is truncation:
        assert summary["ordered_beats_unordered"] == 10
        assert summary["pictures_24"]["fixed_cut"]["0.25"] == pytest.approx(1.3 / 0.97 - 1, abs=0.02)
    if experiment is ablations:
        assert summary["pictures_24"]["change_better"] == 0
    if experiment is decay:
        assert summary["pictures_5"] == {"weight_decay": 4.8, "none": [0.02, 0.0], "drift": 1.4, "drift_without": 1.496}
        assert all(claim.holds for claim in claims)
        for row in results["rows"]:
            row["difference"] -= 0.03 * (row["share"] == 4.0)
        better = experiment.claims(results)[: len(decay.PICTURES)]
        assert [claim.value for claim in better] == pytest.approx([0.01] * len(better), abs=1e-6)
        assert not any(claim.holds for claim in better)


def test_a_change_of_ours_is_begun_with_what_is_kept() -> None:
    """All records that are kept can be gone on from, and say where they were made; after a change of ours the others alone."""
    made, _ = run_of()
    about, slim, _ = keep_records.compact(made)
    kept_before = {record["key"]: record for record in slim}
    whole = {record["key"]: record for record in keep_records.beginning(kept_before, changed=False)}
    assert keep_records.compact(whole) == (about, slim, set()), "nothing is lost on the way"
    begun = keep_records.beginning(kept_before, changed=True)
    assert {record["method"] for record in begun} == {FIXED, PAPER}
    ours = {key: {**record, "device": "another"} for key, record in made.items() if record["method"] == SETTLING}
    again, kept, missing = keep_records.compact({record["key"]: record for record in begun} | ours)
    assert not missing
    assert [{**record, "device": ""} for record in kept] == [{**record, "device": ""} for record in slim]
    assert again["devices"]["another"] == sum(record["method"] == SETTLING for record in slim)
    assert sum(again["devices"].values()) == again["runs"] == about["runs"]
    assert all(keep_records.job_of(key).key == key for key in made)


def test_mixtures_are_compared_at_the_best_of_either() -> None:
    kept, tuned = run_of()
    rows = mixtures(kept, tuned)
    assert [row["target"] for row in rows] == list(comparison.TARGETS)
    for row in rows:
        assert row["rate_with"] == row["rate_without"] == BEST_RATE
        assert row["difference"] == pytest.approx(1 / 1.01 - 1, abs=1e-5)
        assert row["with"] == pytest.approx(row["without"] / 1.01, rel=1e-5)


def test_six_digits_are_kept() -> None:
    assert rounded({"a": [0.123456789, 3, (1e-9 / 3,)], "b": True}) == {"a": [0.123457, 3, [3.33333e-10]], "b": True}

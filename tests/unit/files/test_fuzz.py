"""The short form of `make fuzz`: handmade hostile files, and mutations with a fixed seed.

Each ends in a result or our error, soon, and in little memory.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from training import pack

from dev.fuzzing import corpus, mutate, oracle

SECONDS = 10.0
"""The processor's time that one file takes at most; the slowest takes about two."""

MEGABYTES = 1000
"""What reading them may add to the process at most: the largest header of 16 MB becomes some 500 MB of Python's objects."""

HOSTILE = corpus.good() | corpus.hostile()


def peak() -> float:
    """The most memory that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def test_handmade_files_end_in_a_result_or_our_error(tmp_path: Path) -> None:
    """Header bombs, deep JSON, huge shapes, overlaps, NaN, paths, control characters, Unicode's tricks, markup."""
    path, before = tmp_path / "hostile.safetensors", peak()
    ends: Counter[str] = Counter()
    for name, data in HOSTILE.items():
        path.write_bytes(data)
        started = time.process_time()
        try:
            ends[oracle.exercise(path, picture=len(data) % 40 == 0)] += 1
        except Exception as error:
            raise AssertionError(f"file {name!r}") from error
        assert time.process_time() - started < SECONDS, name
    assert peak() - before < MEGABYTES
    assert ends["read"] > 300, "most texts that mean harm are only texts"
    assert len(ends) > 20, "the others fail for many reasons"
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.safetensors"]


def test_mutated_files_end_in_a_result_or_our_error(tmp_path: Path) -> None:
    """Six hundred files, each a few steps from one that was there before."""
    path, rng = tmp_path / "mutated.safetensors", random.Random(20260321)
    files = [data for data in HOSTILE.values() if len(data) < 20_000]
    ends: Counter[str] = Counter()
    for number in range(600):
        data = mutate.mutated(rng.choice(files), rng)
        path.write_bytes(data)
        try:
            end = oracle.exercise(path, picture=number % 100 == 0)
        except Exception as error:
            (kept := tmp_path / f"broken-{number}.safetensors").write_bytes(data)
            raise AssertionError(f"mutation {number}, kept as {kept}") from error
        ends[end] += 1
        if end == "read":
            files[rng.randrange(len(files))] = data  # what reads is where the next steps go deeper
    assert 100 < ends["read"] < 500
    assert len(ends) > 50


@pytest.mark.parametrize("fault", ["exec", "write"])
def test_the_guard_sees_what_it_is_for(fault: str, tmp_path: Path) -> None:
    """Code that runs, or a file that is written, while a file is read."""
    faults = {"exec": lambda: exec("1"), "write": lambda: (tmp_path / "x").write_text("x")}  # noqa: S102
    with oracle.guarded(), pytest.raises(oracle.Broken):
        faults[fault]()


def test_a_second_pair_of_a_layer_never_comes_to_light(tmp_path: Path) -> None:
    """Found by fuzzing: cutting the pair that ComfyUI applies uncovered another of the same layer, which it then applied."""
    first, second = corpus.layer("diffusion_model.a", style=0), corpus.layer("diffusion_model.a", style=2)
    nothing = [corpus.Part(part.name, part.dtype, part.shape, b"\0") if part.shape else part for part in first]
    path = tmp_path / "two.safetensors"
    path.write_bytes(corpus.Parts([*nothing, *second[:2]]).to_bytes())
    document = pack("lora2.files.document").read(path)
    assert set(document.other) == {part.name for part in second[:2]}
    after = pack("lora2.files.resize").resize(document, share=0.5)
    assert after.ranks_after == {"diffusion_model.a": 0}
    assert after.document.state_dict() == {}


def test_numbers_too_far_apart_for_one_way_are_measured_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by fuzzing: an eigendecomposition that does not converge is no reason to fail."""
    import torch

    effective, factors = pack("lora2.method.svd"), pack("lora2.method.factors").Factors
    g = torch.Generator().manual_seed(0)
    layer = factors(torch.randn(6, 3, generator=g), torch.randn(3, 5, generator=g))
    right = torch.linalg.svdvals(layer.delta().double())[:3] ** 2

    def fails(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert torch.allclose(effective.squared_singular_values(layer), right, rtol=1e-6)  # delta() is float32
    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    with pytest.raises(pack("lora2.util.errors").LoraError, match="too far apart"):
        effective.squared_singular_values(layer)


def test_a_file_of_too_many_tensors_is_no_lora(tmp_path: Path) -> None:
    """Each layer costs a moment; a header of some megabytes could hold hundreds of thousands."""
    limit = pack("lora2.files.reader").MAX_TENSORS
    path = tmp_path / "many.safetensors"
    entry = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(corpus.with_header(corpus.dump({f"t{i}": entry for i in range(limit + 1)})))
    with pytest.raises(
        pack("lora2.util.errors").LoraError, match=rf"contains {limit + 1} tensors, the limit is {limit}"
    ):
        pack("lora2.files.document").read(path)
    path.write_bytes(corpus.with_header(corpus.dump({f"t{i}": entry for i in range(limit)})))
    assert len(pack("lora2.files.document").read(path).other) == limit

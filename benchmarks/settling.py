"""Bringing all layers into singular order and cutting them to a budget, by several ways: `python -m benchmarks.settling`.

The layers are those of SDXL's attention, 560, at the ranks that a run is cut at on its way from four times the target to it. Ways
are timed on a few layers of each shape (--layers) and counted up to all; `cut_to_budget` as the pack does it is also run on all of them
where there is a GPU. Errors are over singular_order in float64 on the CPU: of singular values, over the largest, and of ΔW cut
to the next rank, over what the best cut leaves out of ΔW (its own is 0).

With --out, the rows go into settling.json there after each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import dumped
from dev.packs import pack

factors_of = pack("lora2.method.factors").Factors
singular_order = pack("lora2.method.svd").decompose
singular_orders = pack("lora2.method.svd").decompose_layers
fit = pack("lora2.method.allocation").cut_to_budget

SHAPES = {(1280, 1280): 360, (1280, 2048): 120, (640, 640): 60, (640, 2048): 20}
"""Outputs and inputs of SDXL's attention layers, and how many of each."""

CUTS = ((256, 160), (160, 101), (101, 64))
"""Ranks before and after."""

Halves = tuple[Tensor, Tensor, Tensor]
"""σ (k,), up (d_out, kept), down (kept, d_in)."""
Way = Callable[[Any, int, torch.device], Halves]


def layer(d_out: int, d_in: int, rank: int, seed: int) -> Any:
    """A layer like those of a run: positions that weigh less and less, and an up factor of which a few directions lead."""
    g = torch.Generator().manual_seed(seed)
    mass = torch.exp(-torch.arange(rank) * 3.0 / rank).sqrt()
    up = torch.randn(d_out, rank, generator=g) + torch.randn(d_out, 4, generator=g) @ torch.randn(4, rank, generator=g)
    return factors_of(1e-3 * up * mass, torch.randn(rank, d_in, generator=g) * d_in**-0.5 * mass[:, None], float(rank))


def one_by_one(factors: Any, kept: int, device: torch.device) -> Halves:
    """Two QR decompositions in float64, the core where singular_order puts it."""
    ordered, sigma = singular_order(factors_of(factors.up.to(device), factors.down.to(device), factors.alpha))
    head = ordered.head(kept)
    return sigma.cpu(), head.up.float().cpu(), head.down.float().cpu()


def by_products(factors: Any, kept: int, device: torch.device) -> Halves:
    """The pack's own way for many layers, with one layer."""
    order = singular_orders({"": factors}, device)[""]
    head = order.head(kept)
    return order.sigma, head.up, head.down


def qr(dtype: torch.dtype, core_on: str) -> Way:
    """QR on the device in one type, the core in float64 there or on the CPU."""

    def way(factors: Any, kept: int, device: torch.device) -> Halves:
        (q_up, r_up), (q_down, r_down) = (
            torch.linalg.qr(side.to(device, dtype)) for side in (factors.up, factors.down.t().contiguous())
        )
        core = r_up.double() @ r_down.double().t()
        place = device if core_on == "device" else torch.device("cpu")
        u, sigma, vh = (t.to(device) for t in torch.linalg.svd(core.to(place)))
        root = sigma[:kept].sqrt()
        up, down = q_up @ (u[:, :kept] * root).to(dtype), (root[:, None] * vh[:kept]).to(dtype) @ q_down.t()
        return sigma.cpu(), up.float().cpu(), down.float().cpu()

    return way


def all_on_device(factors: Any, kept: int, device: torch.device) -> Halves:
    """Products, Cholesky and the eigenvectors of the core's square on the device: nothing but the result comes back."""
    up, down = factors.up.to(device).double(), factors.down.to(device).double()
    (l_up, i_up), (l_down, i_down) = (_triangle(g) for g in (up.t() @ up, down @ down.t()))
    core = l_up.t() @ l_down
    values, vectors = torch.linalg.eigh(core.t() @ core)
    sigma, v = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    root = sigma[:kept].sqrt()
    new_up = up @ (i_up.t() @ (core @ v[:, :kept] / root))
    new_down = ((i_down.t() @ v[:, :kept]) * root).t() @ down
    return sigma.cpu(), new_up.float().cpu(), new_down.float().cpu()


def _triangle(gram: Tensor) -> tuple[Tensor, Tensor]:
    lower = torch.linalg.cholesky_ex(gram)[0]
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return lower, torch.linalg.solve_triangular(lower, eye, upper=False)


WAYS: dict[str, Way] = {
    "singular_order": one_by_one,
    "products, rest on the CPU (the pack)": by_products,
    "float64 QR, core on the CPU": qr(torch.float64, "CPU"),
    "float32 QR, core on the CPU": qr(torch.float32, "CPU"),
    "products, rest on the device": all_on_device,
    "float64 QR, core on the device": qr(torch.float64, "device"),
}


def wait(device: torch.device) -> float:
    """The time when all work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def errors(found: Halves, exact: Halves, delta: Tensor) -> tuple[float, float]:
    """Of σ over the largest, and by how much the cut misses more of ΔW than the best one, over that."""
    kept = found[1].shape[1]
    best = float(exact[0][kept:].norm())
    missed = float((delta - found[1].double() @ found[2].double()).norm())
    return float((found[0] - exact[0]).abs().max() / exact[0][0]), abs(missed / best - 1)


def measure(device: torch.device, per_shape: int, seconds: float, add: Callable[..., None]) -> None:
    """A row for every way and rank: seconds for all 560 layers, and the errors."""
    start = time.perf_counter()
    for rank, kept in CUTS:
        layers = {shape: [layer(*shape, rank, i) for i in range(per_shape)] for shape in SHAPES}
        some = {shape: those[0] for shape, those in layers.items()}
        exact = {shape: one_by_one(factors, kept, torch.device("cpu")) for shape, factors in some.items()}
        deltas = {shape: factors.up.double() @ factors.down.double() for shape, factors in some.items()}
        places = [device] if device.type == "cpu" else [torch.device("cpu"), device]
        for place in places:
            for name, way in WAYS.items():
                if place.type == "cpu" and ("device" in name or ("QR" in name and device.type != "cpu")):
                    continue
                if time.perf_counter() - start > seconds:
                    add(way=name, on=place.type, rank=rank, not_measured="no time left")
                    continue
                try:
                    total, off = 0.0, list[tuple[float, float]]()
                    for shape, count in SHAPES.items():
                        off.append(errors(way(some[shape], kept, place), exact[shape], deltas[shape]))
                        begun = wait(place)
                        for factors in layers[shape]:
                            way(factors, kept, place)
                        total += (wait(place) - begun) / per_shape * count
                    add(way=name, on=place.type, rank=rank, seconds=round(total, 2),
                        sigma_error=f"{max(e for e, _ in off):.1e}", cut_error=f"{max(e for _, e in off):.1e}")  # fmt: skip
                except RuntimeError as error:
                    add(way=name, on=place.type, rank=rank, failed=str(error).splitlines()[0])
        if device.type == "cuda":
            whole = {f"{s}{i}": layers[s][i % per_shape] for s, count in SHAPES.items() for i in range(count)}
            budget = sum(f.cost for f in whole.values()) * kept
            for place in places:
                if time.perf_counter() - start > seconds:
                    add(way="fit, all layers", on=place.type, rank=rank, not_measured="no time left")
                    continue
                begun = wait(place)
                fit(whole, budget, device=place)
                add(way="fit, all layers", on=place.type, rank=rank, seconds=round(wait(place) - begun, 2))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=2, help="layers of each shape that are timed")
    parser.add_argument("--seconds", type=float, default=25, help="begin nothing after this time")
    parser.add_argument("--out", type=Path, help="folder for settling.json")
    told = parser.parse_args()
    rows: list[dict[str, object]] = []
    device = torch.device(told.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    about = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(about, flush=True)

    def add(**row: object) -> None:
        rows.append({**row, **about})
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        if told.out is not None:
            told.out.mkdir(parents=True, exist_ok=True)
            (told.out / "settling.json").write_text(dumped(rows), encoding="utf-8")

    with torch.inference_mode():
        measure(device, told.layers, told.seconds, add)


if __name__ == "__main__":
    main()

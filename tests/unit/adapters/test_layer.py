"""One adapted layer: equality with the dense form W + B diag(Λ) A, and what resizing must not change."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora2.adapters.capacity import next_capacity
from lora2.adapters.layer import Adapter, adaptable, module_shape, round_up_capacity
from lora2.method.factors import Factors
from lora2.util.errors import LoraError

CPU = torch.device("cpu")

# name: (layer, shape of an input)
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 20), (5, 12)),
    "linear, no bias, picture tokens": (lambda: nn.Linear(12, 7, bias=False), (2, 3, 4, 12)),
    "linear, one vector": (lambda: nn.Linear(12, 20), (12,)),
    "conv1d": (lambda: nn.Conv1d(6, 9, 3), (2, 6, 11)),
    "conv1d, stride, padding, dilation, groups": (
        lambda: nn.Conv1d(6, 9, 3, stride=2, padding=3, dilation=2, groups=3),
        (2, 6, 11),
    ),
    "conv1d, same": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=3), (2, 4, 13)),
    "conv1d, reflect": (lambda: nn.Conv1d(4, 6, 5, padding=2, padding_mode="reflect"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7)),
    "conv2d, one picture without a batch": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 7)),
    "conv2d, 1 x 1": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "conv2d, uneven": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 3)),
        (2, 4, 9, 8),
    ),
    "conv2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2), (2, 4, 8, 8)),
    "conv2d, groups": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (2, 8, 6, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 6, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 6, 6)),
    "conv2d, replicate": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, padding_mode="replicate", groups=2),
        (2, 4, 6, 6),
    ),
    "conv2d, circular": (
        lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode="circular"),
        (2, 4, 7, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 4, 5, 6)),
    "conv3d, all of it": (
        lambda: nn.Conv3d(4, 6, (1, 3, 2), (1, 2, 1), (0, 2, 1), (1, 2, 1), groups=2),
        (2, 4, 3, 7, 6),
    ),
    "conv3d, replicate": (lambda: nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate"), (1, 2, 4, 4, 4)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
SHAPES = ["linear", "conv1d, stride, padding, dilation, groups", "conv2d, reflect", "conv3d, all of it"]
"""One layer per number of dimensions, for what depends on the factors' shapes and not on the layer's geometry."""
every_shape = pytest.mark.parametrize("name", SHAPES)


def make(name: str, capacity: int = 8, rank: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Adapter, Tensor]:
    """An adapter as in mid-training, both factors random, Λ falling and zero from `rank` on; an input."""
    generator = torch.Generator().manual_seed(len(name))
    build, shape = LAYERS[name]
    module = build().to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(generator=generator)
    adapter = Adapter(module, capacity, 0.7, CPU, generator)
    for part in ("down", "up"):
        shape_of = getattr(adapter, part).shape
        data = torch.randn(shape_of, generator=generator, dtype=torch.float64)
        setattr(adapter, part, nn.Parameter(data.to(dtype)))
    importance = torch.zeros(capacity + 100, dtype=dtype)
    importance[:rank] = 0.9 * 0.8 ** torch.arange(rank)
    adapter.importance = importance
    return adapter, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def dense(adapter: Adapter, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """The layer itself, with the weight W + Σ_j Λ_j b_j a_jᵀ written out."""
    weight = adapter.module.weight
    assert isinstance(weight, Tensor)
    delta = torch.einsum("jo,j,ji->oi", up, scale, down.flatten(1)).reshape(weight.shape)
    return functional_call(adapter.module, {"weight": weight + delta}, (x,))


def scale_of(adapter: Adapter) -> Tensor:
    if adapter.importance is None:
        return torch.ones(adapter.capacity, dtype=adapter.down.dtype)
    return adapter.importance[: adapter.capacity]


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


# -- forward and backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pruned"), [*((n, False) for n in LAYERS), ("linear", True), ("conv2d, groups", True)]
)
def test_output_and_gradients_are_those_of_the_dense_form(name: str, pruned: bool) -> None:
    adapter, x = make(name)
    if pruned:
        adapter.importance = None
    scale = scale_of(adapter)
    x.requires_grad_()
    down, up = (p.detach().clone().requires_grad_() for p in (adapter.down, adapter.up))
    expected = dense(adapter, x, down, up, scale)
    output = adapter.module(x) + adapter(x)
    assert output.shape == expected.shape
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((output * probe).sum(), (x, adapter.down, adapter.up))
    wanted = torch.autograd.grad((expected * probe).sum(), (x, down, up))
    # Sums of some hundred float64 products, each rounded to 1.1e-16.
    assert relative(output, expected) < 1e-13
    for one, other in zip(got, wanted, strict=True):
        assert relative(one, other) < 1e-13
    if not pruned:
        assert not got[2][5:].any(), "components beyond the rank learn nothing"


@pytest.mark.parametrize(
    ("name", "pruned"),
    [*((n, False) for n in LAYERS if "linear" in n), ("linear", True), ("conv2d", False), ("conv3d, all of it", True)],
)
def test_adding_to_the_output_equals_the_dense_form(name: str, pruned: bool) -> None:
    """`add`: output and all gradients, twice, so that the second pass accumulates onto the first."""
    adapter, x = make(name)
    if pruned:
        adapter.importance = None
    down, up = (p.detach().clone().requires_grad_() for p in (adapter.down, adapter.up))
    x.requires_grad_()
    other = x.detach().clone().requires_grad_()
    for seed in (1, 2):
        expected = dense(adapter, other, down, up, scale_of(adapter))
        output = adapter.add(adapter.module(x), x)
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (output * probe).sum().backward()
        (expected * probe).sum().backward()
        assert relative(output, expected) < 1e-13
        for one, reference in ((x, other), (adapter.down, down), (adapter.up, up)):
            assert one.grad is not None
            assert reference.grad is not None
            assert relative(one.grad, reference.grad) < 1e-13


def test_adding_accepts_an_input_without_gradient_and_does_not_change_the_output() -> None:
    adapter, x = make("linear", dtype=torch.float32)
    plain = adapter.module(x)
    before = plain.clone()
    added = adapter.add(plain, x)
    assert torch.equal(plain, before)
    added.square().sum().backward()
    assert adapter.down.grad is not None
    assert x.grad is None


@every_shape
def test_exported_factors_give_the_same_output(name: str) -> None:
    """Base + layer with weight ΔW = factors(rank).delta(), √Λ on both sides, alpha equal to the rank."""
    adapter, x = make(name)
    factors = adapter.factors(5)
    assert factors.rank == factors.alpha == 5
    assert factors.scale == 1
    assert not factors.up.requires_grad
    assert not factors.down.requires_grad
    weight = adapter.module.weight
    assert isinstance(weight, Tensor)
    assert factors.delta().shape == weight.shape
    expected = functional_call(adapter.module, {"weight": weight + factors.delta()}, (x,))
    assert relative(adapter.module(x) + adapter(x), expected) < 1e-13
    root = scale_of(adapter)[:5].sqrt()
    tail = (1,) * (adapter.down.ndim - 1)
    assert torch.allclose(factors.down, adapter.down[:5] * root.view(-1, *tail), rtol=1e-15)
    assert torch.allclose(factors.up.flatten(1).t(), adapter.up[:5] * root[:, None], rtol=1e-15)


@every_shape
def test_single_and_half_precision(name: str) -> None:
    """float32 arrays; the path runs in the input's dtype, as autocast and bf16 models need."""
    adapter, x = make(name, dtype=torch.float32)
    down, up, scale = adapter.down.double(), adapter.up.double(), scale_of(adapter).double()
    adapter.module.double()
    expected = dense(adapter, x.double(), down, up, scale) - adapter.module(x.double())
    # At most 108 + 8 products are summed: √116 roundings of 6e-8, or of 4e-3 in bf16.
    assert relative(adapter(x), expected) < 2e-6
    half = adapter(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative(half, expected) < 2e-2
    half.float().square().mean().backward()
    assert adapter.down.grad is not None
    assert adapter.down.grad.dtype == torch.float32


def test_a_quantized_linear_layer_needs_only_its_features() -> None:
    """Its weight may be packed in any way."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 6, 4
            self.weight = nn.Parameter(torch.zeros(12, dtype=torch.uint8), requires_grad=False)

    assert adaptable(Packed())
    assert module_shape(Packed()) == (4, 6)
    adapter = Adapter(Packed(), 8, 1.0, CPU, torch.Generator().manual_seed(0))
    assert adapter(torch.ones(3, 6)).shape == (3, 4)


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.Embedding(3, 4), nn.ConvTranspose1d(2, 2, 3)])
def test_other_layers_raise(module: nn.Module) -> None:
    assert not adaptable(module)
    with pytest.raises(LoraError, match=type(module).__name__):
        Adapter(module, 8, 1.0, CPU, torch.Generator())


# -- growing and shrinking -----------------------------------------------------------------------------------


@every_shape
def test_growing_does_not_change_the_output(name: str) -> None:
    """Sums of whole numbers are exact in any order, so the difference must be exactly zero."""
    adapter, x = make(name, rank=8)
    with torch.no_grad():
        for tensor in (adapter.down, adapter.up, adapter.importance, x):
            assert tensor is not None
            tensor.copy_((tensor * 3).round())
    adapter.importance = torch.arange(1.0, 200.0, dtype=torch.float64)  # new components count at once
    before = adapter(x)
    assert before.any()
    for capacity in (16, 24, 104):
        adapter.resize(capacity, torch.Generator().manual_seed(0))
        assert adapter.capacity == capacity
        assert torch.equal(adapter(x), before)
        assert adapter.down[8:].all()
        assert not adapter.up[8:].any()


@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, torch.float32) for n in SHAPES), ("linear", torch.bfloat16), ("conv2d", torch.bfloat16)]
)
def test_new_components_add_exactly_zero(name: str, dtype: torch.dtype) -> None:
    adapter, x = make(name, dtype=torch.float32)
    adapter.importance = torch.rand(64, generator=torch.Generator().manual_seed(0))
    adapter.resize(40, torch.Generator().manual_seed(0))
    adapter.down, adapter.up = nn.Parameter(adapter.down.data[8:]), nn.Parameter(adapter.up.data[8:])
    assert torch.equal(adapter(x.to(dtype)), torch.zeros_like(adapter(x.to(dtype))))


def test_growing_changes_a_float32_output_by_rounding_only() -> None:
    """Another kernel may sum in another order: an ulp or two."""
    adapter, x = make("linear", capacity=16, rank=16, dtype=torch.float32)
    before = adapter(x)
    adapter.resize(24, torch.Generator().manual_seed(0))
    assert relative(adapter(x), before) < 1e-6


def test_new_rows_have_the_initial_standard_deviation() -> None:
    adapter, _ = make("linear", dtype=torch.float32)
    adapter.resize(1008, torch.Generator().manual_seed(5))
    new = adapter.down.detach()[8:]
    # 12,000 numbers: the standard deviation is known to 0.65 %, the mean to 0.7 / √12000.
    assert float(new.std()) == pytest.approx(0.7, rel=0.02)
    assert abs(float(new.mean())) < 3 * 0.7 / 12000**0.5
    again, _ = make("linear", dtype=torch.float32)
    again.resize(1008, torch.Generator().manual_seed(5))
    assert torch.equal(again.down, adapter.down), "the generator determines the new rows"


@every_shape
def test_shrinking_removes_the_last_components(name: str) -> None:
    adapter, x = make(name, capacity=24, rank=20)
    cut = adapter.factors(8)
    down, up = adapter.down.detach().clone(), adapter.up.detach().clone()
    adapter.resize(8, torch.Generator())
    assert torch.equal(adapter.down, down[:8])
    assert torch.equal(adapter.up, up[:8])
    weight = adapter.module.weight
    assert isinstance(weight, Tensor)
    expected = functional_call(adapter.module, {"weight": weight + cut.delta()}, (x,))
    assert relative(adapter.module(x) + adapter(x), expected) < 1e-13


@pytest.mark.parametrize(("name", "alpha"), [*((n, 1.2) for n in SHAPES), ("linear", None)])
def test_loading_plain_factors(name: str, alpha: float | None) -> None:
    """A pruned layer holds exactly its rank, which need not be a multiple of 8, with alpha applied."""
    source, x = make(name)
    given = Factors(source.factors(3).up, source.factors(3).down, alpha)
    adapter, _ = make(name)
    adapter.importance = None
    adapter.load(given)
    assert adapter.capacity == 3
    assert adapter.down.is_contiguous()
    assert adapter.up.is_contiguous()
    assert relative(adapter.factors(3).delta(), given.delta()) < 1e-15
    weight = adapter.module.weight
    assert isinstance(weight, Tensor)
    expected = functional_call(adapter.module, {"weight": weight + given.delta()}, (x,))
    assert relative(adapter.module(x) + adapter(x), expected) < 1e-13


@pytest.mark.parametrize("name", ["linear", "conv2d, groups"])
def test_components_of_weight_zero_restart(name: str) -> None:
    """Two zero rows would have a zero gradient forever."""
    adapter, x = make(name, capacity=6)
    adapter.importance = None
    with torch.no_grad():
        adapter.down[2], adapter.up[2] = 0, 0
        adapter.down[4] *= 1e-6
        adapter.up[4] *= 1e-6
    down, up, before = adapter.down.detach().clone(), adapter.up.detach().clone(), adapter(x)
    adapter.restart_zero_components(torch.Generator().manual_seed(0))
    for component in range(6):
        same_down = torch.equal(adapter.down[component], down[component])
        same_up = torch.equal(adapter.up[component], up[component])
        assert (same_down and same_up) == (component not in (2, 4))
    assert not adapter.up[[2, 4]].any()
    assert adapter.down[[2, 4]].all()
    # The removed values are 1e-12 of one component.
    assert relative(adapter(x), before) < 1e-11
    adapter(x).square().sum().backward()
    assert adapter.up.grad is not None
    assert bool(adapter.up.grad.flatten(1).any(1).all()), "every component can learn again"


def test_rotation_keeps_the_output_in_half_precision_and_leaves_out_restarted_components() -> None:
    """A weak layer, singular values from 1e-3, whose last components are restarted with rows hundreds of times as long.

    bfloat16 keeps 8 bits: 2e-3 is rounding. If the new rows took part in the rotation it would be 4e-2.
    """
    torch.manual_seed(0)
    factors = [torch.linalg.qr(torch.randn(256, 4))[0].t() * torch.logspace(-1.5, -2, 4)[:, None] for _ in range(2)]
    adapter = Adapter(nn.Linear(256, 256), 8, 0.7, CPU, torch.Generator().manual_seed(0))
    adapter.importance = None
    none = torch.zeros(4, 256)
    adapter.load(Factors(torch.cat([factors[0], none]).t(), torch.cat([factors[1], none])))
    adapter.restart_zero_components(torch.Generator().manual_seed(1))
    new = adapter.down.detach()[4:].clone()
    adapter.rotate()
    assert torch.equal(adapter.down.detach()[4:], new)
    assert not adapter.up[4:].any()
    lengths = adapter.down.detach()[:4].norm(dim=1)
    assert float(lengths.max() / lengths.min()) < 1.1, "the others are rotated: their norms were 1 to 3.2"
    x = torch.randn(64, 256)
    half = (x @ adapter.down.detach().bfloat16().float().t()) @ adapter.up.detach().bfloat16().float()
    assert relative(half, x @ factors[1].t() @ factors[0]) < 5e-3


@pytest.mark.parametrize("rank", [1, 3])
def test_loading_copies(rank: int) -> None:
    """Training must not write into the caller's memory, even if its up factor has the adapter's own layout."""
    up, down = torch.randn(rank, 24).t(), torch.randn(rank, 16)
    kept = up.clone(), down.clone()
    adapter = Adapter(nn.Linear(16, 24), 8, 0.7, CPU, torch.Generator().manual_seed(0))
    adapter.load(Factors(up, down))
    adapter.up.data.add_(1)
    adapter.down.data.add_(1)
    assert torch.equal(up, kept[0])
    assert torch.equal(down, kept[1])


# -- capacities ----------------------------------------------------------------------------------------------


def test_capacities_are_multiples_of_eight_that_hold_the_rank() -> None:
    assert [round_up_capacity(rank) for rank in (1, 7, 8, 9, 16, 17, 512)] == [8, 8, 8, 16, 16, 24, 512]
    for limit in (1, 5, 8, 20, 100):
        for capacity in range(8, round_up_capacity(limit) + 1, 8):
            for rank in range(1, limit + 1):
                new = next_capacity(capacity, rank, limit)
                assert new % 8 == 0
                assert rank <= new <= round_up_capacity(limit)
                assert (new > capacity) == (rank > capacity), "grows when it must, and only then"
                assert new <= capacity or new >= min(max(rank + 8, 1.3 * rank), limit), "with headroom up to the limit"
                assert new <= max(rank + 23, 1.3 * rank + 16), "with little more than that"


def test_capacities_do_not_oscillate() -> None:
    """A rank that swings by less than a granule resizes once, then never again."""
    for start in range(1, 100, 3):
        capacity, changes = round_up_capacity(start), 0
        for turn in range(40):
            new = next_capacity(capacity, start + (turn % 2) * 7, 512)
            changes += new != capacity
            capacity = new
        assert changes <= 2
        once = next_capacity(capacity, start, 512)
        assert next_capacity(once, start, 512) == once


# -- the optimizer follows -----------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
}


def train(adapter: Adapter, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        loss = (adapter(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    return {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and v.ndim}


@pytest.mark.parametrize(
    ("kind", "name", "capacity"),
    [
        *((kind, "linear", 40) for kind in OPTIMIZERS),
        ("adamw", "linear", 8),
        ("adamw", "linear", 16),
        ("adamw", "conv2d, groups", 8),
        ("sgd", "conv2d, groups", 40),
    ],
)
def test_optimizer_moments_follow(kind: str, name: str, capacity: int) -> None:
    adapter, x = make(name, capacity=16, rank=16, dtype=torch.float32)
    optimizer = OPTIMIZERS[kind]([adapter.down, adapter.up])
    train(adapter, optimizer, x, 3)
    before = [{k: v.clone() for k, v in moments(optimizer, p).items()} for p in (adapter.down, adapter.up)]
    steps = [optimizer.state[p].get("step") for p in (adapter.down, adapter.up)]
    adapter.resize(capacity, torch.Generator().manual_seed(0), optimizer)
    keep = min(capacity, 16)
    assert optimizer.param_groups[0]["params"][0] is adapter.down
    assert optimizer.param_groups[0]["params"][1] is adapter.up
    assert set(optimizer.state) == {adapter.down, adapter.up}, "no old array is left"
    for parameter, old, step in zip((adapter.down, adapter.up), before, steps, strict=True):
        new = moments(optimizer, parameter)
        assert new.keys() == old.keys()
        assert len(new) >= 1
        for key, moment in new.items():
            assert moment.shape == parameter.shape
            assert torch.equal(moment[:keep], old[key][:keep])
            assert not moment[keep:].any()
        assert optimizer.state[parameter].get("step") is step


@pytest.mark.parametrize(("kind", "name"), [*((kind, "linear") for kind in OPTIMIZERS), ("adamw", "conv1d, reflect")])
def test_resizing_does_not_change_the_steps_of_other_components(kind: str, name: str) -> None:
    """With Λ = 0 for the new components, the old ones take exactly the steps that they would have taken."""
    grown, x = make(name, capacity=16, rank=16)
    plain, _ = make(name, capacity=16, rank=16)
    first, second = (OPTIMIZERS[kind]([a.down, a.up]) for a in (grown, plain))
    train(grown, first, x, 3)
    train(plain, second, x, 3)
    grown.resize(40, torch.Generator().manual_seed(0), first)
    train(grown, first, x, 4)
    train(plain, second, x, 4)
    # float64 sums in another order; Adam divides by the gradient's size, so 1e-16 of it is 1e-15 of a step.
    assert relative(grown.down[:16], plain.down) < 1e-12
    assert relative(grown.up[:16], plain.up) < 1e-12
    grown.resize(16, torch.Generator(), first)
    train(grown, first, x, 4)
    train(plain, second, x, 4)
    assert relative(grown.down, plain.down) < 1e-12
    assert relative(grown.up, plain.up) < 1e-12


@pytest.mark.parametrize("capacity", [8, 24])
def test_resized_arrays_train_while_an_old_graph_is_alive(capacity: int) -> None:
    """A loss that is still referenced keeps its graph; new arrays must not belong to it."""
    adapter, x = make("linear", capacity=16, rank=16, dtype=torch.float32)
    optimizer = OPTIMIZERS["adamw"]([adapter.down, adapter.up])
    old_down = adapter.down
    loss = (adapter(x) - 1).square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    adapter.resize(capacity, torch.Generator().manual_seed(0), optimizer)
    adapter.importance = torch.ones(100)
    before = adapter.down.detach().clone(), adapter.up.detach().clone()
    start = float((adapter(x).detach() - 1).square().mean())
    final = train(adapter, optimizer, x, 30)
    assert float(final.detach()) < 0.9 * start
    assert not torch.equal(adapter.up, before[1])
    assert not torch.equal(adapter.down, before[0])
    assert adapter.up.detach().any(1).all(), "new components have learned too"
    grad = adapter.down.grad
    loss.backward()
    assert adapter.down.grad is grad
    assert old_down.grad is not None
    assert len(old_down.grad) == 16


def test_dropped_components_are_reset_in_place() -> None:
    """Their values and their moments."""
    adapter, x = make("linear", capacity=16, rank=16, dtype=torch.float32)
    optimizer = OPTIMIZERS["adamw"]([adapter.down, adapter.up])
    train(adapter, optimizer, x, 3)
    down, up = adapter.down.detach().clone(), adapter.up.detach().clone()
    adapter.reset_components(11, torch.Generator().manual_seed(0), optimizer)
    assert torch.equal(adapter.down[:11], down[:11])
    assert torch.equal(adapter.up[:11], up[:11])
    assert not adapter.up[11:].any()
    assert not (adapter.down[11:] == down[11:]).any()
    for parameter in (adapter.down, adapter.up):
        for moment in moments(optimizer, parameter).values():
            assert not moment[11:].any()
            assert moment[:11].any()
    adapter.reset_components(16, torch.Generator(), optimizer)
    adapter.reset_components(99, torch.Generator(), None)
    assert torch.equal(adapter.up[:11], up[:11])


# -- memory --------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Bytes of all distinct storages that a live tensor of this process holds."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_memory_falls_with_the_rank() -> None:
    """Factors, gradients, two moments: four arrays of 4 bytes per number. Nothing keeps the old ones alive."""
    adapter = Adapter(nn.Linear(300, 200), 128, 0.1, CPU, torch.Generator().manual_seed(0))
    adapter.importance = torch.ones(128)
    optimizer = OPTIMIZERS["adamw"]([adapter.down, adapter.up])
    x = torch.ones(2, 300)
    nothing = live_bytes()
    train(adapter, optimizer, x, 2)
    full = live_bytes()
    # The step counts of AdamW are a few bytes beside them.
    assert full - nothing == pytest.approx(3 * 4 * 128 * 500, abs=100), "a gradient and two moments were added"
    adapter.resize(32, torch.Generator(), optimizer)
    optimizer.zero_grad()
    train(adapter, optimizer, x, 1)
    assert full - live_bytes() == 4 * 4 * (128 - 32) * 500


def test_a_single_component_is_stored_row_major() -> None:
    """A single row counts as contiguous in several layouts, and BLAS rounds their products differently. A run resumed from a
    state, whose tensors are row-major, would not be bit-identical to the uninterrupted run.
    """
    adapter, _ = make("linear", dtype=torch.float32)
    adapter.load(Factors(torch.randn(20, 1), torch.randn(1, 12)))
    assert (adapter.down.stride(), adapter.up.stride()) == ((12, 1), (20, 1))
    down, up = torch.randn(12, 1).t(), torch.randn(20, 1).t()
    assert up.is_contiguous()
    adapter.load_arrays(down, up, adapter.down_std)
    assert (adapter.down.stride(), adapter.up.stride()) == ((12, 1), (20, 1))
    assert torch.equal(adapter.up, up)
    assert adapter.up.data_ptr() != up.data_ptr()

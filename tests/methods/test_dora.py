"""DoRA: the paper's equation and gradients, norms by the factors alone.

What every method must do is in the contract; this is what the paper claims.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import peftlite as pl
from peftlite import kernels
from tests.cells import close, disturb
from tests.zoo import perturb, seeded

# how to make a map, an input of it, and the dimensions of its weight that the norm sums over
MAPS = {
    "linear": (lambda: nn.Linear(9, 7), (4, 9), (1,)),
    "conv1d_hf": (lambda: Conv1D(7, 9), (4, 9), (0,)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 6), (1, 2, 3)),
    "conv_transpose": (lambda: nn.ConvTranspose1d(4, 5, 3), (2, 4, 6), (0, 2)),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=3), None, (0,)),
}
every_map = pytest.mark.parametrize("kind", MAPS)


def built(kind: str) -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    """A map in double precision, an input, and the dimensions that its norm sums over."""
    make, shape, dims = MAPS[kind]
    with seeded(3):
        x = torch.arange(11) if shape is None else torch.randn(shape, dtype=torch.float64)
        return perturb(make()).double(), x, dims


def attached(
    module: nn.Module, targets: str = "weight", name: str = "a", **how: object
) -> nn.Module:
    """The patch of a DoRA on a tensor, one that makes a difference."""
    with seeded(4):
        delta = disturb(pl.attach(module, pl.DoRA(rank=2, alpha=3, targets=targets, **how), name))
    return next(iter(delta.placed.values())).patch


def direction(patch: nn.Module, w: Tensor) -> Tensor:
    """V = W + s·BA, formed."""
    product = patch.b @ patch.a
    return w + patch.scale * (product.mT if patch.layout.transposed else product).reshape(w.shape)


def along(m: Tensor, w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A number for every output, laid along a weight."""
    return m.view([1 if d in dims else size for d, size in enumerate(w.shape)])


@every_map
def test_equation(kind: str) -> None:
    module, x, dims = built(kind)
    w = module.weight.detach()
    patch = attached(module)
    v = direction(patch, w)
    expected = along(patch.m, w, dims) * v / torch.linalg.vector_norm(v, dim=dims, keepdim=True)
    close(module.weight.clone(), expected, 1e-12)
    close(torch.linalg.vector_norm(module.weight.clone(), dim=dims), patch.m.abs(), 1e-12)
    output = module(x)
    pl.merge(module, "a")
    close(module(x), output, 1e-12)


@every_map
def test_norm_takes_no_gradient(kind: str) -> None:
    """§4.3: the gradients are those of a constant norm, in both forms, a padding row aside."""
    module, x, dims = built(kind)
    plain, w = copy.deepcopy(module), module.weight.detach()
    patch = attached(module)
    v = direction(patch, w)
    norm = torch.linalg.vector_norm(v, dim=dims, keepdim=True).detach()
    formed = along(patch.m, w, dims) * v / norm
    expected = torch.func.functional_call(plain, {"weight": formed}, x)
    with seeded(5):
        upstream = torch.randn_like(expected)
    parameters = list(patch.parameters())
    by_equation = torch.autograd.grad(expected, parameters, upstream)
    by_call = torch.autograd.grad(module(x), parameters, upstream)
    patch.has_call = False
    by_value = torch.autograd.grad(module(x), parameters, upstream)
    for equation, call, value in zip(by_equation, by_call, by_value, strict=True):
        close(call, equation, 1e-10)
        close(value, equation, 1e-10)


class Largest(TorchDispatchMode):
    """Notes the most numbers in any tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("kind", ["linear", "conv1d_hf", "embedding"])
def test_call_forms_nothing_as_large_as_the_weight(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.dora, "_ENTRIES", 256)
    make = {
        "linear": lambda: nn.Linear(64, 96),
        "conv1d_hf": lambda: Conv1D(96, 64),
        "embedding": lambda: nn.Embedding(96, 64),
    }[kind]
    module = make()
    attached(module)
    x = torch.arange(3) if kind == "embedding" else torch.randn(3, 64)
    with Largest() as largest:
        module(x).sum().backward()
    assert largest.numbers <= 96 * 3  # tokens × o, and W·Aᵀ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [None, torch.bfloat16, torch.float16], ids=str)
def test_fresh_ratio_is_one(dtype: torch.dtype, own: torch.dtype | None) -> None:
    """Also where m is rounded: the norm it's divided by is rounded as it was."""
    for make, shape, _ in MAPS.values():
        module = make().to(dtype)
        x = torch.arange(11) if shape is None else torch.randn(shape, dtype=dtype)
        w, y = module.weight.detach().clone(), module(x)
        pl.attach(module, pl.DoRA(targets="weight", dtype=own))
        assert torch.equal(module(x), y)
        assert torch.equal(module.weight.clone(), w)


def test_an_output_without_weights_learns() -> None:
    """Where W has a row of zeros, 0/0 would be NaN in the first forward."""
    linear, x = nn.Linear(5, 3, bias=False), torch.randn(8, 5)
    linear.weight.data[1] = 0
    before = linear(x)
    delta = pl.attach(linear, pl.DoRA(rank=2, targets="weight"))
    assert torch.equal(linear(x), before)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (linear(x) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in delta.parameters())
    assert linear(x)[:, 1].abs().max() > 0


def test_a_direction_that_vanishes_stays_finite() -> None:
    """W = −s·BA: rounding may leave the norm's three terms a little below zero."""
    linear = nn.Linear(5, 4)
    delta = pl.attach(linear, pl.DoRA(rank=5, targets="weight"))
    patch = delta.placed["weight"].patch
    with torch.no_grad():
        patch.a.copy_(torch.linalg.qr(torch.randn(5, 5))[0])
        patch.b.copy_(-linear.weight.detach() @ torch.linalg.inv(patch.a))
    assert linear(torch.randn(3, 5)).isfinite().all()
    assert linear.weight.isfinite().all()


@pytest.mark.parametrize("left", [1e-1, 1e-3])
def test_an_output_that_nearly_vanishes_is_exact(left: float) -> None:
    """BA takes a row of W away but for a `left`th: no form has more than W's own rounding in it."""
    linear = nn.Linear(300, 4, bias=False)
    patch = attached(linear)
    with torch.no_grad():
        patch.a[0] = linear._parameters["weight"][0]
        patch.b[0] = torch.tensor([(left - 1) / patch.scale, 0])
    w, double = linear._parameters["weight"].detach().double(), copy.deepcopy(patch).double()
    v = direction(double, w)[0]
    true = double.m[0] * v / v.norm()
    x = torch.randn(50, 300)
    for y in (linear(x)[:, 0], x @ linear.weight[0]):
        error = (y.double() - x.double() @ true).norm() / (x.double() @ true).norm()
        assert error < 1e-6 / left


def test_dropout_is_of_the_product_alone() -> None:
    linear, x, _ = built("linear")
    w = linear.weight.detach()
    patch = attached(linear.train(), dropout=0.5)
    with seeded(6):
        output = linear(x)
    with seeded(6):
        dropped = F.dropout(x, 0.5)
    ratio = patch.m / direction(patch, w).norm(dim=1)
    change = patch.scale * dropped @ patch.a.mT @ patch.b.mT
    close(output, ratio * (x @ w.mT + change) + linear.bias, 1e-12)


def test_deltas_on_one_weight() -> None:
    """The one on top takes the norm of what those below it make, part by part."""
    linear, x, _ = built("linear")
    for name, targets in (("a", "weight[0:4]"), ("b", "weight"), ("c", "weight[2:7]")):
        attached(linear, targets, name)
    for names in (["a", "b", "c"], ["c", "a"], ["b", "a"]):
        pl.use(linear, names)
        close(linear(x), F.linear(x, linear.weight.clone(), linear.bias), 1e-12)


def test_tied_weights() -> None:
    """An embedding's columns are a tied head's inputs, and a head's rows the embedding's tokens."""
    for embedding_first in (True, False):
        embed, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        head.weight = embed.weight
        modules = {"embed": embed, "head": head}
        order = list(modules) if embedding_first else list(reversed(modules))
        model = nn.ModuleDict({name: modules[name] for name in order}).double()
        attached(model, f"{order[0]}.weight")
        ids, x = torch.arange(11).view(1, -1), torch.randn(3, 6, dtype=torch.float64)
        w = head.weight.clone()
        assert torch.equal(w, embed.weight.clone())
        close(embed(ids)[0], w, 1e-12)
        close(head(x), x @ w.mT, 1e-12)


def test_half_precision_sees_small_changes_of_size() -> None:
    """m/‖V‖ = 1.003 is 1 in bfloat16, yet the outputs grow by as much on average."""
    linear = nn.Linear(64, 4096, bias=False).bfloat16()
    x = torch.randn(16, 64, dtype=torch.bfloat16)
    before = linear(x).double()
    delta = pl.attach(linear, pl.DoRA(targets="weight"))
    delta.placed["weight"].patch.m.data.mul_(1.003)
    growth = (linear(x).double() * before).sum() / before.square().sum() - 1
    assert growth.item() == pytest.approx(0.003, rel=0.2)

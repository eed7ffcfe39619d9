"""Maps: each one's way with two factors, against its module run in fp64 on their product."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from peftlite.core.maps import kind_of
from peftlite.core.tensors import widen

# torch says so, once, of an even kernel
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

# -- strategies


def plain(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def transposed(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return plain(*shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))


def strided(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Every second number of its memory, the first left out."""
    return plain(*shape, 2, dtype=dtype)[..., 1]


layouts = st.sampled_from([plain, transposed, strided])
seeds = st.integers(0, 999)
booleans = st.booleans()


def each(n: int, low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(low, high)] * n)


@dataclass
class Call:
    """A module and one call of it."""

    module: nn.Module
    input: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.module.double()
        for parameter in self.module.parameters():  # the padding row of an embedding too
            nn.init.normal_(parameter)

    def run(self, input: Tensor, **tensors: Tensor) -> Tensor:
        """The module's own forward, with some of its tensors replaced."""
        return functional_call(self.module, tensors, (input,), self.kwargs)

    def product(self, input: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The module run with the weight `left @ right` and no bias."""
        tensors = {name: torch.zeros_like(p) for name, p in self.module.named_parameters()}
        tensors["weight"] = (left @ right).view_as(tensors["weight"])
        return self.run(input, **tensors)


@st.composite
def linears(draw: st.DrawFn) -> Call:
    torch.manual_seed(draw(seeds))
    i, o, *batch = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    batch = draw(st.sampled_from([batch, [0, *batch]]))
    return Call(nn.Linear(i, o, bias=draw(booleans)), draw(layouts)(*batch, i))


@st.composite
def hf_conv1ds(draw: st.DrawFn) -> Call:
    torch.manual_seed(draw(seeds))
    i, o, *batch = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    batch = draw(st.sampled_from([batch, [0, *batch]]))
    return Call(Conv1D(o, i), plain(*batch, i))  # it takes no other layout


@st.composite
def embeddings(draw: st.DrawFn) -> Call:
    torch.manual_seed(draw(seeds))
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    padding = draw(st.none() | st.integers(-rows, rows - 1))
    module = nn.Embedding(rows, width, padding_idx=padding)
    return Call(module, torch.randint(rows, draw(st.lists(st.integers(0, 4), max_size=3))))


@st.composite
def convs(draw: st.DrawFn) -> Call:
    torch.manual_seed(draw(seeds))
    n, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, stride, dilation = draw(each(n, 1, 3)), draw(each(n, 1, 2)), draw(each(n, 1, 2))
    padding = draw(each(n, 0, 2) | st.sampled_from(["same", "valid"]))
    i, o = (groups * c for c in draw(each(2, 1, 2)))
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1](
        i,
        o,
        kernel,
        stride=1 if padding == "same" else stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(booleans),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    # reflection takes an input larger than its padding
    reach = [max(d * (k - 1) + 1, 3) for d, k in zip(dilation, kernel, strict=True)]
    size = [r + more for r, more in zip(reach, draw(each(n, 0, 2)), strict=True)]
    batch = draw(st.sampled_from([(), (0,), (1,), (2,)]))
    return Call(module, draw(layouts)(*batch, i, *size))


@st.composite
def transposed_convs(draw: st.DrawFn) -> Call:
    torch.manual_seed(draw(seeds))
    n, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, stride, dilation = draw(each(n, 1, 3)), draw(each(n, 1, 3)), draw(each(n, 1, 2))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = [draw(st.integers(0, (r - 1) // 2)) for r in reach]
    more = [draw(st.integers(0, s - 1)) for s in stride]
    size = draw(each(n, 1, 4))
    i, o = (groups * c for c in draw(each(2, 1, 2)))
    module = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1](
        i,
        o,
        kernel,
        stride=stride,
        padding=padding,
        output_padding=more,
        groups=groups,
        bias=draw(booleans),
        dilation=dilation,
    )
    batch = draw(st.sampled_from([(), (0,), (1,), (2,)]))
    call = Call(module, draw(layouts)(*batch, i, *size))
    if draw(booleans):  # a size asked for outdoes the output_padding
        least = [
            (t - 1) * s - 2 * p + r for t, s, p, r in zip(size, stride, padding, reach, strict=True)
        ]
        wanted = [a + draw(st.integers(0, s - 1)) for a, s in zip(least, stride, strict=True)]
        call.kwargs["output_size"] = wanted
    return call


every_map = pytest.mark.parametrize(
    "calls", [linears(), hf_conv1ds(), embeddings(), convs(), transposed_convs()], ids=str
)


@st.composite
def factors(draw: st.DrawFn, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    r, layout = draw(st.integers(1, 3)), draw(layouts)
    return layout(rows, r).requires_grad_(), layout(r, columns).requires_grad_()


def drawn(data: st.DataObject, calls: st.SearchStrategy[Call]) -> tuple[Call, Any, Tensor, Tensor]:
    """A call, its map, and the two factors of a change to its weight."""
    call = data.draw(calls)
    module = call.module
    kind = kind_of(module)
    assert kind is not None
    left, right = data.draw(factors(len(module.weight), module.weight[0].numel()))
    return call, kind(module, module.weight, getattr(module, "bias", None)), left, right


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# -- what every map does


@every_map
@given(data=st.data())
def test_calling_a_map_is_calling_its_module(calls, data) -> None:
    call, map, _, _ = drawn(data, calls)
    assert torch.equal(map(call.input, **call.kwargs), call.run(call.input))


@every_map
@given(data=st.data())
def test_low_rank_is_the_module_with_the_product(calls, data) -> None:
    call, map, left, right = drawn(data, calls)
    x = call.input.requires_grad_(call.input.is_floating_point())
    y = map.low_rank(x, call.run(x), left, right)
    expected = call.product(x, left, right)
    close(y, expected)
    inputs, above = [t for t in (x, left, right) if t.requires_grad], torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, above)
    for ours, theirs in zip(got, torch.autograd.grad(expected, inputs, above), strict=True):
        close(ours, theirs)


@given(data=st.data())
def test_a_sparse_embedding_gives_the_same_gradients_in_either_form(data) -> None:
    call, map, left, right = drawn(data, embeddings())
    assume(call.input.dim())  # torch itself fails without
    got = []
    for call.module.sparse in (False, True):
        formed = type(map)(call.module, left @ right, None)
        y = map.low_rank(call.input, call.run(call.input), left, right) + formed(call.input)
        torch.manual_seed(0)
        got.append(torch.autograd.grad(y, (left, right), torch.randn_like(y)))
    for dense, sparse in zip(*got, strict=True):
        close(dense, sparse.to_dense())


@every_map
@given(data=st.data(), scale=st.floats(-2, 2))
def test_a_change_rides_beside_the_call(calls, data, scale) -> None:
    call, map, left, right = drawn(data, calls)
    y = map.add_low_rank(left, right, scale, 0.0, call.input, **call.kwargs)
    close(y, call.run(call.input) + scale * call.product(call.input, left, right))


class Masks(TorchDispatchMode):
    """Notes for which of input, weight and bias torch finds gradients of convolutions."""

    def __init__(self):
        super().__init__()
        self.found: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.found.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("calls", [convs(), transposed_convs()], ids=str)
@given(data=st.data())
def test_a_bias_learns_without_its_weight(calls, data) -> None:
    call = data.draw(calls)
    assume(call.module.bias is not None and call.input.numel())
    bias, weight = call.module.bias, call.module.weight.detach()
    with Masks() as masks:
        y = kind_of(call.module)(call.module, weight, bias)(call.input, **call.kwargs)
        upstream = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, bias, upstream)
    assert not any(mask[1] for mask in masks.found)
    expected = call.run(call.input, weight=weight)
    assert torch.equal(y, expected)
    close(found, torch.autograd.grad(expected, bias, upstream)[0])


@given(data=st.data(), shape=each(2, 1, 6), dim=st.integers(0, 1))
def test_widened_factors_change_the_part_alone(data, shape, dim) -> None:
    start, stop = sorted(data.draw(st.sets(st.integers(0, shape[dim]), min_size=2, max_size=2)))
    whole = torch.zeros(shape, dtype=torch.float64)
    part = whole.narrow(dim, start, stop - start)
    left, right = data.draw(factors(*part.shape))
    part += (left @ right).detach()
    wide_left, wide_right = widen(left, right, (dim, start, stop), whole.shape)
    close(wide_left @ wide_right, whole)
    assert widen(left, right, None, whole.shape) == (left, right)


# -- which modules are maps


class Plain(nn.Linear):
    """A subclass that computes what its parent does."""


class Doubled(nn.Linear):
    """A subclass that doesn't."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled(3, 2),
        lambda: nn.Embedding(3, 2, max_norm=1.0),
        lambda: nn.Embedding(3, 2, scale_grad_by_freq=True),
        lambda: nn.EmbeddingBag(3, 2),
        lambda: nn.Bilinear(3, 2, 2),
        lambda: nn.LSTM(3, 2),
        lambda: nn.LayerNorm(3),
        lambda: nn.MultiheadAttention(2, 1),
    ],
)
def test_what_is_no_map(make: Callable[[], nn.Module]) -> None:
    assert kind_of(make()) is None


def test_a_subclass_with_its_parents_forward_is_a_map() -> None:
    assert kind_of(Plain(3, 2)) is kind_of(nn.Linear(3, 2)) is not None
    attention = nn.MultiheadAttention(2, 1)
    assert kind_of(attention.out_proj) is kind_of(nn.Linear(3, 2))

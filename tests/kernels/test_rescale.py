"""rescale, the scaling of DoRA and (IA)³: the reference's values and gradients, in a few passes."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peftlite import kernels
from peftlite.kernels import dispatch, rescale
from tests.kernels.against import assert_close, run


@pytest.fixture(autouse=True, scope="module")
def at_any_size() -> Iterator[None]:
    with kernels.backend("torch"):
        yield


def tensors(*ahead: int, o: int, behind: tuple[int, ...] = (), bias: bool = True):
    """y, the change and the bias in fp64, of entries that a half holds exactly, all above 0."""
    shapes = {"y": (*ahead, o, *behind), "change": (o,), "bias": (o,)}
    made = {name: torch.randint(1, 65, size).double() / 64 for name, size in shapes.items()}
    made["y"] += 1  # and so above the bias
    return made if bias else made | {"bias": None}


sizes = st.integers(1, 40)


@given(
    ahead=st.lists(st.integers(0, 9), max_size=3),
    o=sizes,
    behind=st.lists(st.integers(1, 5), max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    entries=st.sampled_from([1, 50, 2**17]),
)
def test_is_the_reference(ahead, o, behind, bias, dtype, entries) -> None:
    given_tensors = tensors(*ahead, o=o, behind=tuple(behind), bias=bias)
    options = {"behind": len(behind)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rescale, "_ENTRIES", entries)
        found = run(rescale.rescale, given_tensors, dtype, tuple(given_tensors), **options)
    true = run(rescale.reference, given_tensors, torch.float64, tuple(given_tensors), **options)
    assert_close(found, true)


@pytest.mark.parametrize("behind", [0, 2])
def test_in_any_layout(behind: int) -> None:
    shape = (3, 4, 5, 6)
    y = torch.randn(shape).double().contiguous(memory_format=torch.channels_last)
    o = shape[-1 - behind]
    change, bias = torch.randn(2, o).double().unbind()
    out = rescale.rescale(y, change, bias, behind)
    torch.testing.assert_close(out, rescale.reference(y, change, bias, behind))


def test_no_change_gives_every_bit_back() -> None:
    y, bias = torch.randn(50, 30).bfloat16(), torch.randn(30).bfloat16()
    assert torch.equal(rescale.rescale(y, torch.zeros(30), bias), y)


def test_keeps_y_alone() -> None:
    y, change, bias = (t.requires_grad_() for t in tensors(50, o=30).values())
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        rescale.rescale(y, change, bias)
    assert kept == {t.data_ptr() for t in (y, change, bias)}


@pytest.mark.parametrize("ahead", [(), (6,), (2, 3)])
def test_the_output_may_be_changed_in_place(ahead: tuple[int, ...]) -> None:
    y, change, bias = (t.requires_grad_() for t in tensors(*ahead, o=4).values())
    rescale.rescale(y, change, bias).relu_().sum().backward()
    torch.testing.assert_close(y.grad, (1 + change).expand_as(y))


def test_is_differentiable_twice() -> None:
    inputs = [t.requires_grad_() for t in tensors(3, o=4, behind=(2,)).values()]
    assert torch.autograd.gradcheck(lambda *x: rescale.rescale(*x, 1), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: rescale.rescale(*x, 1), inputs)


def test_transforms_and_compiling_take_the_reference() -> None:
    y, change, bias = tensors(6, o=4).values()
    true = rescale.reference(y, change, bias)
    mapped = torch.func.vmap(rescale.rescale, in_dims=(0, None, None))(y, change, bias)
    torch.testing.assert_close(mapped, true)
    torch.compiler.reset()
    compiled = torch.compile(rescale.rescale, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(y, change, bias), true)


def test_few_numbers_take_the_reference() -> None:
    with kernels.backend(None):
        few, many = torch.zeros(8, 8, requires_grad=True), torch.zeros(8, dispatch.SMALL)
        assert "Rescale" not in rescale.rescale(few, torch.zeros(8)).grad_fn.name()
        many.requires_grad_()
        assert "Rescale" in rescale.rescale(many, torch.zeros(dispatch.SMALL)).grad_fn.name()

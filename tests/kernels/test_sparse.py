"""sparse_linear: the reference's values and gradients, with nothing of W's size kept or needed."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from peftlite import kernels
from peftlite.kernels import dispatch, sparse
from peftlite.kernels.sparse import grad_values, sparse_linear
from tests.kernels.against import TOLERANCE, assert_close, run

NAMES = ("x", "w", "bias", "values")
sizes = st.integers(1, 40)


@pytest.fixture(autouse=True, scope="module")
def at_any_size() -> Iterator[None]:
    with kernels.backend("torch"):
        yield


def tensors(*ahead: int, i: int, o: int, n: int, transposed: bool = False, bias: bool = True):
    """x, W, bias and values in fp64, of entries that a half holds exactly, all above 0."""
    w = (i, o) if transposed else (o, i)
    shapes = {"x": (*ahead, i), "w": w, "bias": (o,), "values": (n,)}
    made = {name: torch.randint(1, 65, size).double() / 64 for name, size in shapes.items()}
    return made if bias else made | {"bias": None}


def drawn(n: int, size: int, kind: torch.dtype = torch.int32) -> Tensor:
    return torch.randperm(size)[:n].sort().values.to(kind)


@given(
    ahead=st.sampled_from([(), (1,), (7,), (0,), (2, 3)]),
    i=sizes,
    o=sizes,
    density=st.floats(0, 1),
    transposed=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from([torch.int32, torch.int64]),
    wanted=st.sets(st.sampled_from(NAMES)),
    size=st.sampled_from([1, 300, 2**23]),
)
def test_is_the_reference(
    ahead, i, o, density, transposed, bias, dtype, kind, wanted, size
) -> None:
    n = int(density * i * o)
    given_tensors = tensors(*ahead, i=i, o=o, n=n, transposed=transposed, bias=bias)
    options = {"indices": drawn(n, i * o, kind), "transposed": transposed}
    wanted = {"x", *wanted}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_BYTES", size)
        found = run(sparse_linear, given_tensors, dtype, wanted, **options)
    assert_close(found, run(sparse.reference, given_tensors, torch.float64, wanted, **options))


@given(
    t=st.integers(1, 40),
    rows=sizes,
    columns=sizes,
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    tokens=st.sampled_from([3, 256]),
)
def test_few_entries_of_a_product_or_many(t, rows, columns, density, dtype, tokens) -> None:
    u, v = torch.rand(t, rows).to(dtype), torch.rand(t, columns).to(dtype)
    indices = drawn(int(density * rows * columns), rows * columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_TOKENS", tokens)
        found = grad_values(u, v, indices)
    true = (u.double().t() @ v.double()).flatten()[indices]
    assert (found.double() - true).norm() <= TOLERANCE[dtype] * true.norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_attached_is_merged_to_the_bit(transposed: bool) -> None:
    """Values wider than W are rounded as they are in W', once."""
    x, w, bias, values = tensors(9, i=30, o=20, n=50, transposed=transposed).values()
    x, w, bias, values = x.bfloat16(), w.bfloat16(), bias.bfloat16(), values.float() / 1000
    indices = drawn(50, 600)
    formed = sparse.added(w, values, indices)
    true = torch.addmm(bias, x, formed if transposed else formed.t())
    assert torch.equal(sparse_linear(x, w, bias, values, indices, transposed), true)


def test_keeps_its_inputs_alone() -> None:
    inputs = [t.requires_grad_() for t in tensors(50, i=30, o=40, n=24).values()]
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    indices = drawn(24, 1200)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        sparse_linear(*inputs, indices)
    assert kept == {t.data_ptr() for t in (*inputs, indices)}


class Largest(TorchDispatchMode):
    """Notes the most numbers in any tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.layout is torch.strided and not func.is_view:
            self.numbers = max(self.numbers, made.untyped_storage().nbytes() // made.itemsize)
        return made


@pytest.mark.parametrize("transposed", [False, True])
def test_forms_nothing_as_large_as_the_weight(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "_BYTES", 2000 * 8)
    x, w, bias, values = tensors(5, i=200, o=300, n=400, transposed=transposed).values()
    x.requires_grad_(), values.requires_grad_()
    indices = drawn(400, 60_000)
    with Largest() as largest:
        sparse_linear(x, w, bias, values, indices, transposed).sum().backward()
    assert largest.numbers <= 2000


@pytest.mark.parametrize("ahead", [(), (6,), (2, 3)])
def test_the_output_may_be_changed_in_place(ahead: tuple[int, ...]) -> None:
    x, w, bias, values = (t.requires_grad_() for t in tensors(*ahead, i=4, o=5, n=3).values())
    sparse_linear(x, w, bias, values, drawn(3, 20)).relu_().sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("transposed", [False, True])
def test_is_differentiable_twice(transposed: bool) -> None:
    inputs = tensors(3, i=4, o=5, n=6, transposed=transposed)
    indices = drawn(6, 20)

    def call(*inputs: Tensor) -> Tensor:
        return sparse_linear(*inputs, indices, transposed)

    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_autocast_is_the_base_s() -> None:
    x, w, bias, values = (t.float().requires_grad_() for t in tensors(7, i=8, o=6, n=9).values())
    indices = drawn(9, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_linear(x, w, bias, values, indices)
        true = sparse.reference(x, w, bias, values, indices)
    assert y.dtype is torch.bfloat16 and torch.equal(y, true)
    y.float().sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in (x, w, bias, values))


def test_transforms_and_compiling_take_the_reference() -> None:
    x, w, bias, values = tensors(6, i=4, o=5, n=3).values()
    indices = drawn(3, 20)
    true = sparse.reference(x, w, bias, values, indices)
    mapped = torch.func.vmap(lambda x: sparse_linear(x, w, bias, values, indices))(x)
    torch.testing.assert_close(mapped, true)
    torch.compiler.reset()
    compiled = torch.compile(sparse_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, bias, values, indices), true)


def test_a_mismatch_is_torch_s_to_refuse() -> None:
    x, w, bias, values = tensors(6, i=4, o=5, n=3).values()
    with pytest.raises(RuntimeError, match="same dtype"):
        sparse_linear(x.float(), w, bias, values, drawn(3, 20))


def test_few_numbers_take_the_reference() -> None:
    x, w, bias, values = (t.requires_grad_() for t in tensors(6, i=4, o=5, n=3).values())
    with kernels.backend(None):
        assert x.numel() < dispatch.SMALL
        y = sparse_linear(x, w, bias, values, drawn(3, 20))
        assert "SparseLinear" not in y.grad_fn.name()

"""Triton's kernels against the reference: interpreted without a GPU, run by test_triton, or on one.

TRITON_INTERPRET=1 pytest tests/kernels/interpreted.py
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftlite import kernels
from peftlite.kernels import lora_linear, reference
from peftlite.kernels.triton import ops as triton_ops
from tests.kernels.against import assert_close, factors, run, truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor(0x1234_5678_9ABC_DEF, device=DEVICE)

some = settings(max_examples=settings().max_examples // 4)  # the interpreter is slow
tokens = st.one_of(st.integers(0, 5), st.integers(1, 150))
widths = st.one_of(st.integers(1, 5), st.integers(1, 150))
ranks = st.one_of(st.sampled_from([1, 8, 16, 64]), st.integers(1, 256))
dropouts = st.sampled_from([0.0, 0.3])
layouts = st.sampled_from(["rows", "columns", "part"])
# of x, and of the factors
dtypes = st.sampled_from(
    [(x, factor) for x in (torch.bfloat16, torch.float16) for factor in (x, torch.float32)]
)
Dtypes = tuple[torch.dtype, torch.dtype]


# numbers of 7 bits times these have all the bits that a dtype has
BITS = {torch.bfloat16: 1.0, torch.float16: 1 + 2**-4, torch.float32: 1 + 2**-9 + 2**-17}


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """In fp64, of entries that the dtype holds exactly."""
    return torch.randint(-64, 65, (rows, columns), device=DEVICE).double() / 64 * BITS[dtype]


def laid(made: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """A matrix in a dtype, by rows, by columns, or within a larger one that may not be read."""
    rows, columns = made.shape
    room = torch.full((2 * rows + 1, 2 * columns + 3), float("nan"), device=DEVICE, dtype=dtype)
    if layout == "part":
        return room[1 : 2 * rows : 2, 2 : 2 * columns + 2 : 2].copy_(made)
    made = made.to(dtype)
    return made if layout == "rows" else made.t().contiguous().t()


@some
@given(t=tokens, i=widths, rank=ranks, dropout=dropouts, dtypes=dtypes, layout=layouts)
def test_shrink(t: int, i: int, rank: int, dropout: float, dtypes: Dtypes, layout: str) -> None:
    dtype, factor = dtypes
    x, a = matrix(t, i, dtype), matrix(rank, i, factor)
    given = laid(x, dtype, layout), laid(a, factor, layout)
    found = triton_ops.shrink(*given, 2.0, dropout, SEED)
    assert found.dtype is factor
    assert_close({"h": found}, {"h": 2 * reference.shrink(x, a, dropout, SEED)})


@some
@given(t=tokens, o=widths, rank=ranks, dtypes=dtypes, layout=layouts)
def test_grad_ab(t: int, o: int, rank: int, dtypes: Dtypes, layout: str) -> None:
    dtype, factor = dtypes
    dy, h, b = matrix(t, o, dtype), matrix(t, rank, factor), matrix(o, rank, factor)
    given = laid(dy, dtype, layout), laid(h, factor, "columns"), laid(b, factor, layout)
    dh, db = triton_ops.grad_ab(*given, 0.5, 0.0)
    assert dh.dtype is db.dtype is factor
    true_dh, true_db = reference.grad_ab(dy, h, b)
    assert_close({"dh": dh, "db": db}, {"dh": true_dh / 2, "db": true_db})


@some
@given(t=tokens, i=widths, rank=ranks, dropout=dropouts, dtypes=dtypes, layout=layouts)
def test_grad_a(t: int, i: int, rank: int, dropout: float, dtypes: Dtypes, layout: str) -> None:
    dtype, factor = dtypes
    x, dh = matrix(t, i, dtype), matrix(t, rank, factor)
    given = laid(dh, factor, "columns"), laid(x, dtype, layout)
    found = triton_ops.grad_a(*given, dropout, SEED)
    assert found.dtype is factor
    assert_close({"da": found}, {"da": reference.grad_a(dh, x, dropout, SEED) / kept(dropout)})


def kept(dropout: float) -> float:
    """The factor of what dropout keeps, which the operations leave to h and dh."""
    return reference.kept(dropout) if dropout else 1


@some
@given(
    t=tokens,
    o=widths,
    rank=ranks,
    dropout=dropouts,
    bias=st.booleans(),
    dtypes=dtypes,
    layout=layouts,
)
def test_expand(
    t: int, o: int, rank: int, dropout: float, bias: bool, dtypes: Dtypes, layout: str
) -> None:
    dtype, factor = dtypes
    h, up = matrix(t, rank, factor), matrix(rank, o, factor)
    added = matrix(1, o, dtype)[0] if bias and not dropout else None
    given = laid(h, factor, "columns"), laid(up, factor, layout)
    low = None if added is None else added.to(dtype)
    found = triton_ops.expand(*given, low, dropout, SEED, dtype)
    true = reference.expand(h, up, added, dropout, SEED) / kept(dropout)
    assert_close({"y": found}, {"y": true})


@some
@given(t=tokens, o=widths, rank=ranks, dropout=dropouts, dtypes=dtypes, layout=layouts)
def test_add(t: int, o: int, rank: int, dropout: float, dtypes: Dtypes, layout: str) -> None:
    dtype, factor = dtypes
    y, h, up = matrix(t, o, dtype), matrix(t, rank, factor), matrix(rank, o, factor)
    low, *given = laid(y, dtype, layout), laid(h, factor, layout), laid(up, factor, layout)
    found = triton_ops.add(low, *given, dropout, SEED)
    assert found is low
    true = y + reference.expand(h, up, None, dropout, SEED) / kept(dropout)
    assert_close({"y": found}, {"y": true})


@some
@given(
    shape=st.sampled_from([(1,), (7,), (0,), (33, 4)]),
    i=widths,
    o=widths,
    rank=ranks,
    dropout=dropouts,
    dtypes=dtypes,
)
def test_lora_linear(
    shape: tuple[int, ...], i: int, o: int, rank: int, dropout: float, dtypes: Dtypes
) -> None:
    tensors = {name: t.to(DEVICE) for name, t in factors(*shape, i=i, o=o, rank=rank).items()}
    options = {"scale": 0.5, "dropout": dropout, "seed": SEED}
    with kernels.backend("triton"):
        found = run(lora_linear, tensors, dtypes[0], **options)
    assert_close(found, truth(tensors, **options))


def test_all_runs_are_alike() -> None:
    x, a = (matrix(rows, 500, torch.bfloat16).bfloat16() for rows in (300, 16))
    first, second = (triton_ops.shrink(x, a, 1.0, 0.1, SEED) for _ in range(2))
    assert torch.equal(first, second)

"""Triton's kernels against the reference: interpreted without a GPU, run by test_triton, or on one.

TRITON_INTERPRET=1 pytest tests/kernels/interpreted.py
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftlite import kernels
from peftlite.kernels import lora_linear, reference, triton_ops
from tests.kernels.against import assert_close, factors, run, truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor(0x1234_5678_9ABC_DEF, device=DEVICE)

some = settings(max_examples=settings().max_examples // 4)  # the interpreter is slow
tokens = st.one_of(st.integers(0, 5), st.integers(1, 150))
widths = st.one_of(st.integers(1, 5), st.integers(1, 150))
ranks = st.one_of(st.sampled_from([1, 8, 16, 64]), st.integers(1, 256))
dropouts = st.sampled_from([0.0, 0.3])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
layouts = st.sampled_from(["rows", "columns", "part"])


def matrix(rows: int, columns: int, layout: str) -> Tensor:
    """In fp64, of entries that a half holds exactly."""
    made = torch.randint(-64, 65, (2 * rows + 1, columns + 3), device=DEVICE).double() / 64
    if layout == "part":
        return made[1 : 2 * rows : 2, 2 : columns + 2]
    made = made[:rows, :columns].contiguous()
    return made if layout == "rows" else made.t().contiguous().t()


@some
@given(t=tokens, i=widths, rank=ranks, dropout=dropouts, dtype=dtypes, layout=layouts)
def test_shrink(t: int, i: int, rank: int, dropout: float, dtype: torch.dtype, layout: str) -> None:
    x, a = matrix(t, i, layout), matrix(rank, i, layout)
    found = triton_ops.shrink(x.to(dtype), a.to(dtype), 2.0, dropout, SEED)
    assert_close({"h": found}, {"h": 2 * reference.shrink(x, a, dropout, SEED)})


@some
@given(t=tokens, o=widths, rank=ranks, dtype=dtypes, layout=layouts)
def test_grad_ab(t: int, o: int, rank: int, dtype: torch.dtype, layout: str) -> None:
    dy, h, b = matrix(t, o, layout), matrix(t, rank, "columns"), matrix(o, rank, layout)
    dh, db = triton_ops.grad_ab(dy.to(dtype), h.to(dtype), b.to(dtype), 0.5, 0.0)
    true_dh, true_db = reference.grad_ab(dy, h, b)
    assert_close({"dh": dh, "db": db}, {"dh": true_dh / 2, "db": true_db})


@some
@given(t=tokens, i=widths, rank=ranks, dropout=dropouts, dtype=dtypes, layout=layouts)
def test_grad_a(t: int, i: int, rank: int, dropout: float, dtype: torch.dtype, layout: str) -> None:
    x, dh = matrix(t, i, layout), matrix(t, rank, "columns")
    found = triton_ops.grad_a(dh.to(dtype), x.to(dtype), dropout, SEED)
    factor = reference.kept(dropout) if dropout else 1  # dh brings it
    assert_close({"da": found}, {"da": reference.grad_a(dh / factor, x, dropout, SEED)})


@some
@given(t=tokens, o=widths, rank=ranks, dtype=dtypes, layout=layouts)
def test_expand(t: int, o: int, rank: int, dtype: torch.dtype, layout: str) -> None:
    h, up = matrix(t, rank, "columns"), matrix(rank, o, layout)
    found = triton_ops.expand(h.to(dtype), up.to(dtype), None, 0.3, SEED)
    true = reference.expand(h, up, None, 0.3, SEED) / reference.kept(0.3)
    assert_close({"y": found}, {"y": true})


@some
@given(
    shape=st.sampled_from([(1,), (7,), (0,), (33, 4)]),
    i=widths,
    o=widths,
    rank=ranks,
    dropout=dropouts,
    dtype=dtypes,
)
def test_lora_linear(
    shape: tuple[int, ...], i: int, o: int, rank: int, dropout: float, dtype: torch.dtype
) -> None:
    tensors = {name: t.to(DEVICE) for name, t in factors(*shape, i=i, o=o, rank=rank).items()}
    options = {"scale": 0.5, "dropout": dropout, "seed": SEED}
    with kernels.backend("triton"):
        found = run(lora_linear, tensors, dtype, **options)
    assert_close(found, truth(tensors, **options))


def test_all_runs_are_alike() -> None:
    x, a = matrix(300, 500, "rows").bfloat16(), matrix(16, 500, "rows").bfloat16()
    first, second = (triton_ops.shrink(x, a, 1.0, 0.1, SEED) for _ in range(2))
    assert torch.equal(first, second)

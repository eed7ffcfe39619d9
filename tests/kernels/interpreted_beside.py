"""DoRA's scaling, sparse deltas and the fused product in Triton: interpreted, or on a GPU.

TRITON_INTERPRET=1 pytest tests/kernels/interpreted_beside.py
"""

import torch
from candidates import fused_product
from hypothesis import given
from hypothesis import strategies as st

from peftlite import kernels
from peftlite.kernels import dora, reference, rescale
from peftlite.kernels.triton import ops as triton_ops
from peftlite.kernels.triton import rescale as triton_rescale
from peftlite.kernels.triton import sparse as triton_sparse
from tests.kernels.against import assert_close
from tests.kernels.interpreted import (
    DEVICE,
    SEED,
    Dtypes,
    dropouts,
    dtypes,
    kept,
    laid,
    layouts,
    matrix,
    ranks,
    some,
    tokens,
    widths,
)  # fmt: skip

halves = st.sampled_from([torch.bfloat16, torch.float16])
kinds = st.sampled_from([torch.int32, torch.int64])


@some
@given(t=tokens, o=widths, bias=st.booleans(), dtype=halves, layout=layouts)
def test_rescale(t: int, o: int, bias: bool, dtype: torch.dtype, layout: str) -> None:
    y, dout = matrix(t, o, dtype).requires_grad_(), matrix(t, o, dtype)
    change, b = matrix(2, o, dtype).unbind()
    change.requires_grad_(), b.requires_grad_()
    true = rescale.reference(y, change, b if bias else None)
    wanted = {"dy": y, "dchange": change} | ({"dbias": b} if bias else {})
    truth = torch.autograd.grad(true, list(wanted.values()), dout)

    low, high = laid(y.detach(), dtype, layout), change.detach().float()
    given_bias = b.detach().to(dtype)
    given_bias = given_bias if bias else None
    out = triton_rescale.rescale(low, high, given_bias)
    dy, dchange, dsum = triton_rescale.gradients(laid(dout, dtype, layout), low, high, given_bias)
    found = {"out": out, "dy": dy, "dchange": dchange} | ({"dbias": -high * dsum} if bias else {})
    assert_close(found, {"out": true, **dict(zip(wanted, truth, strict=True))})


@some
@given(o=widths, i=widths, rank=ranks, dtype=halves, layout=layouts)
def test_norms(o: int, i: int, rank: int, dtype: torch.dtype, layout: str) -> None:
    wide = torch.float32
    shapes = ((o, i, dtype), (rank, i, wide), (o, rank, wide))
    w, a, b = (matrix(*shape).abs() for shape in shapes)  # nothing cancels
    with kernels.backend("triton"):
        found = dora.row_norms_squared(laid(w, dtype, layout), a.to(wide), b.to(wide), 0.5)
    assert_close({"norms": found}, {"norms": dora.reference(w, a, b, 0.5)})


@some
@given(t=tokens, o=widths, i=widths, dtype=halves, layout=layouts, kind=kinds)
def test_grad_values(
    t: int, o: int, i: int, dtype: torch.dtype, layout: str, kind: torch.dtype
) -> None:
    u, v = matrix(t, o, dtype), matrix(t, i, dtype)
    indices = torch.randperm(o * i, device=DEVICE)[: 1 + o * i // 7].sort().values
    true = (u.t() @ v).flatten()[indices]
    given = laid(u, dtype, layout), laid(v, dtype, layout)
    found = triton_sparse.grad_values(*given, indices.to(kind))
    assert_close({"dvalues": found}, {"dvalues": true})


@some
@given(
    t=tokens,
    i=widths,
    o=widths,
    rank=ranks,
    dropout=dropouts,
    bias=st.booleans(),
    dtypes=dtypes,
    layout=layouts,
    config=st.sampled_from([None, *fused_product.CONFIGS]),
)
def test_product(
    t: int,
    i: int,
    o: int,
    rank: int,
    dropout: float,
    bias: bool,
    dtypes: Dtypes,
    layout: str,
    config: fused_product.Config | None,
) -> None:
    dtype, factor = dtypes
    x, w, h, up = (
        matrix(t, i, dtype),
        matrix(i, o, dtype),
        matrix(t, rank, factor),
        matrix(rank, o, factor),
    )
    added = matrix(1, o, dtype)[0] if bias and not dropout else None
    given = (
        *(laid(z, dtype, layout) for z in (x, w)),
        *(laid(z, factor, layout) for z in (h, up)),
        None if added is None else added.to(dtype),
        dropout,
        SEED,
    )
    found = fused_product.product(*given, config) if config else triton_ops.product(*given)
    true = x @ w + reference.expand(h, up, added, dropout, SEED) / kept(dropout)
    assert_close({"y": found}, {"y": true})

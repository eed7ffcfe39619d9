"""Some entries of a product of matrices, on a GPU."""

# pyright: reportMissingParameterType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.triton.launch import cdiv, launch

TILE = {"ENTRIES": 32, "TOKENS": 128, "num_warps": 4}


@triton.jit
def _row(ptr, row, t, tokens, mask):
    offset = row[:, None].to(tl.int64) * tokens + t[None, :]
    return tl.load(ptr + offset, mask=mask & (t[None, :] < tokens), other=0.0).to(tl.float32)


@triton.jit
def _sampled(
    u_ptr, v_ptr, index_ptr, out_ptr, tokens, columns, n,
    ENTRIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The sums over t of U[row, t]·V[column, t]; entries that are neighbours share a row."""
    offset = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    index = tl.load(index_ptr + offset, mask=offset < n, other=0)
    sums, mask = tl.zeros((ENTRIES, TOKENS), tl.float32), (offset < n)[:, None]
    for first in range(0, tokens, TOKENS):
        t = first + tl.arange(0, TOKENS)
        u = _row(u_ptr, index // columns, t, tokens, mask)
        sums += u * _row(v_ptr, index % columns, t, tokens, mask)
    tl.store(out_ptr + offset, tl.sum(sums, 1), mask=offset < n)


def grad_values(u: Tensor, v: Tensor, indices: Tensor) -> Tensor:
    """The entries of uᵀ v at the flat indices (n), in order, for u (t, rows), v (t, columns).

    In fp32. Both are copied to have their tokens side by side.
    """
    out = u.new_empty(len(indices), dtype=torch.float32)
    grid = (cdiv(len(indices), TILE["ENTRIES"]),)
    u, v = u.t().contiguous(), v.t().contiguous()
    launch(_sampled, grid, u, v, indices, out, u.shape[1], len(v), len(indices), **TILE)
    return out

"""y + change ⊙ (y − bias) on a GPU, and its gradients, each in one pass; see `rescale`."""

# pyright: reportMissingParameterType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.triton.kernels import store, tile
from peftlite.kernels.triton.launch import PROGRAMS, cdiv, launch
from peftlite.kernels.triton.ops import total

TILE = {"TOKENS": 32, "COLUMNS": 128, "num_warps": 4}


@triton.jit
def _vector(ptr, c, columns, GIVEN: tl.constexpr):
    """The numbers of a vector at c, as a row; none is a 0."""
    if GIVEN:
        return tl.load(ptr + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.zeros((1, c.shape[0]), tl.float32)


@triton.jit
def forward(
    y_ptr, change_ptr, bias_ptr, out_ptr, tokens, columns, y_row, y_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    change, bias = _vector(change_ptr, c, columns, True), _vector(bias_ptr, c, columns, BIAS)
    y = tile(y_ptr, t, c, tokens, columns, y_row, y_column).to(tl.float32)
    store(out_ptr, y + change * (y - bias), t, c, tokens, columns, columns, 1)


@triton.jit
def backward(
    dout_ptr, y_ptr, change_ptr, bias_ptr, dy_ptr, sums_ptr,
    tokens, columns, dout_row, dout_column, y_row, y_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dY = dOut + change ⊙ dOut; and (splits, 2, c), sums of dOut ⊙ (y − bias), and of dOut."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    change, bias = _vector(change_ptr, c, columns, True), _vector(bias_ptr, c, columns, BIAS)
    dchange, dsum = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for first in range(split * TOKENS, tokens, splits * TOKENS):
        t = first + tl.arange(0, TOKENS)
        y = tile(y_ptr, t, c, tokens, columns, y_row, y_column).to(tl.float32)
        dout = tile(dout_ptr, t, c, tokens, columns, dout_row, dout_column).to(tl.float32)
        store(dy_ptr, dout + change * dout, t, c, tokens, columns, columns, 1)
        dchange += tl.sum(dout * (y - bias), 0)
        dsum += tl.sum(dout, 0)
    sums_ptr += split * 2 * columns + c
    tl.store(sums_ptr, dchange, mask=c < columns)
    tl.store(sums_ptr + columns, dsum, mask=c < columns)


def rescale(y: Tensor, change: Tensor, bias: Tensor | None) -> Tensor:
    """y + change ⊙ (y − bias), for y (t, o), and a change and a bias (o), rounded once."""
    tokens, columns = y.shape
    out = y.new_empty(tokens, columns)
    grid = cdiv(tokens, TILE["TOKENS"]), cdiv(columns, TILE["COLUMNS"])
    launch(
        forward, grid, y, change, y if bias is None else bias, out,
        tokens, columns, *y.stride(), BIAS=bias is not None, **TILE,
    )  # fmt: skip
    return out


def gradients(
    dout: Tensor, y: Tensor, change: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dY (t, o); and (o) in fp32, what the change gets, and the sum of dOut over the tokens."""
    tokens, columns = y.shape
    blocks = cdiv(columns, TILE["COLUMNS"])
    splits = max(1, min(cdiv(tokens, TILE["TOKENS"]), 4 * PROGRAMS // max(1, blocks)))
    dy = dout.new_empty(tokens, columns)
    sums = dout.new_empty(splits, 2, columns, dtype=torch.float32)
    launch(
        backward, (blocks, splits), dout, y, change, y if bias is None else bias, dy, sums,
        tokens, columns, *dout.stride(), *y.stride(), BIAS=bias is not None, **TILE,
    )  # fmt: skip
    dchange, dsum = total(sums, torch.float32)
    return dy, dchange, dsum

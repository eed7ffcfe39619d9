"""The operations of the low-rank path on a GPU, for x in half precision: as `torch_ops`'s.

Factors, h and dh have the dtype of x or are fp32; then dA and dB are as exact as from an x of fp32.
The large products are cuBLAS's. Tiles and splits are a static table: nothing is tuned at run time,
so a CUDA graph can hold the calls, and a run doesn't differ from the one before.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from peftlite.kernels import passes
from peftlite.kernels.reference import scaled
from peftlite.kernels.triton import kernels as triton_kernels
from peftlite.kernels.triton.launch import PROGRAMS, cdiv, launch, mask, padded

NUMBERS = 1024  # that a program of `total` adds up
ONCE = 16
"""The most ranks for which reading dY once moves less, with planes of dh, than reading it twice."""

forward, backward, back = (
    partial(each, sys.modules[__name__]) for each in (passes.forward, passes.backward, passes.back)
)


def tiles(rank: int, dtype: torch.dtype, factors: torch.dtype) -> dict[str, int]:
    """The tile of the tokens, columns and ranks, and how a program runs, without a spill."""
    wide = factors is not dtype  # and has parts, each with registers of its own
    ranks = padded(rank, 32 if wide else 64)
    columns = 128 if ranks == 16 and not (wide and dtype is torch.float16) else 64
    return {"TOKENS": 64, "COLUMNS": columns, "RANK": ranks, "num_warps": 4, "num_stages": 3}


def shrink(x: Tensor, a: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    """h = s·drop(x) Aᵀ, (t, r)."""
    (tokens, columns), rank = x.shape, len(a)
    config = tiles(rank, x.dtype, a.dtype)
    grid = _grid(tokens, config["TOKENS"], columns, config["COLUMNS"], rank, config["RANK"])
    h = _planes(a, grid[1], tokens, rank)
    launch(
        triton_kernels.shrink, grid, x, a, h, *mask(x, dropout, seed), scaled(scale, dropout),
        tokens, columns, rank, *x.stride(), *a.stride(), DROP=dropout > 0, **config,
    )  # fmt: skip
    return total(h, a.dtype)


def grad_ab(
    dy: Tensor, h: Tensor, b: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """dh (t, r) = s·dY B, and dB (o, r) = dYᵀ h for an h that is scaled."""
    (tokens, columns), rank = dy.shape, h.shape[1]
    if rank > ONCE:
        dh = shrink(dy, b.t(), scaled(scale, dropout), 0.0, None)
        return dh, grad_a(h, dy, 0.0, None).t()
    config = tiles(rank, dy.dtype, b.dtype)
    blocks, splits = _grid(columns, config["COLUMNS"], tokens, config["TOKENS"], 1, 1)
    dh, db = _planes(b, blocks, tokens, rank), _planes(b, splits, columns, rank)
    launch(
        triton_kernels.grad_ab, (blocks, splits), dy, h, b, dh, db, scaled(scale, dropout),
        tokens, columns, rank, *dy.stride(), *h.stride(), *b.stride(), **config,
    )  # fmt: skip
    return total(dh, b.dtype), total(db, b.dtype)


def grad_a(dh: Tensor, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """dA = dhᵀ drop(x), for a dh that is scaled."""
    (tokens, columns), rank = x.shape, dh.shape[1]
    config = tiles(rank, x.dtype, dh.dtype)
    grid = _grid(columns, config["COLUMNS"], tokens, config["TOKENS"], rank, config["RANK"])
    da = _planes(dh, grid[1], rank, columns)
    launch(
        triton_kernels.grad_a, grid, dh, x, da, *mask(x, dropout, seed),
        tokens, columns, rank, *dh.stride(), *x.stride(), DROP=dropout > 0, **config,
    )  # fmt: skip
    return total(da, dh.dtype)


def expand(
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """h U + bias (t, o), or drop(h U) for an h (t, r) that is scaled, in a dtype."""
    y = h.new_empty(len(h), up.shape[1], dtype=dtype)
    return _expand(y, h, up, bias, dropout, seed, add=False)


def product(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """x W + h U + bias (t, o), or x W + drop(h U) for an h (t, r) that is scaled.

    The low-rank part comes last: it isn't rounded before it is added, however large it is.
    """
    return _expand(torch.mm(x, w), h, up, bias, dropout, seed, add=True)


def add(y: Tensor, h: Tensor, up: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """y (t, o) += h U, or drop(h U) for an h (t, r) that is scaled, in place."""
    return _expand(y, h, up, None, dropout, seed, add=True)


def _expand(
    y: Tensor,
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    add: bool,
) -> Tensor:
    (tokens, columns), rank = y.shape, h.shape[1]
    config = tiles(rank, y.dtype, h.dtype)
    grid = cdiv(tokens, config["TOKENS"]), cdiv(columns, config["COLUMNS"])
    launch(
        triton_kernels.expand, grid, h, up, y if bias is None else bias, y,
        *mask(h, dropout, seed), tokens, columns, rank, *h.stride(), *up.stride(), *y.stride(),
        BIAS=bias is not None, DROP=dropout > 0, ADD=add, **config,
    )  # fmt: skip
    return y


def total(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of planes of fp32, (n, …), in a dtype."""
    if len(planes) == 1 and planes.dtype is dtype:
        return planes[0]
    out = planes.new_empty(planes.shape[1:], dtype=dtype)
    numbers = out.numel()
    grid = (cdiv(numbers, NUMBERS),)
    launch(triton_kernels.total, grid, planes, out, len(planes), numbers, NUMBERS=NUMBERS)
    return out


def _grid(rows: int, row: int, shared: int, share: int, rank: int, part: int) -> tuple[int, int]:
    """Programs for all rows and ranks, and how many of them share the sum, to fill the device."""
    programs = cdiv(rows, row) * cdiv(rank, part)
    splits = min(cdiv(shared, share), PROGRAMS // max(1, programs), 16)
    return programs, max(1, splits)


def _planes(factor: Tensor, planes: int, *shape: int) -> Tensor:
    """Room for sums; a single one is rounded at once."""
    dtype = torch.float32 if planes > 1 else factor.dtype
    return factor.new_empty(planes, *shape, dtype=dtype)

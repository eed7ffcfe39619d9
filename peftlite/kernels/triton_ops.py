"""The operations of the low-rank path on a GPU: `torch_ops`, with Triton where a read is saved.

The large products are cuBLAS's. Tiles and splits are a static table: nothing is tuned at run time,
so a CUDA graph can hold the calls, and a run doesn't differ from the one before.
"""

from __future__ import annotations

import contextlib
import os

import torch
import triton
from torch import Tensor

from peftlite.kernels import torch_ops, triton_kernels
from peftlite.kernels.reference import kept, threshold

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROGRAMS = 264  # two for each of an H100's multiprocessors


def tiles(rank: int) -> dict[str, int]:
    """The tile of the tokens and the columns, the padded rank, and how a program runs."""
    padded = max(16, 1 << (rank - 1).bit_length())
    tile = 64 if padded <= 64 else 32 if padded == 128 else 16
    return {
        "TOKENS": tile,
        "COLUMNS": 128 if padded <= 32 else 64,
        "RANK": padded,
        "num_warps": 4 if padded <= 64 else 8,
        "num_stages": 3 if padded <= 64 else 2,
    }


def shrink(x: Tensor, a: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    """h = s·drop(x) Aᵀ, (t, r)."""
    (tokens, columns), rank = x.shape, len(a)
    config = tiles(rank)
    blocks = triton.cdiv(tokens, config["TOKENS"])
    splits = _splits(blocks, triton.cdiv(columns, config["COLUMNS"]))
    h = x.new_empty(splits, tokens, rank, dtype=torch.float32)
    if h.numel():
        with _device_of(x):
            triton_kernels.shrink[(blocks, splits)](
                x, a, h, *_mask(x, dropout, seed), tokens, columns, rank,
                *x.stride(), *a.stride(), DROP=dropout > 0, **config, **_dtype(x),
            )  # fmt: skip
    return _summed(h, x, _factor(scale, dropout))


def grad_ab(
    dy: Tensor, h: Tensor, b: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """dh = s·dY B, and dB = dYᵀ h for an h that is scaled."""
    (tokens, columns), rank = dy.shape, h.shape[1]
    config = tiles(rank)
    blocks = triton.cdiv(columns, config["COLUMNS"])
    splits = _splits(blocks, triton.cdiv(tokens, config["TOKENS"]))
    dh = dy.new_empty(blocks, tokens, rank, dtype=torch.float32)
    db = dy.new_empty(splits, columns, rank, dtype=torch.float32)
    with _device_of(dy):
        triton_kernels.grad_ab[(blocks, splits)](
            dy, h, b, dh, db, tokens, columns, rank,
            *dy.stride(), *h.stride(), *b.stride(), **config, **_dtype(dy),
        )  # fmt: skip
    return _summed(dh, dy, _factor(scale, dropout)), _summed(db, dy, 1.0)


def grad_a(dh: Tensor, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """dA = dhᵀ drop(x), for a dh that is scaled."""
    if not dropout:
        return torch_ops.grad_a(dh, x, dropout, seed)
    (tokens, columns), rank = x.shape, dh.shape[1]
    config = tiles(rank)
    blocks = triton.cdiv(columns, config["COLUMNS"])
    splits = _splits(blocks, triton.cdiv(tokens, config["TOKENS"]))
    da = x.new_empty(splits, rank, columns, dtype=torch.float32)
    with _device_of(x):
        triton_kernels.grad_a[(blocks, splits)](
            dh, x, da, *_mask(x, dropout, seed), tokens, columns, rank,
            *dh.stride(), *x.stride(), DROP=True, **config, **_dtype(x),
        )  # fmt: skip
    return _summed(da, x, 1.0)


def expand(
    h: Tensor, up: Tensor, bias: Tensor | None, dropout: float, seed: Tensor | None
) -> Tensor:
    """h U + bias, or drop(h U) for an h that is scaled."""
    if not dropout:
        return torch_ops.expand(h, up, bias, dropout, seed)
    (tokens, rank), columns = h.shape, up.shape[1]
    config = tiles(rank)
    grid = triton.cdiv(tokens, config["TOKENS"]), triton.cdiv(columns, config["COLUMNS"])
    y = h.new_empty(tokens, columns)
    if y.numel():
        with _device_of(h):
            triton_kernels.expand[grid](
                h, up, y, *_mask(h, dropout, seed), tokens, columns, rank,
                *h.stride(), *up.stride(), **config, **_dtype(h),
            )  # fmt: skip
    return y


def _splits(blocks: int, tiles: int) -> int:
    """How many programs share a block's tiles, so that the device is full."""
    return max(1, min(tiles, PROGRAMS // max(1, blocks), 16))


def _summed(planes: Tensor, like: Tensor, factor: float) -> Tensor:
    total = planes[0] if len(planes) == 1 else planes.sum(0)
    return (total if factor == 1 else total.mul_(factor)).to(like.dtype)


def _factor(scale: float, dropout: float) -> float:
    return scale * kept(dropout) if dropout else scale


def _mask(x: Tensor, dropout: float, seed: Tensor | None) -> tuple[Tensor, int]:
    return (x, 0) if seed is None else (seed, threshold(dropout))


def _dtype(x: Tensor) -> dict[str, bool]:
    # Triton's interpreter multiplies the bits of bf16 as integers
    return {"WIDEN": INTERPRETED and x.dtype is torch.bfloat16}


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    compiling = torch.compiler.is_compiling()  # which sees to the device itself
    return contextlib.nullcontext() if compiling else torch.cuda.device_of(x)

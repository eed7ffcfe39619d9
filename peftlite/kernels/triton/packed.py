"""NF4 on a GPU: W formed of its codes and their scales in one pass, or a few rows times the codes.

W = s · c[q], and where scales are codes, too, s = m[p] · t + the mean of all, t of 256 of them.
"""

# pyright: reportMissingParameterType=false
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.triton.launch import cdiv, launch

FEW = 8
"""Rows of x, up to which they are multiplied with the codes themselves."""

BYTES = 512  # of codes, that a program reads at a time of each row
# a product and a sum are rounded apart, as torch does it
TILE = {"num_warps": 4, "enable_fp_fusion": False}
NESTED_BLOCK: tl.constexpr = tl.constexpr(256)


@triton.jit
def _scale(absmax_ptr, values_ptr, nested_ptr, offset_ptr, block, mask, NESTED: tl.constexpr):
    s = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        t = tl.load(nested_ptr + block // NESTED_BLOCK, mask=mask, other=0.0)
        s = tl.load(values_ptr + s.to(tl.int32)) * t + tl.load(offset_ptr)
    return s


@triton.jit
def form(
    codes_ptr, absmax_ptr, values_ptr, nested_ptr, offset_ptr, levels_ptr, w_ptr, numbers,
    BLOCKS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Some blocks of W, of HALF bytes each; the last may be a shorter one."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    at = block * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(codes_ptr + at, mask=2 * at < numbers, other=0).to(tl.int32)
    there = 2 * block * HALF < numbers
    s = _scale(absmax_ptr, values_ptr, nested_ptr, offset_ptr, block, there, NESTED)
    high, low = tl.load(levels_ptr + (byte >> 4)) * s, tl.load(levels_ptr + (byte & 15)) * s
    at = 2 * block * HALF + tl.arange(0, 2 * HALF)[None, :]
    w = tl.interleave(high, low).to(w_ptr.dtype.element_ty)
    tl.store(w_ptr + at, w, mask=at < numbers)


@triton.jit
def few(
    x_ptr, codes_ptr, absmax_ptr, values_ptr, nested_ptr, offset_ptr, levels_ptr, bias_ptr, y_ptr,
    i, o,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Some numbers of one row of y; W isn't rounded. A row of W is of whole blocks."""
    x_ptr += tl.program_id(1) * i
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    each = i // (2 * HALF)
    sums = tl.zeros((ROWS, BLOCKS), tl.float32)
    for first in range(0, each, BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        there = (row < o)[:, None] & (b < each)[None, :]
        block = row[:, None].to(tl.int64) * each + b[None, :]
        s = _scale(absmax_ptr, values_ptr, nested_ptr, offset_ptr, block, there, NESTED)
        at = tl.arange(0, HALF)
        c = b[:, None] * HALF + at[None, :]
        high = tl.load(x_ptr + 2 * c, mask=2 * c < i, other=0.0).to(tl.float32)[None, :, :]
        low = tl.load(x_ptr + 2 * c + 1, mask=2 * c < i, other=0.0).to(tl.float32)[None, :, :]
        codes = codes_ptr + block[:, :, None] * HALF + at[None, None, :]
        byte = tl.load(codes, mask=there[:, :, None], other=0).to(tl.int32)
        w = tl.load(levels_ptr + (byte >> 4)) * high + tl.load(levels_ptr + (byte & 15)) * low
        sums += tl.sum(w, 2) * s  # beyond a row x is 0
    y = tl.sum(sums, 1)
    if BIAS:
        y += tl.load(bias_ptr + row, mask=row < o, other=0.0).to(tl.float32)
    tl.store(y_ptr + tl.program_id(1) * o + row, y.to(y_ptr.dtype.element_ty), mask=row < o)


def unpack(
    parts: Mapping[str, Tensor], levels: Tensor, values: Tensor, block: int, out: Tensor
) -> None:
    """Writes W, rounded once from fp32, into a contiguous tensor of n numbers.

    Parts are the codes "" (⌈n/2⌉, 1), and `absmax` (⌈n/block⌉,) in fp32, or 8-bit codes of it with
    `nested_absmax` and `nested_offset`; beside them the levels (16,) and the values (256,).
    """
    blocks, nested = max(1, BYTES // (block // 2)), "nested_absmax" in parts
    grid = (cdiv(cdiv(out.numel(), block), blocks),)
    given = parts[""], *_scales(parts, values), levels, out, out.numel()
    launch(form, grid, *given, BLOCKS=blocks, HALF=block // 2, NESTED=nested, **TILE)


def product(
    x: Tensor,
    parts: Mapping[str, Tensor],
    levels: Tensor,
    values: Tensor,
    block: int,
    bias: Tensor | None,
) -> Tensor | None:
    """y (…, o) = x Wᵀ + bias of a few rows x (…, i), without forming W; None where it can't be."""
    i = x.shape[-1]
    known = parts.keys() <= {"", "absmax", "nested_absmax", "nested_offset"}
    if not (known and 0 < x.numel() <= FEW * i and i % block == 0 and x.is_contiguous()):
        return None
    y = x.new_empty(*x.shape[:-1], 2 * parts[""].numel() // i)
    o, blocks = y.shape[-1], max(1, BYTES // (block // 2))
    given = x, parts[""], *_scales(parts, values), levels, y if bias is None else bias, y, i, o
    launch(
        few, (cdiv(o, 4), x.numel() // i), *given,
        ROWS=4, BLOCKS=blocks, HALF=block // 2,
        NESTED="nested_absmax" in parts, BIAS=bias is not None, **TILE,
    )  # fmt: skip
    return y


def _scales(parts: Mapping[str, Tensor], values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    absmax = parts["absmax"]
    beside = (parts.get(name, values) for name in ("nested_absmax", "nested_offset"))
    return (absmax, values, *beside)  # type: ignore

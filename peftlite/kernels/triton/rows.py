"""Row-mixed low-rank products on a GPU: each row of a batch with the factors of its own slot.

The slots are read on the device, and what is launched follows from shapes alone: no host waits, and
a CUDA graph captured once replays for any mix. Rows of one slot that are near one another share a
read of its factors. A sum over columns is left in planes of fp32 that `expand` adds up in order, so
runs are alike. Shape letters: i in, o out, R the most ranks of a slot, S slots.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.triton.kernels import block_and_rank, dot, half_dot, tile
from peftlite.kernels.triton.launch import PROGRAMS, cdiv, launch, padded

FEW = 16
"""The tokens a row from which on most of a block of rows have one slot."""


@triton.jit
def _own(slots_ptr, block, rows, each, ROWS: tl.constexpr, APART: tl.constexpr):
    """A block of rows, and the slots of those that are a program's; 0 for the others.

    Apart, the program of the first row of every slot has all of its rows.
    """
    place = tl.arange(0, ROWS)
    row = block * ROWS + place
    slots = tl.load(slots_ptr + row // each, mask=row < rows, other=0)
    if APART:
        mine = tl.sum(tl.where(place == tl.program_id(1), slots, 0))
        first = tl.min(tl.where(slots == mine, place, ROWS))
        slots = tl.where((slots == mine) & (first == tl.program_id(1)), slots, 0)
    return row, slots


@triton.jit
def shrink(
    x_ptr, a_ptr, h_ptr, slots_ptr, ranks_ptr,
    rows, each, columns, most, x_row, x_column, a_slot, a_row, a_column, ranks_slot,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """h = x Aᵀ, (splits, rows, R): every split has its tiles of the columns."""
    block, r = block_and_rank(most, RANK)
    split, splits = tl.program_id(2), tl.num_programs(2)
    row, slots = _own(slots_ptr, block, rows, each, ROWS, APART)
    h_ptr += split.to(tl.int64) * rows * most
    slot = tl.max(slots).to(tl.int64)
    while slot > 0:
        own, rank = slots == slot, tl.load(ranks_ptr + slot * ranks_slot)
        a = a_ptr + slot * a_slot
        x = x_ptr + row[:, None].to(tl.int64) * x_row
        h = tl.zeros((ROWS, RANK), tl.float32)
        end = tl.where(tl.min(r) < rank, columns, 0)
        for first in range(split * COLUMNS, end, splits * COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            mask = own[:, None] & (c[None, :] < columns)
            part = tl.load(x + c[None, :].to(tl.int64) * x_column, mask=mask, other=0.0)
            h = dot(part, tile(a, c, r, columns, rank, a_column, a_row), h)
        offset = row[:, None].to(tl.int64) * most + r[None, :]
        tl.store(h_ptr + offset, h, mask=own[:, None] & (r[None, :] < rank))
        slots = tl.where(own, 0, slots)
        slot = tl.max(slots).to(tl.int64)


@triton.jit
def expand(
    h_ptr, b_ptr, y_ptr, slots_ptr, ranks_ptr, scale_ptr,
    rows, each, columns, most, y_row, y_column, b_slot, b_row, b_column,
    ranks_slot, scale_slot,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, APART: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """y += s·h Bᵀ."""
    row, slots = _own(slots_ptr, tl.program_id(0), rows, each, ROWS, APART)
    c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.max(slots).to(tl.int64)
    while slot > 0:
        own, rank = slots == slot, tl.load(ranks_ptr + slot * ranks_slot)
        scale = tl.load(scale_ptr + slot * scale_slot).to(tl.float32)
        b = b_ptr + slot * b_slot
        sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in tl.range(0, rank, RANK, num_stages=1):
            r = first + tl.arange(0, RANK)
            mask = own[:, None] & (r[None, :] < rank)
            h_at = h_ptr + row[:, None].to(tl.int64) * most + r[None, :]
            h = tl.load(h_at, mask=mask, other=0.0)
            for _ in tl.static_range(SPLITS - 1):
                h_at += rows * most
                h += tl.load(h_at, mask=mask, other=0.0)
            up = tile(b, r, c, rank, columns, b_column, b_row)
            sum = half_dot((h * scale).to(up.dtype), up, sum)
        offset = row[:, None].to(tl.int64) * y_row + c[None, :].to(tl.int64) * y_column
        mask = own[:, None] & (c[None, :] < columns)
        y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32) + sum
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)
        slots = tl.where(own, 0, slots)
        slot = tl.max(slots).to(tl.int64)


def rows_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, slots: Tensor
) -> None:
    """y += s·(x Aᵀ) Bᵀ, each row of the batch with the factors of its slot. Slot 0 adds nothing.

    Shapes as in `reference.rows_low_rank`, x and y in half precision, A and B in theirs or in fp32.
    All may have any strides but the slots, which are side by side.
    """
    rows_expand(rows_shrink(x, a, ranks, slots), y, b, scale, ranks, slots)


def rows_shrink(x: Tensor, a: Tensor, ranks: Tensor, slots: Tensor) -> Tensor:
    """h = x Aᵀ as planes of a sum, (splits, rows, R); it may run beside the base product."""
    each, (_, most, columns) = math.prod(x.shape[1:-1]), a.shape
    flat = x.reshape(-1, columns)
    config = tiles(each, most, x.dtype, a.dtype)
    grid = _grid(len(flat), most, config)
    shares = 2 * PROGRAMS // max(1, grid[0] * grid[1])
    splits = max(1, min(shares, cdiv(columns, config["COLUMNS"]), 16))
    h = x.new_empty(splits, len(flat), most, dtype=torch.float32)
    launch(
        shrink, (*grid, splits), flat, a, h, slots, ranks, len(flat), each, columns, most,
        *flat.stride(), *a.stride(), *ranks.stride(), **config,
    )  # fmt: skip
    return h


def rows_expand(
    h: Tensor, y: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, slots: Tensor
) -> None:
    """y += s·h Bᵀ, for the planes of h."""
    each, (_, columns, most) = math.prod(y.shape[1:-1]), b.shape
    flat = y.reshape(-1, columns)
    config = tiles(each, most, y.dtype, b.dtype)
    blocks, apart = _grid(len(flat), config["RANK"], config)
    launch(
        expand, (blocks, apart, cdiv(columns, config["COLUMNS"])),
        h, b, flat, slots, ranks, scale, len(flat), each, columns, most,
        *flat.stride(), *b.stride(), *ranks.stride(), *scale.stride(), SPLITS=len(h), **config,
    )  # fmt: skip
    if flat.data_ptr() != y.data_ptr():  # rows that aren't at even distances were copied
        y.copy_(flat.view(y.shape))


def tiles(each: int, most: int, dtype: torch.dtype, factors: torch.dtype) -> dict[str, int | bool]:
    """The tile of the rows, columns and ranks, and how a program runs, without a spill."""
    apart, wide = each < FEW, factors is not dtype
    return {
        "ROWS": 16 if apart else 64,
        "COLUMNS": 128 if apart and not wide else 64,
        "RANK": padded(most, 32),
        "APART": apart,
        "num_warps": 4,
        "num_stages": 3,
    }


def _grid(rows: int, ranks: int, config: dict[str, int | bool]) -> tuple[int, int]:
    programs = cdiv(rows, config["ROWS"]) * cdiv(ranks, config["RANK"])
    return programs, config["ROWS"] if config["APART"] else 1

"""A bank's rows by single.c or half.c: y += s_k·(x A_kᵀ) B_kᵀ, with a k for each row."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor

from peftlite.kernels.native import low_rank
from peftlite.kernels.native.kernel import is_memory, is_plain, threads
from peftlite.kernels.native.low_rank import COLUMNS, RANK, SIDE, Factor, Rows


class _Mixed(ctypes.Structure):
    """`struct Mixed`."""

    _fields_ = [
        ("x", Rows),
        ("y", Rows),
        *((name, c_long) for name in ("rows", "tokens")),
        *((name, c_void_p) for name in ("slots", "order")),
        ("a", Factor),
        ("b", Factor),
        *((name, c_void_p) for name in ("scale", "rank")),
        *((f"{name}_slots", c_long) for name in ("a", "b", "scale", "rank")),
        ("room", c_void_p),
        ("groups", c_long),
    ]


def fits(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor) -> bool:
    """Whether y (b, t, o) and all else have the dtypes, the sides and the places that C wants."""
    return (
        all(t.dtype is torch.float32 for t in (a, b, scale))
        and y.dtype is x.dtype
        and x.dtype in low_rank.ROWS
        and ranks.dtype is torch.int32
        and x.shape[-1] % COLUMNS == y.shape[-1] % COLUMNS == 0
        and x.numel() > 0
        and 0 < a.shape[1] <= RANK
        and a.stride(2) == 1
        and b.stride(1) == 1
        and is_plain(y, x)
        and is_memory(a, b, scale, ranks)
        and low_rank.ROWS[x.dtype].ready()
    )


def rows_low_rank(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ranks: Tensor,
    slots: Tensor,
    order: Tensor,
) -> Tensor:
    """The sum in y itself, for the slots that there are, and which of them a row has, or -1."""
    groups = -(-a.shape[1] // SIDE)
    room = low_rank.room_of(len(slots) * groups * x.shape[-1] // SIDE)
    job = _Mixed(
        *(_rows(x), _rows(y)),
        *x.shape[:2],
        *(t.data_ptr() for t in (slots, order)),
        *(Factor(a.data_ptr(), a.stride(1), 1), Factor(b.data_ptr(), b.stride(2), 1)),
        *(t.data_ptr() for t in (scale, ranks)),
        *(t.stride(0) for t in (a, b, scale, ranks)),
        room,
        groups,
    )
    low_rank.ROWS[x.dtype].lib.mix(ctypes.byref(job), c_long(len(slots)), c_int(threads()))
    return y


def _rows(x: Tensor) -> Rows:
    """The tokens of all rows of x (b, t, i)."""
    return Rows(x.data_ptr(), None, x.shape[0] * x.shape[1], x.shape[2], x.shape[2], 0, 0)

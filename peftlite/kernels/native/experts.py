"""The operations of `kernels/experts.py` and `tokens.py` in C: all of a product in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_float, c_int, c_long, c_void_p
from typing import Any

import torch
from torch import Tensor

from peftlite.kernels.native import low_rank
from peftlite.kernels.native.kernel import is_memory, pointer, threads
from peftlite.kernels.native.low_rank import COLUMNS, RANK, SIDE, Factor, Rows, kernel_of, lies

Groups = Sequence[tuple[int | tuple[int, int], slice | int | Tensor]]
"""Experts, or experts and deltas, and the rows of each."""


class _Stack(ctypes.Structure):
    """`struct Stack`."""

    _fields_ = [("at", c_void_p), *((by, c_long) for by in ("expert", "delta", "rank", "other"))]


class Each:
    """Every expert's own rows, as C has them: entries of x one after another, one, or some."""

    def __init__(self, groups: Groups, x: Tensor):
        table, order, each = list[int](), list[Tensor](), x.shape[1:-1].numel()
        self.tokens: int = 0
        self.experts: int = len(groups)
        for key, rows in groups:
            at, count = 0, each
            if isinstance(rows, slice):
                at, count = rows.start, rows.stop - rows.start
            elif isinstance(rows, int):
                at = rows
            else:
                order.append(rows)
                count = len(rows) * each
            table += *(key if isinstance(key, tuple) else (key, 0)), at, self.tokens, count
            self.tokens += count
        self.own: Tensor = torch.tensor(table, dtype=torch.int64)
        self.order: Tensor | None = None
        if order:
            self.order = (torch.cat(order)[:, None] * each + torch.arange(each)).flatten()

    def shrink(self, x: Tensor, a: Tensor, scales: list[float]) -> Tensor:
        """h (t, r) = s·x Aᵀ, for the A (r, i) and the s of each token."""
        return self._reduce(x, a, None, None, scales)

    def grad_b(self, dy: Tensor, h: Tensor, up: Tensor, scales: list[float], g: Tensor) -> Tensor:
        """dh (t, r) = s·dY Uᵀ, and hᵀ dY into g (…, r, o)."""
        return self._reduce(dy, up, h, g, scales)

    def grad_a(self, x: Tensor, dh: Tensor, g: Tensor) -> None:
        """dhᵀ x into g (…, r, i)."""
        self._reduce(x, None, dh, g, [])

    def add(self, y: Tensor, h: Tensor, up: Tensor) -> None:
        """y += h U, in place."""
        room = self._room(-(-up.shape[-2] // SIDE) * y.shape[-1] // SIDE)
        to = c_long(up.shape[-2]), _factor(h), _stack(up)
        kernel_of(y.dtype).lib.expand_each(*self._rows(y), *to, *room)

    def _reduce(
        self, x: Tensor, a: Tensor | None, d: Tensor | None, g: Tensor | None, scales: list[float]
    ) -> Any:
        columns, rank = x.shape[-1], next(f for f in (g, a) if f is not None).shape[-2]
        h = None if a is None else a.new_empty(self.tokens, rank)
        room = self._room(low_rank.tiles(rank, columns, d is not None, a is not None))
        s = (c_float * len(scales))(*scales)
        to = c_long(rank), _stack(a), pointer(h), s, _factor(d), _stack(g)
        kernel_of(x.dtype).lib.reduce_each(*self._rows(x), *to, *room)
        return h

    def _rows(self, x: Tensor) -> tuple[Any, ...]:
        order, i = self.order, x.shape[-1]
        at = None if order is None else order.data_ptr()
        stride = x.stride(-2) if order is None else i
        return byref(Rows(x.data_ptr(), at, 0, i, stride, 0, 0)), c_long(x.stride(0))

    def _room(self, tiles: int) -> tuple[Any, ...]:
        count = threads()
        room = low_rank.room_of(count * tiles)
        return pointer(self.own), c_long(self.experts), room, c_long(tiles), c_int(count)


def fits(groups: Groups, rows: Sequence[Tensor], factors: Sequence[Tensor]) -> bool:
    """Whether rows have a kernel, of columns by the 32; factors (…, r, n) in fp32, of few ranks."""
    return (
        bool(groups)
        and all(x.dtype is rows[0].dtype and _fits(x, groups[0][1]) for x in rows)
        and all(f.dtype is torch.float32 and 0 < f.shape[-2] <= RANK for f in factors)
        and is_memory(*rows, *factors)
        and low_rank.runs(rows[0].dtype)
    )


def _fits(x: Tensor, listed: slice | int | Tensor) -> bool:
    lies = x.is_contiguous() if isinstance(listed, Tensor) else x.stride(-1) == 1
    return lies and x.shape[-1] % COLUMNS == 0 and x.numel() > 0


def _factor(h: Tensor | None) -> Any:
    return None if h is None else byref(Factor(*lies(h, 1)))


def _stack(factors: Tensor | None) -> Any:
    if factors is None:
        return None
    by_expert, *by_delta, by_rank, by_other = factors.stride()
    return byref(_Stack(factors.data_ptr(), by_expert, *(by_delta or (0,)), by_rank, by_other))

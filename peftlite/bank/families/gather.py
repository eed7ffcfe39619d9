"""Gather: what each row of a batch takes of the tables of all slots."""

from __future__ import annotations

import torch
from torch import Tensor

from peftlite.bank.rows import Rows


def fold(x: Tensor, rows: Rows) -> Tensor:
    """The entries (n, …, i) of x, or (b·t, i), as (b, t, i)."""
    return x.reshape(len(rows.slots), -1, x.shape[-1])


def slots_of(rows: Rows, n: int) -> Tensor:
    """The slot of each of n entries, where a row may have several."""
    b = len(rows.slots)
    return rows.slots if n == b else rows.slots.repeat_interleave(n // b, output_size=n)


def per_row(table: Tensor, rows: Rows) -> Tensor:
    """What each row takes of a table, (b, *shape)."""
    return table if rows.lies else table.index_select(0, rows.slots)


def along(table: Tensor, rows: Rows, y: Tensor, dim: int) -> Tensor:
    """Each entry's vector of a table (S, o), to go with y (n, …), whose o is in dimension dim."""
    if y.dim() == 1:
        return table.index_select(0, rows.slots)[0]
    shape = [1] * y.dim()
    shape[0], shape[dim] = len(y), table.shape[1]
    return table.index_select(0, slots_of(rows, len(y))).view(shape)


def dropped_by_rows(x: Tensor, p: Tensor) -> Tensor:
    """x (b, …) with the dropout p (b,) of each row."""
    p = p.view(-1, *(1 for _ in x.shape[1:]))
    kept = torch.rand(x.shape, device=x.device) >= p
    return x * (kept / (1 - p)).to(x.dtype)


def rescaled(y: Tensor, bias: Tensor | None, table: Tensor, rows: Rows) -> Tensor:
    """y + change ⊙ (y − b), the change of each row from a table (S, o)."""
    change = along(table, rows, y, -1).to(y.dtype)
    return torch.addcmul(y, y if bias is None else y - bias, change)

"""Gather: what families share: vectors of each row along outputs, and what slots keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftlite.bank.families.mixed import slots_of
from peftlite.bank.route import Rows
from peftlite.core.site import Site


def along(table: Tensor, rows: Rows, y: Tensor, dim: int) -> Tensor:
    """Each entry's vector of a table (S, o), to go with y (n, …), whose o is in dimension dim."""
    if y.dim() == 1:
        return table.index_select(0, rows.slots)[0]
    shape = [1] * y.dim()
    shape[0], shape[dim] = len(y), table.shape[1]
    return table.index_select(0, slots_of(rows, len(y))).view(shape)


def rescaled(y: Tensor, bias: Tensor | None, table: Tensor, rows: Rows) -> Tensor:
    """y + change ⊙ (y − b), the change of each row from a table (S, o)."""
    change = along(table, rows, y, -1).to(y.dtype)
    return torch.addcmul(y, y if bias is None else y - bias, change)


def dtype_of(site: Site, patch: Any) -> torch.dtype:
    """What a slot keeps a patch's matrices in: as its method says, or as its site computes."""
    said = getattr(getattr(patch, "method", None), "dtype", None)
    if said is not None or not site.is_call:
        return said or site.tensor.dtype
    floats = (p.dtype for p in site.module.parameters() if p.is_floating_point())
    return next(floats, torch.get_default_dtype())

"""MixedDense: y = Wx + D_k x, with all of D = W' − W in each slot: for changes of no smaller form.

A head that is trained in full, LoHa, LoKr, OFT, and whatever a user's own method makes of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftlite.bank.arena import Field
from peftlite.bank.families.gather import per_row
from peftlite.bank.families.linear import MixedLinear
from peftlite.bank.families.mixed import Contents
from peftlite.bank.rows import Rows, Tables
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.core.values import change_of
from peftlite.methods.full import AddPatch


class MixedDense(MixedLinear):
    """`d`, in the shape of W: each slot costs what the weight does."""

    learned = ("d",)
    trained = (AddPatch,)

    def __init__(self, site: Site, patch: Patch, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.site = site

    def fields(self) -> dict[str, Field]:
        return {"d": Field(tuple(self.site.shape), self.dtype)}

    def encode(self, patches: Sequence[Any]) -> Contents:
        own = self.trains(patches)
        return {"d": patches[0].difference if own else change_of(patches, self.site.tensor)}

    def parameter(self, patch: Any, name: str) -> Tensor:
        return patch.difference

    def add(self, rows: Rows, tables: Tables, x: Tensor, y: Tensor) -> Tensor:
        d = self.matrices(tables["d"]).mT  # (S, i, o)
        x = x.to(d.dtype)
        if not self.by_runs(rows, tables, x, y):
            return y + torch.bmm(x, per_row(d, rows)).to(y.dtype)
        for slot, start, stop in rows.runs or ():
            y[start:stop] += x[start:stop] @ d[slot]
        return y

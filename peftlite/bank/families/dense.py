"""MixedDense: y = Wx + D_k x, with all of D = W' − W in each slot: for changes of no smaller form.

A head that is trained in full, LoHa, LoKr, OFT, and whatever a user's own method makes of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftlite.bank.arena import Field
from peftlite.bank.families.gather import fold, per_row
from peftlite.bank.families.mixed import Held, Mixed, called_as_map, dtype_of, is_whole
from peftlite.bank.rows import Rows, Tables
from peftlite.core.maps import Map
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.core.values import change_of
from peftlite.methods.full import AddPatch


class MixedDense(Mixed):
    """D, in the shape of W: each slot costs what the weight does."""

    learned = ("d",)

    def __init__(self, site: Site, patch: Patch, max_rank: int):
        super().__init__(site, patch, max_rank)
        called_as_map(site)
        self.site = site
        self.dtype = dtype_of(site, patch)

    def fields(self) -> dict[str, Field]:
        return {"d": Field(tuple(self.site.shape), self.dtype)}

    def read(self, patches: Sequence[Any]) -> Held:
        own = self.trains(patches)
        return {"d": patches[0].difference if own else change_of(patches, self.site.tensor)}

    def trains(self, patches: Sequence[Any]) -> bool:
        return type(patches[0]) is AddPatch and is_whole(patches)

    def parameter(self, patch: Any, name: str) -> Tensor:
        return patch.difference

    def mix(
        self, rows: Rows, tables: Tables, inner: Map, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        y, d = inner(input, *args, **kwargs), tables["d"]
        d = d if self.site.layout.transposed else d.mT  # (S, i, o)
        x, flat = fold(input, rows).to(d.dtype), fold(y, rows)
        if not self.by_runs(rows, tables, x, y):
            return (flat + torch.bmm(x, per_row(d, rows)).to(y.dtype)).view_as(y)
        for slot, start, stop in rows.runs or ():
            flat[start:stop] += x[start:stop] @ d[slot]
        return flat.view_as(y)

"""MixedDoRA: y' = y + (m/‖V‖ − 1)_k ⊙ (y − b), with y what LoRA's k-th change gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.bank.arena import Field
from peftlite.bank.families.gather import rescaled
from peftlite.bank.families.low_rank import MixedLowRank
from peftlite.bank.families.mixed import Contents
from peftlite.bank.rows import Rows, Tables
from peftlite.core.maps import Map
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.core.tensors import narrow, wide
from peftlite.methods.dora import DoRAPatch


class MixedDoRA(MixedLowRank):
    """LoRA's factors, and `change` (o), every output's ratio less 1, found as a delta is loaded."""

    learned = ()

    def __init__(self, site: Site, patch: DoRAPatch, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.site = site

    def fields(self) -> dict[str, Field]:
        return {**super().fields(), "change": Field((self.o,), wide(self.site.whole))}

    def encode(self, patches: Sequence[Any]) -> Contents:
        if not all(patch.has_call for patch in patches):
            raise self.cannot("be mixed by rows where it changes some of the inputs", patches[0])
        change = torch.stack([self._change(patch) for patch in patches]).sum(0)
        return {**super().encode(patches), "change": change}

    def _change(self, patch: DoRAPatch) -> Tensor:
        """m/‖V‖ − 1 of all outputs, those that a patch leaves alone at 0."""
        change = patch.ratio(narrow(self.site.whole, patch.index)) - 1
        if patch.index is None:
            return change
        _, start, stop = patch.index
        return F.pad(change, (start, self.o - stop))

    def trains(self, patches: Sequence[Patch]) -> bool:
        return False

    def mix(
        self, rows: Rows, tables: Tables, inner: Map, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        y = super().mix(rows, tables, inner, input, *args, **kwargs)
        return rescaled(y, inner.bias, tables["change"], rows)

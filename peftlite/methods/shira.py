"""SHiRA: W' = W + D, with D zero but at random entries, as many as a LoRA's factors have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftlite.core.patch import WeightMethod
from peftlite.core.site import Site
from peftlite.fields import integer, number
from peftlite.methods.sparse import SparsePatch, draw


@dataclass(frozen=True)
class SHiRA(WeightMethod):
    """W' = W + D, with D zero but at r·(i + o) random entries of each matrix (o, i).

    Bhardwaj et al., arXiv:2406.13175, §3 (SHiRA-Rand). Its other masks, by magnitude or by scores,
    are `SparseMask`'s. By default it takes every weight of a linear map but the output head's.

    Args:
        rank: r: the change has as many entries as a LoRA of this rank, and at most all.
        seed: of the choice.
    """

    rank: int = integer(32)
    seed: int = number(0, int, lambda s: 0 <= s < 2**63, "a whole number from 0 up")

    def build(self, site: Site) -> SparsePatch:
        self.check(site)
        layout = site.layout
        count = self.rank * (layout.o + layout.i) * math.prod(layout.stack)
        return SparsePatch(site, min(count, site.tensor.numel()), self.dtype)

    def reset_all(self, patches: Sequence[Any], tensors: Sequence[Any]) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for patch in patches:
            patch.place(draw(len(patch.values), patch.size, generator))

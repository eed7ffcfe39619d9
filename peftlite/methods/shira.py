"""SHiRA: W' = W + D, with D zero but at random entries, as many as a LoRA's factors have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlite.methods.sparse import SparsePatch, draw
from peftlite.patch import WeightMethod, set_number
from peftlite.site import Site


@dataclass(frozen=True)
class SHiRA(WeightMethod):
    """W' = W + D, with D zero but at r·(i + o) random entries of each matrix.

    Bhardwaj et al., arXiv:2406.13175, §3 (SHiRA-Rand). Its other masks, by magnitude or by scores,
    are `SparseMask`'s. By default it takes every weight of a linear map but the output head's.

    Args:
        rank: r: the change has as many entries as a LoRA of this rank, and at most all.
        seed: of the choice.
    """

    rank: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        set_number(self, "rank", int, lambda rank: rank >= 1, "a whole number from 1 up")
        set_number(self, "seed", int, lambda s: 0 <= s < 2**63, "a whole number from 0 up")

    def build(self, site: Site) -> SparsePatch:
        if not self.accepts(site):
            raise self.refuse(site)
        w = site.tensor
        if isinstance(site.module, nn.modules.conv._ConvNd):
            w = w.flatten(1)  # a kernel's taps are one dimension
        *stack, rows, columns = w.shape
        count = self.rank * (rows + columns) * torch.Size(stack).numel()
        return SparsePatch(site, min(count, w.numel()), self.dtype)

    def begin(self, patches: Sequence[Any], tensors: Sequence[Any]) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for patch in patches:
            patch.place(draw(len(patch.values), patch.size, generator))

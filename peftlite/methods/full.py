"""FullTuning: W' = W + D, with D dense. For a new head, the last layers, or everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftlite.patch import Method, Patch, trainable
from peftlite.site import Site


class AddPatch(Patch):
    """W' = W + D: every entry of the tensor has its own difference, zero at first."""

    def __init__(self, site: Site, dtype: torch.dtype | None):
        super().__init__()
        self.difference = trainable(*site.shape, site=site, dtype=dtype)

    def reset(self, w: Tensor | None) -> None:
        self.difference.zero_()

    def value(self, w: Tensor) -> Tensor:
        return (w + self.difference).to(w.dtype)


@dataclass(frozen=True)
class FullTuning(Method):
    """W' = W + D, with D as large as W: full fine-tuning of the chosen tensors, as a delta.

    The base stays as it is, so the delta detaches, swaps and merges like any other. By default it
    takes every floating-point parameter; `targets="head"` is the usual use.
    """

    takes = "tensors"

    def accepts(self, site: Site) -> bool:
        return not site.is_call

    def build(self, site: Site) -> AddPatch:
        if not self.accepts(site):
            raise self.refuse(site)
        return AddPatch(site, self.dtype)

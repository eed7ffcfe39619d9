"""FullTuning: W' = W + D, with D dense. For a new head, the last layers, or everything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftlite.core.patch import Method, Patch, trainable
from peftlite.core.site import Site
from peftlite.errors import TargetError
from peftlite.fields import integer

# the outermost list that a tensor is in, and its number there
_LAYER = re.compile(r"((?:.*?\.)?)(\d+)\.")


class AddPatch(Patch):
    """W' = W + D: every entry of the tensor has its own difference, zero at first.

    No gradient reaches a running mean or variance, so D is a buffer there.
    """

    difference: Tensor

    def __init__(self, site: Site, dtype: torch.dtype | None):
        super().__init__()
        difference = trainable(*site.shape, site=site, dtype=dtype)
        if site.is_statistic:
            self.register_buffer("difference", difference.data)
        else:
            self.difference = difference

    def reset(self, w: Tensor | None) -> None:
        self.difference.zero_()

    def fit(self, w: Tensor, change: Tensor) -> None:
        self.difference.copy_(change)

    def value(self, w: Tensor) -> Tensor:
        return (w + self.difference).to(w.dtype)


@dataclass(frozen=True)
class FullTuning(Method):
    """W' = W + D, with D as large as W: full fine-tuning of the chosen tensors, as a delta.

    D is (o, i) at a weight, zero at first. The base stays as it is, so the delta detaches, swaps
    and merges like any other. By default it takes every floating-point parameter; `targets="head"`
    is the usual use.

    Args:
        top_layers: k, to take only what is in the last k layers, by their numbers in the list that
            they are in; k of each list where a model has several; the variable fine-tuning that
            Houlsby et al., arXiv:1902.00751, measure adapters against. None for all.
    """

    top_layers: int | None = integer(None)

    rate: ClassVar[float] = 0.1
    takes = "tensors"

    def accepts(self, site: Site) -> bool:
        return not site.is_call

    def choose(self, picked: Sequence[Site], everything: Sequence[Site]) -> Sequence[Site]:
        if self.top_layers is None:
            return picked
        found = {site: _LAYER.match(site.address) for site in picked}
        layers = {site: (its[1], int(its[2])) for site, its in found.items() if its}
        if not layers:
            raise TargetError("top_layers goes by the numbers of layers in a list: there are none")
        numbers: dict[str, set[int]] = {}
        for stack, number in layers.values():
            numbers.setdefault(stack, set()).add(number)
        last = {stack: sorted(its)[-self.top_layers :] for stack, its in numbers.items()}
        return [site for site, (stack, number) in layers.items() if number in last[stack]]

    def build(self, site: Site) -> AddPatch:
        self.check(site)
        return AddPatch(site, self.dtype)

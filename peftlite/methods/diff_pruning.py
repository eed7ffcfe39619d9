"""DiffPruning: W' = W + z⊙w, with gates z that learn to be zero, and then the largest entries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftlite.core.patch import trainable
from peftlite.core.site import Site
from peftlite.fields import number
from peftlite.methods.search import SearchMethod, SearchPatch


class DiffPruningPatch(SearchPatch):
    """W' = W + z⊙w, with w as `values` and z from `alpha`, both in the shape of W.

    In the structured form z has one more factor, from `group_alpha`, for the tensor as a whole.
    """

    method: DiffPruning

    alpha: Any  # None in a patch from a file
    group_alpha: Any  # None unless structured

    def __init__(self, site: Site, method: DiffPruning):
        super().__init__(site, method)
        self.method, self.alpha = method, self.dense(site, method.dtype)
        group = trainable(site=site, dtype=method.dtype) if method.structured else None
        self.register_parameter("group_alpha", group)

    def reset(self, w: Tensor | None) -> None:
        super().reset(w)
        self.alpha.data = torch.full_like(self.values, self.method.alpha_init)
        if self.group_alpha is not None:
            self.group_alpha.fill_(self.method.alpha_init)

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        if "indices" in shapes:
            self.alpha = self.group_alpha = None
        super().resize(shapes)

    def difference(self, noise: bool) -> Tensor:
        gate = self._gate(self.alpha, noise)
        if self.group_alpha is not None:
            gate = gate * self._gate(self.group_alpha, noise)
        # no branch: a compiled graph serves both phases, and every parameter has a gradient
        return self.values * torch.where(self.taken < self.steps, gate, 1)

    def _gate(self, alpha: Tensor, noise: bool) -> Tensor:
        """z, hard concrete: stretched to (l, r), then clamped; without noise it is its median."""
        if noise:
            alpha = alpha + torch.rand_like(alpha).logit(eps=1e-4)
        l, r = self.method.l, self.method.r  # noqa: E741
        return (alpha.sigmoid() * (r - l) + l).clamp(0, 1)

    def fix(self, indices: Tensor) -> None:
        super().fix(indices)
        self.values.copy_(self.difference(noise=False))

    def regularizer(self) -> Tensor | None:
        """λ·E‖z‖₀, the sum of the chances that a gate isn't zero, until the entries are found."""
        if self.alpha is None:
            return None
        shift = math.log(-self.method.l / self.method.r)
        chance = (self.alpha - shift).sigmoid()
        if self.group_alpha is not None:
            chance = chance * (self.group_alpha - shift).sigmoid()
        return self.method.l0_penalty * chance.sum() * (self.taken < self.steps)


@dataclass(frozen=True)
class DiffPruning(SearchMethod):
    """W' = W + z⊙w, with gates z in [0, 1] that learn to be zero. Guo et al., arXiv:2012.07463, §3.

    w and z are (o, i). z = clamp(σ(α + log u − log(1−u))·(r − l) + l, 0, 1), with u uniform in
    (0, 1), drawn anew whenever W' is formed in training; in evaluation log u − log(1−u) is 0. Add
    `delta.regularizer()` to the loss: λ·E‖z‖₀. After `steps` calls of `delta.step()` the entries
    with the largest |z⊙w|, of all sites taken together, are kept at that value, and from then on
    they alone train, without gates (§3.2). By default it takes every weight of a linear map but the
    output head's.

    Training needs twice the memory of full fine-tuning in both phases. The file has the kept
    entries alone, and so has memory once it is loaded. The authors let α learn at a rate of 0.1,
    without weight decay: `alpha` and `group_alpha` in `delta.named_parameters()`.

    Args:
        steps: until the entries are fixed.
        fraction: of the entries that are kept.
        structured: whether z has one more factor, a gate for the tensor as a whole (§3.3).
        l: where the gates' distribution is stretched to, below 0.
        r: the same, above 1.
        alpha_init: α at first: nearly all gates are open.
        l0_penalty: λ.
    """

    structured: bool = False
    l: float = number(-1.5, float, lambda l: -math.inf < l < 0, "finite and below 0")  # noqa: E741
    r: float = number(1.5, float, lambda r: 1 < r < math.inf, "finite and above 1")
    alpha_init: float = number(5.0, float, math.isfinite, "finite")
    l0_penalty: float = number(1.25e-7, float, lambda p: 0 <= p < math.inf, "finite, from 0 up")

    patch: ClassVar[type[DiffPruningPatch]] = DiffPruningPatch

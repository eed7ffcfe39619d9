"""(IA)³: y' = l ⊙ y for the outputs of a map, or y' = W(l ⊙ x) for its inputs, with l learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from peftlite.core import maps
from peftlite.core.layout import Layout
from peftlite.core.patch import Method, Patch, trainable
from peftlite.core.site import Site
from peftlite.kernels.rescale import rescale


class ScalePatch(Patch):
    """W' = l ⊙ W along the outputs or the inputs; stacks of matrices keep their stack.

    `l` is (o) or (i). A weight and the bias that is added to its outputs have one between them.
    """

    def __init__(self, site: Site, method: IA3):
        super().__init__()
        self.inputs: bool = method.feedforward
        # one output of a Bilinear has a matrix of weights
        joined = isinstance(site.module, nn.Bilinear) or site.layout.joined
        self.layout: Layout = replace(site.layout, joined=joined)
        self.l: nn.Parameter = trainable(
            *self.layout.vector(self.inputs), site=site, dtype=method.dtype
        )
        if not _rides_beside(site):
            self.has_call = False
        self.behind: int = len(site.shape[2:])  # a convolution's dimensions of space

    def reset(self, w: Tensor | None) -> None:
        self.l.fill_(1.0)

    def value(self, w: Tensor) -> Tensor:
        return self.layout.scaled(w, self.l, self.inputs).to(w.dtype)

    def call(self, inner: maps.Map, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        change, behind = self.l - 1, self.behind
        if self.inputs:
            return inner(rescale(input, change, None, behind), *args, **kwargs)
        # the bias has been scaled where it is to be
        return rescale(inner(input, *args, **kwargs), change, inner.bias, behind)


def _rides_beside(site: Site) -> bool:
    """Whether scaling what a map takes or gives is the same as scaling its weight."""
    kind = maps.kind_of(site.module) if site.slot == "weight" else None
    return not (kind in (None, maps.Embedding) or site.index is not None or len(site.owners) > 1)


def _weight_slot(site: Site) -> str:
    """The slot of the weight to whose outputs a bias is added; a weight's own."""
    return site.slot.replace("bias", "weight")


@dataclass(frozen=True)
class IA3(Method):
    """y' = l ⊙ (Wx + b), or y' = W(l ⊙ x) + b. Liu et al., arXiv:2205.05638, §3.3.

    l, (o) or (i), is 1 at first. At linear maps W' is never formed. By default it takes every
    weight of a linear map but the output head's, with its bias. The paper scales keys, values and
    what enters the down map of a feed-forward network:

        [pl.IA3(targets=["k_proj", "v_proj"]), pl.IA3(targets="down_proj", feedforward=True)]

    Where nn.MultiheadAttention keeps q, k and v apart, their common bias isn't scaled.

    Args:
        feedforward: whether l scales the inputs, as in front of a feed-forward's down map.
    """

    feedforward: bool = False

    # 3e-3 for T0-3B (×6): r-three/t-few, configs/ia3.json; 5e-3 for Llama-3.2-3B (×14): peft,
    # method_comparison/MetaMathQA
    rate: ClassVar[float] = 10
    takes = "tensors of 2 or more dimensions, and the biases of linear maps"

    def default(self, site: Site) -> bool:
        return not site.head and self.accepts(site) and (site.linear or site.whole.dim() == 1)

    def accepts(self, site: Site) -> bool:
        if site.is_call:
            return False
        module, weight = site.module, _weight_slot(site)
        if site.whole.dim() == 1:
            biased = weight != site.slot and maps.is_weight(module, weight)
            return biased and not self.feedforward and getattr(module, weight, None) is not None
        # a Bilinear has two inputs
        return site.whole.dim() > 1 and not (self.feedforward and isinstance(module, nn.Bilinear))

    def build(self, site: Site) -> ScalePatch:
        # a part of a grouped convolution may cut through a group
        cut = site.index is not None and getattr(site.module, "groups", 1) > 1
        if cut or not self.accepts(site):
            raise self.refuse(site)
        return ScalePatch(site, self)

    def build_all(self, sites: Sequence[Site]) -> list[Patch]:
        patches = [self.build(site) for site in sites]
        by_dims = sorted(zip(sites, patches, strict=True), key=lambda pair: -pair[0].whole.dim())
        scales: dict[Any, nn.Parameter] = {}  # of the weights, which come before the biases
        for site, patch in by_dims:
            outputs = id(site.module), _weight_slot(site), site.index and site.index[1:]
            if site.whole.dim() > 1:
                scales[outputs] = patch.l
            else:
                patch.l = scales.get(outputs, patch.l)
        return [*patches]

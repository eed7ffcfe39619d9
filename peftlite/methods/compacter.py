"""Compacter: a bottleneck adapter whose two maps are sums of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import Patch, trainable
from peftlite.core.site import Site
from peftlite.fields import integer, positive
from peftlite.methods.bottleneck import BottleneckAdapter, BottleneckPatch, Place
from peftlite.methods.features import Features


class CompacterPatch(BottleneckPatch):
    """D and U as Σⱼ Aⱼ ⊗ uⱼᵀvⱼ: `a` (n, n, n), and `u` (n, k, o/n) and `v` (n, k, i/n) for each."""

    a: nn.Parameter
    down_u: nn.Parameter
    down_v: nn.Parameter
    down_bias: nn.Parameter
    up_u: nn.Parameter
    up_v: nn.Parameter
    up_bias: nn.Parameter

    def shape(self, r: int, site: Site) -> None:
        n, k = self.method.phm_dim, self.method.phm_rank
        self.a, self.down_u, self.down_v, self.down_bias, self.up_u, self.up_v, self.up_bias = (
            trainable(*shape, site=site, dtype=self.method.dtype)
            for shape in (
                *((n, n, n), (n, k, r // n), (n, k, self.i // n), (r,)),
                *((n, k, self.o // n), (n, k, r // n), (self.o,)),
            )
        )

    def reset(self, w: Tensor | None) -> None:
        self.a.normal_(std=0.01)
        self.down_bias.zero_()
        self.up_bias.zero_()
        for factor in (self.down_u, self.down_v, self.up_u, self.up_v):
            bound = math.sqrt(12 / sum(factor.shape[1:]))
            factor.uniform_(-bound, bound)
        if self.method.init == "zero":
            self.up_u.zero_()

    def change(self, z: Tensor) -> Tensor:
        own: Any = self._parameters
        names = "a", "down_u", "down_v", "down_bias", "up_u", "up_v", "up_bias"
        a, down_u, down_v, d, up_u, up_v, u = (own[name].to(z) for name in names)
        hidden = self.act(kronecker(z, a, down_u, down_v) + d)
        return kronecker(hidden, a, up_u, up_v) + u


def kronecker(x: Tensor, a: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(Σⱼ Aⱼ ⊗ uⱼᵀvⱼ)·x, with x as a matrix X of n rows: Σⱼ Aⱼ·(X·vⱼᵀ)·uⱼ, two thin products."""
    n, k, _ = u.shape
    narrow = F.linear(x.unflatten(-1, (n, -1)), v.flatten(0, 1)).unflatten(-1, (n, k))
    mixed = torch.einsum("jpq,...qjk->...pjk", a, narrow)
    return (mixed.flatten(-2) @ u.flatten(0, 1)).flatten(-2)


@dataclass(frozen=True)
class Compacter(BottleneckAdapter):
    """y + s·up(f(down(y))) with maps Σⱼ Aⱼ ⊗ (uⱼᵀvⱼ), the n matrices Aⱼ (n, n) shared by all sites.

    Karimi Mahabadi et al., arXiv:2106.04647, §3; it begins where `BottleneckAdapter` does, at the
    output y of sublayers found by name. The maps are never formed, and the files hold `a` once.
    The paper trains the norms too: add `NormTuning`.

    Args:
        preset: "compacter": after attention and feed-forward; "compacter++": after feed-forward.
        reduction_factor: of the width o; the bottleneck r is ⌊o / reduction_factor⌋, rounded up to
            a multiple of n.
        bottleneck_size: r, in place of a reduction, rounded up likewise.
        activation: f, "relu", "gelu", "silu" or "tanh". Default: gelu.
        scale: s. Default: 1.
        init: "zero": `up_u` is zero, so that nothing changes at first; "glorot": the paper's, all
            of u and v uniform in ±√(12/(k + their length)). The Aⱼ are normal with σ = 0.01.
        width: o, where it can't be told from a module's layers.
        phm_dim: n; it has to divide the width.
        phm_rank: k, the rows of uⱼ and vⱼ; the paper's 1.
    """

    preset: str = "compacter"
    reduction_factor: float = positive(32.0)
    phm_dim: int = integer(4)
    phm_rank: int = integer(1)

    # 3e-3 for T5-base (×3): rabeehk/compacter, seq2seq/configs/compacter.json
    rate: ClassVar[float] = 3
    takes = "calls that are made and give features, a multiple of phm_dim of them"
    patch: ClassVar[type[CompacterPatch]] = CompacterPatch
    inits: ClassVar[tuple[str, ...]] = ("zero", "glorot")
    places: ClassVar[Mapping[str, Place]] = {
        "compacter": Place("attention ffn ffn-last dense", "gelu", 1.0),
        "compacter++": Place("ffn ffn-last dense", "gelu", 1.0),
    }

    def size(self, o: int) -> int:
        return -(-super().size(o) // self.phm_dim) * self.phm_dim

    def suits(self, wide: Features) -> bool:
        return wide.o % self.phm_dim == 0

    def build_all(self, sites: Sequence[Site]) -> list[Patch]:
        patches: list[Any] = [self.build(site) for site in sites]
        for patch in patches:
            patch.a = patches[0].a
        return patches

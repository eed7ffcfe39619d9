"""VeRA: W' = W + Λ_b B Λ_d A, two vectors a site that scale random matrices shared by all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.core.patch import Patch, WeightMethod, trainable
from peftlite.core.site import Site
from peftlite.fields import integer, number
from peftlite.methods.low_rank import LowRankPatch


class Projection(nn.Module):
    """A (r, i) and B (o, r), for the largest i and o of all sites.

    They are what the seed gives, so no part of a file: they are moved, but never cast.
    """

    seed: int
    dtype: torch.dtype

    a: Tensor
    b: Tensor

    def __init__(self, method: VeRA, i: int, o: int, device: torch.device):
        super().__init__()
        self.seed, self.dtype = method.seed, method.dtype or torch.float32
        self.shapes: tuple[tuple[int, int], tuple[int, int]] = ((method.rank, i), (o, method.rank))
        self._place(device)

    def _place(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for name, shape in zip("ab", self.shapes, strict=True):
            matrix = torch.empty(shape, device="meta" if device.type == "meta" else "cpu")
            if not matrix.is_meta:
                nn.init.kaiming_uniform_(matrix, generator=generator)
            self.register_buffer(name, matrix.to(device, self.dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projection:
        device = fn(self.a[:0]).device  # every patch that shares them comes by
        if device != self.a.device:
            self._place(device)
        return self


class VeRAPatch(LowRankPatch):
    """The vectors of one site: `d` (r) scales A's rows, `b` (o) scales B's."""

    d_initial: float
    projection: Projection

    def __init__(self, site: Site, method: VeRA, projection: Projection):
        super().__init__(site)
        self.d_initial, self.projection = method.d_initial, projection
        self.d: nn.Parameter = trainable(*self.stack, method.rank, site=site, dtype=method.dtype)
        self.b: nn.Parameter = trainable(*self.stack, self.o, site=site, dtype=method.dtype)

    def reset(self, w: Tensor | None) -> None:
        self.d.fill_(self.d_initial)
        self.b.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        shared = self.projection
        return self.d[..., None] * shared.a[:, : self.i], self.b[..., None] * shared.b[: self.o]


@dataclass(frozen=True)
class VeRA(WeightMethod):
    """W' = W + Λ_b B Λ_d A, with diagonal Λ_b, Λ_d. Kopiczko et al., arXiv:2310.11454, §3.

    A (r, i) and B (o, r) are random, frozen and shared by all sites; only the vectors b (o) and
    d (r) of each site are learned and saved. A weight of more than two dimensions is a stack of
    matrices, a convolution's kernel one matrix of its first dimension by the rest. By default it
    takes every weight of a linear map but the output head's.

    Args:
        rank: r, which costs one parameter a site, so that it can be large.
        d_initial: what d starts at; b starts at zero.
        seed: of A and B, which are Kaiming-uniform and as large as the largest i and o; a smaller
            site uses the first columns of A and rows of B.
    """

    rank: int = integer(256)
    d_initial: float = number(0.1, float, lambda d: 0 < abs(d) < math.inf, "finite and not 0")
    seed: int = number(0, int, lambda seed: 0 <= seed < 2**64, "in [0, 2**64)")

    # 1e-3 for Llama-3.2-3B (×3), 2e-2 for RoBERTa-base (×19): huggingface/peft,
    # method_comparison/MetaMathQA and examples/sequence_classification
    rate: ClassVar[float] = 15

    def build_all(self, sites: Sequence[Site]) -> list[Patch]:
        self.check(*sites)
        i, o = map(max, zip((0, 0), *((s.layout.i, s.layout.o) for s in sites), strict=True))
        devices = dict.fromkeys(site.device for site in sites)
        shared: dict[Any, Projection] = {on: Projection(self, i, o, on) for on in devices}
        return [VeRAPatch(site, self, shared[site.device]) for site in sites]

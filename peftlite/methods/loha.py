"""LoHa: W' = W + s·(w1a w1b) ⊙ (w2a w2b), the Hadamard product of two products of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from peftlite.core.layout import Layout
from peftlite.core.patch import Patch, trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.methods.low_rank import RankMethod


class LoHaPatch(Patch):
    """`w1a`, `w2a` (o, r) and `w1b`, `w2b` (r, i); stacks of matrices keep their stack."""

    scale: float
    layout: Layout

    def __init__(self, site: Site, method: LoHa):
        super().__init__()
        self.scale, self.layout = method.scale, site.layout
        stack, i, o = self.layout.stack, self.layout.i, self.layout.o
        self.w1a: nn.Parameter = trainable(*stack, o, method.rank, site=site, dtype=method.dtype)
        self.w1b: nn.Parameter = trainable(*stack, method.rank, i, site=site, dtype=method.dtype)
        self.w2a: nn.Parameter = trainable(*stack, o, method.rank, site=site, dtype=method.dtype)
        self.w2b: nn.Parameter = trainable(*stack, method.rank, i, site=site, dtype=method.dtype)

    def reset(self, w: Tensor | None) -> None:
        for factor in (self.w1a, self.w1b, self.w2a):
            bound = 1 / math.sqrt(factor.shape[-1])
            factor.uniform_(-bound, bound)
        self.w2b.zero_()

    def value(self, w: Tensor) -> Tensor:
        factors = self.w1a, self.w1b, self.w2a, self.w2b
        w1a, w1b, w2a, w2b = (factor.to(wide(w, factor)) for factor in factors)
        return self.layout.add(w, (w1a @ w1b) * (w2a @ w2b), self.scale)


@dataclass(frozen=True)
class LoHa(RankMethod):
    """W' = W + s·(w1a w1b) ⊙ (w2a w2b), of rank up to r². Hyeon-Woo et al., arXiv:2108.06098, §2.

    s = alpha/r; w1a and w2a are (o, r), w1b and w2b (r, i). A weight of more than two dimensions is
    a stack of matrices, each with its own factors; a convolution's kernel is one matrix of its
    first dimension by the rest (the paper's Proposition 1; its Proposition 3, a Tucker form of
    kernels, isn't here). By default it takes every weight of a linear map but the output head's.

    Args:
        rank: r, of each of the two products: twice the parameters of LoRA at the same r.
        alpha: the numerator of the scaling. Default: equal to `rank`.
    """

    # * of three small models
    rate: ClassVar[float] = 4
    patch: ClassVar[type[LoHaPatch]] = LoHaPatch

"""LoHa: W' = W + s·(w1a w1b) ⊙ (w2a w2b), the Hadamard product of two products of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peftlite.patch import Patch, WeightMethod, set_number, trainable
from peftlite.site import Site


class LoHaPatch(Patch):
    """`w1a`, `w2a` (o, r) and `w1b`, `w2b` (r, i); stacks of matrices keep their stack."""

    def __init__(self, site: Site, method: LoHa):
        super().__init__()
        stack, (rows, columns) = site.matrices
        i, o = (rows, columns) if site.transposed else (columns, rows)
        self.scale, self.transposed = method.scale, site.transposed
        self.w1a = trainable(*stack, o, method.rank, site=site, dtype=method.dtype)
        self.w1b = trainable(*stack, method.rank, i, site=site, dtype=method.dtype)
        self.w2a = trainable(*stack, o, method.rank, site=site, dtype=method.dtype)
        self.w2b = trainable(*stack, method.rank, i, site=site, dtype=method.dtype)

    def reset(self, w: Tensor | None) -> None:
        for factor in (self.w1a, self.w1b, self.w2a):
            bound = 1 / math.sqrt(factor.shape[-1])
            factor.uniform_(-bound, bound)
        self.w2b.zero_()

    def value(self, w: Tensor) -> Tensor:
        # in fp32 at least, so that W' is rounded once
        wide = torch.promote_types(torch.promote_types(w.dtype, self.w1a.dtype), torch.float32)
        w1 = self.w1a.to(wide) @ self.w1b.to(wide)
        change = w1 * (self.w2a.to(wide) @ self.w2b.to(wide))
        change = change.mT if self.transposed else change
        return torch.add(w, change.reshape(w.shape), alpha=self.scale).to(w.dtype)


@dataclass(frozen=True)
class LoHa(WeightMethod):
    """W' = W + s·(w1a w1b) ⊙ (w2a w2b), of rank up to r². Hyeon-Woo et al., arXiv:2108.06098, §2.

    s = alpha/r. A weight of more than two dimensions is a stack of matrices, each with its own
    factors; a convolution's kernel is one matrix of its first dimension by the rest (the paper's
    Proposition 1; its Proposition 3, a Tucker form of kernels, isn't here). By default it takes
    every weight of a linear map but the output head's.

    Args:
        rank: r, of each of the two products: twice the parameters of LoRA at the same r.
        alpha: the numerator of the scaling. Default: equal to `rank`.
    """

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        set_number(self, "rank", int, lambda rank: rank >= 1, "a whole number from 1 up")
        if self.alpha is not None:
            set_number(self, "alpha", float, lambda a: 0 < a < math.inf, "finite and above 0")

    @property
    def scale(self) -> float:
        """s, the factor of the change."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def build(self, site: Site) -> LoHaPatch:
        if not self.accepts(site):
            raise self.refuse(site)
        return LoHaPatch(site, self)

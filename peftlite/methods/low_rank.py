"""LowRankPatch: W' = W + s·BA, read or ridden beside, however a method makes its A and B.

RankMethod: the two hyperparameters, r and the numerator of s, that methods have from LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from peftlite.core.layout import Layout
from peftlite.core.maps import Linear, Map
from peftlite.core.patch import Patch, WeightMethod
from peftlite.core.site import Site
from peftlite.core.tensors import wide, widen
from peftlite.fields import integer, positive
from peftlite.kernels.grouped import grouped_linear


def dropped(a: Tensor, p: float) -> Tensor:
    """A (*stack, r, i) without some columns: inputs that are dropped, the same for every row."""
    return a * F.dropout(torch.ones_like(a[..., :1, :]), p)


class LowRankPatch(Patch):
    """W' = W + s·BA, with A (*stack, r, i) and B (*stack, o, r), for a `stack` of matrices.

    A method says what the factors are, and may set s and the probability of dropping an input of A.
    """

    stack: tuple[int, ...]
    i: int
    o: int

    scale: float = 1.0
    dropout: float = 0.0
    group: tuple[LowRankPatch, ...] = ()
    """The patches whose maps may be called with the same input as this one's: see `pl.fuse`."""

    def __init__(self, site: Site):
        super().__init__()
        self.layout: Layout = site.layout
        self.stack, self.i, self.o = self.layout.stack, self.layout.i, self.layout.o

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (*stack, r, i) and B (*stack, o, r), in one dtype of their own."""
        raise NotImplementedError

    def value(self, w: Tensor) -> Tensor:
        a, b = self._read()
        a, b = a.to(wide(w, a)), b.to(wide(w, a))
        return torch.add(w, self.layout.product(a, b), alpha=self.scale).to(w.dtype)

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        if self.layout.joined or type(self).value is not LowRankPatch.value:
            return None
        return *self.layout.factors(*self._read()), self.scale

    def _read(self) -> tuple[Tensor, Tensor]:
        """The factors of a weight that is read: what is dropped is so for all of its inputs."""
        a, b = self.factors()
        return (dropped(a, self.dropout) if self.training and self.dropout else a), b

    def call(self, inner: Map, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The map's output (b, …, o), plus s·BA of its input (b, …, i)."""
        a, b = self.factors()
        # `layout.factors`, in line: here a call costs 3 % of a small map's
        left, right = (a.mT, b.mT) if self.layout.transposed else (b, a)
        if self.index is not None:
            left, right = widen(left, right, self.index, inner.weight.shape)
        dropout = self.dropout if self.training else 0.0
        if self.group and not is_compiling() and type(inner) is Linear:
            w, bias = inner.weight, inner.bias
            return grouped_linear(self._alike, input, w, bias, a, b, self.scale, dropout)
        return inner.add_low_rank(left, right, self.scale, dropout, input, *args, **kwargs)

    def _alike(self) -> list[Tensor]:
        """The A of every patch in the group that would do with its input as this one does."""
        own = self.scale, self.dropout, self.training
        return [p.factors()[0] for p in self.group if (p.scale, p.dropout, p.training) == own]


@dataclass(frozen=True)
class RankMethod(WeightMethod, abstract=True):
    """A method of matrices with a rank r and a change that is scaled by s = alpha/r."""

    rank: int = integer(8)
    alpha: float | None = positive(None)

    @property
    def scale(self) -> float:
        """s, the factor of the change."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

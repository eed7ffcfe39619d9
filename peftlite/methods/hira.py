"""HiRA: W' = W + W ⊙ BA, a product of low rank that scales every weight by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftlite.core.layout import Layout
from peftlite.core.patch import Patch, WeightMethod, trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.fields import integer, number
from peftlite.methods.low_rank import dropped


class HiRAPatch(Patch):
    """`a` (*stack, r, i) and `b` (*stack, o, r); W is the tensor as the patches below leave it."""

    layout: Layout
    dropout: float

    later: ClassVar[frozenset[str]] = frozenset({"b"})

    def __init__(self, site: Site, method: HiRA):
        super().__init__()
        self.layout, self.dropout = site.layout, method.dropout
        layout, r = self.layout, method.rank
        self.a: nn.Parameter = trainable(*layout.stack, r, layout.i, site=site, dtype=method.dtype)
        self.b: nn.Parameter = trainable(*layout.stack, layout.o, r, site=site, dtype=method.dtype)

    def reset(self, w: Tensor | None) -> None:
        # an embedding's rows are looked up, not multiplied: there the other factor starts at zero
        if self.layout.embeds:
            self.a.zero_()
            self.b.normal_()
            return
        self.b.zero_()
        for matrix in self.a.flatten(0, -3) if self.a.dim() > 2 else [self.a]:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def value(self, w: Tensor) -> Tensor:
        a, b = self.a.to(wide(w, self.a)), self.b.to(wide(w, self.b))
        if self.training and self.dropout:
            a = dropped(a, self.dropout)
        return torch.addcmul(w.to(a.dtype), w.to(a.dtype), self.layout.product(a, b)).to(w.dtype)


@dataclass(frozen=True)
class HiRA(WeightMethod):
    """W' = W + W ⊙ BA, with A (r, i) and B (o, r).

    Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language
    Models", ICLR 2025, §3.2. BA says by what share of itself each weight changes, so the change is
    of any rank up to W's, where LoRA's is of rank r. There is no α. W' is formed at each call. A
    weight of more than two dimensions is a stack of matrices, each with its own factors; a
    convolution's kernel is one matrix of its first dimension by the rest. By default it takes every
    weight of a linear map but the output head's.

    Args:
        rank: r.
        dropout: probability of dropping an input feature of A, in training; the rows of a batch
            share what is dropped.
    """

    rank: int = integer(32)
    dropout: float = number(0.0, float, lambda p: 0 <= p < 1, "in [0, 1)")

    # 4.5e-3 for Llama-3.2-3B (×13): peft, method_comparison/MetaMathQA
    rate: ClassVar[float] = 12
    patch: ClassVar[type[HiRAPatch]] = HiRAPatch

"""DoRA: W' = m ⊙ (W + s·BA) / ‖W + s·BA‖, a trainable size beside LoRA's change of direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.maps import Embedding, Map, unwrap
from peftlite.core.patch import apply, trainable
from peftlite.core.site import Site
from peftlite.core.tensors import narrow, overlap, wide
from peftlite.kernels.dora import row_norms_squared
from peftlite.kernels.rescale import rescale
from peftlite.methods.lora import LoRA, LoRAPatch


class DoRAPatch(LoRAPatch):
    """W' = m ⊙ V/‖V‖ with V = W + s·BA; `m` holds a size for every output, `a` and `b` are LoRA's.

    An output is a row of W, a column where W is transposed, and a channel of a convolution. ‖V‖ is
    always found by its factors, so that the forms agree and m/‖V‖ is exactly 1 in a fresh patch.
    """

    def __init__(self, site: Site, method: DoRA):
        super().__init__(site, method)
        self.m: nn.Parameter = trainable(*self.layout.vector(), site=site, dtype=method.dtype)
        if site.cuts_inputs:
            self.has_call = False  # what some of the inputs add to an output is not seen apart

    @torch.no_grad()
    def start(self, w: Tensor | None, a: Tensor, b: Tensor) -> None:
        super().start(w, a, b)
        self.m.copy_(self._norm(w))

    @torch.no_grad()
    def _norm(self, w: Tensor) -> Tensor:
        """‖W + s·BA‖ of every output, by its factors."""
        (a, b), layout = self.factors(), self.layout
        w = layout.matrices(w)
        if not layout.transposed:
            return row_norms_squared(w, a, b, self.scale).sqrt()
        # each group of a transposed convolution has its own inputs, and taps share their output
        if layout.groups > 1:
            a, w = (z.unflatten(-1, (layout.groups, -1)).movedim(-2, 0) for z in (a, w))
        squares = row_norms_squared(w, a, b, self.scale)
        if layout.taps > 1:
            squares = squares.unflatten(-1, (-1, layout.taps)).sum(-1)
        return squares.sqrt().reshape(self.m.shape)

    def ratio(self, w: Tensor) -> Tensor:
        """m / ‖V‖ (*stack, o), ‖V‖ rounded as m is. An output whose weights are 0 keeps them."""
        norm = self._norm(w)
        m, norm = self.m.to(norm.dtype), norm.to(self.m.dtype).to(norm.dtype)
        nothing = norm == 0
        return (m / norm.masked_fill(nothing, 1)).masked_fill(nothing, 1)

    def value(self, w: Tensor) -> Tensor:
        v = super().value(w.to(wide(w, self.a)))
        return self.layout.scaled(v, self.ratio(w).to(v.dtype)).to(w.dtype)

    @torch.no_grad()
    def _below(self, inner: Map) -> Tensor:
        """What this patch changes of the weight, as the patches below leave it."""
        base, patches = unwrap(inner)
        w = base.weight
        if any(overlap(patch.index, self.index) for patch in patches):
            w = apply(patches, w)
        return narrow(w, self.index)

    def call(self, inner: Map, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        base, _ = unwrap(inner)
        change = self.ratio(self._below(inner)) - 1
        if self.index is not None:
            dim, start, stop = self.index
            change = F.pad(change, (start, base.weight.shape[dim] - stop))
        embeds, tied = isinstance(base, Embedding), base.transposed is not self.layout.transposed
        if tied and not embeds:  # to a map the other way round: our outputs are its inputs
            return super().call(inner, rescale(input, change), *args, **kwargs)
        y = super().call(inner, input, *args, **kwargs)
        if tied:
            scaled = torch.addcmul(y, y, change[input][..., None].to(y.dtype))
        else:
            scaled = rescale(y, change, base.bias, base.weight.dim() - 2)
        return base.spared(input, scaled) if isinstance(base, Embedding) else scaled


@dataclass(frozen=True)
class DoRA(LoRA):
    """W' = m ⊙ (W + s·BA) / ‖W + s·BA‖. Liu et al., arXiv:2402.09353, §4.1.

    m (o), the norms of W at first, has a number for every output: peft, too, reads the paper's
    "column" so. The norm takes no gradient (§4.3), and on linear maps W + s·BA is never formed for
    it. The bias is not scaled. Arguments and default targets are LoRA's.

    `dropout` is of BA alone: y = m/‖V‖ ⊙ (Wx + s·BA·drop(x)) + bias. peft drops x for W, too,
    wherever m/‖V‖ differs from 1.
    """

    patch: ClassVar[type[DoRAPatch]] = DoRAPatch

"""BOFT: W' = diag(s) W Rᵀ, with R the product of m butterfly factors of small rotations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlite.core.patch import trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.fields import integer
from peftlite.methods.oft import (
    RotationPatch,
    SidedMethod,
    block_near,
    cayley,
    skew,
    turn_blocks,
    turned,
)


class BOFTPatch(RotationPatch):
    """`q` (*stack, m, blocks, k(k−1)/2) holds the Q of every block; `s` (*stack, n) the scales."""

    def __init__(self, site: Site, method: BOFT, block: int):
        super().__init__(site, method.outputs)
        self.has_call = False  # it would have to tell the bias, which isn't scaled, from what is
        self.block = block
        n = turned(self.layout, outputs=True)
        shape = (*self.stack, method.m, self.size // block, block * (block - 1) // 2)
        self.q: nn.Parameter = trainable(*shape, site=site, dtype=method.dtype)
        self.s: nn.Parameter = trainable(*self.stack, n, site=site, dtype=method.dtype)

    def reset(self, w: Tensor | None) -> None:
        self.q.zero_()
        self.s.fill_(1.0)

    def turn(self, x: Tensor, transposed: bool = False) -> Tensor:
        """W' − W for the rows of W; with no `call`, nothing asks for the transposed."""
        q = skew(self.q.to(wide(self.q)), self.block)
        factors = cayley(q).to(x.dtype).mT.unbind(-4)
        change = torch.zeros_like(x)
        for i, factor in enumerate(factors):
            near = self._swap(x + change, 2, 2**i)  # the half-blocks that factor i joins
            change = change + self._swap(turn_blocks(near, factor), 2**i, 2)
        s = self.s[..., None, :] if self.outputs else self.s[..., None]
        return s * change + (s - 1) * x

    def _swap(self, x: Tensor, p: int, q: int) -> Tensor:
        """Puts every p × q half-blocks in the order of q × p."""
        if 1 in (p, q):
            return x
        return x.unflatten(-1, (-1, p, q, self.block // 2)).transpose(-3, -2).flatten(-4)


@dataclass(frozen=True)
class BOFT(SidedMethod):
    """W' = diag(s) W Rᵀ, R = B_m … B₁; B_i turns pairs of half-blocks that are 2ⁱ⁻¹ apart.

    Liu et al., arXiv:2311.06243, §4. Each B is one of OFT's rotations in blocks, with the inputs
    permuted between them as in a fast Fourier transform, so that R (i, i) is dense after enough of
    them; s (o), one scale per neuron, is 1 at first. Any m works here on any device; peft's falls
    to m = 1 where its CUDA extension doesn't build. By default it takes every weight of a linear
    map but the output head's; further dimensions are a stack of matrices, each with its own R, s.

    Args:
        block_size: b, the size of the blocks; where it doesn't fit the inputs, the nearest that
            does: an even size from 2 up for m > 1, whose product with 2^(m−1) divides them.
        m: the number of butterfly factors. The inputs must be a multiple of 2ᵐ for m > 1.
        outputs: W' = diag(s) R W instead, R (o, o): neurons are mixed, as by LyCORIS's.
    """

    block_size: int = integer(4, least=2)
    m: int = integer(2)

    takes = "tensors of 2 or more dimensions, their inputs a multiple of 2ᵐ (for m = 1: 2 or more)"

    def build(self, site: Site) -> BOFTPatch:
        self.check(site)
        rest, left_over = divmod(self.size(site), 2 ** (self.m - 1))
        block = block_near(rest, self.block_size, step=1 if self.m == 1 else 2)
        if left_over or block is None:
            raise self.refuse(site)
        return BOFTPatch(site, self, block)

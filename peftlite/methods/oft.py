"""OFT: W' = W Rᵀ, every neuron turned by one rotation in blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.core.layout import Layout
from peftlite.core.maps import Map
from peftlite.core.patch import Patch, WeightMethod, trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.fields import integer, positive


class RotationPatch(Patch):
    """W' = WP, with P orthogonal: what OFT, BOFT and HRA share; or PᵀW, of the outputs.

    A neuron is a row of W: all the weights of one output, a kernel's taps included; of an
    embedding, one vector. On linear maps the inputs are turned in its place: y = W(Px).
    """

    outputs: bool
    stack: tuple[int, ...]
    size: int

    def __init__(self, site: Site, outputs: bool = False):
        super().__init__()
        self.layout: Layout = site.layout
        self.outputs = outputs
        self.stack, self.size = self.layout.stack, turned(self.layout, outputs)
        if outputs or not site.rides:
            self.has_call = False  # a kernel's inputs overlap; a part's are other parts' as well

    def turn(self, x: Tensor, transposed: bool = False) -> Tensor:
        """x P − x, or x Pᵀ − x, for rows x (*stack, n, d): exactly zero as long as P = I."""
        raise NotImplementedError

    def value(self, w: Tensor) -> Tensor:
        rows = self.layout.neurons(w.to(wide(w)))
        change = self.turn(rows.mT).mT if self.outputs else self.turn(rows)
        return (w + self.layout.from_neurons(change)).to(w.dtype)

    def call(self, inner: Map, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.size)
        return inner(input + self.turn(rows, transposed=True).reshape(input.shape))


class RotationMethod(WeightMethod, abstract=True):
    """A method that turns neurons of two weights or more: a single one can't turn."""

    takes = "tensors of 2 or more dimensions that have 2 or more inputs"

    def default(self, site: Site) -> bool:
        return super().default(site) and self.accepts(site)

    def accepts(self, site: Site) -> bool:
        return super().accepts(site) and self.size(site) >= 2

    def size(self, site: Site) -> int:
        """How many numbers are turned."""
        return site.layout.neuron


@dataclass(frozen=True, kw_only=True)
class SidedMethod(RotationMethod, abstract=True):
    """A method that turns the inputs of a weight, or its outputs."""

    outputs: bool = False

    added: ClassVar[Mapping[str, Any]] = {"outputs": False}

    def size(self, site: Site) -> int:
        return turned(site.layout, self.outputs)


def turned(layout: Layout, outputs: bool) -> int:
    """How many numbers of a matrix are turned: a neuron's, or one of every neuron."""
    n = math.prod(layout.shape[len(layout.stack) :])
    return n // layout.neuron if outputs else layout.neuron


def skew(q: Tensor, k: int) -> Tensor:
    """Q = U − Uᵀ, with the entries of q (..., k(k−1)/2) in U above the diagonal, row by row."""
    row, column = torch.triu_indices(k, k, 1, device=q.device)
    upper = q.new_zeros(*q.shape[:-1], k, k)
    upper[..., row, column] = q
    return upper - upper.mT


def cayley(q: Tensor) -> Tensor:
    """R − I = −2Q (I+Q)⁻¹ for R = (I−Q)(I+Q)⁻¹, Q (…, k, k): no small rotation is rounded."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # I+Q is never singular: without the check there's no wait for the device
    return torch.linalg.solve_ex(identity + q, -2 * q)[0]


def cayley_neumann(q: Tensor, terms: int) -> Tensor:
    """R − I (…, k, k) for R ≈ (I−Q)(I − Q + … ± Qᵏ), which is I − 2Q + 2Q² … ∓ Qᵏ⁺¹."""
    power, total = -q, -2 * q
    for _ in range(terms - 1):
        power = -power @ q
        total = total + 2 * power
    return total - power @ q


def turn_blocks(x: Tensor, change: Tensor) -> Tensor:
    """x·change for rows x (*stack, n, d) and block-diagonal change (*stack, d/k, k, k)."""
    blocks = x.unflatten(-1, change.shape[-3:-1]).transpose(-2, -3)  # (*stack, d/k, n, k)
    return (blocks @ change).transpose(-2, -3).flatten(-2)


@functools.cache
def block_near(size: int, wanted: int, step: int = 1) -> int | None:
    """The block size nearest to `wanted`, the smaller of two, that divides `size`.

    None if there is none; `step` 2 asks for an even one. A block of one would turn nothing.
    """
    fits = [k for k in range(2, size + 1) if size % k == 0 and k % step == 0]
    return min(fits, key=lambda k: (abs(k - wanted), k), default=None)


class OFTPatch(RotationPatch):
    """P = Rᵀ; `q` (*stack, blocks, k(k−1)/2) holds each block's Q above its diagonal."""

    terms: int | None
    eps: float | None

    def __init__(self, site: Site, method: OFT):
        super().__init__(site, method.outputs)
        self.terms, self.eps = method.neumann_terms, method.eps
        self.block: int = block_near(self.size, method.block_size) or self.size
        shape = (*self.stack, self.size // self.block, self.block * (self.block - 1) // 2)
        self.q: nn.Parameter = trainable(*shape, site=site, dtype=method.dtype)

    def reset(self, w: Tensor | None) -> None:
        self.q.zero_()

    def turn(self, x: Tensor, transposed: bool = False) -> Tensor:
        q = skew(self.q.to(wide(self.q)), self.block)
        if self.eps is not None:
            limit = self.eps / math.sqrt(q.shape[-3])
            q = q * (limit / torch.linalg.matrix_norm(q, keepdim=True).clamp_min(limit))
        change = cayley(q) if self.terms is None else cayley_neumann(q, self.terms)
        change = change.to(x.dtype)
        return turn_blocks(x, change if transposed else change.mT)


@dataclass(frozen=True)
class OFT(SidedMethod):
    """W' = W Rᵀ, R = diag(R₁, R₂, …), Rⱼ = (I−Qⱼ)(I+Qⱼ)⁻¹ with Qⱼᵀ = −Qⱼ, zero at first.

    Qiu et al., arXiv:2306.07280, §3; on linear maps the inputs are turned, y = W(Rᵀx): Qiu et al.,
    arXiv:2506.19847. R (i, i) is a rotation, of k inputs at a time, so the angles between neurons
    stay. By default it takes every weight of a linear map but the output head's; further dimensions
    are a stack of matrices, each with its own R.

    Args:
        block_size: k, the size of the blocks; where it doesn't divide the inputs, the nearest size
            from 2 up that does.
        neumann_terms: k, to approximate (I+Q)⁻¹ by I − Q + … ± Qᵏ, good for small Q; exact if None.
            peft's default approximates (I−Q)⁻¹, and so turns the other way than its exact map.
        eps: ε of COFT: keeps the Frobenius norm of all Q together within it, and of each block
            within its even share.
        outputs: W' = R W instead, R (o, o): neurons are mixed, as by LyCORIS's Diag-OFT.
    """

    block_size: int = integer(32, least=2)
    neumann_terms: int | None = integer(None)
    eps: float | None = positive(None)

    # 6e-5 for Stable Diffusion, 0.6 of LoRA's there: Zeju1997/oft, oft-db/train_dreambooth_*.sh
    rate: ClassVar[float] = 0.5
    patch: ClassVar[type[OFTPatch]] = OFTPatch

"""HRA: W' = W H₁ … H_r, a chain of r Householder reflections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.linalg import vecdot, vector_norm

from peftlite.core.patch import trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.fields import number
from peftlite.methods.oft import RotationMethod, RotationPatch


class HRAPatch(RotationPatch):
    """P = H₁ … H_r = I + AB; `u` (*stack, r, d) holds the vectors, two and two a pair."""

    def __init__(self, site: Site, method: HRA):
        super().__init__(site)
        self.method = method
        self.u: nn.Parameter = trainable(
            *self.stack, method.rank, self.size, site=site, dtype=method.dtype
        )

    def reset(self, w: Tensor | None) -> None:
        first, second = self.u.unflatten(-2, (-1, 2)).unbind(-2)
        bound = math.sqrt(2 / self.u.shape[-2])  # the paper's: kaiming of a (d, r/2)
        second.copy_(first.uniform_(-bound, bound))

    def regularizer(self) -> Tensor | None:
        """λ·Σ‖UᵀU − I‖² of the unit vectors, which keeps the reflections apart."""
        if not self.method.orth_reg_weight:
            return None
        unit = self.u / vector_norm(self.u, dim=-1, keepdim=True)
        gram = unit @ unit.mT
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return self.method.orth_reg_weight * (gram - identity).square().sum()

    def turn(self, x: Tensor, transposed: bool = False) -> Tensor:
        a, b = self._factors()
        a, b = a.to(x.dtype), b.to(x.dtype)
        return x @ b.mT @ a.mT if transposed else x @ a @ b

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A (*stack, d, r) and B (*stack, r, d), with B exactly zero where pairs are equal."""
        u = self.u.to(wide(self.u))
        a, b = _pairs(*u.unflatten(-2, (-1, 2)).unbind(-2))
        *firsts, left = a.unbind(-3)
        *seconds, right = b.unbind(-3)
        for left_k, right_k in zip(reversed(firsts), reversed(seconds), strict=True):
            # (I + AₖBₖ)(I + AB) = I + [Aₖ A] [Bₖ + BₖAB; B]
            right = torch.cat([right_k + right_k @ left @ right, right], -2)
            left = torch.cat([left_k, left], -1)
        return left, right


def _pairs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """H_u H_v = I + AB for vectors (*, d), with A (*, d, 2) and B (*, 2, d).

    For unit vectors and δ = v − u it is I + 2u(δ + 2(u·δ)v)ᵀ − 2δvᵀ: nothing is left of it at
    v = u, and a small δ isn't lost beside a 1.
    """
    u_norm, v_norm = (vector_norm(x, dim=-1, keepdim=True) for x in (u, v))
    step, both = v - u, u + v
    u = u / u_norm
    # |v| − |u|, zero where they are equal whatever order a norm is summed in
    longer = vecdot(step, both)[..., None] / (u_norm + v_norm)
    delta = (step - longer * u) / v_norm
    v = u + delta
    c = vecdot(u, delta)[..., None]
    return torch.stack([u, delta], -1), torch.stack([2 * delta + 4 * c * v, -2 * v], -2)


@dataclass(frozen=True)
class HRA(RotationMethod):
    """W' = W H₁ … H_r with H = I − 2uuᵀ/|u|². Yuan et al., arXiv:2405.17484, §3.1.

    The chain begins as pairs of equal reflections, which undo one another. It is I + AB with
    A (i, r) and B (r, i), so a linear map turns its inputs as cheaply as LoRA: y = W(x + A(Bx)).
    `delta.regularizer()` is the paper's term of the loss, λΣ‖UᵀU − I‖² with U (i, r) of unit
    vectors. By default it takes every weight of a linear map but the output head's; further
    dimensions are a stack of matrices, each with its own reflections.

    Args:
        rank: r, the number of reflections, even.
        orth_reg_weight: λ; 0 leaves the term out, as peft does.
    """

    rank: int = number(8, int, lambda r: r >= 2 and r % 2 == 0, "an even number from 2 up")
    orth_reg_weight: float = number(0.0, float, lambda w: 0 <= w < math.inf, "finite, from 0 up")

    added: ClassVar[Mapping[str, Any]] = {"orth_reg_weight": 0.0}

    # 8e-4 to 3e-3 for DeBERTaV3-base (×1 to 3): DaShenZi721/HRA, nlu/experiments/glue
    rate: ClassVar[float] = 2
    patch: ClassVar[type[HRAPatch]] = HRAPatch

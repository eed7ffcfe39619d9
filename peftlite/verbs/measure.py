"""Measure: how large the change is that a delta makes of each weight, and how alike deltas are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftlite.core.delta import Delta
from peftlite.errors import PeftliteError
from peftlite.table import listed
from peftlite.verbs.draft import Factors
from peftlite.verbs.parts import Part, parts_of


@dataclass(frozen=True)
class Size:
    """How large a change of a tensor is.

    Attributes:
        norm: ‖ΔW‖, of Frobenius.
        rank: the effective rank of ΔW, of a stack of matrices the mean; None for a vector.
    """

    norm: float
    rank: float | None


@torch.no_grad()
def sizes(delta: Delta) -> dict[str, Size]:
    """The size of each change that a delta makes, by address."""
    with _parts([delta]) as parts:
        return {part.site.address: _size(part, _spectrum(_change(part, delta))) for part in parts}


def _size(part: Part, s: Tensor) -> Size:
    """That of a change with singular values s (*stack, r)."""
    rank = float(effective_rank(s).mean()) if len(part.site.shape) > 1 else None
    return Size(float(s.norm()), rank)


def effective_rank(s: Tensor) -> Tensor:
    """exp(−Σ pₖ ln pₖ) with pₖ = sₖ / Σ s, of singular values s (*stack, r); 0 where all are 0.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    total = s.sum(-1, keepdim=True)
    entropy = torch.special.entr(s / total.where(total > 0, 1)).sum(-1)
    return entropy.exp() * (total[..., 0] > 0)


@torch.no_grad()
def cosines(deltas: Sequence[Delta]) -> Tensor:
    """cos(ΔWᵢ, ΔWⱼ) over all weights together, (n, n); NaN for a delta that changes nothing."""
    inner = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    with _parts(deltas) as parts:
        for part in parts:
            changes = {d: _change(part, d) for d in part.patches}
            for i, one in enumerate(deltas):
                for j, other in enumerate(deltas[: i + 1]):
                    if one in changes and other in changes:
                        inner[i, j] += float(_inner(changes[one], changes[other]))
    inner = inner.tril() + inner.tril(-1).T
    norms = inner.diagonal().sqrt()
    return inner / norms / norms[:, None]


@contextmanager
def _parts(deltas: Sequence[Delta]) -> Iterator[list[Part]]:
    """What deltas of one model change, while no verb of another thread does anything to it."""
    homes = {id(delta.home): delta.home for delta in deltas}
    if len(homes) > 1 or None in homes.values():
        names = listed(repr(delta.name) for delta in deltas)
        raise PeftliteError(
            f"{names} must be attached to one model, and that be there: pl.load the files into it"
        )
    [registry] = homes.values()
    with deltas[0].turn():
        yield parts_of(registry, deltas)


def _change(part: Part, delta: Delta) -> Tensor | Factors:
    """ΔW of one delta in fp64, by its factors if it has them: then ΔW itself is never formed."""
    own = replace(part, patches={delta: part.patches[delta]})
    factors = own.factors({delta: 1.0})
    return _matrices(part, own.change(delta)) if factors is None else factors


def _matrices(part: Part, change: Tensor) -> Tensor:
    """The matrices (*stack, o, i) of a change; a vector's is a row."""
    return change[None] if change.dim() < 2 else part.site.layout.matrices(change)


def _spectrum(change: Tensor | Factors) -> Tensor:
    """The singular values (*stack, r) of a change."""
    if isinstance(change, Tensor):
        return torch.linalg.svdvals(change)
    # of BA = (Q R)(Q' R')ᵀ those of RR'ᵀ, which is (r, r)
    a, b = (torch.linalg.qr(factor, mode="r").R for factor in (change[0].mT, change[1]))
    return torch.linalg.svdvals(b @ a.mT)


def _inner(x: Tensor | Factors, y: Tensor | Factors) -> Tensor:
    """⟨X, Y⟩, the sum of the products of their entries."""
    if isinstance(x, Tensor):
        if isinstance(y, Tensor):
            return (x * y).sum()
        x, y = y, x
    a, b = x
    if isinstance(y, Tensor):
        return (y @ a.mT * b).sum()
    return (b.mT @ y[1] * (a @ y[0].mT)).sum()

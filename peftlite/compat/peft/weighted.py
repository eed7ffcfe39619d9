"""Weighted: one LoRA of several, as PEFT combines them: factor by factor, or by their products.

    "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune": A = Σ ±√|wₖsₖ| Aₖ and
    B = Σ √|wₖsₖ| Bₖ, which is no sum of the changes: products of different adapters come in
    "cat": the factors side by side, exactly Σ wₖΔWₖ
    "svd" and those that end so: the first singular directions of what is made of the ΔWₖ

`pl.combine` combines changes alone, of any methods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.assign import Placed
from peftlite.core.attach import check
from peftlite.core.delta import Delta
from peftlite.core.turns import turn
from peftlite.errors import PeftliteError
from peftlite.methods.lora import LoRAPatch
from peftlite.verbs.draft import Draft, Factors, truncated

FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
KINDS = (*FACTORS, "cat", "svd", *(f"{name}_svd" for name in FACTORS[1:]))
Terms = Sequence[tuple[Delta, float]]


@torch.no_grad()
def weighted(
    model: nn.Module,
    terms: Terms,
    name: str,
    how: str,
    rank: int | None,
    density: float | None,
    sign: str,
) -> int:
    """Attaches one delta of several with weights, frozen; gives its rank. Raises PeftliteError."""
    if how not in KINDS:
        raise PeftliteError(f"combination_type is one of {', '.join(KINDS)}: not {how!r}")
    if density is None and how not in ("linear", "cat", "svd"):
        raise PeftliteError(f"combination_type={how!r} takes density=, the share that is kept")
    with turn(model):
        check(model, name)
        draft, ranks = Draft(name), [1]
        for address in dict.fromkeys(a for delta, _ in terms for a in delta.placed):
            own = [(d.placed[address], w) for d, w in terms if address in d.placed]
            factors = _combined(own, how, rank, _Mix(how.removesuffix("_svd"), density, sign))
            ranks.append(factors[0].shape[-2])
            draft.put_product(own[0][0].site, factors)
        draft.attach(model)
    return max(ranks)


def _combined(
    own: Sequence[tuple[Placed, float]], how: str, rank: int | None, mix: _Mix
) -> Factors:
    """The factors A (r, i) and B (o, r) at one site."""
    patches: list[Any] = [item.patch for item, _ in own]
    for item, _ in own:
        if type(item.patch) is not LoRAPatch:
            kind = type(item.method).__name__
            raise PeftliteError(
                f"add_weighted_adapter is of LoRA alone, and {item.site.address} has {kind}: "
                "pl.combine takes any"
            )
    pairs = [patch.factors() for patch in patches]
    scales = [w * patch.scale for patch, (_, w) in zip(patches, own, strict=True)]
    if how == "cat":
        a = torch.cat([x * s for (x, _), s in zip(pairs, scales, strict=True)], -2)
        return a, torch.cat([y for _, y in pairs], -1)
    if how in FACTORS:
        if len({a.shape for a, _ in pairs}) > 1:
            raise PeftliteError(
                f"combination_type={how!r} takes adapters of one rank: 'cat' and 'svd' take any"
            )
        roots = [math.sqrt(abs(s)) for s in scales]
        signed = [math.copysign(root, s) for root, s in zip(roots, scales, strict=True)]
        return mix([a for a, _ in pairs], signed), mix([b for _, b in pairs], roots)
    site, most = own[0][0].site, max(a.shape[-2] for a, _ in pairs)
    changes = [site.layout.product(*patch.factors()) * patch.scale for patch in patches]
    return truncated(site, mix(changes, [w for _, w in own]), rank or most, None)[0]


class _Mix:
    """One tensor of several with weights, in one of peft's ways."""

    def __init__(self, how: str, density: float | None, sign: str):
        self.how, self.density, self.sign = how, density, sign

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        x = torch.stack([self._pruned(t) for t in tensors])
        w = torch.tensor(weights).to(x).reshape(-1, *[1] * (x.dim() - 1))
        if not self.how.endswith("ties"):
            return (w * x).sum(0)
        # each entry keeps those that have the sign of most
        votes = (x.sign() if self.sign == "frequency" else x).sum(0)
        agrees = x.sign() == torch.where(votes >= 0, 1, -1)
        return (w * x * agrees).sum(0) / agrees.sum(0).clamp_min(1)

    def _pruned(self, x: Tensor) -> Tensor:
        """A tensor without the entries that are dropped, by size or, for DARE, by chance."""
        if self.density is None or self.density >= 1 or self.how in ("linear", "svd"):
            return x
        if self.how.startswith("dare"):
            return x * torch.bernoulli(torch.full_like(x, self.density)) / self.density
        flat = x.flatten()
        kept = flat.abs().topk(int(self.density * len(flat))).indices
        return torch.zeros_like(flat).index_put((kept,), flat[kept]).view_as(x)

"""Draft: a new delta made of changes of weights, each in the patch that holds it in few bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.assign import Placed
from peftlite.core.attach import commit
from peftlite.core.delta import Delta
from peftlite.core.patch import Method
from peftlite.core.site import Site
from peftlite.errors import PeftliteError
from peftlite.methods.full import FullTuning
from peftlite.methods.lora import LoRA
from peftlite.methods.sparse import SparseMask

Factors = tuple[Tensor, Tensor]  # of ΔW = BA: A (*stack, r, i) and B (*stack, o, r)

_LORA, _FULL = LoRA(), FullTuning()


class Draft:
    """The patches of a new delta, as they come."""

    def __init__(self, name: str):
        self.name = name
        self.placed: list[Placed] = []
        self.energy: dict[str, float] = {}
        self._loras: dict[tuple[int, int], LoRA] = {}
        self._sparse: list[tuple[Site, Tensor, Tensor]] = []

    def check(self, site: Site, change: Tensor | Factors) -> None:
        """Raises PeftliteError if a change is beyond what a patch at its site can hold."""
        for tensor in (change,) if isinstance(change, Tensor) else change:
            if not tensor.to(site.parameter_dtype).isfinite().all():
                raise PeftliteError(
                    f"{self.name!r} would be infinite or NaN at {site.address}; nothing was done"
                )

    def put(self, site: Site, change: Tensor | Factors) -> None:
        """Holds a change by its factors or, where they aren't known, by its entries."""
        if not isinstance(change, Tensor):
            self.put_product(site, change)
            return
        flat = change.reshape(-1)
        indices = flat.nonzero()[:, 0]
        if 2 * len(indices) < len(flat):
            self._sparse.append((site, indices, flat[indices].to(site.parameter_dtype)))
        else:
            [patch] = self.place([site], _FULL)
            patch.difference.copy_(change)

    def put_product(self, site: Site, factors: Factors, like: LoRA = _LORA) -> None:
        """Holds a product as a LoRA of its rank."""
        (a, b), key = factors, (id(like), factors[0].shape[-2])
        method = self._loras.setdefault(key, replace(like, rank=key[1]))
        [patch] = self.place([site], method)
        patch.start(site.tensor, a, b / patch.scale)

    def place(self, found: Sequence[Site], method: Method) -> list[Any]:
        """Fresh patches of a method, to be filled."""
        placed = Placed.all(found, method)
        self.placed += placed
        return [item.patch for item in placed]

    def attach(self, root: nn.Module) -> Delta:
        """Installs the new delta, frozen, as the standing choice."""
        if self._sparse:
            sites, indices, values = zip(*self._sparse, strict=True)
            entries = max(1, sum(map(len, values)))
            share = entries / sum(site.shape.numel() for site in sites)
            method = SparseMask(fraction=share, select="given")
            for patch, entries_at, kept in zip(
                self.place(sites, method), indices, values, strict=True
            ):
                patch.place(entries_at)
                patch.values.copy_(kept)
        methods = {id(item.method): item.method for item in self.placed}
        order = [*methods]  # one after another, as attach and load place them
        placed = sorted(self.placed, key=lambda item: order.index(id(item.method)))
        delta = Delta(self.name, [*methods.values()], placed).requires_grad_(False)
        delta.energy = self.energy
        return commit(root, delta)


def truncated(
    site: Site, change: Tensor | Factors, rank: int | None, energy: float | None
) -> tuple[Factors, float]:
    """A change's first singular directions, and the share of its squared singular values in them.

    They are `rank` at most, or as few as hold the share `energy`; of a stack of matrices, of all
    its squares together.
    """
    if isinstance(change, Tensor):
        u, s, v = torch.linalg.svd(site.layout.matrices(change), full_matrices=False)
    else:  # no larger than its rank is the matrix that has the spectrum of a product
        a, b = change
        (qa, ra), (qb, rb) = torch.linalg.qr(a.mT), torch.linalg.qr(b)
        u, s, v = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
        u, v = qb @ u, v @ qa.mT
    power = s.square().reshape(-1, s.shape[-1]).sum(0).cumsum(0)
    r = rank or int((power < energy * power[-1]).sum()) + 1
    r = min(r, len(power))
    root, kept = s[..., :r].sqrt(), float(power[r - 1] / power[-1]) if power[-1] else 1.0
    return (root[..., :, None] * v[..., :r, :], u[..., :r] * root[..., None, :]), kept

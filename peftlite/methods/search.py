"""Search: a sparse change whose entries training finds. Dense in training, sparse in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.core.patch import trainable
from peftlite.core.site import Site
from peftlite.fields import integer
from peftlite.methods.sparse import EntryMethod, SparsePatch, largest


class SearchPatch(SparsePatch):
    """W' = W + D, with D dense for the first `steps` steps, then zero where an entry is `pruned`.

    `values`, in the shape of W, is one parameter all along, so that its optimizer goes on: once
    entries are pruned, neither their values nor what an optimizer still does to them is read. A
    file then holds the others alone, and the patch that is loaded from it is sparse in memory, too.
    """

    steps: int

    unsaved: ClassVar[frozenset[str]] = frozenset({"pruned", "taken"})

    indices: Any  # in a patch from a file
    pruned: Any  # in one that is trained, like the next
    taken: Any

    def __init__(self, site: Site, method: SearchMethod):
        super().__init__(site, 0, method.dtype)
        self.has_call = False
        self.indices, self.steps = None, method.steps
        self.count: int = method.count(self.size)
        """Its share of the entries that are kept."""
        self.values: nn.Parameter = self.dense(site, method.dtype)
        pruned = torch.zeros((), dtype=torch.bool, device=site.device).expand(site.shape)
        self.register_buffer("pruned", pruned)
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64, device=site.device))

    @staticmethod
    def dense(site: Site, dtype: torch.dtype | None) -> nn.Parameter:
        """A parameter in the shape of W; without memory, since a file's patch won't need any."""
        return nn.Parameter(trainable(site=site, dtype=dtype).data.expand(site.shape))

    def reset(self, w: Tensor | None) -> None:
        self.values.data, self.pruned = torch.zeros_like(self.values), torch.zeros_like(self.pruned)

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        if "indices" not in shapes:  # of a search that was not over
            self.pruned = torch.zeros_like(self.pruned)
            return
        self.pruned = self.taken = None
        super().resize(shapes)

    def verify(self) -> None:
        if self.indices is not None:
            super().verify()

    def difference(self, noise: bool) -> Tensor:
        """D, no entry pruned; with `noise` as training draws it, where the method is random."""
        return self.values

    def value(self, w: Tensor) -> Tensor:
        if self.indices is not None:
            return super().value(w)
        return (w + self.difference(self.training).masked_fill(self.pruned, 0)).to(w.dtype)

    def fix(self, indices: Tensor) -> None:
        """Prunes all entries but those at `indices`."""
        self.pruned.fill_(True).view(-1)[indices] = False

    def saved(self) -> dict[str, Tensor]:
        # a patch from a file is sparse already, and one on the meta device has nothing to find
        if self.taken is None or self.taken.is_meta or int(self.taken) < self.steps:
            return super().saved()
        indices = self.pruned.reshape(-1).logical_not().nonzero()[:, 0]
        values = self.values.reshape(-1)[indices]
        return {"values": values, "indices": indices.to(self.kind)}


@dataclass(frozen=True)
class SearchMethod(EntryMethod, abstract=True):
    """A method that trains densely for a while, and then the largest changes alone."""

    steps: int = integer()

    def step(self, patches: Sequence[Any]) -> None:
        dense = [patch for patch in patches if patch.taken is not None]
        if dense and int(dense[0].taken) + 1 == self.steps:
            count = self.count(sum(patch.size for patch in dense))
            chosen = largest(lambda: (p.difference(False).abs().reshape(-1) for p in dense), count)
            for patch, indices in zip(dense, list(chosen), strict=True):
                patch.fix(indices)
        for patch in dense:
            patch.taken += 1

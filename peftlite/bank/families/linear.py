"""Linear: y = Wx + what each row's own change of W adds; and that with all of it in each slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftlite.bank.arena import Field
from peftlite.bank.families.gather import fold, per_row
from peftlite.bank.families.mixed import Contents, Mixed
from peftlite.bank.rows import Rows, Tables
from peftlite.core.host import ATTRIBUTE
from peftlite.core.layout import Layout
from peftlite.core.maps import Map
from peftlite.core.patch import Patch, apply
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.core.values import change_of
from peftlite.errors import TargetError
from peftlite.methods.full import AddPatch


def called_as_map(site: Site) -> None:
    """Raises TargetError unless the weight at a site is that of a linear map that is called."""
    module: Any = site.module
    own = "forward" in vars(module) or getattr(vars(module).get(ATTRIBUTE), "own_forward", None)
    if not site.rides or own:
        raise TargetError(
            f"{site.address} isn't the weight of a linear map that is called, so its rows can't be "
            "told apart: leave it out of the bank's methods with exclude="
        )


def difference(patches: Sequence[Patch], w: Tensor) -> Tensor:
    """W' − W, as exact as it can be, or with gradients to what the patches learn."""
    if not torch.is_grad_enabled():
        return change_of(patches, w)
    w = w.to(wide(w))
    return apply(patches, w) - w


class MixedLinear(Mixed):
    """A subclass says what to add to the outputs (`add`)."""

    i: int
    o: int

    @staticmethod
    def suits(site: Site) -> None:
        called_as_map(site)

    def __init__(self, site: Site, patch: Patch, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.layout: Layout = site.layout
        self.i, self.o = self.layout.i, self.layout.o

    def mix(
        self, rows: Rows, tables: Tables, inner: Map, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        y = inner(input, *args, **kwargs)
        return self.add(rows, tables, fold(input, rows), fold(y, rows)).view_as(y)

    def add(self, rows: Rows, tables: Tables, x: Tensor, y: Tensor) -> Tensor:
        """y (b, t, o) and what the rows' changes make of x (b, t, i); y may be written to."""
        raise NotImplementedError

    def matrices(self, d: Tensor) -> Tensor:
        """(…, o, i), for any number of tensors such as W is."""
        return d.mT if self.layout.transposed else d


class Dense(Mixed):
    """All of D = W' − W in each slot, as `d`: it costs what the weight does.

    For a head that is trained in full, LoHa, LoKr, OFT, and whatever a user's own method makes of a
    weight.
    """

    learned: ClassVar[tuple[str, ...]] = ("d",)
    trained: ClassVar[tuple[type[Patch], ...]] = (AddPatch,)

    def fields(self) -> dict[str, Field]:
        return {"d": Field(tuple(self.site.shape), self.dtype)}

    def encode(self, patches: Sequence[Any]) -> Contents:
        if self.trains(patches):
            return {"d": patches[0].difference}
        return {"d": difference(patches, self.site.tensor)}

    def parameter(self, patch: Any, name: str) -> Tensor:
        return patch.difference


class MixedDense(Dense, MixedLinear):
    """y = Wx + D_k x."""

    def add(self, rows: Rows, tables: Tables, x: Tensor, y: Tensor) -> Tensor:
        d = self.matrices(tables["d"]).mT  # (S, i, o)
        x = x.to(d.dtype)
        if not self.by_runs(rows, tables, x, y):
            return y + torch.bmm(x, per_row(d, rows)).to(y.dtype)
        for slot, start, stop in rows.runs or ():
            y[start:stop] += x[start:stop] @ d[slot]
        return y

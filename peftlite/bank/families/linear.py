"""MixedLinear: y = Wx + what each row's own change of W adds, at the weight of a linear map."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftlite.bank.families.gather import fold
from peftlite.bank.families.mixed import Mixed, is_expert
from peftlite.bank.rows import Rows, Tables
from peftlite.core.host import ATTRIBUTE
from peftlite.core.maps import Map
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.errors import TargetError


def called_as_map(site: Site) -> None:
    """Raises TargetError unless the weight at a site is that of a linear map that is called."""
    module: Any = site.module
    read = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    own = "forward" in vars(module) or getattr(vars(module).get(ATTRIBUTE), "own_forward", None)
    if not site.rides or read or own or is_expert(site):
        raise TargetError(
            f"{site.address} isn't the weight of a linear map that is called, so its rows can't be "
            "told apart: leave it out of the bank's methods with exclude="
        )


class MixedLinear(Mixed):
    """A subclass says what to add to the outputs (`add`)."""

    suits = staticmethod(called_as_map)

    def __init__(self, site: Site, patch: Patch, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.layout = site.layout
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

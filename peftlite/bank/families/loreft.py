"""MixedLoReFT: h + R_kᵀ((W − R)_k h + b_k), each row at the positions of its own delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftlite.bank.arena import Field
from peftlite.bank.families.gather import fold, per_row, slots_of
from peftlite.bank.families.mixed import Contents, Mixed
from peftlite.bank.rows import Rows, Tables
from peftlite.core.site import Site
from peftlite.errors import PeftliteError
from peftlite.methods.features import by_name, change_first


class MixedLoReFT(Mixed):
    """R (r, d), W − R (r, d) and b (r) in each slot; `first` and `last`, how many positions.

    Room made with positions="all" is for deltas of all positions, and any call; room made with
    others, such as "f1", takes every kind, at calls that give (b, t, d).
    """

    r: Any
    d: Any
    everywhere: Any

    def __init__(self, site: Site, patch: Any, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.r, self.d, self.everywhere = *patch.w.shape, patch.everywhere

    @property
    def size(self) -> int:
        return super().size + (not self.everywhere)  # of two alike, what takes every kind

    def fields(self) -> dict[str, Field]:
        matrix, number = Field((self.r, self.d), self.dtype), Field((), torch.int64)
        vector = Field((self.r,), self.dtype)
        return {"r": matrix, "inward": matrix, "b": vector, "first": number, "last": number}

    def encode(self, patches: Sequence[Any]) -> Contents:
        (patch,) = patches
        if len(patch.w) > self.r:
            raise self.too_large(f"rank {len(patch.w)} is above", self.r, "rank")
        if self.everywhere and not patch.everywhere:
            raise PeftliteError(
                f"{self.address}: the bank has room for changes of all positions alone, and this "
                f"is of {patch.method.positions!r}: make it with pl.LoReFT(positions='f1', …)"
            )
        if not patch.everywhere and patch.method.counted != self.template.method.counted:
            raise PeftliteError(
                f"{self.address}: positions are counted by the {self.template.method.counted} in "
                f"the bank's room, and by the {patch.method.counted} in this: a bank has one way"
            )
        rotation = patch.rotation()
        first, last = (2**62, 0) if patch.everywhere else patch.method.ends
        return {
            **{"r": rotation, "inward": patch.w - rotation.to(patch.w.dtype), "b": patch.b},
            **{"first": first, "last": last},
        }

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        arguments = by_name(self.template.names, args, kwargs)
        change = partial(self._intervene, rows, tables, arguments)
        return change_first(inner(*args, **kwargs), change)

    def _intervene(
        self, rows: Rows, tables: Tables, arguments: Mapping[str, Any], h: Any
    ) -> Tensor:
        self.template.check(h, self.d)
        r, inward, b = (per_row(tables[n], rows).to(h.dtype) for n in ("r", "inward", "b"))

        def of(h: Tensor) -> Tensor:
            return torch.bmm(torch.baddbmm(b[:, None], fold(h, rows), inward.mT), r).view(h.shape)

        change = self.template.along(of, h)
        if self.everywhere and arguments.get("reft_positions") is None:
            return h + change
        slots = slots_of(rows, len(h))
        ends = (tables[name].index_select(0, slots)[:, None] for name in ("first", "last"))
        return h + change * self.template.positions(h, arguments, *ends)[..., None]

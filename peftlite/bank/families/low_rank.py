"""Low rank: y = Wx + s_k·B_k A_k x, with k the slot of the row: LoRA and all of its kind, DoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.bank.arena import Field
from peftlite.bank.families.gather import dropped_by_rows, fold, per_row, rescaled
from peftlite.bank.families.linear import MixedLinear
from peftlite.bank.families.mixed import Contents, is_whole
from peftlite.bank.rows import Rows, Tables
from peftlite.core.maps import Embedding, Linear, Map, TransposedLinear, kind_of, unwrap
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.core.tensors import narrow, wide, widen
from peftlite.errors import PeftliteError, TargetError
from peftlite.kernels.rows import (
    Factors,
    each_linear,
    each_low_rank,
    groups_low_rank,
    mixed_low_rank,
    rows_low_rank,
    runs_low_rank,
)
from peftlite.methods.dora import DoRAPatch
from peftlite.methods.lora import LoRAPatch
from peftlite.methods.low_rank import LowRankPatch

FEW = 8
"""Tokens of a row, up to which the rows are brought together by their slots on a CPU."""


class MixedLowRank(MixedLinear):
    """`a` (R, i) and `b` (o, R) in each slot, with the rank r ≤ R that is used of them, and s.

    Where the weight is a stack of matrices, so are they.
    """

    learned: ClassVar[tuple[str, ...]] = ("a", "b")
    narrows: ClassVar[bool] = True

    def __init__(self, site: Site, patch: LowRankPatch, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.max_rank = max_rank
        self._widest: tuple[Rows | None, int, int] = (None, 0, 0)

    def fields(self) -> dict[str, Field]:
        stack = self.layout.stack
        return {
            "a": Field((*stack, self.max_rank, self.i), self.dtype, used=len(stack)),
            "b": Field((*stack, self.o, self.max_rank), self.dtype, used=len(stack) + 1),
            "scale": Field((), wide(torch.empty(0, dtype=self.dtype))),
            "rank": Field((), torch.int32),
        }

    def encode(self, patches: Sequence[Patch]) -> Contents:
        pairs = [self._factors(patch) for patch in patches]
        scale = pairs[0][2]
        a = torch.cat([a for a, _, _ in pairs], -2)
        # one s for all: what another patch has more of it is in its B
        b = torch.cat([b if s == scale else b * (s / scale) for _, b, s in pairs], -1)
        r = a.shape[-2]
        if r > self.max_rank:
            raise PeftliteError(
                f"{self.address}: rank {r} is above the bank's max_rank {self.max_rank}"
            )
        return {"a": a, "b": b, "scale": scale, "rank": r}

    def _factors(self, patch: Any) -> tuple[Tensor, Tensor, float]:
        """A (r, i), B (o, r) and s of a patch, as of all of the tensor."""
        a, b = patch.factors()
        left, right = self.layout.factors(a, b)
        left, right = widen(left, right, patch.index, self.layout.shape)
        a, b = self.layout.factors(left, right)  # the same way back
        return a, b, patch.scale

    def trains(self, patches: Sequence[Any]) -> bool:
        patch = patches[0]
        return isinstance(patch, LoRAPatch) and not patch.fixed and is_whole(patches)

    def learns(self, patch: Any) -> Sequence[str]:
        return ("b",) if patch.method.freeze_a else self.learned

    def dropout(self, patch: Any) -> float:
        return getattr(patch, "dropout", 0.0)

    def used(self, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r = int(contents["rank"])
        return {"a": contents["a"][..., :r, :], "b": contents["b"][..., :r]}

    def mix(
        self, rows: Rows, tables: Tables, inner: Map, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        drops = "dropout" in tables
        if drops or not (rows.lies and type(inner) in (Linear, TransposedLinear)):
            return super().mix(rows, tables, inner, input, *args, **kwargs)
        x, factors = fold(input, rows), (tables[name] for name in ("a", "b", "scale"))
        w = inner.weight.t() if inner.transposed else inner.weight
        y = each_linear(x, w, inner.bias, *factors)
        return y.view(*input.shape[:-1], y.shape[-1])

    def add(self, rows: Rows, tables: Tables, x: Tensor, y: Tensor) -> Tensor:
        x = self.dropped(x, tables, rows.slots)
        if rows.lies:
            return each_low_rank(y, x, tables["a"], tables["b"], tables["scale"])
        every = tables["a"], tables["b"], tables["scale"], tables["rank"]
        if not self.by_runs(rows, tables, x, y):
            return rows_low_rank(y, x, *every, rows.slots)
        if x.shape[1] <= FEW and len(rows.runs or ()) > 1:
            return groups_low_rank(y, x, *self._grouped(rows))
        mixed = mixed_low_rank(y, x, *every, lambda: rows.known)
        return runs_low_rank(y, x, self._factors_of(rows)) if mixed is None else mixed

    def dropped(self, x: Tensor, tables: Tables, slots: Tensor) -> Tensor:
        """x (n, …), without what training drops of it by the slot of each entry (n,)."""
        if not self.training or "dropout" not in tables:
            return x
        return dropped_by_rows(x, tables["dropout"].index_select(0, slots))

    def _grouped(self, rows: Rows) -> tuple[Any, ...]:
        """The factors of each group, as wide as the widest of them, and the rows."""
        slots, padded, unpadded = rows.groups
        (known, fills, r), now = self._widest, sum(self.arena.fills)
        if known is not rows or fills != now:
            r = max(self.contents_of(slot)["rank"] for slot, _, _ in rows.runs or ())
            self._widest = rows, now, r  # replaced whole, for other threads
        a, b, scale = (self.tables[name][slots] for name in ("a", "b", "scale"))
        return a[:, :r], b[..., :r], scale, padded, unpadded

    def _factors_of(self, rows: Rows) -> Iterator[tuple[Factors, int, int]]:
        for slot, start, stop in rows.runs or ():
            contents = self.contents_of(slot)
            yield (contents["a"], contents["b"], contents["scale"]), start, stop


class MixedEmbedding(MixedLowRank):
    """y = W[ids] + s_k·B_k A_k[:, ids]: A (R, words) and B (d, R), as of a map of one-hot words."""

    @staticmethod
    def suits(site: Site) -> None:
        if {kind_of(module) for module, _ in site.owners} != {Embedding}:
            raise TargetError(
                f"{site.address} isn't of an embedding alone, so its rows can't be told apart: "
                "leave it out of the bank's methods with exclude="
            )

    def mix(
        self, rows: Rows, tables: Tables, inner: Map, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        y, ids = inner(input), input.reshape(len(rows.slots), -1)  # (b, t)
        b, scale = per_row(tables["b"], rows), per_row(tables["scale"], rows)[:, None, None]
        h = tables["a"][rows.slots[:, None], :, ids] * scale.to(b.dtype)
        change = torch.bmm(h, b.mT).to(y.dtype).view_as(y)
        base: Any = unwrap(inner)[0]
        return y + base.spared(input, change)


class MixedDoRA(MixedLowRank):
    """y' = y + (m/‖V‖ − 1)_k ⊙ (y − b), with y what LoRA's k-th change gives.

    Beside LoRA's factors, `change` (o): every output's ratio less 1, found as a delta is loaded.
    """

    learned: ClassVar[tuple[str, ...]] = ()

    def fields(self) -> dict[str, Field]:
        return {**super().fields(), "change": Field((self.o,), wide(self.site.whole))}

    def encode(self, patches: Sequence[Any]) -> Contents:
        if not all(patch.has_call for patch in patches):
            raise self.cannot("be mixed by rows where it changes some of the inputs", patches[0])
        change = torch.stack([self._change(patch) for patch in patches]).sum(0)
        return {**super().encode(patches), "change": change}

    def _change(self, patch: DoRAPatch) -> Tensor:
        """m/‖V‖ − 1 of all outputs, those that a patch leaves alone at 0."""
        change = patch.ratio(narrow(self.site.whole, patch.index)) - 1
        if patch.index is None:
            return change
        _, start, stop = patch.index
        return F.pad(change, (start, self.o - stop))

    def trains(self, patches: Sequence[Patch]) -> bool:
        return False

    def mix(
        self, rows: Rows, tables: Tables, inner: Map, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        y = super().mix(rows, tables, inner, input, *args, **kwargs)
        return rescaled(y, inner.bias, tables["change"], rows)

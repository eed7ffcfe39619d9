"""MixedBottleneck: y + s_k·U_k f_k(D_k z + d_k) + u_k: bottleneck adapters and Compacter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.bank.arena import Field
from peftlite.bank.families.gather import fold, per_row
from peftlite.bank.families.mixed import Contents, Mixed
from peftlite.bank.rows import Rows, Tables
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.methods.bottleneck import ACTIVATIONS, BottleneckPatch
from peftlite.methods.compacter import CompacterPatch, kronecker
from peftlite.methods.features import change_first

_FUNCTIONS = tuple(ACTIVATIONS.values())


class MixedBottleneck(Mixed):
    """An adapter behind a call: z is y. A slot has its width r ≤ R, its f and its s."""

    r: int
    i: Any
    o: Any

    learned: ClassVar[tuple[str, ...]] = ("down", "down_bias", "up", "up_bias")
    trained: ClassVar[tuple[type[Patch], ...]] = (BottleneckPatch,)

    def __init__(self, site: Site, patch: Any, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.r, self.i, self.o = len(patch.down_bias), patch.i, patch.o

    def fields(self) -> dict[str, Field]:
        shapes = (self.r, self.i), (self.r,), (self.o, self.r), (self.o,)
        return {
            **{n: Field(s, self.dtype) for n, s in zip(self.learned, shapes, strict=True)},
            "up": Field((self.o, self.r), self.dtype, used=1),
            "scale": Field((), torch.promote_types(self.dtype, torch.float32)),
            "function": Field((), torch.int32),
            "size": Field((), torch.int32),
        }

    def encode(self, patches: Sequence[Any]) -> Contents:
        (patch,), size = patches, len(patches[0].down_bias)
        if size > self.r:
            raise self.too_large(f"an adapter {size} wide is above", self.r, "bottleneck_size")
        down, up = _matrices(patch)
        return {
            **{"down": down, "down_bias": patch.down_bias, "up": up, "up_bias": patch.up_bias},
            "scale": patch.scale,
            "function": _FUNCTIONS.index(patch.act),
            "size": size,
        }

    def used(self, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r = int(contents["size"])
        cut = {"down": contents["down"][:r], "down_bias": contents["down_bias"][:r]}
        return cut | {"up": contents["up"][:, :r], "up_bias": contents["up_bias"]}

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        return change_first(inner(*args, **kwargs), lambda y: self._add(rows, tables, y, y))

    def _add(self, rows: Rows, tables: Tables, y: Any, z: Any) -> Tensor:
        self.template.check(y, self.o)
        self.template.check(z, self.i)
        in_runs = self.by_runs(rows, tables, y, z)

        def of(z: Tensor) -> Tensor:
            flat = fold(z, rows)
            change = self._in_runs(rows, flat) if in_runs else self._per_row(rows, tables, flat)
            return change.view(*z.shape[:-1], self.o)

        return y + self.template.along(of, z).to(y.dtype)

    def _per_row(self, rows: Rows, tables: Tables, z: Tensor) -> Tensor:
        """The change (b, t, o), for z (b, t, i)."""
        down, d, up, u = (per_row(tables[name], rows).to(z.dtype) for name in self.learned)
        h = torch.baddbmm(d[:, None], z, down.mT)
        kind = per_row(tables["function"], rows)[:, None, None]
        hidden = _FUNCTIONS[0](h)
        for number, f in enumerate(_FUNCTIONS[1:], 1):
            hidden = torch.where(kind == number, f(h), hidden)
        scale = per_row(tables["scale"], rows)[:, None, None].to(z.dtype)
        return torch.baddbmm(u[:, None], hidden, up.mT) * scale

    def _in_runs(self, rows: Rows, z: Tensor) -> Tensor:
        """The same, a run of rows at a time."""
        change = z.new_zeros(*z.shape[:2], self.o)
        for slot, start, stop in rows.runs or ():
            contents = self.contents_of(slot)
            down, d, up, u = (contents[name].to(z.dtype) for name in self.learned)
            hidden = _FUNCTIONS[contents["function"]](F.linear(z[start:stop], down, d))
            change[start:stop] = F.linear(hidden, up, u).mul_(contents["scale"])
        return change


class MixedBeside(MixedBottleneck):
    """An adapter beside a call, in parallel: z is its first argument."""

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        z = next(iter((*args, *kwargs.values())), None)
        return change_first(inner(*args, **kwargs), lambda y: self._add(rows, tables, y, z))


class MixedInside(MixedBottleneck):
    """An adapter in front of a norm that was called before: LN(z + …), with z = LN(x)."""

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        x = next(iter((*args, *kwargs.values())), None)
        return inner(self._add(rows, tables, x, inner(x)))


def _matrices(patch: Any) -> tuple[Tensor, Tensor]:
    """D (r, i) and U (o, r)."""
    if not isinstance(patch, CompacterPatch):
        return patch.down, patch.up
    ones = (patch.a.new_ones(n).diag() for n in (patch.i, len(patch.down_bias)))
    factors = (patch.down_u, patch.down_v), (patch.up_u, patch.up_v)
    down, up = (kronecker(x, patch.a, u, v).mT for x, (u, v) in zip(ones, factors, strict=True))
    return down, up

"""MixedSparse: y = Wx + D_k x, with D zero but at the entries that each slot lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftlite.bank.arena import Field
from peftlite.bank.families.gather import per_row
from peftlite.bank.families.linear import MixedLinear
from peftlite.bank.families.mixed import Contents
from peftlite.bank.rows import Rows, Tables
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.errors import PeftliteError
from peftlite.kernels.sparse import compressed
from peftlite.methods.search import SearchPatch
from peftlite.methods.sparse import SparsePatch


class MixedSparse(MixedLinear):
    """`values` (n) and their flat `indices` (n) in W; what a delta has fewer is 0 at entry 0."""

    index_dtype: Any
    dtype: Any

    learned: ClassVar[tuple[str, ...]] = ("values",)
    trained: ClassVar[tuple[type[Patch], ...]] = (SparsePatch,)

    def __init__(self, site: Site, patch: Any, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.shape: torch.Size = site.shape
        self.index_dtype, self.dtype = patch.kind, patch.values.dtype
        self.n: int = patch.count if isinstance(patch, SearchPatch) else len(patch.values)

    def fields(self) -> dict[str, Field]:
        return {
            "values": Field((self.n,), self.dtype),
            "indices": Field((self.n,), self.index_dtype),
            "used": Field((), torch.int64),
        }

    def encode(self, patches: Sequence[Patch]) -> Contents:
        values, indices = map(torch.cat, zip(*map(self._entries, patches), strict=True))
        if len(values) > self.n:
            raise PeftliteError(
                f"{self.address}: {len(values)} entries change, and a slot has room for {self.n}: "
                "make room by a method that changes more, such as one with a larger fraction"
            )
        return {"values": values, "indices": indices, "used": len(values)}

    def _entries(self, patch: Patch) -> tuple[Tensor, Tensor]:
        """The differences of a patch, and their indices into all of the tensor."""
        saved = patch.saved()
        if "indices" not in saved:
            raise self.cannot("be mixed by rows before it has found its entries", patch)
        values, indices = saved["values"], saved["indices"]
        if patch.index is None:
            return values, indices
        dim, start, stop = patch.index
        shape = list(self.shape)
        shape[dim] = stop - start
        row, column = torch.unravel_index(indices, shape)
        row, column = (row + start, column) if dim == 0 else (row, column + start)
        return values, row * self.shape[1] + column

    def used(self, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"values": contents["values"][: int(contents["used"])]}

    def decode(self, patches: Sequence[Any], contents: Mapping[str, Tensor]) -> None:
        if self.trains(patches):
            patches[0].place(contents["indices"][: int(contents["used"])])
        super().decode(patches, contents)

    def add(self, rows: Rows, tables: Tables, x: Tensor, y: Tensor) -> Tensor:
        if self.by_runs(rows, tables, x, y) and torch.backends.mkl.is_available():
            return self._add_in_runs(rows, y, x)
        values, indices = (per_row(tables[name], rows) for name in ("values", "indices"))
        few = x.shape[1] * self.n < self.shape.numel()  # to read of x, beside their matrices
        change = self._entry_by_entry if few else self._as_matrices
        return y + change(x, values, indices.long()).to(y.dtype)

    def _add_in_runs(self, rows: Rows, y: Tensor, x: Tensor) -> Tensor:
        """The sum, in y, by matrices with compressed rows."""
        for slot, start, stop in rows.runs or ():
            d = self._matrix(slot)
            change = d @ x[start:stop].flatten(0, 1).to(d.dtype).t().contiguous()
            y[start:stop] += change.t().view(stop - start, *y.shape[1:]).to(y.dtype)
        return y

    def _matrix(self, slot: int) -> Tensor:
        """D (o, i) of a slot, kept as long as what is read off it."""
        contents = self.contents_of(slot)
        if "matrix" not in contents:
            values = contents["values"].to(wide(contents["values"]))
            into, out_of = self._places(contents["indices"][: len(values)].long())
            order = (into * self.i + out_of).argsort()
            firsts = torch.arange(self.o + 1, device=into.device)
            parts = torch.searchsorted(into[order], firsts), out_of[order], values[order]
            contents["matrix"] = compressed(*parts, (self.o, self.i))
        return contents["matrix"]

    def _places(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs and the inputs of entries."""
        first, second = indices // self.shape[1], indices % self.shape[1]
        return (second, first) if self.layout.transposed else (first, second)

    def _entry_by_entry(self, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """Σ x[column]·value into each row, for x (b, t, i), and values and indices (b, n)."""
        into, out_of = self._places(indices)
        read = x.gather(2, out_of[:, None].expand(-1, x.shape[1], -1)) * values[:, None]
        y = read.new_zeros(*x.shape[:2], self.o)
        return y.scatter_add(2, into[:, None].expand_as(read), read)

    def _as_matrices(self, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """The same by the matrices D themselves, in which that has less to read and write."""
        d = values.new_zeros(len(x), self.shape.numel()).scatter_add(1, indices, values)
        d = d.view(-1, *self.shape)
        return torch.bmm(x.to(d.dtype), self.matrices(d).mT)

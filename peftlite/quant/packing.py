"""Packing: how a tensor is kept in codes, and the tensors that it's made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftlite.quant import nf4, rows

KINDS = ("nf4", "int8", "fp8")


@dataclass(frozen=True)
class Packing:
    """How one tensor is packed.

    Args:
        kind: "nf4", "int8" or "fp8".
        shape: of the tensor itself.
        dtype: what it is read in.
        block: nf4's; 0 for others, which have a scale a row.
    """

    kind: str
    shape: torch.Size
    dtype: torch.dtype
    block: int = 0

    def cast(self, dtype: torch.dtype) -> Packing:
        """The same codes, read in another dtype."""
        return self if dtype is self.dtype else replace(self, dtype=dtype)

    def sizes(self, nested: bool) -> dict[str, tuple[int, ...]]:
        """The shapes of the parts, which are nested or not where the kind is nf4."""
        n = self.shape.numel()
        if self.kind != "nf4":
            return {"": tuple(self.shape), "scale": (self.shape[0], 1)}
        blocks = -(-n // self.block)
        found: dict[str, tuple[int, ...]] = {"": (-(-n // 2), 1), "absmax": (blocks,)}
        if nested:
            found |= {"nested_absmax": (-(-blocks // nf4.NESTED_BLOCK),), "nested_offset": ()}
        return found

    def unpack(self, parts: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """W of its shape and dtype, in `out` if that is given: contiguous, on the parts' device."""
        if out is None:
            out = torch.empty(self.shape, dtype=self.dtype, device=parts[""].device)
        with torch.no_grad():
            if self.kind == "nf4":
                return nf4.unpack(parts, self.block, out)
            return rows.unpack(parts, out)


@torch.no_grad()
def pack(
    w: Tensor, kind: str, block: int = nf4.BLOCK, double: bool = True, search: bool = False
) -> tuple[Packing, dict[str, Tensor]]:
    """A tensor's packing and parts, of which "" has its codes."""
    how = Packing(kind, w.shape, w.dtype, block if kind == "nf4" else 0)
    if kind == "nf4":
        return how, nf4.pack(w, block, double, search)
    return how, rows.pack(w, kind)

"""Packing: how a tensor is kept in codes, and the tensors that it's made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peftlite.errors import PeftliteError
from peftlite.kernels.native import packed as native
from peftlite.quant import beside, layouts, nf4, rows

KINDS = ("nf4", "int8", "fp8")
"""What tensors are packed in here; what others packed is read in the kinds of `layouts`, too."""
_PIECE = 1 << 20


@dataclass(frozen=True)
class Packing:
    """How one tensor is packed.

    Args:
        kind: "nf4", "int8", "fp8", or one that is only read, as `layouts` has them.
        shape: of the tensor itself.
        dtype: what it is read in.
        block: nf4's and fp4's; 0 for others.
        search: whether its scales are searched for when it is packed again.
    """

    kind: str
    shape: torch.Size
    dtype: torch.dtype
    block: int = 0
    search: bool = field(default=False, compare=False)

    def cast(self, dtype: torch.dtype) -> Packing:
        """The same codes, read in another dtype."""
        return self if dtype is self.dtype else replace(self, dtype=dtype)

    def sizes(self, nested: bool) -> dict[str, tuple[int, ...]]:
        """The shapes of the parts, which are nested or not where the kind is nf4."""
        n = self.shape.numel()
        if self.kind not in ("nf4", "fp4"):
            return {"": tuple(self.shape), "scale": (self.shape[0], 1)}
        blocks = -(-n // self.block)
        found: dict[str, tuple[int, ...]] = {"": (-(-n // 2), 1), "absmax": (blocks,)}
        if nested:
            found |= {"nested_absmax": (-(-blocks // nf4.NESTED_BLOCK),), "nested_offset": ()}
        return found

    def nbytes(self, nested: bool) -> int:
        """Bytes of the parts."""
        of = {"": 1, "absmax": 1 if nested else 4}
        sizes = self.sizes(nested).items()
        return sum(math.prod(size) * of.get(name, 4) for name, size in sizes)

    def rows(
        self, parts: Mapping[str, Tensor], at: Tensor
    ) -> tuple[Packing, dict[str, Tensor]] | None:
        """Some rows (n,) as a tensor of their own; None where codes or scales span several."""
        n = self.shape[1:].numel()
        if "left" in parts or (self.block and n % self.block):
            return None
        how = replace(self, shape=torch.Size((len(at), *self.shape[1:])))
        if self.kind == "nf4":
            return how, nf4.rows(parts, at, n, self.block)
        return how, {name: part.index_select(0, at) for name, part in parts.items()}

    def empty(self, nested: bool) -> dict[str, Tensor]:
        """Parts without numbers."""
        codes = torch.int8 if self.kind == "int8" else torch.uint8
        dtypes = {"": codes, "absmax": torch.uint8 if nested else torch.float32}
        found = {
            name: torch.empty(size, dtype=dtypes.get(name, torch.float32), device="meta")
            for name, size in self.sizes(nested).items()
        }
        return found | ({"nested_offset": torch.zeros(())} if "nested_offset" in found else {})

    def check(self, parts: Mapping[str, Tensor]) -> None:
        """Raises PeftliteError, without the tensor's name, if these can't be its parts."""
        given = {name: tuple(part.shape) for name, part in parts.items()}
        if self.kind in (*KINDS, "fp4"):
            empty = self.empty(nested="nested_offset" in parts)
            wanted = {name: tuple(part.shape) for name, part in empty.items()}
            codes = {name: size for name, size in given.items() if name not in beside.PARTS}
            if codes != wanted or not beside.fits(parts, self.shape):
                raise PeftliteError(f"has parts of {given}, where {tuple(self.shape)} has {wanted}")
            for name, part in empty.items():
                if (own := parts[name].dtype) is not part.dtype:
                    raise PeftliteError(
                        f"has {name or 'codes'} in {own}, where {part.dtype} is known here: a "
                        "packed tensor can't be cast"
                    )
            return
        order, error = parts.get("order", torch.zeros(1)), None
        try:
            self.unpack({name: part.to("meta") for name, part in parts.items()})
        except (RuntimeError, LookupError, ValueError) as failed:
            error = failed
        groups = max((1, *parts["scale"].shape))
        if error is not None or not 0 <= order.min() <= order.max() < groups:
            raise PeftliteError(
                f"has parts of {given}, which don't make {tuple(self.shape)} by {self.kind}"
            ) from error

    def unpack(self, parts: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """W of its shape and dtype, in `out` if that is given: contiguous, on the parts' device."""
        if out is None:
            out = torch.empty(self.shape, dtype=self.dtype, device=parts[""].device)
        with torch.no_grad():
            if self.kind in KINDS and native.unpack(self._codes(parts), out):
                pass
            elif self.kind == "nf4":
                nf4.unpack(parts, self.block, out)
            elif self.kind in KINDS:
                rows.unpack(parts, out)
            else:
                return layouts.unpack(self.kind, parts, self.block, out)
            return beside.add(parts, out)

    def product(self, x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor | None:
        """y (…, o) = x Wᵀ + bias without forming W (o, i), where x (…, i) is a few rows of it."""
        known = self.kind in KINDS and "left" not in parts
        return native.few(x, self._codes(parts), bias) if known else None

    def back(self, dy: Tensor, parts: Mapping[str, Tensor]) -> Tensor | None:
        """dx (…, i) = dy W of rows dy (…, o), in the same way."""
        known = self.kind in KINDS and "left" not in parts
        return native.back(dy, self._codes(parts), self.shape[-1]) if known else None

    def _codes(self, parts: Mapping[str, Tensor]) -> native.Codes:
        block = self.block or self.shape.numel() // max(1, self.shape[0])
        return native.Codes(self.kind, block, parts, nf4.levels(), nf4.dynamic_map())


@torch.no_grad()
def pack(
    w: Tensor, kind: str, block: int = nf4.BLOCK, double: bool = True, search: bool = False
) -> tuple[Packing, dict[str, Tensor]]:
    """A tensor's packing and parts, of which "" has its codes. Raises PeftliteError."""
    if kind not in KINDS:
        raise PeftliteError(
            f"a weight in {kind} is read here, and not written: keep what would change it attached"
        )
    how = Packing(kind, w.shape, w.dtype, block if kind == "nf4" else 0, search)
    if kind == "nf4":
        return how, nf4.pack(w, block, double, search)
    # a few rows at a time, as each takes more room in fp32
    made = {name: torch.empty_like(t, device=w.device) for name, t in how.empty(False).items()}
    step = max(1, _PIECE * len(w) // w.numel())
    for start in range(0, len(w), step):
        for name, part in rows.pack(w[start : start + step], kind).items():
            made[name][start : start + step] = part
    return how, made


@torch.no_grad()
def pack_beside(
    w: Tensor, rank: int, init: str, iterations: int, stack: int = 0, **how: Any
) -> tuple[Packing, dict[str, Tensor]]:
    """As `pack`, with a product beside the codes: by turns Q of W − LR, and LR of W − Q.

    `init` says which is first: "loftq" Q, "pissa" LR; of a stack `stack` dimensions are.
    """
    wide = w.detach().to(torch.promote_types(w.dtype, torch.float32))

    def rest(low: Mapping[str, Tensor]) -> tuple[Packing, dict[str, Tensor]]:
        return pack(wide - beside.add(low, wide.new_zeros(wide.shape)), **how)

    def lost(packing: Packing, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return beside.first(wide - packing.unpack(parts), rank, stack)

    packed = rest(beside.first(wide, rank, stack) if init == "pissa" else {})
    for _ in range(iterations - 1):
        packed = rest(lost(*packed))
    low = {name: part.to(w.dtype) for name, part in lost(*packed).items()}
    return packed[0].cast(w.dtype), packed[1] | low

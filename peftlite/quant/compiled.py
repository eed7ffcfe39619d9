"""Compiled: forming a packed tensor as one operation that graphs call, in place of its steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftlite.quant.packing import Packing


def unpack(how: Packing, parts: Mapping[str, Tensor]) -> Tensor:
    """W of its shape and dtype, for code that is being compiled or exported."""
    names = ",".join(parts)
    return _unpack([*parts.values()], names, how.kind, [*how.shape], how.dtype, how.block)


@torch.library.custom_op("peftlite::unpack", mutates_args=())
def _unpack(
    parts: list[Tensor], names: str, kind: str, shape: list[int], dtype: torch.dtype, block: int
) -> Tensor:
    how = Packing(kind, torch.Size(shape), dtype, block)
    return how.unpack(dict(zip(names.split(","), parts, strict=True)))


@_unpack.register_fake
def _(
    parts: list[Tensor], names: str, kind: str, shape: list[int], dtype: torch.dtype, block: int
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=parts[0].device)

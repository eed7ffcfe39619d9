"""Rows: eight bits a weight, whole numbers or floats of 4 + 3 bits, and a scale for each row.

W = s q,  s = max |W| of its row over 127, or over 448, the largest float8_e4m3fn
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_PIECE = 1 << 17


def pack(w: Tensor, kind: str) -> dict[str, Tensor]:
    """The codes "" of a tensor (n, …) in its shape, int8 or the bytes of floats; `scale` (n, 1)."""
    rows = w.detach().reshape(len(w), -1)
    scale = rows.abs().amax(1, keepdim=True).float() / (127 if kind == "int8" else 448)
    y = rows.float() / torch.where(scale == 0, 1.0, scale)
    codes = y.round_().to(torch.int8) if kind == "int8" else y.to(_FP8).view(torch.uint8)
    return {"": codes.view(w.shape), "scale": scale}


def unpack(parts: Mapping[str, Tensor], out: Tensor) -> Tensor:
    """Writes W, rounded once from fp32, into a contiguous tensor (n, …)."""
    codes, scale = (t.view(len(out), -1) for t in (parts[""], parts["scale"]))
    rows = out.view(len(out), -1)
    step = max(1, _PIECE // max(1, rows.shape[1]))
    pieces = zip(codes.split(step), scale.split(step), rows.split(step), strict=True)
    for q, s, into in pieces:
        torch.mul(q if q.dtype is torch.int8 else _floats(q), s, out=into)
    return out


def _floats(q: Tensor) -> Tensor:
    """The numbers of bytes, in bf16, by their bits; torch's own cast takes six times as long."""
    bits = q.to(torch.int16)
    bits = ((bits & 0x7F) << 4) | ((bits & 0x80) << 8)
    return bits.view(torch.bfloat16) * 2.0**120  # from an exponent's bias of 127 to one of 7

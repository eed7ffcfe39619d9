"""Rows: eight bits a weight, whole numbers or floats of 4 + 3 bits, and a scale for each row.

W = s q,  s = max |W| of its row over 127, or over 448, the largest float8_e4m3fn
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftlite.kernels.workspace import workspace

_FP8 = torch.float8_e4m3fn
_PIECE = 1 << 17


def pack(w: Tensor, kind: str) -> dict[str, Tensor]:
    """The codes "" of a tensor (n, …) in its shape, int8 or the bytes of floats; `scale` (n, 1)."""
    rows = w.detach().reshape(len(w), -1)
    pieces = [_pack(piece, kind) for piece in rows.split(_step(rows))]
    codes, scale = (torch.cat(each) for each in zip(*pieces, strict=True))
    return {"": codes.view(w.shape), "scale": scale}


def _pack(rows: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    scale = rows.abs().amax(1, keepdim=True).float() / (127 if kind == "int8" else 448)
    y = rows.float() / torch.where(scale == 0, 1.0, scale)
    return y.round_().to(torch.int8) if kind == "int8" else y.to(_FP8).view(torch.uint8), scale


def _step(rows: Tensor) -> int:
    """The rows (n, m) that are worked on at a time."""
    return max(1, _PIECE // max(1, rows.shape[1])) if rows.is_cpu else len(rows)


def unpack(parts: Mapping[str, Tensor], out: Tensor) -> Tensor:
    """Writes W, rounded once from fp32, into a contiguous tensor (n, …)."""
    codes, scale = (t.view(len(out), -1) for t in (parts[""], parts["scale"]))
    rows = out.view(len(out), -1)
    step = _step(rows)
    made = workspace("made", (min(step, len(rows)), rows.shape[1]), torch.float32, out.device)
    for q, s, w in zip(codes.split(step), scale.split(step), rows.split(step), strict=True):
        if len(q) < len(made):
            made = made[: len(q)]
        made.copy_(q) if q.dtype is torch.int8 else _widen(q, made)
        w.copy_(made.mul_(s))
    return out


def _widen(q: Tensor, made: Tensor) -> None:
    """The numbers of bytes, by their bits; torch's own cast takes six times as long."""
    bits = workspace("bits", (*q.shape,), torch.int16, q.device).copy_(q.view(torch.int8))
    bits.mul_(16).bitwise_and_(0x87F0 - 0x10000)  # as those of bf16
    made.copy_(bits.view(torch.bfloat16)).mul_(2.0**120)  # from an exponent's bias of 127 to 7

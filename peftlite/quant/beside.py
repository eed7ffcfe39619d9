"""Beside: a product of low rank beside the codes of a tensor, which makes up for what those lose.

W = Q + L R,  L (*stack, m, r), R (*stack, r, n), as the tensor lies
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

PARTS = ("left", "right")
INITS = ("loftq", "pissa")


def first(w: Tensor, rank: int, stack: int) -> dict[str, Tensor]:
    """L and R of a tensor's first singular directions; `stack` dimensions are of a stack."""
    u, s, v = torch.linalg.svd(w.flatten(stack + 1), full_matrices=False)
    root = s[..., :rank].sqrt()
    left, right = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    return {"left": left.contiguous(), "right": right.contiguous()}


def add(parts: Mapping[str, Tensor], out: Tensor) -> Tensor:
    """Adds L R, where there is one, to a contiguous tensor of any shape."""
    if "left" in parts:
        left, right = (parts[n].reshape(-1, *parts[n].shape[-2:]).to(out.dtype) for n in PARTS)
        out.view(-1, left.shape[1], right.shape[2]).baddbmm_(left, right)
    return out


def fits(parts: Mapping[str, Tensor], shape: Sequence[int]) -> bool:
    """Whether the L and R among parts make up a tensor of that shape, or neither is there."""
    given = [parts[name] for name in PARTS if name in parts]
    if len(given) != 2 or min(part.dim() for part in given) < 2:
        return not given
    left, right = given
    meet = left.shape[:-2] == right.shape[:-2] and left.shape[-1] == right.shape[-2]
    return meet and left[..., 0].numel() * right.shape[-1] == torch.Size(shape).numel()

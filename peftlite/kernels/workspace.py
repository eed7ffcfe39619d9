"""Workspaces: memory that a thread uses again and again; new pages cost as much as a product."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


def workspace(
    purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """A tensor of any values, for one user at a time of those that name this purpose.

    On a CPU its memory is kept by the thread, as much as was ever asked for; elsewhere torch keeps
    what is freed, and knows which stream still uses it.
    """
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return _memory(purpose, size)[0][:size].view(dtype).view(shape)


def address(purpose: str, size: int) -> int:
    """Where as many bytes are, on a CPU, for C."""
    return _memory(purpose, size)[2]


def _memory(purpose: str, size: int) -> tuple[Tensor, int, int]:
    """Memory of that size at least, its size, and where it is."""
    kept = _kept.__dict__.get(purpose)
    if kept is not None and kept[1] >= size:
        return kept
    with torch.inference_mode(False):  # whose tensors are not for use outside of it
        found = torch.empty(size, dtype=torch.uint8, device="cpu")
    if type(found) is not Tensor:  # but a fake of one
        return found, size, 0
    _kept.__dict__[purpose] = kept = found, size, found.data_ptr()
    return kept

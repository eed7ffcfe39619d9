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
    size, found = math.prod(shape) * dtype.itemsize, _kept.__dict__.get(purpose)
    if found is None or len(found) < size:
        with torch.inference_mode(False):  # whose tensors are not for use outside of it
            found = torch.empty(size, dtype=torch.uint8, device="cpu")
        if type(found) is Tensor:  # and not a fake of one
            _kept.__dict__[purpose] = found
    return found[:size].view(dtype).view(shape)

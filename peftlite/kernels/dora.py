"""‖W + s·BA‖ of every row of W, by the factors alone: W + s·BA is never formed.

    ‖Wₒ + s·BₒA‖² = ‖Wₒ‖² + 2s·(WAᵀ)ₒ·Bₒ + s²·Bₒ(AAᵀ)Bₒᵀ

Where BA cancels a row of W, what is left is small beside the terms and their rounding. So all is
in a dtype of twice the digits, to which W is converted a part at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.compiler import is_compiling

from peftlite.kernels import dispatch

_ENTRIES = 2**18  # of W, that are converted at a time on a CPU: they stay in its cache
_ENTRIES_ELSEWHERE = 2**23


def row_norms_squared(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s·BA‖² of every row, (*stack, o), for W (*stack, o, i), A (*stack, r, i), B (…, o, r).

    It is in fp32 where W is in half precision and in fp64 where it's in fp32, but on devices that
    have none. No less than 0.
    """
    single = w.dtype.itemsize < 4 or w.device.type == "mps"
    dtype = torch.float32 if single else torch.float64
    a, b = a.to(dtype), b.to(dtype)
    squares, cross = _products(w, a)
    change = scale * b * (2 * cross + scale * b @ (a @ a.mT))
    return (squares + change.sum(-1)).clamp(min=0)


def reference(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`row_norms_squared` (*stack, o) in plain torch."""
    return torch.linalg.vector_norm(w + scale * (b @ a), dim=-1).square()


def _products(w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """‖Wₒ‖² (*stack, o) and WAᵀ (*stack, o, r), in the dtype of A."""
    if w.dim() == 2 and not is_compiling() and dispatch.path_with(w, a.dtype) == "triton":
        squares = torch.linalg.vector_norm(w, dim=-1, dtype=a.dtype).square()
        return squares, dispatch.ops(w, a.dtype).shrink(w, a, 1.0, 0.0, None)
    if w.stride(-1) <= w.stride(-2):
        norm = torch.linalg.vector_norm
        found = [(norm(part, dim=-1), part @ a.mT) for part in _parts(w, -2, a.dtype)]
        norms, cross = zip(*found, strict=True)
        return torch.cat(norms, -1).square(), torch.cat(cross, -2)
    # a transposed W: what lies together of it is some of its inputs, for all of its outputs
    squares, cross = a.new_zeros(w.shape[:-1]), a.new_zeros(*a.shape[:-1], w.shape[-2])
    start = 0
    for part in _parts(w, -1, a.dtype):
        squares += part.square().sum(-1)
        # BLAS is ten times slower at the product the other way round
        cross += a.narrow(-1, start, part.shape[-1]) @ part.mT
        start += part.shape[-1]
    return squares, cross.mT


def _parts(w: Tensor, dim: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """W a part of a dimension at a time, in a wider dtype."""
    on_cpu = w.is_cpu and not is_compiling()
    entries = _ENTRIES if on_cpu else _ENTRIES_ELSEWHERE
    at_once = max(entries * w.shape[dim] // max(w.numel(), 1), 1)
    return (part.to(dtype) for part in w.split(at_once, dim))

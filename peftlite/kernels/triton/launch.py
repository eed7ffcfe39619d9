"""How the Triton kernels are launched: on the device of their tensors, by sizes alone."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from peftlite.kernels.reference import threshold

PROGRAMS = 264  # that fill a device: two for each of an H100's multiprocessors


def cdiv(size: int, tile: int) -> int:
    """How many tiles there are in a size."""
    return -(-size // tile)


def padded(rank: int, most: int) -> int:
    """The ranks of a tile: a power of two, no less than a tensor core takes."""
    return min(most, max(16, 1 << (rank - 1).bit_length()))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs a kernel on the device of its first argument; a grid of none is no work."""
    if not all(grid):
        return
    # a compiled graph sees to the device itself
    compiling = torch.compiler.is_compiling()
    with contextlib.nullcontext() if compiling else torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def mask(x: Tensor, dropout: float, seed: Tensor | None) -> tuple[Tensor, int]:
    """What decides a mask; without a dropout, any tensor for the seed that isn't read."""
    return (x, 0) if seed is None else (seed, threshold(dropout))

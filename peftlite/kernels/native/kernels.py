"""The files of C that there are, and how each stands on this machine."""

from __future__ import annotations

from peftlite.kernels.native import low_rank, mask, packed

KERNELS = (
    *(low_rank.KERNEL, low_rank.HALF, low_rank.SINGLE, mask.KERNEL),
    *(packed.KERNEL, packed.TILES),
)


def rows() -> list[list[str]]:
    """A line of `report` for each: whether it runs, and why."""
    return [
        [f"{kernel.name}.c", "cpu", "bfloat16", "native" if kernel.ready() else "torch", kernel.why]
        for kernel in KERNELS
    ]

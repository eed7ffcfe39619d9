"""Which code a low-rank linear map runs: chosen here alone, overridable, and reported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from peftlite.errors import PeftliteError
from peftlite.kernels import torch_ops
from peftlite.kernels.native import low_rank
from peftlite.kernels.native.kernel import PLAIN, transforms

Path = Literal["reference", "torch", "native", "triton"]

SMALL = 2**15
"""The numbers in x from which on a backward pass of its own saves more than it costs in Python."""

_forced: Path | None = None
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HALVES = (torch.bfloat16, torch.float16)


def backend(name: Path | None) -> AbstractContextManager[None]:
    """Has every map take one path, until the next call or the end of the `with` it is used in.

    Args:
        name: "reference", plain torch that autograd differentiates; "torch", with a backward pass
            of its own; "native", with C of its own on a CPU, where x is in bf16 or fp32 beside
            factors in fp32; "triton", with kernels of its own on a GPU; None, whichever is best.

    Raises:
        PeftliteError: there is no such path, it can't run here, or triton isn't installed.

    Example:
        model = nn.Linear(4, 2)
        pl.attach(model, pl.LoRA(rank=2))
        with pl.kernels.backend("reference"):
            y = model(torch.randn(3, 4))
    """
    global _forced
    if name not in (None, *get_args(Path)):
        raise PeftliteError(f"no backend {name!r}: there are {', '.join(get_args(Path))}, and None")
    if name == "triton" and not _HAS_TRITON:
        raise PeftliteError("backend 'triton' needs the package triton: pip install triton")
    if name == "native" and not any(low_rank.runs(dtype) for dtype in low_rank.KERNELS):
        raise PeftliteError(f"backend 'native' can't run here: {low_rank.SINGLE.why}")
    before, _forced = _forced, name
    return _until_left(before)


@contextmanager
def _until_left(before: Path | None) -> Iterator[None]:
    global _forced
    try:
        yield
    finally:
        _forced = before


def is_plain(x: Tensor, dropout: float) -> bool:
    """Whether the reference is best for x on a CPU, before anything else is asked.

    It is where Python costs more than the products; and in a compiled graph, whose gradients keep
    as little as ours do, but for a mask.
    """
    if _forced is not None or not x.is_cpu:
        return False
    return not dropout if is_compiling() else x.numel() < SMALL


def by_autograd(x: Tensor, dropout: float = 0.0) -> bool:
    """Whether an operation on x is best left to plain torch, which autograd differentiates.

    It is, too, where that is all that works: for an x of a class of its own, as sharded ones are,
    and under a transform of torch.func or forward-mode differentiation.
    """
    return (
        is_plain(x, dropout)
        or _forced == "reference"
        or type(x) not in PLAIN
        or (not is_compiling() and (transforms() is not None or forward_ad._current_level >= 0))
    )


def is_plain_weight(w: Tensor) -> bool:
    """Whether a weight is one to multiply with; a quantised or sharded one knows how it is done."""
    return type(w) in PLAIN


def path_with(x: Tensor, wide: torch.dtype) -> Path:
    """The path of products of x with factors in a dtype, where autograd isn't best for them."""
    if _forced == "torch":
        return "torch"
    if takes_native(x, wide):
        return "native"
    if not _runs_triton(x):
        return "torch"
    # products in fp32 wait for arithmetic, and not for the memory whose reads the kernels save
    if x.dtype not in _HALVES or wide not in (x.dtype, torch.float32):
        return "torch"
    return "triton" if x.is_cuda or _forced == "triton" else "torch"


def wide(x: Tensor, a: Tensor, b: Tensor) -> torch.dtype:
    """The dtype of h: x's or the factors', the wider; fp32 where C multiplies, with no other."""
    found = torch.promote_types(x.dtype, a.dtype)
    narrow = found is torch.bfloat16 and takes_native(x, torch.float32)
    return torch.float32 if narrow and low_rank.knows(x, a, b) else found


def ops(x: Tensor, wide: torch.dtype) -> ModuleType:
    """The operations of the path that x takes, with the factors in a dtype."""
    path = path_with(x, wide)
    if path != "triton":
        return low_rank if path == "native" else torch_ops
    from peftlite.kernels.triton import ops as triton_ops

    return triton_ops


def packed_ops(x: Tensor) -> ModuleType | None:
    """Triton's operations on packed weights, where x is one that they are best for; or None."""
    wanted = x.is_cuda if _forced is None else _forced == "triton"
    if not wanted or not _runs_triton(x) or type(x) not in PLAIN or forward_ad._current_level >= 0:
        return None
    from peftlite.kernels.triton import packed

    return packed


def why(w: Tensor) -> tuple[str, str]:
    """The path of a linear map of vectors with the weight W, and the reason in words."""
    wide = torch.promote_types(w.dtype, torch.float32)  # as factors are, if nothing else is said
    found = "reference" if _forced == "reference" else path_with(w, wide)
    if found == _forced:
        return found, f"backend({_forced!r}) was called"
    if not is_plain_weight(w):
        return found, f"beside the {type(w).__name__}'s own product"
    if found == "native":
        return found, low_rank.kernel_of(w.dtype).why
    if found == "triton":
        return found, "a GPU's memory is read once for two products"
    if not w.is_cuda:
        return found, f"Triton's kernels run on GPUs; reference below {SMALL} numbers of input"
    if not _HAS_TRITON:
        return found, "triton is not installed"
    return found, f"{w.dtype} waits for arithmetic, which cuBLAS does"


def takes_native(x: Tensor, wide: torch.dtype) -> bool:
    """Whether C is best, or asked for, for products of x with factors in a dtype."""
    return (
        wide is torch.float32
        and x.is_cpu
        and _forced in (None, "native")
        and type(x) in PLAIN
        and not is_compiling()
        and low_rank.runs(x.dtype)
    )


def _runs_triton(x: Tensor) -> bool:
    return (x.is_cuda or _INTERPRETED) and _HAS_TRITON

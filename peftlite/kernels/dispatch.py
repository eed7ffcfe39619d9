"""Which code a low-rank linear map runs: chosen here alone, overridable, and reported."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from peftlite.errors import PeftliteError
from peftlite.kernels import torch_ops
from peftlite.table import table

Path = Literal["reference", "torch", "triton"]

SMALL = 2**15
"""The numbers in x from which on a backward pass of its own saves more than it costs in Python."""

_forced: Path | None = None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backend(name: Path | None) -> AbstractContextManager[None]:
    """Has every map take one path, until the next call or the end of the `with` it is used in.

    Args:
        name: "reference", plain torch that autograd differentiates; "torch", with a backward pass
            of its own; "triton", with kernels of its own on a GPU; None, whichever is best.
    """
    global _forced
    if name not in (None, *get_args(Path)):
        raise PeftliteError(f"no backend {name!r}: there are {', '.join(get_args(Path))}, and None")
    if name == "triton" and not _has_triton():
        raise PeftliteError("backend 'triton' needs the package triton: pip install triton")
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
    """Whether the reference is best for x on a CPU, before its path is asked for.

    It is where Python costs more than the products; and in a compiled graph, whose gradients keep
    as little as ours do, but for a mask.
    """
    if _forced is not None or not x.is_cpu:
        return False
    return not dropout if is_compiling() else x.numel() < SMALL


def path(x: Tensor, w: Tensor) -> Path:
    """The path of a map with the weight W for an input x that isn't plain."""
    # a weight of a class of its own, quantised or sharded, knows how it is multiplied with
    if type(w) not in _PLAIN or _forced == "reference":
        return "reference"
    if _forced == "torch" or w.dtype not in _DTYPES or not _runs_triton(x):
        return "torch"
    return "triton" if x.is_cuda or _forced == "triton" else "torch"


def ops(x: Tensor) -> ModuleType:
    """The operations of the path that x takes."""
    if path(x, x) != "triton":
        return torch_ops
    from peftlite.kernels import triton_ops

    return triton_ops


def report(model: nn.Module) -> str:
    """A table of the linear layers that are patched, the path that each takes, and why."""
    rows = []
    for address, module in model.named_modules():
        if "peftlite" in vars(module) and isinstance(module, nn.Linear):
            w = module._parameters["weight"]
            rows.append([address, str(w.device), str(w.dtype).removeprefix("torch."), *_why(w)])
    return table(["module", "device", "dtype", "path", "because"], rows)


def _why(w: Tensor) -> tuple[str, str]:
    found = path(w, w)
    if type(w) not in _PLAIN:
        return found, f"a {type(w).__name__} multiplies in its own way"
    if found == _forced:
        return found, f"backend({_forced!r}) was called"
    if found == "triton":
        return found, "a GPU's memory is read once for two products"
    if not w.is_cuda:
        return found, f"Triton's kernels run on GPUs; reference below {SMALL} numbers of input"
    return found, f"no kernels for {w.dtype}" if _has_triton() else "triton is not installed"


def _runs_triton(x: Tensor) -> bool:
    return (x.is_cuda or _INTERPRETED) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None

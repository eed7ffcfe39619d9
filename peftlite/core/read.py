"""Read: the tensor that a patched module shows, formed only when a value is needed.

Model code often reads a weight for its dtype, shape or device alone; that must not cost a W'. A
Read answers such questions itself, and becomes W' in any other operation. Writing into it would be
lost, so that is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from peftlite.core.patch import Patch, apply
from peftlite.errors import PeftliteError

_T: Any = Tensor
_METADATA = {
    *(getattr(_T, name).__get__ for name in ("dtype", "shape", "device", "ndim", "layout")),
    *(getattr(_T, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_sparse")),
    *(getattr(_T, name).__get__ for name in ("is_quantized", "is_nested", "itemsize", "nbytes")),
    *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.__len__),
    *(_T.is_floating_point, _T.is_complex, _T.get_device),
}


_OPERATORS = "add sub mul truediv floordiv mod pow and or xor matmul lshift rshift".split()
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in _OPERATORS)}


class Read(Tensor):
    """A tensor with the shape, dtype and device of `raw`, and the value its patches give it."""

    raw: Tensor

    @staticmethod
    def __new__(cls: type[Read], raw: Tensor, patches: Sequence[Patch]) -> Read:
        return Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, device=raw.device)

    def __init__(self, raw: Tensor, patches: Sequence[Patch]):
        self.raw, self._patches = raw, tuple(patches)
        self._formed: dict[tuple[bool, bool], Tensor] = {}

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func == _T.grad.__get__:
            return args[0].raw.grad
        if _writes(func, args, kwargs or {}):
            name = getattr(func, "__name__", str(func))
            if name in ("__get__", "__set__", "__delete__"):
                name = f".{getattr(func, '__self__', func).__name__}"
            raise PeftliteError(
                f"{name} writes, or lets write, into a tensor that patches change: what is read "
                "here is a value of its own, and the writing would be lost. pl.detach first; to "
                "look at the value, use .detach()"
            )
        formed: Any = tree_map_only(Read, _form, (args, kwargs or {}))
        return func(*formed[0], **formed[1])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise PeftliteError(f"{func} reached a patched weight below autograd; use .clone() of it")


def _form(read: Read) -> Tensor:
    # a value formed without gradients is no use to one who needs them
    mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    if mode not in read._formed:
        read._formed[mode] = apply(read._patches, read.raw)
    return read._formed[mode]


def _writes(func: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether `func` writes into a Read, or hands out its storage to be written."""
    name = func.__name__
    if name in ("__set__", "__delete__") or func == Tensor.data.__get__:
        return True
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        first = args[0] if args else None
        return any(isinstance(a, Read) for a in (first if isinstance(first, list) else [first]))
    return isinstance(kwargs.get("out"), Read)

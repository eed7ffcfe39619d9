"""Lazy: a tensor that is shown before it is formed, which it is only when a value is needed.

Model code often reads a weight for its dtype, shape or device alone; that must not cost a value. A
Lazy answers such questions itself, and is formed in any other operation. Writing into what is
formed would be lost, so that is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

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


class Lazy(Tensor):
    """A tensor of the shape, dtype and device of another one, formed when it's needed."""

    kind: ClassVar[str]
    """What it is, in a word."""
    source: Any = None
    """What another library has in its place, whose attributes it shows, too."""

    def __getattr__(self, name: str) -> Any:
        if self.source is None or name.startswith("__"):
            raise AttributeError(f"a {self.kind} tensor has no attribute {name!r}")
        return getattr(self.source, name)

    def form(self) -> Tensor:
        """The value."""
        raise NotImplementedError

    def why_not_written(self) -> str:
        """What to do in place of writing into it."""
        raise NotImplementedError

    @classmethod
    def compute(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What an operation gives that needs values."""
        formed: Any = tree_map_only(cls, cls.form, (args, kwargs))
        return func(*formed[0], **formed[1])

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if written := _written(cls, func, args, kwargs or {}):
            name = getattr(func, "__name__", str(func))
            if name in ("__get__", "__set__", "__delete__"):
                name = f".{getattr(func, '__self__', func).__name__}"
            raise PeftliteError(
                f"{name} writes, or lets write, into a tensor that {written[0].why_not_written()}; "
                "to look at the value, use .detach()"
            )
        return cls.compute(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise PeftliteError(
            f"{func} reached a {cls.kind} weight below autograd; use .clone() of it"
        )


def _written(
    kind: type, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    """What of a kind `func` writes into, or hands out the storage of, to be written."""
    name = func.__name__
    first = next(iter((*args, *kwargs.values())), None)  # `nn.init` is called by keywords alone
    if name in ("__set__", "__delete__") or func == _T.data.__get__:
        return [first]
    given = [kwargs.get("out")]
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    if in_place or kwargs.get("inplace") is True:
        given += first if isinstance(first, list) else [first]
    return [one for one in given if isinstance(one, kind)]

"""Tokens: a tensor (n, …) that knows which delta each of its n has, wherever they are sent.

Experts take some tokens out, multiply with a matrix, and go on number by number. As long as it is
that, tokens are told apart, and a product adds to each what its delta does; or else it is `Lost`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftlite.lazy import Lazy


class Lost(Exception):
    """Tokens can't be told apart any more."""


class Tokens(Tensor):
    """Tokens (n, …), with the number (n,) of the delta that each has, or -1."""

    own: Tensor

    @staticmethod
    def of(x: Tensor, own: Tensor) -> Tensor:
        tokens = x.as_subclass(Tokens)
        tokens.own = own
        return tokens

    @property
    def plain(self) -> Tensor:
        """The same, all alike."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, Lazy) for kind in types):
            return NotImplemented  # the weight says what is made of it
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            of = {id(x.own): x for x in args if isinstance(x, Tokens)}
            if len(of) != 1 or type(found) not in (Tensor, tuple):
                return found
            (x,) = of.values()
            parts = found if isinstance(found, tuple) else (found,)
            own = _own(func, x, args[1:], parts)
            if own is None:
                return found
            told = tuple(cls.of(part, own) for part in parts)
        return told if isinstance(found, tuple) else told[0]


_EACH = {
    *"add radd sub rsub mul rmul div truediv rtruediv pow neg clamp sigmoid tanh exp".split(),
    *"silu gelu relu to float half bfloat16 type_as contiguous clone".split(),
    *"chunk split unsqueeze squeeze expand".split(),
}
_SPREAD = {"view", "reshape", "flatten", "repeat_interleave"}


def _own(func: Any, x: Tokens, more: tuple[Any, ...], found: tuple[Any, ...]) -> Tensor | None:
    """Whose each entry is of what an operation gives; None if that can't be said."""
    own, name = x.own, func.__name__.strip("_")
    lengths = {len(y) if isinstance(y, Tensor) and y.dim() else 0 for y in found}
    if name == "getitem":
        own = _taken(own, *more)
    elif name in _SPREAD:  # entries of one stay side by side
        times, rest = divmod(max(lengths), max(len(own), 1))
        spread = not rest and not any(isinstance(arg, Tensor) for arg in more)
        own = own.repeat_interleave(times) if spread else None
    elif name not in _EACH and not (func == _TURNED and x.dim() > 2):
        return None
    return own if own is not None and lengths == {len(own)} else None


def _taken(own: Tensor, index: Any) -> Tensor | None:
    if isinstance(index, slice) or (isinstance(index, Tensor) and index.dim() == 1):
        return own[index]
    inside = isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis
    return own if inside and not isinstance(index[1], Tensor) else None


_TURNED = Tensor.mT.__get__


def told(x: Tensor) -> Tokens:
    """Tokens, as they are told apart. Raises Lost if they aren't."""
    if isinstance(x, Tokens):
        return x
    raise Lost

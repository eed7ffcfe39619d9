"""Read: the tensor that a patched module shows, formed by its patches when a value is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftlite.core.patch import Patch, apply
from peftlite.lazy import Lazy


class Read(Lazy):
    """A tensor with the shape, dtype and device of `raw`, and the value its patches give it."""

    kind = "patched"
    raw: Tensor

    @staticmethod
    def __new__(cls: type[Read], raw: Tensor, patches: Sequence[Patch]) -> Read:
        return Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, device=raw.device)

    def __init__(self, raw: Tensor, patches: Sequence[Patch]):
        self.raw, self._patches = raw, tuple(patches)
        self.source = getattr(raw, "source", None)
        self._formed: dict[tuple[bool, bool], Tensor] = {}

    def form(self) -> Tensor:
        # a value formed without gradients is no use to one who needs them
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if mode not in self._formed:
            self._formed[mode] = apply(self._patches, self.raw)
        return self._formed[mode]

    def why_not_written(self) -> str:
        return (
            "patches change: what is read here is a value of its own, and the writing would be "
            "lost. pl.detach first"
        )

    @classmethod
    def compute(cls, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func == _GRAD:
            return args[0].raw.grad
        return super().compute(func, args, kwargs)


_T: Any = Tensor
_GRAD = _T.grad.__get__

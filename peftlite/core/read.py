"""Read: the tensor that a patched module shows, formed by its patches when a value is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from peftlite.core.patch import Patch, apply
from peftlite.core.sum import KNOWN, Patched, Sum, answer, expert_of, summed

_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_here = threading.local()


class Read(Patched):
    """A tensor with the shape, dtype and device of `raw`, and the value its patches give it."""

    raw: Tensor

    @staticmethod
    def __new__(cls: type[Read], raw: Tensor, patches: Sequence[Patch]) -> Read:
        return Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, device=raw.device)

    def __init__(self, raw: Tensor, patches: Sequence[Patch]):
        self.raw, self._patches = raw, tuple(patches)
        self.source = getattr(raw, "source", None)
        self._made: dict[Any, Any] = {}

    def form(self) -> Tensor:
        return self._once("value", lambda: apply(self._patches, self.raw))

    def as_sum(self) -> Sum | None:
        """The value as a sum that need not be formed, where it is one."""
        return self._once("sum", lambda: summed(self.raw, self._patches))

    def experts(self) -> Sequence[Tensor]:
        """The matrices of the value, taken apart once, so that gradients are put together once."""
        return self._once("experts", lambda: self.form().unbind())

    def _once(self, what: str, make: Callable[[], Any]) -> Any:
        # what is made without gradients is no use to one who needs them
        key = what, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @classmethod
    def compute(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func == _GRAD:
            return args[0].raw.grad
        found = _by_parts(func, args, kwargs) if func in KNOWN else NotImplemented
        if found is not NotImplemented:
            return found
        if func is _AT and args[0].dim() > 2 and (expert := expert_of(args[1])) is not None:
            return args[0].experts()[expert]
        return super().compute(func, args, kwargs)


def _by_parts(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gives where every read in it is a sum; else NotImplemented."""
    nested = kwargs or any(isinstance(arg, (list, tuple)) for arg in args)
    leaves = tree_leaves((args, kwargs)) if nested else args
    if any(leaf.as_sum() is None for leaf in leaves if isinstance(leaf, Read)):
        return NotImplemented
    if not nested:  # as an expert is taken out, for each expert: pytree takes longer than that
        return answer(func, tuple(a.as_sum() if isinstance(a, Read) else a for a in args), {})
    sums: Any = tree_map_only(Read, Read.as_sum, (args, kwargs))
    return answer(func, *sums)


def shown(raw: Tensor, patches: Sequence[Patch]) -> Read:
    """What is read of a tensor; within a call of its module, what was read of it before."""
    reads: dict[Any, Read] | None = getattr(_here, "reads", None)
    if reads is None:
        return Read(raw, patches)
    # a checkpointed part of a call is run again by itself, and must find nothing of the others
    saves = _saved_tensors_hooks(True) if torch.is_grad_enabled() else None
    key = id(raw), tuple(patches), saves
    if key not in reads or reads[key].raw is not raw:
        reads[key] = Read(raw, patches)
    return reads[key]


def within(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module's own call, in which every tensor is read once."""
    before = getattr(_here, "reads", None)
    _here.reads = {}
    try:
        return call(*args, **kwargs)
    finally:
        _here.reads = before


_T: Any = Tensor
_GRAD, _AT = _T.grad.__get__, _T.__getitem__

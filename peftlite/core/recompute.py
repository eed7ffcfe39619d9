"""Recompute: activation checkpointing runs a call twice, and both runs must choose alike.

The second run comes in the backward pass: when the `with` around the first may have ended, and on a
GPU in another thread. So a choice that the first run met is put in force again for the second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any
from weakref import WeakSet

import torch
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint

from peftlite.errors import PeftliteError

# by names of our own: torch.compile leaves a function alone that doesn't name torch
backward_pass: Callable[[], int] = torch._C._current_graph_task_id
"""The backward pass that the code which asks runs in; -1 outside of any."""
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_is_grad_enabled, _is_inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_is_fwd_grad_enabled = torch._C._is_fwd_grad_enabled

_HOOK = checkpoint._checkpoint_hook.__qualname__
_REENTRANT = checkpoint.CheckpointFunction.forward.__code__
_FILE = _REENTRANT.co_filename
_COMPILED = "_aot_autograd"
"""In the names of files that run what is compiled, as one Function: it is never run again."""


def at_work() -> bool:
    """Whether this code may be in a checkpointed call. Nearly always it's a quick no."""
    return _saved_tensors_hooks(True) is not None or in_function()


def in_function() -> bool:
    """Whether this code is in the forward of an autograd.Function, as the reentrant kind is."""
    return not (_is_grad_enabled() or _is_fwd_grad_enabled() or _is_inference())


def is_cut_off(host: CodeType) -> bool:
    """Whether gradients would reach this code, but for a Function whose inputs need none.

    host: the code of calls that have `grad`, whether gradients were enabled where they began.
    """
    cut, frame = False, sys._getframe(1)
    while frame is not None:
        own = frame.f_locals if frame.f_code is host or _is_forward(frame.f_code) else {}
        if isinstance(ctx := own.get("ctx"), FunctionCtx):
            cut = not any(ctx.needs_input_grad)
        elif cut and "grad" in own:
            cut = own["grad"]
        frame = frame.f_back
    return cut


def _is_forward(code: CodeType) -> bool:
    return code.co_name == "forward" and code.co_varnames[:1] == ("ctx",)


def around() -> WeakSet[Any]:
    """The checkpointed calls that this code is in."""
    return WeakSet(region for region, _ in _regions(())) if at_work() else WeakSet()


def carry(known: WeakSet[Any], again: Callable[[], AbstractContextManager[Any]]) -> None:
    """Has the checkpointed calls that this code is in, but the known, run again in `again()`.

    Raises PeftliteError if it is not torch's own checkpointing that is at work.
    """
    for region, slot in _regions(known):
        known.add(region)
        setattr(region, slot, _Again(getattr(region, slot), again))


class _Again:
    """The second run of a checkpointed call, in the context of the first."""

    def __init__(self, run: Callable[..., Any], context: Callable[[], AbstractContextManager[Any]]):
        self.run, self.context = run, context

    def __call__(self, *args: Any) -> Any:
        with self.context():
            return self.run(*args)


def _regions(known: Collection[Any]) -> list[tuple[Any, str]]:
    """What torch keeps of each checkpointed call around this code, and where it keeps its rerun.

    From the innermost out to the first known one, or to the rerun that this code is in.
    """
    found: list[tuple[Any, str]] = []
    frame, compiled = sys._getframe(1), False
    while frame is not None and frame.f_code is not _Again.__call__.__code__:
        if frame.f_code is _REENTRANT:
            found.append((frame.f_locals["ctx"], "run_function"))
        elif frame.f_code.co_filename == _FILE and "gen" in frame.f_locals:
            inside = frame.f_locals["gen"].gi_frame.f_locals
            found.append((inside["new_frame"], "recompute_fn"))
        if found and found[-1][0] in known:
            return found[:-1]
        compiled = compiled or _COMPILED in frame.f_code.co_filename
        frame = frame.f_back
    hooks = _saved_tensors_hooks(True)
    if (
        not (found or compiled)
        and frame is None
        and (hooks is None or hooks[0].__qualname__.startswith(_HOOK))
    ):
        raise PeftliteError(
            "this call may run again in the backward pass, where a choice made by pl.using can't "
            "be seen, and it isn't torch.utils.checkpoint.checkpoint that runs it: choose with "
            "pl.use or pl.view"
        )
    return found

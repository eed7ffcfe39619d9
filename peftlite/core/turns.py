"""Turns: verbs that change one model come one after another, and a save waits for a step's end.

A model's calls take no lock: see `choice.py`. Its verbs take the model's, which the thread that has
it may take again. An optimizer's step takes none either: it says that it runs, and waits only for
the save of what it would write to.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

Verb = TypeVar("Verb", bound=Callable[..., Any])

_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_guard = threading.Lock()


def lock_of(root: nn.Module) -> Any:
    """The lock of the model whose deltas hang, or would hang, on a module."""
    with _guard:
        return _locks.setdefault(root, threading.RLock())


def turn(model: Any) -> AbstractContextManager[Any]:
    """A `with` in which no other thread changes a model; nothing, if it's no model at all."""
    return lock_of(_root_of(model)) if isinstance(model, nn.Module) else nullcontext()


def in_turn(verb: Verb) -> Verb:
    """For a verb, whose model comes first: while it runs, no other thread changes the model."""
    first = verb.__code__.co_varnames[0]

    @functools.wraps(verb)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with turn(args[0] if args else kwargs.get(first)):
            return verb(*args, **kwargs)

    return cast(Verb, alone)


def _root_of(model: nn.Module) -> nn.Module:
    """The module that a model's deltas hang on, or would hang on."""
    left = [model]
    while left:
        module = left.pop()
        if getattr(vars(module).get("peftlite"), "registry", None) is not None:
            return module
        left += [child for child in module._modules.values() if child is not None]
    return model


# -- an optimizer's steps, and who can't have one now

_steps: WeakValueDictionary[int, Optimizer] = WeakValueDictionary()  # those that run, by thread
_holds: list[_Hold] = []


class _Hold:
    """Tensors that no other thread's optimizer is to write to."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.thread, self.over = threading.get_ident(), threading.Event()
        self.ids = frozenset(map(id, tensors))

    def concerns(self, thread: int, optimizer: Optimizer) -> bool:
        groups = optimizer.param_groups if thread != self.thread else ()
        return any(id(p) in self.ids for group in groups for p in group["params"])


@contextmanager
def at_rest(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Runs its body while no optimizer of another thread is in a step that writes to them."""
    hold = _Hold(tensors)
    _holds.append(hold)
    try:
        while any(hold.concerns(t, optimizer) for t, optimizer in _in_progress().items()):
            time.sleep(2e-4)
        yield
    finally:
        _holds.remove(hold)
        hold.over.set()


def _in_progress() -> dict[int, Optimizer]:
    """The steps that run, by thread; one that failed never said that it ended."""
    frames = sys._current_frames()
    del frames[threading.get_ident()]  # a frame that holds itself is freed late
    return {t: optimizer for t, optimizer in _steps.items() if _steps_in(frames.get(t))}


def _steps_in(frame: Any) -> bool:
    while frame is not None and frame.f_code is not _STEP:
        frame = frame.f_back
    return frame is not None


_STEP = Optimizer.profile_hook_step(lambda _: None).__code__


def _begin(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    thread = threading.get_ident()
    while True:
        # said first and looked at after, as a hold is: either sees the other
        _steps[thread] = optimizer
        hold = next((hold for hold in [*_holds] if hold.concerns(thread, optimizer)), None)
        if hold is None:
            return
        del _steps[thread]
        hold.over.wait()


def _end(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        _steps.pop(threading.get_ident(), None)


@functools.cache
def watch_steps() -> None:
    """Has optimizers say when they step; once, when there is a first delta."""
    register_optimizer_step_pre_hook(_begin)
    register_optimizer_step_post_hook(_end)


def _in_a_child() -> None:
    # a thread that held a lock when the process forked is not in the child
    global _guard
    _guard = threading.Lock()
    _locks.clear()
    _steps.clear()
    _holds.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_child)

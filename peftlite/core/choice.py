"""Choice: which deltas of a model are active, here and now.

A model has one standing choice, a plain attribute that `torch.compile` guards. A context (a thread,
an async task) may have its own within a `with`, held in a context variable, which `torch.compile`
can't see: while one is in force, compiled code steps aside for eager code, or refuses under
`fullgraph=True`. Either way a choice is honoured or refused, never stale. A call of the model keeps
the choice that it began with to its end, whatever another thread chooses meanwhile.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import nn

from peftlite.core import recompute
from peftlite.errors import PeftliteError

Names = tuple[str, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class NamesByRow:
    """One choice per batch row."""

    rows: tuple[Names, ...]


class Hidden:
    """A value scoped to a context, as code under compilation finds it: it can't be read."""


HIDDEN = Hidden()


@dataclass(eq=False)
class Scope(Generic[T]):
    """A value in force inside a `with`, for the context that opened it.

    It holds in the backward pass that it was opened in, or outside of any: a backward pass may run
    in another thread, long after.
    """

    of: Scoped[T]
    value: T
    backward_pass: int = field(default_factory=recompute.backward_pass)
    checkpoints: WeakSet[Any] = field(default_factory=recompute.around)
    open: bool = True


_scopes: ContextVar[tuple[Scope[Any], ...]] = ContextVar("peftlite", default=())
_lock = threading.Lock()


def _in_a_child() -> None:
    global _lock
    _lock = threading.Lock()  # who held it when the process forked is not there to let go


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_child)


class Scoped(Generic[T]):
    """A value that stands for everyone, and that a context may have otherwise within a `with`."""

    scoped: bool
    apart: bool

    def __init__(self, standing: T):
        self.standing = standing  # replaced whole, never changed: a reader sees the old or the new
        self.scoped = False  # whether a scope is open anywhere
        self.apart = False  # whether code may find another value than the standing one in force
        self.traced: T | None = None  # of a scope opened inside a compiled region
        self.calls: dict[int, T] = {}  # what each thread's call of the model began with
        self._open: set[Scope[T]] = set()

    def now(self) -> T | Hidden:
        """The value in force for the code that asks."""
        if not self.scoped:
            return self.unscoped()
        if torch.compiler.is_dynamo_compiling():
            return HIDDEN if self.traced is None else self.traced
        here = recompute.backward_pass()
        for scope in reversed(_scopes.get()):
            if scope.of is self and scope.open and scope.backward_pass == here:
                if recompute.at_work():
                    recompute.carry(scope.checkpoints, functools.partial(self.scope, scope.value))
                return scope.value
        return self.unscoped()

    def unscoped(self) -> T:
        """The value in force for code outside of every scope."""
        return self.standing

    @contextmanager
    def scope(self, value: T) -> Iterator[None]:
        """A `with` that gives the value to the thread or task that opens it, and to no other."""
        # a generator: code that torch.compile leaves eager would have a plain `__enter__` compiled
        if torch.compiler.is_dynamo_compiling():
            outer = self.traced, self.scoped, self.apart
            self.traced, self.scoped, self.apart = value, True, True
            try:
                yield
            finally:
                self.traced, self.scoped, self.apart = outer
            return
        scope = Scope(self, value)
        try:  # an interrupt may come at any line, and none of them leaves it open
            with _lock:
                self._open.add(scope)
                self._settle()
            _scopes.set((*_scopes.get(), scope))
            yield
        finally:
            scope.open = False  # also where the context was copied, as it is for a new task
            with _lock:
                self._open.discard(scope)
                self._settle()
            _scopes.set(tuple(other for other in _scopes.get() if other.open))

    def _settle(self) -> None:
        """Says whether a look at `standing` is enough; within the lock."""
        self.scoped = bool(self._open)
        began = [*self.calls.values()]
        self.apart = self.scoped or any(value is not self.standing for value in began)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model begins outside of every scope
        return {"standing": self.standing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Scoped.__init__(self, state["standing"])


class Choice(Scoped["Names | NamesByRow"]):
    """What is active in one model. Every patched module of the model holds the same one."""

    apart: bool

    standing: Names

    def __init__(self, standing: Names = (), fixed: bool = False):
        super().__init__(standing)
        self.fixed = fixed  # a view's choice can't be changed
        self._closed: tuple[int, threading.Event] | None = None  # by whom, and when that is over

    def begin(self, thread: int) -> None:
        """A call of the model begins, whose choice stays; while the base is written to, it waits.

        Nothing is locked: who changes the choice says so in `apart` first, and looks at the calls
        after, so that either sees the other.
        """
        while True:
            names = self.calls[thread] = self.standing
            closed = self._closed
            if closed is not None and closed[0] != thread:
                del self.calls[thread]
                closed[1].wait()
            elif self.standing is names:
                return

    def end(self, thread: int) -> None:
        """The call ends that a thread began."""
        del self.calls[thread]
        if self.apart:
            with _lock:
                self._settle()

    def unscoped(self) -> Names | NamesByRow:
        if torch.compiler.is_dynamo_compiling():
            return self.standing
        return self.calls.get(threading.get_ident(), self.standing)

    def publish(self, names: Names) -> None:
        """Makes names the standing choice: of calls that begin now, and of the caller's own."""
        me = threading.get_ident()
        with _lock:
            self.apart = True
            if me in self.calls:
                self.calls[me] = names
            self.standing = names
            began = [*self.calls.values()]
            self.apart = self.scoped or any(value is not names for value in began)

    @contextmanager
    def closed(self, root: nn.Module) -> Iterator[None]:
        """Runs its body once the calls of other threads have ended; those to come wait for it.

        Raises PeftliteError if a call of the model goes on and on.
        """
        opened = threading.Event()
        self._closed = threading.get_ident(), opened
        try:
            self.await_calls(root)
            yield
        finally:
            self._closed = None
            opened.set()

    def await_calls(self, root: nn.Module) -> None:
        """Waits until no other thread is in a call of the model, or of one of its modules."""
        until = time.monotonic() + PATIENCE
        while self._in_progress(root):
            if time.monotonic() > until:
                raise PeftliteError(
                    f"another thread has been in a call of the model for {PATIENCE:g} s, and what "
                    "that reads can't change under it: do this when the call has ended"
                )
            time.sleep(2e-4)

    def _in_progress(self, root: nn.Module) -> bool:
        frames = sys._current_frames()
        del frames[threading.get_ident()]  # or this frame would hold itself, and so the model
        modules = set(map(id, root.modules())) if frames else set()
        return any(t in self.calls or _calls(frame, modules) for t, frame in frames.items())

    def __getstate__(self) -> dict[str, Any]:
        return {"standing": self.standing, "fixed": self.fixed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


PATIENCE = 60.0
"""Seconds for which a verb waits for the calls of other threads."""


def _calls(frame: Any, modules: set[int]) -> bool:
    """Whether a thread is in a call of one of the modules, and not waiting to begin it."""
    found = False
    while frame is not None:
        if frame.f_code is Choice.begin.__code__:
            return False
        found = found or (frame.f_code is _CALL and id(frame.f_locals.get("self")) in modules)
        frame = frame.f_back
    return found


_CALL = nn.Module._call_impl.__code__


SCOPED = (
    "a choice made by pl.using is scoped to a context, which fullgraph code can't see; open it "
    "inside the compiled function, or choose with pl.use or pl.view"
)


def uncompiled(fn: Callable[..., Any], why: str = SCOPED) -> Callable[..., Any]:
    """`fn`, for what compiled code can't do: run eagerly by it, an error under fullgraph."""
    disabled: Callable[..., Any] | None = None

    def eager(*args: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(fn)
        return disabled(*args)

    # the marks that torch.compiler.disable leaves; calling it here would import the compiler, 1 s
    vars(eager).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=why)
    return eager

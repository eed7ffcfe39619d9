"""Choice: which deltas of a model are active, here and now.

A model has one standing choice, a plain attribute that `torch.compile` guards. A context (a thread,
an async task) may have its own within a `with`, held in a context variable, which `torch.compile`
can't see: while one is in force, compiled code steps aside for eager code, or refuses under
`fullgraph=True`. Either way a choice is honoured or refused, never stale.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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


class Scoped(Generic[T]):
    """A value that stands for everyone, and that a context may have otherwise within a `with`."""

    def __init__(self, standing: T):
        self.standing = standing  # replaced whole, never changed: a reader sees the old or the new
        self.scoped = False  # whether a scope is open anywhere
        self.traced: T | None = None  # of a scope opened inside a compiled region
        self._scopes_open = 0

    def now(self) -> T | Hidden:
        """The value in force for the code that asks."""
        if not self.scoped:
            return self.standing
        if torch.compiler.is_dynamo_compiling():
            return HIDDEN if self.traced is None else self.traced
        here = recompute.backward_pass()
        for scope in reversed(_scopes.get()):
            if scope.of is self and scope.open and scope.backward_pass == here:
                if recompute.at_work():
                    recompute.carry(scope.checkpoints, functools.partial(self.scope, scope.value))
                return scope.value
        return self.standing

    @contextmanager
    def scope(self, value: T) -> Iterator[None]:
        """A `with` that gives the value to the thread or task that opens it, and to no other."""
        # a generator: code that torch.compile leaves eager would have a plain `__enter__` compiled
        if torch.compiler.is_dynamo_compiling():
            outer = self.traced, self.scoped
            self.traced, self.scoped = value, True
            try:
                yield
            finally:
                self.traced, self.scoped = outer
            return
        scope = Scope(self, value)
        self._count(1)
        _scopes.set((*_scopes.get(), scope))
        try:
            yield
        finally:
            scope.open = False  # also where the context was copied, as it is for a new task
            _scopes.set(tuple(other for other in _scopes.get() if other.open))
            self._count(-1)

    def _count(self, change: int) -> None:
        with _lock:
            self._scopes_open += change
            self.scoped = self._scopes_open > 0

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model begins outside of every scope
        return {"standing": self.standing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Scoped.__init__(self, state["standing"])


class Choice(Scoped["Names | NamesByRow"]):
    """What is active in one model. Every patched module of the model holds the same one."""

    standing: Names

    def __init__(self, standing: Names = (), fixed: bool = False):
        super().__init__(standing)
        self.fixed = fixed  # a view's choice can't be changed

    def __getstate__(self) -> dict[str, Any]:
        return {"standing": self.standing, "fixed": self.fixed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def uncompiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, for a hidden choice: run eagerly by compiled code, an error under fullgraph."""
    why = (
        "a choice made by pl.using is scoped to a context, which fullgraph code can't see; open "
        "it inside the compiled function, or choose with pl.use or pl.view"
    )

    disabled: list[Callable[..., Any]] = []

    def eager(*args: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(fn))
        return disabled[0](*args)

    # the marks that torch.compiler.disable leaves; calling it here would import the compiler, 1 s
    vars(eager).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=why)
    return eager


def by_rows(
    run: Callable[..., Any], choice: Choice, rows: NamesByRow, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Runs the rows that share a choice together, and puts the results back in order.

    An argument is split if it is a tensor with one row per entry of `rows`; every tensor that comes
    back must again have one row per row that went in.
    """
    b = len(rows.rows)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    split = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == b for leaf in leaves]
    if not any(split):
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        raise PeftliteError(
            f"rows= names {b} rows, but no tensor of this call has {b} rows in its first "
            f"dimension; the shapes are {shapes}"
        )
    results, order = [], []
    for names in dict.fromkeys(rows.rows):
        picked = [i for i, own in enumerate(rows.rows) if own == names]
        part = [
            leaf[torch.tensor(picked, device=leaf.device)] if own else leaf
            for leaf, own in zip(leaves, split, strict=True)
        ]
        some_args, some_kwargs = pytree.tree_unflatten(part, spec)
        with choice.scope(names):
            results.append((len(picked), run(*some_args, **some_kwargs)))
        order += picked
    back = torch.tensor(order).argsort()
    flat = [pytree.tree_flatten(result) for _, result in results]
    if any(other != flat[0][1] for _, other in flat):
        raise _cannot_put_back("of another structure for each group of rows")
    counts = [count for count, _ in results]
    together = [
        _together(parts, counts, back)
        for parts in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return pytree.tree_unflatten(together, flat[0][1])


def _together(parts: tuple, counts: list[int], back: Tensor) -> Any:
    """One output of several groups, as one output in the order of the batch."""
    if all(isinstance(p, Tensor) and p.dim() > 0 for p in parts):
        alike = len({p.shape[1:] for p in parts}) == 1
        if alike and [p.shape[0] for p in parts] == counts:
            return torch.cat(parts)[back.to(parts[0].device)]
    elif all(p is parts[0] or (not isinstance(p, Tensor) and p == parts[0]) for p in parts):
        return parts[0]
    shown = f"a tensor of shape {tuple(parts[0].shape)}" if isinstance(parts[0], Tensor) else ""
    raise _cannot_put_back(shown or f"a {type(parts[0]).__name__}")


def _cannot_put_back(what: str) -> PeftliteError:
    return PeftliteError(
        f"rows= can't put back an output that has no row per input row ({what}): ask the model "
        "for outputs per row (no loss, no cache: use_cache=False), or call it once per delta"
    )

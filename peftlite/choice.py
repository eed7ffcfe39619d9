"""Choice: which deltas of a model are active, here and now.

A model has one standing choice, a plain attribute that `torch.compile` guards. A context (a thread,
an async task) may have its own within a `with`, held in a context variable, which `torch.compile`
can't see: while one is in force, compiled code steps aside for eager code, or refuses under
`fullgraph=True`. Either way a choice is honoured or refused, never stale.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftlite.errors import PeftliteError

Names = tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """One choice per batch row."""

    rows: tuple[Names, ...]


class Hidden:
    """A choice scoped to a context, as code under compilation finds it: it can't be read."""


HIDDEN = Hidden()


_EMPTY: Mapping[Choice, Names | Rows] = MappingProxyType({})
_scopes: ContextVar[Mapping[Choice, Names | Rows]] = ContextVar("peftlite", default=_EMPTY)
_lock = threading.Lock()


class Choice:
    """What is active in one model. Every patched module of the model holds the same one."""

    def __init__(self, standing: Names = (), fixed: bool = False):
        self.standing = standing  # replaced whole, never changed: a reader sees the old or the new
        self.fixed = fixed  # a view's choice can't be changed
        self.scoped = False  # whether a scope is open anywhere
        self.traced: Names | Rows | None = None  # a scope opened inside a compiled region
        self._scopes_open = 0

    def now(self) -> Names | Rows | Hidden:
        """The choice in force for the code that asks."""
        if not self.scoped:
            return self.standing
        if self.traced is not None:
            return self.traced
        if torch.compiler.is_dynamo_compiling():
            return HIDDEN
        return _scopes.get().get(self, self.standing)

    def scope(self, names: Names | Rows) -> Scope:
        """A context manager in which the choice is `names`, for this context alone."""
        return Scope(self, names)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model begins outside of every scope
        return {"standing": self.standing, "fixed": self.fixed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class Scope:
    """A choice in force inside a `with`, seen by this context alone."""

    def __init__(self, choice: Choice, names: Names | Rows):
        self.choice, self.names = choice, names
        self.outer: Any = None

    def __enter__(self) -> None:
        choice = self.choice
        if torch.compiler.is_dynamo_compiling():
            self.outer = choice.traced, choice.scoped
            choice.traced, choice.scoped = self.names, True
            return
        with _lock:
            choice._scopes_open += 1
            choice.scoped = True
        self.outer = _scopes.set({**_scopes.get(), choice: self.names})

    def __exit__(self, *_: object) -> None:
        choice = self.choice
        if torch.compiler.is_dynamo_compiling():
            choice.traced, choice.scoped = self.outer
            return
        _scopes.reset(self.outer)
        with _lock:
            choice._scopes_open -= 1
            choice.scoped = choice._scopes_open > 0


def uncompiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, for a hidden choice: run eagerly by compiled code, an error under fullgraph."""
    why = (
        "a choice made by pl.using is scoped to a context, which fullgraph code can't see; open "
        "it inside the compiled function, or choose with pl.use or pl.view"
    )

    def eager(*args: Any) -> Any:
        return torch.compiler.disable(fn)(*args)

    # the marks that torch.compiler.disable leaves; calling it here would import the compiler, 1 s
    vars(eager).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=why)
    return eager


def by_rows(
    run: Callable[..., Any], choice: Choice, rows: Rows, args: tuple, kwargs: dict[str, Any]
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
        if [p.shape[0] for p in parts] == counts:
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

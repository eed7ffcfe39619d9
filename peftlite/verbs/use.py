"""use, using and view: choosing which deltas are active."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from torch import nn

from peftlite.core.choice import Names, NamesByRow
from peftlite.core.delta import Delta, Registry
from peftlite.core.find import changeable, named, require
from peftlite.core.tensors import is_sharded
from peftlite.core.turns import in_turn
from peftlite.errors import PeftliteError

Choosable: TypeAlias = "str | Delta | Sequence[str | Delta] | None"
"""A delta or its name, several in the order in which they apply, or None, the base."""


@in_turn
def use(model: nn.Module, names: Choosable) -> None:
    """Makes a delta, or several in that order, or none (the base), the model's standing choice.

    It holds in every thread. It doesn't change what is trainable. Raises PeftliteError.

    Example:
        model = nn.Linear(4, 2)
        pl.attach(model, pl.LoRA(rank=2), name="sql")
        pl.use(model, None)  # the base, until another is chosen
    """
    _, registry = require(model)
    changeable(registry)
    registry.choice.publish(_names(registry, names))


def using(
    model: nn.Module,
    names: Choosable = None,
    *,
    rows: Sequence[Choosable] | None = None,
) -> AbstractContextManager[None]:
    """A `with` in which the choice is `names`, or one per batch row, for this context alone.

    Threads and async tasks never see one another's. With `rows`, the outermost patched module that
    is called runs each group of equal rows by itself and puts the results back: every tensor
    argument with `len(rows)` as its first dimension is split.
    `torch.compile`d code honours it by running eagerly, and refuses it under `fullgraph=True`; to
    compile it in, open it inside the compiled function. Raises PeftliteError.

    Example:
        model = nn.Linear(4, 2)
        pl.attach(model, pl.LoRA(rank=2), name="sql")
        with pl.using(model, rows=["sql", None]):
            y = model(torch.randn(2, 4))
    """
    _, registry = require(model)
    changeable(registry)
    if rows is None:
        return registry.choice.scope(_names(registry, names))
    if names is not None or not isinstance(rows, list | tuple) or not rows:
        raise PeftliteError(
            f"rows= is a list with one choice per batch row, in place of a name: not {rows!r}"
        )
    return registry.choice.scope(NamesByRow(tuple(_names(registry, row) for row in rows)))


@in_turn
def view(model: nn.Module, names: Choosable) -> Any:
    """A second face of the model: the same parameters and buffers, its choice fixed to `names`.

    Two views compile once each, export, and serve two threads. What trains or loads into one is
    seen by all. Attach, detach, choose and merge on the model itself. Raises PeftliteError.

    Example:
        model = nn.Linear(4, 2)
        pl.attach(model, pl.LoRA(rank=2), name="sql")
        base, sql = pl.view(model, None), pl.view(model, "sql")
    """
    _, registry = require(model)
    checked = _names(registry, names)
    if any(map(is_sharded, model.parameters())):
        raise PeftliteError("a model under fully_shard can't be copied, so it can have no view")
    shared = [*model.parameters(), *model.buffers(), *registry.originals.values()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    choice = require(twin)[1].choice
    choice.standing, choice.fixed = checked, True
    registry.views.add(choice)
    return twin


def _names(registry: Registry, names: Any) -> Names:
    if names is None:
        return ()
    if not isinstance(names, str | list | tuple | Delta):
        raise PeftliteError(
            f"a choice is a delta or its name, a list of these, or None: not {names!r}"
        )
    given = names if isinstance(names, list | tuple) else (names,)
    chosen = tuple(named(registry, each).name for each in given)
    for name in chosen:
        if name in registry.merged:
            raise PeftliteError(
                f"{name!r} is merged into the base, so it is on already: pl.unmerge it to choose it"
            )
    if len(set(chosen)) < len(chosen):
        raise PeftliteError(f"{list(chosen)} names a delta twice; each applies once")
    return chosen

"""load and inspect: a delta from a file of any known format, checked in full before it is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from peftlite.core.attach import commit
from peftlite.core.delta import Delta
from peftlite.core.site import Site, sites, statistics
from peftlite.core.turns import turn
from peftlite.errors import PeftliteError
from peftlite.io.content import Content, Info
from peftlite.io.files import as_path
from peftlite.io.fitting import CheckBase, check_mode, fitted
from peftlite.io.formats import format_of
from peftlite.io.hub import located
from peftlite.io.names import as_here


def inspect(path: str | os.PathLike[str], *, revision: str | None = None) -> Info:
    """What is in a file, without a model; also in one on the hub, as `load` has it.

    Raises FileError.

    Example:
        pl.save(pl.attach(nn.Linear(4, 2), pl.LoRA(rank=2)), "sql.safetensors")
        print(pl.inspect("sql.safetensors"))
    """
    file = located(path, revision)
    info = format_of(file.path).inspect(file.path)
    name = info.name if info.base else file.name or info.name
    return replace(info, name=name, source="" if file.source is None else str(file.source))


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    revision: str | None = None,
    trainable: bool = False,
    check_base: CheckBase = "error",
) -> Delta:
    """Attaches the delta in a file and makes it the standing choice.

    Everything is checked before the model is touched: that every site is there, that every tensor
    fits and none is left over, that all values are finite, and that the base has the very weights
    the delta was made for. Tensors are read one at a time.

    Args:
        path: a file or a folder; or else `ORG/NAME[/PATH][@REVISION]` on the hub, of which nothing
            is fetched but safetensors and their settings.
        name: the delta's name in this model; the one it was saved with if None.
        revision: a branch, a tag or a commit on the hub.
        trainable: whether its parameters get gradients.
        check_base: what to do if the base's weights differ: raise, warn, or not look.

    Raises:
        BaseMismatchError: the delta was made for other weights.
        FileError: the file is no delta, is damaged, or doesn't fit.
        PeftliteError: the name is taken.

    Example:
        model = nn.Linear(4, 2)
        pl.save(pl.attach(model, pl.LoRA(rank=2)), "sql.safetensors")
        sql = pl.load(model, "sql.safetensors", name="sql", trainable=True)
    """
    check_mode(check_base)
    if isinstance(path, nn.Module):
        raise PeftliteError("load takes the model first, then the path")
    file = located(path, revision)  # before the model's turn: the hub takes its time
    with turn(model):
        everything = [*sites(model), *statistics(model)]
        content = _content(file.path, model, everything)
        if name is None and content.base is None:
            name = file.name
        content = content if name is None else replace(content, name=name)
        delta = fitted(content, file.path, everything, check_base, model)
        delta.requires_grad_(bool(trainable))
        return commit(model, delta)


def read(model: nn.Module, path: str | os.PathLike[str], check_base: CheckBase) -> Delta:
    """The delta in a file, checked as `load` checks it, attached to nothing."""
    check_mode(check_base)
    path, everything = as_path(path), [*sites(model), *statistics(model)]
    return fitted(_content(path, model, everything), path, everything, check_base)


def _content(path: Path, model: nn.Module, everything: Sequence[Site]) -> Content:
    """What a file says, by the model's names."""
    return as_here(format_of(path).read(path, model, everything), model, everything)

"""Source: what a bank loads: a file, a delta or a method, as a delta that is checked."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftlite.core import site
from peftlite.core.assign import methods_in
from peftlite.core.attach import new_delta
from peftlite.core.delta import Delta
from peftlite.core.patch import Method
from peftlite.core.site import whole_address
from peftlite.errors import BaseMismatchError, FileError, PeftliteError
from peftlite.io.fingerprint import fingerprints
from peftlite.io.fitting import CheckBase, check_mode
from peftlite.io.hub import located
from peftlite.io.load import read
from peftlite.table import listed, short


@dataclass(frozen=True)
class Origin:
    """A delta's file, or folder, and what tells it from what it is after a change."""

    path: Path
    files: tuple[tuple[str, int, int, int], ...]

    @classmethod
    def of(cls, path: Path) -> Origin:
        files = sorted(path.iterdir()) if path.is_dir() else [path] * path.exists()
        stats = [(file.name, file.stat()) for file in files]
        return cls(path, tuple((n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in stats))


def delta_of(
    model: nn.Module, name: str, source: Any, check_base: CheckBase
) -> tuple[Delta, Origin | None]:
    """A delta for the model, attached to nothing, and the file it came from.

    Raises PeftliteError, FileError or BaseMismatchError.
    """
    check_mode(check_base)
    if isinstance(source, str | os.PathLike):
        origin = Origin.of(located(source).path)  # as it is before it's read
        return read(model, origin.path, check_base), origin
    if isinstance(source, Delta):
        return _ours(model, source, check_base), None
    if isinstance(source, Method | list | tuple):
        return new_delta(model, methods_in(source), name), None
    raise PeftliteError(
        f"a bank loads a file, a delta, or a method to begin with: not {short(source)}"
    )


def _ours(model: nn.Module, delta: Delta, check_base: CheckBase) -> Delta:
    """A delta of this model or of a copy, at the sites of this one. Raises PeftliteError."""
    if delta.merged:
        raise PeftliteError(f"{delta.name!r} is merged into its base: pl.unmerge it first")
    found, missing = site.locate(site.sites(model), delta.placed)
    if missing:
        raise PeftliteError(
            f"{delta.name!r} is of a model with other sites; here there is no {listed(missing)}"
        )
    for placed in delta.placed.values():
        placed.check()
    pairs = {
        whole_address(address): (placed.site.whole, found[address].whole)
        for address, placed in delta.placed.items()
        if not placed.site.is_call and placed.site.whole is not found[address].whole
    }
    if check_base != "off":
        _same_base(delta, pairs, check_base)
    ours = [replace(placed, site=found[address]) for address, placed in delta.placed.items()]
    return Delta(delta.name, delta.methods, ours)


def _same_base(
    delta: Delta, pairs: dict[str, tuple[Tensor, Tensor]], check_base: CheckBase
) -> None:
    digests = list(fingerprints((t, "sha256") for pair in pairs.values() for t in pair))
    both = zip(pairs, digests[::2], digests[1::2], strict=True)
    wrong = [address for address, theirs, ours in both if theirs != ours]
    message = f"{delta.name!r} is of a model with other base weights: {listed(wrong)} differ"
    if wrong and check_base == "error":
        raise BaseMismatchError(f"{message}; pass check_base='off' to load it all the same")
    if wrong:
        warnings.warn(message, stacklevel=5)


def reread(model: nn.Module, name: str, origin: Origin | None) -> Delta:
    """A delta from the file that it came from. Raises FileError if that has changed."""
    if origin is None:
        raise PeftliteError(f"{name!r} was dropped while it was brought in")
    if Origin.of(origin.path) != origin:
        raise FileError(
            f"{str(origin.path)!r} has changed since {name!r} was loaded from it: load it again"
        )
    return read(model, origin.path, "off")

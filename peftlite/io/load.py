"""load and inspect: a delta from a file of any known format, checked in full before it is there."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from peftlite.core import site, targets
from peftlite.core.assign import Placed, usable
from peftlite.core.attach import check, commit
from peftlite.core.delta import Delta, misfits
from peftlite.core.site import Site, whole_address
from peftlite.errors import BaseMismatchError, FileError, PeftliteError, TargetError
from peftlite.io import native, peers, peft, standin
from peftlite.io.content import Content, Info
from peftlite.io.files import Tensors, ahead, as_path, is_finite, reason
from peftlite.io.fingerprint import difference, fingerprints, kind_of
from peftlite.table import listed

CheckBase = Literal["error", "warn", "off"]


def inspect(path: str | os.PathLike[str]) -> Info:
    """What is in a file, without a model. Raises FileError.

    Example:
        pl.save(pl.attach(nn.Linear(4, 2), pl.LoRA(rank=2)), "sql.safetensors")
        print(pl.inspect("sql.safetensors"))
    """
    where = as_path(path)
    return _reader(where).inspect(where)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    trainable: bool = False,
    check_base: CheckBase = "error",
) -> Delta:
    """Attaches the delta in a file and makes it the standing choice.

    Everything is checked before the model is touched: that every site is there, that every tensor
    fits and none is left over, that all values are finite, and that the base has the very weights
    the delta was made for. Tensors are read one at a time.

    Args:
        name: the delta's name in this model; the one it was saved with if None.
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
    where = as_path(path)
    content = _reader(where).read(model, where)
    check(model, content.name if name is None else name)
    delta = _delta(model, content, where, name, check_base)
    delta.requires_grad_(bool(trainable))
    return commit(model, delta)


def read(model: nn.Module, path: str | os.PathLike[str], check_base: CheckBase) -> Delta:
    """The delta in a file, checked as `load` checks it, attached to nothing."""
    check_mode(check_base)
    where = as_path(path)
    return _delta(model, _reader(where).read(model, where), where, None, check_base)


def check_mode(check_base: CheckBase) -> None:
    """Raises PeftliteError unless it says what to do about other base weights."""
    if check_base not in get_args(CheckBase):
        raise PeftliteError(f"check_base must be 'error', 'warn' or 'off', not {check_base!r}")


def _delta(
    model: nn.Module, content: Content, where: Path, name: str | None, check_base: CheckBase
) -> Delta:
    sites = _locate(model, content, where)
    methods = [method for method, _ in content.methods]
    # a skeleton without memory first: a file may ask for more than there is
    skeleton = Delta(content.name, methods, _build(content, sites, where, on="meta"))
    if problems := misfits(skeleton.saved(), {k: e.meta for k, e in content.entries.items()}):
        raise FileError(f"{str(where)!r} doesn't fit this model: it has {listed(problems)}")
    if content.base is not None and check_base != "off":
        _check_base(content.base, sites, where, check_base)
    delta = Delta(content.name if name is None else name, methods, _build(content, sites, where))
    _fill(delta, content, where)
    return delta


# each a module with `recognises`, `inspect` and `read`
_FORMATS = (native, peft, *peers.FORMATS)


def _reader(path: Path) -> Any:
    """The format of a file or a folder, by what it holds."""
    file = None if path.is_dir() else Tensors(path)
    for format in _FORMATS:
        if format.recognises(path, file):
            return format
    if file is None:
        raise FileError(f"{str(path)!r} is a folder: name the file in it")
    held = listed([*file.metadata, *file.entries]) or "nothing"
    raise FileError(f"{file.path!r} is no delta of a known format; it holds {held}")


def _locate(model: nn.Module, content: Content, path: Any) -> dict[str, Site]:
    """The sites in the model that a file names, by the address in the file."""
    addresses = [address for _, where in content.methods for address in where]
    if twice := [address for address, count in Counter(addresses).items() if count > 1]:
        raise FileError(f"{str(path)!r} names the site {twice[0]} twice")
    try:
        found, missing = site.locate(model, addresses)
        taken: dict[tuple[int, str], list[Site]] = {}
        for address, where in found.items():
            usable(where)
            standin.compare(content.modules.get(whole_address(address)), where)
            others = taken.setdefault((id(where.module), where.slot), [])
            if any(where.overlaps(other) for other in others):
                raise TargetError(
                    f"{address} and {others[0].address} share entries of one tensor in this model"
                )
            others.append(where)
            if not where.is_call and where.whole.is_meta:
                raise TargetError(
                    f"{address} is on the meta device: give the model its weights, then load"
                )
    except TargetError as error:
        raise FileError(f"{str(path)!r} doesn't fit this model: {error}") from error
    if missing:
        raise FileError(
            f"{str(path)!r} is for a model with other sites: of {len(addresses)}, this one lacks "
            f"{len(missing)}: {listed(missing)}; {targets.nearest(model, missing[0])}"
        )
    return found


def _build(
    content: Content, sites: Mapping[str, Site], path: Any, on: str | None = None
) -> list[Placed]:
    try:
        placed = [
            item
            for method, addresses in content.methods
            for item in Placed.all(
                [dataclasses.replace(sites[a], address=a, on=on) for a in addresses], method
            )
        ]
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, entry in content.entries.items():
            address, _, name = key.rpartition(":")
            shapes.setdefault(address, {})[name] = entry.shape
        for item in placed:
            item.patch.resize(shapes.get(item.site.address, {}))
        return placed
    except (PeftliteError, RuntimeError, OverflowError, TypeError) as error:
        raise FileError(f"{str(path)!r} doesn't fit this model: {reason(error)}") from error


def _fill(delta: Delta, content: Content, path: Any) -> None:
    """Gives a delta the values of a file, one tensor after another."""
    saved = delta.saved()
    own = dict(delta.named_tensors())

    def value(key: str) -> Tensor:
        if key not in saved:
            return torch.zeros_like(own[key].data)  # what training alone needs begins anew
        held = content.get(key)
        if not is_finite(held):
            raise FileError(
                f"{str(path)!r} doesn't fit this model: it has {key} with values that aren't finite"
            )
        # in memory of torch's own: another alignment moves the last bits of a product
        return torch.empty_like(held, device=own[key].device).copy_(held)

    for tensor, given in zip(own.values(), ahead(value, own), strict=True):
        tensor.data = given
    for address, placed in delta.placed.items():
        try:
            placed.patch.verify()
        except ValueError as error:
            raise FileError(
                f"{str(path)!r} doesn't fit this model: {address} has {error}"
            ) from error


def _check_base(
    base: Mapping[str, dict[str, Any]], sites: Mapping[str, Site], path: Any, mode: str
) -> None:
    wrong = []
    wholes = {whole_address(a): where for a, where in sites.items() if not where.is_call}
    if missing := [address for address in wholes if address not in base]:
        raise FileError(f"{str(path)!r} lacks the fingerprint of {missing[0]}")
    found = fingerprints((w.whole, kind_of(base[a]) or "") for a, w in wholes.items())
    for address, mine in zip(wholes, found, strict=True):
        if (how := difference(base[address], mine)) is not None:
            wrong.append(address + how)
    if not wrong:
        return
    message = (
        f"{str(path)!r} was made for other base weights: {len(wrong)} of {len(wholes)} tensors "
        f"differ: {listed(wrong)}"
    )
    if mode == "error":
        raise BaseMismatchError(
            f"{message}; load it into the base it was trained on, or pass check_base='warn'"
        )
    warnings.warn(message, stacklevel=4)

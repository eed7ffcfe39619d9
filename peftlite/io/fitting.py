"""Fitting: a file's content made a delta of one model, once all of it is checked."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from peftlite.core.assign import check_apart, place
from peftlite.core.attach import check
from peftlite.core.delta import Delta, misfits
from peftlite.core.site import Site, locate, whole_address
from peftlite.core.targets import nearest
from peftlite.errors import BaseMismatchError, FileError, PeftliteError, TargetError, reason
from peftlite.io import standin
from peftlite.io.content import Content
from peftlite.io.files import ahead, is_finite
from peftlite.io.fingerprint import difference, fingerprints, kind_of
from peftlite.table import listed

CheckBase = Literal["error", "warn", "off"]


def check_mode(check_base: CheckBase) -> None:
    """Raises PeftliteError unless it says what to do about other base weights."""
    if check_base not in get_args(CheckBase):
        raise PeftliteError(f"check_base must be 'error', 'warn' or 'off', not {check_base!r}")


def fitted(
    content: Content,
    path: Path,
    everything: Sequence[Site],
    check_base: CheckBase,
    model: nn.Module | None = None,
) -> Delta:
    """The delta that a file holds, with its values. Raises FileError, BaseMismatchError.

    Args:
        everything: the model's sites.
        model: what the delta is to be attached to, if anything.
    """
    if content.base is None:  # a peer's, whose factors may be of several dtypes
        content = content.evened()
    skeleton = _skeleton(content, path, everything, model)
    _compare(content, path, skeleton)
    if content.base is not None and check_base != "off":
        _check_base(content.base, skeleton, path, check_base)
    sites = {address: placed.site for address, placed in skeleton.placed.items()}
    with _fits(path, *_UNFIT):
        placed = place(sites, content.methods, content.shapes)
    delta = Delta(content.name, skeleton.methods, placed)
    _fill(delta, content, path)
    return delta


_UNFIT = (PeftliteError, RuntimeError, OverflowError, TypeError)


@contextlib.contextmanager
def _fits(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Says of an error that it is a file's, which doesn't fit."""
    try:
        yield
    except kinds as error:
        raise FileError(f"{str(path)!r} doesn't fit this model: {reason(error)}") from error


def _skeleton(
    content: Content, path: Path, everything: Sequence[Site], model: nn.Module | None
) -> Delta:
    """The delta without memory, since a file may ask for more than there is."""
    if model is not None:
        check(model, content.name)
    addresses = [address for _, own in content.methods for address in own]
    if twice := [address for address, count in Counter(addresses).items() if count > 1]:
        raise FileError(f"{str(path)!r} names the site {twice[0]} twice")
    with _fits(path, TargetError):
        sites, missing = locate(everything, addresses)
        check_apart(sites)
    if missing:
        raise FileError(
            f"{str(path)!r} is for a model with other sites: of {len(addresses)}, this one lacks "
            f"{len(missing)}: {listed(missing)}; {nearest(everything, missing[0])}"
        )
    with _fits(path, *_UNFIT):
        placed = place(sites, content.methods, content.shapes, on="meta")
    return Delta(content.name, [method for method, _ in content.methods], placed)


def _compare(content: Content, path: Path, skeleton: Delta) -> None:
    """Raises FileError if a file's weights or tensors are of other shapes than the model's."""
    for address, placed in skeleton.placed.items():
        with _fits(path, TargetError):
            standin.compare(content.modules.get(whole_address(address)), placed.site)
            if not placed.site.is_call and placed.site.whole.is_meta:
                raise TargetError(
                    f"{address} is on the meta device: give the model its weights, then load"
                )
    if problems := misfits(skeleton.saved(), {k: e.meta for k, e in content.entries.items()}):
        raise FileError(f"{str(path)!r} doesn't fit this model: it has {listed(problems)}")


def _check_base(base: Mapping[str, dict[str, Any]], skeleton: Delta, path: Path, mode: str) -> None:
    """Compares a model's tensors with those that a file was made for."""
    placed = skeleton.placed.items()
    wholes = {whole_address(a): item.site for a, item in placed if not item.site.is_call}
    if missing := [address for address in wholes if address not in base]:
        raise FileError(f"{str(path)!r} lacks the fingerprint of {missing[0]}")
    found = fingerprints((site.whole, kind_of(base[a]) or "") for a, site in wholes.items())
    wrong = [
        address + how
        for address, mine in zip(wholes, found, strict=True)
        if (how := difference(base[address], mine)) is not None
    ]
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


def _fill(delta: Delta, content: Content, path: Path) -> None:
    """Gives a delta the values of a file, one tensor after another."""
    saved = delta.saved()
    own = dict(delta.named_tensors())

    def value(key: str) -> Tensor:
        if key not in saved:
            return torch.zeros_like(own[key].data)  # what training alone needs begins anew
        given = content.get(key)
        if not is_finite(given):
            raise FileError(
                f"{str(path)!r} doesn't fit this model: it has {key} with values that aren't finite"
            )
        # in memory of torch's own, in order: another alignment moves the last bits of a product
        if content.base is not None and _is_alone(given):
            return given.to(own[key].device)
        plain = torch.empty(given.shape, dtype=given.dtype, device=own[key].device)
        return plain.copy_(given)

    for tensor, given in zip(own.values(), ahead(value, own), strict=True):
        tensor.data = given
    for address, placed in delta.placed.items():
        try:
            placed.patch.verify()
        except ValueError as error:
            raise FileError(
                f"{str(path)!r} doesn't fit this model: {address} has {error}"
            ) from error


def _is_alone(tensor: Tensor) -> bool:
    """Whether a tensor has its memory to itself, as one that a file of ours was read into."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes

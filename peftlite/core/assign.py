"""Assign: which method of a delta takes which site, and the patch that it places there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from peftlite.core import targets
from peftlite.core.patch import Method, Patch
from peftlite.core.site import Site, sites, whole_address
from peftlite.core.tensors import is_opaque, is_sharded
from peftlite.errors import PeftliteError, TargetError
from peftlite.table import short


@dataclass(eq=False)
class Placed:
    """One patch of a delta: where it sits and which method made it."""

    site: Site
    method: Method
    patch: Patch
    shape: torch.Size | None  # the whole tensor's, when it was placed; None if it has no say

    @classmethod
    def all(cls, sites: Sequence[Site], method: Method) -> list[Placed]:
        """A patch for each site, its parameters not yet filled. Raises TargetError."""
        kind = type(method).__name__
        for site in sites:
            if not site.rides:
                check_numbers(site, kind)
        patches = method.build_all(sites)
        for site, patch in zip(sites, patches, strict=True):
            if not isinstance(patch, Patch):
                raise PeftliteError(
                    f"{kind}.build gave {short(patch)} for {site.address}: no pl.Patch"
                )
            if not (patch.has_call if site.is_call else patch.has_value):
                need = "call" if site.is_call else "value"
                raise PeftliteError(f"{kind}'s patch needs a `{need}` to sit at {site.address}")
            if not patch.has_call:
                check_numbers(site, kind)
            patch.train(site.module.training)
            patch.slot, patch.index = site.slot, site.index
        return [
            cls(site, method, patch, None if site.is_call else site.whole.shape)
            for site, patch in zip(sites, patches, strict=True)
        ]

    def check(self) -> None:
        """Raises PeftliteError if the model was taken apart under the patch."""
        site = self.site
        if self.shape is not None and site.whole.shape != self.shape:
            raise PeftliteError(
                f"{site.address} is {tuple(site.whole.shape)} now, and was {tuple(self.shape)} "
                "when the delta was attached: pl.detach, then resize, then attach"
            )


def place(
    sites: Mapping[str, Site],
    methods: Iterable[tuple[Method, Sequence[str]]],
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    on: str | None = None,
) -> list[Placed]:
    """The patches of methods at sites that are named one by one. Raises TargetError.

    Args:
        sites: by the address that each goes by.
        shapes: what a file has for a patch's parameters, by address and by name.
        on: the device to build on; each tensor's own if None.
    """
    placed: list[Placed] = []
    for method, addresses in methods:
        taken = [replace(sites[address], address=address, on=on) for address in addresses]
        placed += Placed.all(taken, method)
    for item in placed:
        item.patch.resize(shapes.get(item.site.address, {}))
    return placed


def check_apart(sites: Mapping[str, Site]) -> None:
    """Raises TargetError if one of the sites can't have a patch, or two share entries."""
    taken: dict[tuple[int, str], list[Site]] = {}
    for address, site in sites.items():
        usable(site)
        others = taken.setdefault((id(site.module), site.slot), [])
        if any(site.overlaps(other) for other in others):
            raise TargetError(
                f"{address} and {others[0].address} share entries of one tensor in this model"
            )
        others.append(site)


def methods_in(given: Any) -> list[Method]:
    """A method, or a list of methods, as a list. Raises PeftliteError."""
    if isinstance(given, Method):
        return [given]
    methods = list(given) if isinstance(given, list | tuple) else [given]
    for method in methods:
        if isinstance(method, type) and issubclass(method, Method):
            raise PeftliteError(f"{method.__name__} is a class: write pl.{method.__name__}()")
    if not methods or not all(isinstance(method, Method) for method in methods):
        raise PeftliteError(
            f"give a method such as pl.LoRA(rank=8), or a list of them: not {short(given)}"
        )
    return methods


def assign(model: nn.Module, methods: Sequence[Method]) -> list[tuple[Method, list[Site]]]:
    """The sites that each method takes. A site that is asked for is taken from defaults.

    Raises TargetError if two methods ask for the same entries, or a site can't have a patch.
    """
    everything = sites(model)
    taken: dict[str, tuple[Site, Method, bool]] = {}
    sharing: dict[str, list[str]] = {}  # the addresses taken of each whole tensor
    for method in methods:
        for site, asked in targets.select(everything, method.targets, method.exclude, method):
            usable(site)
            others = sharing.setdefault(whole_address(site.address), [])
            for other in [taken[a] for a in others if taken[a][0].overlaps(site)]:
                if other[2] == asked:
                    raise TargetError(
                        f"{site.address} is taken by {type(other[1]).__name__} at "
                        f"{other[0].address} and by {type(method).__name__}: name it once, or "
                        "leave it out of one with exclude="
                    )
                if asked:
                    del taken[other[0].address]
                    others.remove(other[0].address)
            if not any(taken[a][0].overlaps(site) for a in others):
                taken[site.address] = (site, method, asked)
                others.append(site.address)
    return [
        (method, [site for site, how, _ in taken.values() if how is method]) for method in methods
    ]


def check_numbers(site: Site, method: str) -> None:
    """Raises TargetError if a site, whose numbers a method works on, is quantised."""
    if not site.is_call and is_opaque(site.whole):
        raise TargetError(
            f"{site.address} is quantised, a {type(site.whole).__name__}, and {method} works on "
            "its numbers: take what changes the call of a linear map, as pl.LoRA does, or a base "
            "that isn't quantised"
        )


def usable(site: Site) -> None:
    """Raises PeftliteError if no patch can sit at a site, whatever the method."""
    if site.is_call:
        return
    tensor = site.whole
    if is_sharded(tensor):
        raise PeftliteError(
            f"{site.address} is sharded over devices: attach before fully_shard, so that the "
            "delta is sharded and its gradients are synchronised too"
        )
    if (why := targets.no_numbers(site)) is not None:
        raise TargetError(why)
    if tensor.is_inference():
        raise PeftliteError(
            f"{site.address} was made under torch.inference_mode, so autograd can't use it: "
            "build or load the model outside of it"
        )

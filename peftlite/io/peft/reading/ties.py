"""Ties: a tied weight's tensors, which peft keeps apart, made those of one site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peftlite.core.patch import Method
from peftlite.core.site import CALL, Site
from peftlite.errors import FileError
from peftlite.io.peft.folder import PROMPTS
from peftlite.io.peft.form import is_tied_embedding
from peftlite.io.peft.reading.adapter import Adapter, Claim
from peftlite.io.tied import UNTIE
from peftlite.methods.sparse import SparseMask
from peftlite.table import listed

Own = Mapping[str, tuple[Method, Claim]]
"""What a file has for one site, by the names that it has there."""


def join_ties(adapter: Adapter, claims: Sequence[Claim]) -> list[Claim]:
    """The claims, those of one tied weight as one. Raises FileError if they aren't equal."""
    tied: dict[Site, dict[str, tuple[Method, Claim]]] = {}
    for claim in claims:
        for method, address in claim.placed:
            site = adapter.sites.get(address)
            prompted = site is not None and site.is_call and adapter.kind in PROMPTS
            if site is not None and len(site.names) > 1 and not prompted:
                tied.setdefault(site, {})[address] = method, claim
    joined: set[str] = set()
    for site, own in tied.items():
        _check(adapter, site, own)
        # a patch goes by the first of a weight's owners
        kept = [name for name in own if adapter.seen(name).module is site.module] or [*own]
        joined |= own.keys() - {kept[0]}
    return [_without(claim, joined) for claim in claims]


def _without(claim: Claim, joined: set[str]) -> Claim:
    """A claim with nothing at the addresses that others have."""
    return replace(
        claim,
        placed=[(method, address) for method, address in claim.placed if address not in joined],
        entries={k: its for k, its in claim.entries.items() if k.rpartition(":")[0] not in joined},
    )


def _check(adapter: Adapter, site: Site, own: Own) -> None:
    """Raises FileError unless every owner of a weight has a change, and all have the same."""
    first, *rest = own
    there = {_place(adapter, name) for name in own}
    apart = [name for name in site.names if _place(adapter, name) not in there]
    if any(_is_embedding_of_both(adapter, name, method) for name, (method, _) in own.items()):
        apart = []
    if not apart and rest:
        mine = _change(adapter, site, first, own)
        apart = [name for name in rest if not _equal(mine, _change(adapter, site, name, own))]
    if not apart:
        return
    modules = {id(adapter.seen(name).module) for name in (first, apart[0])}
    raise FileError(
        f"{adapter.file.path!r} changes {first} apart from {listed(apart)}, "
        + (UNTIE if len(modules) > 1 else _COPY).format(
            *(_path(adapter.own[name]) for name in (first, apart[0]))
        )
    )


_COPY = (
    "the same module under another name: give each its own first, model.{1} = "
    "copy.deepcopy(model.{1})"
)


def _path(name: str) -> str:
    """The path of the module of a site's name."""
    return name.removesuffix(CALL) if name.endswith(CALL) else name.rpartition(".")[0]


def _place(adapter: Adapter, name: str) -> tuple[int, str]:
    """Which module has it as which of its own: what peft wraps for one name."""
    parent, _, last = _path(name).rpartition(".")
    return id(adapter.modules[parent]), last


def _is_embedding_of_both(adapter: Adapter, name: str, method: Method) -> bool:
    """Whether these are tokens of the input embedding, which peft changes for what is tied, too."""
    module = adapter.seen(name).module
    return isinstance(method, SparseMask) and is_tied_embedding(adapter.model, module)


def _change(adapter: Adapter, site: Site, name: str, own: Own) -> tuple[Method, dict[str, Tensor]]:
    """What a file has at one owner of a weight, as the first owner would have it."""
    method, claim = own[name]
    its = {k.removeprefix(f"{name}:"): x for k, x in adapter.made(claim).items()}
    found = {k: its[k] for k in its if f"{name}:{k}" in claim.entries}
    turned = adapter.seen(name).layout.transposed is not site.layout.transposed
    if turned and {*found} == {"a", "b"}:
        found = {"a": found["b"].mT, "b": found["a"].mT}
    return method, found


def _equal(one: tuple[Method, dict[str, Tensor]], other: tuple[Method, dict[str, Tensor]]) -> bool:
    """Whether two changes are the same, to the last bit."""
    (method, mine), (theirs, tensors) = one, other
    return (
        method == theirs
        and mine.keys() == tensors.keys()
        and all(torch.equal(mine[key], tensors[key]) for key in mine)
    )

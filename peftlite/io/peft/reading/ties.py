"""Ties: a tied weight's tensors, which peft keeps apart, made those of one site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from peftlite.core.patch import Method
from peftlite.errors import FileError
from peftlite.io.peft.reading.adapter import Adapter, Claim
from peftlite.methods.sparse import SparseMask
from peftlite.table import listed


def join_ties(adapter: Adapter, claims: Sequence[Claim]) -> list[Claim]:
    """The claims, those of one tied weight as one. Raises FileError if they aren't equal."""
    tied: dict[tuple[Method, int], dict[str, Claim]] = {}
    for claim in claims:
        for method, address in claim.placed:
            site = adapter.sites.get(address)
            # of rows, peft changes the tokens of both
            if site is not None and len(site.owners) > 1 and not isinstance(method, SparseMask):
                tied.setdefault((method, id(site)), {})[address] = claim
    joined: set[tuple[Method, str]] = set()
    for (method, _), own in tied.items():
        _check(adapter, own)
        _, *others = own
        joined |= {(method, address) for address in others}
    return [_without(claim, joined) for claim in claims]


def _without(claim: Claim, joined: set[tuple[Method, str]]) -> Claim:
    """A claim with nothing at the sites that others have."""
    own = joined.intersection(claim.placed)
    lost = {f"{address}:difference" for _, address in own}
    return replace(
        claim,
        placed=[pair for pair in claim.placed if pair not in own],
        entries={key: entry for key, entry in claim.entries.items() if key not in lost},
    )


def _check(adapter: Adapter, own: dict[str, Claim]) -> None:
    """Raises FileError unless every owner of a weight has a change, and all have the same."""
    first, *names = own
    site = adapter.sites[first]
    if len(own) == len(site.owners) and all(
        f"{name}:difference" in claim.entries for name, claim in own.items()
    ):
        changes = (adapter.made(claim)[f"{name}:difference"] for name, claim in own.items())
        theirs = next(changes)
        if all(torch.equal(theirs, other) for other in changes):
            return
    path = site.names[-1].rpartition(".")[0]
    others = [name for name in site.names if name not in own] or names
    raise FileError(
        f"{adapter.file.path!r} changes {first} apart from {listed(others)}, and this "
        f"model ties them: untie them first, model.{path}.weight = "
        f"torch.nn.Parameter(model.{path}.weight.detach().clone())"
    )

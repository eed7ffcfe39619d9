"""Reading: what a PEFT directory says, in peftlite's words.

The keys of its tensors say which modules it changes, the settings make a method for each, and what
is left over are replaced modules, biases, and tokens. What nothing claims stays in the content
under its own name, where the loader refuses it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from peftlite.core.patch import Method
from peftlite.core.site import Site
from peftlite.io.files import Entry
from peftlite.io.peft.reading.adapter import Adapter, Claim, Left
from peftlite.io.peft.reading.copies import read_copies
from peftlite.io.peft.reading.experts import read_experts
from peftlite.io.peft.reading.modules import read_modules
from peftlite.io.peft.reading.named import check_named
from peftlite.io.peft.reading.prompts import read_prompts
from peftlite.io.peft.reading.replaced import read_replaced
from peftlite.io.peft.reading.ties import join_ties
from peftlite.io.peft.reading.tokens import read_tokens

__all__ = ["Reading"]

STEPS: tuple[Callable[[Adapter, Left], Iterator[Claim]], ...] = (
    read_prompts, read_experts, read_modules, read_replaced, read_tokens, read_copies,
)  # fmt: skip


class Reading:
    """An adapter as it is understood; without a model, its methods and modules alone."""

    adapter: Adapter
    entries: dict[str, Entry]

    def __init__(self, path: Path, model: nn.Module | None = None, sites: Sequence[Site] = ()):
        self.adapter = adapter = Adapter(path, model, sites)
        with adapter.fitting():
            claims: list[Claim] = []
            for step in STEPS:
                claims += step(adapter, adapter.left(claims))
            if not _left_over(adapter, claims):  # which the loader refuses by name
                check_named(adapter, claims)
            claims = join_ties(adapter, claims)
        adapter.config.finish()
        self._claims: dict[str, list[tuple[Claim, str]]] = {}
        for claim in claims:
            for key in claim.entries:
                self._claims.setdefault(self._own(key), []).append((claim, key))
        self._last: tuple[Claim, Mapping[str, Tensor]] | None = None
        self.methods: list[tuple[Method, list[str]]] = _by_method(claims, adapter.own)
        left = adapter.left(claims).values()
        self.entries = {own: its[0][0].entries[its[0][1]] for own, its in self._claims.items()}
        self.entries |= {key: adapter.file.entries[key] for key in left}

    def _own(self, key: str) -> str:
        """A tensor's key by the model's name for its site."""
        address, _, name = key.rpartition(":")
        return f"{self.adapter.own.get(address, address)}:{name}"

    def get(self, key: str) -> Tensor:
        """A tensor's values; a bias that is trained, and shifted beside, is changed by both."""
        return functools.reduce(torch.add, itertools.starmap(self._made, self._claims[key]))

    def _made(self, claim: Claim, theirs: str) -> Tensor:
        """What is made of a claim; of the same tensors of the file it is made once."""
        last = self._last
        if last is None or last[0] is not claim:
            last = claim, self.adapter.made(claim)
            self._last = last  # at once: the loader asks from several threads
        return last[1][theirs]


def _left_over(adapter: Adapter, claims: Sequence[Claim]) -> bool:
    """Whether the file has something that this model hasn't."""
    addresses = (address for claim in claims for _, address in claim.placed)
    lost = adapter.model is not None and any(a not in adapter.sites for a in addresses)
    return lost or bool(adapter.left(claims))


def _by_method(claims: Sequence[Claim], own: Mapping[str, str]) -> list[tuple[Method, list[str]]]:
    """The methods of claims, each with its addresses, as the model has them."""
    found: dict[Method, dict[str, None]] = {}
    for method, address in (pair for claim in claims for pair in claim.placed):
        found.setdefault(method, {})[own.get(address, address)] = None
    return [(method, [*addresses]) for method, addresses in found.items()]

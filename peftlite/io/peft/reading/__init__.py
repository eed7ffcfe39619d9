"""Reading: what a PEFT directory says, in peftlite's words.

The keys of its tensors say which modules it changes, the settings make a method for each, and what
is left over are replaced modules, biases, and tokens. What nothing claims stays in the content
under its own name, where the loader refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from peftlite.core.patch import Method
from peftlite.core.site import Site
from peftlite.io.peft.reading.adapter import Adapter, Claim, Left
from peftlite.io.peft.reading.copies import read_copies
from peftlite.io.peft.reading.modules import read_modules
from peftlite.io.peft.reading.named import check_named
from peftlite.io.peft.reading.prompts import read_prompts
from peftlite.io.peft.reading.replaced import read_replaced
from peftlite.io.peft.reading.ties import join_ties
from peftlite.io.peft.reading.tokens import read_tokens

__all__ = ["Reading"]

STEPS: tuple[Callable[[Adapter, Left], Iterator[Claim]], ...] = (
    read_prompts, read_modules, read_replaced, read_tokens, read_copies,
)  # fmt: skip


class Reading:
    """An adapter as it is understood; without a model, its methods and modules alone."""

    def __init__(self, path: Path, model: nn.Module | None = None, sites: Sequence[Site] = ()):
        self.adapter = adapter = Adapter(path, model, sites)
        with adapter.fitting():
            claims: list[Claim] = []
            for step in STEPS:
                claims += step(adapter, adapter.left(claims))
            check_named(adapter, claims)
            claims = join_ties(adapter, claims)
        adapter.config.finish()
        self._claims = {key: claim for claim in claims for key in claim.entries}
        self._last: tuple[Claim, Mapping[str, Tensor]] | None = None
        self.methods = _by_method(claims)
        left = adapter.left(claims).values()
        self.entries = {key: claim.entries[key] for key, claim in self._claims.items()}
        self.entries |= {key: adapter.file.entries[key] for key in left}

    def get(self, key: str) -> Tensor:
        """A tensor's values; what is made from the same of the file's tensors is made once."""
        claim, last = self._claims[key], self._last
        if last is None or last[0] is not claim:
            last = claim, self.adapter.made(claim)
            self._last = last  # at once: the loader asks from several threads
        return last[1][key]


def _by_method(claims: Sequence[Claim]) -> list[tuple[Method, list[str]]]:
    """The methods of claims, each with its addresses."""
    found: dict[Method, dict[str, None]] = {}
    for method, address in (pair for claim in claims for pair in claim.placed):
        found.setdefault(method, {})[address] = None
    return [(method, [*addresses]) for method, addresses in found.items()]

"""Every row's own virtual tokens, as many as its delta has: prompt tuning and P-tuning.

    row with 2 of 4   ·  ·  p  p  ids …      a dot is masked, and the positions begin after it
    base's            ·  ·  ·  ·  ids …

All rows are made N longer, at the left, where a cache too begins with what is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftlite.bank.arena import Field
from peftlite.bank.families.gather import slots_of
from peftlite.bank.families.mixed import Contents, Mixed
from peftlite.bank.rows import Rows, Tables
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.errors import PeftliteError, TargetError
from peftlite.methods.features import by_name
from peftlite.methods.keywords import MASK, TOKENS
from peftlite.methods.prompt import PromptPatch, look_up
from peftlite.methods.virtual import cut, cut_encoder


class MixedPrompt(Mixed):
    """At the embedding's call: `rows` (n, d) of each slot for the last n of the N codes."""

    n: Any
    d: Any
    first: Any

    learned: ClassVar[tuple[str, ...]] = ("rows",)
    trained: ClassVar[tuple[type[Patch], ...]] = (PromptPatch,)

    def __init__(self, site: Site, patch: Any, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.n, self.d, self.first = *patch.rows.shape, patch.first
        patch.__dict__["mixed"] = self  # for the stack's, which has the patch

    def fields(self) -> dict[str, Field]:
        return {"rows": Field((self.n, self.d), self.dtype), "used": Field((), torch.int64)}

    def encode(self, patches: Sequence[Any]) -> Contents:
        rows = patches[0].prompt()
        return {"rows": rows, "used": _used(self, rows.shape[0])}

    def used(self, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"rows": contents["rows"][: int(contents["used"])]}

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Tensor:
        embed = partial(self.embeddings, rows, tables)
        return look_up(self.first, self.n, embed, inner, *args, **kwargs)

    def embeddings(self, rows: Rows, tables: Tables, code: Tensor, dtype: torch.dtype) -> Tensor:
        """What stands for codes (b, t) from 0 up, whatever there is for the others (b, t, d)."""
        slots = slots_of(rows, len(code))[:, None]
        index = code - self.n + tables["used"][slots]
        return tables["rows"][slots, index.clamp(0, self.n - 1)].to(dtype)


class MixedStack(Mixed):
    """At the call that takes the ids: puts N codes before them, masked where a row has fewer."""

    n: Any

    def __init__(self, site: Site, patch: Any, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.n, taken = patch.n, patch.names
        relative = hasattr(getattr(site.module, "config", None), "relative_attention_num_buckets")
        self.placed: bool = "position_ids" in taken
        if MASK not in taken or not (self.placed or relative):
            raise TargetError(
                f"{site.address} takes no attention_mask and position_ids, so rows can't have "
                "prompts of different lengths: leave prompts out of the bank's methods"
            )

    @property
    def size(self) -> int:
        return self.n  # so that of two the one with the longer prompt stays, as at the embedding

    def fields(self) -> dict[str, Field]:
        return {"used": Field((), torch.int64)}

    def encode(self, patches: Sequence[Any]) -> Contents:
        return {"used": _used(self, patches[0].n)}

    def trains(self, patches: Sequence[Patch]) -> bool:
        return True

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        before, beside = partial(self._before, rows), partial(self._beside, rows, tables)
        return self.template.run(before, beside, inner, *args, **kwargs)

    def _beside(
        self, rows: Rows, tables: Tables, arguments: dict[str, Any], tokens: Tensor, past: int
    ) -> dict[str, Any]:
        """The arguments beside the tokens, with a mask and positions of every row's own."""
        (b, t), seen = tokens.shape[:2], max(past - self.n, 0)
        used = tables["used"].index_select(0, slots_of(rows, b))[:, None]
        mask = arguments.pop(MASK, None)
        places = arguments.pop("position_ids", None)
        rest = self.template.lengthened(arguments, tokens, past)
        rest[MASK] = self._mask(used, mask, seen + t)
        if self.placed:
            rest["position_ids"] = self._places(used, places, seen, t, past)
        return rest

    def _mask(self, used: Tensor, mask: Any, t: int) -> Tensor:
        """A mask (b, N + t): of the virtual tokens those that a row has, then the call's own."""
        if mask is None:
            mask = used.new_ones(len(used), t)
        elif isinstance(mask, Tensor) and mask.shape == (len(used), self.n + t):
            return mask  # made so by the call around
        if not isinstance(mask, Tensor) or mask.shape != (len(used), t):
            raise PeftliteError(
                f"{self.address} is called with an attention_mask that isn't a tensor "
                f"{(len(used), t)}, for {t} tokens in all: prompts of different lengths go by one"
            )
        there = torch.arange(self.n, device=used.device) >= self.n - used
        return torch.cat([there.to(mask.dtype), mask], 1)

    def _places(self, used: Tensor, places: Any, seen: int, t: int, past: int) -> Tensor:
        """Positions (b, t), or (b, N + t): a row's count from the first that it has."""
        if places is None:
            places = torch.arange(seen, seen + t, device=used.device)
        if past:
            return places + used
        front = (torch.arange(self.n, device=used.device) - self.n + used).clamp(min=0)
        return torch.cat([front, (places + used).to(front.dtype)], 1)

    def _before(self, rows: Rows, tokens: Tensor) -> Tensor:
        """Ids after the codes, or embeddings after the prompts'."""
        prompt = self.template.prompt
        if not tokens.is_floating_point():
            return prompt.before(tokens)
        mixed: MixedPrompt = prompt.mixed
        tables = mixed.tables if rows.tables is None else rows.tables(mixed)
        codes = torch.arange(self.n, device=tokens.device).expand(len(tokens), -1)
        return torch.cat([mixed.embeddings(rows, tables, codes, tokens.dtype), tokens], 1)


class MixedAround(MixedStack):
    """At the call of an encoder and its decoder, which attends to the virtual tokens too."""

    def __init__(self, site: Site, patch: Any, max_rank: int):
        Mixed.__init__(self, site, patch, max_rank)
        self.n: Any = patch.n

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        arguments = by_name(self.template.names, args, kwargs)
        known = (arguments.get(name) for name in (*TOKENS, MASK))
        first = next((x for x in known if x is not None), None)
        if first is not None:
            used = tables["used"].index_select(0, slots_of(rows, len(first)))[:, None]
            mask = self._mask(used, arguments.get(MASK), first.shape[1])
            arguments[MASK] = mask
        return cut_encoder(inner(**arguments), self.n)


class MixedLayers(MixedAround):
    """At the call of a stack's layers, where the stack pools what they give."""

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        return cut(inner(*args, **kwargs), self.n)


def _used(mixed: Any, n: int) -> int:
    """How many of the N virtual tokens a delta has. Raises PeftliteError."""
    if n > mixed.n:
        raise mixed.too_large(f"a prompt of {n} is above", mixed.n, "prompt_length")
    return n

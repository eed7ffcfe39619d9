"""A prefix in the cache: keys and values that a model takes for those of n tokens before its own.

    ids, cache ─► the stack that takes them ─► …       what a cache holds counts: as positions,
                    └► an attention, cache              in masks, and in a window

The cache is begun before the stack sees it. An attention that is given none, since checkpointing
takes it away, begins one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.errors import PeftliteError
from peftlite.methods.features import arguments, by_name
from peftlite.methods.keywords import (
    MASK,
    POSITIONS,
    TOKENS,
    cache_in,
    cache_name,
    cached,
    of_tokens,
    own,
)
from peftlite.methods.prompt import encoder, holds, innermost, takers
from peftlite.methods.virtual import before, check_room


def has_place(site: Site) -> bool:
    """Whether a call is that of an attention which knows its layer's place in a cache."""
    return site.is_call and layer_of(site.module) is not None and cache_of(site) is not None


def cache_of(site: Site) -> str | None:
    """The name by which a call takes its cache."""
    return cache_name(arguments(site.module))


def layer_of(module: nn.Module) -> int | None:
    """The number of an attention's layer."""
    found = (getattr(module, name, None) for name in ("layer_idx", "layer_id"))
    return next((i for i in found if isinstance(i, int)), None)


def past_sites(everything: Sequence[Site]) -> list[Site]:
    """The call that takes ids and a cache, a decoder's if there is one, and its attentions."""
    found = takers(everything)
    encoders = [encoder(site.module) for site in found]
    found = [s for s in found if cache_of(s) and s.module not in encoders]
    for stack in reversed(innermost(found)):
        inside = innermost([s for s in everything if has_place(s) and holds(stack, s)])
        # of two in a layer, the second attends to an encoder
        layers = {layer_of(s.module): s for s in reversed(inside)}
        if layers:
            return [stack, *(layers[i] for i in sorted(layers))]
    return []


class PastPatch(Patch):
    """At the call of the stack: begins its cache with the prefixes of its layers."""

    n: int
    site: Site
    names: tuple[str, ...]

    layers: Any

    def __init__(self, site: Site, n: int, layers: Sequence[Any]):
        super().__init__()
        self.__dict__["layers"] = layers  # the attentions' patches, which have the parameters
        self.n, self.site, self.names = n, site, arguments(site.module)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(self.names, args, kwargs)
        tokens = next((given[name] for name in TOKENS if given.get(name) is not None), None)
        if tokens is None:
            return inner(**given)
        name = cache_in(given) or cache_of(self.site)
        made = given.get(name) is None
        if made:
            given[name] = empty(self.site, given.get("encoder_hidden_states") is not None)
        self._begin(given, own(given[name]), len(tokens))
        for place in POSITIONS:
            if isinstance(given.get(place), Tensor):
                given[place] = given[place] + self.n
        if given.get(MASK) is not None:
            past, t = cached(given, self.site.address), tokens.shape[1]
            check_room(given[MASK], self.n, past, t, self.site.address)
            given[MASK] = before(given[MASK], self.n, 1)
        output = inner(**given)
        return without(output, given[name]) if made and not self._keeps(given) else output

    def _begin(self, given: dict[str, Any], cache: Any, b: int) -> None:
        """Puts the prefixes of all layers in a cache without tokens. Raises PeftliteError."""
        held = cached(given, self.site.address)
        if of_tokens(given, self.site.address):
            if not getattr(cache, "prefixed", 0):
                raise PeftliteError(
                    f"{self.site.address} is called with a cache of {held} positions that was "
                    "begun without the prefix, which counts as the first of them: begin it anew, "
                    "with the delta chosen"
                )
            return
        if getattr(cache, "is_compileable", False):
            raise PeftliteError(
                f"{self.site.address} is called with a static cache, which has no room for a "
                "prefix: leave cache_implementation out"
            )
        for layer in self.layers:
            layer.put(cache, b)
        cache.prefixed = held + self.n

    def _keeps(self, given: dict[str, Any]) -> bool:
        """Whether the stack by itself would give a cache back."""
        if given.get("use_cache") is not None:
            return given["use_cache"]
        encodes = any(
            getattr(layer.site.module, "is_decoder", None) is False for layer in self.layers
        )
        return not encodes and getattr(self.site.module.config, "use_cache", True)


def empty(stack: Site, attends: bool) -> Any:
    """A cache with nothing in it, for a stack that `attends` to an encoder's states or doesn't."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    config: Any = stack.module.config
    made = [DynamicCache(config=config) for _ in range(1 + attends)]
    return EncoderDecoderCache(*made) if attends else made[0]


def dtype_of(stack: Site) -> torch.dtype:
    """What a stack computes in."""
    module: Any = stack.module
    kind = module.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else module.dtype


def without(output: Any, cache: Any) -> Any:
    """A stack's output, but for the cache that it wasn't asked for."""
    if isinstance(output, dict):
        return type(output)(**{name: x for name, x in output.items() if x is not cache})
    return tuple(x for x in output if x is not cache) if isinstance(output, tuple) else output

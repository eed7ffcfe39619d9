"""Attention by hand: a prefix before the keys that a module of transformers has from its cache.

Of those that come to no attention of torch's: GPT-J's and CodeGen's, and before transformers 5 that
of T5 and its kin, whose prefix has no position bias.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from peftlite.core.site import Site
from peftlite.methods.attention import Prepend
from peftlite.methods.features import arguments, by_name
from peftlite.methods.keywords import MASK, cache_name, own


def is_by_hand(module: nn.Module) -> bool:
    """Whether a module's attention is one that `ByHand` knows."""
    names = {*arguments(module)}
    if cache_name(names) is None or getattr(module, "layer_idx", None) is None:
        return False
    if {"mask", "position_bias", "key_value_states"} <= names:
        bias = getattr(module, "compute_bias", None)
        return bias is not None and "cache_position" in inspect.signature(bias).parameters
    # others mask in ways of their own
    masks = any(not buffer.is_floating_point() for buffer in module.buffers())
    eager = getattr(getattr(module, "config", None), "_attn_implementation", "eager") == "eager"
    return {"layer_past", MASK} <= names and "alibi" not in names and eager and not masks


class Ahead:
    """A cache, or none, as it shows an attention a prefix before its keys and values."""

    cache: Any
    mode: Prepend

    def __init__(self, cache: Any, mode: Prepend):
        self.cache, self.mode = cache, mode

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        return self.mode.prepend(key, value)


class ByHand:
    """What calls an attention by hand with the prefix of a `mode`, which isn't entered."""

    site: Site
    names: tuple[str, ...]

    def __init__(self, site: Site):
        self.site, self.names = site, arguments(site.module)
        self.cache: str = cache_name(self.names) or ""
        self.biased: bool = "position_bias" in self.names
        self.mask = "mask" if self.biased else MASK

    def call(self, mode: Prepend, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(self.names, args, kwargs)
        x, cache = given[self.names[0]], given.get(self.cache)
        if given.get("key_value_states") is not None and not isinstance(cache, Ahead):
            cache = None  # what is of an encoder is made anew; another prefix of it stays
        cache = own(cache)
        if self.biased and given.get("position_bias") is None:
            given["position_bias"] = self._bias(given, x, cache)
        for name in (self.mask, "position_bias"):
            if isinstance(given.get(name), Tensor):
                given[name] = mode.widen(given[name], len(x))
        given[self.cache] = Ahead(cache, mode)
        first, *rest = inner(**given)
        return first, *(y[..., mode.n :] if isinstance(y, Tensor) else y for y in rest)

    def _bias(self, given: dict[str, Any], x: Tensor, cache: Any) -> Tensor | None:
        """The position biases of the tokens, masks and all; None where there are none."""
        module: Any = self.site.module
        if not module.has_relative_attention_bias:
            return None
        mask, at, t = given.get(self.mask), given.get("cache_position"), x.shape[1]
        held = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        static = getattr(cache, "is_compileable", False)
        keys = mask.shape[-1] if static and mask is not None else held + t
        bias = module.compute_bias(held + t, keys, device=x.device, cache_position=at)[:, :, -t:]
        return bias if mask is None else bias + mask[..., :keys]

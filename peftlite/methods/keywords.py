"""Keywords: what models call what they are called with, and how many positions a cache holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from peftlite.errors import PeftliteError
from peftlite.table import short

TOKENS = ("inputs_embeds", "input_ids")
MASK = "attention_mask"
MASKS = (MASK, "attn_mask")  # the last is a block's, of DistilBERT
POSITIONS = ("position_ids", "cache_position")
# of transformers from 5 on, before, of a single layer, and of models that aren't all attention
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params", "mems")


def cache_name(names: Iterable[str]) -> str | None:
    """The name by which a call takes its cache, of the names of its arguments."""
    taken = {*names}
    return next((name for name in CACHES if name in taken), None)


def cache_in(given: Mapping[str, Any]) -> str | None:
    """The name of the cache that a call is given, whatever it is called."""
    for name, x in given.items():
        named = name in CACHES and x is not None and not isinstance(x, bool)
        if named or hasattr(x, "get_seq_length"):
            return name
    return None


def cached(given: Mapping[str, Any], address: str) -> Any:
    """How many positions a call's cache holds. Raises PeftliteError if it doesn't say."""
    name = cache_in(given)
    if name is None:
        return 0
    cache = given[name]
    try:
        if not isinstance(cache, tuple | list):
            return cache.get_seq_length()
        _, t, _ = cache[0][0].shape[-3:] if cache else (0, 0, 0)  # keys (b, h, t, d)
        return t
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise PeftliteError(
            f"{address} is called with {name} {short(cache)}, a cache that doesn't say how many "
            "positions it holds: pass use_cache=False"
        ) from error


def of_tokens(given: Mapping[str, Any], address: str) -> Any:
    """How many of a cache's positions are tokens', and not of a prefix that it begins with."""
    name, held = cache_in(given), cached(given, address)
    cache = None if name is None else own(given[name])
    return max(held - getattr(cache, "prefixed", 0), 0)


def own(cache: Any) -> Any:
    """The cache of a stack's own tokens, where it has another for an encoder's."""
    return getattr(cache, "self_attention_cache", cache)


def real(given: Mapping[str, Any], address: str, t: int) -> Any:
    """Which of the t tokens of a call, made by now, its mask doesn't call padding: (b, t) or
    (1, t); None if all of them are real."""
    mask = next((given[name] for name in MASKS if isinstance(given.get(name), Tensor)), None)
    if mask is None:
        return None
    # to be added to scores (b, h, t, k), or true where keys (b, k) are seen
    seen = mask == 0 if mask.is_floating_point() and mask.dim() == 4 else mask.bool()
    seen = seen.flatten(1, 2).any(1) if mask.dim() == 4 else seen
    return seen[:, begun(given, address, t) :][:, :t]


def begun(given: Mapping[str, Any], address: str, t: int) -> Any:
    """How many positions there were before a call of t more, which is made by now."""
    name, held = cache_in(given), cached(given, address)
    in_place = name is not None and not isinstance(given[name], tuple | list)
    return held - t if in_place else held

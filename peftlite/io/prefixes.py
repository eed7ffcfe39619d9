"""Prefixes in AdapterHub's folders: one table, or network, for all attentions of a kind.

`bert.prefix_tuning.prefix_tunings.NAME.self_prefix.control_trans` has the keys and values of its
layers, (n, layers, 2, h, d), as they are ("flat"), or the last of two maps that give them. A pickle
has it once more for every attention that takes of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.io.files import Tensors
from peftlite.methods.prefix import PrefixTuning

# as they are with attention that is eager
MODELS = "bert roberta xlm-roberta electra gpt2 gptj llama mistral vit bart mbart".split()
CONTROL, EMBEDDING = "control_trans", "wte.weight"
NETWORK = (EMBEDDING, *(f"{CONTROL}.{n}.{x}" for n in (0, 2) for x in ("weight", "bias")))


def pooled(file: Tensors, name: str) -> dict[str, dict[str, str]]:
    """The keys of each kind of attention, by their names there. Raises ValueError."""
    pattern = re.compile(rf"(?:.*\.)?prefix_tunings\.{re.escape(name)}\.(\w+)\.(.+)")
    found: dict[str, dict[str, str]] = {}
    for key in file.entries:
        if (its := pattern.fullmatch(key)) is None:
            raise ValueError(f"it has {key} in its tensors, which can't be read")
        first = found.setdefault(its[1], {}).setdefault(its[2], key)
        if first != key and not torch.equal(file.get(first), file.get(key)):
            raise ValueError(f"it has {key} beside another {first}")
    return found


def table(keys: Mapping[str, str], get: Callable[[str], Tensor], act: Any) -> Tensor:
    """The keys and values of all layers, (n, layers·2·h·d), of those a network gives."""
    if CONTROL in keys:
        return get(keys[CONTROL])
    x, down, down_bias, up, up_bias = (get(keys[name]) for name in NETWORK)
    x, *maps = (t.to(wide(x)) for t in (x, down, down_bias, up, up_bias))
    return F.linear(act(F.linear(x, *maps[:2])), *maps[2:])


def attentions(model: Any, sites: Sequence[Site], place: str) -> Iterator[tuple[int, Site]]:
    """The calls of a kind of attention, and each one's number among the layers."""
    method, config = PrefixTuning(), getattr(model, "config", None)
    own = [site for site in sites if site.is_call and method.default(site)]
    encoder, decoder, cross = [], [], []
    for site in own if getattr(config, "is_encoder_decoder", False) else ():
        steps = site.address.split(".")
        kind = encoder if "encoder" in steps else cross if "encoder_attn()" in steps else decoder
        kind.append(site)
    places = {"encoder_prefix": encoder, "cross_prefix": cross, "self_prefix": decoder or own}
    start = 0 if place == "encoder_prefix" else len(encoder)
    return enumerate(places.get(place, []), start)

"""Shifts: biases that were given to linear layers without one, which peft has as BEFT."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftlite.core.assign import Placed
from peftlite.core.site import CALL
from peftlite.io.peft.writing.draft import Draft, refuse
from peftlite.methods.bitfit import AddedBiasPatch, BitFit
from peftlite.table import listed


def are_shifts(items: Sequence[Placed]) -> bool:
    """Whether these are biases, some of them added."""
    added = any(isinstance(item.patch, AddedBiasPatch) for item in items)
    return added and all(isinstance(item.method, BitFit) for item in items)


def write_shifts(draft: Draft, items: Sequence[Placed]) -> Draft:
    """Adds what each layer's outputs are shifted by."""
    for item in items:
        site, patch = item.site, item.patch
        path = site.address.removesuffix(CALL).removesuffix(".bias")
        if not path or not isinstance(site.module, nn.Linear):
            refuse(item, f"peft's BEFT doesn't take a {type(site.module).__name__}")
        if len(site.names) > 1:
            refuse(item, f"it is {listed(site.names[1:])}, too, which peft would leave as it is")
        (d,) = patch.parameters()
        draft.tensors[f"{draft.key(path)}.beft_bias"] = d.detach()[None]
        draft.targets.add(path)
    draft.config["target_modules"] = sorted(draft.targets)
    return draft

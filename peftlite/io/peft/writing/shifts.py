"""Shifts: biases that were given to layers without one: BEFT, or `lora_bias` beside a LoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from peftlite.core import maps
from peftlite.core.assign import Placed
from peftlite.core.site import CALL
from peftlite.io.peft.writing.draft import Draft, module_of, refuse
from peftlite.methods.bitfit import AddedBiasPatch, BitFit
from peftlite.methods.lora import LoRA
from peftlite.table import listed


def are_shifts(items: Sequence[Placed]) -> bool:
    """Whether these are biases, some of them added."""
    added = any(isinstance(item.patch, AddedBiasPatch) for item in items)
    return added and all(isinstance(item.method, BitFit) for item in items)


def write_shifts(draft: Draft, items: Sequence[Placed]) -> Draft:
    """Adds what each layer's outputs are shifted by."""
    for item in items:
        site, patch = item.site, item.patch
        path = _path(item)
        if not path or not isinstance(site.module, nn.Linear):
            refuse(item, f"peft's BEFT doesn't take a {type(site.module).__name__}")
        if len(site.names) > 1:
            refuse(item, f"it is {listed(site.names[1:])}, too, which peft would leave as it is")
        (d,) = patch.parameters()
        draft.tensors[f"{draft.key(path)}.beft_bias"] = d.detach()[None]
        draft.targets.add(path)
    draft.config["target_modules"] = sorted(draft.targets)
    return draft


def beside_lora(own: Sequence[Placed], items: Sequence[Placed]) -> list[Placed]:
    """The biases of layers that have a LoRA, where some of them were given one."""
    paths = {module_of(item) for item in own if isinstance(item.method, LoRA)}
    found = [item for item in items if isinstance(item.method, BitFit) and _path(item) in paths]
    return found if any(isinstance(item.patch, AddedBiasPatch) for item in found) else []


def write_beside_lora(draft: Draft, own: Sequence[Placed], items: Sequence[Placed]) -> None:
    """Adds them, and zeros for the others: with `lora_bias` every layer has such a bias."""
    given = {_path(item): next(item.patch.parameters()).detach() for item in items}
    for item in own:
        path, module = module_of(item), item.site.module
        kind = type(item.method).__name__ if type(item.method) is not LoRA else ""
        if kind or maps.kind_of(module) not in (maps.Linear, maps.TransposedLinear, maps.Conv):
            refuse(items[0], f"peft adds no bias to the {kind or type(module).__name__} at {path}")
        d = given.get(path, torch.zeros(item.site.layout.o))
        draft.tensors[f"{draft.key(path)}.lora_B.bias"] = d / item.method.scale
    draft.config["lora_bias"] = True


def _path(item: Placed) -> str:
    return item.site.address.removesuffix(CALL).removesuffix(".bias")

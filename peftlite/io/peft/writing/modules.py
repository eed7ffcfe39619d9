"""Modules: those that the adapter's own method has tensors of, each translated by its form."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from peftlite.core import maps
from peftlite.core.assign import Placed
from peftlite.core.site import walk, whole_address
from peftlite.io.peft.form import Form, Layer, is_tied_embedding
from peftlite.io.peft.writing.draft import Draft, module_of, refuse
from peftlite.methods.ia3 import ScalePatch
from peftlite.methods.lora import LoRA
from peftlite.table import listed


def write_modules(draft: Draft, form: Form, items: Sequence[Placed]) -> None:
    """Adds the modules of a form, their settings, and the tensors that are for all of them."""
    layers = _layers(draft, items)
    settings = _settings(draft, form, layers)
    stacked = [layer for _, layer in layers if layer.stacked]
    starts, draft.layers = _nested(stacked), Counter(layer.path for layer in stacked)
    for item, layer in layers:
        start = f"{layer.name}.base_layer.out_proj" if layer.inner else layer.path
        start = draft.key(starts.get(layer.name, start))
        for name, tensor in form.theirs(item.patch, layer).items():
            draft.tensors[f"{start}.{name}"] = tensor
    shared = form.write_shared([item.patch for item in items])
    for name, tensor in zip(form.shared, shared, strict=True):
        draft.tensors[f"base_model.{name}"] = tensor
    draft.targets = {*settings} - {*starts}
    draft.config = form.joined(settings)
    draft.config["target_modules"] = _targets(draft.targets)
    if starts:
        draft.config["target_parameters"] = sorted(starts)
    if any(layer.turned for _, layer in layers):
        draft.config["ensure_weight_tying"] = True
    if any(maps.kind_of(item.site.module) is maps.TransposedLinear for item in items):
        draft.config["fan_in_fan_out"] = True


def _targets(paths: Collection[str]) -> list[str] | str | None:
    """The modules by their paths; a regex where peft would take one for the end of others."""
    if all("." in path for path in paths):
        return sorted(paths) or None
    return "|".join(map(re.escape, sorted(paths)))


def _layers(draft: Draft, items: Sequence[Placed]) -> list[tuple[Placed, Layer]]:
    """The layers of the weights; a bias has no tensor of its own there."""
    found = []
    for item in items:
        if item.site.whole.dim() == 1:
            _check_bias(draft, item)
        else:
            inner = isinstance(item.site.module, nn.modules.linear.NonDynamicallyQuantizableLinear)
            found.append((item, Layer(module_of(item), item.site, inner=inner)))
            found += [(item, layer) for layer in _tied(draft, item)]
    return found


def _tied(draft: Draft, item: Placed) -> list[Layer]:
    """The output heads that have an embedding's weight, and get its LoRA: `ensure_weight_tying`."""
    site, home = item.site, draft.delta.home
    if len(site.owners) == 1:
        return []
    paths = [whole_address(name).rpartition(".")[0] for name in site.names]
    known = any(path.rpartition(".")[2] in ("embed_tokens", "lm_head") for path in paths)
    root = None if home is None or home.root is None else next(walk(home.root))[1]
    heads = all(maps.kind_of(module) is maps.Linear for module, _ in site.owners[1:])
    if (
        type(item.method) is not LoRA
        or not (known and heads and len(paths) == len(site.owners))
        or not is_tied_embedding(root, site.module)
    ):
        refuse(item, f"it is tied to {listed(site.names[1:])}, and peft would untie it")
    others = zip(paths[1:], site.owners[1:], strict=True)
    return [Layer(path, replace(site, owners=(own,)), turned=True) for path, own in others]


def _settings(
    draft: Draft, form: Form, layers: Sequence[tuple[Placed, Layer]]
) -> dict[str, dict[str, Any]]:
    """The settings of every layer, by what the settings call it."""
    settings: dict[str, dict[str, Any]] = {}
    for item, layer in layers:
        own = form.settings(item.method, item.patch)
        _check(draft, form, item, layer)
        if settings.setdefault(layer.name, own) != own:
            refuse(item, "peft has one setting for both maps of an attention")
    return settings


def _nested(parameters: Sequence[Layer]) -> dict[str, str]:
    """Where peft has the tensors of parameters, by name: the last of a module is outermost."""
    modules: dict[str, list[Layer]] = {}
    for layer in parameters:
        modules.setdefault(layer.path, []).append(layer)
    found = {}
    for path, own in modules.items():
        order = [*own[0].site.module._parameters]
        own.sort(key=lambda layer: -order.index(layer.site.slot))
        for depth, layer in enumerate(own):
            found[layer.name] = path + ".base_layer" * depth
    return found


def _check(draft: Draft, form: Form, item: Placed, layer: Layer) -> None:
    """Raises PeftliteError if peft doesn't take a site."""
    site = item.site
    if site.index is not None:
        refuse(item, "peft takes whole weights")
    if not form.taken(site) or not layer.path:
        refuse(item, f"peft's {draft.kind} doesn't take a {type(site.module).__name__}")
    if what := form.forgotten(site):
        refuse(item, f"peft's {draft.kind} runs it without its {what}")
    _check_attention(draft, item, layer)
    if isinstance(item.patch, ScalePatch) and not item.patch.inputs:
        bias = draft.delta.placed.get(f"{layer.path}.bias")
        if site.module.bias is not None and not (bias and bias.patch.l is item.patch.l):
            refuse(item, "peft scales its bias, too, which the delta leaves as it is")


def _check_attention(draft: Draft, item: Placed, layer: Layer) -> None:
    """Raises PeftliteError if only one map of an attention is changed, where peft has both."""
    other = f"{layer.name}.in_proj_weight" if layer.inner else f"{layer.path}.out_proj.weight"
    attention = layer.inner or isinstance(item.site.module, nn.MultiheadAttention)
    if attention and not layer.stacked and other not in draft.delta.placed:
        refuse(item, f"peft changes {other} with it, which the delta leaves as it is")


def _check_bias(draft: Draft, item: Placed) -> None:
    weight = draft.delta.placed.get(f"{module_of(item)}.weight")
    if weight is None or getattr(weight.patch, "l", None) is not item.patch.l:
        refuse(item, "peft scales a bias with its weight alone")

"""Replaced: modules that peft has as they are in the end, and biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from peftlite.core.assign import Placed
from peftlite.core.site import CALL, walk, whole_address
from peftlite.core.tensors import is_quantized, raw
from peftlite.io.peft.folder import ALONE, CLASSIFIER, LAYER, PROMPTS, ROWS
from peftlite.io.peft.writing.draft import Draft, module_of, refuse

HEADS = {"SEQ_CLS": CLASSIFIER, "TOKEN_CLS": CLASSIFIER, "QUESTION_ANS": ("qa_outputs",)}
HEADLESS = (*PROMPTS, ROWS)


def write_replaced(draft: Draft, items: Sequence[Placed]) -> None:
    """Adds modules of which tensors are changed entry by entry, and biases."""
    modules: dict[str, nn.Module] = {}
    slots: dict[str, set[str]] = {}
    values: dict[str, Tensor] = {}
    for item in items:
        site = item.site
        if draft.kind in PROMPTS[:2] and f"{module_of(item)}{CALL}" in draft.delta.placed:
            refuse(item, "peft looks up the tokens behind a prompt in the base's own embedding")
        if len(site.owners) > 1 and len(site.names) != len(site.owners):
            refuse(item, "its module has two names, and another module has its weight")
        for name, (module, slot) in zip(site.names, site.owners, strict=False):
            address = whole_address(name)
            path = address.rpartition(".")[0]
            modules[path] = module
            slots.setdefault(path, set()).add(slot)
            values[address] = draft.value(item)
    biases = _write_biases(draft, slots, values)
    paths = sorted(
        path
        for path in modules.keys() - biases
        if not any(path.startswith(f"{other}.") for other in modules)
    )
    if draft.config.get("bias") == "all":
        _write_other_biases(draft, {*paths, *biases})
    copied = {path: head for path in paths if (head := head_of(path, draft.task))}
    if draft.kind != ALONE:
        copied = {path: path for path in paths} | copied
    elif len(copied) == len(paths):  # peft has no adapter of a classifier alone
        copied = {}
    for path in paths:
        layer = path + ("." if path in copied else LAYER)
        _write_module(draft, path, layer, modules[path], values, items[0])
    if saved := sorted({*copied.values()}):
        draft.config["modules_to_save"] = saved
    if targets := [path for path in paths if path not in copied]:
        draft.config["target_modules"] = targets


def head_of(path: str, task: Any) -> str | None:
    """The head that a module is, or is in, which peft saves whole for a task, by a name's end."""
    steps = path.split(".")
    ends = (n for n, step in enumerate(steps, 1) if step.endswith(HEADS.get(task, ())))
    return next((".".join(steps[:n]) for n in ends), None)


def write_heads(draft: Draft, item: Placed) -> None:
    """Adds the heads that peft asks for by a task, and that aren't there yet."""
    root = None if draft.delta.home is None else draft.delta.home.root
    if root is None or draft.task not in HEADS or draft.kind in HEADLESS:
        return
    there = {*(draft.config.get("modules_to_save") or ()), *(draft.config["target_modules"] or ())}
    modules = [(path, module) for path, module in walk(root) if path not in there]
    heads = {path: module for path, module in modules if head_of(path, draft.task) == path}
    values = {
        whole_address(address): draft.value(its)
        for address, its in draft.delta.placed.items()
        if not its.site.is_call and head_of(module_of(its), draft.task)
    }
    for path, module in heads.items():
        _write_module(draft, path, f"{path}.", module, values, item)
    if saved := sorted({*(draft.config.get("modules_to_save") or ()), *heads}):
        draft.config["modules_to_save"] = saved


def _write_biases(
    draft: Draft, slots: Mapping[str, set[str]], values: Mapping[str, Tensor]
) -> set[str]:
    """Adds the biases of modules that have no other change, where peft trains such alone."""
    bias = draft.form.bias if draft.form else None
    paths = {path for path, own in slots.items() if bias and own == {"bias"}}

    if paths:
        layers = {module_of(item): item.site.module for item in draft.delta.placed.values()}
        own = {path for path, its in layers.items() if getattr(its, "bias", None) is not None}
        exactly = paths == {path for path in own if _wrapped(draft, path)}
        draft.config["bias"] = bias if exactly else "all"
    for path in paths:
        draft.tensors[_bias_key(draft, path)] = values[f"{path}.bias"]
    return paths


def _write_other_biases(draft: Draft, written: Collection[str]) -> None:
    """Adds the biases that stay as they are, since with "all" peft has every one in the file."""
    root = draft.delta.home and draft.delta.home.root
    for path, module in walk(root) if root else ():
        inside = any(path == own or path.startswith(f"{own}.") for own in written)
        if not inside and module._parameters.get("bias") is not None:
            draft.tensors[_bias_key(draft, path)] = raw(module, "bias")


def _wrapped(draft: Draft, path: str) -> bool:
    """Whether peft wraps a module, by itself or with its attention."""
    return bool({path, path.rpartition(".")[0]} & draft.targets)


def _bias_key(draft: Draft, path: str) -> str:
    outer, _, name = path.rpartition(".")
    layer = f"{outer}.base_layer.{name}" if outer in draft.targets else path
    layer += ".base_layer" if _wrapped(draft, path) else ""
    return f"{draft.key(layer)}.bias"


def _write_module(
    draft: Draft,
    path: str,
    layer: str,
    module: nn.Module,
    values: Mapping[str, Tensor],
    item: Placed,
) -> None:
    """Adds all of a module, as peft takes it."""
    if not path or any(f"{target}.".startswith(f"{path}.") for target in draft.targets):
        refuse(item, f"peft takes a copy of all of {path or 'the model'}")
    for name, part in walk(module, path):
        if parametrize.is_parametrized(part):
            refuse(item, f"{name} is parametrized")
        for slot, tensor in _tensors(part).items():
            address = f"{name}.{slot}"
            if is_quantized(tensor) and slot in part._parameters:
                refuse(item, f"that takes a copy of {address}, which is quantised")
            rest = address.removeprefix(f"{path}.")
            if layer.endswith(LAYER) and "." in rest:  # where peft keeps an adapter's name
                rest = f"default.{rest}"
            draft.tensors[f"{draft.key(layer)}{rest}"] = values.get(address, tensor)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that a state dict has, no patch applied."""
    found = {slot: raw(module, slot) for slot, p in module._parameters.items() if p is not None}
    buffers = module._buffers.keys() - module._non_persistent_buffers_set
    return found | {slot: b for slot in buffers if (b := module._buffers[slot]) is not None}

"""Writing: a delta as a PEFT directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlite.core.assign import Placed
from peftlite.core.delta import Delta
from peftlite.errors import PeftliteError
from peftlite.io.files import as_json, is_finite, replacing, write_file
from peftlite.io.folders import replacing_folder
from peftlite.io.peft.folder import ALONE, CONFIG, MODEL, PREFIX, PROMPTS
from peftlite.io.peft.forms import FORMS
from peftlite.io.peft.writing.base import about
from peftlite.io.peft.writing.draft import Draft, refuse
from peftlite.io.peft.writing.modules import write_modules
from peftlite.io.peft.writing.prompts import check_task, write_prompts
from peftlite.io.peft.writing.replaced import write_heads, write_replaced
from peftlite.io.peft.writing.shifts import (
    are_shifts,
    beside_lora,
    write_beside_lora,
    write_shifts,
)
from peftlite.io.peft.writing.tokens import rows_of, write_tokens
from peftlite.methods.full import AddPatch
from peftlite.methods.prefix import PrefixTuning
from peftlite.methods.prompt import PromptTuning
from peftlite.methods.ptuning import PTuning
from peftlite.table import listed

__all__ = ["plan", "write"]

AS_IN = "0.21.2"  # the peft that this agrees with
REPLACED = {CONFIG, MODEL, "README.md"}


def write(delta: Delta, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes a delta as a folder that peft loads, with more `settings` of adapter_config.json."""
    more = {**about(delta), **as_json("settings", settings or {})}
    config, tensors = plan(delta, more.get("task_type"))
    config |= {"inference_mode": True, "peft_version": AS_IN, **more}
    if config["peft_type"] in PROMPTS:
        check_task(delta, config.get("task_type"))
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise PeftliteError(f"{key} has values that aren't finite, so it could not be loaded")
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with replacing_folder(path, _kept) as folder:
        if (readme := path / "README.md").exists():
            shutil.copy2(readme, folder)
        write_file(folder / MODEL, tensors, {"format": "pt"})
        with replacing(folder / CONFIG) as file:
            file.write(text.encode())


def _kept(names: set[str]) -> str | None:
    """Why a folder with these names is not to be replaced."""
    if not names or (CONFIG in names and names <= REPLACED):
        return None
    return (
        f"it holds {listed(sorted(names - REPLACED or names))}, and nothing but an adapter is "
        "replaced"
    )


def plan(delta: Delta, task: Any = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors that peft has for a delta. Raises PeftliteError.

    Args:
        task: peft's name of what the model does, if it's known.
    """
    placed = [*delta.placed.values()]
    for item in placed:
        item.check()
        if not item.site.is_call and item.site.whole.is_meta:
            raise PeftliteError(f"{item.site.address} is on the meta device: it has no values")
    with torch.no_grad():
        draft = _draft(delta, task)
        write_heads(draft, placed[0])
    return {**draft.config, "peft_type": draft.kind}, draft.tensors


def _draft(delta: Delta, task: Any) -> Draft:
    items = [*delta.placed.values()]
    kinds = {kind: name for name, form in FORMS.items() for kind in form.kinds}
    kinds |= dict.fromkeys((PromptTuning, PTuning), PROMPTS[0]) | {PrefixTuning: PREFIX}
    names = {name for item in items if (name := kinds.get(type(item.method)))}
    if len(names) > 1:
        raise PeftliteError(_mixed(items))
    own = [item for item in items if type(item.method) in kinds]
    others = [item for item in items if item not in own]
    rows = {item: rows for item in others if (rows := rows_of(item)) is not None}
    biases = beside_lora(own, others)
    replaced = [item for item in others if item not in rows and item not in biases]
    if not own and not rows and are_shifts(replaced):
        return write_shifts(Draft(delta, "BEFT", task), replaced)
    for item in replaced:
        if not isinstance(item.patch, AddPatch):
            refuse(item, f"peft has no {type(item.method).__name__} there")
    draft = Draft(delta, next(iter(names), ALONE), task)
    if draft.form:
        write_modules(draft, draft.form, own)
        if biases:
            write_beside_lora(draft, own, biases)
    elif own:
        write_prompts(draft, own)
    if rows:
        write_tokens(draft, rows, alone=not own and not replaced)
    if replaced:
        write_replaced(draft, replaced)
    return draft


def _mixed(placed: list[Placed]) -> str:
    kinds = ", ".join(dict.fromkeys(type(item.method).__name__ for item in placed))
    return (
        f"peft has one method in an adapter, and this delta has {kinds}: attach them as deltas of "
        "their own, or keep them together with pl.save"
    )

"""Tokens: rows of embeddings, which peft has as they are in the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftlite.core.assign import Placed
from peftlite.core.site import walk, whole_address
from peftlite.io.peft.folder import ROWS, TOKENS
from peftlite.io.peft.form import embeds, is_tied_embedding
from peftlite.io.peft.writing.draft import Draft, module_of, refuse
from peftlite.methods.full import AddPatch
from peftlite.methods.sparse import SparsePatch


def rows_of(item: Placed) -> Tensor | None:
    """The rows of an embedding that a patch changes, if it is all of a few rows."""
    site, patch = item.site, item.patch
    if not embeds(site.module):
        return None
    if isinstance(patch, AddPatch) and site.index is not None and site.index[0] == 0:
        return torch.arange(*site.index[1:])
    if type(patch) is SparsePatch and site.index is None:
        d, entries = site.whole.shape[1], patch.indices.cpu()
        rows = entries.long()[::d] // d
        if torch.equal(entries, (rows[:, None] * d + torch.arange(d)).flatten().int()):
            return rows
    return None


def _targets(draft: Draft, item: Placed) -> list[str]:
    """The modules to name: with transformers 5, peft fails where one it finds itself is named."""
    home, own = draft.delta.home, [module for module, _ in item.site.owners]
    modules = [] if home is None or home.root is None else [*walk(home.root)]
    for path, module in modules:
        if is_tied_embedding(modules[0][1], module) and any(module is each for each in own):
            return [path]
    return [whole_address(name).rpartition(".")[0] for name in item.site.names]


def write_tokens(draft: Draft, items: Mapping[Placed, Tensor], alone: bool) -> None:
    """Adds rows of embeddings.

    Args:
        items: with the rows that each changes.
        alone: whether the delta has nothing else.
    """
    found: dict[str, Tensor] = {}
    for item, rows in items.items():
        path = module_of(item)
        found[path] = torch.cat([found[path], rows]) if path in found else rows
    inner = "" if alone else ".token_adapter"
    indices: dict[str, list[int]] = {}
    for item in items:
        if any(getattr(module, "bias", None) is not None for module, _ in item.site.owners):
            refuse(item, "peft leaves out the bias of what has the same weight")
        rows, value = found[module_of(item)], draft.value(item)
        for name in item.site.names:  # of a tied weight peft has the same rows at each
            path = whole_address(name).rpartition(".")[0]
            draft.tensors[f"{draft.key(path)}{inner}{TOKENS}"] = value[rows.to(value.device)]
            indices[path] = rows.tolist()
    if alone and len({*map(tuple, indices.values())}) == 1:
        draft.kind, (tokens, *_) = ROWS, indices.values()
        targets = {path for item in items for path in _targets(draft, item)}
        draft.config = {"target_modules": sorted(targets), "token_indices": tokens}
    elif draft.kind == "LORA":
        draft.config["trainable_token_indices"] = indices
    else:
        item = next(iter(items))
        refuse(item, f"peft has rows of embeddings beside LoRA, and not {draft.kind}")

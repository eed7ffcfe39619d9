"""Prompts: the rows of a prompt or a prefix, whatever network they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftlite.core.assign import Placed
from peftlite.core.delta import Delta
from peftlite.errors import PeftliteError
from peftlite.io.peft.folder import CLASSIFIES, PREFIX
from peftlite.io.peft.reading.prompts import places_of
from peftlite.io.peft.writing.draft import Draft, refuse


def check_task(delta: Delta, task: Any) -> None:
    """Raises PeftliteError if peft would put a delta's prompt elsewhere for a task."""
    if not task:
        raise PeftliteError(
            "peft puts a prompt where the task says: give settings={'task_type': 'CAUSAL_LM'}, or "
            "SEQ_CLS, SEQ_2_SEQ_LM, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION"
        )
    item = next(iter(delta.placed.values()))
    looks_back = any(getattr(m, "is_causal", False) for m in item.site.module.modules())
    if task == CLASSIFIES and getattr(item.method, "cut", False) and not looks_back:
        refuse(
            item,
            "a classifier of peft's reads the first virtual token, and with this one the first "
            "real one (attach with targets='()' and cut=False for peft's)",
        )


def write_prompts(draft: Draft, items: Sequence[Placed]) -> None:
    """Adds the one tensor of a prompt or a prefix."""
    found = [x.detach() for item in items for x in item.patch.saved().values()]
    if len({id(item.method) for item in items}) > 1 or len({x.shape for x in found}) > 1:
        refuse(items[0], "peft has one prompt in an adapter, or one shape of prefix")
    if draft.kind == PREFIX:
        if not items[0].method.shifted:
            refuse(
                items[0],
                "peft counts a prefix in the tokens' positions, and this one takes none (attach "
                "with positions='shifted' for peft's)",
            )
        _, heads, n, d = found[0].shape
        doubled = bool(getattr(items[0].site.module.config, "is_encoder_decoder", False))
        # of an odd number, peft finds each in a place of its own
        most = len(found) | doubled
        layers = torch.zeros(most, *found[0].shape, dtype=found[0].dtype)
        for layer, place in enumerate(places_of(len(found), most, doubled)):
            layers[place] = found[layer].cpu()
        rows = layers.permute(3, 0, 1, 2, 4).flatten(1)
        draft.config |= {"num_layers": most, "num_attention_heads": heads}
    else:
        (rows,) = found
        (n, d), heads = rows.shape, 1
        doubled = False
    draft.tensors["prompt_embeddings"] = rows
    draft.config |= {"num_virtual_tokens": n, "token_dim": heads * d}
    draft.config |= {"num_transformer_submodules": 1 + doubled}

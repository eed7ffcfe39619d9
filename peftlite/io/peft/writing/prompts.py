"""Prompts: the rows of a prompt or a prefix, whatever network they come from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from peftlite.core.assign import Placed
from peftlite.io.peft.folder import PREFIX
from peftlite.io.peft.writing.draft import Draft, refuse


def write_prompts(draft: Draft, items: Sequence[Placed]) -> None:
    """Adds the one tensor of a prompt or a prefix."""
    found = [x.detach() for item in items for x in item.patch.saved().values()]
    if len({id(item.method) for item in items}) > 1 or len({x.shape for x in found}) > 1:
        refuse(items[0], "peft has one prompt in an adapter, or one shape of prefix")
    draft.config = {"num_transformer_submodules": 1}
    if draft.kind == PREFIX:
        _, heads, n, d = found[0].shape
        rows = torch.stack([x.cpu() for x in found]).permute(3, 0, 1, 2, 4).flatten(1)
        draft.config |= {"num_layers": len(found), "num_attention_heads": heads}
        warnings.warn(
            f"peft has a sequence's positions begin at {n}, behind the prefix, and here they "
            f"begin at 0; for the same outputs there take {n} from position_ids",
            stacklevel=6,
        )
    else:
        (rows,) = found
        (n, d), heads = rows.shape, 1
    draft.tensors["prompt_embeddings"] = rows
    draft.config |= {"num_virtual_tokens": n, "token_dim": heads * d}

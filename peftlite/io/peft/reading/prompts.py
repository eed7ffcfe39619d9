"""Prompts: the rows of a prompt or a prefix, whatever network they once came from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from peftlite.core.patch import Method
from peftlite.core.targets import select
from peftlite.io.peft.folder import PREFIX, PROMPTS
from peftlite.io.peft.form import fit
from peftlite.io.peft.reading.adapter import Adapter, Claim, Left
from peftlite.methods.prefix import PrefixTuning
from peftlite.methods.prompt import PromptTuning


def read_prompts(adapter: Adapter, left: Left) -> Iterator[Claim]:
    """The one tensor of a prompt or a prefix."""
    if adapter.kind not in PROMPTS:
        return
    n, copies, width, heads = _sizes(adapter)
    method = _method(adapter, n, width, heads)
    if adapter.model is None:
        yield Claim({}, [(method, "")])
        return
    sites = [site for site, _ in select(adapter.everything, None, None, method)]
    patches = method.build_all([replace(site, on="meta") for site in sites])
    own = [f"{s.address}:{k}" for s, p in zip(sites, patches, strict=True) for k in p.saved()]
    key = left["prompt_embeddings"]

    def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = t[key]
        if adapter.kind == PREFIX:  # a token's keys and values lie side by side for all layers
            layers = fit(rows, n, len(own) * 2 * width).view(n, len(own), 2, heads, -1)
            return {k: layers[:, i].permute(1, 2, 0, 3) for i, k in enumerate(own)}
        # of an encoder's and a decoder's, peft uses the first
        return {own[0]: rows[:n] if len(rows) == n * copies else rows}

    yield adapter.claim({key: key}, [(method, site.address) for site in sites], make)
    if adapter.kind == PREFIX:
        warnings.warn(
            f"{adapter.file.path!r}: peft has a sequence's positions begin at {n}, behind the "
            f"prefix, and here they begin at 0; for peft's outputs add {n} to position_ids",
            stacklevel=5,
        )


def _sizes(adapter: Adapter) -> tuple[int, int, int, int]:
    """How many tokens, copies of them, numbers in each, and heads the settings say."""
    take = adapter.config.take
    n, copies = (take(k, 1, int) for k in ("num_virtual_tokens", "num_transformer_submodules"))
    width, heads = take("token_dim", 0, int), take("num_attention_heads", 0, int) or 1
    take("num_layers", None, int)
    take("prefix_projection", None, bool)
    for name in adapter.config.data:
        if name.startswith(("prompt_tuning_", "encoder_", "tokenizer_")):
            take(name, None, str, int, float, dict)
    return n, copies, width, heads


def _method(adapter: Adapter, n: int, width: int, heads: int) -> Method:
    if adapter.kind == PREFIX:
        return PrefixTuning(prefix_length=n, num_heads=heads, head_dim=width // heads)
    # in peft what pools the first position has a virtual token there
    pools = any(getattr(m, "pooler", None) is not None for m in adapter.modules.values())
    return PromptTuning(prompt_length=n, cut=not pools)

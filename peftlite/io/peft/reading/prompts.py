"""Prompts: the rows of a prompt or a prefix, whatever network they once came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from peftlite.core.patch import Method
from peftlite.core.targets import select
from peftlite.errors import FileError
from peftlite.io.peft.folder import CLASSIFIES, GENERATES, PREFIX, PROMPTS
from peftlite.io.peft.form import fit
from peftlite.io.peft.reading.adapter import Adapter, Claim, Left
from peftlite.methods.prefix import PrefixTuning
from peftlite.methods.prompt import PromptTuning, encoder, takers
from peftlite.table import short


def read_prompts(adapter: Adapter, left: Left) -> Iterator[Claim]:
    """The one tensor of a prompt or a prefix."""
    if adapter.kind not in PROMPTS:
        return
    n, copies, width, heads, count = _sizes(adapter)
    task = adapter.config.data.get("task_type")
    if copies > 1 and adapter.kind != PREFIX and task != GENERATES[1]:
        raise FileError(
            f"{adapter.config.path!r} has 'num_transformer_submodules' as {copies} and 'task_type' "
            f"as {short(task)}, for which peft runs all copies of its prompt with a mask for one"
        )
    method = _method(adapter, n, width, heads)
    if adapter.model is None:
        yield Claim({}, [(method, "")])
        return
    at = _classifier(adapter)
    chosen = select(adapter.everything, at, None, replace(method, targets=at))
    sites = [site for site, _ in chosen]
    patches = method.build_all([replace(site, on="meta") for site in sites])
    own = [f"{s.address}:{k}" for s, p in zip(sites, patches, strict=True) for k in p.saved()]
    key = left["prompt_embeddings"]
    if adapter.kind == PREFIX:
        _check_sizes(adapter, key, n, (count or len(own)) * 2 * width)
    else:
        _check_sizes(adapter, key, n * copies, width)

    def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = t[key]
        if adapter.kind == PREFIX:  # a token's keys and values lie side by side for all layers
            most = max(count, len(own))
            layers = fit(rows, n, most * 2 * width).view(n, most, 2, heads, width // heads)
            places = places_of(len(own), most, copies > 1)
            return {k: layers[:, i].permute(1, 2, 0, 3) for k, i in zip(own, places, strict=True)}
        # of an encoder's and a decoder's, peft uses the first
        return {own[0]: rows[:n] if len(rows) == n * copies else rows}

    yield adapter.claim({key: key}, [(method, site.address) for site in sites], make)


def _check_sizes(adapter: Adapter, key: str, rows: int, columns: int) -> None:
    """Raises FileError if the tensor is of other sizes than the settings say."""
    found = adapter.file.entries[key].shape
    if found != (rows, columns or found[-1]):
        raise FileError(
            f"{adapter.config.path!r} comes to {rows} rows of {columns} numbers, by its "
            "num_virtual_tokens, num_transformer_submodules, token_dim and num_layers, and "
            f"prompt_embeddings is {found}: they aren't of one adapter, so save it again"
        )


def places_of(layers: int, most: int, doubled: bool) -> list[int]:
    """Where peft finds the prefix of each layer, among as many as it has.

    For a decoder beside an encoder it doubles the list and takes every other entry, leaving the
    rest to the attention to the encoder, which then doesn't get them.
    """
    return [i * (1 + doubled) % most for i in range(layers)]


def _sizes(adapter: Adapter) -> tuple[int, int, int, int, int]:
    """How many tokens, copies of them, numbers in each, heads and layers the settings say."""
    take = adapter.config.take
    n, copies = (take(k, 1, int) for k in ("num_virtual_tokens", "num_transformer_submodules"))
    width, heads = take("token_dim", 0, int), take("num_attention_heads", 0, int) or 1
    count = take("num_layers", 0, int)
    take("prefix_projection", None, bool)
    for name in adapter.config.data:
        if name.startswith(("prompt_tuning_", "encoder_", "tokenizer_")):
            take(name, None, str, int, float, dict)
    return n, copies, width, heads, count


def _method(adapter: Adapter, n: int, width: int, heads: int) -> Method:
    if adapter.kind == PREFIX:
        sizes = {"num_heads": heads, "head_dim": width // heads}
        return PrefixTuning(prefix_length=n, positions="shifted", **sizes)
    # where it doesn't generate, peft gives a model embeddings alone
    embeds = adapter.config.data.get("task_type") not in GENERATES
    if _classifier(adapter):
        return PromptTuning(prompt_length=n, cut=False, embeds=embeds, fill={"labels": None})
    # what pools the first position has a virtual token there
    pools = any(getattr(m, "pooler", None) is not None for m in adapter.modules.values())
    return PromptTuning(prompt_length=n, cut=not pools, embeds=embeds)


def _classifier(adapter: Adapter) -> str | None:
    """The call of a whole classifier of sequences, before which peft puts its prompt.

    So a head that reads the first position, as BERT's and RoBERTa's do, reads a virtual token.
    """
    if adapter.kind == PREFIX or adapter.config.data.get("task_type") != CLASSIFIES:
        return None
    return next((s.address for s in takers(adapter.everything) if not encoder(s.module)), None)

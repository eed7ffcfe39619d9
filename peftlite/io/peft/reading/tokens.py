"""Tokens: rows of embeddings that peft saved as they were in the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftlite.errors import FileError
from peftlite.io.peft.config import ends
from peftlite.io.peft.folder import TOKENS
from peftlite.io.peft.reading.adapter import Adapter, Claim, Left, difference, plain
from peftlite.methods.sparse import SparseMask
from peftlite.table import short


def read_tokens(adapter: Adapter, left: Left) -> Iterator[Claim]:
    """The rows of every embedding that the file has rows of."""
    tokens: Any = adapter.config.take("trainable_token_indices", None, list, dict)
    tokens = adapter.config.take("token_indices", tokens, list)
    for rest, key in left.items():
        if rest.endswith(TOKENS):
            path = plain(rest.removesuffix(TOKENS).removesuffix(".token_adapter"))
            yield _rows(adapter, key, path, _tokens_of(adapter, path, tokens))


def _tokens_of(adapter: Adapter, path: str, tokens: Any) -> Tensor:
    """The tokens of one embedding; the settings have them for all or by its path."""
    if isinstance(tokens, dict):
        tokens = next((own for name, own in tokens.items() if ends(path, name)), None)
    if not isinstance(tokens, list) or not all(type(i) is int and i >= 0 for i in tokens):
        raise FileError(f"{adapter.config.path!r} has {short(tokens)} for the tokens of {path}")
    return torch.tensor(tokens, dtype=torch.int64)


def _rows(adapter: Adapter, key: str, path: str, rows: Tensor) -> Claim:
    address = f"{path}.weight"
    site, placed = adapter.sites.get(address), [(SparseMask(select="given"), address)]
    if site is None:
        return Claim({key: key}, placed, module=path)
    if biased := [module for module, _ in site.owners if getattr(module, "bias", None) is not None]:
        raise FileError(
            f"{adapter.file.path!r} changes tokens of {address}, a weight of a "
            f"{type(biased[0]).__name__} with a bias, which peft leaves out of its outputs"
        )
    n, d = site.shape
    if len(rows.unique()) < len(rows) or not all(i < n for i in rows):
        raise ValueError(f"the tokens of {address} are beyond its {n}, or named twice")

    def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
        change = difference(key, t[key], site.whole[rows.to(site.device)])
        order = rows.argsort()
        entries = (rows[order, None] * d + torch.arange(d)).flatten().int()
        return {
            f"{address}:values": change[order].flatten(),
            f"{address}:indices": entries.to(change.device),
        }

    return adapter.claim({key: key}, placed, make, path)

"""Copies: the base's own tensors, which peft saves beside some adapters and which must agree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from peftlite.errors import FileError
from peftlite.io.peft.reading.adapter import Adapter, Claim, Left, plain


def read_copies(adapter: Adapter, left: Left) -> Iterator[Claim]:
    """Weights of wrapped modules, and of embeddings, that are no change: the base has them."""
    outer = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            outer.append(getattr(adapter.model, name)())
    for rest, key in left.items():
        path = plain(rest).replace(".original_module.", ".")
        site = adapter.sites.get(path)
        if site is not None and (path != rest or any(site.module is m for m in outer)):
            yield compared(adapter, key, site.whole)


def compared(adapter: Adapter, key: str, mine: Tensor, module: str = "") -> Claim:
    """A claim that nothing comes of, the tensor being the base's. Raises FileError if it isn't."""
    theirs = adapter.file.get(key)
    if theirs.shape != mine.shape or not torch.equal(theirs, mine.detach().cpu().to(theirs)):
        raise FileError(
            f"{adapter.file.path!r} holds {key} of a base that had other values there: give the "
            "model those, or list the module in 'modules_to_save' of its settings, for the "
            "delta to have them"
        )
    return Claim({key: key}, module=module)

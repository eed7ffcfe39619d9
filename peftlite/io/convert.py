"""convert: a delta's file in another format, or out of its pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from torch import nn

from peftlite.core.attach import deltas, detach
from peftlite.errors import PeftliteError
from peftlite.fields import check_given
from peftlite.io.export import export
from peftlite.io.files import Tensors, as_path, replacing, write_tensors
from peftlite.io.load import load
from peftlite.io.native import save
from peftlite.io.peers import FORMATS
from peftlite.io.peers.peer import ALPHA, PARTS
from peftlite.io.peers.reading import Reading
from peftlite.io.to import To
from peftlite.io.unpickled import Unpickled, is_pickle


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: To = "safetensors",
    *,
    model: nn.Module | None = None,
    alpha: float | None = None,
    parts: Sequence[str] = (),
) -> None:
    """Writes a delta's file in another format.

    Args:
        path: what `load` reads, or such a file as a pickle (.pt, .pth, .bin).
        to: "safetensors" leaves the tensors and their names as they are, in no pickle, with α and
            the parts said. The others are the formats of `save` and `export`.
        model: the base with its weights, for all but "safetensors"; it is as it was in the end.
        alpha: α, for files that don't say it: loralib's, litgpt's, torchtune's, minLoRA's.
        parts: which parts of fused weights have changes, in order, for loralib's MergedLinear and
            litgpt's qkv: what an address has in its brackets, ["q", "v"] or ["0:64", "80:96"].

    Raises:
        FileError: the file is no delta, is damaged, or doesn't fit the model.
        PeftliteError: the format has nothing that is this delta, or an argument isn't of these.
    """
    check_given("to", to, get_args(To))
    source, target = as_path(path), as_path(out)
    if to == "safetensors":
        return _rewrite(source, target, alpha, parts)
    if model is None:
        raise PeftliteError(
            f"{to!r} goes by a model: give it with model=, or convert to 'safetensors', which "
            "leaves names as they are"
        )
    if deltas(model):
        raise PeftliteError("convert takes a model without deltas: pl.detach them first")
    with tempfile.TemporaryDirectory() as folder:
        if alpha is not None or parts or is_pickle(source):
            source, given = Path(folder) / "delta.safetensors", source
            _rewrite(given, source, alpha, parts)
        delta = load(model, source)
        try:
            save(delta, target) if to == "peftlite" else export(delta, target, to)
        finally:
            detach(model, delta.name)


def _rewrite(source: Path, target: Path, alpha: float | None, parts: Sequence[str]) -> None:
    """Writes tensors as they are, with what is to be said beside them."""
    file = Unpickled(source) if is_pickle(source) else Tensors(source)
    peer = next((each.peer for each in FORMATS if each.recognises(source, file)), None)
    said = {} if alpha is None else {ALPHA: str(alpha)}
    said |= {PARTS: json.dumps(list(parts))} if parts else {}
    if said and (peer is None or peer.alpha is not None):
        raise PeftliteError(
            f"alpha= and parts= are for files that don't say them, and {file.path!r} is "
            f"{f'of {peer.name}' if peer else 'of no such format'}"
        )
    file.metadata |= said
    if peer is not None:
        Reading(peer, file)
    with replacing(target) as out:
        write_tensors(out, file.entries, file.get, lambda _: {"format": "pt", **file.metadata})

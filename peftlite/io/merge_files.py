"""merge_files: a delta's file merged into a checkpoint's, tensor by tensor, without the model."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import Tensor

from peftlite.core.patch import Patch
from peftlite.core.site import whole_address
from peftlite.core.values import by_tensor, checked, refuse_calls
from peftlite.errors import BaseMismatchError
from peftlite.io.checkpoint import Checkpoint
from peftlite.io.fingerprint import difference, fingerprint, kind_of
from peftlite.io.fitting import CheckBase, check_mode
from peftlite.io.load import inspect, load
from peftlite.io.names import by_names_of
from peftlite.io.tied import base_of
from peftlite.progress import bar
from peftlite.verbs.merge import Receipt


def merge_files(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    check_base: CheckBase = "error",
    progress: bool = False,
) -> Receipt:
    """Writes the checkpoint that `pl.merge` and saving the model would give, bit for bit.

    The base is a safetensors file, or a folder with shards and their index as transformers and
    diffusers leave it; then `out` is a new folder like it. Tensors go through one by one: of the
    base's, one and its merged value are in memory at a time. Whatever the delta doesn't touch is
    copied byte for byte. Nothing is at `out` until all of it is there.

    Args:
        check_base: what to do if a tensor isn't the one that the delta was made for.
        progress: whether to show a bar.

    Raises:
        BaseMismatchError: the delta was made for other weights.
        FileError: a file is missing or damaged, or can't be written, or doesn't fit the other.
        PeftliteError: the delta changes calls, or a weight would not be finite.

    Example:
        from safetensors.torch import save_file

        model = nn.Linear(4, 2)
        save_file(model.state_dict(), "base.safetensors")
        pl.save(pl.attach(model, pl.LoRA(rank=2)), "sql.safetensors")
        print(pl.merge_files("base.safetensors", "sql.safetensors", "out.safetensors"))
    """
    check_mode(check_base)
    checkpoint = Checkpoint(base)
    info = by_names_of(checkpoint, inspect(delta))
    model = base_of(checkpoint, info.modules, info.transposed)
    placed = load(model, delta, check_base="off")
    refuse_calls(placed)
    touched: dict[str, tuple[str, list[Patch]]] = {
        whole_address(name): (address, patches)
        for address, (site, patches) in by_tensor(placed).items()
        for name in site.names
    }
    change: dict[str, float] = {}

    def merged(key: str) -> Tensor | None:
        if key not in touched:
            return None
        address, patches = touched[key]
        w = checkpoint[key]
        _check(info.base.get(address), key, w, str(delta), check_base)
        value, change[key] = checked(placed.name, key, patches, w)
        return value

    how = {"total": checkpoint.num_bytes, "unit": "B", "unit_scale": True, "leave": False}
    with bar(None, f"merge {placed.name}", **how, disable=not progress) as done:
        checkpoint.rewrite(out, merged, done.update)
    return Receipt(placed.name, change, {}, {})


def _check(theirs: dict[str, Any] | None, key: str, w: Tensor, path: str, mode: str) -> None:
    """Compares a tensor with the one that the delta in a file was made for."""
    if theirs is None or mode == "off":
        return
    how = difference(theirs, fingerprint(w, kind_of(theirs) or ""))
    if how is None:
        return
    message = f"{path!r} was made for other base weights: {key} differs{how}"
    if mode == "error":
        raise BaseMismatchError(
            f"{message}; merge it into the base it was trained on, or pass check_base='warn'"
        )
    warnings.warn(message, stacklevel=2)

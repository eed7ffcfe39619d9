"""The demo's base model: trained once, then read from a file that is checked to the bit."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftlite.demo.training import Recipe, train


def pretrain(
    model: nn.Module, text: Tensor, recipe: Recipe, path: Path, key: str, fresh: bool
) -> None:
    """Fills the model from the file, if that is whole and was made for `key`; else trains it."""
    state = None if fresh else _read(path, key)
    if state is None:
        train(model, model.parameters(), text, recipe, "pretrain the base")
        _write(path, key, model.state_dict())
    else:
        model.load_state_dict(state)


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """What `_write` left there; none if the file is missing, damaged, or another's."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            stamp = (file.metadata() or {}).get("stamp")
    except (OSError, SafetensorError):
        return None
    return state if stamp == _stamp(key, state) else None


def _write(path: Path, key: str, state: dict[str, Tensor]) -> None:
    # another demo may be reading: the file appears whole or not at all
    part = path.with_suffix(f".{os.getpid()}")
    try:
        save_file(state, part, metadata={"stamp": _stamp(key, state)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _stamp(key: str, state: dict[str, Tensor]) -> str:
    """A hash of the weights and of what they were made from."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(state):
        digest.update(f"{name} {tuple(state[name].shape)}".encode())
        digest.update(state[name].numpy())
    return digest.hexdigest()

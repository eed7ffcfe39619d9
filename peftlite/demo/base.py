"""The demo's base model: trained once, then read from a file that is checked to the bit."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftlite.demo.train import Recipe, train


def pretrain(model: nn.Module, text: Tensor, recipe: Recipe, path: Path, fresh: bool) -> bool:
    """Fills the model from `path` if that file is whole, else by training. True if it trained."""
    if not fresh and (state := _read(path)):
        model.load_state_dict(state)
        return False
    train(model, model.parameters(), text, recipe, "pretrain")
    _write(path, model.state_dict())
    return True


def _read(path: Path) -> dict[str, Tensor] | None:
    """What `_write` left there; none if the file is missing, damaged, or another's."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
            stamp = (file.metadata() or {}).get("stamp")
    except (OSError, SafetensorError):
        return None
    return state if stamp == _stamp(state, path) else None


def _write(path: Path, state: dict[str, Tensor]) -> None:
    # another demo may be reading: the file appears whole or not at all
    half = path.with_suffix(f".{os.getpid()}")
    try:
        save_file(state, half, metadata={"stamp": _stamp(state, path)})
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def _stamp(state: dict[str, Tensor], path: Path) -> str:
    """A hash of the weights and of what they were made from, which the path says."""
    digest = hashlib.sha256(path.name.encode())
    for key in sorted(state):
        digest.update(f"{key} {tuple(state[key].shape)}".encode())
        digest.update(state[key].numpy().tobytes())
    return digest.hexdigest()

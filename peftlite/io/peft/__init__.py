"""PEFT's directories, of adapter_config.json and adapter_model.safetensors, read and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from peftlite.core.site import Site
from peftlite.io.content import Content, Info, told
from peftlite.io.files import Tensors
from peftlite.io.peft.folder import CONFIG, MODEL, folders
from peftlite.io.peft.reading import Reading
from peftlite.io.peft.writing import write

__all__ = ["inspect", "read", "recognises", "write"]


def recognises(path: Path, file: Tensors | None) -> bool:
    """Whether a folder (or the file in it) is of this format, or has folders that are."""
    if file is not None:
        return path.name == MODEL and (path.parent / CONFIG).exists()
    return (path / CONFIG).exists() or bool(folders(path))


def inspect(path: Path) -> Info:
    """What a folder says, its values not looked at. Raises FileError."""
    reading = Reading(path)
    adapter = reading.adapter
    return Info(
        name=adapter.name,
        methods=reading.methods,
        tensors=told(adapter.file.entries),
        num_bytes=adapter.file.num_bytes,
        format="peft",
        transposed=bool(adapter.config.data.get("fan_in_fan_out")),
    )


def read(path: Path, model: nn.Module, sites: Sequence[Site]) -> Content:
    """A folder's content; each tensor is read as it is asked for. Raises FileError."""
    reading = Reading(path, model, sites)
    return Content(reading.adapter.name, reading.methods, reading.entries, reading.get)

"""PEFT's directories, of adapter_config.json and adapter_model.safetensors, read and written."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from peftlite.io.content import Content, Info
from peftlite.io.files import Tensors
from peftlite.io.peft.reading import CONFIG, MODEL, Reading, folders


def recognises(path: Path, file: Tensors | None) -> bool:
    """Whether a folder (or the file in it) is of this format, or has folders that are."""
    if file is not None:
        return path.name == MODEL and (path.parent / CONFIG).is_file()
    return (path / CONFIG).is_file() or bool(folders(path))


def inspect(path: Path) -> Info:
    """What a folder says, its values not looked at. Raises FileError."""
    reading = Reading(path)
    entries = reading.file.entries.items()
    return Info(
        name=reading.name,
        methods=list(reading.methods.items()),
        tensors={key: (str(its.dtype).removeprefix("torch."), its.shape) for key, its in entries},
        num_bytes=reading.file.num_bytes,
        format="peft",
        transposed=bool(reading.config.data.get("fan_in_fan_out")),
    )


def read(model: nn.Module, path: Path) -> Content:
    """A folder's content; each tensor is read as it is asked for. Raises FileError."""
    reading = Reading(path, model)
    methods = list(reading.methods.items())
    return Content(reading.name, methods, reading.entries, reading.get)

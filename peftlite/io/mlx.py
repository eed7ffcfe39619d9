"""mlx-lm's folders, of adapter_config.json and adapters.safetensors: LoRA and DoRA.

y = Wx + scale·(x a) b, with a (i, r) and b (r, o), which are ours the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from peftlite.errors import FileError
from peftlite.io.files import Entry, Tensors
from peftlite.io.peers import Format
from peftlite.io.peers.peer import ALPHA, Peer
from peftlite.io.peft import folder as peft
from peftlite.io.peft.config import Config
from peftlite.methods.dora import DoRA
from peftlite.methods.lora import LoRA
from peftlite.table import short

MODEL = "adapters.safetensors"
_FACTORS = {"a": "lora_a", "b": "lora_b"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


class Folder(Format):
    """A folder, or the file of tensors in it."""

    def recognises(self, path: Path, file: Tensors | None) -> bool:
        """Whether a folder (or the file in it) is of this format, going by the files there."""
        folder = path if file is None else path.parent
        there = [(folder / name).is_file() for name in (peft.CONFIG, MODEL, peft.MODEL)]
        return there == [True, True, False] and (file is None or path.name == MODEL)

    def open(self, path: Path) -> Tensors:
        """The tensors, A and B as ours lie, and α. Raises FileError."""
        folder = path if path.is_dir() else path.parent
        where = str(folder / peft.CONFIG)
        config, file = Config(peft.read_settings(where), where), _Turned(folder / MODEL)
        kind = config.take("fine_tune_type", "lora", str)
        if kind not in ("lora", "dora"):
            raise FileError(
                f"{where!r} has the fine_tune_type {short(kind)}, which leaves whole weights: "
                "pl.extract makes a delta of the model before and after"
            )
        its = Config(config.take("lora_parameters", {}, dict), where)
        rank, scale = its.number("rank", 0), its.number("scale", 0)
        if its.number("alpha", rank) != rank:
            raise FileError(
                f"{where!r} has both alpha and scale: mlx-lm made scale·alpha/rank of them once, "
                "and goes by scale alone since; write the right one as scale, and take alpha out"
            )
        _agree(where, "rank", rank, _ranks(file))
        _agree(where, "fine_tune_type", kind, {_kind(file)})
        layers = {found[1] for found in map(_LAYER.search, file.entries) if found}
        most = config.take("num_layers", -1, int)
        _agree(where, "num_layers", most, {len(layers)} if len(layers) > most > 0 else {most})
        file.metadata = {ALPHA: str(scale * rank)}
        return file


class _Turned(Tensors):
    """A file with A and B as ours lie."""

    def __init__(self, path: Path):
        super().__init__(path)
        for key, its in self.entries.items():
            self.entries[key] = Entry.of(_turned(key, its.meta))

    def get(self, key: str) -> Tensor:
        return _turned(key, super().get(key))


def _turned(key: str, x: Tensor) -> Tensor:
    return x.mT if key.endswith((".lora_a", ".lora_b")) and x.dim() == 2 else x


def _ranks(file: Tensors) -> set[int]:
    own = (its.shape for key, its in file.entries.items() if key.endswith(".lora_a"))
    return {shape[-2] for shape in own if len(shape) > 1}


def _kind(file: Tensors) -> str:
    return "dora" if any(key.endswith(".m") for key in file.entries) else "lora"


def _agree(where: str, name: str, says: object, found: Collection[object]) -> None:
    """Raises FileError if tensors aren't as a setting says."""
    if other := {*found} - {says}:
        raise FileError(
            f"{where!r} has {name!r} as {says}, and the tensors beside it have "
            f"{', '.join(map(str, other))}: they aren't of one adapter, so save it again"
        )


FOLDER = Folder(Peer("mlx-lm", {LoRA: _FACTORS, DoRA: {**_FACTORS, "m": "m"}}, ties=True))

"""FourierFT and SHiRA in PEFT: a few entries of a spectrum, and of a weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from peftlite.core import maps
from peftlite.core.patch import Method
from peftlite.io.peft.config import Config
from peftlite.io.peft.form import Form, Layer, Tensors, agreed, size_of
from peftlite.methods.fourier import FourierFT
from peftlite.methods.shira import SHiRA


class FourierFTForm(Form):
    type = "FOURIERFT"
    kinds: ClassVar[tuple[type[Method], ...]] = (FourierFT,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (("fourierft_spectrum", "c"),)
    layers: ClassVar[tuple[type[maps.Map], ...]] = (maps.Linear, maps.TransposedLinear)
    bias: ClassVar[str | None] = "fourier_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> FourierFT:
        table, says = "n_frequency_pattern", config.number("n_frequency", 1000)
        says = config.patterned(table, layer.name, says, r".*\.{}")
        return FourierFT(
            n=agreed(config, layer, "n_frequency", says, size_of(t, "fourierft_spectrum")),
            alpha=config.number("scaling", 150.0),
            seed=config.take("random_loc_seed", 777, int),
        )

    def settings(self, method: FourierFT, patch: Any) -> dict[str, Any]:
        return {"n_frequency": patch.n, "scaling": method.alpha, "random_loc_seed": method.seed}

    def joined(self, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        found = super().joined(settings)
        if "n_frequency_pattern" in found:  # whose keys are for the ends of longer paths alone
            own = {path: its["n_frequency"] for path, its in settings.items()}
            found["n_frequency_pattern"] = {_exactly(path): n for path, n in own.items()}
        return found


def _exactly(path: str) -> str:
    """A regex for a path that, put behind `.*\\.`, matches no longer one."""
    start, dot, end = path.rpartition(".")
    return f"(?<=^{re.escape(start + dot)}){re.escape(end)}" if dot else path


class SHiRAForm(Form):
    type = "SHIRA"
    kinds: ClassVar[tuple[type[Method], ...]] = (SHiRA,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (
        ("shira_weight", "values"),
        ("shira_indices", "indices"),
    )

    def method(self, config: Config, layer: Layer, t: Tensors) -> SHiRA:
        count, width = size_of(t, "shira_weight"), sum(layer.site.shape) if layer.site else 1
        says = config.number("r", 32)
        agreed(config, layer, "r", says, count and count / width)
        return SHiRA(rank=int(says))

    def settings(self, method: SHiRA, patch: Any) -> dict[str, Any]:
        return {"r": method.rank}

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
        values, (row, column) = t.pop("shira_weight"), t.pop("shira_indices").long()
        if values.is_meta:
            return {"values": values, "indices": row.int()}
        rows, columns = layer.site.shape
        entries, order = (row * columns + column).sort()
        inside = ((row >= 0) & (row < rows) & (column >= 0) & (column < columns)).all()
        if not inside or (entries[1:] == entries[:-1]).any():
            raise ValueError("its shira_indices are beyond the weight, or name an entry twice")
        return {"values": values[order], "indices": entries.int()}

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        indices, columns = patch.indices.long(), layer.site.shape[1]
        pairs = torch.stack([indices // columns, indices % columns]).int()
        return {"shira_weight": patch.values.detach(), "shira_indices": pairs}

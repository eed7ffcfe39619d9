"""FourierFT and SHiRA in PEFT: a few entries of a spectrum, and of a weight."""

from __future__ import annotations

from typing import Any

import torch

from peftlite.core import maps
from peftlite.io.peft.config import Config
from peftlite.io.peft.form import Form, Layer, Tensors
from peftlite.methods.fourier import FourierFT
from peftlite.methods.shira import SHiRA


class FourierFTForm(Form):
    type = "FOURIERFT"
    kinds = (FourierFT,)
    names = (("fourierft_spectrum", "c"),)
    layers = (maps.Linear, maps.TransposedLinear)
    bias = "fourier_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> FourierFT:
        return FourierFT(
            n=len(t["fourierft_spectrum"]),
            alpha=config.number("scaling", 150.0),
            seed=config.take("random_loc_seed", 777, int),
        )

    def settings(self, method: FourierFT, patch: Any) -> dict[str, Any]:
        return {"n_frequency": patch.n, "scaling": method.alpha, "random_loc_seed": method.seed}


class SHiRAForm(Form):
    type = "SHIRA"
    kinds = (SHiRA,)
    names = (("shira_weight", "values"), ("shira_indices", "indices"))

    def method(self, config: Config, layer: Layer, t: Tensors) -> SHiRA:
        return SHiRA(rank=int(config.number("r", 32)))

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

"""MixedEmbedding: y = W[ids] + s_k·B_k A_k[:, ids]: low-rank changes of an embedding, looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftlite.bank.families.gather import per_row
from peftlite.bank.families.low_rank import MixedLowRank
from peftlite.bank.rows import Rows, Tables
from peftlite.core.maps import Embedding, Map, kind_of, unwrap
from peftlite.core.site import Site
from peftlite.errors import TargetError


class MixedEmbedding(MixedLowRank):
    """A (R, words) and B (d, R) in each slot, as of a linear map of one-hot words."""

    @staticmethod
    def suits(site: Site) -> None:
        if {kind_of(module) for module, _ in site.owners} != {Embedding}:
            raise TargetError(
                f"{site.address} isn't of an embedding alone, so its rows can't be told apart: "
                "leave it out of the bank's methods with exclude="
            )

    def mix(
        self, rows: Rows, tables: Tables, inner: Map, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        y, ids = inner(input), input.reshape(len(rows.slots), -1)  # (b, t)
        b, scale = per_row(tables["b"], rows), per_row(tables["scale"], rows)[:, None, None]
        h = tables["a"][rows.slots[:, None], :, ids] * scale.to(b.dtype)
        change = torch.bmm(h, b.mT).to(y.dtype).view_as(y)
        padding = unwrap(inner)[0].module.padding_idx
        if padding is not None:  # it gives values and takes no gradients
            change = torch.where((input == padding)[..., None], change.detach(), change)
        return y + change

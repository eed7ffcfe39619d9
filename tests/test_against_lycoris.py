"""Real LyCORIS beside LoHa and LoKr: from the same values, the same function.

Its layers are made one by one, for linear maps and convolutions of every dimension; every changed
tensor and every output must agree to 1e-5 in fp32. It isn't merged: its `merge_to` takes α/r twice.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

import peftlite as pl
from tests.zoo import KINDS, Kind, floats, seeded


def conv2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), padding=1, dilation=2, groups=2), nn.GELU(), nn.Conv2d(6, 5, 1)
    )


PADDED = ("conv2d_grouped", "conv2d_same")  # not with zeros, where it adds its change all the same
KIND = {
    kind.name: kind
    for kind in (*KINDS, Kind("conv2d", conv2d, floats(input=(4, 6, 6))))
    if kind.name in ("mlp", "conv1d", "conv2d", "conv3d", *PADDED)
}


@dataclass(frozen=True)
class Row:
    """A method in both libraries."""

    name: str
    ours: pl.Method
    theirs: type[nn.Module]
    settings: dict[str, Any]


ROWS = (
    Row("loha", pl.LoHa(rank=3, alpha=5), LohaModule, dict(lora_dim=3, alpha=5)),
    Row("lokr", pl.LoKr(rank=1, alpha=3), LokrModule, dict(lora_dim=1, alpha=3)),
    Row(
        "lokr_both",
        pl.LoKr(rank=1, alpha=3, decompose_both=True),
        LokrModule,
        dict(lora_dim=1, alpha=3, decompose_both=True),
    ),
    Row(
        "lokr_factor",
        pl.LoKr(rank=1, alpha=3, factor=1),
        LokrModule,
        dict(alpha=3, lora_dim=1, factor=1),
    ),
    # where both factors are whole it has s = 1, whatever α is
    Row("lokr_whole", pl.LoKr(rank=9), LokrModule, dict(lora_dim=9, alpha=5)),
)


@pytest.mark.parametrize("kind", KIND.values(), ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@torch.no_grad()
def test_the_same_values_are_the_same_function(row: Row, kind: Kind) -> None:
    ours, theirs, batch = kind.model(), kind.model(), kind.batch()
    delta = pl.attach(ours, row.ours)
    for address, placed in delta.placed.items():
        module = theirs.get_submodule(address.removesuffix(".weight"))
        layer = row.theirs(address, module, **row.settings).eval()
        own = dict(placed.patch.named_parameters())
        with seeded(3):
            for name, parameter in layer.named_parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
                key = name.removeprefix("hada_").removeprefix("lokr_").replace("_", "")
                found = own.pop(key)
                found.copy_(parameter.reshape(found.shape))
        assert not own
        w = placed.site.whole
        changed = w + layer.get_weight(w.shape)
        assert (placed.patch.value(w) - changed).abs().max() <= 1e-5
        layer.apply_to()
    difference = (kind.run(ours, batch) - kind.run(theirs, batch)).abs().max()
    assert (difference <= 1e-5) != (kind.name in PADDED)

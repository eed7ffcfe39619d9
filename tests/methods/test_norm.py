"""NormTuning: which layers are norms."""

import pytest
import torch
from torch import nn

import peftlite as pl
from peftlite.methods.norm import NormTuning
from tests.zoo import KINDS

KIND = {kind.name: kind for kind in KINDS}


class FancyRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Normalizer(FancyRMSNorm):
    pass


class NormedLinear(FancyRMSNorm):
    pass


class LinearNorm(nn.Linear):
    """Its parameters aren't all of one dimension, so it is more than a norm."""


def test_what_is_a_norm() -> None:
    model = nn.Sequential(
        nn.LayerNorm((4, 4)),
        nn.BatchNorm2d(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        FancyRMSNorm(),
        Normalizer(),
        NormedLinear(),
        LinearNorm(4, 4),
    )
    pairs = [f"{i}.{slot}" for i in range(4) for slot in ("weight", "bias")]
    assert pl.plan(model, NormTuning()).addresses == [*pairs, "4.weight", "5.weight"]
    assert pl.plan(model, NormTuning(targets="6.weight")).addresses == ["6.weight"]
    with pytest.raises(pl.TargetError, match="takes the scales and shifts of normalisation layers"):
        pl.attach(model, NormTuning(targets="8.weight"))


@pytest.mark.parametrize("name", ("hf_llama", "hf_t5"))
def test_takes_the_norms_of_transformers(name: str) -> None:
    model = KIND[name].model()
    norms = [n for n, _ in model.named_parameters() if "norm" in n]
    assert norms and pl.plan(model, NormTuning()).addresses == norms

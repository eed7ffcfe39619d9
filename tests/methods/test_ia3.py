"""(IA)³: the paper's equation at outputs and inputs."""

import pytest
import torch
from torch import nn

import peftlite as pl
from peftlite.methods.ia3 import IA3
from tests.cells import close
from tests.zoo import KINDS, seeded

KIND = {kind.name: kind for kind in KINDS}


@torch.no_grad()
def draw(delta: pl.Delta) -> pl.Delta:
    with seeded(3):
        for parameter in delta.parameters():
            parameter.copy_(1 + 0.5 * torch.randn_like(parameter))
    return delta


MAPS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "no_bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (2, 4, 5, 5)),
    "conv_bias": (lambda: nn.Conv1d(4, 6, 2, padding=1, padding_mode="reflect"), (2, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
}


@pytest.mark.parametrize("feedforward", (False, True), ids=("outputs", "inputs"))
@pytest.mark.parametrize("name", MAPS)
def test_the_equation(name: str, feedforward: bool) -> None:
    make, shape = MAPS[name]
    with seeded():
        model, x = nn.Sequential(make()).double(), torch.randn(shape).double()
    plain = model(x)
    delta = draw(pl.attach(model, IA3(feedforward=feedforward)))
    (factor,) = delta.parameters()  # a weight and its bias have one between them
    factor = factor.detach().view(-1, *(1 for _ in shape[2:]))
    with pl.using(model, None):
        expected = model(x * factor) if feedforward else plain * factor
    close(model(x), expected, 1e-12)
    pl.merge(model, "default")
    close(model(x), expected, 1e-12)


def test_experts_have_their_own() -> None:
    model = KIND["experts"].model()
    delta = pl.attach(model, [IA3(targets="w_in"), IA3(targets="w_out", feedforward=True)])
    shapes = {key: tuple(p.shape) for key, p in delta.named_parameters()}
    assert shapes == {"w_in:l": (3, 20), "w_out:l": (3, 20)}
    raw, (factors, _) = model._parameters["w_in"], draw(delta).parameters()
    close(model.w_in.detach(), raw * factors[..., None])


def test_parts_of_a_fused_weight_share_with_those_of_its_bias() -> None:
    model = KIND["gpt_fused"].model()
    delta = pl.attach(model, IA3(targets=["qkv[k]", "qkv[v]"]))
    assert len(delta.placed) == 8 and delta.num_parameters == 4 * 12


def test_without_a_bias_no_weight_is_formed() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    delta = pl.attach(model, IA3())
    patch = delta.placed["0.weight"].patch
    patch.value = None  # a call that needed it would fail
    assert model(torch.randn(2, 6)).shape == (2, 4)


def test_a_small_step_shows_in_half_precision() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    x = torch.randn(8, 64).bfloat16()
    plain = model(x)
    delta = pl.attach(model, IA3())
    with torch.no_grad():
        next(delta.parameters()).add_(3e-3)  # less than half a step of bf16 at 1
    moved = (model(x) != plain).float().mean()
    assert 0.05 < moved < 1

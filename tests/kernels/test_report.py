"""kernels.report: a line for every patched weight, with the way it goes."""

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftlite as pl
from peftlite import kernels
from peftlite.kernels.native import low_rank


def paths(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The path and the reason of every line, by address."""
    _, _, *lines = kernels.report(model).splitlines()
    found = {}
    for line in lines:
        address, _, _, path, because = line.split(maxsplit=4)
        if not address.endswith(".c"):
            found[address] = path, because
    return found


@pytest.fixture
def model() -> nn.Module:
    made = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "hf": Conv1D(4, 4),
            "conv": nn.Conv2d(4, 4, 3),
            "embedding": nn.Embedding(5, 4),
            "lstm": nn.LSTM(4, 4),
            "plain": nn.Linear(4, 4),
        }
    )
    targets = ["linear", "hf", "conv", "embedding", "lstm.weight_ih_l0"]
    pl.attach(made, [pl.LoRA(rank=2, targets=targets), pl.BitFit()])
    return made


def test_every_patched_weight_has_a_line(model: nn.Module) -> None:
    found = {address: path for address, (path, _) in paths(model).items()}
    beside = "native" if low_rank.SINGLE.ready() else "torch"
    assert found == {
        "linear": beside,
        "hf": beside,
        "conv": "torch",
        "embedding": "torch",
        "lstm.weight_ih_l0": "read",
    }


def test_says_why(model: nn.Module) -> None:
    found = paths(model)
    assert found["conv"][1] == "torch has convolutions of its own"
    assert found["lstm.weight_ih_l0"][1] == "LSTM reads it by itself"
    with kernels.backend("reference"):
        assert paths(model)["hf"] == ("reference", "backend('reference') was called")
    pl.attach(model, pl.SparseMask(targets="conv"), "b")
    assert paths(model)["conv"] == ("read", "SparsePatch has no way beside it")


def test_a_parametrized_weight_has_a_line() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    pl.attach(model, pl.LoRA(rank=2, targets="0.weight"))
    beside = "native" if low_rank.SINGLE.ready() else "torch"
    assert paths(model)["0"][0] == beside

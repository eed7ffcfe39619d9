"""The room of a bank: what it is made for, and how it grows until the first forward."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import peftlite as pl
from peftlite.bank import DeltaBank
from tests.bank.banks import WIDTH, base, tuned

METHODS: dict[str | None, pl.Method | Sequence[pl.Method]] = {
    "default": pl.LoRA(rank=3),
    "everywhere": pl.LoRA(rank=2, targets="*"),
    "biases": pl.BitFit(),
    "scales": pl.IA3(targets="weight"),
    "heads": [pl.LoRA(rank=8, targets="2.weight"), pl.FullTuning(targets="4.weight")],
    "few": pl.SHiRA(rank=1, targets="weight"),
    "more": pl.SHiRA(rank=3, targets="weight"),
}


@pytest.fixture
def alone() -> dict[str | None, nn.Module]:
    plain = base()
    return {None: plain} | {name: tuned(plain, how, str(name)) for name, how in METHODS.items()}


def delta(alone: dict[str | None, nn.Module], name: str) -> pl.Delta:
    return pl.deltas(alone[name])[name]


def check(bank: DeltaBank, alone: dict[str | None, nn.Module], names: list[str | None]) -> None:
    x = torch.randn(len(names), WIDTH, dtype=torch.float64)
    with torch.no_grad():
        with bank.rows(names):
            got = bank.model(x)
        want = torch.cat([alone[name](x[i : i + 1]) for i, name in enumerate(names)])
    torch.testing.assert_close(got, want)


def test_it_grows_with_what_is_loaded(alone: dict[str | None, nn.Module], tmp_path: Path) -> None:
    bank = DeltaBank(copy.deepcopy(alone[None]), slots=8, max_rank=8)
    for name in METHODS:
        assert name is not None
        pl.save(delta(alone, name), tmp_path / name)
        bank.load(name, tmp_path / name if name in ("default", "few") else delta(alone, name))
    bank.load("everywhere", delta(alone, "heads"))  # a swap, of another room
    alone["everywhere"] = alone["heads"]
    check(bank, alone, [*METHODS, None])


def test_pins_and_spilled_rows_move_along(alone: dict[str | None, nn.Module]) -> None:
    bank = DeltaBank(copy.deepcopy(alone[None]), slots=2, max_rank=8, memory_budget=1)
    bank.load("default", delta(alone, "default"), pin=True)
    bank.load("biases", delta(alone, "biases"))
    bank.load("everywhere", delta(alone, "everywhere"))
    check(bank, alone, ["biases", None, "default"])
    check(bank, alone, ["everywhere", "default"])
    assert "default" in {entry.name for entry in bank._slots.resident}


def test_it_is_fixed_from_the_first_forward_on(alone: dict[str | None, nn.Module]) -> None:
    bank = DeltaBank(copy.deepcopy(alone[None]), slots=2, max_rank=8)
    bank.load("default", delta(alone, "default"))
    bank.model(torch.randn(2, WIDTH, dtype=torch.float64))
    tables = [buffer.data_ptr() for buffer in bank._arena.buffers]
    with pytest.raises(
        pl.PeftliteError,
        match=r"this delta is BitFit\(\).*room for LoRA\(\) at 0.weight and 1 more, up to rank 8",
    ):
        bank.load("biases", delta(alone, "biases"))
    assert bank.names == ["default"]
    assert tables == [buffer.data_ptr() for buffer in bank._arena.buffers]
    check(bank, alone, ["default", None])


def test_what_cannot_be_mixed_leaves_the_bank_as_it_was(
    alone: dict[str | None, nn.Module],
) -> None:
    counted = nn.Embedding(5, 2, scale_grad_by_freq=True)
    model = nn.Sequential(counted, nn.Flatten(), nn.Linear(6, 4))
    bank = DeltaBank(model, slots=2, max_rank=8)
    bank.load("head", pl.LoRA(rank=2, targets="2.weight"))
    before = repr(bank)
    with pytest.raises(pl.TargetError):
        bank.load("all", pl.LoRA(rank=2, targets="*"))
    assert repr(bank) == before
    with bank.rows(["head", None]):
        model(torch.randint(5, (2, 3)))


def test_methods_may_be_files_and_deltas(
    alone: dict[str | None, nn.Module], tmp_path: Path
) -> None:
    pl.save(delta(alone, "everywhere"), tmp_path / "everywhere")
    needs = [tmp_path / "everywhere", delta(alone, "biases"), pl.IA3(targets="weight")]
    bank = DeltaBank(copy.deepcopy(alone[None]), 4, 8, methods=needs)
    assert (
        "room for LoRA(rank=2) at 0.weight and 2 more; BitFit() at 0.bias and 2 more; IA3("
        in repr(bank)
    )
    names = ["everywhere", "biases", "scales"]
    for name in names:
        bank.load(name, delta(alone, name))
    check(bank, alone, [*names, None])
    with pytest.raises(pl.PeftliteError, match=r"no room for 0\.weight.*this delta is SHiRA\("):
        bank.load("few", delta(alone, "few"))

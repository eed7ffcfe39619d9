"""merge: faults at every step, every way of keeping the base, and a receipt that is true."""

import copy
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftlite as pl
from peftlite.core.residual import Residual
from tests.cards.card import Row
from tests.cells import CELLS, attached, unmergeable
from tests.digest import assert_same, bits, digest
from tests.zoo import KINDS, Kind, seeded

GPT = next(kind for kind in KINDS if kind.name == "gpt")
HALF = (torch.bfloat16, torch.float16)
BACKUPS = ("device", "host", "residual")
METHOD = [pl.LoRA(rank=2, targets="*attn*"), pl.FullTuning(targets="norm"), pl.OFT(targets="mlp")]


def two(dtype: torch.dtype = torch.float32, scale: float = 0.05) -> nn.Module:
    """A model with two deltas at the same sites, each of which changes what it computes."""
    model = GPT.model(dtype)
    with seeded(1), torch.no_grad():
        for name in ("a", "b"):
            for parameter in pl.attach(model, METHOD, name).parameters():
                parameter.add_(scale * torch.randn_like(parameter))
    pl.use(model, "a")
    return model


@pytest.mark.parametrize("backup", BACKUPS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
def test_a_thousand_cycles_leave_every_bit(backup: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(9, 7)).to(dtype)
    with torch.no_grad():
        next(pl.attach(model, pl.LoRA(rank=2), "a").parameters()).normal_()
        next(pl.attach(model, pl.IA3(), "b").parameters()).normal_()
    before = digest(model)
    for cycle in range(500):
        order = ("a", "b") if cycle % 2 else ("b", "a")
        for name in order:
            pl.merge(model, name, backup=backup)
        for name in order if cycle % 3 else order[::-1]:
            pl.unmerge(model, name)
    pl.use(model, "b")
    assert_same(before, digest(model))


@pytest.mark.parametrize("first", BACKUPS)
@pytest.mark.parametrize("second", BACKUPS)
def test_deltas_kept_in_different_ways_come_off_in_any_order(first: Any, second: Any) -> None:
    for off in ("ab", "ba"):
        model = two()
        alone = copy.deepcopy(model)
        pl.merge(alone, off[1])
        expected, before = digest(alone), digest(model)
        pl.merge(model, "a", backup=first)
        pl.merge(model, "b", backup=second)
        pl.unmerge(model, off[0])
        now = digest(model)
        for key in now:
            if key.endswith(("weight", "bias")) and isinstance(now[key], tuple):
                assert now[key][-1] == expected[key][-1], key
        pl.unmerge(model, off[1])
        pl.use(model, "a")
        assert_same(before, digest(model))


class Failing(TorchDispatchMode):
    """Fails at the n-th operation of torch, once."""

    def __init__(self, n: int):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise MemoryError
        return op(*args, **(kwargs or {}))


def faults(model: nn.Module, act: Callable[[], Any], step: int) -> int:
    """Fails an act at every `step`-th of its operations; each time nothing has changed."""
    before, registry = digest(model), model.peftlite.registry
    n, kept = 1, {key: id(held) for key, held in registry.originals.items()}
    while True:
        try:
            with Failing(n):
                act()
            return n // step
        except MemoryError:
            assert_same(before, digest(model))
            assert {key: id(held) for key, held in registry.originals.items()} == kept
            n += step


@pytest.mark.parametrize("backup", (*BACKUPS, "none"))
def test_a_fault_at_any_step_leaves_no_trace(backup: Any) -> None:
    model = two()
    if backup != "none":
        pl.merge(model, "b", backup=backup)
    assert faults(model, lambda: pl.merge(model, "a", backup=backup), 17) > 15
    if backup != "none":
        assert faults(model, lambda: pl.unmerge(model, "b"), 5) > 10


def test_a_fault_in_keeping_is_taken_back() -> None:
    model = two()
    before = digest(model)
    with mock.patch.object(Residual, "__init__", side_effect=MemoryError):
        with pytest.raises(MemoryError):
            pl.merge(model, "a", backup="residual")
    assert_same(before, digest(model))
    assert not pl.deltas(model)["a"].merged


# every method, on the first kind of model that it is for
ONE_EACH = {cell.values[0].name: cell for cell in reversed(CELLS) if "weight_norm" not in cell.id}


@pytest.mark.parametrize("row, kind", [*ONE_EACH.values()])
def test_half_precision_is_rounded_once(row: Row, kind: Kind) -> None:
    for dtype in HALF:
        model, delta = attached(row, kind, dtype=dtype)
        if unmergeable(delta):
            return  # law 4 asserts the refusal
        tensors = {a: placed.site.whole for a, placed in delta.placed.items()}
        receipt = pl.merge(model, "a")
        assert set(receipt.max_change) == {re.sub(r"\[.*", "", address) for address in tensors}
        for address, tensor in tensors.items():
            largest = tensor.abs().max().double()
            half_ulp = torch.finfo(dtype).eps * 2 ** largest.log2().floor() / 2
            assert receipt.rounding[re.sub(r"\[.*", "", address)] <= half_ulp * 1.001


def test_the_receipt_is_true() -> None:
    model = two(torch.bfloat16)
    delta = pl.deltas(model)["a"]
    before = {a: p.site.whole.detach().double() for a, p in delta.placed.items()}
    exact = {a: p.patch.value(before[a]) for a, p in delta.placed.items()}
    receipt = pl.merge(model, "a")
    for address, placed in delta.placed.items():
        now = placed.site.whole.detach().double()
        change = (now - before[address]).abs().max().item()
        assert receipt.max_change[address] == pytest.approx(change, rel=1e-6)
        assert receipt.rounding[address] == (now - exact[address]).abs().max()
        assert receipt.bytes_kept[address] == placed.site.whole.nbytes
    text = str(receipt)
    assert "merged 'a', keeping " in text
    assert re.search(r"^tensor +max \|change\| +rounding +kept$", text, re.M)
    assert set(pl.merge(model, "b").bytes_kept.values()) == {0}  # a's are what b needs
    assert pl.merge(two(), "a", backup="none").bytes_kept == {}


@pytest.mark.parametrize("dtype, share", [(torch.float32, 0.8), (torch.bfloat16, 0.55)])
def test_a_residual_is_smaller_where_the_change_is_small(dtype: torch.dtype, share: float) -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False)).to(dtype)
    with torch.no_grad():
        for parameter in pl.attach(model, pl.LoRA(rank=4), "a").parameters():
            parameter.normal_(std=0.02)
    before = bits(model[0].weight)
    receipt = pl.merge(model, "a", backup="residual")
    assert 0 < receipt.bytes_kept["0.weight"] < share * len(before)
    pl.unmerge(model, "a")
    assert bits(model[0].weight) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_of_a_sparse_change_is_its_entries(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False)).to(dtype)
    with torch.no_grad():
        for parameter in pl.attach(model, pl.SparseMask(fraction=0.005), "a").parameters():
            parameter.fill_(0.5)
    before = bits(model[0]._parameters["weight"])
    receipt = pl.merge(model, "a", backup="residual")
    entries = round(0.005 * 256 * 256)
    assert receipt.bytes_kept["0.weight"] == entries * (4 + dtype.itemsize)
    copied = copy.deepcopy(model)
    for one in (model, copied):
        pl.unmerge(one, "a")
        assert bits(one[0]._parameters["weight"]) == before
    pl.merge(model, "a", backup="residual")
    with torch.no_grad():
        model[0]._parameters["weight"][0, 0] += 1
    with pytest.raises(pl.PeftliteError, match="was written to since 'a' was merged into it"):
        pl.unmerge(model, "a")


def test_a_residual_that_would_be_larger_is_a_copy() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        for parameter in pl.attach(model, pl.FullTuning(), "a").parameters():
            parameter.copy_(torch.randn_like(parameter) * torch.randn_like(parameter).exp() ** 9)
    before = digest(model)
    receipt = pl.merge(model, "a", backup="residual")
    assert receipt.bytes_kept["0.weight"] <= model[0].weight.nbytes
    pl.unmerge(model, "a")
    assert_same(before, digest(model))


def test_a_copy_outlives_what_is_written_while_merged() -> None:
    model = two()
    before = digest(model)
    pl.merge(model, "a", backup="host")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    copied = [a for a in before if a.startswith("blocks.0.attn.q_proj.weight")]
    pl.unmerge(model, "a")
    after = digest(model)
    assert copied and all(before[key] == after[key] for key in copied)
    assert bits(model.norm.weight) == before["norm.weight"][-1]

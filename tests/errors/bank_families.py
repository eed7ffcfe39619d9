"""The errors of what a bank mixes row by row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.bank import DeltaBank
from tests.errors.case import Case, bare, linears, on


def room(methods: Any) -> Callable[[Any, Path], Any]:
    """Makes a bank."""
    return lambda model, _: DeltaBank(model, 2, 4, methods)


def loaded(methods: Any, made: Any) -> Callable[[Any, Path], Any]:
    """Loads into a bank with such room what another method makes."""

    def act(model: Any, _: Path) -> None:
        with DeltaBank(model, 2, 4, made) as bank:
            bank.load("new", methods)

    return act


def called(methods: Any, inputs: Callable[[], dict[str, Any]]) -> Callable[[Any, Path], Any]:
    """Runs a model with a bank."""

    def act(model: Any, _: Path) -> None:
        with DeltaBank(model, 2, 4, methods) as bank:
            bank.load("new", methods)
            with bank.rows(["new", None]):
                model(**inputs())

    return act


class Scale(nn.Module):
    """A layer that goes by its one vector in some other way."""

    def __init__(self, power: int = 2):
        super().__init__()
        self.weight, self.power = nn.Parameter(torch.ones(4)), power

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight**self.power


class Two(Scale):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y * self.weight


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4)])


def twins(one: nn.Module, other: nn.Module) -> nn.Module:
    other.weight = one.weight
    return nn.Sequential(one, other)


def recurrent() -> nn.Module:
    return nn.Sequential(nn.LSTM(4, 4))


def read_between_calls(model: Any, _: Path) -> None:
    with DeltaBank(model, 2, 4, RECURRENT) as bank:
        bank.load("new", RECURRENT)
        with bank.rows(["new", None]):
            model[0].weight_ih_l0.sum()


def ids(**more: Tensor) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": torch.zeros(2, 4, dtype=torch.long), **more}


RECURRENT = pl.LoRA(rank=1, targets="0.weight_ih_l0")
PACKED = nn.utils.rnn.pack_sequence([torch.zeros(3, 4), torch.zeros(2, 4)])
MLP = pl.PrefixTuning(targets="blocks.0.mlp()", num_heads=2, head_dim=6)
LEAVE_OUT = ": leave it out of the bank's methods with exclude="
NO_VECTOR = (
    "… is no vector that its module's output is affine in, row by row, so rows can't have their own"
    + LEAVE_OUT
)
MAKE = "that the bank's methods make: give them a larger "
SCALE = pl.FullTuning(targets="0.weight")

CASES = [
    Case(room(pl.Gated(pl.BottleneckAdapter())),
         "blocks.0.attn(): a GatedPatch can't be mixed by rows; at calls there are "
         "AddedBiasPatch, BottleneckPatch, …. For others, pl.using(model, rows=[...]) runs each "
         "group of rows by itself"),
    # vectors
    Case(room(SCALE), NO_VECTOR, pl.TargetError, lambda: nn.Sequential(Scale())),
    Case(room(SCALE), NO_VECTOR, pl.TargetError, lambda: nn.Sequential(Two())),
    Case(room(SCALE), NO_VECTOR, pl.TargetError,
         lambda: twins(nn.LayerNorm(4), nn.LayerNorm(4))),
    Case(room(pl.FullTuning(targets="shift")), NO_VECTOR, pl.TargetError, on("raw")),
    # what reads its weights, and experts
    Case(room(pl.BitFit()), "experts.0.bias is inside of no module that is called with a batch, so "
         "its rows can't be told apart" + LEAVE_OUT, pl.TargetError, Routed),
    *(Case(called(RECURRENT, lambda x=x: {"input": x}), f"0() is called with {shown}, in which "
           "rows can't be told apart: leave what is inside out of the bank's methods with exclude=",
           model=recurrent)
      for x, shown in ((torch.zeros(2, 4), "(2, 4)"), (PACKED, "PackedSequence"))),
    Case(read_between_calls, "0.weight_ih_l0 is read in no call whose rows can be told apart"
         + LEAVE_OUT, model=recurrent),
    # maps
    Case(room(pl.LoRA(targets="embed.weight")),
         "embed.weight isn't of an embedding alone, so its rows can't be told apart" + LEAVE_OUT,
         pl.TargetError, on("gpt_tied")),
    Case(room(pl.LoRA(targets="0.weight")),
         "0.weight is of maps of several kinds, so its rows can't be told apart" + LEAVE_OUT,
         pl.TargetError, lambda: twins(nn.Conv1d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1))),
    Case(called(pl.LoRA(rank=1, targets="0.weight"), lambda: {"input": torch.zeros(2, 4)}),
         "0.weight is called with (2, 4), in which rows can't be told apart: give it a dimension "
         "for them, as x[None]", model=lambda: nn.Sequential(nn.Conv1d(2, 3, 1))),
    Case(loaded(pl.DoRA(rank=1, targets="0.weight[:, 0:2]"), pl.DoRA(rank=1, targets="0.weight")),
         "0.weight: a DoRAPatch can't be mixed by rows where it changes some of the inputs",
         model=linears),
    Case(loaded(pl.IA3(targets="0.weight[:, 0:2]"), pl.IA3(targets="0.weight")),
         "0.weight: a ScalePatch can't be mixed by rows on a part across what it scales",
         model=linears),
    Case(loaded(pl.SHiRA(rank=2, targets="0.weight"), pl.SHiRA(rank=1, targets="0.weight")),
         "0.weight: 16 entries change, and a slot has room for 8: make room by a method that "
         "changes more, such as one with a larger fraction", model=linears),
    Case(loaded(pl.LTSFT(steps=3, targets="0.weight"), pl.SHiRA(rank=2, targets="0.weight")),
         "0.weight: a LTSFTPatch can't be mixed by rows before it has found its entries",
         model=linears),
    # calls
    Case(loaded(pl.BottleneckAdapter(bottleneck_size=3), pl.BottleneckAdapter(bottleneck_size=2)),
         f"blocks.0.attn(): an adapter 3 wide is above the room for 2 {MAKE}bottleneck_size",
         model=bare),
    Case(loaded(pl.Gated(pl.BottleneckAdapter()), pl.BottleneckAdapter()),
         "blocks.0.attn(): a GatedPatch can't be mixed by rows; at calls there are …. For others, "
         "pl.using(model, rows=[...]) runs each group of rows by itself", model=bare),
    Case(loaded(pl.LoReFT(rank=3), pl.LoReFT(rank=2)),
         f"blocks.0(): rank 3 is above the room for 2 {MAKE}rank", model=bare),
    Case(loaded(pl.LoReFT(positions="f2"), pl.LoReFT()),
         "blocks.0(): the bank has room for changes of all positions alone, and this is of 'f2': "
         "make it with pl.LoReFT(positions='f1', …)", model=bare),
    Case(loaded(pl.LoReFT(positions="f2", counted="call"), pl.LoReFT(positions="f2")),
         "blocks.0(): positions are counted by the sequence in the bank's room, and by the call "
         "in this: a bank has one way", model=bare),
    Case(loaded(pl.PrefixTuning(prefix_length=3), pl.PrefixTuning(prefix_length=2)),
         "blocks.0.attn(): a prefix (2, 2, 3, 6) doesn't fit the room for (2, 2, 2, 6) "
         f"{MAKE}prefix_length", model=bare),
    Case(called(MLP, lambda: {"ids": torch.zeros(2, 4, dtype=torch.long)}),
         "blocks.0.mlp() came to no F.scaled_dot_product_attention in this call, …", model=bare),
    # prompts
    Case(room(pl.PromptTuning(prompt_length=2)), "() takes no attention_mask and position_ids, so "
         "rows can't have prompts of different lengths: leave prompts out of the bank's methods",
         pl.TargetError, bare),
    Case(loaded(pl.PromptTuning(prompt_length=3), pl.PromptTuning(prompt_length=2)),
         f"model(): a prompt of 3 is above the room for 2 {MAKE}prompt_length",
         model=on("hf_llama")),
    Case(called(pl.PromptTuning(prompt_length=2), ids(attention_mask=torch.ones(2, 1, 4, 4))),
         "model() is called with an attention_mask that isn't a tensor (2, 4), for 4 tokens in "
         "all: prompts of different lengths go by one", model=on("hf_llama")),
]  # fmt: skip

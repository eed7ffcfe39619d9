"""The errors of bases that are quantised."""

from pathlib import Path

from torch import nn

import peftlite as pl
from tests.coded import linears, packed, quantize_
from tests.errors.attach import attaching
from tests.errors.case import Case, delta


def coded() -> nn.Module:
    return quantize_(linears())


def with_lora() -> nn.Module:
    model = coded()
    pl.attach(model, [pl.LoRA(rank=2, targets="0"), pl.BitFit(targets="2")], "sql")
    return model


def with_biases() -> nn.Module:
    model = coded()
    pl.attach(model, pl.BitFit(), "sql")
    return model


def quantising(model: nn.Module, _: Path) -> None:
    pl.attach(model, pl.LoRA(rank=2, targets="weight"), "sql")
    try:
        quantize_(model)
    finally:
        pl.detach(model, "sql")


def half_packed() -> nn.Module:
    """A base of which one layer is left as it was, and a head."""
    return nn.Sequential(packed()[0], *linears())


BYTES = (
    "0.weight is of bitsandbytes, a Packed, whose codes its own layers alone can read: take a base "
    "that isn't quantised, or that torchao's quantize_ made"
)
OR = "or say what to take with targets= and exclude="
CODES = "0.weight is quantised, a Coded, and "
NO_NUMBERS = (
    "Coded holds codes for numbers: what a delta makes of it fits none of them. Keep it attached, "
    "or go back to the base before it was quantised"
)

CASES = [
    Case(lambda model, _: pl.quantize(model, targets="0.weight"),
         "0.weight is packed already, as Coded: skip it", model=coded),
    Case(quantising, "'weight' of a Linear was quantised as it is read, with the delta in it, "
         "which would apply twice: pl.detach, quantise the base, then attach", model=linears),
    *(Case(attaching(method), f"{address} is quantised, a Coded, and {type(method).__name__} works "
           "on its numbers: take what changes the call of a linear map, as pl.LoRA does, or a base "
           "that isn't quantised", pl.TargetError, model=coded)
      for address, method in (
          ("0.weight", pl.FullTuning()),
          ("0.weight[0:2]", pl.LoRA(rank=2, targets="0.weight[0:2]")),
      )),
    *(Case(attaching(method), f"{CODES}{type(method).__name__} begins with its numbers: take what "
           "doesn't, as pl.LoRA(init='kaiming'), or a base that isn't quantised", pl.TargetError,
           model=coded)
      for method in (pl.DoRA(rank=2, targets="0"), pl.LoRA(rank=2, init="pissa", targets="0"))),
    Case(lambda model, _: pl.merge(model, "sql"), NO_NUMBERS, model=with_lora),
    Case(lambda model, path: pl.export(delta(model), path), "0.bias can't go into a PEFT "
         "directory, since that takes a copy of 0.weight, which is quantised: leave it out with "
         "exclude=, or keep the delta with pl.save", model=with_biases),
    Case(attaching(pl.LoRA()), f"LoRA takes none of this model's sites by default; {BYTES}",
         pl.TargetError, model=packed),
    Case(attaching(pl.LoRA()), f"LoRA by default is for 1 sites more than the 1 that can be "
         f"taken: "
         f"{BYTES}; {OR}", pl.TargetError, model=half_packed),
    Case(attaching(pl.LoRA(targets="*")), f"'*' is for 1 sites more than the 2 that can be taken: "
         f"{BYTES}; {OR}", pl.TargetError, model=half_packed),
    Case(attaching(pl.LoRA(targets="0")), "'0' matches 0(); 0.weight; 0.bias; but " + BYTES,
         pl.TargetError, model=packed),
    Case(attaching(pl.LoRA(targets="0.weight")), BYTES, pl.TargetError, model=packed),
]  # fmt: skip

"""The errors of combine and extract."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftlite as pl
from tests.errors.case import Case, attached, bare, delta, linears, on, two
from tests.errors.merge import RESIZED, Q, poisoned, resized, with_calls


def combining(given: Any, how: str = "sum", **options: Any) -> Callable[[Any, Path], Any]:
    return lambda model, _: pl.combine(model, given, how, **options)


def extracting(tuned: Callable[[], Any], method: Any, says: str, **options: Any) -> Case:
    act = lambda model, _: pl.extract(model, tuned(), method, **options)  # noqa: E731
    return Case(act, says, model=bare)


def moved(*addresses: str, by: float = 1.0) -> Callable[[], nn.Module]:
    """The bare model, some of its tensors with other values."""

    def build() -> nn.Module:
        model = bare()
        for address in addresses:
            model.get_parameter(address).data += by
        return model

    return build


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        tensors = {**bare().state_dict()}
        change(tensors)
        return tensors

    return build


@torch.no_grad()
def filled() -> nn.Module:
    model = two()
    for parameter in delta(model).parameters():
        parameter.fill_(1)
    return model


BOTH = {"sql": 1, "chat": -1}
BY_NAME = ("combine takes weights by name, such as {'sql': 0.7, 'chat': -1}, or 0.7 * sql - chat: "
           "not ")  # fmt: skip
WEIGHT = "the weight of 'sql' must be a finite number, not "
UNLIKE = "tuned doesn't match base: there is "
NORM = "norm.weight"

CASES = [
    *(Case(combining(given), BY_NAME + shown)
      for given, shown in (("sql", "'sql'"), (["sql"], "['sql']"), ({}, "{}"), (None, "None"))),
    *(Case(combining({"sql": weight}), WEIGHT + shown)
      for weight, shown in ((float("nan"), "nan"), (float("inf"), "inf"), ("1", "'1'"),
                            (None, "None"), (10**400, "an int"))),
    Case(combining({"dba": 1}),
         "no delta is named 'dba' in this model; there are: 'sql', 'chat'"),
    Case(lambda model, _: pl.combine(model, {delta(model): 1, "sql": 2}),
         "combine takes a delta once, with one weight"),
    Case(lambda model, _: pl.combine(model, 2 * delta(two())),
         "'sql' is no delta of this model, or no longer"),
    Case(combining(BOTH, name="sql"), "a delta named 'sql' is attached already: choose another "
         "name=, or pl.detach(model, 'sql') first"),
    Case(combining(BOTH, "mean"), "how must be one of 'sum', 'linear', 'cat', 'svd', 'ties', "
         "'dare', 'magnitude_prune', not 'mean'"),
    Case(combining(BOTH, "svd"), "how='svd' needs rank= or energy=, and was given nothing"),
    Case(combining(BOTH, "svd", rank=2, energy=0.5),
         "how='svd' needs rank= or energy=, and was given rank= and energy="),
    Case(combining(BOTH, "dare"), "how='dare' needs density=, and was given nothing"),
    Case(combining(BOTH, "ties", rank=2), "how='ties' needs density=, and was given rank="),
    Case(combining(BOTH, density=0.5), "how='sum' needs nothing more, and was given density="),
    Case(combining(BOTH, "svd", rank=0), "rank must be a whole number from 1 up, not 0"),
    *(Case(combining(BOTH, "svd", energy=energy),
           f"energy must be above 0 and at most 1, not {energy}")
      for energy in (0.0, 1.01, float("nan"))),
    Case(combining(BOTH, "ties", density=2), "density must be above 0 and at most 1, not 2"),
    Case(combining(BOTH, "dare", density=0.5, seed=-1),
         "seed must be a whole number from 0 up, not -1"),
    *(Case(combining(weights, "linear"),
           "how='linear' divides by the sum of the weights, and that is 0")
      for weights in (BOTH, {"sql": 0.1 + 0.2, "chat": -0.3})),
    Case(combining({"sql": 1}, "cat"), "how='cat' puts the factors of products of low rank side by "
         "side, and norm.bias is changed in another way: take 'sum' or 'svd'",
         model=attached(bare(), pl.BitFit(targets="norm.bias"))),
    Case(combining({"sql": 1}), "'sql' changes calls, which no weight can hold: blocks.0.attn()",
         model=with_calls),
    Case(combining({"sql": 1}), "0.weight is on the meta device and has no values",
         model=attached(linears(device="meta"), pl.LoRA(rank=2))),
    Case(combining({"sql": 1}), RESIZED, model=resized),
    Case(combining({"sql": 1}), f"'combined' would be infinite or NaN at {Q}; nothing was done",
         model=poisoned),
    Case(lambda model, _: pl.rescale(model, "sql", 1e300, name="more"),
         f"'more' would be infinite or NaN at {Q}; nothing was done", model=filled),
    Case(lambda model, _: pl.resize_rank(model, "sql", name="small"),
         "how='svd' needs rank= or energy=, and was given nothing"),
    # extract
    extracting(bare, pl.LoRA(), "rest must be 'error' or 'ignore', not 'warn'", rest="warn"),
    extracting(bare, pl.LoRA(), "energy must be above 0 and at most 1, not 2", energy=2),
    extracting(bare, pl.BitFit(), "energy= gives LoRA its ranks, and none of these methods is LoRA",
               energy=0.9),
    extracting(lambda: "tuned.pt", pl.LoRA(), "tuned must be a model or a state dict, not "
               "'tuned.pt'"),
    extracting(two, pl.LoRA(), "tuned has unmerged deltas, 'chat': pl.merge them first"),
    extracting(on("mlp"), pl.LoRA(), f"{UNLIKE}no embed.weight; no position.weight; …; and …"),
    extracting(state(lambda tensors: tensors.pop(NORM)), pl.LoRA(), f"{UNLIKE}no {NORM}"),
    extracting(state(lambda tensors: tensors.update(x=torch.ones(1))), pl.LoRA(),
               f"{UNLIKE}x, which nothing asks for"),
    extracting(state(lambda tensors: tensors.update({NORM: torch.ones(3)})), pl.LoRA(),
               f"{UNLIKE}{NORM} as (3,), not (16,)"),
    Case(lambda model, _: pl.extract(model, linears(), pl.LoRA()),
         f"{UNLIKE}0.weight without values in base; …",
         model=lambda: linears(device="meta")),
    extracting(moved(NORM, "lm_head.weight"), pl.LoRA(), f"tuned differs from base where no method "
               f"takes it: {NORM}; lm_head.weight; add pl.FullTuning(), which takes the parameters "
               "that others leave, or pass rest='ignore'"),
    extracting(moved(NORM), pl.LoRA(), "tuned is the same as base wherever these methods could "
               "take it", rest="ignore"),
    extracting(bare, pl.BottleneckAdapter(), "weights don't say how calls differ: …"),
    extracting(moved(Q), pl.OFT(block_size=4), "OFTPatch can't be fitted to a change of weights: "
               "extract with methods such as pl.LoRA, pl.FullTuning or pl.SparseMask"),
    extracting(moved(Q, by=float("nan")), pl.LoRA(),
               f"'extracted' would be infinite or NaN at {Q}; nothing was done"),
]  # fmt: skip

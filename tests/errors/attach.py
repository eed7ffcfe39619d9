"""The errors of attach and plan: their arguments, and the settings of a method."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftlite as pl
from tests.errors.case import SMALL, Case, bare


def attaching(method: Any, name: Any = "new") -> Callable[[Any, Path], Any]:
    return lambda model, _: pl.attach(model, method, name)


def taking(targets: Any, exclude: Any = None) -> Callable[[Any, Path], Any]:
    """LoRA at some targets, made as late as it is attached."""
    return lambda model, _: pl.attach(model, pl.LoRA(targets=targets, exclude=exclude), "new")


A_METHOD = "give a method such as pl.LoRA(rank=8), or a list of them: not "
A_MODEL = "the model comes first, a torch.nn.Module: not "
A_NAME = " can't name a delta: use letters, digits, '_' and '-', at most 128"

ARGUMENTS = [
    Case(attaching(pl.LoRA), "LoRA is a class: write pl.LoRA()"),
    Case(attaching([pl.LoRA(), pl.BitFit]), "BitFit is a class: write pl.BitFit()"),
    Case(attaching("lora"), A_METHOD + "'lora'"),
    Case(attaching(None), A_METHOD + "None"),
    Case(attaching([]), A_METHOD + "[]"),
    Case(attaching({"rank": 8}), A_METHOD + "{'rank': 8}"),
    Case(lambda model, _: pl.attach(model, "sql", pl.LoRA()), A_METHOD + "'sql'"),
    Case(lambda model, _: pl.plan(model, 8), A_METHOD + "8"),
    Case(lambda model, _: pl.attach(pl.LoRA(), model), A_METHOD + "a GPT"),
    Case(lambda model, _: pl.attach([model], pl.LoRA()), A_MODEL + "a list"),
    Case(lambda model, _: pl.attach(model.state_dict(), pl.LoRA()), A_MODEL + "an OrderedDict"),
    Case(lambda model, _: pl.attach(type(model), pl.LoRA()), A_MODEL + "the class GPT"),
    Case(lambda model, _: pl.plan(None, pl.LoRA()), A_MODEL + "None"),
    Case(lambda model, _: pl.use("sql", model), A_MODEL + "'sql'"),
    Case(lambda model, _: pl.detach("sql", model), A_MODEL + "'sql'"),
    Case(attaching(pl.Method()), "Method is no method: it doesn't override `accepts`"),
    Case(attaching(pl.Method(targets="lm_head.weight")),
         "Method is no method: it doesn't override `accepts`"),
    *(Case(attaching(SMALL, name), f"{name!r}{A_NAME}")
      for name in ("../x", "", "a.b", "a b", "a/b", "-a", "a\n", "\0", "é", "x" * 129, 3, None)),
    Case(attaching(SMALL, "sql"), "a delta named 'sql' is attached already: choose another name=, "
         "or pl.detach(model, 'sql') first"),
]  # fmt: skip


TREE = [
    Case(lambda *_: pl.plan(bare(), SMALL).delta.tree(),
         "'plan' is attached to no model, or that is gone: print(delta) lists its sites; pl.load "
         "it into a model, and keep the model, to see where it sits"),
]  # fmt: skip


@dataclass(frozen=True)
class HalfMethod(pl.Method):
    """A stranger's method, half written."""

    takes = "anything"

    def accepts(self, site: pl.Site) -> bool:
        return True


@dataclass(frozen=True)
class Mine(HalfMethod):
    """The other half, but not right."""

    patch: Any = None

    def build(self, site: pl.Site) -> Any:
        return self.patch


class Narrow(pl.Patch):
    """A value of another shape."""

    def value(self, w: Tensor) -> Tensor:
        return w[:1]


@dataclass(frozen=True)
class Calls(pl.Method):
    """A method that changes calls."""

    takes = "calls"

    def accepts(self, site: pl.Site) -> bool:
        return site.is_call

    def build(self, site: pl.Site) -> pl.Patch:
        return CallPatch()


class CallPatch(pl.Patch):
    def call(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)


RANK = "rank must be a whole number from 1 up, not "
DROPOUT = "dropout must be in [0, 1), not "
ALPHA = "alpha must be finite and above 0, not "
DTYPE = "dtype must be such as torch.float32 or bfloat16, not "
INIT = (
    "init must be one of 'kaiming', 'gaussian', 'orthogonal', 'pissa', 'olora', 'eva', 'lora_ga', "
    "'corda', 'loftq', not "
)


def setting(name: str, value: Any, says: str) -> Case:
    return Case(lambda *_: pl.LoRA(**{name: value}), says + repr(value), model=bare)


SETTINGS = [
    *(setting("rank", value, RANK) for value in (0, -1, 8.0, "8", True, None, [8])),
    *(setting("dropout", value, DROPOUT) for value in (1, -0.1, float("nan"), "0.1", None, True)),
    *(setting("alpha", value, ALPHA)
      for value in (0, -16, float("nan"), float("inf"), "16", 1j, False, [16])),
    *(setting("dtype", value, DTYPE) for value in ("float16", float, torch.int8, torch.bool,
                                                   torch.complex64, torch.float8_e4m3fn)),
    *(setting("init", value, INIT) for value in ("zeros", True, None, [])),
    setting("scaling", 2.0, "scaling must be one of 'alpha/r', 'rslora', not "),
    Case(lambda *_: pl.BitFit(dtype="half"), DTYPE + "'half'"),
    Case(attaching(pl.LoRA(rank=13, init="pissa", targets="v_proj")),
         "blocks.0.attn.v_proj.weight has matrices of 12×16, whose rank is at most 12: "
         "init='pissa' has no 13 directions to take", pl.TargetError),
    Case(attaching(HalfMethod(targets="lm_head.weight")),
         "HalfMethod is no method: it doesn't override `build`"),
    Case(attaching(Mine(targets="norm")), "Mine.build gave None for norm(): no pl.Patch"),
    Case(attaching(Mine(patch=nn.ReLU(), targets="norm.weight")),
         "Mine.build gave ReLU() for norm.weight: no pl.Patch"),
    Case(attaching(Mine(patch=pl.Patch(), targets="norm.weight")),
         "Mine's patch needs a `value` to sit at norm.weight"),
    Case(attaching(Mine(patch=pl.Patch(), targets="norm()")),
         "Mine's patch needs a `call` to sit at norm()"),
]  # fmt: skip

CASES = ARGUMENTS + TREE + SETTINGS

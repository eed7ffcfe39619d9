"""Errors: every message of the library, read by a stranger who must act on it; no trace is left.

A new `raise` joins with one row: what the stranger does, and the whole message (… stands for what
differs from machine to machine). The last test finds the raises that nobody has read.
"""

import ast
import functools
import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import peftlite as pl
from peftlite import cli
from peftlite.demo import text
from peftlite.io import packing
from peftlite.io.checkpoint import Checkpoint
from peftlite.io.convert import convert
from peftlite.io.files import Entry, write_tensors
from peftlite.site import sites
from tests.digest import assert_same, bits, digest
from tests.errors import (
    bank,
    bank_families,
    fuse,
    kernels,
    train,
    train_data,
    train_more,
    train_parallel,
)
from tests.errors.case import SMALL, ZOO, Case, attached, bare, linears, on, two
from tests.zoo import seeded

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

PACKAGE = Path(pl.__file__).parent


# -- attach and plan: the arguments


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


# -- targets


def target(targets: Any, says: str, exclude: Any = None, model: Any = bare) -> Case:
    return Case(taking(targets, exclude), says, pl.TargetError, model)


NO_TARGET = (
    " is no target: give an address such as 'embed.weight', a compiled regex, a predicate such as "
    "lambda site: isinstance(site.module, nn.Linear), or a list of these"
)
PREDICATE = "the predicate <lambda> "
OF_15 = (
    "is true for none of the 15 sites offered to it: embed.weight; position.weight; "
    "blocks.0.attn.q_proj.weight; blocks.0.attn.k_proj.weight; and 11 more"
)
A_SITE = "; it is given a site, with its .address, .module and .shape"
NEAR_Q = "nearest: 'q_proj', 'q_proj()', 'v_proj', 'o_proj'"
REGEX = "for a regex, pass re.compile(...)"
PARTS = "; give rows as [0:64], columns of a matrix as [:, 0:64], or [q], [k], [v]"
NO_PART = " is no part of lm_head.weight of shape (29, 16)" + PARTS
BEYOND = " is empty or beyond lm_head.weight of shape (29, 16): it is "
TWO_OR_MORE = "LoRA takes tensors of 2 or more dimensions"


class Integers(nn.Module):
    """A quantised tensor beside a plain layer."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        self.plain = nn.Linear(4, 4)


TARGETS = [
    # nothing of that name
    target("q_prj", f"'q_prj' matches nothing; {NEAR_Q}"),
    target(" q_proj", f"' q_proj' matches nothing; {NEAR_Q}"),
    target(".q_proj", f"'.q_proj' matches nothing; {NEAR_Q}"),
    target("Q_PROJ", f"'Q_PROJ' matches nothing; {NEAR_Q}"),
    target(["q_proj", "q_prj"], f"'q_prj' matches nothing; {NEAR_Q}"),
    target("*.q_prj", f"'*.q_prj' matches nothing; {NEAR_Q}"),
    target("proj", "'proj' matches nothing; nearest: 'v_proj', 'q_proj', 'o_proj', 'k_proj'"),
    target("q_proj,v_proj",
           "'q_proj,v_proj' matches nothing; nearest: 'v_proj', 'q_proj', 'v_proj()', 'q_proj()'"),
    target("blocks.9.attn", "'blocks.9.attn' matches nothing; nearest: 'blocks.1.attn', "
           "'blocks.0.attn', 'blocks.1.attn()', 'blocks.0.attn()'"),
    target("transformer.h.0", "'transformer.h.0' matches nothing; there are such as "
           "'embed.weight', 'position.weight', 'blocks.0.attn_norm.weight'"),
    target("all-linear", "'all-linear' matches nothing; leave targets out for the weights of all "
           "linear maps but the head's"),
    target(r".*\.(q|v)_proj", rf"'.*\\.(q|v)_proj' matches nothing; {REGEX}"),
    target("?_proj", f"'?_proj' matches nothing; {REGEX}"),
    target(re.compile("q_proj"), "'q_proj' matches nothing; a regex has to match a whole path, "
           "such as 'embed.weight', 'position.weight', 'blocks.0.attn_norm.weight'"),
    target("", "an empty string names nothing; leave targets out for the default"),
    target([], "targets is empty; leave it out for the method's own choice"),
    target(None, "LoRA takes none of this model's sites by default; name some with targets=, "
           "such as '0.weight'", model=lambda: nn.Sequential(nn.Embedding(4, 4))),
    target(None, "LoRA takes none of this model's sites by default; it takes tensors of 2 or more "
           "dimensions", model=lambda: nn.LayerNorm(4)),
    # nothing that can be a target
    target(3, "3" + NO_TARGET),
    target([None], "None" + NO_TARGET),
    target([["q_proj"]], "['q_proj']" + NO_TARGET),
    target({"q_proj": 8}, "{'q_proj': 8}" + NO_TARGET),
    target(b"q_proj", "b'q_proj'" + NO_TARGET),
    target(nn.Linear, "the class Linear" + NO_TARGET),
    target(nn.Linear(4, 4), "Linear(in_features=4, out_features=4, bias=True)" + NO_TARGET),
    target(torch.zeros(16, 16), "a Tensor" + NO_TARGET),
    target(iter(["q_proj"]), "<list_iterator object at …>" + NO_TARGET),
    target(lambda site: False, PREDICATE + OF_15),
    target(lambda name: "q_proj" in name,
           PREDICATE + "failed at embed.weight: TypeError(\"argument of type 'Site' is not …\")"
           + A_SITE),
    target(lambda name, module: True,
           PREDICATE + "failed at embed.weight: TypeError(\"<lambda>() missing 1 required "
           "positional argument: 'module'\")" + A_SITE),
    # nothing the method can take
    target("norm", f"'norm' matches norm(); norm.weight; norm.bias; but {TWO_OR_MORE}"),
    target("norm.bias", f"norm.bias is a tensor of shape (16,); {TWO_OR_MORE}"),
    target("blocks.0.attn()", f"blocks.0.attn() is a call; {TWO_OR_MORE}"),
    target("codes", "codes holds torch.int8: no gradient can flow through it", model=Integers),
    target(lambda site: site.slot == "codes", PREDICATE + "is true for none of the 1 sites offered "
           "to it: plain.weight", model=Integers),
    Case(attaching(pl.BitFit(targets="lm_head")), "'lm_head' matches lm_head(); lm_head.weight; "
         "but BitFit takes biases, which have 1 dimension", pl.TargetError),
    Case(attaching(pl.BitFit(targets="lm_head.weight")), "lm_head.weight is a tensor of shape "
         "(29, 16); BitFit takes biases, which have 1 dimension", pl.TargetError),
    Case(attaching(pl.FullTuning(targets="attn()")),
         "blocks.0.attn() is a call; FullTuning takes tensors", pl.TargetError),
    Case(attaching(pl.BitFit()), "BitFit takes none of this model's sites by default; it takes "
         "biases, which have 1 dimension", pl.TargetError, on("hf_llama")),
    # parts
    *(target(f"lm_head.weight[{part}]", f"[{part}]{NO_PART}")
      for part in ("3", "x", "-5:", "::2", "0:4, 0:4", "Q", "...")),
    target("norm.bias[:, 0:4]", "[:, 0:4] is no part of norm.bias of shape (16,)" + PARTS),
    target("w_in[:, 0:4]", "[:, 0:4] is no part of w_in of shape (3, 20, 16)" + PARTS,
           model=on("experts")),
    target("lm_head.weight[0:99]", "[0:99]" + BEYOND + "[0:29]"),
    target("lm_head.weight[5:5]", "[5:5]" + BEYOND + "[0:29]"),
    target("lm_head.weight[:, 16:]", "[:, 16:]" + BEYOND + "[:, 0:16]"),
    target("lm_head[q]", "lm_head.weight has 29 outputs, which is no three equal parts; give the "
           "rows: [0:64]"),
    target("blocks.0.attn()[0:4]", "'blocks.0.attn()[0:4]' matches nothing; nearest: "
           "'blocks.0.attn()', 'blocks.1.attn()', 'blocks.0.attn', 'blocks.1.attn'"),
    # what is left out
    target(None, f"in exclude: 'q_prj' matches nothing; {NEAR_Q}", exclude="q_prj"),
    target(None, "in exclude: 3 is no target: give an address such as '()', a compiled regex, a "
           "predicate such as lambda site: isinstance(site.module, nn.Linear), or a list of these",
           exclude=3),
    target(None, f"in exclude: {PREDICATE}is true for none of the 63 sites offered to it: (); "
           "embed(); embed.weight; position(); and 59 more", exclude=lambda site: False),
    target(None, "exclude='*' leaves LoRA no site to take", exclude="*"),
    target("q_proj", "exclude=['attn', 'mlp'] leaves LoRA no site to take",
           exclude=["attn", "mlp"]),
    target(None, "exclude names blocks.0.attn.q_proj.weight[0:4], a part of a tensor that is taken "
           "whole: name the parts to take with targets=", exclude="blocks.0.attn.q_proj[0:4]"),
    # several methods
    Case(attaching([pl.LoRA(targets="q_proj"), pl.FullTuning(targets="attn")]),
         "blocks.0.attn.q_proj.weight is taken by LoRA at blocks.0.attn.q_proj.weight and by "
         "FullTuning: name it once, or leave it out of one with exclude=", pl.TargetError, bare),
    Case(attaching([pl.LoRA(), pl.LoRA(rank=4)]),
         "blocks.0.attn.q_proj.weight is taken by LoRA at blocks.0.attn.q_proj.weight and by LoRA: "
         "name it once, or leave it out of one with exclude=", pl.TargetError, bare),
    target(["lm_head.weight[0:8]", "lm_head.weight[4:12]"],
           "lm_head.weight[4:12] is taken by LoRA at lm_head.weight[0:8] and by LoRA: name it "
           "once, or leave it out of one with exclude="),
]  # fmt: skip


# -- models that can't be patched


class Closed(nn.Linear):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses, please")


class Final(type):
    def __new__(mcs, name: str, bases: tuple, body: dict) -> type:
        if any(isinstance(base, Final) for base in bases):
            raise RuntimeError("the class is final")
        return super().__new__(mcs, name, bases, body)


class Sealed(nn.Linear, metaclass=Final):
    pass


class Guarded(nn.Linear):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("keeps its class")
        super().__setattr__(name, value)


class Named(nn.Linear):
    peftlite = "mine"


def after(layer: nn.Module) -> nn.Module:
    """A model in which the layer comes last: when it fails, others are patched already."""
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), layer)


@torch.inference_mode()
def made_in_inference_mode() -> nn.Module:
    return linears()


def sharded() -> nn.Module:
    """As fully_shard leaves a model, as far as one process can tell."""
    model = linears()
    for parameter in model.parameters():
        parameter.placements = ("Shard",)
    return model


def sharded_later() -> nn.Module:
    model = linears()
    pl.attach(model, pl.FullTuning())
    for module in model:
        shard = module.weight.raw.detach().as_subclass(Shard)
        module._parameters["weight"] = shard
    return model


class Shard(Tensor):
    placements = ("Shard",)


def traced() -> nn.Module:
    return torch.jit.trace(linears(), torch.zeros(1, 4))


def planning(model: nn.Module, _: Path) -> None:
    pl.plan(model, pl.LoRA())


def under_inference(model: nn.Module, _: Path) -> None:
    with torch.inference_mode():
        pl.attach(model, SMALL)


def cant(name: str, why: str) -> str:
    return (
        f"{name} can't be patched, since Python refuses to subclass it or to swap its class "
        f"({why}); wrap it in a plain nn.Module and attach to that"
    )


ALL = attaching(pl.LoRA(rank=2, targets="*"))
LAZY = " is lazy and not yet initialised: run the model once on a batch, then attach"
SCRIPT = (
    "a TorchScript module can't be patched, since its code is compiled already: attach to the "
    "model before torch.jit.script or trace"
)

MODELS = [
    Case(ALL, cant("Closed", "no subclasses, please"), model=lambda: after(Closed(4, 4))),
    Case(ALL, cant("Sealed", "the class is final"), model=lambda: after(Sealed(4, 4))),
    Case(ALL, cant("Guarded", "keeps its class"), model=lambda: after(Guarded(4, 4))),
    Case(ALL, cant("Closed", "no subclasses, please"), model=lambda: Closed(4, 4)),
    Case(ALL, "a Named has an attribute 'peftlite' of its own, where its patches would go: rename "
         "it", model=lambda: after(Named(4, 4))),
    Case(ALL, "2.weight" + LAZY, model=lambda: after(nn.LazyLinear(4))),
    Case(planning, "weight" + LAZY, model=lambda: nn.LazyLinear(4)),
    Case(ALL, SCRIPT, model=traced),
    Case(planning, SCRIPT, model=traced),
    Case(under_inference, "under torch.inference_mode no gradient can ever flow: attach outside of "
         "it (torch.no_grad is fine)", model=bare),
    Case(ALL, "0.weight was made under torch.inference_mode, so autograd can't use it: build or "
         "load the model outside of it", model=made_in_inference_mode),
    Case(ALL, "0.weight is sharded over devices: attach before fully_shard, so that the delta is "
         "sharded and its gradients are synchronised too", model=sharded),
    Case(lambda model, _: model(torch.zeros(1, 4)), "this weight is sharded over devices while it "
         "is used, as tensor parallelism does: patches can't ride on a shard; attach before "
         "fully_shard, or gather the weight", model=sharded_later),
]  # fmt: skip


# -- the module that a verb is given


def wrapped() -> nn.Module:
    return nn.Sequential(two())


def two_roots() -> nn.Module:
    model = linears()
    for name, part in zip("ab", model, strict=True):
        pl.attach(part, pl.LoRA(), name)
    return model


PART = (
    "some of these modules have deltas that were attached to another module, inside this one or "
    "around it: attach to that one, or detach them there first"
)
NO_DELTAS = "this model has no deltas; pl.attach or pl.load one first"
SEVERAL = (
    "deltas are attached to several modules inside this one: pass the module that pl.attach was "
    "given"
)

ROOTS = [
    Case(lambda model, _: pl.attach(model.blocks[0], pl.LoRA()), PART),
    Case(lambda model, _: pl.attach(model.blocks[0].attn.q_proj, pl.LoRA()), PART),
    Case(lambda model, _: pl.use(model.blocks[0], "sql"),
         "this is a part of a model that has deltas: pass that model"),
    Case(attaching(pl.LoRA()), "deltas ['sql', 'chat'] are attached to the GPT inside this module: "
         "attach to that one, or detach them first", model=wrapped),
    Case(attaching(pl.LoRA()), SEVERAL, model=two_roots),
    Case(lambda model, _: pl.deltas(model), SEVERAL, model=two_roots),
    *(Case(verb, NO_DELTAS, model=bare) for verb in (
        lambda model, _: pl.use(model, "sql"),
        lambda model, _: pl.use(model, None),
        lambda model, _: pl.using(model, "sql"),
        lambda model, _: pl.view(model, None),
        lambda model, _: pl.detach(model, "sql"),
        lambda model, _: pl.merge(model, "sql"),
    )),
]  # fmt: skip


# -- views


class Faced(nn.Module):
    """A model and its view, side by side so that both are watched."""

    def __init__(self):
        super().__init__()
        self.model = two()
        self.face = pl.view(self.model, "sql")


IS_VIEW = "this is a view, whose choice is fixed: do it on the model that pl.view was given"

VIEWS = [
    *(Case(verb, IS_VIEW, model=Faced) for verb in (
        lambda both, _: pl.attach(both.face, SMALL),
        lambda both, _: pl.detach(both.face, "sql"),
        lambda both, _: pl.use(both.face, "chat"),
        lambda both, _: pl.using(both.face, "chat"),
        lambda both, _: pl.merge(both.face, "sql"),
        lambda both, _: pl.unmerge(both.face, "sql"),
    )),
    Case(lambda both, _: pl.attach(both.face.blocks[0], SMALL), PART, model=Faced),
    Case(lambda both, _: pl.merge(both.model, "sql"), "'sql' is chosen by a view, which would "
         "apply it twice: delete the view first", model=Faced),
    Case(lambda model, _: pl.view(model, None), "a model under fully_shard can't be copied, so it "
         "can have no view", model=sharded_later),
]  # fmt: skip


# -- choosing


def merged() -> nn.Module:
    model = two()
    pl.merge(model, "sql")
    return model


def delta(model: nn.Module) -> pl.Delta:
    return pl.deltas(model)["sql"]


def verbs(name: Callable[[Any], Any]) -> list[Callable[[Any, Path], Any]]:
    """Every verb that takes a delta's name."""
    return [
        lambda model, _: pl.detach(model, name(model)),
        lambda model, _: pl.merge(model, name(model)),
        lambda model, _: pl.unmerge(model, name(model)),
        lambda model, _: pl.use(model, name(model)),
        lambda model, _: pl.use(model, ["chat", name(model)]),
        lambda model, _: pl.using(model, name(model)),
        lambda model, _: pl.using(model, rows=[None, name(model)]),
        lambda model, _: pl.view(model, name(model)),
    ]


THERE = " in this model; there are: 'sql', 'chat'"
BY_NAME = "a delta goes by its name here: 'sql', not Delta('sql', LoRA, 224 parameters)"
A_CHOICE = "a choice is a delta's name, a list of names, or None: not "
ROWS = "rows= is a list with one choice per batch row, in place of a name: not "

CHOICES = [
    *(Case(verb, f"no delta is named 'typo'{THERE}") for verb in verbs(lambda _: "typo")),
    *(Case(verb, BY_NAME) for verb in verbs(delta)),
    Case(lambda model, _: pl.detach(model, None), f"no delta is named None{THERE}"),
    Case(lambda model, _: pl.detach(model, ["sql"]), f"no delta is named ['sql']{THERE}"),
    Case(lambda model, _: pl.use(model, [None]), f"no delta is named None{THERE}"),
    Case(lambda model, _: pl.use(model, [["sql"]]), f"no delta is named ['sql']{THERE}"),
    Case(lambda model, _: pl.using(model, ["sql", None]), f"no delta is named None{THERE}"),
    Case(lambda model, _: pl.use(model, 3), A_CHOICE + "3"),
    Case(lambda model, _: pl.use(model, True), A_CHOICE + "True"),
    Case(lambda model, _: pl.use(model, {"sql": 0.5}), A_CHOICE + "{'sql': 0.5}"),
    Case(lambda model, _: pl.using(model, rows=[0, 1]), A_CHOICE + "0"),
    Case(lambda model, _: pl.using(model, rows="sql"), ROWS + "'sql'"),
    Case(lambda model, _: pl.using(model, rows=[]), ROWS + "[]"),
    Case(lambda model, _: pl.using(model, rows=4), ROWS + "4"),
    Case(lambda model, _: pl.using(model, "sql", rows=["chat"]), ROWS + "['chat']"),
    Case(lambda model, _: pl.using(model, rows=torch.tensor([0, 1])), ROWS + "tensor([0, 1])"),
    Case(lambda model, _: pl.using(model, rows=np.array([0, 1])), ROWS + "array([0, 1])"),
    Case(lambda model, _: pl.use(model, ["sql", "sql"]),
         "['sql', 'sql'] names a delta twice; each applies once"),
    Case(lambda model, _: pl.use(model, "sql"), "'sql' is merged into the base, so it is on "
         "already: pl.unmerge it to choose it", model=merged),
    Case(lambda model, _: pl.view(model, ["chat", "sql"]), "'sql' is merged into the base, so it "
         "is on already: pl.unmerge it to choose it", model=merged),
]  # fmt: skip


# -- rows


class Returns(nn.Module):
    """A model that returns what `shape` makes of its rows."""

    def __init__(self, shape: Callable[[Tensor], Any]):
        super().__init__()
        self.body, self.head, self.shape = nn.Linear(4, 4), nn.Linear(4, 4), shape
        pl.attach(self, pl.LoRA(), "sql")

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.head(self.body(x)))


def with_rows(rows: list[Any], b: int) -> Callable[[Any, Path], None]:
    def act(model: nn.Module, _: Path) -> None:
        with pl.using(model, rows=rows):
            model(torch.zeros(b, 4, dtype=torch.long if hasattr(model, "embed") else None))

    return act


def read_under_rows(model: nn.Module, _: Path) -> None:
    with pl.using(model, rows=["sql", None]):
        model.blocks[0].attn.q_proj.weight.sum()


def not_per_row(shape: Callable[[Tensor], Any], what: str) -> Case:
    says = (
        f"rows= can't put back an output that has no row per input row ({what}): ask the model for "
        "outputs per row (no loss, no cache: use_cache=False), or call it once per delta"
    )
    return Case(with_rows(["sql", None, "sql"], 3), says, model=lambda: Returns(shape))


class Rerun(torch.autograd.Function):
    """Somebody's own activation checkpointing."""

    @staticmethod
    def forward(ctx: Any, model: nn.Module, x: Tensor) -> Tensor:
        return model(x)


def rerun(model: nn.Module, _: Path) -> None:
    with pl.using(model, "sql"):
        Rerun.apply(model, torch.zeros(2, 4, requires_grad=True))


IN_ROWS = [
    Case(rerun, "this call may run again in the backward pass, where a choice made by pl.using "
         "can't be seen, and it isn't torch.utils.checkpoint.checkpoint that runs it: choose with "
         "pl.use or pl.view", model=attached(linears(), pl.LoRA(rank=2))),
    *(Case(with_rows(rows, 3), f"rows= names {len(rows)} rows, but no tensor of this call has "
           f"{len(rows)} rows in its first dimension; the shapes are [(3, 4)]")
      for rows in ([None, "sql"], ["sql"] * 4)),
    Case(read_under_rows, "'weight' is read outside of a call of its module while rows= is in "
         "force: call the model itself, so that the rows can be told apart"),
    not_per_row(lambda y: y.sum(), "a tensor of shape ()"),
    not_per_row(lambda y: (y, y.mean(0)), "a tensor of shape (4,)"),
    not_per_row(lambda y: (y, object()), "a object"),
    not_per_row(lambda y: [*y], "of another structure for each group of rows"),
]  # fmt: skip


# -- writing into a weight while it is read through patches


def q_weight(model: nn.Module) -> Tensor:
    return model.blocks[0].attn.q_proj.weight


def writes(name: str, act: Callable[[Tensor], Any]) -> Case:
    says = (
        f"{name} writes, or lets write, into a tensor that patches change: what is read here is a "
        "value of its own, and the writing would be lost. pl.detach first; to look at the value, "
        "use .detach()"
    )
    return Case(lambda model, _: torch.no_grad()(act)(q_weight(model)), says)


def below_autograd(model: nn.Module, _: Path) -> None:
    weight = q_weight(model)
    with torch._C.DisableTorchFunctionSubclass():
        torch.add(weight, weight)


WRITES = [
    writes("copy_", lambda w: w.copy_(torch.zeros(12, 16))),
    writes("mul_", lambda w: w.mul_(2)),
    writes("zero_", lambda w: nn.init.zeros_(w)),
    writes("__setitem__", lambda w: w.__setitem__(0, 0.0)),
    writes("add_", lambda w: w.__iadd__(1)),
    writes("add", lambda w: torch.add(torch.zeros(12, 16), 1, out=w)),
    writes("_foreach_add_", lambda w: torch._foreach_add_([w], 1.0)),
    writes("requires_grad_", lambda w: w.requires_grad_(True)),
    writes(".data", lambda w: w.data),
    writes(".data", lambda w: setattr(w, "data", torch.zeros(12, 16))),
    writes(".grad", lambda w: setattr(w, "grad", None)),
    writes(".requires_grad", lambda w: setattr(w, "requires_grad", True)),
    Case(below_autograd, "aten.add.Tensor reached a patched weight below autograd; use .clone() of "
         "it"),
]  # fmt: skip


# -- merge


def with_calls() -> nn.Module:
    model = bare()
    pl.attach(model, Calls(targets="attn"), "sql")
    return model


@torch.no_grad()
def poisoned() -> nn.Module:
    model = two()
    next(delta(model).parameters()).fill_(float("nan"))
    return model


@torch.no_grad()
def overflowing() -> nn.Module:
    model = linears().half()
    pl.attach(model, pl.FullTuning(), "sql")
    for parameter in delta(model).parameters():
        parameter.fill_(1e6)
    return model


def resized() -> nn.Module:
    model = two()
    q_proj = model.blocks[0].attn.q_proj
    q_proj._parameters["weight"] = nn.Parameter(torch.zeros(20, 16))
    return model


def replaced() -> nn.Module:
    model = two()
    model.blocks[0].attn.q_proj = nn.Linear(16, 12, bias=False)
    return model


@torch.no_grad()
def written() -> nn.Module:
    model = two()
    pl.merge(model, "sql", backup="residual")
    delta(model).placed[Q].site.whole[0, 0] += 1
    return model


def merging(model: nn.Module, _: Path) -> None:
    pl.merge(model, "sql")


RESIZED = (
    "blocks.0.attn.q_proj.weight is (20, 16) now, and was (12, 16) when the delta was attached: "
    "pl.detach, then resize, then attach"
)

Q = "blocks.0.attn.q_proj.weight"

MERGES = [
    *(Case(lambda model, _, backup=backup: pl.merge(model, "sql", backup=backup),
           f"backup must be one of 'device', 'host', 'residual', 'none', not {backup!r}")
      for backup in ("disk", True)),
    *(Case(act, f"{Q} was written to since 'sql' was merged into it, and what was kept is a "
           "residual, which tells the base from the merged weights alone: put those back, or merge "
           "with backup='host' where they are to change", model=written)
      for act in (lambda model, _: pl.unmerge(model, "sql"), lambda *its: saving(*its),
                  lambda model, _: pl.merge(model, "chat"), lambda *its: pl.detach(its[0], "sql"))),
    Case(merging, "'sql' is merged already: pl.unmerge it first", model=merged),
    Case(lambda model, _: pl.unmerge(model, "sql"), "'sql' is not merged; merged are: none"),
    Case(lambda model, _: pl.unmerge(model, "chat"), "'chat' is not merged; merged are: sql",
         model=merged),
    Case(lambda model, _: pl.merge(model, "chat", backup="none"), "blocks.0.attn.q_proj.weight "
         "holds another merged delta: unmerge that first", model=merged),
    Case(merging, "'sql' changes calls, which no weight can hold: blocks.0.attn() (2 sites); keep "
         "it attached", model=with_calls),
    Case(merging, "merging 'sql' would make blocks.0.attn.q_proj.weight infinite or NaN; nothing "
         "was merged", model=poisoned),
    Case(merging, "merging 'sql' would make 0.weight infinite or NaN; nothing was merged",
         model=overflowing),
    Case(merging, "0.weight is on the meta device and has no values to merge into",
         model=attached(linears(device="meta"), pl.LoRA(rank=2))),
    Case(merging, "0.weight is computed by a parametrization, not stored: remove it first with "
         "torch.nn.utils.parametrize.remove_parametrizations",
         model=attached(nn.Sequential(weight_norm(nn.Linear(4, 4))), pl.LoRA(rank=2))),
    Case(merging, RESIZED, model=resized),
    Case(merging, "the value of norm.weight came out as (1,), not (16,): a patch's value keeps the "
         "shape", model=attached(bare(), Mine(patch=Narrow(), targets="norm.weight"))),
    Case(merging, "blocks.0.attn.q_proj.weight was replaced, or tied to another, since 'sql' was "
         "attached: pl.detach it, and attach to the model as it is now", model=replaced),
    Case(lambda *_: pl.Patch().value(torch.zeros(2)), "Patch changes calls, not tensors"),
]  # fmt: skip


# -- save


def saving(model: nn.Module, path: Path) -> None:
    pl.save(delta(model), path)


def saved(given: Callable[[nn.Module, Path], Any], why: str) -> Case:
    return Case(lambda model, path: pl.save(delta(model), given(model, path)), why, pl.FileError)


def loading_state(tensors: Callable[[dict[str, Tensor]], Any]) -> Callable[[Any, Path], None]:
    return lambda model, _: delta(model).load_state_dict(tensors(delta(model).state_dict()))


A_DELTA = "save takes a delta, such as pl.deltas(model)['sql']: not "
UNFIT = "these tensors don't fit 'sql': there is "
A_PATH = "a path is a str or an os.PathLike: not "

SAVES = [
    Case(lambda _, path: pl.save("sql", path), A_DELTA + "'sql'"),
    Case(lambda model, path: pl.save(model, path), A_DELTA + "a GPT"),
    Case(lambda model, path: pl.save(path, delta(model)), A_DELTA + "a PosixPath"),
    Case(lambda model, _: pl.save(delta(model), None), A_PATH + "None"),
    Case(lambda model, _: pl.save(delta(model), b"sql"), A_PATH + "b'sql'"),
    saved(lambda _, path: path.parent, "can't write '…': it is a folder"),
    saved(lambda _, path: path / "deeper" / "sql", "can't write '…/deeper/sql': there is no folder "
          "'…/deeper'"),
    saved(lambda _, path: path.with_name("x" * 300), f"can't write '…{'x' * 300}': File name too "
          "long"),
    saved(lambda _, path: f"{path}\0", r"can't write '…\x00': embedded null …"),
    Case(saving, "can't write '…/sql.safetensors': it is no regular file", pl.FileError,
         file=os.mkfifo),
    Case(lambda model, path: pl.save(delta(model), path / "sql"),
         "can't write '…/sql.safetensors/sql': there is no folder '…'", pl.FileError,
         file=lambda path: path.write_bytes(b"")),
    Case(saving, "blocks.0.attn.q_proj.weight:a has values that aren't finite, so it could not be "
         "loaded", model=poisoned, file=lambda path: path.write_bytes(b"older")),
    Case(saving, "0.weight:a is on the meta device and has no values to save",
         model=attached(linears(device="meta"), pl.LoRA(rank=2))),
    Case(saving, RESIZED, model=resized),
    *(Case(lambda model, path, its=its: pl.save(delta(model), path, **its), says)
      for its, says in (
          ({"pack": "int4"}, "pack must be one of None, 'bf16', 'int8', 'sparse', not 'int4'"),
          ({"base": "fast"}, "base must be one of 'sha256', 'sampled', not 'fast'"),
          ({"notes": {"at": Path()}}, "notes must be a dict that JSON can hold, not …"),
          ({"notes": "by me"}, "notes must be a dict that JSON can hold, not 'by me'"),
          ({"notes": {1: 2}}, "notes must be a dict that JSON can hold, not {1: 2}"),
      )),
    Case(loading_state(lambda own: None), "load_state_dict takes a dict of tensors, not None"),
    Case(loading_state(lambda own: {}), f"{UNFIT}no {Q}:a; no {Q}:b; no …:a; no …:b; and 4 more"),
    Case(loading_state(lambda own: {**own, "x": own[f"{Q}:a"]}),
         UNFIT + "x, which nothing asks for"),
    Case(loading_state(lambda own: {**own, f"{Q}:a": torch.zeros(8, 16)}),
         f"{UNFIT}{Q}:a as (8, 16), not (2, 16)"),
    Case(loading_state(lambda own: {**own, f"{Q}:a": 3}), f"{UNFIT}{Q}:a as 3, no tensor"),
    Case(loading_state(lambda own: {**own, f"{Q}:a": own[f"{Q}:a"].int()}),
         f"{UNFIT}{Q}:a as torch.int32, not torch.float32"),
    Case(loading_state(lambda own: {**own, f"{Q}:a": own[f"{Q}:a"].to("meta")}),
         f"{UNFIT}{Q}:a on the meta device, without values"),
]  # fmt: skip


# -- load and inspect


@functools.cache
def good() -> bytes:
    """A sound file."""
    with seeded(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sql"
        pl.save(pl.attach(bare(), SMALL, "sql"), path)
        return path.read_bytes()


def parts() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a sound file."""
    (length,) = struct.unpack("<Q", good()[:8])
    header = json.loads(json.loads(good()[8 : 8 + length])["__metadata__"]["peftlite"])
    return header, safetensors.torch.load(good())


def header(**changes: Any) -> Callable[[Path], None]:
    """A file with other entries in its header."""
    return edited(lambda old, _: old.update(changes))


def method(**changes: Any) -> Callable[[Path], None]:
    """A file with other entries for its method."""
    return edited(lambda old, _: old["methods"][0].update(changes))


def config(**changes: Any) -> Callable[[Path], None]:
    """A file with other settings of its method."""
    return edited(lambda old, _: old["methods"][0]["config"].update(changes))


def more_sites(*addresses: str) -> Callable[[Path], None]:
    return edited(lambda old, _: old["methods"][0]["sites"].extend(addresses))


def tensor(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """A file with another tensor in the place of the first."""
    return edited(lambda _, old: old.update({f"{Q}:a": change(old[f"{Q}:a"])}))


def edited(edit: Callable[[dict, dict], Any]) -> Callable[[Path], None]:
    """A file as someone would write it who knows the format, digests and all."""

    def write(path: Path) -> None:
        head, values = parts()
        del head["sha256"]
        edit(head, values)
        if "tensors" in head:
            head["tensors"] = {key: told(value) for key, value in values.items()}
        head["sha256"] = hashlib.sha256(canonical(head).encode()).hexdigest()
        entries = {key: Entry(value.dtype, tuple(value.shape)) for key, value in values.items()}
        with path.open("wb") as file:
            text = {"peftlite": canonical(head)}
            write_tensors(file, entries, values.__getitem__, lambda _: text)

    return write


def sparse(path: Path) -> None:
    """A file with a tensor packed as sparse, one index too high."""

    def edit(head: dict[str, Any], values: dict[str, Tensor]) -> None:
        stored, head["packed"] = packing.pack({f"{Q}:a": torch.eye(2, 16)}, "sparse")
        values |= stored
        values[f"{Q}:a#at"][-1] = 32

    edited(edit)(path)


def unsound(method: pl.Method, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A file of a delta whose every patch was tampered with before it was saved."""

    def write(path: Path) -> None:
        tampered = pl.attach(bare(), method, "sql")
        for placed in tampered.placed.values():
            change(placed.patch)
        pl.save(tampered, path)

    return write


def no_such_vector(patch: Any) -> None:
    patch.resize({"indices_a": ()})
    patch.indices_a.fill_(200)


def canonical(head: dict[str, Any]) -> str:
    return json.dumps(head, sort_keys=True, ensure_ascii=False)


def told(tensor: Tensor) -> dict[str, Any]:
    dtype, digest = str(tensor.dtype).removeprefix("torch."), hashlib.sha256(bits(tensor))
    return {"dtype": dtype, "shape": [*tensor.shape], "sha256": digest.hexdigest()}


def raw(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def metadata(entries: dict[str, str] | None) -> Callable[[Path], Any]:
    return raw(safetensors.torch.save({"layer.frob": torch.zeros(2)}, entries))


def loading(**options: Any) -> Callable[[Any, Path], Any]:
    return lambda model, path: pl.load(model, path, **options)


def bad_file(
    file: Callable[[Path], Any] | None,
    says: str,
    kind: type[Exception] = pl.FileError,
    model: Callable[[], Any] = bare,
    **options: Any,
) -> Case:
    return Case(loading(**options), says, kind, model, file)


def exotic(path: Path) -> None:
    """A file with a dtype of its own."""
    head = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"\0\0")


def nest(head: dict[str, Any], _: Any) -> None:
    own = head["methods"][0]
    for _ in range(12):
        settings = {
            "per": "token",
            "dtype": None,
            "method": {k: own[k] for k in ("method", "config")},
        }
        own = {"method": "Gated", "config": settings}
    head["methods"][0].update(own)


DAMAGED = "'…' is no safetensors file, or is damaged: …"
BROKEN = "'…' has a broken header: its "
FOREIGN = "'…' is no delta of a known format; it holds "

# what is wrong with a file whatever the model: pl.inspect says the same
UNREADABLE = [
    (None, "there is no file '…'"),
    (Path.mkdir, "'…' is a folder: name the file in it"),
    *((raw(data), DAMAGED) for data in (
        b"", b"\x80\x04K\x01.", b"PK\x03\x04" * 9, b"text" * 9, good()[:7], good()[:200],
        good()[:-1], good() + b"\0", good()[:8] + b"}" + good()[9:],
        struct.pack("<Q", 2**63) + good()[8:], struct.pack("<Q", 0) + good()[8:],
    )),
    (metadata(None), FOREIGN + "layer.frob"),
    (metadata({"format": "pt"}), FOREIGN + "format; layer.frob"),
    (raw(safetensors.torch.save({})), FOREIGN + "nothing"),
    *((metadata({"peftlite": data}), "'…' has a header that is no JSON: …")
      for data in ("", "{", "peftlite", "[" * 100_000)),
    *((metadata({"peftlite": data}), BROKEN + "'format' is None") for data in ("null", "[]", "3")),
    (header(format=2), "'…' has format 2, and this peftlite reads up to 1: upgrade peftlite"),
    *((header(format=value), f"{BROKEN}'format' is {value!r}")
      for value in (None, "1", True, 0.5, 0, -1)),
    (header(name=None), BROKEN + "'name' is None"),
    (header(library=3), BROKEN + "'library' is 3"),
    (header(base=[]), BROKEN + "'base' is []"),
    (edited(lambda old, _: old.pop("tensors")), BROKEN + "'tensors' is None"),
    (raw(good().replace(b"alpha", b"alphb")), "'…': here LoRA needs the setting 'alpha'"),
    (raw(good().replace(b"rank", b"ranc")), "'…': here LoRA has no setting 'ranc'"),
    *((raw(good().replace(old, new)), "'…' is damaged: its header isn't what was saved; copy it "
       "again") for old, new in ((b"float32", b"float23"), (b"sql", b"sqk"))),
    *((metadata({"peftlite": json.dumps({**parts()[0], **changes})}), "'…' is damaged: its header "
       "isn't what was saved; copy it again")
      for changes in ({"sha256": "0"}, {"library": "\ud800"}, {"more": float("nan")})),
    (header(base={"a": 3}), "'…' has a broken header: its base has 'a': 3"),
    (header(modules=[]), BROKEN + "'modules' is []"),
    *((header(modules={"a": its}), f"{BROKEN}'modules' has 'a': {its!r}")
      for its in (3, {}, {"module": "os.system"}, {"module": "Linear", "names": "b"},
                  {"groups": True, "module": "Conv2d"}, {"kernel": 3, "module": "Conv2d"})),
    (header(packed=[]), BROKEN + "'packed' is []"),
    (header(packed={"a": 3}), "'…' has a broken header: its 'packed' has 'a': 3"),
    (header(notes="by me"), BROKEN + "'notes' is 'by me'"),
    (exotic, "'…' has x as F8_E8M0, which torch lacks"),
    (edited(nest), "'…' has a broken header: methods within methods within methods …"),
    (header(methods={}), BROKEN + "'methods' is {}"),
    (header(methods=["LoRA"]), BROKEN + "'sites' is None"),
    *((method(sites=value), f"{BROKEN}'sites' is {value!r}") for value in (None, "a.weight", {})),
    *((method(sites=value), f"{BROKEN}'sites' are {value!r}") for value in ([], [3], [["a"]])),
    (method(method=["LoRA"]), BROKEN + "'method' is ['LoRA']"),
    (method(config=None), BROKEN + "'config' is None"),
    *((method(method=name), f"'…' holds the method '{name}', which isn't known here; known are "
       "…, LoRA… (a method of your own: import it first)")
      for name in ("Frobnicate", "Method", "os.system", "")),
    (method(method="BitFit"), "'…': here BitFit needs the setting 'add_missing'"),
    (method(config={}), "'…': here LoRA needs the setting 'alpha'"),
    (config(frob=1), "'…': here LoRA has no setting 'frob'"),
    (config(targets="*"), "'…': here LoRA has no setting 'targets'"),
    *((config(rank=value), f"'…' has an impossible setting of LoRA: {RANK}{value!r}")
      for value in (0, "2", True, 1.5, None)),
    (config(alpha=float("nan")), f"'…' has an impossible setting of LoRA: {ALPHA}nan"),
    *((config(dtype=value), f"'…' has an impossible setting of LoRA: {DTYPE}…")
      for value in ("frob", "nn", "load", "int8", 3)),
]  # fmt: skip


def otherwise(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    """A model whose weights are others than the file's."""

    def build() -> nn.Module:
        model = bare()
        with torch.no_grad():
            change(model)
        return model

    return build


def q_proj(linear: nn.Module) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.blocks[0].attn, "q_proj", linear)


def integers(model: nn.Module) -> None:
    codes = torch.ones(12, 16, dtype=torch.int8)
    model.blocks[0].attn.q_proj.weight = nn.Parameter(codes, requires_grad=False)


MISFIT = "'…' doesn't fit this model: "
OTHER = "'…' was made for other base weights: "
LOAD_IT = "; load it into the base it was trained on, or pass check_base='warn'"
SITES = "'…' is for a model with other sites: of "
LACKS_ALL = (
    "4, this one lacks 4: blocks.0.attn.q_proj.weight; blocks.1.attn.q_proj.weight; "
    "blocks.0.attn.v_proj.weight; blocks.1.attn.v_proj.weight; "
)

FILES = [
    *(bad_file(file, says) for file, says in UNREADABLE),
    *(Case(lambda _, path: pl.inspect(path), says, pl.FileError, nn.ReLU, file)
      for file, says in UNREADABLE),
    # the arguments
    Case(lambda model, path: pl.load(path, model), "load takes the model first, then the path"),
    Case(lambda model, _: pl.load(model, model.state_dict()), A_PATH + "an OrderedDict"),
    Case(lambda model, _: pl.inspect(delta(model)), A_PATH + "Delta('sql', LoRA, 224 parameters)"),
    bad_file(raw(good()), "check_base must be 'error', 'warn' or 'off', not False",
             pl.PeftliteError, check_base=False),
    bad_file(raw(good()), "a delta named 'sql' is attached already: choose another name=, or "
             "pl.detach(model, 'sql') first", pl.PeftliteError, two),
    bad_file(raw(good()), f"'a.b'{A_NAME}", pl.PeftliteError, name="a.b"),
    bad_file(header(name="../sql"), f"'../sql'{A_NAME}", pl.PeftliteError),
    Case(torch.inference_mode()(loading()), "under torch.inference_mode no gradient can ever flow: "
         "attach outside of it (torch.no_grad is fine)", pl.PeftliteError, bare, raw(good())),
    # another model
    bad_file(raw(good()), SITES + LACKS_ALL + "there are such as '0.weight', '0.bias', '2.weight'",
             model=on("mlp")),
    bad_file(raw(good()), SITES + LACKS_ALL + "nearest: 'blocks.0.attn.o_proj.weight', "
             "'blocks.1.attn.o_proj.weight', 'blocks.0.attn.qkv.weight', "
             "'blocks.0.attn_norm.weight'", model=on("gpt_fused")),
    bad_file(more_sites("lm_head"), SITES + "5, this one lacks 1: lm_head; nearest: 'lm_head', "
             "'lm_head()', 'lm_head.weight'"),
    bad_file(more_sites("*.k_proj"), SITES + "5, this one lacks 1: *.k_proj; nearest: …"),
    bad_file(more_sites("blocks.0.attn()[0:4]"),
             SITES + "5, this one lacks 1: blocks.0.attn()[0:4]; …"),
    bad_file(more_sites(Q), f"'…' names the site {Q} twice"),
    bad_file(more_sites(Q + "[0:4]"),
             f"{MISFIT}{Q}[0:4] and {Q} share entries of one tensor in this model"),
    bad_file(more_sites("embed.weight", "lm_head.weight"), f"{MISFIT}lm_head.weight and "
             "embed.weight share entries of one tensor in this model", model=on("gpt_tied")),
    bad_file(raw(good()), f"{MISFIT}{Q} is on the meta device: give the model its weights, then "
             "load", model=lambda: bare().to("meta")),
    bad_file(edited(lambda old, _: old["modules"].update({Q: {"module": "Conv1D"}})),
             f"{MISFIT}{Q} is stored as (outputs, inputs), and was as (inputs, outputs), in a "
             "Conv1D, where the delta was made"),
    bad_file(more_sites("lm_head.weight[0:99]"), MISFIT + "[0:99]" + BEYOND + "[0:29]"),
    bad_file(more_sites("lm_head.weight[zz]"), MISFIT + "[zz]" + NO_PART),
    bad_file(more_sites("norm.weight"), f"{MISFIT}norm.weight is a tensor of shape (16,); "
             + TWO_OR_MORE),
    bad_file(more_sites("blocks.0.attn()"), f"{MISFIT}blocks.0.attn() is a call; {TWO_OR_MORE}"),
    bad_file(raw(good()), f"{MISFIT}{Q} holds torch.int8: no gradient can flow through it",
             model=otherwise(integers)),
    bad_file(raw(good()), f"{MISFIT}it has {Q}:a as (2, 16), not (2, 32)",
             model=otherwise(q_proj(nn.Linear(32, 12, bias=False)))),
    # other tensors than it says
    bad_file(sparse, f"'…' has {Q}:a in no sound packing: an index is out of its tensor"),
    bad_file(raw(good()[:-1] + bytes([good()[-1] ^ 1])),
             "'…' is damaged, copy it again: not what was saved is blocks.1.attn.v_proj.weight:b"),
    bad_file(edited(lambda _, old: old.pop(f"{Q}:a")), f"{MISFIT}it has no {Q}:a"),
    *(bad_file(unsound(pl.SparseMask(targets="q_proj"), change),
               f"{MISFIT}{Q} has indices beyond the tensor, or out of order")
      for change in (lambda patch: patch.indices.neg_(), lambda patch: patch.indices.add_(191))),
    bad_file(unsound(pl.VBLoRA(rank=2, num_vectors=9, vector_length=4, save_only_topk_weights=True),
                     no_such_vector), MISFIT + "… has indices of no vector in the bank"),
    bad_file(edited(lambda _, old: old.update(x=torch.zeros(2))),
             f"{MISFIT}it has x, which nothing asks for"),
    bad_file(header(methods=[]), f"{MISFIT}it has {Q}:a, which nothing asks for; …; and 4 more"),
    bad_file(tensor(lambda a: a[0]), f"{MISFIT}it has {Q}:a as (16,), not (2, 16)"),
    *(bad_file(tensor(lambda a, by=by: a * by), f"{MISFIT}it has {Q}:a with values that aren't "
               "finite") for by in (torch.nan, torch.inf)),
    *(bad_file(tensor(lambda a, dtype=dtype: a.to(dtype)),
               f"{MISFIT}it has {Q}:a as {dtype}, not torch.float32")
      for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    bad_file(config(rank=3), f"{MISFIT}it has {Q}:a as (2, 16), not (3, 16); …; and 4 more"),
    bad_file(config(rank=10**9), f"{MISFIT}it has {Q}:a as (2, 16), not (1000000000, 16); …"),
    bad_file(config(rank=10**18), f"{MISFIT}…overflow…"),
    bad_file(config(init="pissa"), f"{MISFIT}it has no {Q}:a0; …; and 4 more"),
    bad_file(config(init="pissa", rank=100), f"{MISFIT}blocks.0.attn.q_proj.weight has matrices of "
             "12×16, whose rank is at most 12: init='pissa' has no 100 directions to take"),
    # another base
    bad_file(raw(good()), f"{OTHER}1 of 4 tensors differ: {Q}{LOAD_IT}", pl.BaseMismatchError,
             otherwise(lambda model: model.blocks[0].attn.q_proj.weight[0, 0].add_(1e-3))),
    bad_file(raw(good()), f"{OTHER}4 of 4 tensors differ: {Q} (dtype float32, here bfloat16); …"
             f"{LOAD_IT}", pl.BaseMismatchError, otherwise(nn.Module.bfloat16)),
    bad_file(edited(lambda old, _: old["base"].pop(Q)), f"'…' lacks the fingerprint of {Q}"),
]  # fmt: skip


# -- the methods


def gated_prefix() -> nn.Module:
    model = ZOO["hf_llama"].model()
    pl.attach(model, pl.Gated(pl.PrefixTuning(prefix_length=2)), "sql")
    return model


def refusing(method: type[pl.Method], targets: str, what: str, **options: Any) -> Case:
    act = attaching(method(targets=targets, **options))
    says = f"{targets} is {what}; {method.__name__} takes {method.takes}"
    return Case(act, says, pl.TargetError, bare)


def narrow() -> nn.Module:
    model = nn.Sequential(nn.Identity(), nn.Linear(8, 3))
    pl.attach(model, pl.BottleneckAdapter(targets="0()", width=6))
    return model


METHODS = [
    *(refusing(method, "norm.weight", "a tensor of shape (16,)")
      for method in (pl.VBLoRA, pl.FourierFT, pl.LoHa, pl.LoKr, pl.VeRA, pl.OFT, pl.BOFT, pl.HRA,
                     pl.SHiRA)),
    *(refusing(method, "blocks.0.attn()", "a call")
      for method in (pl.IA3, pl.NormTuning, pl.SparseMask)),
    refusing(pl.AdaLoRA, "norm.weight", "a tensor of shape (16,)", total_steps=9),
    refusing(pl.LTSFT, "blocks.0.attn()", "a call", steps=1),
    Case(lambda *_: pl.attach(bare(), pl.AdaLoRA(total_steps=9)).step(), "AdaLoRA has no gradients "
         "to tell what is important by: call delta.step() after optimizer.step() and before "
         "zero_grad()"),
    refusing(pl.BOFT, "lm_head.weight", "a tensor of shape (29, 16)", m=6),
    refusing(pl.BottleneckAdapter, "norm.weight", "a tensor of shape (16,)"),
    Case(attaching(pl.BottleneckAdapter(targets="blocks.0.mlp.1()")), "how wide what "
         "blocks.0.mlp.1() takes and gives is can't be told from its layers: say width=, or name "
         "a call inside it", pl.TargetError),
    Case(lambda model, _: model(torch.ones(2, 8)), "0() has a tensor of shape (2, 8) where its "
         "adapter works on 6 features in dimension -1: say width=, or name a call inside it",
         model=narrow),
    Case(lambda *_: pl.LoReFT(positions="f"),
         "positions must be 'all' or such as 'f7+l7', 'f7' or 'l7', not 'f'"),
    Case(lambda model, _: model(torch.ones(3, 4)),
         "positions='f1+l1' need a tensor (b, t, d); () gives (3, 4)",
         model=attached(nn.Linear(4, 4), pl.LoReFT(rank=2, targets="()", positions="f1+l1"))),
    Case(lambda model, _: model(ids(3), use_cache=True), "model.layers.0.self_attn() is called "
         "with a cache, which would be filled twice, with and without the PrefixPatch behind its "
         "gate: pass use_cache=False", model=gated_prefix),
    refusing(pl.Compacter, "blocks.0()", "a call", phm_dim=5),
    refusing(pl.LoReFT, "blocks.0()", "a call", rank=99),
    refusing(pl.PrefixTuning, "embed()", "a call"),
    Case(lambda *_: pl.Gated("lora"), "Gated takes a method such as LoRA(), not 'lora'"),
    Case(lambda *_: pl.BottleneckAdapter(preset="x"),
         "preset must be one of 'houlsby', 'pfeiffer', 'parallel', not 'x'"),
    Case(lambda *_: pl.IA3(feedforward=["down"]),
         "feedforward must be one of True, False, not ['down']"),
    Case(attaching(pl.FullTuning(top_layers=2)), "top_layers goes by the numbers of layers in a "
         "list: there are none", pl.TargetError, lambda: nn.Linear(4, 4)),
    Case(lambda *_: pl.attach(bare(), pl.BitFit()).parameter_groups(1e-3, b_ratio=16),
         "b_ratio is for LoRA's factors B, and BitFit has none"),
    Case(lambda *_: pl.SparseMask(select="top"),
         "select must be one of 'magnitude', 'random', 'fish', 'given', not 'top'"),
    Case(attaching(pl.SparseMask(select="fish", targets="lm_head")), "select='fish' goes by "
         "scores['lm_head.weight'], a tensor of shape (29, 16), not None: give a score to every "
         "entry of every site, as scores=pl.fish_scores(model, loss, batches) does"),
    Case(lambda *_: pl.fish_scores(bare(), None, []), "fish_scores saw no gradient: give it "
         "batches, and a model whose parameters require gradients (pl.attach freezes them: score "
         "them before)"),
]  # fmt: skip


ONE_CALL = (
    "() is a call; PromptTuning takes the one call of a module that looks up its token ids in an "
    "nn.Embedding inside it"
)
CUT_CACHE = (
    "model() has 5 positions in its cache and 3 tokens to go on with, 6 but for its prompt, and a "
    "mask of 8: a cache that holds a prompt can't be cropped, or given to another generate()"
)


def prompted() -> nn.Module:
    model = ZOO["hf_llama"].model()
    pl.attach(model, pl.PromptTuning(prompt_length=2), "sql")
    return model


def ids(t: int) -> Tensor:
    return torch.zeros(1, t, dtype=torch.long)


def cut_cache(model: nn.Module, _: Path) -> None:
    cache = model(ids(3), use_cache=True).past_key_values
    model(ids(3), attention_mask=torch.ones(1, 8), past_key_values=cache)


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def given_ids(model: nn.Module, _: Path) -> None:
    model(torch.zeros(2, 4, dtype=torch.long))


PREFIXES = [
    Case(given_ids, "blocks.0.attn() attends to keys (2, 2, 4, 6) and values (2, 2, 4, 6), and its "
         "prefix has 3 heads of 5 features: say num_heads= and head_dim=",
         model=attached(bare(), pl.PrefixTuning(num_heads=3, head_dim=5))),
    Case(given_ids, "blocks.0.mlp() came to no F.scaled_dot_product_attention in this call, so its "
         "prefix had no effect: for transformers, type model.set_attn_implementation(\"sdpa\"), "
         "and ask for no output_attentions", model=attached(
             bare(), pl.PrefixTuning(targets="blocks.0.mlp()", num_heads=2, head_dim=6))),
    Case(attaching(pl.PrefixTuning()), "how many heads the keys of () have, and how wide they are, "
         "can't be told from its attributes: say num_heads= and head_dim=", pl.TargetError,
         model=Attends),
]  # fmt: skip

PROMPTS = [
    Case(attaching(pl.PromptTuning(targets="blocks.0()")), "blocks.0" + ONE_CALL, pl.TargetError,
         bare),
    # a file could say so
    Case(lambda model, _: pl.PromptTuning(prompt_length=2).build_all(sites(model)[:1]), ONE_CALL,
         pl.TargetError, bare),
    Case(attaching(pl.PromptTuning(prompt_length=10)), "model() has 10 positions, which a prompt "
         "of 10 leaves none of: say prompt_length= with less", pl.TargetError, on("hf_llama")),
    Case(attaching(pl.PromptTuning(init="text", init_ids=[29])),
         "init_ids (29,) has ids beyond embed(), which has 29", pl.TargetError, bare),
    Case(lambda *_: pl.PromptTuning(init_ids=[1]), "init=\"text\" takes init_ids=, the ids that a "
         "tokenizer gives for it, and no other init does: not init='random' with init_ids=(1,)"),
    Case(lambda model, _: model(torch.zeros(3, dtype=torch.long)), "() is called without token ids "
         "of shape (b, t) for its prompt to go before: name the call that takes them with "
         "targets=", model=attached(bare(), pl.PromptTuning(prompt_length=2))),
    Case(lambda model, _: model(ids(3), visual=torch.zeros(1, 3, 4)), "model() is called with "
         "visual (1, 3, 4), which can't be made 2 tokens longer: give it as (b, t, ...) and say "
         "fill={'visual': 0}, or whatever virtual tokens have there; or say None, for it to be "
         "left as it is", model=prompted),
    Case(cut_cache, CUT_CACHE, model=prompted),
]  # fmt: skip


def starting(init: str | None, *given: Any, **data: Any) -> Case:
    """A delta that begins from data: what it is given, then what the error says."""
    *batches, says = given

    def act(*_: Any) -> None:
        model = bare()
        method = pl.BitFit() if init is None else pl.LoRA(rank=2, init=init, targets="blocks.0.mlp")
        pl.initialize(model, pl.attach(model, method), *batches, **data)

    return Case(act, says)


def summed(factor: float) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, ids: model(ids).sum() * factor


IDS = torch.zeros(1, 3, dtype=torch.int64)
INITIALIZE = [
    Case(lambda model, _: pl.initialize(model, "sql", []),
         "initialize takes a delta, as pl.attach gives it, not 'sql'"),
    starting(None, [], "'default' has nothing to initialize in this model: give a delta that is "
             "attached here, not merged, and of pl.LoRA(init=...) with one of 'eva', 'lora_ga', "
             "'corda', 'loftq'"),
    starting("eva", [], "the batches reached 0 of 2 sites, and not blocks.0.mlp.0.weight; "
             "blocks.0.mlp.2.weight: give batches that the model runs on, or leave those sites out "
             "with exclude="),
    starting("lora_ga", [IDS], "the data for blocks.0.mlp.0.weight has values that aren't finite",
             loss=summed(float("inf"))),
    starting("loftq", "init='loftq' goes by original['blocks.0.mlp.0.weight'], the tensor before "
             "it was quantised, of shape (20, 16): not None"),
    Case(attaching(pl.LoRA(init="eva", targets="embed")), "init='eva' goes by the inputs of linear "
         "maps, and embed.weight is no weight of one that is called: leave it out with exclude=",
         pl.TargetError),
    Case(attaching(pl.LoRA(init="lora_ga", targets="q_proj")), "blocks.0.attn.q_proj.weight has "
         "matrices of 12×16, whose rank is at most 12: init='lora_ga' has no 16 directions to take",
         pl.TargetError),
]  # fmt: skip


# -- algebra


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

ALGEBRA = [
    *(Case(combining(given), BY_NAME + shown)
      for given, shown in (("sql", "'sql'"), (["sql"], "['sql']"), ({}, "{}"), (None, "None"))),
    *(Case(combining({"sql": weight}), WEIGHT + shown)
      for weight, shown in ((float("nan"), "nan"), (float("inf"), "inf"), ("1", "'1'"),
                            (None, "None"), (10**400, "an int"))),
    Case(combining({"dba": 1}),
         "no delta is named 'dba' in this model; there are: 'sql', 'chat'"),
    Case(lambda model, _: pl.combine(model, {delta(model): 1}),
         "a delta goes by its name here: 'sql', not Delta('sql', LoRA, 224 parameters)"),
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
    Case(combining({"sql": 1}), "0.weight is on the meta device and has no values to combine",
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


# -- the demo


@mock.patch("sysconfig.get_path")
def without_sources(get_path: Any) -> None:
    get_path.return_value = "/nowhere"
    text.code()


DEMO = [
    Case(lambda *_: without_sources(), "the demo reads Python's own source, but /nowhere has 0 "
         "modules as text; run it with a Python whose standard library is installed as .py files"),
]  # fmt: skip


# -- PEFT's directories

P, A, B = "base_model.model.blocks.0.attn.q_proj", "lora_A.weight", "lora_B.weight"
LORA_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0.attn.q_proj"]}
AT, IN = "'…/adapter_config.json' ", "'…/adapter_model.safetensors' "


def factors(path: str = P, r: int = 2) -> dict[str, Tensor]:
    return {f"{path}.{A}": torch.ones(r, 16), f"{path}.{B}": torch.ones(12, r)}


def adapter(
    config: Any = None, tensors: dict[str, Tensor] | None = None, name: str = "model.safetensors"
) -> Callable[[Path], None]:
    """A folder with an adapter; `config` is what is otherwise in it than a LoRA's, or its text."""

    def write(path: Path) -> None:
        path.mkdir(parents=True)
        text = config if isinstance(config, str) else json.dumps({**LORA_CONFIG, **(config or {})})
        (path / "adapter_config.json").write_text(text)
        held = factors() if tensors is None else tensors
        safetensors.torch.save_file(held, path / f"adapter_{name}", {"format": "pt"})

    return write


def reading(
    says: str, config: Any = None, tensors: Any = None, model: Callable[[], Any] = bare
) -> Case:
    return bad_file(adapter(config, tensors), says, model=model)


def of(kind: str, says: str, tensors: dict[str, Tensor], **config: Any) -> Case:
    """Of another method, at q_proj."""
    held = {f"{P}.{name}": tensor for name, tensor in tensors.items()}
    return reading(says, {"peft_type": kind, "lora_alpha": None, **config}, held)


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv1d(16, 16, 3), nn.GELU(), nn.Conv1d(16, 16, 3))


def exporting(method: Any, says: str, model: Callable[[], Any] = bare, **options: Any) -> Case:
    def act(model: nn.Module, path: Path) -> None:
        pl.export(delta(model), path, **options)

    return Case(act, says, model=lambda: attached(model(), method)())


def cannot(at: str, why: str) -> str:
    return (
        f"{at} can't go into a PEFT directory, since {why}: leave it out with exclude=, or keep "
        "the delta with pl.save"
    )


def in_the_way(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("")


def vera(**tensors: Tensor) -> dict[str, Tensor]:
    shared = {f"base_model.vera_{name}": tensor for name, tensor in tensors.items()}
    return {f"{P}.vera_lambda_b": torch.ones(12), f"{P}.vera_lambda_d": torch.ones(2), **shared}


PEFT_FILES = [
    # what is no adapter
    bad_file(adapter("{"), AT + "is no JSON: …"),
    bad_file(adapter('{"peft_type": "LORA", "lora_alpha": NaN}'), AT + "is no JSON: NaN is no "
             "number"),
    *(bad_file(adapter(text), AT + f"has the peft_type {kind}, which can't be read; these can: …")
      for text, kind in (("[]", "None"), ("{}", "None"), ('{"peft_type": "XLORA"}', "'XLORA'"))),
    bad_file(adapter(name="model.bin"), "'…/adapter_model.bin' is a pickle, which may run code as "
             "it is read; convert it first: safetensors.torch.save_file(torch.load('…', "
             "weights_only=True), '…/adapter_model.safetensors')"),
    bad_file(adapter(name="modell.safetensors"), "there is no file '…/adapter_model.safetensors'"),
    bad_file(lambda path: adapter()(path / "chat"), "'…' has its adapters in folders of their own: "
             "chat; load one: '…/chat'"),
    # settings
    reading(AT + "has 'lora_alpha' as 1e+30, which no training has", {"lora_alpha": 1e30}),
    reading(AT + "has 'lora_alpha' as inf, which no training has",
            json.dumps(LORA_CONFIG).replace("4", "1e999")),
    reading(AT + "has 'lora_alpha' as '4'", {"lora_alpha": "4"}),
    reading(AT + "has 'use_dora' as 1", {"use_dora": 1}),
    reading(AT + "has 'modules_to_save' as [3]", {"modules_to_save": [3]}),
    reading(AT + "has an impossible setting: alpha must be finite and above 0, not 0",
            {"lora_alpha": 0}),
    reading(AT + "has a regex in 'alpha_pattern', '.*proj': write out the modules' paths",
            {"alpha_pattern": {".*proj": 3}}),
    reading(AT + "is a LORA with 'layer_replication' as [[0, 2]], which may change the model in a "
            "way that peftlite doesn't have", {"layer_replication": [[0, 2]]}),
    reading(AT + "has 'init_lora_weights' as 'loftq', whose base isn't the model's own: save it "
            "with path_initial_model_for_weight_conversion= in peft",
            {"init_lora_weights": "loftq"}),
    of("OFT", AT + "has 'num_cayley_neumann_terms' as 2: below 3",
       {"oft_R.weight": torch.ones(4, 6)}, num_cayley_neumann_terms=2),
    of("OFT", AT + "is of a peft before 0.18, whose 'use_cayley_neumann' was another series: train "
       "it anew", {"oft_R.weight": torch.ones(4, 6)}, peft_version="0.17.1"),
    bad_file(adapter(
        {"peft_type": "IA3", "feedforward_modules": ".*", "target_modules": None},
        {"base_model.model.0.ia3_l": torch.ones(1, 16, 1)},
    ), AT + "has a regex for 'feedforward_modules': write out the modules' paths", model=conv),
    reading(AT + "has None for the tokens of embed", {}, {
        **factors(),
        "base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(1, 16),
    }),
    # tensors
    reading(IN + f"has a module without its '{B}'", {}, {f"{P}.{A}": torch.ones(2, 16)}),
    reading(IN + "lacks the tensors of 1 modules that adapter_config.json names: "
            "blocks.1.attn.q_proj", {"target_modules": ["q_proj"]}),
    reading("'…' doesn't fit this model: it has blocks.0.attn.q_proj.weight:a as (2, 17), not "
            "(2, 16)", {}, {**factors(), f"{P}.{A}": torch.ones(2, 17)}),
    reading("'…' doesn't fit this model: it has blocks.0.attn.q_proj.weight:b with values that "
            "aren't finite", {}, {**factors(), f"{P}.{B}": torch.full((12, 2), torch.nan)}),
    *(reading(f"'…' doesn't fit this model: it has {key}, which nothing asks for", {},
              {**factors(), key: torch.ones(29, 16)}) for key in (
        f"{P}.lora_C.weight", "base_model.model.lm_head.weight", "../../etc/passwd", "base_model.",
        "base_model.model.", "lm_head.weight", "base_model.model.blocks.0.attn.q_proj.weight",
    )),
    reading("'…' is for a model with other sites: of 1, this one lacks 1: "
            "blocks.7.attn.q_proj.weight; nearest: …", {"target_modules": None},
            factors(P.replace("0", "7"))),
    bad_file(adapter({"target_modules": None}, {
        f"base_model.model.0.{A}": torch.ones(2, 16, 2), f"base_model.model.0.{B}": torch.ones(16),
    }), IN + "has odd tensors: one is (2, 16, 2), not (any, 16, 3)", model=conv),
    bad_file(adapter({"peft_type": "LOKR", "target_modules": None}, {
        "base_model.model.0.lokr_w1": torch.ones(4, 4),
        "base_model.model.0.lokr_w2": torch.ones(4, 4, 3),
    }), IN + "has odd tensors: 0 is a Conv1d, the taps of whose lokr_w2 peft mixes up, unless it's "
        "of a low rank", model=conv),
    of("SHIRA", IN + "has odd tensors: its shira_indices are beyond the weight, or name an entry "
       "twice", {"shira_weight": torch.ones(2), "shira_indices": torch.tensor([[0, 99], [0, 0]])}),
    reading(IN + "has odd tensors: its vera_A or vera_B isn't what its projection_prng_key gives "
            "for these modules", {"peft_type": "VERA"},
            vera(A=torch.ones(2, 16), B=torch.ones(12, 2))),
    reading(IN + "has odd tensors: base_model.model.lm_head.weight is torch.float32 (30, 16), and "
            "here torch.float32 (29, 16): give the model that shape first (for tokens: "
            "model.resize_token_embeddings)", {"modules_to_save": ["lm_head"]},
            {**factors(), "base_model.model.lm_head.weight": torch.ones(30, 16)}),
    *(reading(IN + f"has odd tensors: {what}", {"trainable_token_indices": {"embed": rows}}, {
        **factors(),
        "base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(2, 16),
    }) for rows, what in (
        ([1, 29], "the tokens of embed.weight are beyond its 29, or named twice"),
        ([1, 1], "the tokens of embed.weight are beyond its 29, or named twice"),
        ([1], "base_model.model.embed.token_adapter.trainable_tokens_delta is torch.float32 "
              "(2, 16), and here torch.float32 (1, 16): give the model that shape first (for "
              "tokens: model.resize_token_embeddings)"),
    )),
    reading(IN + f"holds {P}.base_layer.weight of a base that had other values there: give the "
            "model those, or list the module in 'modules_to_save' of its settings, for the delta "
            "to have them", {}, {**factors(), f"{P}.base_layer.weight": torch.ones(12, 16)}),
    reading(IN + "changes lm_head.weight apart from embed.weight, and this model ties them: "
            "untie them first, model.lm_head.weight = "
            "torch.nn.Parameter(model.lm_head.weight.detach().clone())",
            {"modules_to_save": ["lm_head"], "target_modules": None},
            {"base_model.model.lm_head.weight": torch.ones(29, 16)}, on("gpt_tied")),
    # writing
    Case(lambda model, path: pl.export(model, path), "export takes a delta, such as "
         "pl.deltas(model)['sql']: not a GPT"),
    exporting(SMALL, "format must be one of …, not 'onnx'", format="onnx"),
    *(exporting(SMALL, f"settings must be a dict that JSON can hold, not {what}", settings=its)
      for its, what in (([3], "[3]"), ({"a": float("nan")}, "{'a': nan}"))),
    exporting(pl.PromptTuning(prompt_length=2), "peft puts a prompt where the task says: give "
              "settings={'task_type': 'CAUSAL_LM'}, or SEQ_CLS, SEQ_2_SEQ_LM, TOKEN_CLS, "
              "QUESTION_ANS, FEATURE_EXTRACTION"),
    exporting([SMALL, pl.IA3(targets="lm_head")], "peft has one method in an adapter, and this "
              "delta has LoRA, IA3: attach them as deltas of their own, or keep them together with "
              "pl.save"),
    exporting(pl.BottleneckAdapter(), cannot("blocks.0.attn()", "peft has no BottleneckAdapter "
              "there")),
    exporting(pl.LoRA(targets="lm_head.weight[0:4]"),
              cannot("lm_head.weight[0:4]", "peft takes whole weights")),
    exporting(pl.LoHa(targets="embed"), cannot("embed.weight", "peft's LOHA doesn't take a "
              "Embedding")),
    exporting(pl.LoRA(targets="lm_head"), cannot("embed.weight", "it is tied to lm_head.weight, "
              "and peft would untie it"), on("gpt_tied")),
    exporting(pl.IA3(targets="v_proj.weight"), cannot("blocks.0.attn.v_proj.weight", "peft scales "
              "its bias, too, which the delta leaves as it is")),
    exporting(pl.LoRA(targets="in_proj_weight"), cannot("0.layers.0.self_attn.in_proj_weight",
              "peft changes 0.layers.0.self_attn.out_proj.weight with it, which the delta leaves "
              "as it is"), on("mha_encoder")),
    exporting(pl.OFT(neumann_terms=1),
              "peft has no OFT with neumann_terms=1, but from 2 up, and exact"),
    exporting([pl.OFT(targets="q_proj", block_size=4), pl.OFT(targets="v_proj", block_size=8)],
              "peft has one oft_block_size for all modules, and this delta has 4 and 8: attach "
              "what differs as another delta"),
    exporting([pl.VeRA(targets="q_proj", rank=2), pl.VeRA(targets="lm_head", rank=2)],
              "peft has one random A and B for all of a VeRA, and this delta has several of "
              "different sizes: attach it as one method"),
    exporting([pl.VBLoRA(targets=name, vector_length=4, num_vectors=5) for name in
               ("q_proj", "k_proj")], "peft has one bank for all of a VB-LoRA, and this delta has "
              "several: attach it as one method"),
    exporting([pl.AdaLoRA(targets="q_proj", total_steps=9),
               pl.AdaLoRA(targets="k_proj", total_steps=9, alpha=3)],
              "peft has one lora_alpha for all modules of an AdaLoRA"),
    exporting(pl.LoKr(rank=9, targets="0"), "0 is a Conv1d, the taps of whose lokr_w2 peft mixes "
              "up, unless it's of a low rank: attach with a smaller rank", conv),
    Case(lambda model, path: pl.export(delta(model), path), f"{P}.{A} has values that aren't "
         "finite, so it could not be loaded", model=poisoned),
    exporting(SMALL, "blocks.0.attn.q_proj.weight is on the meta device: it has no values",
              lambda: bare().to("meta")),
    Case(lambda model, path: pl.export(delta(model), path), "can't write '…': it holds thesis.tex, "
         "and nothing but an adapter is replaced", pl.FileError, file=in_the_way),
    Case(lambda model, path: pl.export(delta(model), path / "no" / "where"), "can't write '…': "
         "there is no folder '…'", pl.FileError),
]  # fmt: skip


# -- a checkpoint's files, without the model


def in_shards(path: Path) -> None:
    """A sound delta, and the base it was made for, in two shards."""
    path.write_bytes(good())
    tensors = list(bare().state_dict().items())
    write_shards(path, {"1.safetensors": dict(tensors[:9]), "2.safetensors": dict(tensors[9:])})


def write_shards(path: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    folder = path.with_name("base")
    folder.mkdir()
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / name)
    write_index(path, {key: name for name, tensors in shards.items() for key in tensors})


def write_index(path: Path, weight_map: Any) -> None:
    text = json.dumps({"weight_map": weight_map})
    (path.with_name("base") / "model.safetensors.index.json").write_text(text)


def with_base(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """The same files, but for what a stranger did to them."""

    def write(path: Path) -> None:
        in_shards(path)
        change(path)

    return write


def of_other(tensors: Callable[[], dict[str, Tensor]]) -> Callable[[Path], None]:
    """A sound delta, and another base."""

    def write(path: Path) -> None:
        path.write_bytes(good())
        write_shards(path, {"1.safetensors": tensors()})

    return write


def merging_files(out: str = "out", base: str = "base", **its: Any) -> Callable[[Any, Path], Any]:
    return lambda _, path: pl.merge_files(path.parent / base, path, path.parent / out, **its)


def offline(act: Any, says: str, file: Any, kind: Any = pl.FileError) -> Case:
    return Case(act, says, kind, nn.ReLU, file)


def calling(path: Path) -> None:
    in_shards(path)
    pl.save(delta(with_calls()), path)


def two_files(path: Path) -> None:
    (path.with_name("base") / "model.safetensors.index.json").unlink()


def shrinking(_: Any, path: Path) -> None:
    """A file that gets shorter after it was opened."""
    shard = path.with_name("base") / "1.safetensors"
    data, held = shard.read_bytes(), Checkpoint(shard)
    shard.write_bytes(data[:-9])
    try:
        held.rewrite(path, lambda key: None, lambda count: None)
    finally:
        shard.write_bytes(data)


def command(*args: str) -> Callable[[Any, Path], Any]:
    """A command, with PATH for the path."""

    def act(_: Any, path: Path) -> None:
        parsed = cli._parser().parse_args([arg.replace("PATH", str(path)) for arg in args])
        parsed.run(parsed)

    return act


NO_INDEX = "'…/base/model.safetensors.index.json' is no index of a checkpoint: …"
HOLDS_IT = ": name the one that holds the model"
INTO = "'…' was made for other base weights: " + Q + " differs"
ADVICE = "; merge it into the base it was trained on, or pass check_base='warn'"

OFFLINE = [
    offline(merging_files(check_base=False), "check_base must be 'error', 'warn' or 'off', not "
            "False", in_shards, pl.PeftliteError),
    offline(merging_files(), INTO + ADVICE, of_other(lambda: {
        k: x + 1 for k, x in bare().state_dict().items()}), pl.BaseMismatchError),
    offline(merging_files(), f"{INTO} (dtype float32, here bfloat16){ADVICE}",
            of_other(bare().bfloat16().state_dict), pl.BaseMismatchError),
    offline(merging_files(), SITES + LACKS_ALL + "there are such as …",
            of_other(ZOO["mlp"].model().state_dict)),
    offline(merging_files(), "'sql' changes calls, which no weight can hold: blocks.0.attn() (2 "
            "sites); keep it attached", calling, pl.PeftliteError),
    offline(merging_files(base="lost"), "there is no file '…/lost'", in_shards),
    *(offline(merging_files(), NO_INDEX, with_base(lambda path, its=its: write_index(path, its)))
      for its in (None, [], 3)),
    offline(merging_files(), NO_INDEX, with_base(
        lambda path: (path.with_name("base") / "model.safetensors.index.json").write_text("{"))),
    *(offline(merging_files(), f"'…' names {its!r}, which is no name of a safetensors file",
              with_base(lambda path, its=its: write_index(path, {Q: its})))
      for its in ("../1.safetensors", "/1.safetensors", ".safetensors", "1.bin", 3)),
    offline(merging_files(), f"'…/base' has 1.safetensors; 2.safetensors{HOLDS_IT}",
            with_base(two_files)),
    offline(merging_files(), f"'…/base' has no safetensors file{HOLDS_IT}",
            lambda path: (path.write_bytes(good()), path.with_name("base").mkdir())),
    offline(merging_files(), "'…/base' has a tensor in two of its files", with_base(
        lambda path: (path.with_name("base") / "2.safetensors").write_bytes(
            (path.with_name("base") / "1.safetensors").read_bytes()))),
    offline(merging_files("base"), "can't write '…/base': it is there already; name a new folder",
            in_shards),
    offline(merging_files("deeper/out"),
            "can't write '…/deeper/out': there is no folder '…/deeper'",
            in_shards),
    offline(merging_files("sql.safetensors", "sql.safetensors"), "'…' is for a model with …",
            in_shards),
    offline(lambda _, path: Checkpoint(path).rewrite(path, lambda key: None, print),
            "'…' is the base itself: give the result another name", in_shards),
    offline(shrinking, "'…/base/1.safetensors' became shorter while it was read", in_shards),
    offline(command("verify", "PATH"), "there is no file '…'", None),
    offline(command("combine", "base", "PATH=much", "-o", "out"), "'…=much' is no FILE=WEIGHT: "
            "'much' is no number", None, pl.PeftliteError),
]  # fmt: skip

# -- peers' files of one list of tensors


def peers(keys: dict[str, Tensor], **metadata: str) -> Callable[[Path], None]:
    return lambda path: safetensors.torch.save_file(keys, path, metadata or None)


def pair(at: str = "lycoris_0.lora_down.weight lycoris_0.lora_up.weight", rank: int = 2) -> dict:
    a, b = at.split()
    return {a: torch.ones(rank, 4), b: torch.ones(4, rank)}


def peer_file(keys: dict[str, Tensor], of: str, says: str, **metadata: str) -> Case:
    says = f"'…' is of {of}, and {says}"
    return Case(pl.load, says, pl.FileError, linears, peers(keys, **metadata))


def converting(says: str, file: Callable[[Path], Any] | None, **how: Any) -> Case:
    kind = pl.FileError if says.startswith("'…'") else pl.PeftliteError
    return Case(lambda model, path: convert(path, path, **how), says, kind, linears, file)


def into_kohya(method: Any, model: nn.Module, why: str, format: Any = "kohya") -> Case:
    says = (
        f"… can't go into a file of {format}, since {why}: leave it out with exclude=, or keep the "
        "delta with pl.save"
    )
    return exporting(method, says, lambda: model, format=format)


def twins() -> nn.Module:
    model = linears()
    model[1].weight = model[0].weight
    return model


def namesakes() -> nn.Module:
    return nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "a_b": nn.Linear(4, 4)})


def no_number() -> nn.Module:
    model = attached(linears(), pl.LoRA())()
    next(delta(model).parameters()).data[0, 0] = torch.nan
    return model


LORALIB = pair("0.lora_A 0.lora_B")
FUSED = {"0.lora_A": torch.ones(2, 4), "0.lora_B": torch.ones(4, 1)}
SETTINGS_OF = "lora_adapter_metadata"
WHOLE = "there it has whole weights of linear layers and convolutions"

PEER_FILES = [
    peer_file(pair() | {"lycoris_0.scalar": torch.ones(1)}, "kohya", "has lycoris_0.scalar, which "
              "can't be read"),
    peer_file(pair("0.lora.down.weight 0.lora.up.weight") | pair("0.lora_A.weight 0.lora_B.weight"),
              "diffusers", "has 0.lora_A.weight beside 0.lora.down.weight"),
    peer_file({"lycoris_0.lora_down.weight": torch.ones(2, 4)}, "kohya", "lycoris_0 has no "
              "lora_up.weight"),
    peer_file(pair() | {"lycoris_0.hada_w1_a": torch.ones(4, 2)}, "kohya", "lycoris_0 has "
              "hada_w1_a, lora_down.weight, lora_up.weight: together these are no method here"),
    peer_file(pair() | {"lycoris_0.alpha": torch.tensor(-1.0)}, "kohya", "lycoris_0 can't be: "
              "alpha must be finite and above 0, not -1.0"),
    peer_file(pair("a.lora_A.weight a.lora_B.weight") | pair("1.lora_A.weight 1.lora_B.weight"),
              "diffusers", "of its 2 modules this model lacks 1: a; nearest to the first: "),
    Case(pl.load, "'…' is of kohya, and lycoris_a_b may be a.b or a_b in this model: rename one of "
         "them to load it", pl.FileError, namesakes,
         peers(pair("lycoris_a_b.lora_down.weight lycoris_a_b.lora_up.weight"))),
    peer_file(pair("0.lora_A.weight 0.lora_B.weight"), "diffusers", "0 can't be: its base isn't "
              "the model's own, being trained with olora", **{SETTINGS_OF: json.dumps({
                  "r": 2, "lora_alpha": 2, "init_lora_weights": "olora"})}),
    peer_file(LORALIB, "loralib", "such files don't say α: say it once, with peftlite convert '…' "
              "NEW --alpha NUMBER"),
    peer_file(FUSED, "loralib", "0 has factors of 2 parts of a weight, and [] are said: say which, "
              "with peftlite convert '…' NEW --alpha NUMBER --parts q v", alpha="1"),
    peer_file(FUSED, "loralib", "0 can't be: its parts ['0:2', '2:3'] have 3 outputs, and B 4",
              alpha="1", parts='["0:2", "2:3"]'),
    # convert
    converting("to must be one of 'safetensors', 'peftlite', 'peft', 'kohya', 'diffusers', not "
               "'pt'", None, to="pt"),
    converting("'peft' goes by a model: give it with model=, or convert to 'safetensors', which "
               "leaves names as they are", None, to="peft"),
    Case(lambda model, path: convert(path, path, "peft", model=model), "convert takes a model "
         "without deltas: pl.detach them first"),
    converting("'…' is neither a safetensors file nor a pickle of tensors alone, and nothing else "
               "is unpickled, since it may run code", lambda path: torch.save(Case, path)),
    converting("'…' holds 3 as 'b', no plain tensor", lambda path: torch.save(
        {"a": torch.ones(1), "b": 3}, path)),
    converting("alpha= and parts= are for files that don't say them, and '…' is of kohya",
               peers(pair()), alpha=3),
    converting("alpha= and parts= are for files that don't say them, and '…' is of no such format",
               lambda path: path.write_bytes(good()), parts=["q"]),
    # export
    into_kohya(pl.IA3(targets="0"), linears(), "there it has LoRA, DoRA, LoHa, LoKr, and no IA3"),
    into_kohya(pl.LoRA(rank=1, targets="0.weight[0:2]"), linears(), WHOLE),
    into_kohya(pl.LoRA(rank=1, targets="0"), nn.Sequential(nn.Embedding(4, 4)), WHOLE),
    into_kohya(pl.LoRA(rank=1, targets="0"), nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)),
               "a change there sees the inputs of all groups", "diffusers"),
    into_kohya(pl.LoRA(rank=1), twins(), "it is tied to 1.weight"),
    into_kohya(pl.LoRA(rank=1), linears(device="meta"), "it is on the meta device and has no "
               "values"),
    into_kohya(pl.LoRA(rank=1, targets="*"), namesakes(), "another module, too, is called "
               "lycoris_a_b there"),
    Case(lambda model, path: pl.export(delta(model), path, "kohya"), "0.weight can't go into a "
         "file of kohya, since it has values that aren't finite: …", model=no_number),
    Case(lambda model, path: pl.export(delta(model), path, "kohya", settings={"step": 3}),
         "settings are a file's metadata in the format of kohya, all of them text: not {'step': "
         "3}"),
]  # fmt: skip

CASES = [
    *(ARGUMENTS + SETTINGS + TARGETS + MODELS + ROOTS + VIEWS + CHOICES + IN_ROWS + WRITES),
    *(MERGES + SAVES + FILES + METHODS + PREFIXES + PROMPTS + INITIALIZE + ALGEBRA + DEMO),
    *(PEFT_FILES + OFFLINE + PEER_FILES),
    *(
        case
        for part in (
            bank,
            bank_families,
            fuse,
            kernels,
            train,
            train_data,
            train_more,
            train_parallel,
        )
        for case in part.CASES
    ),
]


# -- the laws


def trace(model: nn.Module, folder: Path) -> dict[str, Any]:
    """All that an error may not disturb."""
    files = {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    return {
        **snapshot(model),
        "choice": [hosted.choice.__dict__.copy() for hosted in hosts(model)],
        "deltas": [list(hosted.registry.deltas) for hosted in hosts(model) if hosted.registry],
        "files": files,
    }


def hosts(model: nn.Module) -> Iterator[Any]:
    return (m.peftlite for m in model.modules() if isinstance(m, pl.host.Host))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """The digest, or what there is of it in a model whose tensors can't be looked at."""
    try:
        return digest(model)
    except (KeyError, ValueError):
        return {path: (type(m), sorted(m.__dict__)) for path, m in model.named_modules()}


def provoke(case: Case, folder: Path) -> Exception:
    """What the case raises, once it has left no trace."""
    model, path = (case.model or two)(), folder / "sql.safetensors"
    if case.file is not None:
        case.file(path)
    before = trace(model, folder)
    try:
        case.act(model, path)
    except pl.PeftliteError as error:
        assert trace(model, folder) == before
        return error
    raise AssertionError("nothing was raised")


def matches(pattern: str, message: str) -> bool:
    """Whether a message is what was written down, … standing for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), message) is not None


def name(case: Case) -> str:
    return re.sub(r"\W+", "_", case.says)[:60]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_says_what_to_do_and_leaves_no_trace(case: Case, tmp_path: Path) -> None:
    error = provoke(case, tmp_path)
    assert matches(case.says, str(error)), str(error)
    assert type(error) is case.kind


def raise_statements() -> Iterator[tuple[str, int, int]]:
    """Every `raise` of an error in the package: its file, first and last line."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                # that, and a name a module lacks, are Python's own protocols
                if not ast.unparse(node.exc).startswith(("NotImplementedError", "AttributeError")):
                    yield str(path), node.lineno, node.end_lineno or 0


def raised_at(error: BaseException | None) -> Iterator[tuple[str, int]]:
    """Where an error was raised, and whatever it came from."""
    while error is not None:
        *_, last = iterate(error.__traceback__)
        yield last.tb_frame.f_code.co_filename, last.tb_lineno
        error = error.__cause__


def iterate(traceback: Any) -> Iterator[Any]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def test_every_error_is_read_here(tmp_path: Path) -> None:
    seen = set()
    for i, case in enumerate(CASES):
        folder = tmp_path / str(i)
        folder.mkdir()
        seen.update(raised_at(provoke(case, folder)))
    unread = [
        f"{Path(file).relative_to(PACKAGE)}:{first}"
        for file, first, last in raise_statements()
        if not any((file, line) in seen for line in range(first, last + 1))
    ]
    assert not unread, unread


# -- what is let through


def test_the_numbers_of_a_sweep_are_numbers(tmp_path: Path) -> None:
    for rank, alpha, dropout in (
        (np.int64(2), np.float32(4), np.float64(0.5)),
        (torch.tensor(2), torch.tensor(4.0), torch.tensor(0.5)),
    ):
        method = pl.LoRA(rank=rank, alpha=alpha, dropout=dropout)
        assert method == pl.LoRA(rank=2, alpha=4.0, dropout=0.5)
        pl.save(pl.attach(bare(), method), tmp_path / "sweep.safetensors")
        ((read, _),) = pl.inspect(tmp_path / "sweep.safetensors").methods
        assert read == method


def test_another_base_can_be_let_through(tmp_path: Path) -> None:
    path = tmp_path / "sql.safetensors"
    path.write_bytes(good())
    model = bare().bfloat16()
    with pytest.warns(UserWarning, match="made for other base weights: 4 of 4 tensors differ"):
        pl.load(model, path, name="warned", check_base="warn")
    pl.load(model, path, name="off", check_base="off")
    assert list(pl.deltas(model)) == ["warned", "off"]


def test_a_scripted_part_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    assert pl.plan(model, pl.LoRA(targets="*")).addresses == ["0.weight"]


class Slotted(nn.Linear):
    __slots__ = ("extra",)


def test_a_class_with_slots_is_patched_like_any_other() -> None:
    model = nn.Sequential(Slotted(4, 4))
    model[0].extra = 3
    before = digest(model)
    pl.attach(model, pl.LoRA(rank=2))
    assert model[0].extra == 3 and isinstance(model[0], Slotted)
    pl.detach(model, "default")
    assert_same(before, digest(model))


def test_a_link_is_written_through(tmp_path: Path) -> None:
    model = two()
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    pl.save(delta(model), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "run"]

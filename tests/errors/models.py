"""The errors of models that can't be patched, and of the module that a verb is given."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftlite as pl
from tests.errors.attach import attaching
from tests.errors.case import SMALL, Case, bare, linears, two


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

CASES = MODELS + ROOTS

"""The errors of choosing: views, choices, rows; and of writes to what is read through patches."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlite as pl
from tests.errors.case import SMALL, Case, attached, delta, linears, two
from tests.errors.models import PART, sharded_later


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


def verbs(name: Callable[[Any], Any]) -> list[Callable[[Any, Path], Any]]:
    """Every verb that takes a delta of the model, or its name."""
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
OTHERS = "'sql' is no delta of this model, or no longer"
A_CHOICE = "a choice is a delta or its name, a list of these, or None: not "
ROWS = "rows= is a list with one choice per batch row, in place of a name: not "

CHOICES = [
    *(Case(verb, f"no delta is named 'typo'{THERE}") for verb in verbs(lambda _: "typo")),
    *(Case(verb, OTHERS) for verb in verbs(lambda _: delta(two()))),
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


def with_a_cache(model: nn.Module, _: Path) -> None:
    with pl.using(model, rows=["sql", None]):
        model(torch.zeros(2, 4), SimpleNamespace(get_seq_length=lambda: 0))


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
    Case(with_a_cache, "rows= can't split the cache that this call is given, which is of all rows: "
         "call the model without one, in generate by use_cache=False, or by a pl.DeltaBank, with "
         "one", model=two),
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
    writes("constant_", lambda w: nn.init.constant_(w, 0.0)),
    writes("kaiming_uniform_", lambda w: nn.init.kaiming_uniform_(w)),
    writes("relu", lambda w: nn.functional.relu(w, inplace=True)),
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


def recomputed(model: nn.Module, _: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of it, too
        checkpoint(model, torch.ones(1, 3).long(), use_reentrant=True)


CUT_OFF = [
    Case(recomputed, "no gradient would reach 'chat' here: the call is checkpointed with "
         "use_reentrant=True, and nothing that goes into it needs a gradient. Checkpoint with "
         "use_reentrant=False, in transformers by "
         "model.gradient_checkpointing_enable({'use_reentrant': False}); or call "
         "model.enable_input_require_grads()"),
]  # fmt: skip

CASES = VIEWS + CHOICES + IN_ROWS + WRITES + CUT_OFF

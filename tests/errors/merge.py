"""The errors of merge and unmerge."""

import threading
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import peftlite as pl
from peftlite.core import choice
from tests.errors.attach import Calls, Mine, Narrow
from tests.errors.case import Case, attached, bare, delta, linears, saving, two
from tests.errors.use import merged


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


def beside_a_call(model: nn.Module, _: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def stop(*_: object) -> None:
        inside.set()
        go_on.wait(20)

    handle = model.norm.register_forward_hook(stop)
    thread = threading.Thread(target=model, args=(torch.zeros(1, 2, dtype=torch.int64),))
    thread.start()
    try:
        assert inside.wait(20)
        with mock.patch.object(choice, "PATIENCE", 0.01):
            pl.merge(model, "sql")
    finally:
        go_on.set()
        thread.join()
        handle.remove()


RESIZED = (
    "blocks.0.attn.q_proj.weight is (20, 16) now, and was (12, 16) when the delta was attached: "
    "pl.detach, then resize, then attach"
)

REPLACED = (
    "blocks.0.attn.q_proj.weight was replaced, or tied to another, since 'sql' was attached: "
    "pl.detach it, and attach to the model as it is now"
)

Q = "blocks.0.attn.q_proj.weight"

CASES = [
    *(Case(lambda model, _, backup=backup: pl.merge(model, "sql", backup=backup),
           f"backup must be one of 'device', 'host', 'residual', 'none', not {backup!r}")
      for backup in ("disk", True)),
    *(Case(act, f"{Q} was written to since 'sql' was merged into it, and what was kept is a "
           "residual, which tells the base from the merged weights alone: put those back, or merge "
           "with backup='host' where they are to change", model=written)
      for act in (lambda model, _: pl.unmerge(model, "sql"), saving,
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
    Case(merging, REPLACED, model=replaced),
    Case(beside_a_call, "another thread has been in a call of the model for 0.01 s, and what that "
         "reads can't change under it: do this when the call has ended"),
    Case(lambda *_: pl.Patch().value(torch.zeros(2)), "Patch changes calls, not tensors"),
    Case(lambda *_: pl.Patch().call(torch.relu, torch.zeros(2)),
         "Patch changes tensors, not calls"),
]  # fmt: skip

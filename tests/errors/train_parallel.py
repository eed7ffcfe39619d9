"""The errors of training in several processes, as one of them raises them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftlite as pl
from peftlite.train import Trainer
from peftlite.train.parallel import Processes, check_unsharded
from tests.errors.case import Case, two
from tests.errors.train import TEXTS, fitting

LOSS = pl.losses.causal_lm
ALONE = "is for several processes, and this one was started alone: torchrun --nproc-per-node=N"


def beside(other: Any) -> Processes:
    """The first of two processes, of which the other has another value."""

    class Beside(Processes):
        def all_gather(self, value: Any) -> list[Any]:
            return [value, other(value)]

    return Beside(0, 2)


def on_one_device(model: nn.Module, _: Path) -> None:
    beside(lambda place: place).broadcast_deltas(model, [], torch.device("cuda:0"))


def failing_first(error: Exception) -> Callable[[Any, Path], Any]:
    """The second process, where the first one met an error."""

    class Second(Processes):
        def broadcast(self, value: Any) -> Any:
            return None, error

    return lambda *_: Second(1, 2).on_first(lambda: None)


def sharded(model: nn.Module, _: Path) -> None:
    deltas = [pl.deltas(model)["sql"]]
    for parameter in deltas[0].parameters():
        parameter.placements = ()  # as a DTensor has them
    try:
        check_unsharded(deltas)
    finally:
        for parameter in deltas[0].parameters():
            del parameter.placements


CASES = [
    *(
        Case(lambda model, _, kind=kind: Trainer(model, LOSS, TEXTS, parallel=kind),
             f"parallel={kind!r} {ALONE} script.py starts N")
        for kind in ("ddp", "fsdp")
    ),
    Case(lambda model, _: Trainer(model, LOSS, TEXTS, parallel="tp"),
         "parallel must be one of 'auto', 'ddp', 'fsdp', None, not 'tp'"),
    Case(lambda *_: beside(lambda own: {**own, "lr": 0.2}).check_same(
             "the settings", {"lr": 0.1}, "give all processes the same"),
         "the settings of process 0 and of process 1 differ: lr is 0.1, and 0.2: give all "
         "processes the same"),
    Case(on_one_device,
         "several processes train on cuda:0 of …: begin the script with "
         "torch.cuda.set_device(int(os.environ['LOCAL_RANK']))"),
    Case(failing_first(pl.FileError("no room")), "no room", pl.FileError),
    Case(sharded,
         "the parameters of 'sql' are sharded: leave fully_shard to Trainer(parallel='fsdp'), or "
         "give it ignored_params=set(delta.parameters())"),
    Case(fitting(), "…can't hold checkpoints: File exists", pl.FileError, two,
         file=lambda path: path.write_text("no folder")),
]  # fmt: skip

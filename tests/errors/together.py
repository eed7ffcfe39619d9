"""The errors of trainers, clients and trials that share a base."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftlite as pl
from peftlite.train import Trainer, fit_together, losses
from tests.errors.case import Case, bare, linears, two
from tests.errors.train_more import TEXTS, searching

BATCH = torch.randn(2, 4), torch.arange(2)
METHOD = pl.LoRA(rank=1, targets="*.weight")


def trainer(model: nn.Module, delta: Any = "sql", **options: Any) -> Trainer:
    given = {"epochs": 1, "batch_size": 4, "lr": 1e-3, "progress": False, "delta": delta}
    return Trainer(model, losses.causal_lm, TEXTS, **{**given, **options})


def sharing(*given: dict[str, Any], models: Sequence[Any] = ()) -> Callable[[Any, Path], Any]:
    """Trainers of two deltas on one base."""

    def act(model: nn.Module, path: Path) -> Any:
        trainers = []
        for i, options in enumerate(given):
            base = model if i == 0 or not models else models[0]()
            trainers.append(trainer(base, **options))
        return fit_together(trainers, progress=False)

    return act


def serving(*steps: Callable[[Any, Path], Any]) -> Callable[[Any, Path], Any]:
    """What a client of a service does, one thing after another."""

    def act(model: nn.Module, path: Path) -> Any:
        with pl.Service(model, slots=2, max_rank=1, methods=METHOD) as service:
            client = service.client("sql", METHOD)
            for step in steps:
                found = step(client, path)
                if hasattr(found, "result"):
                    found.result()

    return act


def infinite(model: nn.Module, batch: Any) -> Any:
    return model(batch[0]).sum() * torch.inf


def adopting(model: nn.Module, path: Path) -> None:
    twin = copy.deepcopy(model)  # whose choice a bank leaves otherwise
    with pl.DeltaBank(twin, 1, 2, pl.LoRA(rank=2, dtype=torch.float64)) as bank:
        bank.adopt("sql", pl.deltas(twin)["sql"])


def again(client: Any, path: Path) -> Any:
    client._service.client("sql", METHOD)


def closed(model: nn.Module, _: Path) -> None:
    with pl.Service(model, slots=2, max_rank=1, methods=METHOD) as service:
        pass
    service.client("sql", METHOD)


def learning(model: nn.Module, path: Path) -> None:
    with pl.DeltaBank(model, 1, 2, pl.DoRA(rank=1)) as bank:
        bank.load("sql", pl.DoRA(rank=1))
        bank.parameters("sql")


ONE = "two trainers have one delta, or one folder: name each one's own, as delta= and folder="

CASES = [
    Case(lambda *_: fit_together([]), "fit_together takes a list of trainers, not []"),
    Case(lambda model, _: fit_together(model), "fit_together takes a list of trainers, not a GPT…"),
    Case(lambda model, _: fit_together([3], at_once=0),
         "at_once must be a whole number from 1 up, not 0"),
    Case(lambda model, _: fit_together([3]), "fit_together takes trainers, not 3"),
    Case(sharing({"delta": ["sql", "chat"]}),
         "a trainer that shares a base trains one delta, not 'sql'; 'chat'"),
    Case(sharing({}, {}), ONE),
    Case(sharing({"folder": "a"}, {"folder": "a", "delta": "chat"}), ONE),
    Case(sharing({}, {"delta": "chat"}, models=[two]),
         "the trainers are of several models: one base is to be shared"),
    Case(sharing({}, {"delta": "chat", "gradient_checkpointing": True}),
         "gradient_checkpointing is the model's, so one for all trainers, not …"),
    Case(learning,
         "blocks.0.attn.q_proj.weight: a DoRAPatch can't be trained in a bank, where it isn't the "
         "parameters alone", model=bare),
    Case(searching(together=0), "together must be a whole number from 1 up, not 0", model=bare),
    Case(serving(again), "the service has a client 'sql' already: give another name",
         model=linears),
    Case(serving(lambda client, _: client.optim_step(lr=0.1)),
         "'sql' has no gradients: forward_backward comes first", model=linears),
    Case(serving(lambda client, _: client.forward_backward(BATCH, infinite),
                 lambda client, _: client.optim_step(lr=0.1)),
         "the gradients of 'sql' have norm …: no step is made", model=linears),
    *(Case(serving(lambda client, _, given=given: client.optim_step(**given)), f"{name} must be a "
           f"finite number from 0 up, not {given[name]!r}", model=linears)
      for given in ({"lr": "x"}, {"lr": -1.0}, {"lr": float("nan")}, {"lr": 0.1, "clip": -1})
      for name in [[*given][-1]]),
    Case(serving(lambda client, _: client.forward_backward(BATCH, 3)), "loss must be a function, "
         "not 3", model=linears),
    Case(closed, "the service is closed: make another one", model=linears),
    Case(serving(lambda client, _: client.close(), lambda client, _: client(BATCH[0])),
         "this client is closed: ask the service for another", model=linears),
    Case(adopting,
         "blocks.0.attn.q_proj.weight: a LoRAPatch can't be trained in a bank, where it isn't the "
         "parameters alone"),
    Case(serving(lambda client, path: client.load_state(path)),
         "… has no state of a client: save_state writes one", pl.FileError, linears),
]  # fmt: skip

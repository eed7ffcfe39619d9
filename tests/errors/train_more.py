"""The errors of search, of forgetting, and of the command that trains."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import peftlite as pl
import peftlite.train.data as data
from peftlite import cli
from peftlite.train import Trainer, losses
from peftlite.train.continual import forgetting
from peftlite.train.trials import search
from tests.errors.case import Case, bare
from tests.train.chats import hf_tokenizer, llama

IDS = torch.arange(8)
TEXTS = [{"input_ids": IDS, "labels": IDS} for _ in range(4)]
GRID = {"lr": [1e-3]}


def building(model: nn.Module, **options: Any) -> Callable[[Any], Trainer]:
    def build(choice: Any) -> Trainer:
        pl.attach(model, pl.LoRA(rank=1), "trial")
        given = {"epochs": 1, "batch_size": 4, "progress": False, "val": TEXTS}
        return Trainer(model, losses.causal_lm, TEXTS, **given | choice | options)

    return build


def searching(
    space: Any = GRID, trials: Any = 1, how: Any = "grid", **options: Any
) -> Callable[[Any, Path], Any]:
    """A search, with a file where one stands at the path."""

    def act(model: nn.Module, path: Path) -> Any:
        file = path if path.exists() else None
        own = {key: value for key, value in options.items() if key != "together"}
        build = options.get("build", building(model, **own))
        given = {"file": file, "together": options.get("together", 1), "progress": False}
        return search(build, space, trials, how, **given).best

    return act


def without_optuna(model: nn.Module, path: Path) -> Any:
    real = builtins.__import__

    def fake(name: str, *args: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return real(name, *args)

    with mock.patch("builtins.__import__", fake):
        searching(how="bayes")(model, path)


def holding(*lines: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def losing(before: Any, after: Any) -> Callable[[Any, Path], Any]:
    return lambda *_: forgetting(before, after)


def training(*args: str, name: str = "data.jsonl") -> Callable[[Any, Path], Any]:
    """`peftlite train` on a file beside the path."""

    def act(model: nn.Module, path: Path) -> Any:
        folder = path.parent / "files"
        given = ["--model", str(folder), "--data", str(folder / name), "--out", str(path), *args]
        parsed = cli._parser().parse_args(["train", *given])
        return parsed.run(parsed)

    return act


def folder(text: str | bytes = "{}\n", name: str = "data.jsonl") -> Callable[[Path], Any]:
    """A small model, its tokenizer, and a file."""

    def write(path: Path) -> None:
        files = path.parent / "files"
        llama().save_pretrained(files)
        hf_tokenizer(data.CHATML).save_pretrained(files)
        (files / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def begun(path: Path) -> None:
    (path / "step-00000001").mkdir(parents=True)
    (path / "step-00000001" / "manifest.json").write_text("{}")


CASES = [
    # search
    Case(searching(how="best"), "how must be one of 'grid', 'random', 'bayes', not 'best'"),
    Case(searching([1, 2]), "a space is a dict of what there is to choose from, by name: not "
         "[1, 2]"),
    Case(searching({"lr": (1e-2, 1e-3)}), "lr must be a list, or a range (low, high) or "
         "(low, high, 'log') of numbers, not (0.01, 0.001)"),
    Case(searching({"lr": (1e-3, 1e-2)}), "a grid takes lists, and lr is the range (0.001, 0.01)"),
    Case(searching(trials=None, how="random"), "say how many trials: 'random' has no end of its "
         "own"),
    Case(searching(trials=0), "trials must be a whole number from 1 up, not 0"),
    Case(searching(build=lambda choice: choice), "build makes a pl.Trainer of a choice, not "
         "{'lr': 0.001}"),
    Case(searching(val=None), "a search goes by full_valid_loss: give the Trainer val, or another "
         "metric", model=bare),
    Case(searching({"lr": [1e30], "epochs": [9]}), "no trial came to an end: trial 1: at step …",
         model=bare),
    Case(without_optuna, "how='bayes' needs optuna: pip install 'peftlite[search]'"),
    Case(searching(), "'…' can't be read: Is a directory", pl.FileError, file=Path.mkdir),
    Case(searching(), "'…' is no file of a search: …", pl.FileError, file=holding([1, 2])),
    Case(searching(), "'…' is of another search, seed=1, not 0; space={'lr': [0.1]}, not "
         "{'lr': [0.001]}: go on with that one, or give another file", pl.FileError,
         file=holding({"format": 1, "how": "grid", "seed": 1, "prune": True,
                       "space": {"lr": [0.1]}})),
    # forgetting
    Case(losing(0.9, 0.6), "forgetting takes scores by task, {'sql': 0.9, 'chat': [0.8, 0.7]}, and "
         "those of now, {'sql': 0.6, 'chat': 0.7}: not 0.9 and 0.6"),
    Case(losing({"sql": 0.9, "chat": 0.8}, {"sql": 0.9}), "there is no score after for 'chat': "
         "measure every task again"),
    Case(losing({"sql": "good"}, {"sql": 0.9}), "a task's score is a number, and for 'sql' it is "
         "'good'"),
    # peftlite train
    Case(training(), "'…' has checkpoints already: --resume goes on from them; to begin anew, give "
         "another folder", pl.FileError, file=begun),
    Case(training("--method", "QLoRA"), "no method is called 'QLoRA'; there are LoRA; VBLoRA; …"),
    Case(training("--method", "zzz"), "no method is called 'zzz'; there are AdaLoRA; …; VeRA…"),
    Case(training("--method", "ia3", "--rank", "4"), "IA3 has no rank: it has targets; …"),
    Case(training("--method", "adalora"), "AdaLoRA needs total_steps: give --set total_steps=…"),
    Case(training("--set", "dropout"), "'dropout' is no KEY=VALUE"),
    Case(training("--validation", "2"), "--validation is a file, or a share of the data above 0 "
         "and below 1: not 2", file=folder()),
    Case(training(), "'…' has no examples", pl.FileError, file=folder("")),
    Case(training("--device", "gpu"), "there is no device 'gpu' here: …"),
    Case(training(), "'…' has problems: line 1: …'messages'…", pl.FileError, file=folder()),
    Case(training(name="data.txt"), "'…data.txt' can't be read as text: …", pl.FileError,
         file=folder(b"\xff", "data.txt")),
]  # fmt: skip

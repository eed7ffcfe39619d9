"""The errors of the hub."""

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch import nn

import peftlite as pl
from tests.errors.case import Case, delta, linears


def loading(name: Any, says: str, kind: Any = pl.FileError, **options: Any) -> Case:
    return Case(lambda model, path: pl.load(model, name, **options), says, kind, linears)


def pushing(name: str, says: str, kind: Any = pl.PeftliteError, **options: Any) -> Case:
    return Case(lambda model, path: pl.push(delta(model), name, **options), says, kind)


def holding(*files: str) -> Any:
    """Loads from a repository with these files."""
    its = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def act(model: nn.Module, path: Path) -> None:
        with mock.patch("huggingface_hub.HfApi.model_info", return_value=its):
            pl.load(model, "me/two")

    return act


def without(act: Any) -> Any:
    real = builtins.__import__

    def fake(name: str, *args: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args)

    def bare(model: nn.Module, path: Path) -> None:
        with mock.patch("builtins.__import__", fake):
            act(model, path)

    return bare


NOWHERE = "there is no file 'me/sql' here, and the hub can't be asked for it (…): go on with a …"
A_PATH = "revision= is for what is on the hub, as 'org/name', and '{}' is a path"
NO_NAME = "push takes the name of a repository, as 'org/name' or 'org/name/folder': not '{}'"

CASES = [
    loading("me/sql", NOWHERE),  # the tests are offline
    loading("sql", A_PATH.format("sql"), pl.PeftliteError, revision="v2"),
    loading("a/b.safetensors", A_PATH.format("a/b.safetensors"), pl.PeftliteError, revision="v2"),
    loading("me/sql@v1", "'me/sql@v1' names another revision than revision='v2'",
            pl.PeftliteError, revision="v2"),
    Case(without(lambda model, path: pl.load(model, "me/sql")), "there is no file 'me/sql'; to "
         "have it looked for on the hub: pip install 'peftlite[hub]'", pl.FileError, linears),
    Case(holding("a.safetensors", "b.safetensors"), "'me/two' on the hub is no delta by itself, "
         "having a.safetensors; b.safetensors: name one file, me/two/a.safetensors; "
         "me/two/b.safetensors", pl.FileError, linears),
    Case(holding("adapter_model.bin"), "'me/two' on the hub is no delta by itself, having "
         "adapter_model.bin: pickles aren't fetched; type hf download me/two, then peftlite "
         "convert", pl.FileError, linears),
    pushing("sql", NO_NAME.format("sql")),
    pushing("me/sql@v2", NO_NAME.format("me/sql@v2")),
    pushing("me/sql", "can't push to 'me/sql': …; who may write there types hf auth login first",
            pl.FileError),
    Case(without(lambda model, path: pl.push(delta(model), "me/sql")),
         "push needs huggingface_hub: pip install 'peftlite[hub]'"),
]  # fmt: skip

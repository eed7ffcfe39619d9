"""A verb, followed function by function, goes back to no package more than twice.

A call is traced, and each function of the package is followed where it is first called. Left out
are methods of objects and classes, the ground floor, and words: functions that call nothing of
another module, which are read in passing. What is left is the path that a reader takes; a package
is gone back to whenever the next function on it is that package's and the one before is not.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import safetensors.torch
from torch import nn

import peftlite as pl
from tests.zoo import KINDS

PACKAGE = Path(pl.__file__).parent
GROUND = {"__init__", "public", "errors", "fields", "progress", "spelling", "table"}
GPT = next(kind for kind in KINDS if kind.name == "gpt")


def module_of(code: CodeType) -> Path | None:
    """The file of a function of the package, by its path in it; None for any other code."""
    path = Path(code.co_filename)
    if code.co_varnames[:1] in (("self",), ("cls",)) or code.co_name.startswith("<"):
        return None
    module = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else None
    return None if module is None or module.with_suffix("").parts[0] in GROUND else module


def followed(act: Callable[[], Any]) -> dict[CodeType, set[Path]]:
    """The functions that a call comes to, in order, and the modules of those that each calls."""
    called: dict[CodeType, set[Path]] = defaultdict(set)
    stack: list[CodeType] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if (module := module_of(frame.f_code)) is None:
            return
        if event == "call":
            called[frame.f_code].add(module)
            if stack:
                called[stack[-1]].add(module)
            stack.append(frame.f_code)
        elif event == "return":
            stack.pop()

    sys.setprofile(watch)
    try:
        act()
    finally:
        sys.setprofile(None)
    return called


def returns(act: Callable[[], Any], known: Collection[CodeType] = ()) -> Counter[str]:
    """How often a reader of a call goes back to each package, `known` functions left out."""
    path = [
        str(module_of(code)).partition("/")[0]
        for code, modules in followed(act).items()
        if len(modules) > 1 and code not in known
    ]
    return Counter(package for package, _ in groupby(path)) - Counter({*path})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = GPT.model()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base")
    delta = pl.attach(model, pl.LoRA(rank=2), "sql")
    pl.save(delta, tmp_path / "peftlite")
    pl.export(delta, tmp_path / "peft")
    pl.export(delta, tmp_path / "kohya", "kohya")
    return tmp_path


def attached() -> nn.Module:
    model = GPT.model()
    pl.attach(model, pl.LoRA(rank=2), "sql")
    return model


@pytest.mark.parametrize("format", ["peftlite", "peft", "kohya"])
def test_load(folder: Path, format: str) -> None:
    model = GPT.model()
    assert max(returns(lambda: pl.load(model, folder / format)).values()) <= 2


def test_merge_and_unmerge() -> None:
    model = attached()
    assert max([*returns(lambda: pl.merge(model, "sql")).values(), 0]) <= 2
    assert max([*returns(lambda: pl.unmerge(model, "sql")).values(), 0]) <= 2


def test_merge_files(folder: Path) -> None:
    """Which calls load, that a reader follows apart: both in one go would be too much."""

    def act() -> None:
        (folder / "out").unlink(missing_ok=True)
        pl.merge_files(folder / "base", folder / "peftlite", folder / "out")

    load = followed(lambda: pl.load(GPT.model(), folder / "peftlite"))
    assert max(returns(act, known=load).values()) <= 2 < max(returns(act).values())

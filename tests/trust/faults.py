"""R4: every verb, interrupted at its every step, leaves the model and the file as they were."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import peftlite as pl
from peftlite.io import fingerprint
from tests.trust.tally import Tally, difference, state
from tests.zoo import KINDS, seeded

PACKAGE = str(Path(pl.__file__).parent)
SHARED = next(kind for kind in KINDS if kind.name == "shared")
METHODS = [pl.LoRA(rank=2), pl.BitFit()]


class Fault(BaseException):
    """What no code expects."""


class Operations(TorchFunctionMode):
    """Raises at the n-th operation on tensors."""

    def __init__(self, n: int):
        super().__init__()
        self.n, self.reached = n, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch's own way back from no_grad is not a step of ours
        self.reached += func is not torch._C._set_grad_enabled
        if self.reached == self.n and func is not torch._C._set_grad_enabled:
            raise Fault(f"torch: {getattr(func, '__name__', func)}")
        return func(*args, **(kwargs or {}))


class Calls:
    """Raises at the n-th call of a function of peftlite's."""

    def __init__(self, n: int):
        self.n, self.reached = n, 0

    def __enter__(self) -> None:
        sys.setprofile(self._profile)

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def _profile(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not (code.co_filename or "").startswith(PACKAGE):
            return
        if code.co_flags & inspect.CO_GENERATOR:
            return  # it is called at every step, and to be closed
        self.reached += 1
        if self.reached == self.n:
            sys.setprofile(None)
            caller = frame.f_back.f_code.co_name
            raise Fault(f"{Path(code.co_filename).name}: {caller} calling {code.co_name}")


@dataclass(frozen=True)
class Verb:
    """A verb on a model whose delta "sql" is merged, and whose delta "chat" is chosen."""

    name: str
    act: Callable[[nn.Module, Path], Any]


VERBS = (
    Verb("attach", lambda model, path: pl.attach(model, METHODS, "new")),
    Verb("load", lambda model, path: pl.load(model, path, "new")),
    Verb("use", lambda model, path: pl.use(model, None)),
    Verb("merge", lambda model, path: pl.merge(model, "chat")),
    Verb("unmerge", lambda model, path: pl.unmerge(model, "sql")),
    Verb("detach", lambda model, path: pl.detach(model, "chat")),
    Verb("detach merged", lambda model, path: pl.detach(model, "sql")),
    Verb("save", lambda model, path: pl.save(pl.deltas(model)["sql"], path, notes={"new": 1})),
)
KINDS_OF_STEP = (Calls, Operations)


def prepared(path: Path) -> nn.Module:
    model = SHARED.model()
    with seeded(), torch.no_grad():
        for name in ("sql", "chat"):
            for parameter in pl.attach(model, METHODS, name).parameters():
                parameter.normal_()
    pl.merge(model, "sql")
    pl.save(pl.deltas(model)["chat"], path)
    return model


def r4(cases: int) -> Tally:
    """A fault at every step of every verb; of more than `cases`, at about as many."""
    tally = Tally()
    for verb in VERBS:
        for kind in KINDS_OF_STEP:
            with tempfile.TemporaryDirectory() as folder:
                _interrupt(verb, kind, cases, Path(folder) / "file", tally)
    return tally


def _interrupt(verb: Verb, kind: Any, cases: int, path: Path, tally: Tally) -> None:
    verb.act(prepared(path), path)  # what is imported at the first use of a verb, is now
    counting, model = kind(0), prepared(path)
    fingerprint._known.clear()
    with counting:
        verb.act(model, path)
    done = _files(path)
    stride = max(1, counting.reached // cases)
    model = prepared(path)
    for n in range(1, counting.reached + 1, stride):
        fingerprint._known.clear()  # what is known already takes fewer steps
        before, files = state(model), _files(path)
        before["generator"] = None  # starting values are drawn before anything is changed
        try:
            with kind(n):
                verb.act(model, path)
            tally.check(False, f"{verb.name}: step {n} wasn't reached")
        except Fault as fault:
            changed = difference(before, {**state(model), "generator": None})
            if _files(path) not in (files, done):  # a file is the old one or the new
                changed += " its folder"
            tally.check(not changed, f"{verb.name}, {fault}: it changed {changed}")
            if not changed:
                continue
        model = prepared(path)


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}

"""Trial: one case made by peft, then read, written and merged here, each outcome in a word."""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import peftlite as pl
from matrix.cases import Case
from tests.zoo import seeded

TOLERANCE = 1e-5
WAYS = ("read", "write", "merge")
GOOD = ("equal", "refused")


@dataclass
class Outcome:
    """What came of a case, for each way: a word, and why.

    Words: equal, refused (by peftlite, with a reason), unequal, warned, crashed.
    `void` is why peft itself has no such adapter.
    """

    case: Case
    void: str = ""
    words: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return any(word not in GOOD for word in self.words.values())


def attempt(case: Case) -> Outcome:
    """Makes a case in peft, and tries it here."""
    outcome = Outcome(case)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = _theirs(case, Path(folder) / "peft")
        except Exception as error:  # whatever peft says of what it doesn't have
            outcome.void = _reason(error)
            return outcome
        with seeded(2):
            _ours(case, theirs, Path(folder), outcome)
    return outcome


@dataclass
class Theirs:
    """What peft gives: running, loaded again from its own file, and merged; None where it fails."""

    live: Tensor
    again: Tensor | None
    merged: Tensor | None


@torch.no_grad()
def _disturb(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        # peft doesn't save what ranks AdaLoRA's triplets
        if parameter.requires_grad and "ranknum" not in name:
            parameter.add_(0.2 * torch.randn_like(parameter))


def _theirs(case: Case, folder: Path) -> Theirs:
    with seeded(3):
        model = peft.get_peft_model(
            case.fresh(), case.config(), autocast_adapter_dtype=False
        ).eval()
        _disturb(model)
        live = case.run(model)
        if not live.isfinite().all():
            raise ArithmeticError("its outputs aren't finite")
        model.save_pretrained(folder)
        again = _or_none(lambda: _again(case, folder))
        merged = _or_none(lambda: case.run(model.merge_and_unload().eval()))
    return Theirs(live, again, merged)


def _again(case: Case, folder: Path) -> Tensor:
    """What peft gives with an adapter from a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        its = peft.PeftModel.from_pretrained(case.fresh(), folder, autocast_adapter_dtype=False)
        return case.run(its.eval())


def _or_none(call: Callable[[], Tensor]) -> Tensor | None:
    with contextlib.suppress(Exception):
        return call()
    return None


def _ours(case: Case, theirs: Theirs, folder: Path, outcome: Outcome) -> None:
    if theirs.again is None or not _same(theirs.again, theirs.live):
        outcome.notes.append("peft's own file gives other outputs")
    if theirs.merged is not None and not _same(theirs.merged, theirs.live):
        outcome.notes.append("peft's merged outputs are others")
    model = case.fresh()
    expected = theirs.live, theirs.again
    delta = None
    with _noting(outcome, "read"):
        delta = pl.load(model, folder / "peft")
        _compare(outcome, "read", case.run(model), *expected)
    if delta is None:
        return
    with _noting(outcome, "write"):
        task = case.model.task
        pl.export(delta, folder / "ours", settings={"task_type": task} if task else None)
        given = _or_crash(lambda: _again(case, folder / "ours"))
        _compare(outcome, "write", given, *expected)
        if outcome.words["write"] == "equal":
            back = case.fresh()
            pl.load(back, folder / "ours")
            _compare(outcome, "write", case.run(back), *expected)
    with _noting(outcome, "merge"):
        pl.merge(model, delta)
        merged = [theirs.merged] if theirs.merged is not None else expected
        _compare(outcome, "merge", case.run(model), *merged)
    if theirs.merged is None and outcome.words["merge"] == "refused":  # by both
        del outcome.words["merge"]


def _or_crash(call: Callable[[], Tensor]) -> Tensor:
    """What peft makes of what is written here."""
    try:
        return call()
    except Exception as error:
        raise RuntimeError(f"peft fails: {_reason(error)}") from error


@contextlib.contextmanager
def _noting(outcome: Outcome, way: str) -> Iterator[None]:
    """Says how a way ended: refused, crashed, warned, or what is found in its body."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except pl.PeftliteError as error:
            outcome.words[way], outcome.why[way] = "refused", _reason(error)
        except Exception as error:
            outcome.words[way], outcome.why[way] = "crashed", _reason(error)
    if caught and outcome.words.get(way) == "equal":
        outcome.words[way], outcome.why[way] = "warned", _reason(caught[0].message)


def _compare(outcome: Outcome, way: str, mine: Tensor, *theirs: Tensor | None) -> None:
    given = [one for one in theirs if one is not None]
    equal = any(_same(mine, one) for one in given)
    outcome.words[way] = "equal" if equal else "unequal"
    if not equal:
        outcome.why[way] = f"off by {_apart(mine, given[0]):.2g}"


def _same(a: Tensor, b: Tensor) -> bool:
    return _apart(a, b) <= TOLERANCE


def _apart(a: Tensor, b: Tensor) -> float:
    """How far two outputs are from one another, over the size of the second."""
    if a.shape != b.shape and a.dim() == 3:  # peft gives those of a prompt, too
        n = min(a.shape[1], b.shape[1])
        a, b = a[:, -n:], b[:, -n:]
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max())


def _reason(error: object) -> str:
    """An error's first words, without the names of files."""
    text = re.sub(r"'/[^']*/(peft|ours)\b", r"'\1", str(error))
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {text}")[:300]

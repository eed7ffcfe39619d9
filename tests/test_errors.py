"""Errors: every message of the library, read by a stranger who must act on it; no trace is left.

A new `raise` joins with one row in errors/: what the stranger does, and the whole message (… stands
for what differs from machine to machine). The last law finds the raises that nobody has read.
"""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import peftlite as pl
from peftlite.core.host import Host
from tests import errors
from tests.digest import assert_same, digest
from tests.errors.case import Case, bare, delta, two
from tests.errors.load import good

PACKAGE = Path(pl.__file__).parent

CASES: list[Case] = [
    case
    for area in pkgutil.iter_modules(errors.__path__)
    if area.name != "case"
    for case in importlib.import_module(f"tests.errors.{area.name}").CASES
]


# -- the laws


def trace(model: nn.Module, folder: Path) -> dict[str, Any]:
    """All that an error may not disturb."""
    files = {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    return {
        **snapshot(model),
        "choice": [hosted.choice.__dict__.copy() for hosted in hosts(model)],
        "deltas": [list(hosted.registry.deltas) for hosted in hosts(model) if hosted.registry],
        "files": files,
    }


def hosts(model: nn.Module) -> Iterator[Any]:
    return (m.peftlite for m in model.modules() if isinstance(m, Host))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """The digest, or what there is of it in a model whose tensors can't be looked at."""
    try:
        return digest(model)
    except (KeyError, ValueError):
        return {path: (type(m), sorted(m.__dict__)) for path, m in model.named_modules()}


def provoke(case: Case, folder: Path) -> Exception:
    """What the case raises, once it has left no trace."""
    model, path = (case.model or two)(), folder / "sql.safetensors"
    if case.file is not None:
        case.file(path)
    before = trace(model, folder)
    try:
        case.act(model, path)
    except pl.PeftliteError as error:
        assert trace(model, folder) == before
        return error
    raise AssertionError("nothing was raised")


def matches(pattern: str, message: str) -> bool:
    """Whether a message is what was written down, … standing for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), message) is not None


def name(case: Case) -> str:
    return re.sub(r"\W+", "_", case.says)[:60]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_says_what_to_do_and_leaves_no_trace(case: Case, tmp_path: Path) -> None:
    error = provoke(case, tmp_path)
    assert matches(case.says, str(error)), str(error)
    assert type(error) is case.kind


def test_the_page_of_errors_shows_messages_as_they_are() -> None:
    page = (PACKAGE.parent / "docs" / "errors.md").read_text()
    shown = re.findall(r"^```text\n(.*?)\n```$", page, re.M | re.S)
    lost = {" ".join(text.split()) for text in shown} - {case.says for case in CASES}
    assert shown and not lost, lost


def raise_statements() -> Iterator[tuple[str, int, int]]:
    """Every `raise` of an error in the package: its file, first and last line."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                # that, and a name a module lacks, are Python's own protocols; a report reads why a
                # native kernel is Unavailable, and a bank goes another way where tokens are Lost
                own = "NotImplementedError", "AttributeError", "Unavailable", "Lost"
                if not ast.unparse(node.exc).startswith(own):
                    yield str(path), node.lineno, node.end_lineno or 0


def raised_at(error: BaseException | None) -> Iterator[tuple[str, int]]:
    """Where an error was raised, and whatever it came from."""
    while error is not None:
        *_, last = iterate(error.__traceback__)
        yield last.tb_frame.f_code.co_filename, last.tb_lineno
        error = error.__cause__


def iterate(traceback: Any) -> Iterator[Any]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def test_every_error_is_read_here(tmp_path: Path) -> None:
    seen = set()
    for i, case in enumerate(CASES):
        folder = tmp_path / str(i)
        folder.mkdir()
        seen.update(raised_at(provoke(case, folder)))
    unread = [
        f"{Path(file).relative_to(PACKAGE)}:{first}"
        for file, first, last in raise_statements()
        if not any((file, line) in seen for line in range(first, last + 1))
    ]
    assert not unread, unread


# -- what is let through


def test_the_numbers_of_a_sweep_are_numbers(tmp_path: Path) -> None:
    for rank, alpha, dropout in (
        (np.int64(2), np.float32(4), np.float64(0.5)),
        (torch.tensor(2), torch.tensor(4.0), torch.tensor(0.5)),
    ):
        method = pl.LoRA(rank=rank, alpha=alpha, dropout=dropout)
        assert method == pl.LoRA(rank=2, alpha=4.0, dropout=0.5)
        pl.save(pl.attach(bare(), method), tmp_path / "sweep.safetensors")
        ((read, _),) = pl.inspect(tmp_path / "sweep.safetensors").methods
        assert read == method


def test_another_base_can_be_let_through(tmp_path: Path) -> None:
    path = tmp_path / "sql.safetensors"
    path.write_bytes(good())
    model = bare().bfloat16()
    with pytest.warns(UserWarning, match="made for other base weights: 4 of 4 tensors differ"):
        pl.load(model, path, name="warned", check_base="warn")
    pl.load(model, path, name="off", check_base="off")
    assert list(pl.deltas(model)) == ["warned", "off"]


def test_a_scripted_part_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    assert pl.plan(model, pl.LoRA(targets="*")).addresses == ["0.weight"]


class Slotted(nn.Linear):
    __slots__ = ("extra",)


def test_a_class_with_slots_is_patched_like_any_other() -> None:
    model = nn.Sequential(Slotted(4, 4))
    model[0].extra = 3
    before = digest(model)
    pl.attach(model, pl.LoRA(rank=2))
    assert model[0].extra == 3 and isinstance(model[0], Slotted)
    pl.detach(model, "default")
    assert_same(before, digest(model))


def test_a_link_is_written_through(tmp_path: Path) -> None:
    model = two()
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    pl.save(delta(model), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "run"]

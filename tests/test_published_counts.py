"""The papers' own counts of parameters: every row of docs/counts.md, computed."""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn

import peftlite as pl

# DeBERTa's own code
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

PAGE = Path(__file__).parents[1] / "docs" / "counts.md"
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "%": 1.0}


class Row(NamedTuple):
    """A setting of a paper, cell by cell as the page has it."""

    paper: str
    prints: str
    model: str
    method: str
    trains: str
    difference: str


class Shape(NamedTuple):
    """A model that rows are about."""

    model: str
    made_by: str
    parameters: str


class Transformers(dict[str, Any]):
    """The names that the making of a model uses."""

    def __missing__(self, name: str) -> Any:
        return getattr(transformers, name)


def read(kind: type[Any]) -> list[Any]:
    """The rows of the tables that have a column for every field of `kind`."""
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| .*`", line)]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [kind(*row) for row in rows if len(row) == len(kind._fields)]


def code(cell: str) -> str:
    """What stands in a cell's last backticks."""
    return re.findall("`([^`]+)`", cell)[-1]


ROWS: list[Row] = read(Row)
SHAPES: dict[str, Shape] = {code(shape.model): shape for shape in read(Shape)}


@functools.cache
def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return eval(code(SHAPES[name].made_by), {}, Transformers(nn=nn))


def agrees(value: float, printed: str) -> bool:
    """Whether a figure, rounded to the digits that are printed, is what is printed."""
    number, unit = re.fullmatch(r"([\d.,]+) ?([KM%]?)", printed).groups()
    return f"{value / UNITS[unit]:,.{len(number.partition('.')[2])}f}" == number


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.paper}: {code(row.method)}")
def test_a_count(row: Row) -> None:
    plan = pl.plan(model(code(row.model)), eval(code(row.method), dict(vars(pl))))
    n, base = plan.num_parameters, plan.base_parameters
    assert f"{n:,}" == row.trains
    ours = 100 * n / base if row.prints.endswith("%") else n
    # a difference is explained where there is one, and nowhere else
    assert agrees(ours, row.prints) is not bool(row.difference)
    if row.difference:
        assert agrees(eval(code(row.difference), {"n": n, "base": base}), row.prints)


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_is_of_its_real_size(name: str) -> None:
    assert f"{sum(p.numel() for p in model(name).parameters()):,}" == SHAPES[name].parameters
    assert name in {code(row.model) for row in ROWS}


def test_no_row_is_overlooked() -> None:
    tables = [line for line in PAGE.read_text().splitlines() if re.match(r"\| .*\d", line)]
    assert len(tables) == len(ROWS) + len(SHAPES)
    assert len(ROWS) > 100


@pytest.mark.parametrize(
    ("value", "printed"),
    [(393_216, "0.35M"), (2_359_296, "4.7M"), (540_672, "540K"), (0.8455, "0.84 %"), (961, "960")],
)
def test_a_figure_that_is_off_is_seen(value: float, printed: str) -> None:
    assert not agrees(value, printed)

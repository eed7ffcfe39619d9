"""Cards: every method has one, with an answer to every question, and every answer is true."""

import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import peftlite as pl
from peftlite import methods
from peftlite.bank.families.registry import family_of
from peftlite.core.assign import Placed
from tests import golden
from tests.cards import CARDS, ROWS, WAY, WAYS
from tests.cards.card import FIXED, Card, Row
from tests.cells import CELLS
from tests.zoo import KINDS, Kind

each_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)


def reason(answer: str, start: str) -> str:
    """What an answer gives as its reason, if it starts so."""
    return answer.removeprefix(start).strip() if answer.startswith(start) else ""


def test_every_method_has_a_card() -> None:
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")
    ours = [m for m in pl.Method.known.values() if m.__module__.startswith(methods.__name__)]
    assert sorted(m.__name__ for m in ours) == sorted(card.name for card in CARDS)


@each_card
def test_no_answer_is_missing(card: Card) -> None:
    assert card.rows and all(isinstance(row.method, card.method) for row in card.rows)
    assert isinstance(card.golden, card.method)
    assert card.bank and card.peft and card.rate


def test_names_of_rows_are_unique_and_their_ways_known() -> None:
    assert len(ROWS) == len(WAY)
    assert {*WAY.values()} == {*WAYS}
    assert all(WAY[row] == way for way, row in WAYS.items())


def calls_of_maps(placed: Sequence[Placed]) -> bool:
    return any(p.patch.has_value and p.patch.has_call for p in placed)


def calls(placed: Sequence[Placed]) -> bool:
    return any(p.site.is_call for p in placed)


def shares(placed: Sequence[Placed]) -> bool:
    held = Counter(id(x) for p in placed for x in (*p.patch.parameters(), *p.patch.buffers()))
    return max(held.values()) > 1


SIGNS: dict[str, Callable[[Sequence[Placed]], bool]] = {
    "value": lambda placed: not any(p.patch.has_call for p in placed),
    "map": calls_of_maps,
    "inputs": calls_of_maps,
    "entries": lambda placed: all(hasattr(p.patch, "indices") for p in placed),
    "shared": shares,
    "parts": lambda placed: any("[" in p.site.address for p in placed),
    "module": calls,
    "states": calls,
    "tokens": calls,
}
"""By what a way is known in a delta."""


ONE_CELL_EACH = {cell.values[0].name: cell for cell in CELLS if not cell.marks}


@pytest.mark.parametrize(("row", "kind"), ONE_CELL_EACH.values())
def test_a_row_goes_the_way_it_says(row: Row, kind: Kind) -> None:
    assert SIGNS[WAY[row.name]]([*pl.attach(kind.model(), row.method).placed.values()])


@each_card
def test_the_golden_delta_is_its_own(card: Card) -> None:
    path = golden.HERE / pl.__version__ / f"{card.name}.safetensors"
    assert path.exists(), "python -m tests.made"
    ((method, _),) = pl.inspect(path).methods
    assert method == replace(card.golden, targets=None)  # a file has the sites themselves


def families(card: Card) -> set[str]:
    """The files of the families that mix its deltas, at any site that its rows take on any kind."""
    made = [pl.attach(golden.model(), card.golden)]
    made += [pl.attach(kind.model(), row.method) for row, kind in cells_of(card)]
    found = {family(placed) for delta in made for placed in delta.placed.values()}
    return found if found == {"none"} else found - {"none"}


def cells_of(card: Card) -> Iterator[tuple[Row, Kind]]:
    plain = (cell.values for cell in CELLS if not cell.marks)
    return ((row, kind) for row, kind in plain if row in card.rows)


def family(placed: Placed) -> str:
    try:
        return family_of(placed.patch, placed.site).__module__.rpartition(".")[2]
    except pl.PeftliteError:
        return "none"


@each_card
def test_a_bank_mixes_it_as_it_says(card: Card) -> None:
    if reason(card.bank, "none: "):
        assert families(card) == {"none"}
    else:
        assert families(card) == set(card.bank.split())


@each_card
@pytest.mark.filterwarnings("ignore:.*peft has a sequence's positions begin")
def test_peft_has_it_under_its_name(card: Card, tmp_path: Path) -> None:
    gpt2 = next(kind for kind in KINDS if kind.name == "hf_gpt2")
    model = gpt2.model if card.as_peft else golden.model
    delta = pl.attach(model(), card.as_peft or card.golden)
    folder = tmp_path / "adapter"
    if reason(card.peft, "none: "):
        with pytest.raises(pl.PeftliteError, match=f"peft has no {card.name} there"):
            pl.export(delta, folder)
        return
    pl.export(delta, folder, settings={"task_type": "CAUSAL_LM"})
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == card.peft
    again = pl.load(model(), folder)
    assert again.num_parameters > 0


@each_card
def test_the_rate_is_the_trainers(card: Card) -> None:
    assert card.method.rate_by_width is (card.rate != FIXED)
    if isinstance(card.rate, str) and card.rate != FIXED:
        assert reason(card.rate, "as LoRA's: ") and card.method.rate == 1
    elif card.rate != FIXED:
        assert card.rate == card.method.rate

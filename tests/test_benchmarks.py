"""The benchmarks: every script imports, and the comparison of quality runs, resumes and reports."""

import copy
import csv
import importlib
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import quality
import torch
from comparison import results
from comparison.digits import Digits
from comparison.few import first_of_each
from comparison.methods import ALL, FROZEN, LOW, METHODS, Row
from comparison.reviews import Texts, by_length
from comparison.run import Outcome, Trainer
from comparison.sweep import MOST, SEEDS, TRIES, Record, seek, sweep
from comparison.task import Judgement

import peftlite as pl

ABOUT = {"commit": "a commit", "cpu": "a processor"}
FOLDER = Path(quality.__file__).parent
LORA = Row("LoRA", LOW, lambda task: pl.LoRA(rank=2))
LOST = Row("lost", LOW, lambda task: pl.LoRA(targets="nowhere"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("cache"), quick=True)


def _lines(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.mark.parametrize("script", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_a_script_imports(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    assert importlib.import_module(script).__doc__


@pytest.mark.heavy
def test_quick_shows_a_row_for_every_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["frozen base", "LoRA r8"]
    where = ["--cache", str(tmp_path), "--results", str(tmp_path)]
    quality.main(["--quick", "--tasks", "T3", "--methods", *names, *where])
    out = capsys.readouterr().out
    assert all(f"T3 digits  {name}" in out for name in names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_a_row_can_be_made(row: Row, digits: Digits) -> None:
    assert all(isinstance(method, pl.Method) for method in row.methods(digits))


def test_names_are_distinct() -> None:
    assert len({row.name for row in METHODS}) == len(METHODS)


@pytest.mark.heavy
def test_a_sweep_resumes(digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "runs.csv"
    for row in (LORA, LOST):
        sweep(digits, row, Record(file, ABOUT))
    found = _lines(file)
    untested = [line for line in found if line["quality"] == "nan"]
    assert len(found) == len(untested) + len(SEEDS)
    assert TRIES + 1 <= len(untested) <= MOST + 1  # a rate is sought without the test split
    assert "'nowhere' matches nothing" in found[-1]["error"]

    monkeypatch.setattr("comparison.sweep.run", None)
    before = file.read_text()
    sweep(digits, LORA, Record(file, ABOUT | {"commit": "another"}))
    assert file.read_text() == before


@pytest.mark.heavy
def test_results_have_means_and_reasons(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = METHODS[0]
    monkeypatch.setattr(results, "METHODS", [frozen, LORA, LOST])
    record = Record(None, ABOUT)
    for row in (frozen, LORA, LOST):
        sweep(digits, row, record)
    results.write(tmp_path / "quality.csv", results.summary(record, [Digits]), {})
    base, lora, lost = _lines(tmp_path / "quality.csv")
    assert (base["parameters"], base["seeds"], base["forgetting"]) == ("0", "1", "0")
    assert lora["seeds"] == str(len(SEEDS)) and float(lora["quality_sd"]) >= 0
    assert int(lora["parameters"]) == 2 * 2 * (4 * 128 + 2 * 320) + (4 + 64) * 2 + 650
    assert lost["quality"] == "" and "nowhere" in lost["error"]


def test_results_say_how_far_it_is_from_frozen_to_full() -> None:
    record = Record(None, ABOUT)
    for name, qualities in {FROZEN: [0.2], ALL: [0.8, 0.6], "LoRA r8": [0.5, 0.5]}.items():
        for seed, value in enumerate(qualities, start=1):
            outcome = asdict(Outcome(quality=value))
            of = {"task": Digits.name, "base": "", "method": name, "key": ""}
            record.add(**of, rate=0.1, seed=seed, **outcome)
    found = {row["method"]: row for row in results.summary(record, [Digits])}
    assert found[ALL]["gap_closed"] == 1 and "gap_closed" not in found[FROZEN]
    closed = found["LoRA r8"]
    assert closed["gap_closed"] == pytest.approx(0.625)  # of 0.5 and 0.75
    assert closed["gap_high"] == pytest.approx(0.625 + 12.706 * 0.125, rel=1e-4)
    assert (closed["beside_full"], closed["beside_lora"]) == ("open", "even")
    assert (found[ALL]["beside_full"], found[ALL]["beside_lora"]) == ("even", "open")


def test_seeds_count_at_the_rate_that_was_chosen() -> None:
    record = Record(None, ABOUT)
    lora = {"task": Digits.name, "base": "", "method": "LoRA r8", "key": ""}
    for rate, seed, loss in ((0.1, 0, 2.0), (0.1, 1, 2.0), (0.4, 0, 1.0), (0.4, 1, 1.0)):
        outcome = asdict(Outcome(validation=loss, quality=loss))
        record.add(**lora, rate=rate, seed=seed, **outcome)
    (row,) = results.summary(record, [Digits])
    assert (row["rate"], row["quality"], row["seeds"]) == (0.4, 1.0, 1)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.05, 0.06, 0.07), "even"),
        ((0.2, 0.21, 0.22), "ahead"),
        ((-0.2, -0.21, -0.22), "behind"),
        ((-0.2, 0.0, 0.2), "open"),
        ((0.3,), "open"),
    ],
)
def test_a_verdict_is_what_an_interval_allows(differences: list[float], verdict: str) -> None:
    assert results._verdict(differences, at_edge=False) == verdict
    assert results._verdict(differences, at_edge=True) == verdict.replace("behind", "open")


def test_a_picture_has_a_panel_for_each_task(tmp_path: Path) -> None:
    cells = {"method": "LoRA r8", "kind": LOW, "gap_closed": 0.8, "gap_low": 0.7, "gap_high": 0.9}
    results.plot(tmp_path, [{**cells, "task": Digits.name, "rate_at_edge": ""}], [Digits])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["which-dark.png", "which-light.png"]


@pytest.mark.parametrize(
    ("best", "found", "tries"),
    [(0, 0, 4), (1, 1, 4), (2, 2, 4), (-4, -4, 5), (9, 8, 6), (50, 14, MOST)],
)
def test_seek_tries_as_many_rates_for_all_but_beyond_an_end(
    best: int, found: int, tries: int
) -> None:
    tried = []

    def loss(rate: float) -> float:
        tried.append(rate)
        return (math.log2(rate) - best) ** 2

    assert seek(loss, 1.0) == 2.0**found
    assert len(tried) == tries == len(set(tried))


def test_seek_passes_over_rates_that_diverge() -> None:
    assert seek(lambda rate: math.nan if rate >= 1 else -rate, 1.0) == 0.25


def test_few_reviews_are_so_many_of_each_class() -> None:
    of = torch.tensor([0, 1, 1, 1, 0, 0, 1])
    order = torch.tensor([6, 5, 4, 3, 2, 1, 0])
    assert first_of_each(of, 2, order).tolist() == [5, 4, 6, 3]
    assert len(first_of_each(of, 4, order)) == 3 + 4


def test_training_ends_when_validation_gets_no_better(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "steps", 50)
    monkeypatch.setattr(Digits, "look", 3)
    losses, states = iter([3.0, 1.0, 2.0, 1.5]), []
    model = copy.deepcopy(digits.base)
    delta = pl.attach(model, pl.LoRA(rank=2))
    trainer = Trainer(digits, model, delta, 1.0, 1e-2, seed=0)

    def judge(*_: object) -> Judgement:
        states.append(trainer._state())
        return Judgement(next(losses), 0.0)

    monkeypatch.setattr(digits, "judge", judge)
    assert len(trainer.train_until_no_better()) == 4 * 3
    assert all(torch.equal(x, states[1][name]) for name, x in delta.state_dict().items())
    assert any(not torch.equal(x, states[3][name]) for name, x in delta.state_dict().items())


def test_texts_of_like_length_go_together_and_keep_their_order() -> None:
    lengths = torch.randint(1, 7, (130,))
    mask = (torch.arange(6) < lengths[:, None]).long()
    texts = Texts(mask * torch.arange(130)[:, None], mask, lengths)
    widths = []

    def first(part: Texts) -> torch.Tensor:
        widths.append(part.tokens.shape[1])
        return part.tokens[:, :1]

    assert torch.equal(by_length(first, texts), texts.tokens[:, :1])
    assert widths == sorted(widths) and len(widths) == 3

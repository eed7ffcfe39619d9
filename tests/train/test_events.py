"""Events: what is told of, and to whom."""

import csv
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

import peftlite as pl
from peftlite.train import TensorBoard, WandB, losses
from peftlite.train.data import collate
from peftlite.train.history import FIELDS
from tests.train.tiny import gpt, texts, trainer


def test_every_step_is_a_line(tmp_path: Path) -> None:
    history = trainer(folder=tmp_path, valid_every=2, epochs=2).fit()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert lines == history.events and [line["step"] for line in lines] == list(range(7))
    assert all(list(line)[: len(FIELDS)] == list(FIELDS) for line in lines)
    told = {name: [e["step"] for e in lines if e[name] is not None] for name in FIELDS}
    ends, steps = [0, 3, 6], [1, 2, 3, 4, 5, 6]
    assert told == {
        "step": [0, *steps], "total_steps": [0, *steps], "epoch": [0, *steps],
        "memory": [0, *steps],
        "train_loss": steps, "train_mean_token_accuracy": steps, "lr": steps, "grad_norm": steps,
        "tokens_per_second": steps, "valid_loss": [2, 4, 6], "valid_mean_token_accuracy": [2, 4, 6],
        "full_valid_loss": ends, "full_valid_mean_token_accuracy": ends,
        "full_valid_perplexity": ends,
    }  # fmt: skip


def test_the_figures_are_what_they_say() -> None:
    model = gpt(pl.LoRA(rank=2))
    history = trainer(model, epochs=1, batch_size=12, lr=1e-3).fit()
    first, last = history.events
    found = losses.causal_lm(gpt(pl.LoRA(rank=2)), collate(texts()))
    assert last["train_loss"] == pytest.approx(found["loss"].item())
    assert last["train_mean_token_accuracy"] == pytest.approx(
        found["correct"].item() / found["count"].item()
    )
    held = losses.causal_lm(model.eval(), collate(texts(4, seed=1)))
    assert last["full_valid_loss"] == pytest.approx(held["loss"].item(), rel=1e-5)
    assert last["full_valid_perplexity"] == pytest.approx(math.exp(last["full_valid_loss"]))
    assert first["memory"] > 2**20


def test_a_loss_may_say_more() -> None:
    def loss(model: nn.Module, batch: Any) -> dict[str, Any]:
        found = losses.causal_lm(model, batch)
        return {
            "loss": found["loss"],
            "length": batch["input_ids"].shape[1],
            "double": 2 * found["loss"],
        }

    history = trainer(loss=loss, accumulate=4).fit()
    assert history.events[0]["full_valid_length"] >= 4
    for event in history.events[1:]:
        assert event["train_double"] == pytest.approx(2 * event["train_loss"])


def test_a_plain_number_is_a_loss() -> None:
    history = trainer(loss=lambda m, b: losses.causal_lm(m, b)["loss"]).fit()
    assert history.events[-1]["train_loss"] > 0
    assert history.events[-1]["train_mean_token_accuracy"] is None


def test_whoever_wants_to_know() -> None:
    told: list[Any] = []

    class Told:
        def start(self, trainer: Any, history: Any) -> None:
            told.append((trainer.total_steps, len(history.events)))

        def event(self, event: Any) -> None:
            told.append(event["step"])

        def end(self, history: Any) -> None:
            told.append(history.stopped)

    trainer(callbacks=[Told()]).fit()
    assert told == [(9, 0), *range(10), "done"]
    del told[:]
    with pytest.raises(ZeroDivisionError):
        trainer(callbacks=[Told()], probes={"no": lambda model: 1 / 0}).fit()
    assert told == [(9, 0), ""]


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: list[tuple[str, float, int]] = []
    closed: list[bool] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, *given: Any) -> None:
            scalars.append(given)

        def close(self) -> None:
            closed.append(True)

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore
    monkeypatch.setitem(sys.modules, module.__name__, module)
    history = trainer(callbacks=[TensorBoard(tmp_path)]).fit()
    assert ("train_loss", history.events[3]["train_loss"], 3) in scalars
    assert closed and not any(name == "step" for name, _, _ in scalars)


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[int, dict[str, float]] = {}
    finished: list[bool] = []

    def init(project: str, config: dict[str, Any]) -> Any:
        assert project == "mine" and config["epochs"] == 3
        return SimpleNamespace(
            log=lambda scalars, step: logged.update({step: scalars}),
            finish=lambda: finished.append(True),
        )

    module = ModuleType("wandb")
    module.init = init  # type: ignore
    monkeypatch.setitem(sys.modules, "wandb", module)
    history = trainer(callbacks=[WandB(project="mine")]).fit()
    assert len(logged) == 10 and finished
    assert logged[9]["full_valid_loss"] == history.events[9]["full_valid_loss"]


def test_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(progress=True).fit()
    shown = capsys.readouterr()
    assert "9/9" in shown.err and "loss=" in shown.err and "batch_size" in shown.out


# -- the history


def test_a_table_has_a_row_for_every_epoch() -> None:
    history = trainer(probes={"old": lambda _: 0.5}).fit()
    lines = str(history).splitlines()
    assert len(lines) == 2 + 4 and "valid mean token accuracy" in lines[0]
    assert [row["step"] for row in history.epochs] == [0, 3, 6, 9]
    mean = sum(event["train_loss"] for event in history.events[1:4]) / 3
    assert history.epochs[1]["train_loss"] == pytest.approx(mean)


def test_csv(tmp_path: Path) -> None:
    history = trainer(probes={"old": lambda _: 0.5}).fit()
    history.to_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and float(rows[9]["train_loss"]) == history.events[9]["train_loss"]
    assert rows[1]["full_valid_loss"] == "" and rows[9]["old forgotten"] == "0.0"


@pytest.mark.heavy
def test_a_plot(tmp_path: Path) -> None:
    history = trainer(probes={"old": lambda _: 0.5}, valid_every=1).fit()
    figure = history.plot(tmp_path / "history.png")
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss", "accuracy", "score"]
    assert (tmp_path / "history.png").stat().st_size > 1000

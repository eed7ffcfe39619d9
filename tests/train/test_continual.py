"""Forgetting: its definitions, and three tasks on real images, with a delta each and with one."""

from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import peftlite as pl
from peftlite.train import losses
from peftlite.train.continual import forgetting

Part = tuple[Tensor, Tensor]


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=3, max_size=3))
def test_is_the_papers_definition(a: list[list[float]]) -> None:
    """a[k][j] is the score on task j once task k was learned; k = 2 is now."""
    before = {str(j): [a[k][j] for k in range(j, 2)] for j in range(2)}
    found = forgetting(before, {str(j): a[2][j] for j in range(3)})
    each = [max(a[k][j] for k in range(j, 2)) - a[2][j] for j in range(2)]
    assert found.tasks == pytest.approx({"0": each[0], "1": each[1]})
    assert found.mean == pytest.approx(sum(each) / 2)
    assert found.backward_transfer == pytest.approx(sum(a[2][i] - a[i][i] for i in range(2)) / 2)


def test_prints_a_table() -> None:
    found = forgetting({"sql": 0.9, "chat": [0.8, 0.85]}, {"sql": 0.6, "chat": 0.85})
    assert str(found).splitlines() == [
        "task  just learned  best   now  forgotten",
        "----  ------------  ----  ----  ---------",
        "sql            0.9   0.9   0.6        0.3",
        "chat           0.8  0.85  0.85          0",
        "0.15 on average; backward transfer -0.125",
    ]


# -- a base that reads digits, and three tasks that it doesn't know: pixels in other orders


@cache
def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    return torch.tensor(bunch.data / 16).float(), torch.tensor(bunch.target)


def task(number: int) -> tuple[Part, Part]:
    """Training and test images, their pixels in an order of the task's own; 0 is as they are."""
    x, y = digits()
    if number:
        x = x[:, torch.randperm(64, generator=torch.Generator().manual_seed(number))]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def fit(model: nn.Module, number: int, lr: float) -> None:
    train, _ = task(number)
    pl.Trainer(
        model, losses.classification, TensorDataset(*train), epochs=10, batch_size=60, lr=lr,
        progress=False,
    ).fit()  # fmt: skip


def score(model: nn.Module, number: int) -> float:
    _, (x, y) = task(number)
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item()


def reader() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(),
                          nn.Linear(96, 10))  # fmt: skip
    pl.attach(model, pl.FullTuning(targets="*"), "pretraining")
    fit(model, 0, 3e-3)
    pl.merge(model, "pretraining")
    assert score(model, 0) > 0.9
    return model


LORA = pl.LoRA(rank=8, targets="*")


@pytest.mark.heavy
def test_three_tasks_with_a_delta_each_forget_nothing() -> None:
    model = reader()
    learned = {"0": score(model, 0)}
    for number in (1, 2, 3):
        pl.attach(model, LORA, f"task{number}")
        fit(model, number, 5e-3)
        learned[str(number)] = score(model, number)
    assert min(learned.values()) > 0.7
    now = {}
    for name in learned:
        with pl.using(model, None if name == "0" else f"task{name}"):
            now[name] = score(model, int(name))
    found = forgetting(learned, now)
    assert now == learned
    assert set(found.tasks.values()) == {0.0} and found.mean == found.backward_transfer == 0


@pytest.mark.heavy
def test_three_tasks_on_one_delta_forget() -> None:
    model = reader()
    pl.attach(model, LORA, "all")
    scores: dict[str, list[float]] = {}
    for number in (1, 2, 3):
        fit(model, number, 5e-3)
        for seen in range(1, number + 1):
            scores.setdefault(str(seen), []).append(score(model, seen))
    before = {name: history[:-1] for name, history in scores.items() if history[:-1]}
    found = forgetting(before, {name: history[-1] for name, history in scores.items()})
    assert [*found.tasks] == ["1", "2"]
    assert found.mean > 0.2 and found.backward_transfer < -0.2


def test_averaging_deltas_is_averaging_what_they_do() -> None:
    """Federated averaging: clients train copies of a delta, by the size of their data."""
    model = reader()
    sizes = {"a": 900, "b": 300}
    (x, y), _ = task(1)
    parts = {"a": (x[:900], y[:900]), "b": (x[900:], y[900:])}
    fit_on = partial(pl.Trainer, model, losses.classification, epochs=2, batch_size=60, lr=5e-3,
                     progress=False)  # fmt: skip
    for client, part in parts.items():
        pl.attach(model, LORA, client)
        fit_on(TensorDataset(*part)).fit()
    weights = {}
    for client in sizes:
        with pl.using(model, client):
            weights[client] = model[0].weight.detach().clone()
    pl.combine(model, sizes, "linear", "server")
    assert torch.allclose(
        model[0].weight, (900 * weights["a"] + 300 * weights["b"]) / 1200, atol=1e-6
    )

"""Streams, workers and data sets of `datasets`: the same bits as a list, and after any break."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

import peftlite as pl
from peftlite.train.given import digest
from peftlite.train.loader import Loader
from peftlite.train.state import seeded
from tests.train.test_checkpoints import Kill, Killed, content
from tests.train.test_trainer import CPU, same
from tests.train.tiny import gpt, texts, timeless, trainer, values

# python says so of every fork of a process with threads, such as torch's
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


class Texts(IterableDataset[Any]):
    """A stream of the examples that `texts` has."""

    def __iter__(self) -> Iterator[Any]:
        return iter(texts())


class Drawn(IterableDataset[Any]):
    """A stream that draws from all the global generators."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(5):
            numbers = [random.random(), np.random.rand(), torch.rand(()).item()]
            yield torch.tensor(numbers)


class DrawnByIndex(list[Any]):
    """Data that draws from all the global generators as an example is made."""

    def __getitem__(self, i: Any) -> Any:
        return torch.tensor([i, random.random(), np.random.rand(), torch.rand(()).item()])


def arrow() -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{key: x.tolist() for key, x in example.items()} for example in texts()]
    )


SOURCES: dict[str, Callable[[], Any]] = {
    "IterableDataset": Texts,
    "Stream": lambda: pl.data.Stream(range_of_texts(), texts().__getitem__),
    "Dataset": arrow,
    "Dataset of tensors": lambda: arrow().with_format("torch"),
    "datasets' IterableDataset": lambda: arrow().to_iterable_dataset(),
}


def range_of_texts() -> Any:
    return dict.fromkeys(range(len(texts()))).keys()  # has an order, and no items by index


def fitted(train: Any, folder: Path | None = None, **options: Any) -> tuple[Any, ...]:
    if not hasattr(train, "__len__"):
        options["examples"] = len(texts())
    model = gpt()
    history = trainer(model, folder, train=train, shuffle=False, **options).fit(resume=bool(folder))
    return values(model), timeless(history)


@pytest.fixture(scope="module")
def listed() -> tuple[Any, ...]:
    return fitted(texts())


@pytest.mark.parametrize("kind", SOURCES)
def test_it_trains_as_on_a_list(kind: str, listed: tuple[Any, ...]) -> None:
    found = fitted(SOURCES[kind](), val=texts(4, seed=1))
    assert same(found[0], listed[0]) and found[1] == listed[1]


def test_a_stream_to_validate_on_is_held(listed: tuple[Any, ...]) -> None:
    class Val(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(texts(4, seed=1))

    assert fitted(texts(), val=Val())[1] == listed[1]


def test_data_may_be_an_array() -> None:
    rows, model = np.eye(4, dtype=np.float32), torch.nn.Linear(4, 3)
    pl.attach(model, pl.LoRA(rank=2, targets="weight"))
    history = pl.Trainer(
        model, lambda model, batch: model(batch).square().mean(), rows, rows, epochs=1,
        collate=lambda rows: torch.tensor(np.stack(rows)), progress=False,
    ).fit()  # fmt: skip
    assert "full_valid_loss" in history.curves


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["Stream", "Dataset"])
def test_workers_change_nothing(kind: str, listed: tuple[Any, ...]) -> None:
    found = fitted(SOURCES[kind](), num_workers=2, valid_every=None, accumulate=1)
    assert same(found[0], listed[0]) and found[1] == listed[1]


def batches(data: Any, steps: int, workers: int = 0, **options: Any) -> list[Any]:
    loader = Loader(data, 3, torch.stack, CPU, workers=workers, **options)
    found = [[batch for batch, _ in loader.ahead(step)] for step in range(steps)]
    loader.close()
    return found


@pytest.mark.parametrize(
    ("data", "options"), [(Drawn(), {"examples": 7}), (DrawnByIndex([0] * 7), {})]
)
def test_what_data_draws_is_a_function_of_the_step(data: Any, options: Any) -> None:
    loader = Loader(data, 3, torch.stack, CPU, **options)
    state = torch.get_rng_state()
    whole = batches(data, 6, **options)
    assert torch.equal(torch.get_rng_state(), state)
    for step in (4, 2, 5):
        ((batch, _),) = loader.micro_batches(step)
        assert digest([batch]) == digest(whole[step])
    assert len({digest(each) for each in whole}) == 6
    assert digest(whole) != digest(batches(data, 6, seed=1, **options))


@pytest.mark.heavy
def test_workers_draw_the_same() -> None:
    data = DrawnByIndex([0] * 7)
    assert digest(batches(data, 5, workers=2)) == digest(batches(data, 5))


def test_a_stream_goes_on_where_an_epoch_ends() -> None:
    class Numbers(IterableDataset[Any]):
        passes: list[int]

        def __init__(self) -> None:
            self.passes = []

        def set_epoch(self, epoch: int) -> None:
            self.passes.append(epoch)

        def __iter__(self) -> Iterator[Tensor]:
            return map(torch.tensor, range(5))

    data = Numbers()
    found = [batch.tolist() for (batch,) in batches(data, 5, examples=4)]
    assert found == [[0, 1, 2], [3], [4, 0, 1], [2], [3, 4, 0]]
    assert data.passes == [0, 1, 2]


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["IterableDataset", "Dataset", "shuffled"])
def test_killed_it_goes_on_to_the_bit(kind: str, workers: int, tmp_path: Path) -> None:
    def train() -> Any:
        if kind == "shuffled":
            return arrow().to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=4)
        return SOURCES[kind]()

    options = {"save_every": 2, "accumulate": 2, "num_workers": workers}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = fitted(train(), whole, **options)
    with pytest.raises(Killed):
        fitted(train(), broken, callbacks=[Kill(5)], **options)
    found = fitted(train(), broken, **{**options, "num_workers": 1 - workers})
    assert same(found[0], expected[0]) and found[1] == expected[1]
    assert content(broken) == content(whole)


# -- rows


CHAT = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}},
    {"type": "function", "function": {"name": "now", "parameters": {"zone": "str"}}},
]
SAID = [{"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": "3"}]
BY_FIELD = {"from": ["human", "gpt"], "value": ["1 + 2?", "3"]}
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "messages": ("chat", [{"messages": CHAT, "tools": TOOLS}, {"messages": CHAT}]),
    "named": ("chat", [{"messages": [{**CHAT[0], "name": "Ada"}, CHAT[1]]}]),
    "ShareGPT": ("chat", [{"conversations": SAID, "system": "Add."}, {"conversations": SAID}]),
    "ShareGPT by field": ("chat", [{"conversations": BY_FIELD}]),
    "trl": ("pairs", [{"prompt": "1 + 2?", "completion": "3"}]),
    "trl's messages": ("chat", [{"prompt": CHAT[:1], "completion": CHAT[1:]}]),
    "Alpaca": ("pairs", [{"instruction": "Add.", "input": "1, 2", "output": "3"},
                         {"instruction": "Say.", "output": "x"}]),
    "text": ("text", [{"text": "1 + 2 = 3"}, {"text": "2"}]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:'tools' isn't used")
@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_read_as_those_of_a_file_are(kind: str) -> None:
    name, rows = ROWS[kind]
    read = partial(getattr(pl.data, name), **({"length": 4} if name == "text" else {}))
    expected, rows_of = read(rows), datasets.Dataset.from_list(rows)
    for given in (rows_of, rows_of.to_iterable_dataset(), rows_of.to_iterable_dataset().take(9)):
        assert digest([*read(given)]) == digest([*expected])
    if name != "text":
        found = read(rows_of)
        assert [*found.rows] == [*expected.rows]
        assert all(not isinstance(row, list) for row in found.rows.source)  # nothing is copied


def test_a_stream_is_read_as_it_comes() -> None:
    seen = []

    class Rows(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for i in range(1000):
                seen.append(i)
                yield {"messages": CHAT}

    stream = pl.data.chat(Rows())
    assert isinstance(stream, pl.data.Stream) and seen == [0]
    next(iter(stream))
    assert seen == [0, 0]


def test_generators_are_left_as_they_were() -> None:
    def states() -> str:
        drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
        return repr(drawn) + digest(drawn[2])

    before = states()
    with seeded(5):
        first = random.random(), np.random.rand(), torch.rand(()).item()
        with seeded(5):
            assert (random.random(), np.random.rand(), torch.rand(()).item()) == first
    assert states() == before

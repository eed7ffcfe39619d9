"""Augmentations: what each keeps, what it changes, and that all chance is the generator's."""

import pickle
import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

import peftlite.train.data as data
from peftlite.train.data.augment import (
    Casing,
    Chain,
    Crop,
    Cutout,
    Flip,
    Maybe,
    Mixup,
    Noise,
    OnKey,
    OnRole,
    Synonyms,
    WordDropout,
    WordSwap,
)
from tests.train.chats import rows

TEXT = " The big dog,\n\tand the small cat:  both sleep. "
SYNONYMS = {"big": ["large", "huge"], "small": ["little"]}
OF_TEXTS = [WordDropout(0.4), WordSwap(0.5), Casing(), Synonyms(SYNONYMS, 0.5)]
OF_TENSORS = [Noise(), Flip(), Cutout((2, 3)), Crop((4, 4), padding=1)]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("step", [*OF_TEXTS, *OF_TENSORS], ids=repr)
def test_the_same_generator_gives_the_same(step: Any) -> None:
    x = TEXT if step in OF_TEXTS else torch.randn(3, 6, 7)
    kept = x if isinstance(x, str) else x.clone()
    state = torch.get_rng_state()
    got = [step(x, seeded(seed)) for seed in (*range(20), *range(20))]
    assert torch.equal(torch.get_rng_state(), state)
    plain = [y if isinstance(y, str) else y.tolist() for y in got]
    assert plain[:20] == plain[20:] and any(y != plain[0] for y in plain)
    assert pickle.loads(pickle.dumps(step)) == step
    assert x == kept if isinstance(x, str) else torch.equal(x, kept)


@given(st.text(), st.floats(0, 1), st.integers(0, 99))
def test_words_are_left_out_and_stay_in_order(text: str, p: float, seed: int) -> None:
    words, left = text.split(), WordDropout(p)(text, seeded(seed)).split()
    rest = iter(words)
    assert all(word in rest for word in left)
    assert bool(left) == bool(words)
    assert WordDropout(0.0)(text, seeded(seed)) == text


@given(st.text(), st.floats(0, 1), st.integers(0, 99))
def test_words_are_swapped_with_neighbours(text: str, p: float, seed: int) -> None:
    words, swapped = text.split(), WordSwap(p)(text, seeded(seed)).split()
    assert Counter(words) == Counter(swapped)
    assert re.findall(r"\s+", text) == re.findall(r"\s+", WordSwap(p)(text, seeded(seed)))
    assert WordSwap(1.0)("a b c d e", seeded(seed)) == "b a d c e"


def test_rates_are_kept() -> None:
    words = " ".join(map(str, range(20_000)))
    left = WordDropout(0.1)(words, seeded(0)).split()
    assert abs(len(left) / 20_000 - 0.9) < 0.01
    assert sum(
        Maybe(Noise(), 0.3)(torch.zeros(1), seeded(i)).item() != 0 for i in range(1000)
    ) in range(250, 350)


def test_casing_and_synonyms() -> None:
    assert {Casing()(TEXT, seeded(i)) for i in range(30)} == {
        TEXT.lower(), TEXT.upper(), TEXT.title()
    }  # fmt: skip
    found = {Synonyms(SYNONYMS, 1.0)("Big, small; bigger", seeded(i)) for i in range(30)}
    assert found == {"Large, little; bigger", "Huge, little; bigger"}


def test_tensors() -> None:
    x = torch.arange(1.0, 43).view(6, 7)
    assert torch.equal(Flip(1.0, 0)(x, seeded(0)), x.flip(0))
    assert torch.equal(Flip(0.0)(x, seeded(0)), x)
    assert abs((Noise(0.5)(torch.zeros(10_000), seeded(0))).std() - 0.5) < 0.02
    assert Noise()(x.half(), seeded(0)).dtype == torch.float16
    crops = [Crop((4, 5))(x, seeded(i)) for i in range(40)]
    windows = x.unfold(0, 4, 1).unfold(1, 5, 1).flatten(0, 1)
    assert {tuple(c.flatten().tolist()) for c in crops} == {
        tuple(w.flatten().tolist()) for w in windows
    }
    padded = Crop((8, 9), padding=1)(x, seeded(0))
    assert torch.equal(padded, F.pad(x, [1] * 4))
    holes = [Cutout((2, 3))(x, seeded(i)) for i in range(300)]
    assert max(int((h == 0).sum()) for h in holes) == 6
    assert all(((h == 0) | (h == x)).all() for h in holes)
    assert torch.stack(holes).eq(0).any(0).all()  # anywhere


def test_mixup() -> None:
    x, y = torch.randn(8, 3), F.one_hot(torch.arange(8) % 4, 4).float()
    mixed = Mixup(0.4)({"x": x, "y": y}, seeded(1))
    torch.testing.assert_close(mixed["y"].sum(1), torch.ones(8))
    again = Mixup(0.4)({"x": x, "y": y}, seeded(1))
    assert all(torch.equal(mixed[key], again[key]) for key in mixed)
    generator = seeded(1)
    other = torch.randperm(8, generator=generator)
    share = ((mixed["x"] - x[other]) / (x - x[other]))[other != torch.arange(8)]
    torch.testing.assert_close(share, share[:1, :1].expand_as(share), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mixed["y"], share[0, 0] * y + (1 - share[0, 0]) * y[other])


def test_chains_and_where_they_act() -> None:
    wordy = Chain(WordDropout(0.5), Maybe(Casing(), 0.5))
    row = rows()[0]
    changed = OnRole("user", wordy)(row, seeded(0))
    for before, after in zip(row["messages"], changed["messages"], strict=True):
        assert before["role"] == after["role"] and before.get("name") == after.get("name")
        assert before["role"] == "user" or before == after
    assert changed["letter"] == row["letter"]
    pair = {"prompt": "what is it", "response": "that"}
    assert OnKey("prompt", Casing())(pair, seeded(0))["response"] == "that"
    assert pair["prompt"] == "what is it"


def test_what_comes_of_data_is_of_seed_epoch_and_row_alone() -> None:
    def ids(epoch: int, seed: int = 0, start: int = 0) -> list[list[int]]:
        every = data.chat(rows()).augment(OnRole("user", WordDropout(0.5)), seed)[start:]
        every.set_epoch(epoch)
        return [example["input_ids"].tolist() for example in every]

    first = ids(0)
    assert ids(0) == first and ids(0, start=30) == first[30:]
    assert ids(1) != first and ids(0, seed=1) != first
    plain = data.chat(rows())
    assert plain.augment(OnRole("user", WordDropout(0.0)))[3].keys() == plain[3].keys()


def test_twice_augmented_draws_twice() -> None:
    every = data.Data([torch.zeros(1000)]).augment(Noise(1.0)).augment(Noise(1.0))
    assert abs(every[0].std() - 2**0.5) < 0.1

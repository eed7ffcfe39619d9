"""Splitting: groups whole, shares and strata kept, the same parts again; and the orders of data."""

import math
import pickle
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import peftlite as pl
import peftlite.train.data as data
from peftlite.train.data.split import closest, split
from tests.train.chats import rows

SHARES = st.lists(st.sampled_from([0.05, 0.1, 0.15, 0.2, 0.3]), min_size=1, max_size=3)
SEEDS = st.integers(0, 5)
GROUPS = st.lists(st.integers(0, 12), min_size=1, max_size=80)


def of(values: list) -> data.Data:
    return data.Data([{"i": i, "key": value} for i, value in enumerate(values)])


@given(GROUPS, SHARES, SEEDS)
def test_no_group_straddles_and_every_row_is_somewhere_once(
    groups: list[int], shares: list[float], seed: int
) -> None:
    parts = split(groups, groups, shares, seed)
    assert sorted(i for part in parts for i in part) == list(range(len(groups)))
    assert all(part == sorted(part) for part in parts)
    homes = [{groups[i] for i in part} for part in parts]
    assert sum(map(len, homes)) == len(set(groups))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 30))
def test_no_choice_of_groups_comes_nearer(sizes: list[int], target: int) -> None:
    sums = {
        sum(size for size, taken in zip(sizes, mask, strict=True) if taken)
        for mask in product([0, 1], repeat=len(sizes))
    }
    got = sum(sizes[i] for i in closest(sizes, target))
    assert abs(got - target) == min(abs(s - target) for s in sums)


@given(st.integers(20, 400), SHARES, SEEDS)
def test_shares_are_kept_to_a_row(n: int, shares: list[float], seed: int) -> None:
    train, *parts = split(range(n), [None] * n, shares, seed)
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - share * n) < 1
    assert abs(len(train) - (1 - sum(shares)) * n) < 1


@given(st.lists(st.sampled_from("aaaaabbc"), min_size=10, max_size=200), SHARES, SEEDS)
def test_strata_are_kept_to_a_row(strata: list[str], shares: list[float], seed: int) -> None:
    parts = split(range(len(strata)), strata, shares, seed)
    whole = Counter(strata)
    for part, share in zip(parts, [1 - sum(shares), *shares], strict=True):
        found = Counter(strata[i] for i in part)
        assert all(abs(found[s] - share * whole[s]) < 1 for s in whole)
        assert abs(len(part) - share * len(strata)) <= 1.5


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 6)), min_size=4, max_size=30), SEEDS
)
def test_groups_of_one_stratum_are_shared_out_as_well_as_they_can_be(
    groups: list[tuple[str, int]], seed: int
) -> None:
    ids = [g for g, (_, size) in enumerate(groups) for _ in range(size)]
    strata = [groups[g][0] for g in ids]
    _, held = split(ids, strata, [0.3], seed)
    for stratum in set(strata):
        sizes = [size for s, size in groups if s == stratum]
        got, share = sum(strata[i] == stratum for i in held), 0.3 * sum(sizes)
        best = min(abs(sum(sizes[i] for i in closest(sizes, t)) - share) for t in whole(share))
        assert abs(got - share) <= best + 1


def whole(share: float) -> tuple[int, int]:
    return math.floor(share), math.ceil(share)


def test_large_parts_are_quick_and_right() -> None:
    n = 50_000
    _, held = split(range(n), [None] * n, [0.4], 0)
    assert len(held) == 20_000
    groups = torch.randint(n // 10, (n,)).tolist()
    _, held = split(groups, [None] * n, [0.4], 0)
    assert len(held) == 20_000


def test_parts_are_a_fair_draw() -> None:
    held = Counter(i for seed in range(400) for i in split(range(50), [0] * 50, [0.2], seed)[1])
    assert sum(held.values()) == 4000
    chi2 = sum((held[i] - 80) ** 2 / (80 * 0.8) for i in range(50))
    assert chi2 < 50 + 4 * 10  # four standard deviations


def test_a_seed_gives_these_very_parts() -> None:
    letters = list("abcab") * 8
    train, val, test = of(letters).split(0.1, 0.1, seed=3, stratify="key")
    assert val.picks == [7, 9, 18, 38]  # on every machine, in every version
    assert test.picks == [12, 19, 23, 39]
    assert len(train) == 32
    again = of(letters).split(0.1, 0.1, seed=3, stratify=lambda row: row["key"])
    assert [part.picks for part in again] == [train.picks, val.picks, test.picks]
    assert of(letters).split(0.1, 0.1, seed=4, stratify="key")[1].picks != val.picks


def test_keys_are_fields_functions_or_values() -> None:
    every = of([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    for key in ("key", lambda row: row["key"], torch.arange(10) // 2, [v // 2 for v in range(10)]):
        train, val = every.split(0.2, group=key)
        assert len({row["key"] for row in val}) == 1 and len(val) == 2
    # of a part as of the whole
    inner, held = train.split(0.25, group="key")
    assert not {row["i"] for row in inner} & {row["i"] for row in held}


def test_a_slice_is_data() -> None:
    every = of(list("abcdef"))
    assert [row["key"] for row in every[1:4]] == ["b", "c", "d"]
    assert every[-1]["key"] == "f" and str(every[::2]) == "Data(3 examples)"
    with pytest.raises(IndexError):
        every[6]


def test_examples_are_made_once_as_long_as_there_is_room() -> None:
    made = []

    def make(row: int) -> dict[str, torch.Tensor]:
        made.append(row)
        return {"x": torch.zeros(row)}

    every = data.Data([3, 5], make)
    every._cache.room = 16  # bytes
    for _ in range(3):
        assert [len(example["x"]) for example in every] == [3, 5]
    assert made == [3, 5, 5, 5]
    assert pickle.loads(pickle.dumps(of(["a"])))[0]["key"] == "a"


def test_shuffled_orders_are_the_generators() -> None:
    every = of(list(range(20)))
    generator = torch.Generator().manual_seed(0)
    first, second = every.order(generator), every.order(generator)
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert every.order(torch.Generator().manual_seed(0)) == first


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 5))
def test_a_curriculum_rises(values: list[int], stages: int) -> None:
    rising = of(values).curriculum("key")
    assert [rising[i]["key"] for i in rising.order()] == sorted(values)
    assert [row["i"] for row in rising] == sorted(range(len(values)), key=values.__getitem__)
    staged = of(values).curriculum("key", stages=stages)
    seen, n = [staged[i]["key"] for i in staged.order()], len(values)
    cuts = [-(-n * stage // stages) for stage in range(stages + 1)]
    for start, end in pairwise(cuts):
        assert sorted(seen[start:end]) == sorted(values)[start:end]


def test_stages_are_shuffled_anew() -> None:
    staged = of(list(range(40))).curriculum("key", stages=2)
    first, second = staged.order(), staged.order()
    assert first != second and max(first[:20]) == 19


def test_a_curriculum_by_length() -> None:
    every = data.chat(rows())
    lengths = every.curriculum(every.lengths).lengths
    assert lengths == sorted(every.lengths)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_class_weights(labels: list[int]) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    assume(len(set(labels)) == 4)
    got = data.class_weights(labels)
    want = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    torch.testing.assert_close(got, torch.tensor(want).float())
    counts = torch.bincount(torch.tensor(labels)).double()
    for beta in (0.0, 0.9, 0.9999):
        effective = (1 - beta**counts) / (1 - beta)
        weights = 1 / effective
        got = data.class_weights(torch.tensor(labels), how="effective", beta=beta)
        torch.testing.assert_close(got, (weights * 4 / weights.sum()).float())


def test_labels_that_losses_leave_out_have_no_weight() -> None:
    assert torch.equal(data.class_weights([0, 1, -100, 0]), data.class_weights([0, 1, 0]))


def test_class_weights_of_many_examples_are_exact() -> None:
    labels = [0] * 3 + [1] * 1_000_000
    got = data.class_weights(labels, how="effective", beta=1 - 1e-9)
    by_frequency = data.class_weights(labels)
    torch.testing.assert_close(
        got / got.sum(), by_frequency / by_frequency.sum(), rtol=1e-3, atol=0
    )


def test_a_wrong_split_is_refused() -> None:
    with pytest.raises(pl.PeftliteError, match="leave a part empty"):
        of([1] * 10).split(0.1, group="key")

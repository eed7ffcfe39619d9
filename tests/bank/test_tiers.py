"""Where deltas are: slots, rows on the host, files; who goes, who stays, and that none is lost."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftlite as pl
from peftlite.bank import DeltaBank
from tests.bank.banks import WIDTH, Models, base, lora, resident, tuned

NAMES = "abcdefg"


def test_the_least_recently_used_goes() -> None:
    own = Models("abcd", slots=2)
    assert resident(own.bank) == ["c", "d"]
    own.check(["c", "a"])
    assert resident(own.bank) == ["c", "a"]
    own.check(["c"])
    own.bank.prefetch("b")
    assert resident(own.bank) == ["c", "b"]


def test_what_is_pinned_or_in_use_stays() -> None:
    own = Models("abcd", slots=3)
    own.bank.pin("a")
    with own.bank.use("b"):
        for name in "cdcd":
            own.check([name])
            assert {"a", "b"} <= set(resident(own.bank))
        own.bank.unpin("a")
        own.check(["c", "d"])
        assert set(resident(own.bank)) == set("bcd")


def test_too_few_slots_are_an_error_and_change_nothing() -> None:
    own = Models("abc", slots=2)
    before = resident(own.bank)
    with (
        pytest.raises(pl.PeftliteError, match="3 deltas are named, for a bank of 2 slots"),
        own.bank.rows([*"abc"]),
    ):
        pass
    with own.bank.rows(["b", "c"]), pytest.raises(pl.PeftliteError, match="in use"):
        own.bank.prefetch("a")
    assert resident(own.bank) == before and not any(e.uses for e in own.bank._slots.resident)
    own.check(["a", "b"])


def test_replacing_leaves_what_runs_alone() -> None:
    own = Models("ab", slots=2)
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    with torch.no_grad(), own.bank.use("a"):
        before = own.model(x)
        own.bank.load("a", own.delta("b"))
        assert torch.equal(own.model(x), before)
        own.bank.drop("b")
        with own.bank.use("a"):
            torch.testing.assert_close(own.model(x), own.want(x, ["b"]))
    with pytest.raises(pl.PeftliteError, match="no delta named 'b'"), own.bank.use("b"):
        pass


def test_it_says_what_it_has() -> None:
    own = Models("abc", slots=2)
    assert own.bank.names == [*"abc"]
    assert repr(own.bank).startswith("DeltaBank(3 deltas, 2 in 2 slots of ")


def test_dropping_frees_the_slot() -> None:
    own = Models("ab", slots=2)
    with own.bank.use("a"):
        own.bank.drop("a")
        assert len(own.bank._slots.free) == 0
    assert len(own.bank._slots.free) == 1
    own.bank.evict("b")
    assert len(own.bank._slots.free) == 2 and own.bank._store.num_bytes == own.bank._arena.row_bytes


def test_a_load_that_fails_changes_nothing() -> None:
    own = Models("ab", slots=1)
    entries = dict(own.bank._slots.known)
    stored, row = own.bank._store.num_bytes, own.bank._arena.buffers[0].clone()
    wide = tuned(base(), lora(rank=9), "a")
    foreign = tuned(base(), lora(rank=2), "a")
    for source in (pl.deltas(wide)["a"], pl.deltas(foreign)["a"], "nowhere.safetensors", 3):
        with pytest.raises(pl.PeftliteError):
            own.bank.load("a", source)  # type: ignore
    with own.bank.use("b"), pytest.raises(pl.PeftliteError, match="can't have a slot now"):
        own.bank.load("a", own.delta("a"), pin=True)
    assert own.bank._slots.known == entries and own.bank._store.num_bytes == stored
    assert torch.equal(own.bank._arena.buffers[0], row)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Models, dict[str, Path]]:
    own = Models("")
    paths = {}
    for i, name in enumerate(NAMES):
        own.alone[name] = tuned(own.base, lora(rank=1 + i), name)
        paths[name] = tmp_path / f"{name}.safetensors"
        pl.save(own.delta(name), paths[name])
    return own, paths


@pytest.mark.parametrize("budget_rows", [None, 0, 2])
@pytest.mark.parametrize("from_files", [True, False])
def test_nothing_is_lost_behind_any_budget(
    files: tuple[Models, dict[str, Path]], budget_rows: int | None, from_files: bool
) -> None:
    own, paths = files
    row = own.bank._arena.row_bytes
    own.bank.close()
    budget = None if budget_rows is None else budget_rows * row + 1
    own.bank = DeltaBank(own.model, 2, 8, methods=lora(), memory_budget=budget)
    for name in NAMES:
        own.bank.load(name, paths[name] if from_files else own.delta(name))
    folder = own.bank._store._folder
    assert (folder is None) is (from_files or budget is None)
    for name in NAMES * 2:
        own.check([name])
        assert budget is None or own.bank._store.num_bytes <= budget
    own.bank.close()
    assert folder is None or not os.path.exists(folder)


def test_a_file_that_changed_is_not_taken_for_the_delta(
    files: tuple[Models, dict[str, Path]],
) -> None:
    own, paths = files
    own.bank.close()
    own.bank = DeltaBank(own.model, 1, 8, methods=lora(), memory_budget=1)
    for name in "ab":
        own.bank.load(name, paths[name])
    pl.save(own.delta("c"), paths["a"])
    for _ in range(2):
        with pytest.raises(pl.FileError, match="has changed since 'a'"), own.bank.use("a"):
            pass
        own.check(["b"])
    paths["b"].unlink()
    own.check(["b"])  # it has its slot
    own.bank.load("a", paths["a"])
    with pytest.raises(pl.FileError), own.bank.use("b"):
        pass
    assert len(own.bank._slots.free) + len(own.bank._slots.resident) == 1


def test_a_folder_of_peft_is_loaded(tmp_path: Path) -> None:
    own = Models("a")
    pl.export(own.delta("a"), tmp_path / "a", format="peft")
    own.bank.load("b", tmp_path / "a", check_base="off")
    own.alone["b"] = own.alone["a"]
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    with torch.no_grad(), own.bank.rows(["b", "a"]):
        torch.testing.assert_close(own.model(x), own.want(x, ["a", "a"]), rtol=1e-6, atol=1e-6)


def test_a_fresh_delta_changes_nothing() -> None:
    own = Models("")
    own.bank.load("new", lora(rank=4))
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    with own.bank.use("new"):
        assert torch.equal(own.model(x), own.base(x))


STEPS = st.lists(
    st.tuples(st.sampled_from(["use", "load", "drop", "evict", "pin", "unpin"]),
              st.sampled_from(NAMES)), max_size=30
)  # fmt: skip


@given(steps=STEPS)
def test_any_history_gives_what_it_should(steps: list[tuple[str, str]]) -> None:
    own = Models("abc", slots=2)
    held = {name: name for name in "abc"}  # what each name stands for
    for i, (act, name) in enumerate(steps):
        other = "abc"[i % 3]
        try:
            if act == "load":
                own.bank.load(name, own.delta(other))
                held[name] = other
            elif act == "use":
                x = torch.randn(2, WIDTH, dtype=torch.float64)
                with torch.no_grad(), own.bank.rows([None, name]):
                    torch.testing.assert_close(own.model(x), own.want(x, [None, held[name]]))
            else:
                getattr(own.bank, act)(name)
                if act == "drop":
                    del held[name]
        except pl.PeftliteError as error:
            pinned = sum(entry.pinned for entry in own.bank._slots.resident)
            assert name not in held or (pinned == 2 and "can't have a slot" in str(error))
        slots = own.bank._slots
        assert set(slots.known) == set(held)
        taken = [entry.slot for entry in slots.resident]
        assert sorted([*taken, *slots.free]) == [1, 2]
        assert not any(entry.uses for entry in slots.resident)

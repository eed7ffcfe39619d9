"""Compiled code and CUDA graphs: one graph serves every mix of deltas, and every swap."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

import peftlite as pl
from peftlite.bank import DeltaBank
from tests.bank.banks import WIDTH, Models
from tests.zoo import KINDS

pytestmark = pytest.mark.heavy

ZOO = {kind.name: kind for kind in KINDS}


@pytest.fixture(autouse=True)
def no_recompilation() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_one_graph_serves_every_mix_and_swap(backend: str) -> None:
    own = Models("abcdef", slots=3)
    compiled = torch.compile(own.model, fullgraph=True, backend=backend)
    x = torch.randn(4, 3, WIDTH, dtype=torch.float64)
    mixes = [["a", None, "b", "a"], ["c"] * 4, ["d", "e", "f", None], ["f"], [None], ["a", "e"]]
    counters.clear()
    for names in mixes:
        with torch.no_grad(), own.bank.rows(names, repeat=4 // len(names)):
            got = compiled(x)
        torch.testing.assert_close(got, own.want(x, names))
    own.bank.load("a", own.delta("f"))
    with torch.no_grad(), own.bank.use("a"):
        torch.testing.assert_close(compiled(x), own.want(x, ["f"]))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), own.base(x))
    assert counters["stats"]["unique_graphs"] == 1


def test_threads_are_apart_under_compile() -> None:
    own = Models("abcd")
    compiled = torch.compile(own.model, fullgraph=True, backend="eager")
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        compiled(x)
    wrong: list[object] = []

    def read(name: str) -> None:
        try:
            for _ in range(30):
                with torch.no_grad(), own.bank.use(name):
                    torch.testing.assert_close(compiled(x), own.want(x, [name]))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def test_a_part_that_is_compiled_asks_for_itself() -> None:
    own = Models("ab")
    own.model[2].compile(fullgraph=True, backend="eager")
    own.check(["a", None, "b"])
    own.check(["b", "b", "a"])


def test_a_transformer_is_compiled_once() -> None:
    kind = ZOO["hf_llama"]
    model = kind.model()
    bank = DeltaBank(model, 2, 4)
    for name in "ab":
        bank.load(name, pl.LoRA(rank=4))
    batch = kind.batch(2)
    with torch.no_grad():
        plain = kind.run(model, batch)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for names in (["a", "b"], ["b", None], [None]):
            with bank.rows(names):
                torch.testing.assert_close(kind.output(compiled(**batch)), plain)


def test_the_number_of_rows_is_checked_as_the_graph_runs() -> None:
    own = Models("ab")
    compiled = torch.compile(own.model, fullgraph=True, backend="eager")
    with pytest.raises(pl.PeftliteError, match="the batch has 2"), own.bank.rows(["a", "b", "a"]):
        compiled(torch.randn(2, WIDTH, dtype=torch.float64))


def test_static_rows_change_in_place() -> None:
    """What a CUDA graph replays: the same tensors, other numbers in them."""
    own = Models("abcd", slots=3)
    rows = own.bank.static(3)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    compiled = torch.compile(own.model, fullgraph=True, backend="eager")
    address = rows.slots.data_ptr()
    for run in (own.model, compiled):
        for names in (["a", "b", None], ["c", "c", "a"], ["d", None, "c"]):
            rows.set(names)
            with torch.no_grad(), rows:
                torch.testing.assert_close(run(x), own.want(x, names))
            assert rows.slots.data_ptr() == address
    with pytest.raises(pl.PeftliteError, match="2 rows were named, and there are 3"):
        rows.set(["a", "b"])
    with pytest.raises(pl.PeftliteError, match="'d' is in use"):
        own.bank.evict("d")
    rows.close()
    own.bank.evict("d")
    with torch.no_grad(), rows:
        assert torch.equal(own.model(x), own.base(x))

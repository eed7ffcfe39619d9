"""Threads, tasks and swaps: no forward is torn, and no one sees another's rows."""

import asyncio
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import peftlite as pl
from tests.bank.banks import WIDTH, Models


@pytest.fixture
def eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_a_swap_in_the_middle_of_a_forward_does_not_tear_it() -> None:
    """A hook on layer 2 waits until the swap is done; the output is of one delta throughout."""
    own = Models("abc", slots=2)
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    reached, swapped = threading.Event(), threading.Event()

    def block(*_: object) -> None:
        reached.set()
        assert swapped.wait(10)

    hook = own.model[2].register_forward_hook(block)
    got = []

    def read() -> None:
        with torch.no_grad(), own.bank.use("a"):
            got.append(own.model(x))

    reader = threading.Thread(target=read)
    reader.start()
    assert reached.wait(10)
    own.bank.load("a", own.delta("b"))  # another delta by the same name
    with own.bank.use("c"):  # and the one slot that is left goes round
        pass
    own.bank.prefetch("a")
    swapped.set()
    reader.join()
    hook.remove()
    torch.testing.assert_close(got[0], own.want(x, ["a"]))
    with torch.no_grad(), own.bank.use("a"):
        torch.testing.assert_close(own.model(x), own.want(x, ["b"]))


def stress(readers: int, forwards: int, swaps: int) -> tuple[int, int]:
    """How many outputs were of no delta, and how many of another's than was named."""
    own = Models("abcdef", slots=readers)
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    want = {name: own.want(x, [name]) for name in "abcdef"}
    torn, wrong, errors = [], [], []

    def read(name: str) -> None:
        try:
            for _ in range(forwards):
                with torch.no_grad(), own.bank.use(name):
                    y = own.model(x)
                if torch.allclose(y, want[name]) or (
                    name == "f" and any(torch.allclose(y, want[other]) for other in "ef")
                ):
                    continue
                known = any(torch.allclose(y, own) for own in want.values())
                (wrong if known else torn).append(name)
        except BaseException as error:
            errors.append(error)

    def swap() -> None:
        try:
            for i in range(swaps):
                own.bank.load("f", own.delta("ef"[i % 2]))
        except BaseException as error:
            errors.append(error)

    names = ["abcdf"[i % 5] for i in range(readers)]
    threads = [threading.Thread(target=read, args=(name,)) for name in names]
    threads.append(threading.Thread(target=swap))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert not any(entry.uses for entry in own.bank._slots.resident)
    return len(torn), len(wrong)


@pytest.mark.usefixtures("eager_switches")
def test_readers_and_a_swapper() -> None:
    assert stress(readers=8, forwards=60, swaps=60) == (0, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("eager_switches")
def test_readers_and_a_swapper_for_long() -> None:
    assert stress(readers=8, forwards=5000, swaps=2000) == (0, 0)


def test_tasks_have_rows_of_their_own() -> None:
    own = Models("abc")
    x = torch.randn(1, WIDTH, dtype=torch.float64)

    async def one(name: str | None) -> None:
        with own.bank.use(name):
            for _ in range(5):
                torch.testing.assert_close(own.model(x).detach(), own.want(x, [name]))
                await asyncio.sleep(0)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(name) for name in ("a", "b", None, "c", "a")))

    asyncio.run(all_of_them())


def test_two_threads_that_want_one_delta_bring_it_once() -> None:
    own = Models("abc", slots=1)
    fetch, fetched = own.bank._slots.fetch, []
    start = threading.Barrier(4)
    own.bank._slots.fetch = lambda entry: (fetched.append(entry.name), fetch(entry))[1]

    def read() -> None:
        start.wait()
        own.check(["a"])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["a"]


def test_who_waits_for_a_delta_that_fails_to_come_is_told() -> None:
    own = Models("ab", slots=1)
    coming, go = threading.Event(), threading.Event()

    def fail(entry: object) -> object:
        coming.set()
        go.wait(10)
        raise pl.FileError("gone")

    fetch, own.bank._slots.fetch = own.bank._slots.fetch, fail  # type: ignore
    said: list[str] = []

    def read() -> None:
        try:
            own.bank.prefetch("a")
        except pl.PeftliteError as error:
            said.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert coming.wait(10)
    while own.bank._slots.known["a"].uses < 3:
        pass
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(said) == ["gone", *["the delta could not be brought in: gone"] * 2]
    own.bank._slots.fetch = fetch
    own.check(["a"])


def test_a_checkpointed_block_runs_again_with_its_rows() -> None:
    own = Models("ab")
    block = own.model
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)

    class Checkpointed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)  # type: ignore

    with own.bank.rows(["a", "b"]):
        y = Checkpointed()(x).square().sum()
    (again,) = torch.autograd.grad(y, x)
    with own.bank.rows(["a", "b"]):
        (plain,) = torch.autograd.grad(block(x).square().sum(), x)
    assert torch.equal(again, plain)

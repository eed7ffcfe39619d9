"""Threads: what one of them changes, as another calls the model, trains it, or changes it too."""

import asyncio
import contextvars
import gc
import os
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.core import host, turns
from tests.cells import close, in_threads
from tests.digest import assert_same, bits, digest
from tests.trust.threads import METHOD, deep
from tests.zoo import seeded

X = torch.randn(2, 8, dtype=torch.float64)


class Halfway:
    """A model with deltas, and a call of another thread that stops in the middle until let go."""

    def __init__(self, *names: str):
        self.model = deep(4)
        self.inside, self.go_on = threading.Event(), threading.Event()
        for seed, name in enumerate(names):
            with seeded(seed), torch.no_grad():
                for parameter in pl.attach(self.model, METHOD, name).parameters():
                    parameter.normal_()
        self.hook: Any = self.model[2].register_forward_pre_hook(self.stop)

    def stop(self, *_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.inside.set()
            assert self.go_on.wait(20)

    def gives(self, names: Any) -> Tensor:
        with pl.using(self.model, names):
            return self.model(X)

    @contextmanager
    def calling(self, using: Any = ...) -> Iterator[list[Tensor]]:
        """Runs its body while a call is halfway; what the call gives is there afterwards."""
        found: list[Tensor] = []

        def call() -> None:
            if using is ...:
                found.append(self.model(X))
                return
            with pl.using(self.model, using):
                found.append(self.model(X))

        thread = threading.Thread(target=call)
        thread.start()
        assert self.inside.wait(20)
        try:
            yield found
        finally:
            self.go_on.set()
            thread.join()


@pytest.mark.parametrize("names", ["b", ["a", "b"], None])
def test_a_call_keeps_the_choice_that_it_began_with(names: Any) -> None:
    half = Halfway("a", "b")
    pl.use(half.model, "a")
    before, after = half.gives("a"), half.gives(names)
    with half.calling() as found:
        pl.use(half.model, names)
        assert torch.equal(half.model(X), after)  # a call that begins now has the new one
    assert torch.equal(found[0], before)
    assert torch.equal(half.model(X), after)
    choice = half.model.peftlite.choice
    assert not choice.apart and not choice.calls


def test_a_call_does_not_see_what_is_attached_beside_it(tmp_path: Path) -> None:
    half = Halfway("a")
    pl.save(pl.deltas(half.model)["a"], tmp_path / "a")
    before = half.model(X)
    with half.calling() as found:
        pl.load(half.model, tmp_path / "a", "again")
        pl.use(half.model, ["a", "again"])
    assert torch.equal(found[0], before)
    assert not torch.equal(half.model(X), before)


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "merge": lambda model: pl.merge(model, "a"),
    "detach": lambda model: pl.detach(model, "a"),
}


@pytest.mark.parametrize("using", [..., "a", "b"], ids=["standing", "a", "b"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_changes_weights_or_patches_waits_for_calls(verb: str, using: Any) -> None:
    half = Halfway("a", "b")
    pl.use(half.model, "a")
    before = half.gives("a" if using is ... else using)
    ended = threading.Event()

    def change() -> None:
        VERBS[verb](half.model)
        ended.set()

    with half.calling(using) as found:
        thread = threading.Thread(target=change)
        thread.start()
        assert not ended.wait(0.05)
    thread.join()
    assert ended.is_set() and torch.equal(found[0], before)


def test_a_first_delta_waits_for_a_call_that_knows_of_none(tmp_path: Path) -> None:
    with_delta = Halfway("a")
    pl.save(pl.deltas(with_delta.model)["a"], tmp_path / "a")
    half = Halfway()
    before = half.model(X)
    with half.calling() as found:
        threading.Timer(0.05, half.go_on.set).start()
        pl.load(half.model, tmp_path / "a")
    assert torch.equal(found[0], before)
    assert torch.equal(half.model(X), with_delta.model(X))


def test_verbs_of_two_threads_come_one_after_another() -> None:
    model = deep()
    before = digest(model)
    refused: list[str] = []

    def attach(i: int) -> None:
        try:
            pl.attach(model, METHOD, "one")
        except pl.PeftliteError as error:
            refused.append(str(error))
        pl.attach(model, METHOD, f"own{i}")

    in_threads(*(lambda i=i: attach(i) for i in range(4)))
    assert len(refused) == 3 and set(pl.deltas(model)) == {"one", *(f"own{i}" for i in range(4))}
    in_threads(*(lambda name=name: pl.detach(model, name) for name in pl.deltas(model)))
    assert_same(before, digest(model))


def test_a_part_and_the_whole_do_not_both_get_deltas() -> None:
    for _ in range(5):
        model, refused = nn.Sequential(deep(), nn.Linear(8, 8)), []
        barrier = threading.Barrier(2)

        def attach(to: nn.Module, barrier=barrier, refused=refused) -> None:
            barrier.wait()
            try:
                pl.attach(to, METHOD)
            except pl.PeftliteError:
                refused.append(to)

        in_threads(lambda model=model: attach(model), lambda model=model: attach(model[0]))
        assert len(refused) == 1


# -- beside training


def stepping(delta: pl.Delta, optimizer: Any, ended: threading.Event) -> None:
    while not ended.is_set():
        for parameter in delta.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


class Generations(torch.optim.Optimizer):
    """Gives every parameter the number of the step, slowly."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {})
        self.count = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.fill_(self.count)
                time.sleep(1e-4)


@pytest.mark.parametrize("write", [pl.save, pl.export])
def test_what_is_written_is_of_one_step(write: Any, tmp_path: Path) -> None:
    delta, ended = pl.attach(deep(), METHOD), threading.Event()
    optimizer = Generations(delta.parameters())
    optimizer.step()

    def work() -> None:
        for i in range(4):
            write(delta, tmp_path / str(i))
        ended.set()

    in_threads(lambda: stepping(delta, optimizer, ended), work)
    for i in range(4):
        values = {float(t) for _, t in pl.load(deep(), tmp_path / str(i)).named_tensors()
                  for t in t.reshape(-1)[:1]}  # fmt: skip
        assert len(values) == 1, values


def test_a_step_that_failed_is_waited_for_by_nobody(tmp_path: Path) -> None:
    delta = pl.attach(deep(), METHOD)

    def fail() -> None:
        def closure() -> float:
            raise KeyError

        with pytest.raises(KeyError):
            torch.optim.SGD(delta.parameters(), lr=1).step(closure)
        pl.save(delta, tmp_path / "its")

    in_threads(fail)
    pl.save(delta, tmp_path / "ours")
    gc.collect()
    assert not turns._steps


def test_other_models_train_on_while_one_is_saved() -> None:
    delta, other = pl.attach(deep(), METHOD), pl.attach(deep(), METHOD)
    optimizer = torch.optim.SGD(other.parameters(), lr=1)
    with turns.at_rest(delta.parameters()):
        in_threads(optimizer.step)


# -- where a scoped choice goes


def test_where_a_scoped_choice_goes() -> None:
    model = deep(1)
    pl.attach(model, METHOD, "a")
    choice = model.peftlite.choice

    async def elsewhere() -> list[Any]:
        run = asyncio.get_running_loop().run_in_executor
        context = contextvars.copy_context()
        return [
            await asyncio.create_task(asyncio.to_thread(choice.now)),
            await run(None, choice.now),
            await run(None, context.run, choice.now),
        ]

    def forked() -> int:
        if (child := os.fork()) == 0:
            os._exit(choice.now() != ())
        return os.waitpid(child, 0)[1]

    def suspended() -> Iterator[None]:
        with pl.using(model, ["a"]):
            yield

    with pl.using(model, None):
        assert asyncio.run(elsewhere()) == [(), ("a",), ()]
        assert forked() == 0
        assert pickle.loads(pickle.dumps(model)).peftlite.choice.now() == ("a",)
        generator = suspended()
        next(generator)
        assert choice.now() == ("a",)
        generator.close()
        assert choice.now() == ()


# -- interrupts, and what is kept


class Interrupt:
    """Raises where a signal may: when the n-th call that a function makes has come back."""

    def __init__(self, code: Any, n: int):
        self.code, self.n, self.reached = code, n, 0

    def __enter__(self) -> None:
        sys.setprofile(self._profile)

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def _profile(self, frame: Any, event: str, _: Any) -> None:
        own = frame if event == "c_return" else frame.f_back if event == "return" else None
        if own is not None and own.f_code is self.code:
            self.reached += 1
            if self.reached == self.n:
                raise KeyboardInterrupt


def test_an_interrupt_leaves_no_scope_open() -> None:
    model = deep(1)
    pl.attach(model, METHOD, "a")
    choice = model.peftlite.choice
    code = type(choice).scope.__wrapped__.__code__
    for n in range(1, 100):
        inside, interrupt = False, Interrupt(code, n)
        try:
            with interrupt:
                scope = pl.using(model, None)
                with scope:
                    inside = True
        except KeyboardInterrupt:
            scope = None  # what a handler of the error no longer holds
        if inside:
            break
        assert not choice.scoped and not choice.apart, n
        with pl.using(model, "a"):
            assert choice.now() == ("a",)
        assert choice.now() == ("a",)
    assert n > 3


def test_a_class_made_for_a_model_goes_with_it() -> None:
    def once() -> weakref.ref:
        class Local(nn.Linear):
            """A class of a notebook's cell, run again and again."""

        model = nn.Sequential(Local(4, 4))
        pl.attach(model, pl.LoRA(rank=1, targets="0"))
        assert type(model[0]) is not Local
        model(torch.randn(1, 4))
        return weakref.ref(Local)

    gone = once()
    gc.collect()
    assert gone() is None
    kept = len(host._classes)
    once()
    gc.collect()
    assert len(host._classes) == kept


def test_bits_of_the_base_are_the_same_after_it_all() -> None:
    model = deep()
    before = {name: bits(p) for name, p in model.named_parameters()}

    def work(name: str) -> None:
        pl.attach(model, METHOD, name)
        with torch.no_grad():
            for parameter in pl.deltas(model)[name].parameters():
                parameter.fill_(0.1)
        for _ in range(3):
            pl.merge(model, name)
            pl.unmerge(model, name)
        pl.detach(model, name)

    in_threads(*(lambda name=name: work(name) for name in "abcd"))
    assert before == {name: bits(p) for name, p in model.named_parameters()}
    close(model(X), deep()(X))

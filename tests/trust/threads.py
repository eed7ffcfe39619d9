"""R9: threads that change one model: no call sees half a change, and nothing is left of them."""

from __future__ import annotations

import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import peftlite as pl
from tests.digest import bits, digest
from tests.trust.tally import Tally, difference
from tests.zoo import seeded

NAMES = ("a", "b")
CHOICES = ([], ["a"], ["b"], ["a", "b"], ["b", "a"])
METHOD = pl.LoRA(rank=2, targets="weight")


def deep(layers: int = 6) -> nn.Module:
    """A model of which a call is in many layers for a while."""
    with seeded():
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).double()


@contextmanager
def often() -> Iterator[None]:
    """Threads that change places after a few lines."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(*jobs: Callable[[], None]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@torch.no_grad()
def r9(verbs: int, writers: int = 3, readers: int = 3) -> Tally:
    """Verbs of several threads on one model, as others call it: every output is a choice's own."""
    tally, model, x = Tally(), deep(), torch.randn(3, 8, dtype=torch.float64)
    before, calls = digest(model), [0] * readers
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in NAMES}
        outputs = _outputs(model, x, files)
        left = threading.Semaphore(verbs)
        ended = threading.Event()

        def read(number: int) -> None:
            while not ended.is_set():
                y, calls[number] = model(x).detach(), calls[number] + 1
                if min(float((y - other).abs().max()) for other in outputs) > 1e-9:
                    tally.wrong.append("a call saw half a change")

        def write(seed: int) -> None:
            rng, own = random.Random(seed), Path(folder, f"own{seed}")
            while left.acquire(blocking=False):
                name = rng.choice(NAMES)
                _attempt(tally, rng.choice(_verbs(model, name, files[name], own)))

        def work() -> None:
            together(*(lambda seed=seed: write(seed) for seed in range(writers)))
            ended.set()

        with often():
            together(work, *(lambda n=n: read(n) for n in range(readers)))
    for name in [*pl.deltas(model)]:
        pl.detach(model, name)
    tally.check(not (what := difference(before, digest(model))), f"the base has another {what}")
    tally.notes.append(f"{writers} threads that change, {readers} that call, {sum(calls)} calls")
    return tally


def _outputs(model: nn.Module, x: Tensor, files: dict[str, Path]) -> list[Tensor]:
    """What the model gives under every choice; the deltas are in the files then."""
    for seed, (name, path) in enumerate(files.items()):
        delta = pl.attach(model, METHOD, name)
        with seeded(seed):
            for parameter in delta.parameters():
                parameter.normal_().mul_(0.3)
        pl.save(delta, path)
    found = []
    for names in CHOICES:
        pl.use(model, names)
        found.append(model(x).detach())
    for name in files:
        pl.detach(model, name)
    return found


def _verbs(model: nn.Module, name: str, path: Path, own: Path) -> list[Callable[[], object]]:
    return [
        lambda: pl.load(model, path, name),
        lambda: pl.detach(model, name),
        lambda: pl.use(model, name),
        lambda: pl.use(model, NAMES),
        lambda: pl.use(model, None),
        lambda: pl.merge(model, name),
        lambda: pl.unmerge(model, name),
        lambda: pl.save(name, own, model=model),
    ]


def _attempt(tally: Tally, verb: Callable[[], object]) -> None:
    """Counts one verb, which does what it should or says why it can't be."""
    tally.tried += 1
    try:
        verb()
    except pl.PeftliteError:
        pass
    except Exception as error:
        tally.wrong.append(f"{type(error).__name__}: {error}")


def saves(count: int) -> Tally:
    """Files written beside training: each holds what some step of the optimizer left."""
    tally, model = Tally(), deep().float()
    delta, x = pl.attach(model, METHOD, "a"), torch.randn(4, 8)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    left, ended = {_state(delta)}, threading.Event()

    def train() -> None:
        while not ended.is_set():
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            left.add(_state(delta))

    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            for i in range(count):
                pl.save(delta, Path(folder, str(i)))
            ended.set()

        together(train, save)
        for i in range(count):
            read = pl.load(deep().float(), Path(folder, str(i)))
            tally.check(_state(read) in left, "a file holds parts of two steps")
    tally.notes.append(f"{len(left) - 1} steps beside them")
    return tally


def _state(delta: pl.Delta) -> tuple[bytes, ...]:
    return tuple(map(bits, delta.state_dict().values()))

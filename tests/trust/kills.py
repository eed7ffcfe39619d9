"""R5: whatever stops a save, `kill -9` or the disk, the file is whole: the old one or the new."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import peftlite as pl
from peftlite.io import files
from tests.trust.tally import Tally

ROOT = Path(__file__).parents[2]
SIDE = 64


def model_and_delta() -> tuple[nn.Module, pl.Delta]:
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(4)))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.fill_(i)
    return model, pl.attach(model, pl.FullTuning(), "sql")


@torch.no_grad()
def save(delta: pl.Delta, generation: int, path: Path) -> None:
    """A save whose every tensor, and whose notes, tell one generation."""
    for parameter in delta.parameters():
        parameter.fill_(generation)
    pl.save(delta, path, notes={"generation": generation})


def generations(path: Path) -> set[float]:
    """The generations that a file tells of. Raises FileError."""
    model, delta = model_and_delta()
    pl.detach(model, "sql")
    delta = pl.load(model, path)
    return {
        pl.inspect(path).notes["generation"],
        *(v for tensor in delta.state_dict().values() for v in tensor.unique().tolist()),
    }


def temporaries(path: Path) -> list[Path]:
    return [file for file in path.parent.iterdir() if file != path]


# -- kill -9


def r5(kills: int) -> Tally:
    """Kills of a process that saves over one file without pause, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.trust.kills", str(kills)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if run.returncode:
        return Tally(wrong=[run.stderr[-400:]])
    return Tally(**json.loads(run.stdout.splitlines()[-1]))


def killed(kills: int, path: Path, seed: int = 0) -> Tally:
    """Forks savers, each killed at a random moment, and reads what they leave."""
    tally, rng, orphans, seen = Tally(), random.Random(seed), 0, set()
    _, delta = model_and_delta()
    save(delta, 0, path)
    for i in range(kills):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for generation in count(1 + 1000 * i):
                    save(delta, generation, path)
            os._exit(1)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        tally.check(os.WIFSIGNALED(status), "a save failed before it was killed")
        left = temporaries(path)
        orphans += len(left)
        try:
            found = generations(path)
            seen |= found
            tally.check(len(found) == 1, f"mixed generations: {found}")
        except pl.FileError as error:
            tally.check(False, f"unloadable: {error}")
        if left:
            save(delta, 0, path)
            tally.check(not temporaries(path), f"not collected: {temporaries(path)}")
    tally.tried = kills
    tally.notes.append(f"{orphans} temporary files left and collected, {len(seen)} generations")
    return tally


# -- a disk that fails


class Faulty(io.FileIO):
    """A file that writes little at a time, and fails at the n-th step of all."""

    step: Callable[[str], None]

    def write(self, data: Any) -> int:
        self.step("write")
        return super().write(memoryview(data).cast("B")[: max(1, 2 * len(data) // 3)])


@contextlib.contextmanager
def failing(n: int, code: int) -> Iterator[Counter[str]]:
    """Makes the n-th call to the operating system in a save fail, and counts them all."""
    counts: Counter[str] = Counter()

    def step(name: str) -> None:
        counts[name] += 1
        if counts.total() == n:
            raise OSError(code, os.strerror(code))

    def wrapped(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            step(name)
            return function(*args, **kwargs)

        return call

    def opened(path: Any, mode: str) -> Any:
        step("open")
        if "x" not in mode:
            return open(path, mode)
        file = Faulty(path, "xb")
        file.step = step
        return io.BufferedWriter(file, 4096)

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(mock.patch.object(files, "open", opened, create=True))
        for name in ("fsync", "replace", "listdir"):
            stack.enter_context(patch(files.os, name, wrapped(name, getattr(os, name))))
        yield counts


def r5_disk() -> Tally:
    """ENOSPC, EIO and short writes at every call of a save; then a limit on the file's size."""
    tally = Tally()
    _, delta = model_and_delta()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sql.safetensors"
        save(delta, 0, path)
        with failing(0, errno.EIO) as counts:
            save(delta, 0, path)
        for code in (errno.ENOSPC, errno.EIO):
            for n in range(1, counts.total() + 1):
                with failing(n, code):
                    tally.refused(lambda n=n: save(delta, n, path), f"{n}", pl.FileError)
                _whole(path, {0, n}, tally)
                save(delta, 0, path)
        size = path.stat().st_size
        for limit in range(0, size, max(1, size // 50)):
            with limited(limit):
                tally.refused(lambda: save(delta, 1, path), f"limit {limit}", pl.FileError)
            _whole(path, {0}, tally)
    steps = ", ".join(f"{number} {name}" for name, number in counts.items())
    tally.notes.append(f"every one of {steps}")
    return tally


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """No file of this process may grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _whole(path: Path, allowed: set[int], tally: Tally) -> None:
    try:
        found = generations(path)
        right = len(found) == 1 and found <= allowed and not temporaries(path)
        tally.check(right, f"generations {found}, files {temporaries(path)}")
    except pl.FileError as error:
        tally.check(False, f"unloadable: {error}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(asdict(killed(int(sys.argv[1]), Path(place) / "sql.safetensors"))))

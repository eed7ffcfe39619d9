"""What every test shares: no network, one thread, one seed, loud memory, hypothesis's profiles."""

import gc
import os
import random
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when the hub is first imported

import numpy as np
import pytest
import torch
from filelock import FileLock

# each pytest worker has a core to itself, and one thread sums in one order
torch.set_num_threads(1)

# torch.empty gives NaN, or the largest integer: memory that is read before it is written shows. A
# GPU's kernels that are not deterministic would be refused as well
UNWRITTEN = "default" if torch.cuda.is_available() else "error"
torch.set_deterministic_debug_mode(UNWRITTEN)


Once = Callable[[str, Callable[[Path], None]], Path]


def pytest_pycollect_makemodule(module_path: Path) -> None:
    # as late as this, since most files of tests take less time than the import of hypothesis
    if "hypothesis" in module_path.read_text():
        from hypothesis import settings

        settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
        settings.register_profile("nightly", deadline=None, max_examples=2000)
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what `-m quick` runs: a cut through all files that a developer has time for.

    Of every test that is the first case and, of five and more, one in 40 drawn by its name; none of
    those marked slow or heavy, and all of those marked quick by hand.
    """
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not {"slow", "heavy", "quick"} & {mark.name for mark in item.iter_markers()}:
            cases[item.nodeid.partition("[")[0]].append(item)
    for name, (first, *others) in cases.items():
        drawn = random.Random(name).sample(others, (len(others) + 36) // 40)
        for item in (first, *drawn):
            item.add_marker("quick")


def pytest_collection_finish() -> None:
    # else a tenth of the time goes into looking through the tests themselves for garbage
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The same random numbers for a test, whichever tests ran before it, and torch as it was."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_deterministic_debug_mode(UNWRITTEN)  # Lightning's Trainer sets it for good
    left = torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()
    torch.set_grad_enabled(True)
    assert left == (True, 1, torch.float32), "a test left torch otherwise than it found it"


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C is heard, as it isn't by what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A folder by its name, filled once: a fixture of a module is made by each worker anew."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        path, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)  # what failed half-way in another worker
                path.mkdir()
                fill(path)
                done.touch()
        return path

    return folder

"""What every benchmark shares: interleaved rounds, quantiles, the machine, table and CSV file."""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import os
import platform
import signal
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import repeat
from pathlib import Path
from time import perf_counter

import torch

from peftlite.table import table

HERE = Path(__file__).parent

Timer = Callable[[], float]  # does the work once, and returns the seconds that one call took


def arguments(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, and no CSV file")
    return parser.parse_args()


def timer(call: Callable[[], object], seconds: float = 0.01, best_of: int = 1) -> Timer:
    """Times `call` in a loop of about `seconds`, so that the clock's own cost is nothing.

    The fastest of `best_of` loops counts: what makes a call of microseconds slower than it was a
    moment ago is another process.
    """
    loops = 1
    while (elapsed := _loop(call, loops)) < seconds / 2:
        loops *= 2
    loops = max(1, round(loops * seconds / elapsed))
    return lambda: min(_loop(call, loops) for _ in range(best_of)) / loops


def _loop(call: Callable[[], object], loops: int) -> float:
    collecting = gc.isenabled()
    gc.disable()
    try:
        _synchronize()
        start = perf_counter()
        for _ in repeat(None, loops):
            call()
        _synchronize()
        return perf_counter() - start
    finally:
        if collecting:
            gc.enable()


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleave(timers: Mapping[str, Timer], rounds: int) -> dict[str, list[float]]:
    """Seconds of each timer, one figure a round, after a first round that isn't counted.

    A round runs every timer, each round in another order: a slow spell of the machine falls on all
    alike, and a ratio within a round cancels it.
    """
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(timers[name]())
    return {name: values[1:] for name, values in times.items()}


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def differences(more: Sequence[float], less: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(more, less, strict=True)]


@dataclass(frozen=True)
class Figure:
    """One measured quantity: its value in every round, and the bound that its median must keep."""

    name: str
    values: Sequence[float]
    unit: str = "x"
    at_most: float | None = None
    at_least: float | None = None

    def quantiles(self) -> tuple[float, float, float]:
        """20 %, 50 % and 80 % of the rounds lie below these."""
        tenths = statistics.quantiles(self.values, n=10, method="inclusive")
        return tenths[1], tenths[4], tenths[7]

    def bound(self) -> str:
        median = self.quantiles()[1]
        if self.at_most is not None:
            return f"<= {self.at_most:g} {'met' if median <= self.at_most else 'MISSED'}"
        if self.at_least is not None:
            return f">= {self.at_least:g} {'met' if median >= self.at_least else 'MISSED'}"
        return ""


def machine() -> dict[str, str]:
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    describe = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(describe, cwd=HERE, capture_output=True, text=True)
    return result.stdout.strip() or "none"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def until_told(figures: Iterable[Figure]) -> list[Figure]:
    """All figures, or those that were there as Ctrl-C or `timeout` ended it."""
    found: list[Figure] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        found.extend(figures)
    signal.signal(signal.SIGTERM, before)
    return found


def named(*parts: str | bool | None) -> str:
    """A CSV file's name, of those parts that there are."""
    return "_".join(part for part in parts if isinstance(part, str) and part)


def report(name: str, figures: Sequence[Figure], *, quick: bool, **versions: str) -> None:
    """Prints the machine and the figures; a run that wasn't quick also replaces the CSV file."""
    about = machine() | versions
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in about.items()))
    print(
        table(["figure", "20 %", "median", "80 %", "unit", "bound"], [_row(f, 3) for f in figures])
    )
    if not quick:
        _write(HERE / "results" / f"{name}.csv", figures, about)


def _row(figure: Figure, digits: int) -> list[str]:
    quantiles = (f"{value:.{digits}g}" for value in figure.quantiles())
    return [figure.name, *quantiles, figure.unit, figure.bound()]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Replaces a CSV file by rows, by column."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write(path: Path, figures: Sequence[Figure], about: Mapping[str, str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["figure", "q20", "median", "q80", "unit", "bound", "rounds", *about])
        for figure in figures:
            writer.writerow([*_row(figure, 6), len(figure.values), *about.values()])

"""Runs the comparison: `python benchmarks/quality.py`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from common import HERE, machine
from comparison import results
from comparison.bytelm import ByteLM
from comparison.digits import Digits
from comparison.few import FEW
from comparison.methods import METHODS
from comparison.minilm import MiniLM
from comparison.ocr import OCR
from comparison.sweep import SEEDS, Record, sweep
from comparison.task import Task
from tqdm import tqdm

from peftlite.table import table

TASKS: dict[str, type[Task]] = {"T1": MiniLM, "T3": Digits, "T4": ByteLM, "OCR": OCR, **FEW}
USUAL = ("T1", "T3", "T4")  # cheap ones, for every method
PACKAGES = ("transformers", "scikit-learn")  # that tasks take models and data from
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftlite"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    # threads wait for one another at every small matrix; and one alone sums in one order
    torch.set_num_threads(1)
    folder = args.results
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(None if args.quick else folder / "quality_runs.csv", machine())
    tasks = [TASKS[name](args.cache, args.quick) for name in args.tasks]
    todo = [(row, task) for row in METHODS if row.name in args.methods for task in tasks]
    for row, task in tqdm(todo, unit="cell"):
        sweep(task, row, record, SEEDS[:1] if args.quick else SEEDS)
    rows = results.summary(record, list(TASKS.values()))
    print(_shown(rows))
    if not args.quick:
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        results.write(folder / "quality.csv", rows, versions)
        shown = [task for name, task in TASKS.items() if name in USUAL]
        results.plot(HERE.parent / "docs" / "pictures", rows, shown)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [row.name for row in METHODS]
    parser = argparse.ArgumentParser("quality.py", description=__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=USUAL, metavar="T")
    add("--methods", nargs="+", choices=names, default=names, metavar="NAME")
    add("--cache", type=Path, default=CACHE, help="a folder for the pretrained bases")
    add("--results", type=Path, default=HERE / "results", help="a folder for what comes of it")
    add("--quick", action="store_true", help="a few steps of everything, and no files")
    return parser.parse_args(argv)


def _shown(rows: Sequence[results.Cells]) -> str:
    names = ["task", "method", "parameters", "quality", "gap_closed", "gap_low", "gap_high"]
    names += [
        "beside_full",
        "beside_lora",
        "forgetting",
        "file_bytes",
        "step_bytes",
        "rate",
        "error",
    ]
    return table(names, [[_short(row.get(name, "")) for name in names] for row in rows])


def _short(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)[:40]
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"


if __name__ == "__main__":
    main()

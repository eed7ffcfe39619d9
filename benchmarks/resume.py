"""R6: training that is killed resumes to the bit, from the checkpoint before if one is damaged.

Every trial trains with dropout, shuffling and accumulation in a process of its own, which is killed
at random moments, and then resumed in another. What is compared with a run that nobody killed is
every byte of the last checkpoint (the delta, the optimizer, all random numbers), and the losses.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import HERE, arguments, machine

import peftlite as pl
from peftlite.demo.gpt import GPT
from peftlite.table import table
from peftlite.train import Trainer, losses

COLUMNS = ["trial", "tried", "bit-exact", "kills", "warned", "seconds"]
CLOCKED = ("tokens_per_second", "memory")
UNWARNED = 3  # the exit status of a child that wasn't told of a damaged checkpoint


def train(folder: Path, resume: bool) -> None:
    torch.manual_seed(0)
    model = GPT(dim=32, layers=2, heads=2)
    pl.attach(model, pl.LoRA(rank=4, dropout=0.1), "sql")
    lengths = torch.randint(8, 32, (40,)).tolist()
    data = [{"input_ids": ids, "labels": ids} for ids in map(tokens, lengths)]
    Trainer(
        model, losses.causal_lm, data, data[:4], epochs=3, batch_size=8, accumulate=2, lr=1e-2,
        valid_every=2, save_every=2, folder=folder, progress=False,
    ).fit(resume)  # fmt: skip


def tokens(count: int) -> torch.Tensor:
    return torch.randint(256, (count,))


def start(folder: Path, resume: bool, warned: bool = False) -> int:
    """Trains in a new process, which may have to warn; gives its id."""
    child = os.fork()
    if child:
        return child
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train(folder, resume)
        os._exit(UNWARNED if warned and not any("not whole" in str(w) for w in told) else 0)
    except BaseException as error:
        print(f"{folder.name}: {error!r}", file=sys.stderr)
        os._exit(1)


def status(child: int) -> int:
    """How a process ends."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> dict[str, Any]:
    """The last checkpoint, byte for byte, and the log without what a clock says."""
    last = sorted(folder.glob("step-*"))[-1]
    lines = (folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    timeless = [{k: v for k, v in e.items() if k not in CLOCKED} for e in events]
    return {"name": last.name, "log": timeless} | {f.name: f.read_bytes() for f in last.iterdir()}


def killed(folder: Path, rng: random.Random, seconds: float) -> int:
    """Trains, with one to three kills at random moments; gives how many there were."""
    kills = rng.randint(1, 3)
    for i in range(kills):
        child = start(folder, resume=i > 0)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return kills


def damage(newest: Path, rng: random.Random) -> None:
    """Does one of three things to one of a checkpoint's files."""
    file = rng.choice(sorted(newest.iterdir()))
    data = bytearray(file.read_bytes())
    match rng.choice(["flip", "cut", "delete"]):
        case "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        case "cut":
            file.write_bytes(data[: rng.randrange(len(data))])
        case _:
            file.unlink()


def trials(kills: int, damages: int) -> list[list[str]]:
    rng, rows = random.Random(0), []
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        began = time.perf_counter()
        status(start(whole, resume=False))
        seconds = time.perf_counter() - began
        expected = outcome(whole)
        for name, count in (("killed", kills), ("newest damaged", damages)):
            began, exact, killings, warned = time.perf_counter(), 0, 0, 0
            for i in range(count):
                folder = Path(place) / f"{name} {i}"
                if name == "killed":
                    killings += killed(folder, rng, seconds)
                else:
                    shutil.copytree(whole, folder)
                    damage(folder / expected["name"], rng)
                ended = status(start(folder, resume=True, warned=name != "killed"))
                warned += ended == 0 and name != "killed"
                exact += ended in (0, UNWARNED) and outcome(folder) == expected
                shutil.rmtree(folder)
            took = f"{time.perf_counter() - began:.1f}"
            rows.append([name, *map(str, (count, exact, killings, warned)), took])
    return rows


def main() -> None:
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    about, found = machine(), trials(*((2, 2) if quick else (20, 10)))
    print("resume: " + ", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(COLUMNS, found))
    if not quick:
        with (HERE / "results" / "resume.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*COLUMNS, *about])
            writer.writerows([*row, *about.values()] for row in found)
    (_, tried, exact, *_), (_, damaged, recovered, _, warned, _) = found
    sys.exit((tried, damaged, damaged) != (exact, recovered, warned))


if __name__ == "__main__":
    main()

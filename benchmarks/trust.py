"""What must survive: malformed files, flipped bits, faults, kills, resumes, merging, threads."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the trials are the tests'

from benchmarks.common import HERE, machine
from peftlite.table import table
from tests import golden
from tests.trust import bases, borders, faults, kills, malformed, merging, names, resumes, threads
from tests.trust.tally import Tally


@dataclass(frozen=True)
class Goal:
    """One of the goals, the trial of it, and how large it is."""

    id: str
    what: str
    trial: Callable[..., Tally]
    small: tuple[int, ...] = ()  # in the tests
    quick: tuple[int, ...] = ()
    nightly: tuple[int, ...] = ()


GOALS = (
    Goal("R1", "malformed files", malformed.r1, (300,), (300,), (5000,)),
    Goal("R1", "memory of malformed files", malformed.memory, (2,), (8,), (100,)),
    Goal("R2", "flipped bits", malformed.r2, (200,), (500,), (10_000,)),
    Goal("R3", "edited bases", bases.r3, (72,), (180,), (1000,)),
    Goal("R4", "faults in verbs", faults.r4, (20,), (150,), (10_000,)),
    Goal("R5", "kill -9 in saves", kills.r5, (15,), (300,), (1000,)),
    Goal("R5", "failing disks", kills.r5_disk),
    Goal("R6", "resumes with all that may differ", resumes.r6, (6,), (36,), (36,)),
    Goal("R7", "merge and unmerge", merging.r7, (5,), (50,), (1000,)),
    Goal("R8", "merges that aren't finite", merging.r8),
    Goal("R9", "threads that change", threads.r9, (60,), (600,), (20_000,)),
    Goal("R9", "saves beside training", threads.saves, (5,), (60,), (2000,)),
    Goal("R13", "code and hostile names", names.r13),
    Goal("R14", "golden deltas", golden.r14),
    Goal("R15", "files of peft", borders.peft, (600,), (50,), (1,)),
    Goal("R15", "files of LyCORIS", borders.lycoris, (10,), (300,), (5000,)),
    Goal("R15", "files of AdapterHub", borders.adapterhub, (5,), (100,), (2000,)),
)
COLUMNS = ["goal", "what", "tried", "wrong", "seconds", "notes"]


def rows(nightly: bool) -> list[list[str]]:
    found = []
    for goal in GOALS:
        start = time.perf_counter()
        outcome = goal.trial(*(goal.nightly if nightly else goal.quick))
        seconds = f"{time.perf_counter() - start:.1f}"
        counts = [str(outcome.tried), str(len(outcome.wrong))]
        found.append([goal.id, goal.what, *counts, seconds, "; ".join(outcome.notes)])
        for wrong in outcome.wrong[:10]:
            print(f"{goal.id}: {wrong}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nightly", action="store_true", help="the large figures")
    nightly = parser.parse_args().nightly
    torch.set_num_threads(1)
    about = {**machine(), "tier": "nightly" if nightly else "quick"}
    found = rows(nightly)
    print("trust: " + ", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(COLUMNS, found))
    with (HERE / "results" / "trust.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *about])
        writer.writerows([*row, *about.values()] for row in found)
    sys.exit(any(row[3] != "0" for row in found))


if __name__ == "__main__":
    main()

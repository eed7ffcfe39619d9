"""peft's types × settings × models: read, written and merged here, against peft's own outputs."""

from __future__ import annotations

import argparse
import csv
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the zoo, which is the tests'

from matrix.cases import CONFIGS, Case, cases
from matrix.trial import GOOD, WAYS, Outcome, attempt

from benchmarks.common import HERE, machine
from peftlite.table import table

RESULTS = HERE / "results" / "peers.csv"
PAGE = HERE.parent / "docs" / "peers.md"
BEGIN, END = "<!-- benchmarks/peers.py: begin -->", "<!-- benchmarks/peers.py: end -->"
COLUMNS = ["type", "way", "outcome", "cases", "why", "example"]


def quiet() -> None:
    """Silences what peft and transformers log of models from no hub."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("peft").setLevel(logging.ERROR)


def sample(every: int, first: int = 0) -> list[Case]:
    """A case in so many, and one of every type."""
    everything = cases()
    firsts = {case.type: case for case in reversed(everything)}
    chosen = everything[first::every]
    kinds = {case.type for case in chosen}
    return chosen + [case for kind, case in firsts.items() if kind not in kinds]


def run(chosen: Iterable[Case]) -> list[Outcome]:
    """Tries cases, and says at once what is wrong."""
    found = []
    for case in chosen:
        found.append(outcome := attempt(case))
        for way, word in outcome.words.items():
            if word not in GOOD:
                print(f"{way} {word}: {case}: {outcome.why.get(way)}", file=sys.stderr)
    return found


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """How many cases ended alike, and one of them: the rows of the CSV file."""
    counts: Counter[tuple[str, ...]] = Counter()
    example: dict[tuple[str, ...], str] = {}
    for outcome in outcomes:
        for way in WAYS:
            word = "void" if outcome.void else outcome.words.get(way)
            if word is None or (word == "void" and way != "read"):
                continue
            why = "" if word == "void" else re.sub(r"'[^']*'|\d+", "…", outcome.why.get(way, ""))
            key = (outcome.case.type, way, word, why[:80])
            counts[key] += 1
            example.setdefault(key, str(outcome.case))
    return [[*key[:3], str(n), key[3], example[key]] for key, n in sorted(counts.items())]


def summary(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """A row a type: its cases, and how many of them are equal, for each way."""
    found = []
    for kind in sorted(CONFIGS):
        own = [line for line in lines if line[0] == kind]
        tried = {way: _count(own, way, lambda word: word != "void") for way in WAYS}
        equal = {way: _count(own, way, lambda word: word == "equal") for way in WAYS}
        cells = [_cell(equal[way], tried[way]) for way in WAYS]
        found.append([kind, str(tried["read"]), *cells])
    return found


def _count(lines: Sequence[Sequence[str]], way: str, suits: Callable[[str], bool]) -> int:
    return sum(int(line[3]) for line in lines if line[1] == way and suits(line[2]))


def _cell(equal: int, tried: int) -> str:
    if not tried:
        return "–"
    return "yes" if equal == tried else f"{equal} of {tried}" if equal else "no"


def render(lines: Sequence[Sequence[str]]) -> str:
    """The table of types, as docs/peers.md has it."""
    head = ["PeftType", "cases", *WAYS]
    body = [head, ["---"] * len(head), *summary(lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in body)


def stored() -> list[list[str]]:
    """The rows of the last whole run."""
    with RESULTS.open(newline="") as file:
        return [line[: len(COLUMNS)] for line in csv.reader(file)][1:]


def into_page(page: str, made: str) -> str:
    """A page with something between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a case in forty, nothing written")
    parser.add_argument("--every", type=int, default=1, help="a case in so many, and written")
    parser.add_argument("--page", action="store_true", help="docs/peers.md from the last run alone")
    asked = parser.parse_args()
    if not asked.page:
        torch.set_num_threads(1)
        quiet()
        start = time.perf_counter()
        outcomes = run(sample(40 if asked.quick else asked.every))
        lines = rows(outcomes)
        about = {**machine(), "peft": peft.__version__, "transformers": transformers.__version__,
                 "every": str(asked.every),
                 "seconds": f"{time.perf_counter() - start:.0f}"}  # fmt: skip
        print("peers: " + ", ".join(f"{key} {value}" for key, value in about.items()))
        print(table(["type", "cases", *WAYS], summary(lines)))
        print(dict(Counter(w for o in outcomes for w in o.words.values())))
        if asked.quick:
            sys.exit(any(outcome.wrong for outcome in outcomes))
        with RESULTS.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*COLUMNS, *about])
            writer.writerows([*line, *about.values()] for line in lines)
    PAGE.write_text(into_page(PAGE.read_text(), render(stored())))
    sys.exit(any(line[2] not in (*GOOD, "void") for line in stored()))


if __name__ == "__main__":
    main()

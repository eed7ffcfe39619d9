"""Holes in the tests: what no test reaches, by folder, and the small faults that no test sees."""

from __future__ import annotations

import argparse
import ast
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from peftlite.table import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# where a fault would be a wrong weight or a lost file
ROOMS = ("core", "io", "verbs")
FLIPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
TESTS_A_MUTANT, SECONDS_A_MUTANT = 40, 300


class Mutant(NamedTuple):
    """One small fault: what stands at some bytes of a source, and what is put there instead."""

    line: int
    start: int
    stop: int
    before: str
    after: str

    def applied(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.stop :]).decode()


def mutants(source: str) -> Iterator[Mutant]:
    """Every fault that is tried in a source, in the order of its lines."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in _nodes(ast.parse(source)):
        for after in _instead(node):
            start = starts[node.lineno - 1] + node.col_offset
            stop = starts[node.end_lineno - 1] + node.end_col_offset
            before = source.encode()[start:stop].decode()
            yield Mutant(node.lineno, start, stop, before, after)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What runs of a tree: no annotations, and no pieces of f-strings, whose places are unknown."""
    if isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _nodes(child)


def _instead(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Compare(left=left, ops=[op], comparators=right) if type(op) in FLIPS:
            yield f"({ast.unparse(ast.Compare(left, [FLIPS[type(op)]()], right))})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in FLIPS:
            yield f"({ast.unparse(ast.BinOp(left, FLIPS[type(op)](), right))})"
        case ast.BoolOp(op=op, values=values):
            yield f"({ast.unparse(ast.BoolOp(FLIPS[type(op)](), values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            yield str(value + 1)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "pass"


class Tier:
    """The tests that a developer runs, what they reach, and which of them reach a line."""

    def __init__(self, marker: str, folder: Path):
        import coverage

        rc, data, report = folder / "rc", folder / "data", folder / "report.json"
        rc.write_text(
            f"[run]\nbranch = True\nsource = peftlite\ndata_file = {data}\n"
            "dynamic_context = test_function\n"
        )
        _python("-m", "coverage", "run", f"--rcfile={rc}", "-m", *_pytest(marker))
        _python("-m", "coverage", "json", f"--rcfile={rc}", "-q", "-o", str(report))
        self.marker, self.data = marker, coverage.CoverageData(str(data))
        self.data.read()
        self.files = json.loads(report.read_text())["files"]

    def by_folder(self) -> list[dict[str, object]]:
        """Lines and branches, and how many of them are reached."""
        sums: dict[str, Counter[str]] = {}
        for path, its in self.files.items():
            folder = str(Path(path).parent.relative_to("peftlite"))
            sums.setdefault(folder, Counter()).update(
                {key: n for key, n in its["summary"].items() if isinstance(n, int)}
            )
        return [
            {
                "folder": folder,
                "lines": n["num_statements"],
                "reached": f"{n['covered_lines'] / max(1, n['num_statements']):.1%}",
                "branches": n["num_branches"],
                "taken": f"{n['covered_branches'] / max(1, n['num_branches']):.1%}",
            }
            for folder, n in sorted(sums.items())
        ]

    def reaching(self, path: str, line: int) -> list[str]:
        """The tests that reach a line, as pytest names them."""
        contexts = self.data.contexts_by_lineno(str(ROOT / path)).get(line, ())
        # hypothesis has functions of its own that begin with test
        return sorted({_node(context) for context in contexts if context.startswith("tests.")})


def _node(context: str) -> str:
    """tests.bank.test_rows.test_it -> tests/bank/test_rows.py::test_it"""
    module, _, function = context.rpartition(".")
    return f"{module.replace('.', '/')}.py::{function}"


def _pytest(marker: str, *more: str) -> list[str]:
    return ["pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", marker, *more]


def _python(*arguments: str, root: Path = ROOT, seconds: float | None = None) -> int:
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, timeout=seconds,
        stdout=subprocess.DEVNULL,
    ).returncode  # fmt: skip


def tried(mutant: Mutant, path: str, tier: Tier, root: Path, draws: random.Random) -> str:
    """What became of a mutant in a copy of the project: not reached, killed (later: by more cases
    of the same tests than the tier has), or survived.
    """
    nodes = tier.reaching(path, mutant.line)
    nodes = draws.sample(nodes, min(len(nodes), TESTS_A_MUTANT))
    source = (ROOT / path).read_text()
    (root / path).write_text(mutant.applied(source))
    try:
        if not nodes:
            return "not reached"
        if _fails(root, tier.marker, nodes):
            return "killed"
        return "killed later" if _fails(root, "not slow", nodes) else "survived"
    finally:
        (root / path).write_text(source)


def _fails(root: Path, marker: str, nodes: Sequence[str]) -> bool:
    command = ["-m", *_pytest(marker, "-x", *nodes)]
    try:
        return _python(*command, root=root, seconds=SECONDS_A_MUTANT) != 0
    except subprocess.TimeoutExpired:
        return True  # it goes round for ever


def sample(rooms: Sequence[str], count: int, draws: random.Random) -> list[tuple[str, Mutant]]:
    """Some of the faults of all files in these rooms."""
    paths = sorted(path for room in rooms for path in (ROOT / "peftlite" / room).rglob("*.py"))
    every = [
        (str(path.relative_to(ROOT)), mutant)
        for path in paths
        for mutant in mutants(path.read_text())
    ]
    return draws.sample(every, min(count, len(every)))


def write(file: Path, rows: Sequence[dict[str, object]]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=60, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="*", default=ROOMS, help="folders of the package")
    parser.add_argument("--marker", default="quick", help="the tests, as for `pytest -m`")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    draws = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        tier, root = Tier(options.marker, Path(folder)), Path(folder) / "copy"
        folders = tier.by_folder()
        write(options.results / "coverage.csv", folders)
        print(table(list(folders[0]), [[str(x) for x in row.values()] for row in folders]))
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", "results", "__pycache__"))
        rows: list[dict[str, object]] = []
        for path, mutant in sample(options.rooms, options.sample, draws):
            start = time.perf_counter()
            outcome = tried(mutant, path, tier, root, draws)
            rows.append(
                {
                    "file": path,
                    "line": mutant.line,
                    "before": mutant.before,
                    "after": mutant.after,
                    "outcome": outcome,
                    "seconds": f"{time.perf_counter() - start:.0f}",
                }
            )
            print(*rows[-1].values(), sep="  ", flush=True)
            write(options.results / "mutants.csv", rows)
    print(Counter(row["outcome"] for row in rows))


if __name__ == "__main__":
    main()

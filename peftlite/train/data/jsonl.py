"""JSONL, strictly read: a line in memory at a time, and every problem with its line."""

from __future__ import annotations

import codecs
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from peftlite.errors import FileError
from peftlite.table import listed
from peftlite.train.data.rows import Row

Path = str | os.PathLike[str]
Finding = tuple[str, str]  # what kind of problem, and in words

LONGEST = 2**24  # bytes: a line that is longer is no example, and isn't held in memory

ARRAY = (
    "the file is one JSON array: jq -c '.[]' makes JSONL of it, an object a line; in Python, give "
    "what json.load reads"
)
MILD = {
    "byte order mark", "blank line", "unknown key", "unused tools", "too few", "too long",
    "duplicate", "leakage",
}  # fmt: skip
"""The kinds of problems that don't keep a line from being an example."""


@dataclass(frozen=True)
class Kind:
    """A kind of rows: how one comes into the form that is read here, and what is wrong with it."""

    as_row: Callable[[Any], Any] = lambda row: row
    check: Callable[[Row], Iterator[Finding]] = lambda row: iter(())


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file: at which line (None: all of it), its kind, and in words."""

    line: int | None
    kind: str
    message: str

    @property
    def fatal(self) -> bool:
        """Whether it keeps the line from being an example."""
        return self.kind not in MILD

    def __str__(self) -> str:
        return self.message if self.line is None else f"line {self.line}: {self.message}"


@dataclass
class Line:
    """A line of a file: its number from 1, where it starts, its row if it's sound, its problems."""

    number: int
    offset: int
    row: Row | None
    problems: list[Problem]


def scan(path: Path, kind: Kind) -> Iterator[Line]:
    """The lines of a file, blank ones too. Raises FileError if it can't be read."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise FileError(f"{str(path)!r} can't be read: {error.strerror}") from error
    with file:
        for number in count(1):
            offset, raw = file.tell(), file.readline(LONGEST)
            if not raw:
                return
            findings, row = [], None
            if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                findings.append(("encoding", "the file is UTF-16: save it as UTF-8"))
                file.seek(0, os.SEEK_END)  # none of its lines ends where it seems to
            elif number == 1 and _is_array(raw):
                findings.append(("JSON", ARRAY))
                file.seek(0, os.SEEK_END)
            elif len(raw) == LONGEST and not raw.endswith(b"\n"):
                longer = f"the line is longer than {LONGEST >> 20} MiB"
                findings.append(("JSON", f"{longer}: make several examples of it"))
                _finish(file)
            else:
                if number == 1 and raw.startswith(codecs.BOM_UTF8):
                    findings.append(("byte order mark", "the file starts with a byte order mark"))
                    offset, raw = offset + 3, raw[3:]
                row, found = _read(raw, kind)
                findings += found
            problems = [Problem(number, *finding) for finding in findings]
            if any(problem.fatal for problem in problems):
                row = None
            yield Line(number, offset, row, problems)


def _is_array(raw: bytes) -> bool:
    """Whether a first line begins an array of objects, or ends in the midst of any."""
    start = raw.removeprefix(codecs.BOM_UTF8).strip()
    return start.startswith(b"[") and (start == b"[" or start[1:].lstrip().startswith(b"{"))


def _finish(file: Any) -> None:
    """Reads what is left of a line."""
    while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
        pass


def _read(raw: bytes, kind: Kind) -> tuple[Row | None, list[Finding]]:
    """A line's row, and what is wrong with it."""
    if not raw.strip():
        return None, [("blank line", "the line is blank")]
    row, findings = parse(raw)
    if any(kind != "duplicate key" for kind, _ in findings):
        return None, findings
    if not isinstance(row, dict):
        return None, [("JSON", f"the line is a JSON {_kind(row)}, not an object")]
    row = kind.as_row(row)
    return row, [*findings, *kind.check(row)]


def parse(raw: bytes) -> tuple[Any, list[Finding]]:
    """A line of JSON, and what is wrong with it: a key twice and NaN are no JSON, either."""
    findings: list[Finding] = []

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        for key, times in Counter(key for key, _ in pairs).items():
            if times > 1:
                findings.append(("duplicate key", f"the key {key!r} is there {times} times"))
        return dict(pairs)

    def no_number(name: str) -> None:
        findings.append(("JSON", f"{name} is no JSON"))

    try:
        return json.loads(
            raw.decode(), object_pairs_hook=unique, parse_constant=no_number
        ), findings
    except UnicodeDecodeError as error:
        bad = f"byte {error.start + 1} of the line, 0x{raw[error.start]:02x}, is no UTF-8"
        return None, [("encoding", f"{bad}: save the file as UTF-8")]
    except json.JSONDecodeError as error:
        return None, [("JSON", f"no JSON at column {error.colno}: {error.msg}")]
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 100,000 brackets
        return None, [("JSON", f"no JSON: {error}")]


def _kind(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


class Lines(Sequence[Row]):
    """The rows of a file, each read when it is asked for: 8 bytes of memory a row.

    Raises FileError if a line is no example, or, later, if the file has changed.
    """

    path: Path
    offsets: array[int]

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path, self.offsets = path, array("Q")
        self._kind, self._stamp = kind, _stamp(path)
        problems = []
        for line in scan(path, kind):
            problems += [problem for problem in line.problems if problem.fatal]
            if line.row is not None:
                self.offsets.append(line.offset)
        if problems:
            raise FileError(f"{str(path)!r} has problems: {listed(map(str, problems))}")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: Any) -> Any:
        if _stamp(self.path) != self._stamp:
            raise FileError(f"{str(self.path)!r} has changed since it was read: read it again")
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return self._kind.as_row(json.loads(file.readline()))


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written to, or None if it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns

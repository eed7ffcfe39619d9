"""Validation: every problem of a file by its line, its tokens, and what training takes."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from math import ceil
from typing import Any

import numpy as np

from peftlite.errors import PeftliteError
from peftlite.progress import bar
from peftlite.table import Shown, table
from peftlite.train.data.checks import check_counts
from peftlite.train.data.jsonl import Finding, Path, Problem
from peftlite.train.data.readers import READERS, UNUSED_TOOLS, Reader, lines_of, reader_for
from peftlite.train.data.rows import Row
from peftlite.train.data.tokens import Tokenizer, as_tokenizer

FEWEST = 10  # examples that are worth training on


@dataclass(frozen=True)
class Estimate:
    """What training takes: passes over the examples, examples a step, and steps in all."""

    epochs: int
    batch_size: int
    steps: int


def estimate(examples: int) -> Estimate:
    """The usual: 3 epochs, a batch of 0.2 % of the examples.

    There are more epochs, up to 25, where 3 don't come to 100 examples seen, and fewer, but at
    least one, where they come to more than 25,000. A batch has 1 to 256 examples. Without examples
    there are no steps.

    Example:
        assert pl.data.estimate(1000) == pl.data.Estimate(epochs=3, batch_size=2, steps=1500)
    """
    epochs = min(max(3, ceil(100 / max(examples, 1))), 25, max(1, 25_000 // max(examples, 1)))
    batch_size = min(max(1, examples // 500), 256)
    return Estimate(epochs, batch_size, epochs * ceil(examples / batch_size))


@dataclass
class FileReport:
    """Counts of a file. `tokens`, and those that are learned, are counted after truncation."""

    path: str
    lines: int = 0
    examples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    problems: list[Problem] = field(default_factory=list)


@dataclass(repr=False)
class Report(Shown):
    """The counts and problems of one or two files, and an estimate; it prints as a table."""

    train: FileReport
    validation: FileReport | None
    tokenizer: str
    max_length: int | None
    estimate: Estimate

    @property
    def files(self) -> list[FileReport]:
        """That of the training file, and that of the validation file if there is one."""
        return [self.train] if self.validation is None else [self.train, self.validation]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not any(file.problems for file in self.files)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def _summary(self) -> str:
        return ", ".join(f"{file.path}: {len(file.problems)} problems" for file in self.files)

    def _lines(self) -> Iterator[str]:
        yield from self._counts()
        for file in self.files:
            yield ""
            yield _listed(file)

    def _counts(self) -> Iterator[str]:
        if not self.train.examples:
            yield f"{self.train.path}: no examples, so there is nothing to train on"
            return
        counts = {
            "lines": "lines",
            "examples": "examples",
            f"tokens of {self.tokenizer}": "tokens",
            "learned": "learned_tokens",
            "longest example": "longest",
        }
        if self.max_length is not None:
            counts[f"longer than {self.max_length}, truncated"] = "truncated"
        rows = [
            [text, *(f"{getattr(f, name):,}" for f in self.files)] for text, name in counts.items()
        ]
        e = self.estimate
        yield table(["", *(file.path for file in self.files)], rows)
        yield ""
        yield f"training: about {e.steps:,} steps, {e.epochs} epochs of {e.batch_size} a step"


def _listed(file: FileReport) -> str:
    """The problems of a file: a line for each kind, with how many, where, and the first of them."""
    if not file.problems:
        return f"{file.path}: no problems"
    kinds: dict[str, list[Problem]] = {}
    for problem in file.problems:
        kinds.setdefault(problem.kind, []).append(problem)
    rows = []
    for kind, found in kinds.items():
        lines = dict.fromkeys(str(problem.line) for problem in found if problem.line)
        shown = ", ".join([*lines][:3]) + ", …" * (len(lines) > 3)
        rows.append([kind, str(len(found)), shown or "–", found[0].message])
    header = ["kind", "times", "lines", f"problems of {file.path}: {len(file.problems)}"]
    return table(header, rows)


def validate(
    path: Path,
    validation: Path | None = None,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    progress: bool = False,
) -> Report:
    """Reads a file once and reports every problem by its line.

    It is JSONL of chats, of pairs or of texts, as its first sound row has it; a file of another
    name is one text. A line at a time is in memory, beside 16 bytes for each row and the problems.

    Args:
        validation: a second file; an example that is in both is reported.
        tokenizer: as in `chat`.
        max_length: of an example in tokens; longer ones are counted and reported. Texts come in
            pieces of that length.
        progress: whether to show a bar.

    Raises:
        FileError: a file can't be read at all.
        PeftliteError: an argument isn't of these.

    Example:
        with open("chats.jsonl", "w") as file:
            print('{"messages": [{"role": "user", "content": "1 + 2?"}]}', file=file)
        report = pl.data.validate("chats.jsonl")
        assert not report.ok
    """
    check_counts(max_length=max_length)
    name = "bytes" if tokenizer is None else type(tokenizer).__name__
    tokenizer = as_tokenizer(tokenizer)
    train, seen = _read(path, tokenizer, max_length, progress)
    report = Report(train, None, name, max_length, estimate(train.examples))
    if train.examples < FEWEST:
        message = f"there are {train.examples} examples: {FEWEST} are the least to train on"
        train.problems.append(Problem(None, "too few", message))
    if validation is not None:
        report.validation, others = _read(validation, tokenizer, max_length, progress)
        report.validation.problems += [
            Problem(line, "leakage", f"the example is line {other} of the training file, too")
            for line, other in others.found_in(seen)
        ]
        if not report.validation.examples:
            report.validation.problems.append(Problem(None, "too few", "there are no examples"))
    for file in report.files:
        file.problems.sort(key=lambda problem: problem.line or 0)
    return report


class _Seen:
    """The hashes of rows and their lines: 16 bytes for each, sorted when they are compared."""

    def __init__(self) -> None:
        self.hashes, self.lines = array("Q"), array("Q")

    def add(self, what: Any, line: int) -> None:
        digest = blake2b(repr(what).encode(), digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "big"))
        self.lines.append(line)

    def repeats(self) -> Iterator[tuple[int, int]]:
        """The lines whose example was there before, and the line where it was first."""
        _, first, which = np.unique(self.hashes, return_index=True, return_inverse=True)
        for i in np.flatnonzero(first[which] != np.arange(len(which))):
            yield self.lines[i], self.lines[first[which[i]]]

    def found_in(self, other: _Seen) -> Iterator[tuple[int, int]]:
        """The first lines of examples that are in another file, and the first lines there."""
        _, mine, theirs = np.intersect1d(self.hashes, other.hashes, return_indices=True)
        for i, j in zip(mine, theirs, strict=True):
            yield self.lines[i], other.lines[j]


def _read(
    path: Path, tokenizer: Tokenizer, max_length: int | None, progress: bool
) -> tuple[FileReport, _Seen]:
    report, seen = FileReport(str(path)), _Seen()
    reader = READERS[reader_for(path)]
    lines = bar(lines_of(path, reader.kind), str(path), unit="line", leave=False,
                disable=not progress)  # fmt: skip
    for line in lines:
        report.lines += 1
        report.problems += line.problems
        if line.row is not None:
            found = [*_count(line.row, reader, tokenizer, max_length, report)]
            report.problems += [Problem(line.number, *finding) for finding in found]
            if not any(kind == "template" for kind, _ in found):
                seen.add(reader.content(line.row), line.number)
    report.problems += [
        Problem(line, "duplicate", f"the example is that of line {first}")
        for line, first in seen.repeats()
    ]
    return report, seen


def _count(
    row: Row, reader: Reader, tokenizer: Tokenizer, max_length: int | None, report: FileReport
) -> Iterator[Finding]:
    """Adds the examples of a row to a report, and finds what is wrong with them."""
    if row.get("tools") and not tokenizer.takes_tools:
        yield "unused tools", UNUSED_TOOLS
    try:
        examples = [*reader.examples(tokenizer, row, max_length)]
    except PeftliteError as error:
        yield "template", str(error)
        return
    for ids, mask in examples:
        report.examples += 1
        report.tokens += len(ids[:max_length])
        report.learned_tokens += sum(mask[:max_length])
        report.longest = max(report.longest, len(ids))
        if max_length is not None and len(ids) > max_length:
            report.truncated += 1
            lost = "" if any(mask[:max_length]) else ", and no token to learn is left"
            yield "too long", f"{len(ids)} tokens are cut off after {max_length}{lost}"

"""Validation: every problem of a chat JSONL file by its line, its tokens, what training takes."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from math import ceil
from typing import Any

import numpy as np

from peftlite.errors import PeftliteError
from peftlite.table import table
from peftlite.train.data.checks import check_chat, check_counts
from peftlite.train.data.jsonl import Path, Problem, Row, scan
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
    least one, where they come to more than 25,000. A batch has 1 to 256 examples.

    Example:
        assert pl.data.estimate(1000) == pl.data.Estimate(epochs=3, batch_size=2, steps=1500)
    """
    examples = max(examples, 1)
    epochs = min(max(3, ceil(100 / examples)), 25, max(1, 25_000 // examples))
    batch_size = min(max(1, examples // 500), 256)
    return Estimate(epochs, batch_size, epochs * ceil(examples / batch_size))


@dataclass
class FileReport:
    """Counts of a file. `tokens`, and those of the assistant, are counted after truncation."""

    path: str
    lines: int = 0
    examples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Report:
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

    def __str__(self) -> str:
        counts = {
            "lines": "lines",
            "examples": "examples",
            f"tokens of {self.tokenizer}": "tokens",
            "the assistant's": "learned_tokens",
            "longest example": "longest",
        }
        if self.max_length is not None:
            counts[f"longer than {self.max_length}, truncated"] = "truncated"
        rows = [
            [text, *(f"{getattr(f, name):,}" for f in self.files)] for text, name in counts.items()
        ]
        e = self.estimate
        return "\n\n".join(
            [
                table(["", *(file.path for file in self.files)], rows),
                f"training: about {e.steps:,} steps, {e.epochs} epochs of {e.batch_size} a step",
                *map(_listed, self.files),
            ]
        )


def _listed(file: FileReport) -> str:
    if not file.problems:
        return f"{file.path}: no problems"
    rows = [[str(p.line or "–"), p.kind, p.message] for p in file.problems]
    header = ["line", "kind", f"problems of {file.path}: {len(rows)}"]
    return table(header, rows)


def validate(
    path: Path,
    validation: Path | None = None,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    progress: bool = False,
) -> Report:
    """Reads a chat JSONL file once and reports every problem by its line.

    A line at a time is in memory, beside 16 bytes for each example and the problems.

    Args:
        validation: a second file; an example that is in both is reported.
        tokenizer: as in `chat`.
        max_length: of an example in tokens; longer ones are counted and reported.
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
    """The hashes of examples and their lines: 16 bytes for each, sorted when they are compared."""

    def __init__(self) -> None:
        self.hashes, self.lines = array("Q"), array("Q")

    def add(self, row: Row, line: int) -> None:
        messages = [(m["role"], m.get("name"), m["content"]) for m in row["messages"]]
        digest = blake2b(repr(messages).encode(), digest_size=8).digest()
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
    from tqdm.auto import tqdm

    report, seen = FileReport(str(path)), _Seen()
    lines = tqdm(scan(path, check_chat), str(path), unit="line", leave=False,
                 disable=None if progress else True)  # fmt: skip
    for line in lines:
        report.lines += 1
        report.problems += line.problems
        if line.row is None:
            continue
        try:
            ids, mask = tokenizer.render_with_mask(line.row["messages"])
        except PeftliteError as error:
            report.problems.append(Problem(line.number, "template", str(error)))
            continue
        seen.add(line.row, line.number)
        report.examples += 1
        report.tokens += len(ids[:max_length])
        report.learned_tokens += sum(mask[:max_length])
        report.longest = max(report.longest, len(ids))
        if max_length is not None and len(ids) > max_length:
            report.truncated += 1
            lost = "" if any(mask[:max_length]) else ", and no token to learn is left"
            message = f"{len(ids)} tokens are cut off after {max_length}{lost}"
            report.problems.append(Problem(line.number, "too long", message))
    report.problems += [
        Problem(line, "duplicate", f"the example is that of line {first}")
        for line, first in seen.repeats()
    ]
    return report, seen

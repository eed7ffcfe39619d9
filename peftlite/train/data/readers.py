"""Readers: kinds of rows, each with what is wrong with a row, and the ids that it makes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from peftlite.errors import FileError, reason
from peftlite.train.data.checks import CHAT, PAIR, TEXT
from peftlite.train.data.jsonl import Kind, Line, Path, scan
from peftlite.train.data.rated import PREFERENCE, RATING, SIDES, whole
from peftlite.train.data.rows import Row, reader_of
from peftlite.train.data.tokens import Tokenizer

Ids = tuple[list[int], list[int]]
"""The ids of an example, and 1 for each that is learned, else 0."""

PIECE = 512  # tokens of a text, where none are given
ROWS = (".jsonl", ".json", ".ndjson")  # the names of files that have a row a line
UNUSED_TOOLS = "'tools' isn't used: the tokenizer has no chat template that takes tools"


@dataclass(frozen=True)
class Reader:
    """What a function of `pl.data` reads: its kind of rows, and the examples that one makes.

    Attributes:
        examples: of a row, texts in pieces of so many tokens.
        content: of a row, what makes it another than others.
    """

    kind: Kind
    examples: Callable[[Tokenizer, Row, int | None], Iterator[Ids]]
    content: Callable[[Row], Any]


def chat_ids(tokenizer: Tokenizer, row: Mapping[str, Any]) -> Ids:
    """Of a chat, the assistant's messages are learned."""
    return tokenizer.render_with_mask(row["messages"], **template_options(tokenizer, row))


def template_options(tokenizer: Tokenizer, row: Mapping[str, Any]) -> dict[str, Any]:
    """What `render` takes beside the messages."""
    tools = row.get("tools")
    return {"tools": tools} if tools and tokenizer.takes_tools else {}


def pair_ids(tokenizer: Tokenizer, row: Mapping[str, Any]) -> Ids:
    """Of a pair, the response is learned."""
    prompt = [*tokenizer.start, *tokenizer.encode(row["prompt"])]
    response = [*tokenizer.encode(row["response"]), *tokenizer.end]
    return prompt + response, [0] * len(prompt) + [1] * len(response)


def answer_ids(tokenizer: Tokenizer, row: Mapping[str, Any], answer: str) -> Ids:
    """Of a prompt and one of its answers, the answer is learned."""
    found = whole(row, answer)
    return chat_ids(tokenizer, found) if "messages" in found else pair_ids(tokenizer, found)


def text_ids(tokenizer: Tokenizer, row: Mapping[str, Any]) -> list[int]:
    """The ids of a text, all learned."""
    return [*tokenizer.start, *tokenizer.encode(row["text"]), *tokenizer.end]


def _pieces(tokenizer: Tokenizer, row: Row, length: int | None) -> Iterator[Ids]:
    ids = text_ids(tokenizer, row)
    for start in range(0, len(ids), length or len(ids)):
        piece = ids[start : start + (length or len(ids))]
        yield piece, [1] * len(piece)


def _turns(row: Row) -> Any:
    shown = ("role", "name", "content", "tool_calls", "weight")
    return [[message.get(key) for key in shown] for message in row["messages"]]


def _turns_of(given: Any) -> Any:
    return given if isinstance(given, str) else _turns({"messages": given})


READERS = {
    "chat": Reader(CHAT, lambda coder, row, _: iter([chat_ids(coder, row)]), _turns),
    "pairs": Reader(
        PAIR,
        lambda coder, row, _: iter([pair_ids(coder, row)]),
        lambda row: (row["prompt"], row["response"]),
    ),
    "text": Reader(TEXT, _pieces, lambda row: row["text"]),
    "preference": Reader(
        PREFERENCE,
        lambda coder, row, _: (answer_ids(coder, row, side) for side in SIDES),
        lambda row: [row[name] for name in ("prompt", *SIDES)],
    ),
    "ratings": Reader(
        RATING,
        lambda coder, row, _: iter([answer_ids(coder, row, "response")]),
        lambda row: [row[name] for name in ("prompt", "response", "rating")],
    ),
}


def has_rows(path: Path) -> bool:
    """Whether a file has a row a line, by its name; else it is one text."""
    return PurePath(path).suffix in ROWS


def reader_for(path: Path) -> str:
    """The function of `pl.data` that reads a file, by its name and its first sound row."""
    if not has_rows(path):
        return "text"
    rows = (line.row for line in scan(path, Kind()) if line.row is not None)
    return reader_of(next(rows, {})) or "chat"


def lines_of(path: Path, kind: Kind) -> Iterator[Line]:
    """The lines of a file; a file that is one text has one. Raises FileError."""
    if has_rows(path):
        return scan(path, kind)
    return iter([Line(1, 0, {"text": plain_text(path)}, [])])


def plain_text(path: Path) -> str:
    """What a file in UTF-8 says. Raises FileError."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise FileError(f"{os.fspath(path)!r} can't be read as text: {reason(error)}") from error

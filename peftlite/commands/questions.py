"""Questions: prompts, out of files and as they are shown with their answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from peftlite.train.data.checks import check_chat, check_pair
from peftlite.train.data.jsonl import Finding, Kind, Lines
from peftlite.train.data.readers import has_rows, plain_text
from peftlite.train.data.rows import Row, as_chat, as_pair


@dataclass
class Question:
    """A prompt, text or the messages of a chat; the answer wanted, if one is; and those given.

    tools: what a chat's assistant can call.
    """

    prompt: Any
    wanted: str | None = None
    tools: list[Any] | None = None
    answers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        prompt = self.prompt
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        wanted = {} if self.wanted is None else {"wanted": self.wanted}
        parts = {"prompt": prompt, **wanted, **self.answers}
        width = max(map(len, parts))
        return "\n".join(
            f"{name.rjust(width)}  {text}".replace("\n", "\n" + " " * (width + 2))
            for name, text in parts.items()
        )


def questions(path: str) -> Iterator[Question]:
    """A prompt a line: plain text, or, in a file that has rows, a pair or a chat."""
    if not has_rows(path):
        yield from a_line_each(plain_text(path))
        return
    for row in Lines(path, Kind(_as_row, _check)):
        *asked, last = row.get("messages", [row])
        if "messages" not in row:
            yield Question(row["prompt"], row.get("response"))
        elif last["role"] == "assistant":
            yield Question(asked, last["content"], row.get("tools"))
        else:
            yield Question(row["messages"], None, row.get("tools"))


def a_line_each(text: str) -> Iterator[Question]:
    """The prompts of plain text."""
    return (Question(line) for line in text.splitlines() if line.strip())


def _as_row(row: Row) -> Row:
    chat = as_chat(row)
    return chat if "messages" in chat else as_pair(row)


def _check(row: Row) -> Iterator[Finding]:
    """What keeps a row from being a prompt: that it lacks an answer doesn't."""
    check, missing = (check_chat, "last message") if "messages" in row else (check_pair, "response")
    return ((kind, what) for kind, what in check(row) if kind not in (missing, "weight"))

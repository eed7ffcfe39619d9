"""What is wrong with a row of data: chats, pairs of prompt and response, texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftlite.errors import PeftliteError
from peftlite.table import short
from peftlite.train.data.jsonl import Finding, Row

ROLES = ("system", "user", "assistant", "tool")
KEYS = ("role", "content", "name")


def check_counts(**given: Any) -> None:
    """Raises PeftliteError for an argument that is neither left out nor a whole number from 1."""
    for name, number in given.items():
        if number is not None and (not isinstance(number, int) or number < 1):
            raise PeftliteError(f"{name} must be a whole number from 1 up, not {short(number)}")


def check_chat(row: Row) -> Iterator[Finding]:
    """`{"messages": [{"role": ..., "content": ..., "name"?: ...}, ...]}`, the assistant's last."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        yield "messages", _wanted(row, "messages", "a list of messages")
        return
    for i, message in enumerate(messages, 1):
        for kind, what in _check_message(message):
            yield kind, f"message {i}: {what}"
    if isinstance(messages[-1], dict) and (role := messages[-1].get("role")) != "assistant":
        yield "last message", f"the last message is of {short(role)}, not the assistant's"


def _check_message(message: Any) -> Iterator[Finding]:
    if not isinstance(message, dict):
        yield "messages", f"{short(message)} is no object with a role and a content"
        return
    role = message.get("role")
    if role not in ROLES:
        yield "role", f"the role is one of {', '.join(ROLES)}, not {short(role)}"
    yield from _check_text(message, "content")
    if "name" in message:
        yield from _check_text(message, "name")
    for key in message:
        if key not in KEYS:
            yield "unknown key", f"{key!r} is not read: a message has {', '.join(KEYS)}"


def check_pair(row: Row) -> Iterator[Finding]:
    """`{"prompt": ..., "response": ...}`"""
    yield from _check_text(row, "prompt")
    yield from _check_text(row, "response")


def check_text(row: Row) -> Iterator[Finding]:
    """`{"text": ...}`"""
    yield from _check_text(row, "text")


def _check_text(row: Row, key: str) -> Iterator[Finding]:
    text = row.get(key)
    if not isinstance(text, str):
        yield key, _wanted(row, key, "a text")
    elif not text.strip():
        yield key, f"{key!r} is empty"
    else:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            yield "encoding", f"{key!r} has half a character, {text[error.start]!r}"


def _wanted(row: Row, key: str, what: str) -> str:
    if key not in row:
        return f"there is no {key!r}: the keys are {', '.join(map(repr, row)) or 'none'}"
    return f"{key!r} is {short(row[key])}, not {what}"

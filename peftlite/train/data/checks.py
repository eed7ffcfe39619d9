"""What is wrong with a row of data: chats, pairs of prompt and response, texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftlite.errors import PeftliteError
from peftlite.table import short
from peftlite.train.data.jsonl import Finding, Kind
from peftlite.train.data.rows import ON_OFF, Row, advice, as_chat, as_pair, as_text

ROLES = ("system", "user", "assistant", "tool")
KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *ON_OFF)


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
    said = [m for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
    if isinstance(messages[-1], dict) and messages[-1] not in said:
        role = short(messages[-1].get("role"))
        yield "last message", f"the last message is of {role}, not the assistant's"
    elif said and all(m.get("weight") == 0 for m in said):
        yield "weight", "none of the assistant's messages is to be learned"
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        yield "tools", f"'tools' is {short(tools)}, not a list of objects"


def _check_message(message: Any) -> Iterator[Finding]:
    if not isinstance(message, dict):
        yield "messages", f"{short(message)} is no object with a role and a content"
        return
    role = message.get("role")
    if role not in ROLES:
        yield "role", f"the role is one of {', '.join(ROLES)}, not {short(role)}"
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        yield "tool_calls", f"'tool_calls' is {short(calls)}, not a list of calls by name"
    content = message.get("content")
    if isinstance(content, list):
        yield "content", f"'content' has parts that aren't text, such as {_odd(content)}"
    elif content != "" or not (calls or role == "tool"):
        yield from _check_text(message, "content")
    if "name" in message:
        yield from _check_text(message, "name")
    for key in ON_OFF:
        if key in message and (message[key] != 0 or role != "assistant"):
            yield key, f"{key!r} is {message[key]!r}: only the assistant's are learned, by 0 or 1"
    for key in message:
        if key not in KEYS:
            yield "unknown key", f"{key!r} is not read: a message has {', '.join(KEYS)}"


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _odd(parts: list[Any]) -> str:
    """The kind of the first part that is no text."""
    kinds = (part.get("type") if isinstance(part, dict) else part for part in parts)
    return short(next((kind for kind in kinds if kind != "text"), parts))


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
        reads = "" if key == "content" else advice(row)
        keys = ", ".join(map(repr, row)) or "none"
        return f"there is no {key!r}: the keys are {keys}" + (f"; {reads}" if reads else "")
    return f"{key!r} is {short(row[key])}, not {what}"


CHAT = Kind(as_chat, check_chat)
PAIR = Kind(as_pair, check_pair)
TEXT = Kind(as_text, check_text)

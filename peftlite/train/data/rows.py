"""Rows: what people's files hold, brought into the form that is read here: chats, pairs, texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Row = dict[str, Any]

SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "observation": "tool", "function": "tool", "developer": "system",
}  # fmt: skip
"""Roles by their other names: ShareGPT's, and OpenAI's older and newer ones."""

ON_OFF = ("weight", "train")
"""What a message has beside it where it isn't to be learned: OpenAI's 0, axolotl's false."""


def as_chat(row: Any) -> Any:
    """A chat as `{"messages": [...], "tools"?: [...]}`, out of the forms that people have.

    Those are OpenAI's and trl's `messages`, ShareGPT's `conversations`, and trl's `prompt` and
    `completion` where these are messages. What is none of these stays as it is, to be refused.
    """
    if not isinstance(row, Mapping) or not isinstance(given := _messages(row), list):
        return row
    tools = row.get("tools") or [{"type": "function", "function": f} for f in _functions(row)]
    found = {**row, "messages": [_message(message) for message in given]}
    return {**found, "tools": _parsed(tools)} if tools else found


def _messages(row: Mapping[str, Any]) -> Any:
    if "messages" in row:
        return _by_row(row["messages"])
    if "conversations" in row:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        given = _by_row(row["conversations"])
        return [*system, *given] if isinstance(given, list) else given
    prompt, completion = _by_row(row.get("prompt")), _by_row(row.get("completion"))
    if not isinstance(prompt, list) or not isinstance(completion, list) or _is_rated(row):
        return None
    return [*({**m, "weight": 0} if isinstance(m, dict) else m for m in prompt), *completion]


def _by_row(given: Any) -> Any:
    """A list of messages, out of a list for each of their fields: a `Sequence` of `datasets`."""
    if not isinstance(given, dict) or not all(isinstance(x, list) for x in given.values()):
        return given
    return [dict(zip(given, each, strict=False)) for each in zip(*given.values(), strict=False)]


def _is_rated(row: Mapping[str, Any]) -> bool:
    """Whether it says of a completion if it is a good one, so that not all are to be learned."""
    return "completion" in row and "label" in row


def as_pair(row: Any) -> Any:
    """`{"prompt": ..., "response": ...}`, out of a tuple, or what Alpaca and trl have."""
    if isinstance(row, tuple | list) and len(row) == 2:
        return {"prompt": row[0], "response": row[1]}
    if not isinstance(row, Mapping) or "response" in row:
        return row
    if "instruction" in row and "output" in row and not (row.get("system") or row.get("history")):
        asked = [row["instruction"], row.get("input")]
        prompt = "".join(f"{text}\n" for text in asked if text)
        return {**row, "prompt": prompt, "response": row["output"]}
    if "completion" in row and not _is_rated(row):
        return {**row, "response": row["completion"]}
    return row


def as_text(row: Any) -> Any:
    """`{"text": ...}`, out of a string."""
    return {"text": row} if isinstance(row, str) else row


def reader_of(row: Mapping[str, Any]) -> str:
    """The function of `pl.data` that reads rows like this one; "" if there is none."""
    if {"chosen", "rejected"} <= row.keys() or "preferred_output" in row:
        return "preference"
    if _is_rated(row) or {"response", "rating"} <= row.keys():
        return "ratings"
    if isinstance(as_chat(row).get("messages"), list):
        return "chat"
    if "text" in row:
        return "text"
    pair = as_pair(row)
    return "pairs" if isinstance(pair.get("prompt"), str) and "response" in pair else ""


def advice(row: Mapping[str, Any]) -> str:
    """What reads rows that are of another kind; "" where nobody could tell."""
    reads = [f"pl.data.{reader} reads these"] if (reader := reader_of(row)) else []
    return "; ".join([*reads, *_of_the_good(row)])


def _of_the_good(row: Mapping[str, Any]) -> list[str]:
    """The line that reads the better answers alone, where some are worse."""
    is_chat, has_prompt = isinstance(row.get("prompt"), list), "prompt" in row
    if _is_rated(row):
        which, answer = "good", "completion"
    elif "chosen" in row:
        which, answer = "chosen", "chosen"
        is_chat = isinstance(row["chosen"], list)
    else:
        return []
    rows = "for r in rows" + " if r['label']" * (which == "good")
    whole = f"r['prompt'] + r['{answer}']" if has_prompt and is_chat else f"r['{answer}']"
    if is_chat:
        reads = f"chat([{{'messages': {whole}}} {rows}])"
    elif has_prompt:
        reads = f"pairs([(r['prompt'], r['{answer}']) {rows}])"
    else:
        reads = f"text([r['{answer}'] {rows}])"
    return [f"to learn the {which} ones, pl.data.{reads}"]


def without_nulls(value: Any) -> Any:
    """A row without the keys whose value is None, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


# -- messages


def _message(given: Any) -> Any:
    """A message as `{"role", "content", "name"?, "tool_calls"?, …}`, its content one text.

    Of what says whether it is learned, `"weight": 0` stays where it isn't.
    """
    if not isinstance(given, dict):
        return given
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    role = message.get("role")
    message["role"] = role = SPEAKERS.get(role, role) if isinstance(role, str) else role
    if "function_call" in message:  # as OpenAI had it before tool_calls
        call = {"type": "function", "function": message.pop("function_call")}
        message.setdefault("tool_calls", [call])
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call) for call in calls]
        message.setdefault("content", "")
    if "content" in message:
        message["content"] = _joined(message["content"])
    flags = [message[key] for key in ON_OFF if key in message]
    if flags and all(flag in (0, 1) for flag in flags) and (role == "assistant" or not any(flags)):
        message = {key: value for key, value in message.items() if key not in ON_OFF}
        if role == "assistant" and not all(flags):
            message["weight"] = 0
    return message


def _joined(content: Any) -> Any:
    """Parts that are all texts as one text."""
    if not isinstance(content, list) or not content:
        return content
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _call(call: Any) -> Any:
    """A call whose arguments are an object, as templates take them, and not its JSON."""
    if not isinstance(call, dict):
        return call
    function = call.get("function", call)
    if not isinstance(function, dict):
        return call
    function = {**function, "arguments": _parsed(function.get("arguments", {}))}
    return {**call, "function": function} if "function" in call else function


def _functions(row: Mapping[str, Any]) -> Iterator[Any]:
    """Tools as OpenAI had them before `tools`."""
    given = row.get("functions")
    return iter(given) if isinstance(given, list) else iter(())


def _parsed(given: Any) -> Any:
    """What is JSON in a string, as what it says."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given

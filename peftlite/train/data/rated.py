"""Rated: pairs of answers of which one was chosen, and single answers with a rating."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from peftlite.table import short
from peftlite.train.data.checks import check_chat, check_pair
from peftlite.train.data.jsonl import Finding, Kind
from peftlite.train.data.rows import Row, as_chat

TURN = "\n\nAssistant:"
"""What Anthropic's hh-rlhf has before an answer, in a text of the whole chat."""

SIDES = ("chosen", "rejected")


def as_preference(row: Any) -> Any:
    """`{"prompt", "chosen", "rejected", "margin"?, "tools"?}`, of texts or of lists of messages.

    Out of trl's rows, whose prompt may be what both answers begin with; OpenAI's `input`,
    `preferred_output` and `non_preferred_output`; and Anthropic's chats in a text each.
    """
    if not isinstance(row, Mapping):
        return row
    if "preferred_output" in row:
        asked = row["input"] if isinstance(row.get("input"), Mapping) else {}
        own = {"chosen": row["preferred_output"], "rejected": row.get("non_preferred_output")}
        return _as_chats({**asked, **own, "prompt": asked.get("messages")})
    if any(isinstance(row.get(name), list) for name in ("prompt", "messages", *SIDES)):
        return _as_chats({**row, "prompt": row.get("prompt", row.get("messages"))})
    if "prompt" not in row and all(isinstance(row.get(side), str) for side in SIDES):
        start = _common(row["chosen"], row["rejected"])
        cut = "".join(start).rfind(TURN) + len(TURN)
        if cut >= len(TURN):
            own = {side: row[side][cut:] for side in SIDES}
            return {**row, "prompt": row["chosen"][:cut], **own}
    return row


def as_rating(row: Any) -> Any:
    """`{"prompt", "response", "rating", "tools"?}`, also out of trl's `completion` and `label`."""
    if not isinstance(row, Mapping):
        return row
    row = {**row, "rating": row["label"]} if "label" in row and "rating" not in row else row
    if "completion" in row and "response" not in row:
        row = {**row, "response": row["completion"]}
    if any(isinstance(row.get(name), list) for name in ("prompt", "response")):
        prompt, response = _messages(row.get("prompt"), "user"), row.get("response")
        return {**row, "prompt": prompt, "response": _messages(response, "assistant")}
    return dict(row)


def _as_chats(row: Mapping[str, Any]) -> Row:
    """A row with a chat, all of it as messages."""
    chosen, rejected = (_messages(row.get(side), "assistant") for side in SIDES)
    prompt = _messages(row.get("prompt"), "user")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if start := len(_common(chosen[:-1], rejected[:-1])):
            prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    found = {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {key: value for key, value in found.items() if value is not None}


def _messages(given: Any, role: str) -> Any:
    """Messages; a text is one, of a role."""
    if isinstance(given, str):
        given = [{"role": role, "content": given}]
    return as_chat({"messages": given})["messages"] if isinstance(given, list) else given


def _common(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """What two sequences begin with."""
    pairs = zip(a, b, strict=False)
    return [x for x, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def whole(row: Mapping[str, Any], answer: str) -> Row:
    """A prompt and one of its answers, as a chat of which the answer is learned, or as a pair."""
    prompt, response = row["prompt"], row[answer]
    if not isinstance(prompt, list):
        return {"prompt": prompt, "response": response}
    before = [{**m, "weight": 0} if m.get("role") == "assistant" else m for m in prompt]
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {"messages": [*before, *response], **tools}


# -- what is wrong with a row


def check_preference(row: Row) -> Iterator[Finding]:
    """`{"prompt": ..., "chosen": ..., "rejected": ...}`, two answers that differ."""
    yield from _check(row, SIDES)
    if "chosen" in row and row["chosen"] == row.get("rejected"):
        yield "equal answers", "the answers chosen and rejected are the same: there is no choice"
    if "margin" in row and not _finite(row["margin"]):
        yield "margin", f"'margin' is {short(row['margin'])}, not a finite number"


def check_rating(row: Row) -> Iterator[Finding]:
    """`{"prompt": ..., "response": ..., "rating": ...}`, a good one's above 0."""
    yield from _check(row, ("response",))
    if "rating" not in row:
        yield "rating", "there is no 'rating', and no 'label', which is true of a good answer"
    elif not _finite(row["rating"]):
        yield "rating", f"'rating' is {short(row['rating'])}, neither true nor false nor finite"


def _check(row: Row, answers: Sequence[str]) -> Iterator[Finding]:
    missing = [name for name in ("prompt", *answers) if name not in row]
    if missing:
        there = ", ".join(map(repr, row)) or "none"
        yield missing[0], f"there is no {missing[0]!r}: the keys are {there}"
        return
    for answer in answers:
        if isinstance(row["prompt"], list) != isinstance(row[answer], list):
            yield answer, f"'prompt' and {answer!r} are both texts, or both lists of messages"
        elif isinstance(row["prompt"], list):
            yield from _check_messages(row, answer)
        else:
            pair = {"prompt": row["prompt"], "response": row[answer]}
            for kind, what in check_pair(pair):
                own = what.replace("'response'", repr(answer))
                if not (kind == "prompt" and answer != answers[0]):  # which was said already
                    yield kind, own


def _check_messages(row: Row, answer: str) -> Iterator[Finding]:
    prompt, own = row["prompt"], row[answer]
    if not own:
        yield answer, f"{answer!r} has no messages"
    elif not all(isinstance(message, dict) for message in (*prompt, *own)):
        yield "messages", f"{answer!r} has what is no object with a role and a content"
    else:
        for kind, what in check_chat(whole(row, answer)):
            yield kind, f"{answer!r}: {what}"


def _finite(given: Any) -> bool:
    return isinstance(given, bool | int | float) and math.isfinite(given)


PREFERENCE = Kind(as_preference, check_preference)
RATING = Kind(as_rating, check_rating)

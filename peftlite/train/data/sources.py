"""Sources: chats, pairs of prompt and response, and texts, out of a JSONL file or of rows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftlite.errors import PeftliteError
from peftlite.table import listed, short
from peftlite.train.data.checks import CHAT, PAIR, TEXT, check_counts
from peftlite.train.data.dataset import Data
from peftlite.train.data.jsonl import MILD, Kind, Lines, Path
from peftlite.train.data.packing import IGNORED
from peftlite.train.data.readers import UNUSED_TOOLS, chat_ids, pair_ids, template_options, text_ids
from peftlite.train.data.tokens import Tokenizer, as_tokenizer

Source = Path | Sequence[Any]


def chat(
    source: Source,
    tokenizer: Any = None,
    *,
    assistant_only: bool = True,
    max_length: int | None = None,
) -> Data:
    """Chats: `{"messages": [{"role": ..., "content": ..., "name"?: ...}, ...]}`, one a row.

    An example has `input_ids` (t) and `labels` (t): the same ids, −100 where none is learned. A
    message with `"weight": 0` or `"train": false` isn't learned. A row's `tools` go to the
    tokenizer's template; a warning says so where it has no use for them.

    Args:
        source: a JSONL file, of which a line is read when its example is asked for; or rows.
        tokenizer: one of transformers', whose chat template is used; a function from a text to ids;
            None for bytes. See `as_tokenizer`.
        assistant_only: learn the assistant's messages and their ends, and nothing else.
        max_length: tokens after which an example is cut off. A warning says if that leaves none to
            learn.

    Raises:
        FileError: a line of a file is no chat; `validate` reports all of them.
        PeftliteError: an argument isn't of these, a row is no chat, or the tokenizer's template
            doesn't take the first one.

    Example:
        messages = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]
        data = pl.data.chat([{"messages": messages}])
        assert (data[0]["labels"] != -100).sum() == 2  # the 3 and its end
    """
    check_counts(max_length=max_length)
    make = partial(_chat, as_tokenizer(tokenizer), assistant_only, max_length)
    chats = Data(_rows(source, CHAT), make)
    if len(chats):
        chats[0]  # a template that can't serve is an error here, not once training has begun
    return chats


def pairs(
    source: Source,
    tokenizer: Any = None,
    *,
    response_only: bool = True,
    max_length: int | None = None,
) -> Data:
    """Prompts and responses: `{"prompt": ..., "response": ...}`, or tuples of the two.

    No template is put around them: an example has the prompt, the response and the token that ends
    a text, as `input_ids` (t) and `labels` (t).

    Args:
        source, tokenizer, max_length: as in `chat`.
        response_only: learn the response and its end, and not the prompt.

    Raises:
        FileError: a line of a file is no pair.
        PeftliteError: an argument isn't of these, or a row is no pair.

    Example:
        data = pl.data.pairs([("1 + 2 = ", "3"), ("2 + 2 = ", "4")])
        print(data[0]["input_ids"], data[0]["labels"])
    """
    check_counts(max_length=max_length)
    make = partial(_pair, as_tokenizer(tokenizer), response_only, max_length)
    return Data(_rows(source, PAIR), make)


def text(source: Source, tokenizer: Any = None, *, length: int | None = None) -> Data:
    """Texts: `{"text": ...}`, or strings. Every token is learned.

    A text is an example, `input_ids` (t) and equal `labels` (t), or as many as it has pieces of
    `length` tokens, the last one shorter. The tokens are made now, and kept.

    Args:
        tokenizer: as in `chat`.
        length: of a piece, in tokens; None leaves texts in one.

    Raises:
        FileError: a line of a file is no text.
        PeftliteError: an argument isn't of these, or a row is no text.

    Example:
        data = pl.data.text(["How do I sort a list?"], length=8)
        assert data.lengths == [8, 8, 6]
    """
    check_counts(length=length)
    tokenizer, pieces = as_tokenizer(tokenizer), []
    for row in _rows(source, TEXT):
        ids = text_ids(tokenizer, row)
        pieces += torch.tensor(ids).split(length or len(ids))
    return Data(pieces, _piece)


def _chat(
    tokenizer: Tokenizer, assistant_only: bool, max_length: int | None, row: Mapping[str, Any]
) -> dict[str, Tensor]:
    if row.get("tools") and not tokenizer.takes_tools:
        warnings.warn(UNUSED_TOOLS, stacklevel=2)
    if assistant_only:
        return _example(*chat_ids(tokenizer, row), max_length)
    messages = row["messages"]
    if all(message.get("weight", 1) for message in messages):
        ids = tokenizer.render(messages, **template_options(tokenizer, row))
        return _example(ids, [1] * len(ids), max_length)
    ids, learned = chat_ids(tokenizer, row)
    _, said = chat_ids(tokenizer, {**row, "messages": [{**m, "weight": 1} for m in messages]})
    return _example(ids, [1 - s + x for s, x in zip(said, learned, strict=True)], max_length)


def _pair(
    tokenizer: Tokenizer, response_only: bool, max_length: int | None, row: Mapping[str, Any]
) -> dict[str, Tensor]:
    ids, mask = pair_ids(tokenizer, row)
    return _example(ids, mask if response_only else [1] * len(ids), max_length)


def _piece(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids.clone()}


def _example(ids: Sequence[int], mask: Sequence[int], max_length: int | None) -> dict[str, Tensor]:
    input_ids = torch.tensor(ids[:max_length])
    learned = torch.tensor(mask[:max_length]).bool()
    if any(mask) and not learned.any():
        warnings.warn(
            f"max_length={max_length} leaves some examples without a token to learn: raise it, or "
            "leave them out",
            stacklevel=2,
        )
    return {"input_ids": input_ids, "labels": input_ids.where(learned, IGNORED)}


def _rows(source: Source, kind: Kind) -> Any:
    """The rows of a file, or those given. Raises FileError or PeftliteError for unsound ones."""
    if isinstance(source, str | os.PathLike):
        return Lines(source, kind)
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise PeftliteError(
            f"give the path of a JSONL file, or a list of rows: not {short(source)}"
        )
    rows, problems = [kind.as_row(row) for row in source], []
    for i, row in enumerate(rows):
        dicts = isinstance(row, Mapping)
        found = kind.check(dict(row)) if dicts else [("", f"it is {short(row)}, no dict")]
        problems += [f"row {i}: {what}" for kind_, what in found if kind_ not in MILD]
    if problems:
        raise PeftliteError(f"the rows have problems: {listed(problems)}")
    return rows

"""Sources: chats, pairs of prompt and response, and texts, out of a JSONL file or of rows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftlite.errors import PeftliteError
from peftlite.table import listed, short
from peftlite.train.data.checks import check_chat, check_counts, check_pair, check_text
from peftlite.train.data.dataset import Data
from peftlite.train.data.jsonl import MILD, Check, Lines, Path
from peftlite.train.data.packing import IGNORED
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

    An example has `input_ids` (t) and `labels` (t): the same ids, −100 where none is learned.

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
    chats = Data(_rows(source, check_chat), make)
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
    return Data(_rows(source, check_pair, _pair_row), make)


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
    for row in _rows(source, check_text, _text_row):
        ids = [*tokenizer.start, *tokenizer.encode(row["text"]), *tokenizer.end]
        pieces += torch.tensor(ids).split(length or len(ids))
    return Data(pieces, _piece)


def _chat(
    tokenizer: Tokenizer, assistant_only: bool, max_length: int | None, row: Mapping[str, Any]
) -> dict[str, Tensor]:
    if not assistant_only:
        ids = tokenizer.render(row["messages"])
        return _example(ids, [1] * len(ids), max_length)
    return _example(*tokenizer.render_with_mask(row["messages"]), max_length)


def _pair(
    tokenizer: Tokenizer, response_only: bool, max_length: int | None, row: Mapping[str, Any]
) -> dict[str, Tensor]:
    prompt = [*tokenizer.start, *tokenizer.encode(row["prompt"])]
    response = [*tokenizer.encode(row["response"]), *tokenizer.end]
    mask = [int(not response_only)] * len(prompt) + [1] * len(response)
    return _example(prompt + response, mask, max_length)


def _pair_row(row: Any) -> Any:
    is_pair = isinstance(row, tuple | list) and len(row) == 2
    return {"prompt": row[0], "response": row[1]} if is_pair else row


def _text_row(row: Any) -> Any:
    return {"text": row} if isinstance(row, str) else row


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


def _rows(source: Source, check: Check, as_row: Callable[[Any], Any] | None = None) -> Any:
    """The rows of a file, or those given. Raises FileError or PeftliteError for unsound ones."""
    if isinstance(source, str | os.PathLike):
        return Lines(source, check)
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise PeftliteError(
            f"give the path of a JSONL file, or a list of rows: not {short(source)}"
        )
    rows = source if as_row is None else list(map(as_row, source))
    problems = []
    for i, row in enumerate(rows):
        found = check(row) if isinstance(row, Mapping) else [("", f"it is {short(row)}, no dict")]
        problems += [f"row {i}: {what}" for kind, what in found if kind not in MILD]
    if problems:
        raise PeftliteError(f"the rows have problems: {listed(problems)}")
    return rows

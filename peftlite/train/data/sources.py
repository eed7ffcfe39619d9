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

    An example has `input_ids` (t,) and `labels` (t,): the same ids, −100 where none is learned.

    Args:
        source: a JSONL file, of which a line is read when its example is asked for; or rows.
        tokenizer: one of transformers', whose chat template is used; a function from a text to ids;
            None for bytes. See `as_tokenizer`.
        assistant_only: learn the assistant's messages and their ends, and nothing else.
        max_length: tokens after which an example is cut off. A warning says if that leaves none to
            learn.

    Raises FileError, or PeftliteError for rows, if a row is no chat, of which `validate` tells all;
    and PeftliteError if the tokenizer's template doesn't take the first one.
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

    No template is put around them: an example is the prompt, the response and the token that ends
    a text. The arguments are those of `chat`.
    """
    check_counts(max_length=max_length)
    make = partial(_pair, as_tokenizer(tokenizer), response_only, max_length)
    return Data(_rows(source, check_pair, _pair_row), make)


def text(source: Source, tokenizer: Any = None, *, length: int | None = None) -> Data:
    """Texts: `{"text": ...}`, or strings. Every token is learned.

    A text is an example, or as many as it has pieces of `length` tokens, the last one shorter.
    The tokens are made now, and kept.
    """
    check_counts(length=length)
    coder, pieces = as_tokenizer(tokenizer), []
    for row in _rows(source, check_text, _text_row):
        ids = torch.tensor([*coder.start, *coder.encode(row["text"]), *coder.end])
        pieces += ids.split(length or len(ids))
    return Data(pieces, _piece)


def _chat(
    coder: Tokenizer, assistant_only: bool, max_length: int | None, row: Mapping[str, Any]
) -> dict[str, Tensor]:
    if not assistant_only:
        ids = coder.render(row["messages"])
        return _example(ids, [1] * len(ids), max_length)
    return _example(*coder.render_with_mask(row["messages"]), max_length)


def _pair(
    coder: Tokenizer, response_only: bool, max_length: int | None, row: Mapping[str, Any]
) -> dict[str, Tensor]:
    prompt = [*coder.start, *coder.encode(row["prompt"])]
    response = [*coder.encode(row["response"]), *coder.end]
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
    """The rows of a file, or those given, once all of them are sound."""
    if isinstance(source, str | os.PathLike):
        return Lines(source, check)
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise PeftliteError(
            f"give the path of a JSONL file, or a list of rows: not {short(source)}"
        )
    rows = source if as_row is None else list(map(as_row, source))
    wrong = []
    for i, row in enumerate(rows):
        found = (
            check(row) if isinstance(row, Mapping) else [("row", f"it is {short(row)}, no dict")]
        )
        wrong += [f"row {i}: {what}" for kind, what in found if kind not in MILD]
    if wrong:
        raise PeftliteError(f"the rows have problems: {listed(wrong)}")
    return rows

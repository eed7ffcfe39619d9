"""Sources: chats, pairs of prompt and response, and texts, out of a JSONL file or of rows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from peftlite.errors import PeftliteError
from peftlite.table import listed, short
from peftlite.train.data.checks import CHAT, PAIR, TEXT, check_counts
from peftlite.train.data.dataset import Data
from peftlite.train.data.jsonl import MILD, Kind, Lines, Path
from peftlite.train.data.packing import IGNORED
from peftlite.train.data.rated import PREFERENCE, RATING, SIDES
from peftlite.train.data.readers import (
    UNUSED_TOOLS,
    answer_ids,
    chat_ids,
    pair_ids,
    template_options,
    text_ids,
)
from peftlite.train.data.rows import without_nulls
from peftlite.train.data.stream import Stream, check_restarts, is_indexed, is_stream
from peftlite.train.data.tokens import Tokenizer, as_tokenizer

Source = Path | Sequence[Any] | Iterable[Any]


def chat(
    source: Source,
    tokenizer: Any = None,
    *,
    assistant_only: bool = True,
    max_length: int | None = None,
) -> Any:
    """Chats: `{"messages": [{"role": ..., "content": ..., "name"?: ...}, ...]}`, one a row.

    Gives `Data`, or a `Stream` out of one. An example has `input_ids` (t) and `labels` (t): the
    same ids, −100 where none is learned. A message with `"weight": 0` or `"train": false` isn't
    learned. A row's `tools` go to the tokenizer's template; a warning says so where it has no use
    for them.

    Args:
        source: a JSONL file, of which a line is read when its example is asked for; or rows: a
            list, a data set of `datasets`, or a stream, of which a `Stream` of examples is made.
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
    chats = _examples(source, CHAT, make)
    next(iter(chats), None)  # a template that can't serve is an error here, not in training
    return chats


def pairs(
    source: Source,
    tokenizer: Any = None,
    *,
    response_only: bool = True,
    max_length: int | None = None,
) -> Any:
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
    return _examples(source, PAIR, make)


def text(source: Source, tokenizer: Any = None, *, length: int | None = None) -> Any:
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
    texts = _examples(source, TEXT, partial(_pieces, as_tokenizer(tokenizer), length))
    if isinstance(texts, Stream):
        return Stream(_Chained(texts), _piece)
    return Data([piece for pieces in texts for piece in pieces], _piece)


def preference(source: Source, tokenizer: Any = None, *, max_length: int | None = None) -> Any:
    """Pairs of answers: `{"prompt": ..., "chosen": ..., "rejected": ...}`, one a row.

    Prompt and answers are texts, or lists of messages as in `chat`. Rows as trl, OpenAI and
    Anthropic have them are read, too. An example is `{"chosen": ..., "rejected": ...,
    "margin": ...}`: two examples, in each of which the answer is learned, and a number, 0 where a
    row has none. `collate` makes one batch of both: all that were chosen, then the others.

    Args:
        source, tokenizer: as in `chat`.
        max_length: tokens after which an example is cut off. Every row is looked at now.

    Raises:
        FileError: a line of a file is no pair of answers; `validate` reports all of them.
        PeftliteError: an argument isn't of these, a row is no pair of answers, or a prompt is as
            long as `max_length`, so that nothing is left of an answer.

    Example:
        rows = [{"prompt": "1 + 2 = ", "chosen": "3", "rejected": "4"}]
        batch = pl.data.collate(pl.data.preference(rows)[:])
        assert batch["input_ids"].shape == (2, 10)
    """
    check_counts(max_length=max_length)
    make = partial(_preference, as_tokenizer(tokenizer), max_length)
    return _looked_at(_examples(source, PREFERENCE, make), max_length)


def ratings(source: Source, tokenizer: Any = None, *, max_length: int | None = None) -> Any:
    """Answers with a rating: `{"prompt": ..., "response": ..., "rating": ...}`, one a row.

    A good answer's rating is true, or above 0. Rows as trl has them, of `completion` and `label`,
    are read, too. An example has `input_ids` (t), `labels` (t) and the `rating`, a scalar.

    Args:
        source, tokenizer, max_length: as in `preference`.

    Raises:
        FileError: a line of a file is no answer with a rating.
        PeftliteError: an argument isn't of these, a row is none, or a prompt is as long as
            `max_length`.

    Example:
        rows = [{"prompt": "1 + 2 = ", "response": str(n), "rating": n == 3} for n in (3, 4)]
        assert pl.data.collate(pl.data.ratings(rows)[:])["rating"].tolist() == [1, 0]
    """
    check_counts(max_length=max_length)
    make = partial(_rating, as_tokenizer(tokenizer), max_length)
    return _looked_at(_examples(source, RATING, make), max_length)


def _looked_at(data: Any, max_length: int | None) -> Any:
    """The same. Raises PeftliteError for rows of which too little is left, by their numbers."""
    if max_length is None or isinstance(data, Stream):
        next(iter(data), None)  # a template that can't serve is an error here, not in training
        return data
    faults = []
    for i in range(len(data)):
        try:
            data[i]
        except PeftliteError as error:
            faults.append(str(error))
    if faults:
        raise PeftliteError(f"the rows have problems: {listed(faults)}")
    return data


def _preference(
    tokenizer: Tokenizer, max_length: int | None, row: Mapping[str, Any]
) -> dict[str, Any]:
    sides = {side: _answer(tokenizer, row, side, max_length) for side in SIDES}
    return {**sides, "margin": torch.tensor(float(row.get("margin", 0)))}


def _rating(tokenizer: Tokenizer, max_length: int | None, row: Mapping[str, Any]) -> dict[str, Any]:
    own = _answer(tokenizer, row, "response", max_length)
    return {**own, "rating": torch.tensor(float(row["rating"]))}


def _answer(
    tokenizer: Tokenizer, row: Mapping[str, Any], answer: str, max_length: int | None
) -> dict[str, Tensor]:
    ids, mask = answer_ids(tokenizer, row, answer)
    if not any(mask[:max_length]):
        raise PeftliteError(
            f"the prompt has {mask.index(1)} tokens, so max_length={max_length} leaves nothing of "
            f"{answer!r}: raise it, or leave the row out"
        )
    return _example(ids, mask, max_length)


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


def _pieces(tokenizer: Tokenizer, length: int | None, row: Mapping[str, Any]) -> Sequence[Tensor]:
    ids = text_ids(tokenizer, row)
    return torch.tensor(ids).split(length or len(ids))


@dataclass(eq=False)
class _Chained(IterableDataset[Any]):
    """The parts of each item of a stream, one after another."""

    stream: Stream

    def __iter__(self) -> Iterator[Any]:
        return (part for parts in self.stream for part in parts)

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)


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


def _examples(source: Source, kind: Kind, make: Callable[[Any], Any]) -> Any:
    """Of a file's rows, or of those given. Raises FileError or PeftliteError for unsound ones."""
    if isinstance(source, str | os.PathLike):
        return Data(Lines(source, kind), make)
    if isinstance(source, Mapping):
        names = listed(f"{name!r}" for name in source)
        raise PeftliteError(f"give one of the parts, source[name]: it has {names}")
    if is_stream(source):
        check_restarts("source", source)
        return Stream(source, partial(_sound, kind, of_arrow(source), make))
    if not is_indexed(source):
        raise PeftliteError(
            f"give the path of a JSONL file, or a list of rows: not {short(source)}"
        )
    rows = Rows(source, kind)
    faults = ((i, what) for i, row in enumerate(rows) for what in _faults(kind, row))
    if problems := [f"row {i}: {what}" for i, what in faults]:
        raise PeftliteError(f"the rows have problems: {listed(problems)}")
    return Data(rows, make)


def _faults(kind: Kind, row: Any) -> list[str]:
    """What keeps a row from being an example."""
    if not isinstance(row, Mapping):
        return [f"it is {short(row)}, no dict"]
    return [what for name, what in kind.check(dict(row)) if name not in MILD]


def _sound(kind: Kind, arrow: bool, make: Callable[[Any], Any], given: Any) -> Any:
    """The example of a stream's row. Raises PeftliteError if there is something wrong with it."""
    row = kind.as_row(without_nulls(given) if arrow else given)
    if faults := _faults(kind, row):
        raise PeftliteError(listed(faults))
    return make(row)


class Rows(Sequence[Any]):
    """The rows of a list, or of a data set of `datasets`, in the form that is read here."""

    def __init__(self, source: Any, kind: Kind) -> None:
        self.source, self._kind, self._arrow = source, kind, of_arrow(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: Any) -> Any:
        return self._kind.as_row(without_nulls(self.source[i]) if self._arrow else self.source[i])


def of_arrow(source: Any) -> bool:
    """Whether it is of `datasets`: there, what a row lacks and others have is None."""
    return any(kind.__module__.partition(".")[0] == "datasets" for kind in type(source).__mro__)

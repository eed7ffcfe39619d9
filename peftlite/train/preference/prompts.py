"""Prompts: their ids, looked at before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from peftlite.core.find import find
from peftlite.core.site import output_head
from peftlite.errors import PeftliteError
from peftlite.table import listed, short
from peftlite.train.data.tokens import Tokenizer


def check_prompts(
    model: nn.Module, prompts: Sequence[Any], coder: Tokenizer, new: int, what: str = "prompts"
) -> None:
    """Raises PeftliteError, with their numbers, for prompts that the model can't answer.

    Args:
        new: tokens that an answer has at most.
    """
    root = (find(model) or [model])[0]
    known = _vocabulary(root)
    _check_specials(coder, known)
    places = getattr(getattr(root, "config", None), "max_position_embeddings", None)
    problems = [
        f"row {i}: {fault}"
        for i, prompt in enumerate(prompts)
        for fault in _faults(prompt, coder, known, places, new)
    ]
    if problems:
        raise PeftliteError(f"the {what} have problems: {listed(problems)}")


def ids_of(prompt: Any, coder: Tokenizer) -> list[int]:
    """Of a text, or of a chat and what opens the assistant's answer."""
    if isinstance(prompt, str):
        return [*coder.start, *coder.encode(prompt)]
    return coder.render(prompt, prompt=True)


def _faults(
    prompt: Any, coder: Tokenizer, known: int | None, places: int | None, new: int
) -> Iterator[str]:
    if not isinstance(prompt, str) and not _is_chat(prompt):
        yield f"{short(prompt)} is neither a text nor a list of messages"
        return
    ids = ids_of(prompt, coder)
    if not ids:
        yield "it is empty"
    elif known is not None and max(ids) >= known:
        yield f"its ids go up to {max(ids)}, and the model knows {known}: give its own tokenizer"
    elif places is not None and len(ids) + new > places:
        yield (
            f"with an answer of {new} tokens it has {len(ids) + new}, and the model takes "
            f"{places}: leave it out, or give less max_new_tokens"
        )


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) for m in prompt)


def _check_specials(coder: Tokenizer, known: int | None) -> None:
    """Raises PeftliteError unless an answer can end, and be padded."""
    if not coder.end:
        raise PeftliteError(
            "the tokenizer has no token that ends an answer, nor one to pad with: set "
            "tokenizer.eos_token, or the end of a class of yours"
        )
    unknown = [i for i in (*coder.end, coder.pad) if known is not None and i >= known]
    if unknown:
        raise PeftliteError(
            f"the tokenizer ends an answer by {listed(map(str, coder.end))} and pads by "
            f"{coder.pad}, and the model knows ids below {known}: give its own tokenizer, or set "
            "the end and the pad of a class of yours"
        )


def _vocabulary(model: nn.Module) -> int | None:
    """How many ids a model has outputs for, if that is to be seen."""
    head = output_head(model)
    weight = getattr(head, "weight", None)
    return None if weight is None else weight.shape[0]

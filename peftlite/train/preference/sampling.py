"""Sampling: what a model answers to many prompts at once, and what it was that answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peftlite.core.choice import Names
from peftlite.core.find import require
from peftlite.errors import PeftliteError
from peftlite.fields import check_fields, integer, number
from peftlite.table import listed
from peftlite.train.data.tokens import Tokenizer
from peftlite.train.given import digest
from peftlite.train.modes import evaluating
from peftlite.train.outputs import logits_of
from peftlite.train.preference.told import current


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: up to so many, from the model's own distribution at a temperature."""

    max_new_tokens: int = integer(64)
    temperature: float = number(1.0, float, lambda x: x >= 0, "0 or above")

    def __post_init__(self) -> None:
        check_fields(self)


def digest_of(model: nn.Module, names: Names) -> str:
    """What deltas are, by their names and every number of theirs."""
    deltas = require(model)[1].deltas
    return digest({name: dict(deltas[name].state_dict()) for name in names})


@torch.no_grad()
def sample(
    model: nn.Module, prompts: Sequence[Sequence[int]], coder: Tokenizer, how: Sampling
) -> list[Tensor]:
    """The ids of an answer to each prompt, its end among them if it came to one.

    What answered is asserted to be what is chosen: deltas are compared by their digest in the first
    call of the model with what they are outside. Raises PeftliteError if it is something else.
    """
    asked = current(model)
    expected = digest_of(model, asked)
    with evaluating(model), _seen(model) as ran:
        write = _generate if hasattr(model, "generate") else _by_hand
        answers = write(model, prompts, coder, how)
    if ran != [expected]:
        names = listed(map(repr, asked)) or "no delta"
        raise PeftliteError(
            f"what sampled isn't what trains: with {names} chosen, of digest {expected}, the model "
            f"ran deltas of digest {listed(ran) or 'none'}"
        )
    return answers


@contextmanager
def _seen(model: nn.Module) -> Iterator[list[str]]:
    """The digests of the deltas that calls of the model run: of each set of names, the first."""
    root, registry = require(model)
    found: dict[Any, str] = {}

    def look(*_: Any) -> None:
        names: Any = registry.choice.now()
        if names not in found:
            found[names] = digest_of(model, names if isinstance(names, tuple) else ())
            ran.append(found[names])

    ran: list[str] = []
    hook = root.register_forward_pre_hook(look)
    try:
        yield ran
    finally:
        hook.remove()


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], coder: Tokenizer, how: Sampling
) -> list[Tensor]:
    """By transformers' `generate`, with its KV cache; of the model's own settings none is used."""
    device = next(model.parameters()).device
    rows = [torch.tensor(ids, device=device).flip(0) for ids in prompts]  # padded on the left
    ids = pad_sequence(rows, batch_first=True, padding_value=coder.pad).flip(1)
    lengths = torch.tensor([len(row) for row in prompts], device=device)
    there = torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]
    drawn = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    given = type(model.generation_config)(
        max_new_tokens=how.max_new_tokens, use_cache=True, pad_token_id=coder.pad,
        eos_token_id=[*coder.end] or None, **(drawn if how.temperature else {"do_sample": False}),
    )  # fmt: skip
    written = model.generate(input_ids=ids, attention_mask=there.to(ids), generation_config=given)
    return [_to_its_end(row, coder) for row in written[:, ids.shape[1] :]]


def _by_hand(
    model: nn.Module, prompts: Sequence[Sequence[int]], coder: Tokenizer, how: Sampling
) -> list[Tensor]:
    """Of a model that has no cache: padded on the right, where no token looks."""
    device = next(model.parameters()).device
    b, start = len(prompts), torch.tensor([len(row) for row in prompts], device=device)
    room = int(start.max()) + how.max_new_tokens
    ids = torch.full((b, room), coder.pad, device=device)
    for row, own in zip(ids, prompts, strict=True):
        row[: len(own)] = torch.tensor(own, device=device)
    rows, ended = torch.arange(b, device=device), torch.zeros(b, dtype=torch.bool, device=device)
    ends = torch.tensor([*coder.end], device=device)
    for n in range(how.max_new_tokens):
        logits = logits_of(model, ids[:, : int(start.max()) + n])[rows, start + n - 1].float()
        token = _drawn(logits, how.temperature)
        ids[rows, start + n] = token.where(~ended, coder.pad)
        ended |= torch.isin(token, ends)
        if ended.all():
            break
    return [_to_its_end(ids[i, start[i] : start[i] + how.max_new_tokens], coder) for i in range(b)]


def _drawn(logits: Tensor, temperature: float) -> Tensor:
    if not temperature:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]


def _to_its_end(answer: Tensor, coder: Tokenizer) -> Tensor:
    """An answer up to the first end, with it."""
    if not coder.end:
        return answer
    ends = torch.isin(answer, torch.tensor([*coder.end], device=answer.device)).nonzero()
    return answer[: int(ends[0]) + 1] if len(ends) else answer

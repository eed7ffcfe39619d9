"""Augmentations of texts and tensors: each a callable `(x, generator) -> x`, made to be chained.

    wordy = Chain(WordDropout(0.1), Maybe(Casing(), 0.5))
    train = train.augment(OnRole("user", wordy), seed=0)

All chance comes from the generator, so the same one gives the same result. They change nothing in
place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from peftlite.errors import PeftliteError
from peftlite.fields import check_fields, number, positive

Augmentation = Callable[[Any, Generator], Any]


class _Checked:
    """An augmentation whose settings are checked when it is made."""

    def __post_init__(self) -> None:
        check_fields(self)


def _probability(default: float) -> Any:
    return number(default, float, lambda p: 0 <= p <= 1, "in [0, 1]")


def _chance(generator: Generator) -> float:
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def _index(n: int, generator: Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


# -- of anything


class Chain:
    """One augmentation after another."""

    def __init__(self, *steps: Augmentation) -> None:
        self.steps = steps

    def __call__(self, x: Any, generator: Generator) -> Any:
        for step in self.steps:
            x = step(x, generator)
        return x


@dataclass(frozen=True)
class Maybe(_Checked):
    """An augmentation, with probability p."""

    step: Augmentation
    p: float = _probability(0.5)

    def __call__(self, x: Any, generator: Generator) -> Any:
        return self.step(x, generator) if _chance(generator) < self.p else x


@dataclass(frozen=True)
class OnKey:
    """An augmentation of one field of a row: a pair's "prompt", an image under "x"."""

    key: str
    step: Augmentation

    def __call__(self, row: Mapping[str, Any], generator: Generator) -> dict[str, Any]:
        return {**row, self.key: self.step(row[self.key], generator)}


@dataclass(frozen=True)
class OnRole:
    """An augmentation of what one role says in a chat: "user", as a rule."""

    role: str
    step: Augmentation

    def __call__(self, row: Mapping[str, Any], generator: Generator) -> dict[str, Any]:
        messages = [
            {**m, "content": self.step(m["content"], generator)} if m["role"] == self.role else m
            for m in row["messages"]
        ]
        return {**row, "messages": messages}


# -- of texts: words are what white space parts, which itself stays as it is


@dataclass(frozen=True)
class WordDropout(_Checked):
    """Leaves out each word with probability p, but never all of them."""

    p: float = _probability(0.1)

    def __call__(self, text: str, generator: Generator) -> str:
        words = re.findall(r"\S+\s*", text)
        lead = text[: len(text) - sum(map(len, words))]
        kept = [word for word in words if _chance(generator) >= self.p]
        if words and not kept:
            kept = [words[_index(len(words), generator)]]
        return lead + "".join(kept)


@dataclass(frozen=True)
class WordSwap(_Checked):
    """Swaps each word with the next one with probability p; a word moves at most once."""

    p: float = _probability(0.1)

    def __call__(self, text: str, generator: Generator) -> str:
        parts = re.split(r"(\s+)", text)
        words = [i for i, part in enumerate(parts) if part and not part.isspace()]
        k = 0
        while k + 1 < len(words):
            if _chance(generator) < self.p:
                i, j = words[k], words[k + 1]
                parts[i], parts[j] = parts[j], parts[i]
                k += 1
            k += 1
        return "".join(parts)


@dataclass(frozen=True)
class Casing:
    """All lower case, all upper case, or the first letter of each word in upper case."""

    def __call__(self, text: str, generator: Generator) -> str:
        return (str.lower, str.upper, str.title)[_index(3, generator)](text)


@dataclass(frozen=True)
class Synonyms(_Checked):
    """Puts a synonym in a word's place with probability p; a capital stays one.

    Args:
        words: for a word in lower case, what may stand for it: `{"big": ["large", "huge"]}`.
    """

    words: Mapping[str, Sequence[str]]
    p: float = _probability(0.1)

    def __call__(self, text: str, generator: Generator) -> str:
        def other(match: re.Match[str]) -> str:
            word = match[0]
            choices = self.words.get(word.lower())
            if not choices or _chance(generator) >= self.p:
                return word
            chosen = choices[_index(len(choices), generator)]
            return chosen[:1].upper() + chosen[1:] if word[0].isupper() else chosen

        return re.sub(r"\w+", other, text)


# -- of tensors: sizes are of the last dimensions


@dataclass(frozen=True)
class Noise(_Checked):
    """x + std · N(0, 1)"""

    std: float = number(0.1, float, lambda std: 0 <= std < math.inf, "finite and from 0 up")

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        return x + self.std * torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)


@dataclass(frozen=True)
class Flip(_Checked):
    """The other way round along a dimension, with probability p."""

    p: float = _probability(0.5)
    dim: int = -1

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        return x.flip(self.dim) if _chance(generator) < self.p else x


@dataclass(frozen=True)
class Cutout:
    """Zeros in a window of the last dimensions, anywhere; it may stick out (arXiv:1708.04552)."""

    size: tuple[int, ...]

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        window = []
        for length, side in zip(x.shape[-len(self.size) :], self.size, strict=True):
            start = _index(length, generator) - side // 2
            window.append(slice(max(start, 0), max(start + side, 0)))
        x = x.clone()
        x[(..., *window)] = 0
        return x


@dataclass(frozen=True)
class Crop:
    """A window of the last dimensions, anywhere, of x with `padding` zeros around it."""

    size: tuple[int, ...]
    padding: int = 0

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        x = torch.nn.functional.pad(x, [self.padding] * 2 * len(self.size))
        window = []
        for length, side in zip(x.shape[-len(self.size) :], self.size, strict=True):
            if side > length:
                raise PeftliteError(f"a window of {side} can't be cropped out of {length}")
            start = _index(length - side + 1, generator)
            window.append(slice(start, start + side))
        return x[(..., *window)]


@dataclass(frozen=True)
class Mixup(_Checked):
    """λ x + (1 − λ) x′ over a batch, λ ~ Beta(α, α), x′ its rows shuffled (arXiv:1710.09412).

    Every tensor of the batch is mixed alike, so labels are probabilities, one-hot to begin with.
    """

    alpha: float = positive(0.2)

    def __call__(self, batch: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        for key, x in batch.items():
            if not x.is_floating_point():
                raise PeftliteError(
                    f"{key!r} is {x.dtype} and can't be mixed: give labels as "
                    "nn.functional.one_hot(labels, classes).float()"
                )
        b = len(next(iter(batch.values())))
        other = torch.randperm(b, generator=generator)
        share = np.random.default_rng(_index(2**63 - 1, generator)).beta(self.alpha, self.alpha)
        return {key: share * x + (1 - share) * x[other.to(x.device)] for key, x in batch.items()}

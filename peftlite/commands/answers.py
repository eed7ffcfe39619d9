"""Answers: what a local model writes after a text or a chat, by itself or with deltas."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftlite.commands import local
from peftlite.errors import PeftliteError
from peftlite.fields import check_fields, integer, number
from peftlite.io.load import load
from peftlite.table import listed
from peftlite.train.data import as_tokenizer
from peftlite.train.data.readers import template_options
from peftlite.train.data.tokens import Message, Tokenizer
from peftlite.train.parallel import local_device
from peftlite.train.state import fork_rng
from peftlite.verbs.use import use, using

BASE = "base"  # the name of the model by itself
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
Prompt = str | Sequence[Message]
Show = Callable[[str], Any]


@dataclass(frozen=True)
class Style:
    """How tokens are drawn: the likeliest one next, unless a setting of chance is given."""

    max_new_tokens: int = integer(128)
    temperature: float | None = number(
        None, float, lambda x: 0 <= x < math.inf, "finite and from 0 up"
    )
    top_k: int | None = integer(None)
    top_p: float | None = number(None, float, lambda p: 0 < p <= 1, "in (0, 1]")
    seed: int = number(0, int, lambda n: 0 <= n < 2**63, "from 0 up to 2**63 - 1")

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Style:
        """As a command line has it."""
        given = {each.name: getattr(args, each.name, each.default) for each in fields(cls)}
        return cls(**given)

    @property
    def sampling(self) -> dict[str, Any]:
        """As transformers' `generate` takes it; the rest is as the model's folder has it."""
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        given = {name: value for name, value in given.items() if value is not None}
        return {"do_sample": True, **given} if given and self.temperature != 0 else GREEDY


def opening(args: argparse.Namespace) -> list[Message]:
    """What opens each chat, as a command line has it."""
    return [] if args.system is None else [{"role": "system", "content": args.system}]


class Writer:
    """A local model, its tokenizer and its deltas, which write."""

    def __init__(self, args: argparse.Namespace) -> None:
        """As a command line has it, with its deltas, none of which is chosen."""
        self.style, self.check_base = Style.of(args), args.check_base
        self.tokenizer: Any = local.tokenizer(args.model)
        self.coder: Tokenizer = as_tokenizer(self.tokenizer)
        device = local.device(args.device or local_device())
        self.model: Any = local.model(args.model, args.dtype, args.quantize).to(device)
        self.deltas: dict[str, str] = {}  # in the model, by what they are called here

        for given in (*args.deltas, *(getattr(args, "delta", None) or ())):
            self.load(given)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer knows how a chat is written."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def load(self, given: str) -> str:
        """Loads `NAME=PATH`, or a path whose stem is the name; returns the name."""
        name, named, path = given.partition("=")
        taken = (BASE, *self.deltas)
        if not named or Path(given).exists():
            stem, path = Path(given).resolve().stem, given
            name = given if stem in taken else stem
        if name in taken:
            raise PeftliteError(f"{name!r} is taken: give another, NAME={path}")
        self.deltas[name] = load(
            self.model, path, f"d{len(self.deltas)}", check_base=self.check_base
        ).name
        use(self.model, None)
        return name

    def choice(self, given: str) -> list[str]:
        """The deltas of `NAME`, of several joined by +, or of `base`, which are none."""
        names = [given] if given in (BASE, *self.deltas) else given.split("+")
        if unknown := [name for name in names if name not in (BASE, *self.deltas)]:
            there = listed([BASE, *self.deltas], 99)
            raise PeftliteError(f"no delta is called {unknown[0]!r}; there are {there}")
        return [self.deltas[name] for name in names if name != BASE]

    def ids(self, prompt: Prompt, tools: list[Any] | None = None) -> list[int]:
        """The ids of a text, or of a chat and what opens the assistant's answer."""
        if isinstance(prompt, str):
            ids = [*self.coder.start, *self.coder.encode(prompt)]
        else:
            options = template_options(self.coder, {"tools": tools})
            ids = self.coder.render(prompt, prompt=True, **options)
        most = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        if not 0 < len(ids) < most:
            raise PeftliteError(
                f"the prompt has {len(ids)} tokens, and this model takes 1 to {most - 1}"
            )
        return ids

    def answer(
        self,
        prompt: Prompt,
        choice: str = BASE,
        tools: list[Any] | None = None,
        show: Show | None = None,
    ) -> str:
        """What the model writes with a choice of deltas; `show` is given it bit by bit."""
        ids, deltas = self.ids(prompt, tools), self.choice(choice)
        given = torch.tensor([ids], device=self.model.device)
        stream = None if show is None else Stream(self.tokenizer, show)
        chosen = using(self.model, deltas) if self.deltas else nullcontext()
        with torch.no_grad(), chosen, fork_rng(given.device, self.style.seed):
            written = self.model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), streamer=stream,
                max_new_tokens=self.style.max_new_tokens, eos_token_id=self.ends(prompt) or None,
                pad_token_id=self.coder.pad, **self.style.sampling,
            )  # fmt: skip
        return self.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)

    def ends(self, prompt: Prompt) -> list[int]:
        """The tokens that end an answer; of a chat, also the special ones its template puts there.

        Those are what a delta learns to end with, whatever the model's own end is.
        """
        ends = np.atleast_1d(self.model.generation_config.eos_token_id or []).tolist()
        if isinstance(prompt, str):
            return ends
        try:
            ids, mask = self.coder.render_with_mask(
                [*prompt, {"role": "assistant", "content": "."}]
            )
        except PeftliteError:  # no template of a kind that tells
            return ends
        special = self.tokenizer.added_tokens_decoder
        return ends + [
            i for i, answered in zip(ids, mask, strict=True) if answered and i in special
        ]


class Stream:
    """What `generate` hands its tokens to: shows the text as far as later tokens won't change it.

    transformers' own forgets what was before a new line, by which some tokenizers space words.
    """

    HELD = 4  # letters: of a character in several tokens, and of spaces that are cleaned away

    def __init__(self, tokenizer: Any, show: Show) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] | None = None  # before the prompt, which comes first
        self.shown = 0

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self._show_to(-self.HELD)

    def end(self) -> None:
        self._show_to(None)

    def _show_to(self, end: int | None) -> None:
        text = self.tokenizer.decode(self.ids or [], skip_special_tokens=True)[:end]
        self.show(text[self.shown :])
        self.shown = max(self.shown, len(text))

"""compare: what a model writes by itself and with each delta, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from peftlite.commands import local
from peftlite.commands.outcome import Outcome
from peftlite.errors import PeftliteError
from peftlite.io.load import load
from peftlite.table import table
from peftlite.train.data import as_tokenizer
from peftlite.train.data.checks import check_chat, check_pair
from peftlite.train.data.jsonl import Finding, Kind, Lines
from peftlite.train.data.readers import has_rows, plain_text, template_options
from peftlite.train.data.rows import Row, as_chat, as_pair
from peftlite.train.data.tokens import Message, Tokenizer
from peftlite.verbs.use import using


@dataclass
class Question:
    """A prompt, text or the messages of a chat; the answer wanted, if one is; and those given.

    tools: what a chat's assistant can call.
    """

    prompt: Any
    wanted: str | None
    tools: list[Any] | None = None
    answers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        prompt = self.prompt
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        wanted = {} if self.wanted is None else {"wanted": self.wanted}
        parts = {"prompt": prompt, **wanted, **self.answers}
        width = max(map(len, parts))
        return "\n".join(
            f"{name.rjust(width)}  {text}".replace("\n", "\n" + " " * (width + 2))
            for name, text in parts.items()
        )


def run_compare(args: argparse.Namespace) -> Outcome:
    questions = list(_questions(args.prompts))
    model, tokenizer = local.model(args.model), local.tokenizer(args.model)
    names: dict[str, str | None] = {"base": None}
    for path in args.deltas:
        stem = Path(path).stem
        names[path if stem in names else stem] = load(model, path, name=f"d{len(names)}").name
    for question in tqdm(questions, "compare", unit="prompt", disable=None, leave=False):
        for name, delta in names.items():
            with using(model, delta):
                answer = _answer(model, tokenizer, question, args.max_new_tokens)
                question.answers[name] = answer
    asked = [(q.answers, q.wanted.strip()) for q in questions if q.wanted is not None]
    hits = {name: sum(own[name].strip() == wanted for own, wanted in asked) for name in names}
    texts = [*map(str, questions)]
    if asked:
        texts.append(
            table(["", f"as wanted, of {len(asked)}"], [[n, str(h)] for n, h in hits.items()])
        )
    data = {"questions": [asdict(question) for question in questions], "as_wanted": hits}
    return Outcome("\n\n".join(texts), data)


def _questions(path: str) -> Iterator[Question]:
    """A prompt a line: plain text, or, in a file that has rows, a pair or a chat."""
    if not has_rows(path):
        yield from (Question(line, None) for line in plain_text(path).splitlines() if line.strip())
        return
    for row in Lines(path, Kind(_as_row, _check)):
        *asked, last = row.get("messages", [row])
        if "messages" not in row:
            yield Question(row["prompt"], row.get("response"))
        elif last["role"] == "assistant":
            yield Question(asked, last["content"], row.get("tools"))
        else:
            yield Question(row["messages"], None, row.get("tools"))


def _as_row(row: Row) -> Row:
    chat = as_chat(row)
    return chat if "messages" in chat else as_pair(row)


def _check(row: Row) -> Iterator[Finding]:
    """What keeps a row from being a prompt: that it lacks an answer doesn't."""
    check, missing = (check_chat, "last message") if "messages" in row else (check_pair, "response")
    return ((kind, what) for kind, what in check(row) if kind not in (missing, "weight"))


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, question: Question, most: int) -> str:
    """What the model writes, always the likeliest token next."""
    coder, prompt = as_tokenizer(tokenizer), question.prompt
    ends = np.atleast_1d(model.generation_config.eos_token_id or []).tolist()
    if isinstance(prompt, str):
        ids = [*coder.start, *coder.encode(prompt)]
    else:
        options = template_options(coder, {"tools": question.tools})
        ids = coder.render(prompt, prompt=True, **options)
        ends += _closing(tokenizer, coder, prompt)
    given = torch.tensor([ids])
    written = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=most,
        do_sample=False, temperature=None, top_p=None, top_k=None,
        eos_token_id=ends or None, pad_token_id=coder.pad,
    )  # fmt: skip
    return tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)


def _closing(tokenizer: Any, coder: Tokenizer, prompt: list[Message]) -> list[int]:
    """The special tokens that a chat's template puts after an answer."""
    try:
        ids, mask = coder.render_with_mask([*prompt, {"role": "assistant", "content": "."}])
    except PeftliteError:  # no template of a kind that tells
        return []
    special = tokenizer.added_tokens_decoder
    return [i for i, answered in zip(ids, mask, strict=True) if answered and i in special]

"""generate: what a model writes after prompts, with deltas."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

from peftlite.commands.answers import BASE, Prompt, Writer, opening
from peftlite.commands.outcome import Outcome
from peftlite.commands.questions import Question, a_line_each, questions
from peftlite.errors import FileError, PeftliteError
from peftlite.progress import bar


def run_generate(args: argparse.Namespace) -> Outcome | int:
    asked = list(_asked(args))
    if not asked:
        raise PeftliteError("there is nothing to answer: give a --prompt, or a --prompt-file")
    writer = Writer(args)
    prompts = [_as_chat(writer, args, question.prompt) for question in asked]
    choices = _choices(args, [*writer.deltas] or [BASE], len(asked))
    jobs = list(zip(asked, prompts, choices, strict=True))
    for question, prompt, names in jobs:  # before the first is answered
        writer.ids(prompt, question.tools)
        [writer.choice(name) for name in names]
    if not args.json and len(asked) == len(choices[0]) == 1:
        show = partial(print, end="", flush=True)
        writer.answer(prompts[0], choices[0][0], asked[0].tools, show)
        print()
        return 0
    for question, prompt, names in bar(jobs, "generate", unit="prompt", leave=False):
        for name in names:
            question.answers[name] = writer.answer(prompt, name, question.tools)
    found = [{"prompt": question.prompt, "answers": question.answers} for question in asked]
    return Outcome("\n\n".join(map(str, asked)), {"questions": found})


def _asked(args: argparse.Namespace) -> Iterator[Question]:
    """The prompts as they were given: `-` is stdin, all of it or, for a file, each of its lines."""
    for text in args.prompt or []:
        yield Question(_stdin().rstrip("\n") if text == "-" else text)
    if args.prompt_file == "-":
        yield from a_line_each(_stdin())
    elif args.prompt_file is not None:
        yield from questions(args.prompt_file)


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except ValueError as error:
        raise FileError(f"stdin can't be read as text: {error}") from error


def _as_chat(writer: Writer, args: argparse.Namespace, prompt: Prompt) -> Prompt:
    """A text as a chat of one message, where the tokenizer has a template for such."""
    system = opening(args)
    if isinstance(prompt, str) and (args.raw or not writer.has_template):
        if system:
            why = "--raw is given" if args.raw else "the tokenizer has no chat template"
            raise PeftliteError(f"--system opens a chat, and {why}: write it into the prompt")
        return prompt
    return [
        *system,
        *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt),
    ]


def _choices(args: argparse.Namespace, names: list[str], count: int) -> list[list[str]]:
    """Who answers each of so many prompts, by name."""
    given = args.use or []
    if len(given) > 1 and len(given) != count:
        raise PeftliteError(
            f"--use has {len(given)} names for {count} prompts: give one for all, or one for each"
        )
    rows = [[name] for name in given * (count if len(given) == 1 else 1)] or [names] * count
    return [list(dict.fromkeys([BASE] * args.without + row)) for row in rows]

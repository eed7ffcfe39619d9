"""chat: a conversation with a model and its deltas, a line a turn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from peftlite.commands.answers import BASE, Writer, opening
from peftlite.errors import PeftliteError

HELP = """\
/use NAME    answer with a delta, with several as NAME+NAME
/off         answer with the model by itself
/load PATH   take up another delta, and use it; NAME=PATH gives it a name
/retry       answer the last message again
/reset       forget what was said
/quit        leave, as Ctrl-D does; Ctrl-C ends an answer"""


def run_chat(args: argparse.Namespace) -> int:
    writer = Writer(args)
    if not writer.has_template:
        raise PeftliteError(
            f"{args.model!r} has no chat template, by which a chat is written: peftlite generate "
            "goes on from a text; or set tokenizer.chat_template, for one to pl.data.CHATML, and "
            f"tokenizer.save_pretrained({args.model!r})"
        )
    chat = Chat(writer, "+".join(writer.deltas) or BASE, opening(args))
    live = sys.stdin.isatty()
    if live:
        _tell(f"{HELP}\nwith {chat.name}")
    failed = False
    for line in _lines("> " if live else ""):
        try:
            if not chat.take(line):
                break
        except PeftliteError as error:
            _tell(f"peftlite: {error}")
            failed = True
        except KeyboardInterrupt:
            if not live:
                raise
            _tell("")
    if live:
        _tell("")
    return 2 * (failed and not live)


def _lines(prompt: str) -> Iterator[str]:
    """What is typed, until it ends."""
    if prompt:
        with suppress(ImportError):
            import readline  # noqa: F401 # which gives `input` a history and an editor
    with suppress(EOFError):
        while True:
            yield input(prompt)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass
class Chat:
    """What was said, and who answers: by name, as `Writer.choice` has it."""

    writer: Writer
    name: str
    opening: list[Any]
    said: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commands: dict[str, Callable[[str], Any]] = {
            "/use": self.use, "/off": lambda _: self.use(BASE), "/load": self.load,
            "/retry": self.retry, "/reset": lambda _: self.said.clear(),
            "/help": lambda _: _tell(HELP),
        }  # fmt: skip

    def take(self, line: str) -> bool:
        """Does what a line asks for, or answers it; False to leave. Raises PeftliteError."""
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return False
        if word in self.commands:
            self.commands[word](rest.strip())
        elif word.startswith("/"):
            raise PeftliteError(f"there is no {word}: there are {', '.join(self.commands)}, /quit")
        elif word:
            self.answer(line)
        return True

    def answer(self, line: str) -> None:
        """Says what the model answers; a turn that fails wasn't."""
        asked = {"role": "user", "content": line}
        prompt = [*self.opening, *self.said, asked]
        show = partial(print, end="", flush=True)
        text = self.writer.answer(prompt, self.name, show=show)
        print(flush=True)
        self.said += [asked, {"role": "assistant", "content": text}]
        style = self.writer.style
        self.writer.style = replace(style, seed=style.seed + 1)

    def use(self, name: str) -> None:
        self.writer.choice(name)
        self.name = name
        _tell(f"with {name}")

    def retry(self, _: str) -> None:
        """Answers the last message anew; if that fails, the answer that it had stays."""
        if not self.said:
            raise PeftliteError("/retry answers the last message again, and none was answered")
        was, self.said = self.said, self.said[:-2]
        try:
            self.answer(was[-2]["content"])
        except BaseException:
            self.said = was
            raise

    def load(self, given: str) -> None:
        if not given:
            raise PeftliteError("/load takes the path of a delta's file")
        self.use(self.writer.load(given))

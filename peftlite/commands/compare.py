"""compare: what a model writes by itself and with each delta, side by side."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from peftlite.commands.answers import BASE, Writer
from peftlite.commands.outcome import Outcome
from peftlite.commands.questions import questions
from peftlite.progress import bar
from peftlite.table import table


def run_compare(args: argparse.Namespace) -> Outcome:
    asked = list(questions(args.prompts))
    writer = Writer(args)
    names = [BASE, *writer.deltas]
    for question in bar(asked, "compare", unit="prompt", leave=False):
        for name in names:
            question.answers[name] = writer.answer(question.prompt, name, question.tools)
    known = [(q.answers, q.wanted.strip()) for q in asked if q.wanted is not None]
    hits = {name: sum(own[name].strip() == wanted for own, wanted in known) for name in names}
    texts = [*map(str, asked)]
    if known:
        texts.append(
            table(["", f"as wanted, of {len(known)}"], [[n, str(h)] for n, h in hits.items()])
        )
    data = {"questions": [asdict(question) for question in asked], "as_wanted": hits}
    return Outcome("\n\n".join(texts), data)

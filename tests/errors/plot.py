"""The errors of pl.plot, and of what it measures."""

import sys
from unittest import mock

import peftlite as pl
from tests.errors.case import SMALL, Case, bare, delta, two


def without_matplotlib(run: pl.History) -> None:
    with mock.patch.dict(sys.modules, {"peftlite.plot.picture": None}):
        pl.plot.history(run)


QUALITY = (
    "quality takes by name the parameters, or a delta that has them, and a score, such as {'LoRA': "
    "(delta, 0.9), 'BitFit': (1024, 0.8)}: not "
)
HOMES = " must be attached to one model, and that be there: pl.load the files into it"

CASES = [
    Case(lambda *_: without_matplotlib(pl.History()),
         'pl.plot draws with matplotlib, which isn\'t installed: pip install "peftlite[plot]"'),
    Case(lambda *_: pl.plot.change(pl.plan(bare(), SMALL).delta), f"'plan'{HOMES}"),
    Case(lambda model, _: pl.plot.similarity([delta(model), pl.attach(bare(), SMALL)]),
         f"'sql'; 'default'{HOMES}"),
    Case(lambda model, _: pl.plot.similarity(["sql", "chat"]),
         "similarity takes deltas, such as pl.deltas(model) gives: not ['sql', 'chat']"),
    Case(lambda model, _: pl.plot.similarity({}),
         "similarity takes deltas, such as pl.deltas(model) gives: not {}"),
    Case(lambda *_: pl.plot.quality({"LoRA": (two(), 0.5)}), f"{QUALITY}a dict"),
    Case(lambda *_: pl.plot.quality({"LoRA": 0.5}), QUALITY + "{'LoRA': 0.5}"),
    Case(lambda *_: pl.plot.quality([("LoRA", 8, 0.5)]), QUALITY + "[('LoRA', 8, 0.5)]"),
]  # fmt: skip

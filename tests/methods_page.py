"""docs/methods.md and README's table, made of the cards: `python -m tests.made` writes.

What a method says of itself is its docstring; what it does on the models of the zoo is tried out.
"""

import dataclasses
import functools
import inspect
import re
from pathlib import Path

import peftlite as pl
from tests.cards import FAMILIES
from tests.cards.card import Card
from tests.zoo import KINDS

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "methods.md", ROOT / "README.md"
TABLE = re.compile(r"\| family \| methods \|\n(?:\|.*\n)+")
HEAD = """\
# Methods

Each method by its paper: equation, arguments, and what it serves. [Which one to
take](which_method.md) goes by what they reached and forgot on three tasks. Several make one delta:

```python
import peftlite as pl

together = [pl.LoRA(rank=8), pl.BitFit(), pl.FullTuning(targets="head")]
```

Every method takes `targets`, `exclude` ([which take what](concepts.md#targets)) and `dtype`, the
dtype of its parameters: by default the tensor's own, or fp32 where that is half precision. Where
other libraries differ from the papers, [peers](peers.md) says how.

Shape letters: `b` batch, `t` tokens, `i` in, `o` out, `r` rank, `e` experts, `h` heads, `n` virtual
tokens. This page is made from the methods' own docstrings by `python -m tests.made`; what it says
of kinds of models and of merging is tried out on the models of `tests/zoo.py`.
"""


def render() -> str:
    """The whole page."""
    sections = [HEAD, _overview()]
    for family, cards in FAMILIES.items():
        sections.append(f"## {family}\n")
        sections += [_section(card) for card in cards]
    return "\n".join(sections)


def render_readme() -> str:
    """README, with its table as the cards have it."""
    rows = [
        f"| {family.lower()} | {', '.join(_mention(card) for card in cards)} |"
        for family, cards in FAMILIES.items()
    ]
    table = "\n".join(["| family | methods |", "|---|---|", *rows, ""])
    return TABLE.sub(lambda _: table, README.read_text(), count=1)


def _mention(card: Card) -> str:
    return f"`{card.name}`" + f" ({card.variants})" * bool(card.variants)


def _overview() -> str:
    rows = ["| method | in one line | merges | kinds of models |", "|---|---|---|---|"]
    for card in (card for cards in FAMILIES.values() for card in cards):
        line = _prose(card.method).split(". ")[0].split("\n\n")[0].replace("\n", " ").rstrip(".:")
        line = line.replace("|", r"\|")
        merges, served = _tried(card)
        link = f"[`{card.name}`](#{card.name.lower()})"
        rows.append(f"| {link} | {line} | {merges} | {len(served)} of {len(KINDS)} |")
    return "\n".join(rows) + "\n"


def _section(card: Card) -> str:
    settings = [f for f in dataclasses.fields(card.method) if f.name not in _COMMON]
    call = ", ".join(_signature(setting) for setting in settings)
    lines = [f"### {card.name}\n", f"`pl.{card.name}({call})`\n", _prose(card.method), ""]
    if meanings := _arguments(card.method):
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [f"| `{name}` | {meaning} |" for name, meaning in meanings.items()] + [""]
    merges, served = _tried(card)
    missing = [kind.name for kind in KINDS if kind.name not in served]
    lines += [
        f"Takes {card.method.takes}. Merges: {merges}. {_kinds(missing)} {_answers(card)}",
        "",
    ]
    return "\n".join(lines)


def _answers(card: Card) -> str:
    """What the card says of PEFT and of the learning rate."""
    none, _, why = card.peft.partition("none: ")
    peft = f"Not in PEFT: {why}." if not none else f"In PEFT it is `{card.peft}`."
    rate = card.rate if isinstance(card.rate, str) else f"{card.rate} times LoRA's"
    return f'{peft} `lr="auto"` is {rate}.'


_COMMON = {field.name for field in dataclasses.fields(pl.Method)}


def _signature(setting: dataclasses.Field) -> str:
    """An argument with its default; what only an instance knows is left to the docstring."""
    if setting.default is dataclasses.MISSING:
        return setting.name
    return f"{setting.name}={setting.default!r}"


def _prose(method: type[pl.Method]) -> str:
    """What the docstring says before its arguments; what is indented is code."""
    text = re.split(r"\n\n(?:Args|Raises):\n", inspect.getdoc(method) or "")[0]
    return re.sub(r"(?:^    .*\n?)+", lambda code: f"```python\n{_dedent(code[0])}\n```\n", text,
                  flags=re.M).strip()  # fmt: skip


def _dedent(code: str) -> str:
    return inspect.cleandoc(f"\n{code}")


def _arguments(method: type[pl.Method]) -> dict[str, str]:
    """The arguments in the docstring's words."""
    found: dict[str, str] = {}
    parts = re.split(r"\n\n?Args:\n", inspect.getdoc(method) or "")
    for line in parts[1].split("\n\n")[0].splitlines() if len(parts) > 1 else ():
        if start := re.match(r"    (\w+): (.*)", line):
            name = start[1]
            found[name] = start[2]
        elif line.startswith("        "):
            found[name] += " " + line.strip()
    return {name: meaning.replace("|", r"\|") for name, meaning in found.items()}


@functools.cache
def _tried(card: Card) -> tuple[str, list[str]]:
    """Whether its deltas merge, and the kinds of models that take it, by its first row."""
    merges, served = set(), []
    for kind in KINDS:
        try:
            delta = pl.attach(kind.model(), card.rows[0].method)
        except pl.TargetError:
            continue
        served.append(kind.name)
        merges |= {placed.patch.has_value for placed in delta.placed.values()}
    return {True: "exactly", False: "no, it changes calls"}[merges == {True}], served


def _kinds(missing: list[str]) -> str:
    if not missing:
        return "Serves every kind of model."
    return f"Serves every kind of model but {', '.join(f'`{name}`' for name in missing)}."

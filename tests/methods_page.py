"""docs/methods.md, made of the methods themselves: `python -m tests.methods_page` writes it.

What a method says of itself is its docstring; what it does on the models of the zoo is tried out.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import peftlite as pl
from tests.test_contract import METHODS
from tests.zoo import KINDS

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
FAMILIES = {
    "Low rank": "LoRA DoRA AdaLoRA VeRA VBLoRA LoHa LoKr FourierFT",
    "Orthogonal": "OFT BOFT HRA",
    "Additive": "BottleneckAdapter Compacter PrefixTuning PromptTuning PTuning LoReFT",
    "Scaling": "IA3",
    "Selective": "BitFit NormTuning SparseMask SHiRA LTSFT DiffPruning FullTuning",
    "Wrapping": "Gated",
}
HEAD = """\
# Methods

Made from the methods' own docstrings by `python -m tests.methods_page`; what it says of kinds of
models and of merging is tried out on the models of `tests/zoo.py`.

Every method takes `targets`, `exclude` (see [concepts](concepts.md), "Targets") and `dtype`, the
dtype of its parameters: by default the tensor's own, or fp32 where that is half precision. Several
methods make one delta. Where other libraries differ from the papers, [peers](peers.md) says how.

```python
import peftlite as pl

together = [pl.LoRA(rank=8), pl.BitFit(), pl.FullTuning(targets="head")]
```

Shape letters: `b` batch, `t` tokens, `i` in, `o` out, `r` rank, `e` experts, `h` heads, `n` virtual
tokens.
"""


def render() -> str:
    """The whole page."""
    sections = [HEAD, _overview()]
    for family, names in FAMILIES.items():
        sections.append(f"## {family}\n")
        sections += [_section(getattr(pl, name)) for name in names.split()]
    return "\n".join(sections)


def _overview() -> str:
    rows = ["| method | in one line | merges | kinds of models |", "|---|---|---|---|"]
    for name in " ".join(FAMILIES.values()).split():
        method = getattr(pl, name)
        line = _prose(method).split(". ")[0].split("\n\n")[0].replace("\n", " ").rstrip(".:")
        line = line.replace("|", r"\|")
        merges, served = _tried(method)
        link = f"[`{name}`](#{name.lower()})"
        rows.append(f"| {link} | {line} | {merges} | {len(served)} of {len(KINDS)} |")
    return "\n".join(rows) + "\n"


def _section(method: type[pl.Method]) -> str:
    settings = [f for f in dataclasses.fields(method) if f.name not in _COMMON]
    call = ", ".join(_signature(setting) for setting in settings)
    lines = [f"### {method.__name__}\n", f"`pl.{method.__name__}({call})`\n", _prose(method), ""]
    if meanings := _arguments(method):
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [f"| `{name}` | {meaning} |" for name, meaning in meanings.items()] + [""]
    merges, served = _tried(method)
    missing = [kind.name for kind in KINDS if kind.name not in served]
    lines += [f"Takes {method.takes}. Merges: {merges}. {_kinds(missing)}", ""]
    return "\n".join(lines)


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


def _tried(method: type[pl.Method]) -> tuple[str, list[str]]:
    """Whether its deltas merge, and the kinds of models that take it, by its first row."""
    row = next(row for row in METHODS if type(row.method) is method)
    merges, served = set(), []
    for kind in KINDS:
        try:
            delta = pl.attach(kind.model(), row.method)
        except pl.TargetError:
            continue
        served.append(kind.name)
        merges |= {placed.patch.has_value for placed in delta.placed.values()}
    return {True: "exactly", False: "no, it changes calls"}[merges == {True}], served


def _kinds(missing: list[str]) -> str:
    if not missing:
        return "Serves every kind of model."
    return f"Serves every kind of model but {', '.join(f'`{name}`' for name in missing)}."


if __name__ == "__main__":
    PAGE.write_text(render())

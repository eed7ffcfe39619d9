"""Tables, and what shows itself by them: said once, text for `print`, HTML in a notebook."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# and what it is of: 1.5 KiB, 8×4, 50 %; but 0.weight is a name
_NUMBER = re.compile(r"[-+−~≤≥]*[\d.][\d.,]*(e[-+]?\d+)?([^\w.].*)?|[-+]?(nan|inf)")


class Table(str):
    """A table as text, which a notebook shows as HTML: in the colours that it has itself."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Lines up `rows` under `header`: numbers to the right, words to the left."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(map(_is_number, column[1:])) for column in columns]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    made = Table("\n".join([line(header), rule, *map(line, rows)]))
    made.html = _html(header, rows, numeric)
    return made


def _html(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    def line(kind: str, cells: Sequence[str]) -> str:
        # words may be broken between lines, numbers not
        spaces = {"th": "pre-wrap", "td": "pre"}[kind]
        styles = ("text-align:left;white-space:pre-wrap", f"text-align:right;white-space:{spaces}")
        return "".join(
            f'<{kind} style="{styles[right]}">{_escaped(cell)}</{kind}>'
            for cell, right in zip(cells, numeric, strict=True)
        )

    body = "".join(f"<tr>{line('td', cells)}</tr>" for cells in rows)
    return (
        f'<table style="font-family:monospace"><thead><tr>{line("th", header)}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _escaped(text: str) -> str:
    from html import escape  # here: `import peftlite` has no use for it

    return escape(text)


class Shown:
    """What shows itself: by `_lines` where it is printed and in a notebook, and in one line.

    `_lines` gives lines and tables, and `_summary` what stands in the brackets of its repr.
    """

    def _lines(self) -> Iterator[str]:
        raise NotImplementedError

    def _summary(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._summary()})"

    def _repr_html_(self) -> str:
        return "".join(
            part.html
            if isinstance(part, Table)
            else f'<div style="font-family:monospace;white-space:pre-wrap">{_escaped(part)}</div>'
            for part in self._lines()
        )


def format_cell(value: Any) -> str:
    """A value as a table's cell shows it."""
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def size(count: int) -> str:
    """A number of bytes as a person reads it: `1536` is `1.5 KiB`."""
    scaled, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if scaled < 1024:
            break
        scaled, unit = scaled / 1024, larger
    return f"{scaled:.0f} {unit}" if unit == "B" else f"{scaled:.1f} {unit}"


def listed(items: Iterable[str], most: int = 4) -> str:
    """The first of many things, and how many more there are."""
    items = list(items)
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if items[most:] else "")


def short(thing: Any) -> str:
    """A stranger's argument, short enough for an error."""
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    name = getattr(thing, "__qualname__", None)
    if name is not None:
        return name.rpartition(".")[2]
    text = repr(thing)
    if len(text) <= 60 and "\n" not in text and " at 0x" not in text:
        return text
    kind = type(thing).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def _is_number(cell: str) -> bool:
    return not cell or cell in "–-" or _NUMBER.fullmatch(cell) is not None

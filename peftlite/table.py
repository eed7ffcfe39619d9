"""Plain-text tables, for everything that prints."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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
    return "\n".join([line(header), rule, *map(line, rows)])


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
    if len(text) <= 60 and "\n" not in text:
        return text
    kind = type(thing).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def _is_number(cell: str) -> bool:
    return not cell or cell in "–-" or cell[0] in "0123456789+-−.~≤≥"

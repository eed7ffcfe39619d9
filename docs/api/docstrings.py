"""How the site reads the package: an `Example:` is code, and `peftlite` has the methods, too."""

import re
import textwrap
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:\n((?:    .*\n?|\n)+)", re.M)
FIELDS = {"integer", "positive", "number", "one_of"}


class Peftlite(griffe.Extension):
    """Fences the examples, which docstrings have indented; follows `__all__ += catalog.__all__`.

    A setting's default is shown as the value that it is: `8`, not `integer(8)`.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)
        value = getattr(obj, "value", None)
        if isinstance(value, griffe.ExprCall) and str(value.function) in FIELDS and value.arguments:
            obj.value = value.arguments[0]

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for name in pkg["methods.catalog"].exports:
            pkg.set_member(name, griffe.Alias(name, f"peftlite.methods.catalog.{name}"))


def _fenced(found: re.Match[str]) -> str:
    return f"\n```python\n{textwrap.dedent(found[1]).strip()}\n```\n"

"""How the site reads the package: an `Example:` is code, and `peftlite` has the methods, too."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:\n((?:    .*\n?|\n)+)", re.M)
FIELDS = {"integer", "positive", "number", "one_of"}


class Peftlite(griffe.Extension):
    """Fences the examples, which docstrings have indented; follows `__all__ += catalog.__all__`.

    The default of a setting is the value that it is: `8`, not `integer(8)`.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for name in pkg["methods.catalog"].exports:
            pkg.set_member(name, griffe.Alias(name, f"peftlite.methods.catalog.{name}"))
        for setting in (*_attributes(pkg["methods"]), *_attributes(pkg["train"])):
            match setting.value:
                case griffe.ExprCall(function=made, arguments=[default, *_]) if str(made) in FIELDS:
                    setting.value = default


def _fenced(found: re.Match[str]) -> str:
    return f"\n```python\n{textwrap.dedent(found[1]).strip()}\n```\n"


def _attributes(room: griffe.Module) -> Iterator[griffe.Attribute]:
    """Those of all classes in the files of a folder."""
    own = [file for file in room.modules.values() if not file.is_alias]
    kinds = [kind for file in own for kind in file.classes.values() if not kind.is_alias]
    yield from (member for kind in kinds for member in kind.attributes.values())

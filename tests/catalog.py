"""The catalog of methods, as `python -m tests.made` writes it from the files of methods."""

import importlib
import pkgutil
import textwrap
from pathlib import Path

from peftlite import methods

FILE = Path(methods.__file__).with_name("catalog.py")

HEAD = '''"""Every method by name: made by `python -m tests.made` from the files beside it."""
'''


def found() -> dict[str, str]:
    """The methods by name, each with the file that has it."""
    homes = {}
    for file in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"peftlite.methods.{file.name}")
        for name, kind in methods.Method.known.items():
            if kind.__module__ == module.__name__:
                homes[name] = file.name
    return dict(sorted(homes.items(), key=lambda pair: (pair[1], pair[0])))


def text() -> str:
    """The file, as it should be."""
    homes = found()
    lines = [f"from peftlite.methods.{home} import {name}" for name, home in homes.items()]
    names = ", ".join(f'"{name}"' for name in sorted(homes, key=lambda n: (not n.isupper(), n)))
    packed = textwrap.fill(names, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([HEAD, *lines, "", f"__all__ = [\n{packed},\n]  # fmt: skip", ""])

"""Floors: imports only go down, every file says what it is, and no file can run foreign code."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

# the rooms of the package from the ground up: a module, or a folder of them
FLOORS = (
    "errors table version fields spelling progress lazy",
    "kernels quant",
    "core",
    "methods",
    "verbs io bank",
    "plot",
    "train",
    "compat",
    "public",
    "peftlite",
    "commands demo",
    "cli",
    "__main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}

# what a method's file may know: how it attaches is none of its business
METHODS_KNOW = {"errors", "table", "fields", "spelling", "kernels", "methods"} | {
    f"core.{file}" for file in ("layout", "maps", "patch", "site", "tensors")
}

PACKAGE = Path(__file__).parents[1] / "peftlite"


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}
each_module = pytest.mark.parametrize("module", MODULES)


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def _imports(module: str, source: str) -> Iterator[str]:
    """The modules of the package that `module` imports anywhere in it, for types alone too."""
    is_package = MODULES[module].name == "__init__.py"
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            inner = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in inner]
        else:
            continue
        yield from (name for name in names if name in MODULES)


@functools.cache
def _graph() -> dict[str, set[str]]:
    return {module: set(_imports(module, path.read_text())) for module, path in MODULES.items()}


@each_module
def test_has_a_floor(module: str) -> None:
    assert _room(module) in FLOOR, f"give {_room(module)!r} a floor in FLOORS"


@each_module
def test_imports_go_down(module: str) -> None:
    own = FLOOR[_room(module)]
    up = {name for name in _graph()[module] if FLOOR[_room(name)] > own}
    assert not up, f"{module} (floor {own}) imports from above it: {sorted(up)}"


def test_imports_across_a_floor_make_no_circle() -> None:
    TopologicalSorter(_graph()).prepare()


@each_module
def test_is_what_its_name_leads_to(module: str) -> None:
    """No function of a module's name hides it, in a process that has imported all of them."""
    assert module not in _hidden()


@functools.cache
def _hidden() -> set[str]:
    names = [module for module in MODULES if not module.endswith("__main__")]
    code = f"""
import functools, sys
{"; ".join(f"import {name}" for name in names)}
for name in {names}:
    found = functools.reduce(getattr, name.split(".")[1:], peftlite)
    print(name if found is not sys.modules[name] else "")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("module", [m for m in MODULES if _room(m) == "methods"])
def test_methods_do_not_know_how_they_attach(module: str) -> None:
    known = {name.removeprefix("peftlite.") for name in _graph()[module]}
    assert not {name for name in known if not {name, name.split(".")[0]} & METHODS_KNOW}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import peftlite.errors", ["peftlite.errors"]),
        ("from peftlite import errors", ["peftlite.errors"]),
        ("from peftlite import LoRA", ["peftlite"]),
        ("from . import errors", ["peftlite.errors"]),
        ("from .errors import PeftliteError", ["peftlite.errors"]),
        ("def f():\n    from peftlite.errors import FileError", ["peftlite.errors"]),
        ("if TYPE_CHECKING:\n    from .errors import FileError", ["peftlite.errors"]),
        ("import torch", []),
    ],
)
def test_every_form_of_import_is_seen(source: str, found: list[str]) -> None:
    assert list(_imports("peftlite.table", source)) == found


@each_module
def test_opens_by_saying_what_it_is(module: str) -> None:
    first = MODULES[module].read_text().split("\n", 1)[0]
    assert first.startswith('"""') and len(first.split()) > 2, first


@each_module
def test_has_no_function_above_60_lines(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    assert not [f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 60]


@each_module
def test_is_not_named_utils(module: str) -> None:
    assert not {"util", "utils", "helpers", "misc"} & set(module.split("."))


PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNS_CODE = {"eval", "exec", "compile", "__import__", "import_module"}


def _unsafe(source: str) -> Iterator[str]:
    """Lines that could run code that came out of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bad = any(alias.name.split(".")[0] in PICKLES for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            hidden = RUNS_CODE if node.module in ("importlib", "builtins") else set()
            hidden = {"load", "save"} if node.module in ("torch", "torch.serialization") else hidden
            bad = (node.module or "").split(".")[0] in PICKLES or bool(names & hidden)
        elif isinstance(node, ast.Call):
            bad = _is_unsafe_call(node)
        else:
            continue
        if bad:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def _is_unsafe_call(node: ast.Call) -> bool:
    function = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if function in ("torch.load", "torch.serialization.load"):
        return options.get("weights_only") != "True"
    return (
        function in RUNS_CODE | {"torch.save", "importlib.import_module"}
        or options.get("allow_pickle", "False") != "False"
    )


@each_module
def test_cannot_run_foreign_code(module: str) -> None:
    assert not list(_unsafe(MODULES[module].read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from importlib import import_module",
        "importlib.import_module(name)",
        "__import__(name)",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_every_unsafe_form_is_seen(source: str) -> None:
    assert list(_unsafe(source))


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(path, weights_only=True)"])
def test_safe_forms_pass(source: str) -> None:
    assert not list(_unsafe(source))

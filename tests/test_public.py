"""The public surface: what each name says of itself, by rule, and the examples, which run.

What is public is what peftlite exports, with the public methods of its classes, and what the
modules among that export. A docstring says what the thing does; `Raises`, where it or what it calls
raises; the shapes of tensors in the letters of docs/concepts.md, as `(b, t, i)`; a method's paper.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import peftlite as pl

MODULES = ("kernels", "methods", "plot", "train", "data", "losses")

# a shape, as `(b, t, i)`, `(*stack, r, i)` or `(o)`; or words that say which it is
SIDE = r"(?:…|\.\.\.|\*\w+|1|[a-z])"
SHAPE = re.compile(rf"\({SIDE}(?:, {SIDE}(?:[·/+−]\w)*)*\)|\bscalar\b|\bany shape\b|\bshape of\b")
PAPER = re.compile(r'arXiv:\d{4}\.\d{4,5}|"[^"]+", \w+')


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions and classes that a module shows."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value


def _plain(value: Any) -> Any:
    """The function behind a method, a property or a decorated function; None if there is none."""
    value = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _members(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The public methods and properties that a class itself defines."""
    for name, value in vars(kind).items():
        if not name.startswith("_") and (function := _plain(value)) is not None:
            yield name, function


TOP = {f"pl.{name}": value for name, value in _public(pl)}
for _name in MODULES:
    more = {f"pl.{_name}.{name}": value for name, value in _public(getattr(pl, _name))}
    TOP |= {name: value for name, value in more.items() if value not in TOP.values()}
CLASSES = {name: value for name, value in TOP.items() if inspect.isclass(value)}
FUNCTIONS = {name: value for name, value in TOP.items() if name not in CLASSES}
METHODS = [n for n, kind in CLASSES.items() if kind in pl.Method.known.values()]
MEMBERS = {f"{n}.{m}": (c, f) for n, c in CLASSES.items() for m, f in _members(c)}
# by name, the class that it is of, and the function or class itself
EVERYTHING = {name: (None, value) for name, value in TOP.items()} | MEMBERS


def said(name: str) -> str:
    """What a name says of itself; of a method that says nothing, what the one it overrides does."""
    owner, value = EVERYTHING[name]
    own = name.rpartition(".")[2]
    overridden = [vars(base)[own] for base in owner.__mro__ if own in vars(base)] if owner else []
    return next(filter(None, map(inspect.getdoc, overridden or [value])), "")


# -- by rule


def test_every_name_says_what_it_is() -> None:
    generated = {name: f"{name.rpartition('.')[2]}(" for name in EVERYTHING}
    silent = [n for n in EVERYTHING if not said(n) or said(n).startswith(generated[n])]
    assert not silent, "; ".join(silent)


def test_what_raises_says_so() -> None:
    silent = [n for n in EVERYTHING if _may_raise(n) and "Raises" not in said(n)]
    assert not silent, "; ".join(silent)


def test_arguments_go_by_the_names_they_have() -> None:
    wrong = [f"{n}: {a}" for n in EVERYTHING for a in _described(n) if a not in _arguments(n)]
    assert not wrong, "; ".join(wrong)


def test_what_takes_or_gives_tensors_says_their_shapes() -> None:
    silent = [n for n in EVERYTHING if _has_tensors(n) and not SHAPE.search(said(n))]
    assert not silent, "; ".join(silent)


def test_a_method_names_its_paper_and_the_shapes_of_what_it_learns() -> None:
    silent = [n for n in METHODS if not PAPER.search(said(n)) or not SHAPE.search(said(n))]
    assert METHODS and not silent, "; ".join(silent)


def _described(name: str) -> list[str]:
    """The arguments in a docstring's Args."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", said(name), re.M)
    return re.findall(r"^    (\w+):", section[1], re.M) if section else []


def _arguments(name: str) -> Collection[str]:
    return inspect.signature(EVERYTHING[name][1]).parameters


def _has_tensors(name: str) -> bool:
    """Whether a function takes or gives tensors, those in a dict by name left out."""
    _, value = EVERYTHING[name]
    hints = inspect.get_annotations(value).values() if inspect.isfunction(value) else ()
    return any(re.search(r"(?<!str, )\bTensor\b", getattr(h, "__name__", str(h))) for h in hints)


def _may_raise(name: str) -> bool:
    """Whether a function, or making one of a class, raises itself, or by what it calls directly."""
    owner, value = EVERYTHING[name]
    for function in _makers(value) if inspect.isclass(value) else [value]:
        owner = owner or value
        calls = (node for node in ast.walk(_tree(function)) if isinstance(node, ast.Call))
        called = [found for call in calls if (found := _named(call.func, function, owner))]
        helpers = [f for c in called for f in (_makers(c) if inspect.isclass(c) else [_plain(c)])]
        ours = [f for f in helpers if f and f.__module__.startswith("peftlite.")]
        if any(_raises(each, owner) for each in (function, *ours)):
            return True
    return False


def _makers(kind: type) -> list[FunctionType]:
    """What a class itself runs when one is made, where that is written down."""
    found = [_plain(vars(kind).get(name)) for name in ("__init__", "__post_init__")]
    return [f for f in found if f and f.__code__.co_filename.endswith(".py")]


def _raises(function: FunctionType, owner: Any) -> bool:
    """Whether a function raises an error of the library, and isn't there for that alone."""
    body = _tree(function).body
    if len(body) <= 2 and isinstance(body[-1], ast.Raise):
        return False  # a method to override
    raised = [node.exc for node in ast.walk(_tree(function)) if isinstance(node, ast.Raise)]
    made = [_named(e.func, function, owner) for e in raised if isinstance(e, ast.Call)]
    return any(inspect.isfunction(e) or (e and issubclass(e, pl.PeftliteError)) for e in made)


@functools.cache
def _tree(function: FunctionType) -> ast.FunctionDef:
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    return tree


def _named(node: ast.expr, function: FunctionType, owner: Any) -> Any:
    """What stands behind a name in a function, as far as that can be read off; None otherwise."""
    match node:
        case ast.Name(id=name):
            return function.__globals__.get(name)
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return inspect.getattr_static(owner, name, None)
        case ast.Attribute(value=inner, attr=name):
            module = _named(inner, function, owner)
            return getattr(module, name, None) if isinstance(module, ModuleType) else None
    return None


# -- by example


@pytest.mark.parametrize(
    "name", [n for n in EVERYTHING if n in FUNCTIONS or "\nExample:\n" in said(n)]
)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found, code = said(name).partition("\nExample:\n")
    assert found, f"{name} has no `Example:`"
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(code), {"pl": pl, "torch": torch, "nn": nn})

"""R13: no code that could run what a file says, and names that would like to be paths or code."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Iterator
from pathlib import Path

import peftlite as pl
from tests.trust.hostile import HOSTILE
from tests.trust.malformed import METHODS, Parts, saved
from tests.trust.tally import Tally, difference, state
from tests.zoo import KINDS

PACKAGE = Path(pl.__file__).parent
GPT = next(kind for kind in KINDS if kind.name == "gpt")

MODULES = {
    "cPickle", "cloudpickle", "code", "ctypes", "dill", "imp", "importlib", "joblib", "marshal",
    "pickle", "pty", "runpy", "shelve", "subprocess", "yaml",
}  # fmt: skip
NAMES = {"eval", "exec", "compile", "__import__", "globals", "breakpoint"}
CALLS = {
    "import_module", "os.system", "os.popen", "os.execv", "os.spawnv", "torch.load", "np.load",
    "numpy.load", "torch.jit.load", "torch.hub.load", "torch.package", "torch.compile",
    "torch.ops.load_library", "torch.classes.load_library", "torch.utils.cpp_extension.load",
}  # fmt: skip
HOOKS = {"__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"}

ALLOWED = {
    ("core/delta.py", "__getstate__"): "copying a model, by copy or by its user's own pickle",
    ("core/delta.py", "__setstate__"): "the same",
    ("__init__.py", "globals"): "the names that dir() shows",
    ("bank/families/mixed.py", "__reduce_ex__"): "refusing to be copied or pickled",
    ("train/trainer.py", "compile"): "a setting's name",
    ("train/trainer.py", "torch.compile"): "the user's own model, asked for by that setting",
    ("core/choice.py", "__getstate__"): "the same",
    ("core/choice.py", "__setstate__"): "the same",
    ("kernels/dispatch.py", "importlib.util"): "asking whether triton is installed",
    ("progress.py", "importlib.util"): "asking whether a notebook has widgets",
    ("commands/config.py", "yaml"): "the user's own settings, read by its safe loader",
    (
        "core/host.py",
        "__reduce_ex__",
    ): "the same: the copy makes its class anew",
    ("core/host.py", "__setstate__"): "the same: its registry hangs on the copy",
    ("methods/sparse.py", "__getstate__"): "the same",
    ("kernels/native/build.py", "subprocess"): "the machine's compiler, on the package's own C",
    **{
        (f"kernels/native/{file}.py", "ctypes"): "what that built: no name of a file's goes there"
        for file in ("kernel", "low_rank", "experts", "mixed", "mask", "packed")
    },
}


def danger() -> Iterator[tuple[str, str, int]]:
    """Whatever in the package could run code that a file names: file, what, line."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            for what in _dangerous(node):
                yield name, what, node.lineno  # type: ignore


def _dangerous(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (a.name for a in names if a.name.partition(".")[0] in MODULES)
        case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
            yield module
        case ast.Name(id=name) if name in NAMES:
            yield name
        case ast.FunctionDef(name=name) if name in HOOKS:
            yield name
        case ast.Call(func=ast.Attribute() as function, keywords=keywords):
            name = ast.unparse(function)
            safe = any(k.arg == "weights_only" and _is_true(k.value) for k in keywords)
            if (name in CALLS and not safe) or function.attr in CALLS:
                yield name


def _is_true(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def r13() -> Tally:
    """The package's syntax trees; then every hostile name as a delta's, a site's, a tensor's."""
    tally = Tally()
    found = [*danger()]
    for name, what, line in found:
        tally.check((name, what) in ALLOWED, f"{name}:{line} has {what}")
    unused = ALLOWED.keys() - {(name, what) for name, what, _ in found}
    tally.check(not unused, f"allowed and not there: {unused}")
    model = GPT.model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inner" / "sql.safetensors"
        path.parent.mkdir()
        good = saved(model, METHODS, path)
        before = state(model)
        for name in HOSTILE:
            what = f"{name[:40]!r} as a"
            tally.refused(lambda name=name: pl.attach(model, METHODS, name), f"{what} name")
            tally.refused(lambda name=name: pl.load(model, path, name), f"{what} name loaded")
            for part in ("name", "site", "tensor"):
                path.write_bytes(_renamed(Parts.of(good), part, name))
                tally.refused(lambda: pl.load(model, path), f"{what} {part} in a file")
            path.write_bytes(good)
        tally.check(not difference(before, state(model)), "the model changed")
        there = {file.relative_to(folder).as_posix() for file in Path(folder).rglob("*")}
        tally.check(there == {"inner", "inner/sql.safetensors"}, f"files appeared: {there}")
    tally.notes.append(f"{len(HOSTILE)} names in 5 places; {len(found)} names allowed")
    return tally


def _renamed(parts: Parts, part: str, name: str) -> bytes:
    match part:
        case "name":
            parts.header["name"] = name
        case "site":
            parts.header["methods"][0]["sites"][0] = name
        case _:
            parts.table[0] = (name, parts.table[0][1])
            del parts.header["tensors"]
    return parts.sealed()

"""fuse and unfuse: linear maps that share an input, as q/k/v and gate/up do, multiply it at once.

A group only says who may share; `kernels.grouped` looks at the tensors as they come.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlite.core.delta import Delta
from peftlite.core.find import require
from peftlite.core.host import base_class
from peftlite.core.maps import Linear, kind_of
from peftlite.core.turns import in_turn
from peftlite.errors import PeftliteError
from peftlite.methods.low_rank import LowRankPatch
from peftlite.table import Shown, table

Names = Collection[str]


@dataclass(repr=False)
class Fused(Shown):
    """What `fuse` found; printing it shows a table.

    Attributes:
        groups: the linear maps that may share an input, by the addresses of their modules.
        unread: modules around linear maps whose `forward` has no source that can be read.
    """

    groups: list[tuple[str, ...]]
    unread: list[str]

    def _summary(self) -> str:
        return f"{len(self.groups)} groups of maps, {len(self.unread)} modules unread"

    def _lines(self) -> Iterator[str]:
        rows = [
            [group[0].rpartition(".")[0], " ".join(address.rpartition(".")[2] for address in group)]
            for group in self.groups
        ]
        rows += [[path, "? (its forward has no source: name them)"] for path in self.unread]
        yield table(["module", "maps that may share an input"], rows)


@in_turn
def fuse(model: nn.Module, groups: Collection[Names] | None = None) -> Fused:
    """[h_q; h_k; h_v] = s·drop(x) [A_q; A_k; A_v]ᵀ: linear maps that share x, in one product.

    Likewise dA, and what h adds to dx. Results are the same, to rounding; with dropout, those that
    share x share its mask. Maps that turn out not to be called with the very same tensor, and code
    that is compiled or transformed, run as before. It holds for the deltas that are attached now,
    and replaces the groups of a call before.

    Args:
        groups: names of children that their parent calls with one tensor, as in
            `[["query", "key", "value"]]`. By default those that the source of their parent's
            `forward` calls with one variable.

    Raises:
        PeftliteError: `groups` names no two low-rank maps of one module. Nothing has changed.

    Example:
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "qkv"})
        pl.attach(model, pl.LoRA(rank=2, targets="*"))
        print(pl.fuse(model, groups=["qkv"]))
    """
    _, registry = require(model)
    found: list[dict[str, LowRankPatch]] = []
    unread: list[str] = []
    for delta in registry.deltas.values():
        for path, parent, children in _parents(model, dict(_patches(delta))):
            hints = called_alike(base_class(parent).forward) if groups is None else groups
            if hints is None:
                unread.append(path)
            for names in hints or ():
                group = {f"{path}.{n}".lstrip("."): children[n] for n in names if n in children}
                if len(set(group.values())) > 1:
                    found.append(group)
    if groups is not None and not found:
        raise PeftliteError(
            f"no module has two low-rank linear maps that groups={groups!r} names together; name "
            'those that one module calls with one tensor, as in [["query", "key", "value"]]'
        )
    unfuse(model)
    for group in found:
        for patch in group.values():
            patch.group = tuple(group.values())
    return Fused(list(dict.fromkeys(map(tuple, found))), list(dict.fromkeys(unread)))


@in_turn
def unfuse(model: nn.Module) -> None:
    """Takes `fuse` back: every linear map multiplies its input by itself, as before.

    Raises PeftliteError if the model has no deltas.

    Example:
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "qkv"})
        pl.attach(model, pl.LoRA(rank=2, targets="*"))
        pl.fuse(model, groups=["qkv"])
        pl.unfuse(model)
    """
    _, registry = require(model)
    for delta in registry.deltas.values():
        for _, patch in _patches(delta):
            vars(patch).pop("group", None)


def _patches(delta: Delta) -> Iterator[tuple[nn.Module, LowRankPatch]]:
    """The linear maps whose A is a tensor that is kept, each with the patch that keeps it."""
    for placed in delta.placed.values():
        patch = placed.patch
        if isinstance(patch, LowRankPatch) and patch.index is None and not patch.layout.transposed:
            for module, slot in placed.site.owners:
                rides = slot == "weight" and kind_of(module) is Linear
                if rides and patch.factors()[0] is patch.factors()[0]:
                    yield module, patch


def _parents(
    model: nn.Module, patches: dict[nn.Module, LowRankPatch]
) -> Iterator[tuple[str, nn.Module, dict[str, LowRankPatch]]]:
    """The modules with several of the maps for children, and the patches by their names."""
    for path, parent in model.named_modules():
        children = {name: patches[m] for name, m in parent._modules.items() if m in patches}
        if len(children) > 1:
            yield path, parent, children


@functools.cache
def called_alike(forward: Callable[..., Any]) -> list[Names] | None:
    """The children that a `forward` calls with one variable, by its source; None without one."""
    function = inspect.unwrap(forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return None
    match tree.body[0]:
        case ast.FunctionDef(args=ast.arguments(args=[ast.arg(arg=owner), *_])) as read:
            if read.name == function.__name__:  # the file may have changed since it was imported
                calls = _Calls(owner)
                calls.visit(read)
                return list(calls.children.values())
    return None


class _Calls(ast.NodeVisitor):
    """The children called with a variable, by its name and how often it was assigned before."""

    def __init__(self, owner: str):
        self.owner = owner
        self.assigned: Counter[str] = Counter()
        self.children: dict[tuple[str, int], list[str]] = defaultdict(list)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=self.owner), attr=child),
                args=[ast.Name(id=variable), *_],
            ):
                self.children[variable, self.assigned[variable]].append(child)

    def visit_Assign(self, node: Any) -> None:
        if node.value is not None:
            self.visit(node.value)  # it is found before it is assigned
        for target in getattr(node, "targets", None) or [node.target]:
            self.visit(target)

    visit_AugAssign = visit_AnnAssign = visit_NamedExpr = visit_Assign

    def visit_Name(self, node: ast.Name) -> None:
        self.assigned[node.id] += isinstance(node.ctx, ast.Store)

"""Tree: a model with the patches of a delta where they sit, and blocks that are alike folded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

from torch import nn

from peftlite.core.assign import Placed
from peftlite.core.site import split_index, walk
from peftlite.fields import as_typed
from peftlite.table import Shown, table

Parameters = dict[int, nn.Parameter]
"""By id, so that shared ones are there once."""


@dataclass(repr=False)
class Tree(Shown):
    """A model with the patches of a delta where they sit; it prints as a table.

    A line is a module, or what is patched of it, with the parameters that the base and the delta
    have there; blocks that are alike share one, with what each of them has. What has no patch
    inside isn't opened. `state` says what is trained or frozen: the patch, or where there is none
    the base.
    """

    head: str
    root: Line

    def _summary(self) -> str:
        return self.head

    def _lines(self) -> Iterator[str]:
        yield self.head
        rows = [[name, *line.cells] for name, line in _drawn(self.root)]
        yield table(["module", "what", "base", "delta", "state"], rows)


@dataclass
class Line:
    """A module, or what is patched of it, and the lines below it."""

    name: str
    what: str
    base: Parameters = field(default_factory=dict)
    delta: Parameters = field(default_factory=dict)
    patched: bool = False  # it, or something in it
    below: Sequence[Line] = ()
    slot: str = ""  # what is patched of it, where that is all below it
    times: int = 1  # how many such there are

    @cached_property
    def cells(self) -> tuple[str, ...]:
        """What stands beside its name."""
        own = self.delta if self.patched else self.base
        trains = "trains" if any(p.requires_grad for p in own.values()) else "frozen"
        each = f"{self.times} × " if self.times > 1 else ""
        counts = [sum(p.numel() for p in those.values()) for those in (self.base, self.delta)]
        return (
            f"{each}{self.what}",
            *(f"{each}{count:,}" if count else "" for count in counts),
            trains if own and not self.below else "",
        )

    @cached_property
    def likeness(self) -> tuple[object, ...]:
        """The same for lines that differ in nothing but their names."""
        return self.cells, self.slot, *((line.name, line.likeness) for line in self.below)


def tree(head: str, root: nn.Module, placed: Iterable[Placed]) -> Tree:
    """A model's tree, with these patches in it."""
    modules, children = dict(walk(root)), defaultdict[str, list[str]](list)
    for path in filter(None, modules):
        children[path.rpartition(".")[0]].append(path)
    patches = _by_module(placed)

    def line(path: str) -> Line:
        own = {id(p): p for p in modules[path]._parameters.values() if p is not None}
        name, what = path.rpartition(".")[2], type(modules[path]).__name__
        return _joined(Line(name, what, own), patches[path], [*map(line, children[path])])

    return Tree(head, replace(line(""), name="model"))


def _by_module(placed: Iterable[Placed]) -> dict[str, list[Line]]:
    """What is patched, by the path of its module."""
    found: dict[str, list[Line]] = defaultdict(list)
    for item in placed:
        own = {id(p): p for p in item.patch.parameters()}
        method = as_typed(item.method, but=("targets", "exclude")).removesuffix("()")
        patch = Line("", f"+ {method}", {}, own, patched=True)
        for name in item.site.names:
            path = split_index(name)[0].rpartition("(" if item.site.is_call else ".")[0]
            found[path].append(replace(patch, name=name[len(path) :].lstrip(".")))
            # under its other names a tied tensor refers to the first
            patch = Line("", f"= {item.site.names[0]}", patched=True)
    return found


def _joined(line: Line, patches: list[Line], modules: list[Line]) -> Line:
    """A module's line, opened as far as there are patches."""
    line.patched = any(each.patched for each in (*patches, *modules))
    for each in (*patches, *modules):
        line.base, line.delta = line.base | each.base, line.delta | each.delta
    if len(patches) == 1 and not any(each.patched for each in modules):
        line.what = f"{line.what} {patches[0].what}"
        line.slot = patches[0].name if patches[0].name == "()" else f".{patches[0].name}"
    elif line.patched:
        line.below = [*patches, *_folded([each for each in modules if each.patched or each.base])]
    return line


def _folded(lines: Sequence[Line]) -> list[Line]:
    """Numbered lines that are alike as one, such as 0-11."""
    groups: dict[object, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.likeness if line.name.isdigit() else line.name].append(line)
    return [
        replace(same[0], name=_ranges([line.name for line in same]), times=len(same))
        if same[1:]
        else same[0]
        for same in groups.values()
    ]


def _ranges(names: Sequence[str]) -> str:
    """Numbers in order, those that follow one another as a range: 0-2,5."""
    runs = groupby(enumerate(map(int, names)), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if run[1:] else f"{run[0]}" for run in ends)


def _drawn(line: Line, own: str = "", lead: str = "") -> Iterator[tuple[str, Line]]:
    """A line and those below it, each with its name as it is drawn."""
    match line.below:
        case [Line(times=n) as blocks] if n > 1 and own:
            line = replace(blocks, name=f"{line.name}.{blocks.name}")
    yield own + line.name + line.slot, line
    for below in line.below:
        last = below is line.below[-1]
        branch, trunk = ("└ ", "  ") if last else ("├ ", "│ ")
        yield from _drawn(below, lead + branch, lead + trunk)

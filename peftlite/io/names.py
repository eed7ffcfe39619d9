"""Names: a model's modules by the names that a file has for them, where those are others.

torch's wrappers put their own word into a path (`_orig_mod.layers.0.q`), and releases of
transformers rename modules: a model's class says how, in a table that transformers keeps for it.
Where there is a checkpoint alone, it is asked of the class that its config.json names.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftlite.core.site import CALL, WRAPPERS, Site, split_index
from peftlite.io.checkpoint import Checkpoint
from peftlite.io.content import Content, Info

_WRAPPED = re.compile(rf"(^|(?<=\.))({'|'.join(WRAPPERS)}|module)(\.|(?=\(\)$)|$)")


def unwrapped(name: str) -> str:
    """A name without the words that torch's wrappers put into it."""
    return _WRAPPED.sub("", name)


class Names:
    """What a model has, and how a file's names for it are understood.

    Args:
        model: whose class tells of renamed modules; of a stand-in, that of its checkpoint.
        known: the names of all that can be meant.
    """

    def __init__(self, model: nn.Module | Checkpoint | None, known: Collection[str]):
        self._model: Any = getattr(model, "checkpoint", model)
        self._known = known
        # wrappers and releases make a name longer, but not by any length
        self.steps = 4 * (4 + max((name.count(".") for name in known), default=0))
        self._unwrapped = {unwrapped(name): name for name in reversed([*known])}

    def own(self, name: str) -> str | None:
        """The model's name for a file's; None if it has none."""
        if name in self._known:
            return name
        if (own := self._unwrapped.get(unwrapped(name))) is not None:
            return own
        others = (unwrapped(other) for other in (name, *self._newer(unwrapped(name))))
        return next((self._renamed[other] for other in others if other in self._renamed), None)

    def address(self, address: str) -> str:
        """The model's address for a file's; the same if it has none."""
        text, part = split_index(address)
        found = self.own(text) or text
        return found if part is None else f"{found}[{part}]"

    def modules(self, modules: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What a file says of modules, by the model's addresses."""
        return {
            self.address(address): {**its, "names": [*map(self.address, its["names"])]}
            if "names" in its
            else its
            for address, its in modules.items()
        }

    @functools.cached_property
    def _renamings(self) -> list[Any]:
        model = self._model
        model = _model_of(model) if isinstance(model, Checkpoint) else model
        return [] if model is None else [*_renamings(model)]

    @functools.cached_property
    def _renamed(self) -> dict[str, str]:
        """What there is by its newer names, too, where it is a checkpoint's that has older ones."""
        newer = {unwrapped(n): x for x in self._known for n in self._newer(unwrapped(x))}
        return newer | self._unwrapped

    def _newer(self, name: str) -> Iterator[str]:
        """What transformers calls a name of an older release."""
        for rename in self._renamings:
            yield rename(name)


def by_names_of(checkpoint: Checkpoint, info: Info) -> Info:
    """What a delta's file says of its base, by the names that a checkpoint has."""
    names = Names(checkpoint, checkpoint.keys())
    base = {names.address(address): its for address, its in info.base.items()}
    return replace(info, base=base, modules=names.modules(info.modules))


def _model_of(checkpoint: Checkpoint) -> Any:
    """The model of a checkpoint, without values, if it's one of those with renamed parts."""
    config = checkpoint.config
    if not {"text_config", "vision_config"} & config.keys():  # spares the import
        return None
    try:
        import transformers

        # Qwen2-VL says its class with its text part
        said = config.get("architectures") or config["text_config"]["architectures"]
        kind: Any = getattr(transformers, said[0])
        folder = checkpoint.folder or checkpoint.path.parent
        with torch.device("meta"):
            return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    except Exception:  # whatever a class makes of another one's settings: names are as they are
        return None


def _renamings(model: nn.Module) -> Iterator[Any]:
    """How a model's class renames what older checkpoints have, one release's way after another."""
    table: Any = getattr(model, "_checkpoint_conversion_mapping", None)
    if isinstance(table, Mapping) and table:  # transformers 4
        yield lambda name: _first(table, name)
    mapping: Any = sys.modules.get("transformers.conversion_mapping")
    if mapping is not None and hasattr(mapping, "get_model_conversion_mapping"):  # transformers 5
        steps = [s for s in mapping.get_model_conversion_mapping(model) if not _converts(s)]
        yield lambda name: _all(steps, name)


def _converts(step: Any) -> bool:
    return bool(getattr(step, "operations", None))


def _first(table: Mapping[str, str], name: str) -> str:
    for pattern, replacement in table.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _all(steps: Sequence[Any], name: str) -> str:
    for step in steps:
        name, _ = step.rename_source_key(name)
    return name


class Spelling:
    """The names that a file has for all of a model, from those that it has for some of it.

    Args:
        keys: what is in the file, each the name of a module or a tensor with more behind it.
    """

    def __init__(self, names: Names, keys: Iterable[str]):
        self._starts: dict[str, str] = {}
        own: dict[str, str] = {}
        for key in keys:
            steps = key.split(".", names.steps)[: names.steps]
            paths = (".".join(steps[:n]) for n in range(len(steps), 0, -1))
            found = ((mine, path) for path in paths if (mine := names.own(path)) is not None)
            own.update(item for item in [next(found, None)] if item is not None)
        for mine, theirs in own.items():
            if mine != theirs:
                self._learn(mine, theirs)
        if self._starts:
            self._starts |= own

    def _learn(self, own: str, theirs: str) -> None:
        """Of two names of one thing, how they begin differently."""
        mine, other = own.split("."), theirs.split(".")
        while len(mine) > 1 and len(other) > 1 and mine[-1] == other[-1]:
            mine, other = mine[:-1], other[:-1]
        if mine[-1] == other[-1] and not unwrapped(".".join([*mine[:-1], *other[:-1]])):
            mine, other = mine[:-1], other[:-1]  # a wrapper's word before all
        self._starts[".".join(mine)] = ".".join(other)

    def of(self, name: str) -> str:
        """The file's name for something of the model."""
        path = name.removesuffix(CALL)
        steps = path.split(".") if path else []
        for n in range(len(steps), -1, -1) if self._starts else ():
            start = self._starts.get(".".join(steps[:n]))
            if start is not None:
                return ".".join([start] * bool(start) + steps[n:]) + name[len(path) :]
        return name

    def site(self, site: Site) -> Site:
        return replace(site, address=self.of(site.address), names=tuple(map(self.of, site.names)))


def as_here(content: Content, model: nn.Module, sites: Sequence[Site]) -> Content:
    """A file's content by the names that the model has."""
    known = {name for site in sites for name in site.names}
    addresses = [address for _, own in content.methods for address in own]
    if all(split_index(address)[0] in known for address in addresses):
        return content
    names = Names(model, known)
    own = names.address

    def key(key: str) -> str:
        address, _, name = key.rpartition(":")
        return f"{own(address)}:{name}"

    theirs = {key(old): old for old in content.entries}
    return replace(
        content,
        methods=[(method, [*map(own, addresses)]) for method, addresses in content.methods],
        entries={new: content.entries[old] for new, old in theirs.items()},
        get=lambda new: content.get(theirs[new]),
        base=content.base and {own(address): its for address, its in content.base.items()},
        modules=names.modules(content.modules),
    )

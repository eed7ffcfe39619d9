"""Reading: what a peer's file says, in peftlite's words."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from peftlite.core.patch import Method
from peftlite.core.site import Site, slice_of
from peftlite.errors import FileError
from peftlite.io.files import Entry, Tensors, fitting
from peftlite.io.peers.peer import ALPHA, CONFIG, PARTS, RANKS, Kind, Peer
from peftlite.io.peers.products import Recipe, decomposed, tucker, unrolled
from peftlite.io.peers.turns import Turn
from peftlite.io.peft.config import Config
from peftlite.io.peft.form import Layer
from peftlite.io.peft.forms import FORMS
from peftlite.io.tied import UNTIE
from peftlite.methods.dora import DoRA
from peftlite.methods.loha import LoHa
from peftlite.methods.lokr import LoKr
from peftlite.methods.lora import LoRA
from peftlite.table import listed

View = Callable[[Tensor], Tensor]


class Reading:
    """A file as it is understood; without a model, its methods and its own names alone."""

    peer: Peer
    file: Tensors

    def __init__(self, peer: Peer, file: Tensors, sites: Sequence[Site] | None = None):
        self.peer, self.file = peer, file
        self.methods: dict[Method, list[str]] = {}
        self.entries: dict[str, Entry] = {}
        self._recipes: dict[str, Recipe] = {}
        self._there = {name: site for site in sites or () for name in site.names}
        modules = self._modules()
        found = self._locate(sites, modules) if sites is not None else {}
        for name, keys in modules.items():
            with fitting(name, self._refuse):
                self._read(name, keys, found.get(name))

    def get(self, key: str) -> Tensor:
        """A tensor's values."""
        return self._recipes[key](self.file.get)

    def _lying(self, key: str) -> Tensor:
        return self.file.entries[key].meta

    def _refuse(self, what: str) -> FileError:
        return FileError(f"{self.file.path!r} is of {self.peer.name}, and {what}")

    def _modules(self) -> dict[str, dict[str, str]]:
        """The keys of each module, by the peer's names of parameters."""
        modules: dict[str, dict[str, str]] = {}
        for key in self.file.entries:
            found = self.peer.split(key)
            if found is None:
                raise self._refuse(f"has {key}, which can't be read")
            if found[1] in self.peer.lacks:
                raise self._refuse(
                    f"{found[0]} is by {self.peer.lacks[found[1]]}, which no method here is: merge "
                    "it there, and pl.extract makes a delta of the model before and after"
                )
            keys = modules.setdefault(found[0], {})
            if found[1] in keys:
                raise self._refuse(f"has {key} beside {keys[found[1]]}")
            keys[found[1]] = key
        return modules

    # -- where

    def _locate(self, sites: Sequence[Site], modules: Mapping[str, Any]) -> dict[str, Site]:
        """The weights of the modules that the file names."""
        there: dict[str, dict[str, Site]] = {}
        for site in sites:
            for path in (n.removesuffix(".weight") for n in site.names if n.endswith(".weight")):
                there.setdefault(self.peer.joined(path), {})[path] = site
        found: dict[str, Site] = {}
        for name in modules:
            own = next((there[p] for p in self.peer.paths(name) if p in there), None)
            if own is not None and len({*own.values()}) > 1:
                raise self._refuse(
                    f"{name} may be {' or '.join(own)} in this model: rename one of them to load it"
                )
            if own is not None:
                path, found[name] = next(iter(own.items()))
                self._check_apart(path, found[name])
        if lost := [name for name in modules if name not in found]:
            first = [lost[0], *self.peer.paths(lost[0])][-1]
            near = difflib.get_close_matches(first, there, n=3, cutoff=0.3)
            raise self._refuse(
                f"of its {len(modules)} modules this model lacks {len(lost)}: {listed(lost)}; "
                f"nearest to the first: {listed(path for p in near for path in there[p])}"
            )
        return found

    def _check_apart(self, path: str, site: Site) -> None:
        """Raises FileError if another module has the weight, which the peer leaves as it is."""
        others = (name.removesuffix(".weight") for name in site.names if name != f"{path}.weight")
        if len(site.owners) > 1 and not self.peer.ties:
            other = next(others)
            raise self._refuse(f"changes {path} apart from {other}, {UNTIE.format(path, other)}")

    def _parts(
        self, name: str, site: Site, t: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, dict[str, View]]]:
        """The addresses that a module's tensors are for, and what is each one's of them."""
        groups = len(t["a"]) // t["b"].shape[1] if self.peer.fuses else 1
        if groups <= 1:
            yield site.address, {}
            return
        parts = json.loads(self.file.metadata.get(PARTS, "[]"))
        if len(parts) != groups:
            raise self._refuse(
                f"{name} has factors of {groups} parts of a weight, and {parts} are said: say "
                f"which, with peftlite convert {self.file.path!r} NEW --alpha NUMBER --parts q v"
            )
        rank, start = t["b"].shape[1], 0
        for n, part in enumerate(parts):
            _, first, stop = slice_of(site, part).index or (0, 0, 0)
            rows = {"a": (n * rank, rank), "b": (start, stop - first)}
            start += stop - first
            cut = {p: lambda x, span=span: x.narrow(0, *span) for p, span in rows.items()}
            yield f"{site.address}[{part}]", cut
        if start != len(t["b"]):
            raise ValueError(f"its parts {parts} have {start} outputs, and B {len(t['b'])}")

    # -- what

    def _read(self, name: str, keys: dict[str, str], site: Site | None) -> None:
        """Adds what the file has of one module."""
        for theirs in self.peer.dense.keys() & keys.keys():
            self._read_dense(name, theirs, keys.pop(theirs), site)
        if not keys.keys() - {ALPHA}:
            return
        if turn := next((t for t in self.peer.turns.values() if t.mark in keys), None):
            return self._read_turn(name, keys, turn, site)
        kind, own = self._kind(name, keys)
        recipes = self._made(name, own, keys, site)
        t = {p: recipe(self._lying) for p, recipe in recipes.items()}
        method = self._method(kind, name, keys, t)
        if self.peer.unrolls and site and site.whole.dim() == 4 and (k := site.whole.shape[-1]) > 1:
            recipes = unrolled(recipes, k)
            t = {p: recipe(self._lying) for p, recipe in recipes.items()}
            rank = t["b"].shape[1]
            method = LoRA(rank=rank, alpha=method.scale * rank * k)
        if "m" in own and kind in (LoHa, LoKr):
            recipes = decomposed(recipes, kind)
            t = {p: recipe(self._lying) for p, recipe in recipes.items()}
            method = DoRA(rank=len(t["a"]), alpha=method.scale * len(t["a"]))
        if site is None:
            self.methods.setdefault(method, []).append(name)
            return
        for address, cut in self._parts(name, site, t):
            self.methods.setdefault(method, []).append(address)
            for p, recipe in recipes.items():
                part = cut.get(p, _same)
                self._add(f"{address}:{p}", lambda get, r=recipe, c=part: c(r(get)))

    def _read_turn(self, name: str, keys: dict[str, str], turn: Turn, site: Site | None) -> None:
        """Adds what is no product of factors."""
        if others := keys.keys() - {turn.mark, *turn.others}:
            raise self._refuse(f"{name} has {min(others)} beside {turn.mark}, which can't be read")
        if made := turn.read(keys, self.file):
            method, recipes = made
            address = site.address if site else name
            self.methods.setdefault(method, []).append(address)
            for p, recipe in recipes.items() if site else ():
                self._add(f"{address}:{p}", recipe)

    def _add(self, parameter: str, recipe: Recipe) -> None:
        self.entries[parameter] = Entry.of(recipe(self._lying))
        self._recipes[parameter] = recipe

    def _read_dense(self, name: str, theirs: str, key: str, site: Site | None) -> None:
        """Adds the difference of a whole tensor of a module: its weight or its bias."""
        slot, kind = self.peer.dense[theirs]
        sites = self.methods.setdefault(kind(), [])
        if site is None:
            if name not in sites[-1:]:
                sites.append(name)
            return
        paths = (path.removesuffix("weight") for path in site.names if path.endswith(".weight"))
        own = next((self._there[p + slot] for p in paths if p + slot in self._there), None)
        if own is None:
            raise self._refuse(f"has {key}, and {site.address} has no {slot} beside it")
        sites.append(own.address)
        self._add(f"{own.address}:difference", lambda get: get(key))

    def _kind(self, name: str, keys: Mapping[str, str]) -> tuple[Kind, dict[str, str]]:
        """A module's method, and its keys by our names of parameters."""
        for kind, names in self.peer.methods.items():
            own = {p: keys[theirs] for p, theirs in names.items() if theirs in keys}
            if len(own) < len(keys.keys() - {ALPHA, *self.peer.cores}):
                continue
            lost = [theirs for p, theirs in names.items() if p != "m" and p not in own]
            if kind is not LoKr and lost:
                raise self._refuse(f"{name} has no {lost[0]}")
            return kind, own
        raise self._refuse(f"{name} has {', '.join(keys)}: together these are no method here")

    def _made(
        self, name: str, own: Mapping[str, str], keys: Mapping[str, str], site: Site | None
    ) -> dict[str, Recipe]:
        """What makes our parameters, each in our shape."""
        lie = {p: self._lying(key) for p, key in own.items()}
        if "m" in lie and site is not None and site.layout.embeds:
            raise self._refuse(
                f"{name} is an embedding by DoRA with a norm for every row, and here DoRA has one "
                "for every column: merge it there, and pl.extract makes a delta of the model "
                "before and after"
            )
        if "m" in lie and self.peer.norms == 0 and len(lie["m"]) < lie["m"].numel():
            raise self._refuse(
                f"{name} is by DoRA with a norm for every input (wd_on_output=False), and here "
                "DoRA has one for every output: merge it there, and pl.extract makes a delta of "
                "the model before and after"
            )
        turned = self.peer.flips and (site.layout.transposed if site else _as_weight(**lie))
        views = {p: self._view(p, turned) for p in own}
        made: dict[str, Recipe] = {
            p: lambda get, key=key, view=views[p]: view(get(key)) for p, key in own.items()
        }
        for core in self.peer.cores.keys() & keys.keys():
            made |= tucker(made, self.peer.cores[core], keys[core])
        return made

    def _view(self, parameter: str, turned: bool) -> View:
        """What makes a parameter of ours of the peer's tensor."""
        axis = self.peer.norms

        def norms(x: Tensor) -> Tensor:
            return x.flatten() if x.dim() > axis and x.numel() == x.shape[axis] else x

        def factor(x: Tensor) -> Tensor:
            x = x.flatten(1) if x.dim() > 2 else x
            return x.mT if turned else x

        return norms if parameter == "m" else factor

    def _method(
        self, kind: Kind, name: str, keys: Mapping[str, str], t: Mapping[str, Tensor]
    ) -> Method:
        """A module's method, with the settings that its tensors and the file tell."""
        rank = next((t[p].shape[dim] for p, dim in RANKS if p in t), None)
        settings: dict[str, Any] = {}
        if kind is LoKr:
            first = t["w1"].shape if "w1" in t else (len(t["w1a"]), t["w1b"].shape[1])
            settings = {"factor": tuple(first), "decompose_both": "w1a" in t}
        if rank is None:  # both factors are whole, and α says nothing
            rank = max(n for x in t.values() for n in x.shape)
        elif ALPHA in keys:
            settings[ALPHA] = self.file.get(keys[ALPHA]).item()
        elif CONFIG in self.file.metadata:
            settings |= self._config(name, t["a"])
        elif self.peer.alpha is None:
            settings[ALPHA] = self._alpha()
        return kind(rank=rank, **settings)

    def _alpha(self) -> float:
        if ALPHA not in self.file.metadata:
            raise self._refuse(
                "such files don't say α: say it once, with "
                f"peftlite convert {self.file.path!r} NEW --alpha NUMBER"
            )
        return float(self.file.metadata[ALPHA])

    def _config(self, name: str, a: Tensor) -> dict[str, Any]:
        """The settings of a module in diffusers' metadata: peft's, of each part of a pipeline."""
        data = dict(json.loads(self.file.metadata[CONFIG]))
        part, _, path = name.partition(".")
        start = f"{part}."
        if own := {k.removeprefix(start): v for k, v in data.items() if k.startswith(start)}:
            data, name = own, path
        config = Config({"peft_type": "LORA", **data}, self.file.path)
        method: Any = FORMS["LORA"].method(config, Layer(name), {"lora_A.weight": a})
        config.take("bias", "none", str)  # a bias that is trained has a key, which can't be read
        config.finish()
        if method.init != "kaiming":
            raise ValueError(f"its base isn't the model's own, being trained with {method.init}")
        return {"alpha": method.alpha, "scaling": method.scaling}


def _as_weight(a: Tensor, b: Tensor) -> bool:
    """Whether factors lie as a weight whose inputs come first does."""
    return a.shape[0] != b.shape[1] and a.shape[1] == b.shape[0]


def _same(x: Tensor) -> Tensor:
    return x

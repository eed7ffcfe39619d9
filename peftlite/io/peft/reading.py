"""Reading: what a PEFT directory says, in peftlite's words.

The keys of its tensors say which modules it changes, the settings make a method for each, and what
is left over are modules saved whole, biases, and tokens. What nothing asks for stays in the content
under its own name, where the loader refuses it.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.patch import Method
from peftlite.core.site import Site, sites, walk
from peftlite.core.targets import select
from peftlite.core.tensors import wide
from peftlite.errors import FileError, PeftliteError
from peftlite.io.files import Entry, Tensors, reason
from peftlite.io.peft.config import Config, ends
from peftlite.io.peft.form import At, Form, fit
from peftlite.io.peft.forms import FORMS
from peftlite.methods.bitfit import BitFit
from peftlite.methods.full import FullTuning
from peftlite.methods.norm import NormTuning
from peftlite.methods.prefix import PrefixTuning
from peftlite.methods.prompt import PromptTuning
from peftlite.methods.sparse import SparseMask
from peftlite.table import listed, short

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
START, WRAPPED = "base_model.model.", "base_model."  # the latter where there is a prompt
LAYER, TOKENS = ".ln_tuning_layers.", ".trainable_tokens_delta"
PREFIX, PROMPTS = "PREFIX_TUNING", ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
KNOWN = (*FORMS, *PROMPTS, "LN_TUNING", "TRAINABLE_TOKENS")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")

Make = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def folders(path: Path) -> list[str]:
    """The folders in a folder that hold an adapter."""
    with contextlib.suppress(OSError):
        return sorted(child.name for child in path.iterdir() if (child / CONFIG).is_file())
    return []


def read_config(folder: Path) -> Config:
    """The settings in a folder. Raises FileError."""
    at = str(folder / CONFIG)

    def refuse(number: str) -> None:
        raise ValueError(f"{number} is no number")

    try:
        data = json.loads((folder / CONFIG).read_bytes(), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{at!r} is no JSON: {reason(error)}") from error
    kind = data.get("peft_type") if isinstance(data, dict) else None
    if kind not in KNOWN:
        raise FileError(
            f"{at!r} has the peft_type {short(kind)}, which can't be read; these can: "
            f"{', '.join(sorted(KNOWN))}"
        )
    return Config(data, at)


def _open(path: Path) -> tuple[Config, Tensors]:
    """The settings and the tensors in a folder."""
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file():
        names = folders(folder)
        raise FileError(
            f"{str(folder)!r} has its adapters in folders of their own: {listed(names)}; load one: "
            f"{str(folder / names[0])!r}"
        )
    old, new = folder / "adapter_model.bin", folder / MODEL
    if old.exists() and not new.exists():
        raise FileError(
            f"{str(old)!r} is a pickle, which may run code as it is read; convert it first: "
            f"safetensors.torch.save_file(torch.load({str(old)!r}, weights_only=True), "
            f"{str(new)!r})"
        )
    return read_config(folder), Tensors(new)


def _plain(path: str) -> str:
    """A path in the model, without the layers that peft puts around its modules."""
    return re.sub(r"(\.base_layer)+(?=\.)", "", path)


def _difference(key: str, saved: Tensor, w: Tensor) -> Tensor:
    """What was saved as it is, as a change of the base's. Raises ValueError."""
    if saved.shape != w.shape or not saved.is_floating_point():
        raise ValueError(
            f"{key} is {saved.dtype} {tuple(saved.shape)}, and here {w.dtype} {tuple(w.shape)}: "
            "give the model that shape first (for tokens: model.resize_token_embeddings)"
        )
    dtype = wide(saved, w)
    return saved.to(dtype) - w.detach().to(saved.device, dtype)


class Reading:
    """An adapter as it is understood; without a model, its methods and modules alone."""

    def __init__(self, path: Path, model: nn.Module | None = None):
        self.config, self.file = _open(path)
        self.model = model
        name = Path(self.config.at).resolve().parent.name
        self.name = name if _NAME.fullmatch(name) else "default"
        self.methods: dict[Method, list[str]] = {}
        self.entries: dict[str, Entry] = {}
        self._sources: dict[str, tuple[Make, dict[str, str]]] = {}
        self._held: tuple[Make | None, Mapping[str, Tensor]] = (None, {})
        self._sites = {n: s for s in sites(model) for n in s.names} if model is not None else {}
        self._modules = dict(walk(model)) if model is not None else {}
        self._changed: set[str] = set()  # the modules that there are tensors of
        kind = self.config.data["peft_type"]
        start = WRAPPED if kind in PROMPTS else START
        # the keys that nothing has asked for yet, by what is behind the name of peft's wrapper
        self._left = {key.removeprefix(start): key for key in self.file.entries}
        with self._fitting():
            self._read(kind)
        self.config.finish()
        self.entries |= {key: self.file.entries[key] for key in self._left.values()}

    def get(self, key: str) -> Tensor:
        """A tensor's values; what is made from the same of the file's tensors is made once."""
        (make, keys), held = self._sources[key], self._held
        if held[0] is not make:
            with self._fitting():
                held = make, make({name: self.file.get(k) for name, k in keys.items()})
            self._held = held  # at once: the loader asks from several threads
        return held[1][key]

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        """Says which file it is of what is found wrong with its parts."""
        try:
            yield
        except FileError:
            raise
        except KeyError as error:
            raise FileError(f"{self.file.path!r} has a module without its {error}") from error
        except PeftliteError as error:
            raise FileError(f"{self.config.at!r} has an impossible setting: {error}") from error
        except (ValueError, TypeError, RuntimeError, IndexError, ArithmeticError) as error:
            raise FileError(f"{self.file.path!r} has odd tensors: {reason(error)}") from error

    def _read(self, kind: str) -> None:
        if kind in PROMPTS:
            self._read_prompt(kind)
        if kind in FORMS:
            self._read_modules(FORMS[kind])
        self._read_wholes(kind)
        self._read_tokens()
        self._drop_copies()
        self._check_modules()
        self._join_ties()

    def _add(self, keys: Mapping[str, str], make: Make) -> None:
        """Adds what `make` gives of some of the file's tensors, by names of its own for them."""
        made = make({name: self.file.entries[key].meta for name, key in keys.items()})
        for key, tensor in made.items():
            self.entries[key] = Entry.of(tensor)
            self._sources[key] = (make, dict(keys))

    def _place(self, method: Method, address: str) -> None:
        addresses = self.methods.setdefault(method, [])
        if address not in addresses:
            addresses.append(address)

    # -- the modules that a method has tensors of

    def _read_modules(self, form: Form) -> None:
        modules: dict[str, dict[str, str]] = {}
        for rest, key in self._left.items():
            for name, _ in form.names:
                if rest.endswith(f".{name}"):
                    modules.setdefault(rest.removesuffix(f".{name}"), {})[name] = key
                    break
        shared = [key for n in form.shared if (key := f"base_model.{n}") in self._left]
        for path, keys in modules.items():
            self._changed.add(_plain(path))
            at = self._at(path)
            t = {name: self.file.entries[key].meta for name, key in keys.items()}
            method = form.method(self.config, at, t)
            if method is None:
                self._use(keys.values())
            elif at.site is None:
                self._place(method, path if self.model is None else f"{path}.weight")
                self._use(keys.values())
            else:
                self._read_module(form, method, at, keys)
        if self.model is not None and self.methods:
            self._read_shared(form, shared)

    def _use(self, keys: Iterable[str]) -> None:
        used = {*keys}
        self._left = {rest: key for rest, key in self._left.items() if key not in used}

    def _read_module(self, form: Form, method: Method, at: At, keys: dict[str, str]) -> None:
        def address(slot: str) -> str:
            return f"{at.path}{slot}" if slot == "()" else f"{at.path}.{slot}"

        def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
            parts = [its.items() for _, its in form.parts(method, dict(t), at)]
            return {address(own): x for its in parts for own, x in its if x is not None}

        t = {name: self.file.entries[key].meta for name, key in keys.items()}
        for how, tensors in form.parts(method, t, at):  # which takes what it uses out of t
            for own in tensors:
                self._place(how, address(own.partition(":")[0]))
        used = {name: key for name, key in keys.items() if name not in t}
        self._use(used.values())
        self._add(used, make)

    def _read_shared(self, form: Form, shared: list[str]) -> None:
        method, addresses = next(iter(self.methods.items()))
        found = [self._sites.get(address) for address in addresses]
        where = [replace(site, on="cpu") for site in found if site is not None]
        if len(where) < len(addresses):
            return

        def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
            made = form.read_shared(method, where, list(t.values()))
            return {f"{addresses[0]}:{name}": x for name, x in made.items()}

        self._use(shared)
        self._add({key: key for key in shared}, make)
        make({key: self.file.get(key) for key in shared})  # looks at them

    def _at(self, path: str) -> At:
        """The module at a path, and the site that is changed there."""
        inner = path
        while inner.endswith(".base_layer"):
            inner = inner.removesuffix(".base_layer")
        depth = (len(path) - len(inner)) // len(".base_layer")
        inner = _plain(inner)
        chosen = self._parameters(inner)
        if depth < len(chosen):  # the last of a module's parameters is outermost
            return At(inner, chosen[-1 - depth])
        path = inner + ".base_layer" * depth
        attention = self._sites.get(f"{path}.in_proj_weight")
        return At(path, attention or self._sites.get(f"{path}.weight"))

    def _parameters(self, path: str) -> list[Site]:
        """The parameters of a module that peft was given by name."""
        names = self.config.names("target_parameters")
        module = self._modules.get(path)
        own = [f"{path}.{slot}" for slot in (module._parameters if names and module else ())]
        return [self._sites[a] for a in own if a in self._sites and any(ends(a, n) for n in names)]

    # -- what is saved as it is, not as a change

    def _read_wholes(self, kind: str) -> None:
        """Modules that were saved whole, and biases."""
        biases = self.config.take("bias", "none", str) != "none"
        for rest in list(self._left):
            address = _plain(rest)
            path, _, slot = address.rpartition(".")
            if kind == "LN_TUNING" and LAYER in rest:
                self._changed.add(address.partition(LAYER)[0])
                flat = len(self.file.entries[self._left[rest]].shape) == 1
                how = NormTuning() if flat else FullTuning()
                self._read_whole(how, rest, address.replace(LAYER, "."))
            elif self._is_saved(path):
                self._read_whole(FullTuning(), rest, address)
            elif biases and slot == "bias":
                self._read_whole(BitFit(), rest, address)

    def _is_saved(self, path: str) -> bool:
        """Whether a module, or one around it, is one that was saved whole."""
        steps, names = path.split("."), self.config.names("modules_to_save")
        around = [".".join(steps[: n + 1]) for n in range(len(steps))]
        return any(its.endswith(name) for its in around for name in names)

    def _check_modules(self) -> None:
        """Raises FileError if a module that the settings name has no tensors."""
        named, data = self.config.data.get("target_modules"), self.config.data
        some = any(data.get(k) for k in ("exclude_modules", "layers_to_transform"))
        given = {address for its in self.methods.values() for address in its}
        first = {id(module): path for path, module in reversed([*self._modules.items()])}.values()
        lost = [p for p in first if self._is_saved(p) for slot in self._modules[p]._parameters
                if f"{p}.{slot}" in self._sites and f"{p}.{slot}" not in given]  # fmt: skip
        for name in named if isinstance(named, list) and not some else ():
            paths = [name] if name in first else [p for p in first if ends(p, str(name))]
            lost += [p for p in paths if p not in self._changed and not self._is_saved(p)]
        if lost:
            raise FileError(
                f"{self.file.path!r} lacks the tensors of {len(lost)} modules that {CONFIG} "
                f"names: {listed(lost)}"
            )

    def _read_whole(self, method: Method, rest: str, address: str) -> None:
        """The difference of a tensor from the base's."""
        site, buffer = self._sites.get(address), self._buffer(address)
        if buffer is not None:
            return self._compare(rest, buffer)
        self._place(method, address)
        key = self._left.pop(rest)
        if site is None:
            return

        def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
            return {f"{address}:difference": _difference(key, t[key], site.whole)}

        self._add({key: key}, make)

    def _read_tokens(self) -> None:
        """Rows of embeddings."""
        which: Any = self.config.take("trainable_token_indices", None, list, dict)
        which = self.config.take("token_indices", which, list)
        for rest in [rest for rest in self._left if rest.endswith(TOKENS)]:
            path = _plain(rest.removesuffix(TOKENS).removesuffix(".token_adapter"))
            rows = which
            if isinstance(which, dict):
                rows = next((v for name, v in which.items() if ends(path, name)), None)
            if not isinstance(rows, list) or not all(type(i) is int and i >= 0 for i in rows):
                raise FileError(f"{self.config.at!r} has {short(rows)} for the tokens of {path}")
            self._changed.add(path)
            self._read_rows(rest, f"{path}.weight", torch.tensor(rows, dtype=torch.int64))

    def _read_rows(self, rest: str, address: str, rows: Tensor) -> None:
        key, site = self._left.pop(rest), self._sites.get(address)
        self._place(SparseMask(select="given"), address)
        if site is None:
            return
        n, d = site.shape
        if len(rows.unique()) < len(rows) or not all(i < n for i in rows):
            raise ValueError(f"the tokens of {address} are beyond its {n}, or named twice")

        def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
            change = _difference(key, t[key], site.whole[rows.to(site.device)])
            order = rows.argsort()
            at = (rows[order, None] * d + torch.arange(d)).flatten().int().to(change.device)
            return {f"{address}:values": change[order].flatten(), f"{address}:indices": at}

        self._add({key: key}, make)

    def _read_prompt(self, kind: str) -> None:
        """The rows of a prompt or a prefix, whatever network they once came from."""
        take = self.config.take
        n, copies = (take(k, 1, int) for k in ("num_virtual_tokens", "num_transformer_submodules"))
        width, heads = take("token_dim", 0, int), take("num_attention_heads", 0, int) or 1
        take("num_layers", None, int)
        take("prefix_projection", None, bool)
        for name in self.config.data:
            if name.startswith(("prompt_tuning_", "encoder_", "tokenizer_")):
                take(name, None, str, int, float, dict)
        # in peft what pools the first position has a virtual token there
        pools = any(getattr(m, "pooler", None) is not None for m in self._modules.values())
        method: Any = PromptTuning(prompt_length=n, cut=not pools)
        if kind == PREFIX:
            method = PrefixTuning(prefix_length=n, num_heads=heads, head_dim=width // heads)
        self.methods[method] = [""]
        if self.model is None:
            return
        where = [site for site, _ in select(sites(self.model), None, None, method)]
        patches = method.build_all([replace(site, on="meta") for site in where])
        its = [f"{s.address}:{k}" for s, p in zip(where, patches, strict=True) for k in p.saved()]
        self.methods[method] = [site.address for site in where]
        key = self._left.pop("prompt_embeddings")

        def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
            rows = t[key]
            if kind == PREFIX:  # a token's keys and values lie side by side for all layers
                layers = fit(rows, n, len(its) * 2 * width).view(n, len(its), 2, heads, -1)
                return {k: layers[:, i].permute(1, 2, 0, 3) for i, k in enumerate(its)}
            # of an encoder's and a decoder's, peft uses the first
            return {its[0]: rows[:n] if len(rows) == n * copies else rows}

        self._add({key: key}, make)
        if kind == PREFIX:
            warnings.warn(
                f"{self.file.path!r}: peft has a sequence's positions begin at {n}, behind the "
                f"prefix, and here they begin at 0; for peft's outputs add {n} to position_ids",
                stacklevel=7,
            )

    # -- what has to be as it is in the base

    def _drop_copies(self) -> None:
        """The base's own weights, which peft saves beside some adapters."""
        outer = []
        for name in ("get_input_embeddings", "get_output_embeddings"):
            with contextlib.suppress(AttributeError, NotImplementedError):
                outer.append(getattr(self.model, name)())
        for rest in list(self._left):
            plain = _plain(rest).replace(".original_module.", ".")
            site = self._sites.get(plain)
            if site is not None and (plain != rest or any(site.module is m for m in outer)):
                self._compare(rest, site.whole)

    def _compare(self, rest: str, mine: Tensor) -> None:
        key = self._left.pop(rest)
        theirs = self.file.get(key)
        if theirs.shape != mine.shape or not torch.equal(theirs, mine.detach().cpu().to(theirs)):
            raise FileError(
                f"{self.file.path!r} holds {key} of a base that had other values there: give the "
                "model those, or list the module in 'modules_to_save' of its settings, for the "
                "delta to have them"
            )

    def _buffer(self, address: str) -> Tensor | None:
        path, _, name = address.rpartition(".")
        module = self._modules.get(path)
        return None if module is None else module._buffers.get(name)

    def _join_ties(self) -> None:
        """Makes one site of a tied weight's tensors, if they are equal. Raises FileError."""
        for method, addresses in self.methods.items():
            tied: dict[int, list[str]] = {}
            for address in addresses:
                site = self._sites.get(address)
                if site is not None and len(site.owners) > 1:
                    tied.setdefault(id(site), []).append(address)
            for names in tied.values():
                self._join(method, names, self._sites[names[0]])

    def _join(self, method: Method, names: list[str], site: Site) -> None:
        keys = [f"{name}:difference" for name in names]
        if isinstance(method, SparseMask):
            return  # peft changes the tokens of both
        if (
            len(names) < len(site.owners)
            or not all(key in self._sources for key in keys)
            or not all(torch.equal(self.get(keys[0]), self.get(key)) for key in keys[1:])
        ):
            path = site.names[-1].rpartition(".")[0]
            others = [name for name in site.names if name not in names] or names[1:]
            raise FileError(
                f"{self.file.path!r} changes {names[0]} apart from {listed(others)}, and this "
                f"model ties them: untie them first, model.{path}.weight = "
                f"torch.nn.Parameter(model.{path}.weight.detach().clone())"
            )
        for name, key in zip(names[1:], keys[1:], strict=True):
            self.methods[method].remove(name)
            del self.entries[key], self._sources[key]

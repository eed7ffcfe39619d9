"""Adapter and Claim: a folder beside the model that it is for, and what is made of some keys of it.

Each step of reading is a function of an adapter and the keys that are left; it gives claims. What
no step has claimed stays in the content under its own name, where the loader refuses it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from peftlite.core.patch import Method
from peftlite.core.site import Site, walk
from peftlite.core.tensors import wide
from peftlite.errors import FileError, PeftliteError, reason
from peftlite.io.files import Entry, Tensors
from peftlite.io.names import Names, Spelling
from peftlite.io.peft.config import Config
from peftlite.io.peft.folder import PROMPTS, START, WRAPPED, open_folder
from peftlite.io.peft.targets import replaced

Make = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
Left = Mapping[str, str]
"""The file's keys that nothing has claimed, by what is behind the name of peft's wrapper."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def _nothing(t: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True, eq=False)
class Claim:
    """Keys of a file, and what they are here.

    Args:
        keys: the file's, by the names that `make` knows them by.
        placed: the methods that they are of, each with an address.
        make: our tensors by our keys, from the file's by their names.
        entries: which of them are wanted, with their dtypes and shapes.
        module: the path of the module that `target_modules` names for them; "" if none.
    """

    keys: Mapping[str, str]
    placed: Sequence[tuple[Method, str]] = ()
    make: Make = _nothing
    entries: Mapping[str, Entry] = field(default_factory=dict)
    module: str = ""


class Adapter:
    """A folder's settings and tensors, and the model's sites and modules by name.

    Args:
        path: the folder, or its file of tensors.
        model: the model, with its sites; None to read what the folder says by itself.
    """

    config: Config
    file: Tensors
    model: nn.Module | None
    everything: Sequence[Site]

    def __init__(self, path: Path, model: nn.Module | None, sites: Sequence[Site]):
        self.config, self.file = open_folder(path)
        self.kind: str = self.config.data["peft_type"]
        name = Path(self.config.path).resolve().parent.name
        self.name: str = name if _NAME.fullmatch(name) else "default"
        self.model, self.everything = model, sites
        start = WRAPPED if self.kind in PROMPTS else START
        self.keys: Left = {key.removeprefix(start): key for key in self.file.entries}
        modules = {} if model is None else dict(walk(model))
        own = {*modules, *(name for site in sites for name in site.names)}
        lists = [its for its in self.config.data.values() if isinstance(its, list)]
        said = [name for its in lists for name in its if isinstance(name, str)]
        spelling = Spelling(Names(model, own), [*said, *map(plain, self.keys)])
        # as the settings and the keys name them, and what the model calls them
        self.sites: dict[str, Site] = {
            name: its for its in map(spelling.site, sites) for name in its.names
        }
        self.modules: dict[str, nn.Module] = {
            spelling.of(path): module for path, module in modules.items()
        }
        self.own: dict[str, str] = {spelling.of(name): name for name in own}

    def seen(self, address: str) -> Site:
        """The site at an address, the owner of that name first: each may lie it another way."""
        site, (path, _, slot) = self.sites[address], address.rpartition(".")
        module = site.module if site.is_call else self.modules[path]
        if module is site.module:
            return site
        return replace(site, owners=((module, slot), *site.owners))

    def left(self, claims: Sequence[Claim]) -> Left:
        """What none of the claims is for."""
        claimed = {key for claim in claims for key in claim.keys.values()}
        return {rest: key for rest, key in self.keys.items() if key not in claimed}

    def meta(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """Tensors of the file, without values."""
        return {name: self.file.entries[key].meta for name, key in keys.items()}

    def values(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """Tensors of the file."""
        return {name: self.file.get(key) for name, key in keys.items()}

    def claim(
        self,
        keys: Mapping[str, str],
        placed: Sequence[tuple[Method, str]],
        make: Make,
        module: str = "",
    ) -> Claim:
        """A claim, its tensors made without values first, for what comes of them."""
        made = make(self.meta(keys))
        entries = {key: Entry.of(tensor) for key, tensor in made.items()}
        return Claim(keys, placed, make, entries, module)

    def made(self, claim: Claim) -> Mapping[str, Tensor]:
        """A claim's tensors, with values. Raises FileError."""
        with self.fitting():
            return claim.make(self.values(claim.keys))

    def replaces(self, path: str) -> bool:
        """Whether a module, or one around it, is one that was saved as it was in the end."""
        return replaced(self.config, path)

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """Says which file it is of what is found wrong with its parts."""
        try:
            yield
        except FileError:
            raise
        except KeyError as error:
            raise FileError(f"{self.file.path!r} has a module without its {error}") from error
        except PeftliteError as error:
            raise FileError(f"{self.config.path!r} has an impossible setting: {error}") from error
        except (ValueError, TypeError, RuntimeError, IndexError, ArithmeticError) as error:
            raise FileError(f"{self.file.path!r} has odd tensors: {reason(error)}") from error


def plain(path: str) -> str:
    """A path in the model, without the layers that peft puts around its modules."""
    return re.sub(r"(\.base_layer)+(?=\.)", "", path)


def never_run(adapter: Adapter, path: str) -> bool:
    """Whether a module is an attention's last map, which peft runs with the attention alone."""
    outer, _, name = path.rpartition(".")
    return name == "out_proj" and isinstance(adapter.modules.get(outer), nn.MultiheadAttention)


def difference(key: str, saved: Tensor, w: Tensor) -> Tensor:
    """What was saved as it is, as a change of the base's. Raises ValueError."""
    if saved.shape != w.shape or not saved.is_floating_point():
        raise ValueError(
            f"{key} is {saved.dtype} {tuple(saved.shape)}, and here {w.dtype} {tuple(w.shape)}: "
            "give the model that shape first (for tokens: model.resize_token_embeddings)"
        )
    dtype = wide(saved, w)
    return saved.to(dtype) - w.detach().to(saved.device, dtype)

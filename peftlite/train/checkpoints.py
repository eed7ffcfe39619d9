"""Checkpoints: folders from which training goes on to the bit, with deltas to use as they are.

    step-00000120-epoch-3/          or step-00000100, between epochs
        sql.safetensors             the delta, for pl.load
        training.state.safetensors  the tensors of optimizer, generators, …
        training.state.json         all else
        manifest.json               the SHA-256 of each, written last: without it, nothing counts

No pickle. An older one is deleted only after a newer one is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftlite.core.delta import Delta
from peftlite.errors import BaseMismatchError, FileError
from peftlite.io import native
from peftlite.io.content import Content
from peftlite.io.files import (
    Tensors,
    as_path,
    flush_folder,
    locking,
    reason,
    replacing,
    write_file,
    writing_to,
)
from peftlite.table import listed
from peftlite.train.state import Tree, pack, unpack

FORMAT = 1
Bases = Mapping[str, Any]
"""What each delta was made for, by its name, as `native.base_of` has it."""

NAME = re.compile(r"step-(\d{8,})(-epoch-\d+)?")
MANIFEST, STATE = "manifest.json", "training.state"


class Checkpoints:
    """The checkpoints in a folder; `keep` of those at the end of an epoch, and of those between.

    Those between come `every` so many steps; None for none.
    The bases are fingerprinted before training: once they are sharded, that takes all processes,
    and the first alone writes.
    """

    folder: Path
    keep: int
    every: int | None
    bases: Bases | dict[str, Any]

    def __init__(
        self, folder: Path, keep: int, every: int | None = None, bases: Bases | None = None
    ) -> None:
        self.folder, self.keep, self.every, self.bases = folder, keep, every, bases or {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder, made if need be, is no other Trainer's while this lasts. Raises FileError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = locking(self.folder)
        except OSError as error:
            raise FileError(
                f"{str(self.folder)!r} can't hold checkpoints: {reason(error)}"
            ) from error
        with lock as ours:
            if not ours:
                raise FileError(
                    f"another Trainer is at work in {str(self.folder)!r}: wait for it, or give "
                    "another folder"
                )
            yield

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written within an epoch, after a step."""
        return step > 0 and self.every is not None and step % self.every == 0

    def candidates(self) -> list[Path]:
        """All folders named as checkpoints, the oldest first, unfinished ones among them."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        steps = {path: match for path in found if (match := NAME.fullmatch(path.name))}
        return sorted(steps, key=lambda path: int(steps[path][1]))

    def finished(self) -> list[str]:
        """The names of the checkpoints that were written to the end."""
        return [path.name for path in self.candidates() if (path / MANIFEST).exists()]

    def write(self, name: str, deltas: Sequence[Delta], state: dict[str, Tree], best: str) -> None:
        """Writes a checkpoint, then deletes those that needn't be kept: not the `best`."""
        path = self.folder / name
        with writing_to(path):
            _delete(path)  # of a run that went on from an earlier checkpoint
            path.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        unsaved = {}
        place = {key: state["place"][key] for key in ("step", "epoch")}
        for delta in deltas:
            base = self.bases[delta.name]
            native.write(delta, path / f"{delta.name}.safetensors", base, notes=place)
            saved, own = delta.saved(), state["deltas"][delta.name]
            unsaved[delta.name] = {key: t for key, t in own.items() if key not in saved}
        plain = pack({**state, "deltas": unsaved}, tensors)
        write_file(path / f"{STATE}.safetensors", tensors)
        _write(path / f"{STATE}.json", json.dumps({"format": FORMAT, **plain}, indent=1))
        _write(path / MANIFEST, _manifest(path))
        flush_folder(self.folder)
        self._prune({name, best})

    def _prune(self, kept: set[str]) -> None:
        finished = self.finished()
        ends = [name for name in finished if "epoch" in name]
        between = [name for name in finished if name not in ends]
        kept = kept.union(ends[-self.keep :], between[-self.keep :])
        for path in self.candidates():
            if path.name not in kept:
                _delete(path)

    def resume(
        self, given: Any, model: nn.Module, deltas: Sequence[Delta], settings: dict[str, Any]
    ) -> dict[str, Tree] | None:
        """The state to go on from, as `fit(resume=given)` says; None to begin. Raises FileError."""
        if not given:
            if self.finished():
                raise FileError(
                    f"{str(self.folder)!r} has checkpoints already: fit(resume=True) goes on from "
                    "them; to begin anew, give another folder"
                )
            return None
        path = self.newest() if given is True else as_path(given)
        if path is None:
            return None
        state = read(path, deltas, self.bases)
        theirs = {**settings, **state["settings"]}
        if others := [k for k, v in settings.items() if theirs[k] != v]:
            differences = listed(f"{k}={theirs.get(k)!r}, not {settings[k]!r}" for k in others)
            raise FileError(
                f"checkpoint {str(path)!r} is of a run with other settings, {differences}: go on "
                "with those, or begin anew in another folder"
            )
        return state

    def newest(self) -> Path | None:
        """The newest undamaged checkpoint; warns of newer ones. Raises FileError if none is."""
        damaged: dict[str, str] = {}
        for path in self.candidates()[::-1]:
            if (damage := _damage(path)) is None:
                for name, why in damaged.items():
                    message = f"checkpoint {name!r} is not whole: {why}"
                    warnings.warn(f"{message}; going on from {path.name!r}", stacklevel=8)
                return path
            damaged[path.name] = damage
        if self.finished():
            raise FileError(
                f"none of the checkpoints in {str(self.folder)!r} is whole: to begin anew, give "
                "another folder"
            )
        return None


def read(path: Path, deltas: Iterable[Delta], bases: Bases) -> dict[str, Tree]:
    """The state in a checkpoint, for deltas of a model. Raises FileError."""
    if (damage := _damage(path)) is not None:
        raise FileError(f"checkpoint {str(path)!r} is not whole: {damage}")
    tensors = Tensors(path / f"{STATE}.safetensors")
    plain = json.loads((path / f"{STATE}.json").read_text())
    if plain["format"] > FORMAT:
        raise FileError(f"checkpoint {str(path)!r} is of a newer peftlite: upgrade peftlite")
    state = unpack(plain, {key: tensors.get(key) for key in tensors.entries})
    names = {delta.name: delta for delta in deltas}
    if {*state["deltas"]} != {*names}:
        raise FileError(
            f"checkpoint {str(path)!r} is of {listed(map(repr, state['deltas']))}; in training "
            f"here is {listed(map(repr, names))}: attach what was attached then"
        )
    for name, delta in names.items():
        content = native.read(path / f"{name}.safetensors")
        if others := [*_other_settings(content, delta)]:
            raise FileError(
                f"checkpoint {str(path)!r} is of a run with other methods, {listed(others)}: go on "
                "with those, or begin anew in another folder"
            )
        if content.base != bases[name]:
            raise BaseMismatchError(
                f"checkpoint {str(path)!r} was made on other base weights: go on with the model "
                "it was begun with"
            )
        state["deltas"][name] |= {key: content.get(key).clone() for key in content.entries}
    return state


def _other_settings(content: Content, delta: Delta) -> Iterator[str]:
    """How the methods of a delta are other than those in a file, in words."""
    both = native.described(content.methods), native.methods_of(delta)
    theirs, ours = json.loads(json.dumps(both))
    kinds = [[each["method"] for each in methods] for methods in (theirs, ours)]
    if kinds[0] != kinds[1]:
        yield f"{listed(kinds[0])}, not {listed(kinds[1])}"
        return
    for a, b in zip(theirs, ours, strict=True):
        for key, value in a["config"].items():
            if value != b["config"][key]:
                yield f"{key}={value!r}, not {b['config'][key]!r}"
        if a["sites"] != b["sites"]:
            yield f"{a['method']} at other sites"


def _damage(path: Path) -> str | None:
    """The damage of a checkpoint, in words; None for a sound one."""
    try:
        manifest = (path / MANIFEST).read_text()
        return None if manifest == _manifest(path) else "its files aren't what was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError) as error:
        return reason(error)


def _manifest(path: Path) -> str:
    names = sorted(each.name for each in path.iterdir() if each.name != MANIFEST)
    return json.dumps({name: _sha256(path / name) for name in names}, indent=1) + "\n"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _delete(path: Path) -> None:
    """Deletes a checkpoint; half deleted, it passes for none."""
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)
        flush_folder(path)
        shutil.rmtree(path)

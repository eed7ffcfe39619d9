"""peftlite's file: one safetensors file with the tensors, the methods and the base's fingerprint.

Tensors are named `address:parameter`. One metadata entry, `peftlite`, holds JSON:

    {"format": 1, "library": "0.1.0", "name": "sql",
     "methods": [{"method": "LoRA", "config": {"rank": 8, …}, "sites": ["layers.0.q.weight", …]}],
     "base": {"layers.0.q.weight": "<sha-256 of its dtype, shape and bytes>", …}}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from peftlite import site
from peftlite.delta import Delta, Placed, check, commit
from peftlite.errors import BaseMismatchError, FileError, PeftliteError
from peftlite.patch import Method
from peftlite.site import whole_address
from peftlite.table import few, size, table

FORMAT = 1
_KEY = "peftlite"


@dataclass(frozen=True)
class Info:
    """What a file says of itself: its delta's name, its methods with their sites, its tensors."""

    name: str
    library: str
    methods: list[tuple[Method, list[str]]]
    base: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    num_bytes: int

    @property
    def num_parameters(self) -> int:
        return sum(_numel(shape) for _, shape in self.tensors.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{type(m).__name__} at {len(where)} sites" for m, where in self.methods)
        rows = [
            [key, dtype, "×".join(map(str, shape)), f"{_numel(shape):,}"]
            for key, (dtype, shape) in self.tensors.items()
        ]
        head = f"{self.name!r}: {kinds}, {size(self.num_bytes)}, by peftlite {self.library}"
        return f"{head}\n{table(['tensor', 'dtype', 'shape', 'numbers'], rows)}"


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


# -- writing


def save(delta: Delta, path: str | os.PathLike[str]) -> None:
    """Writes a delta to one file, whole or not at all: an older file stays until the new is safe.

    Saving twice gives the same bytes. Raises FileError.
    """
    tensors = {key: t.detach().cpu().contiguous() for key, t in delta.state_dict().items()}
    if on_meta := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise FileError(f"{on_meta[0]} is on the meta device and has no values to save")
    groups: dict[int, list[str]] = {id(method): [] for method in delta.methods}
    for address, placed in delta.placed.items():
        groups[id(placed.method)].append(address)
    header = {
        "format": FORMAT,
        "library": _library(),
        "name": delta.name,
        "methods": [
            {"method": type(m).__name__, "config": _config(m), "sites": groups[id(m)]}
            for m in delta.methods
        ],
        "base": _fingerprints(delta),
    }
    text = json.dumps(header, ensure_ascii=False, sort_keys=True, allow_nan=False)
    _write(Path(path), safetensors.torch.save(tensors, {_KEY: text}))


def _library() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("peftlite")
    except PackageNotFoundError:
        return "unknown"


def _config(method: Method) -> dict[str, Any]:
    """A method's hyperparameters as JSON. Where it sits is in the sites, not in its targets."""
    config = {
        f.name: getattr(method, f.name)
        for f in dataclasses.fields(method)
        if f.name not in ("targets", "exclude")
    }
    if isinstance(config["dtype"], torch.dtype):
        config["dtype"] = str(config["dtype"]).removeprefix("torch.")
    return config


def _fingerprints(delta: Delta) -> dict[str, str]:
    """The digest of every tensor the delta changes, as the base has it without the delta."""
    originals = delta.originals or {}
    found = {}
    for address, placed in delta.placed.items():
        whole = whole_address(address)
        if not placed.site.is_call and whole not in found:
            found[whole] = _fingerprint(originals.get(whole, placed.site.whole))
    return found


def _fingerprint(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(data.view(torch.uint8).numpy() if data.numel() else b"")
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write, flush to the disk, rename, flush the folder: at no moment is there half a file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FileError(f"can't write {str(path)!r}: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# -- reading


def inspect(path: str | os.PathLike[str]) -> Info:
    """What is in a file, without a model. Raises FileError."""
    info, _ = _read(path, values=False)
    return info


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    trainable: bool = False,
    check_base: Literal["error", "warn", "off"] = "error",
) -> Delta:
    """Attaches the delta in a file and makes it the standing choice.

    Everything is checked before the model is touched: that every site is there, that every tensor
    fits and none is left over, that all values are finite, and that the base has the very weights
    the delta was made for.

    Args:
        name: the delta's name in this model; the one it was saved with if None.
        trainable: whether its parameters get gradients.
        check_base: what to do if the base's weights differ: raise, warn, or not look.

    Raises:
        BaseMismatchError: the delta was made for other weights.
        FileError: the file is no delta, is damaged, or doesn't fit.
        PeftliteError: the name is taken.
    """
    if check_base not in ("error", "warn", "off"):
        raise PeftliteError(f"check_base must be 'error', 'warn' or 'off', not {check_base!r}")
    info, tensors = _read(path, values=True)
    check(model, info.name if name is None else name)
    placed = _place(model, info, path)
    if check_base != "off":
        _check_base(info, placed, path, check_base)
    methods = [method for method, _ in info.methods]
    delta = Delta(info.name if name is None else name, methods, placed)
    _fill(delta, tensors, path)
    delta.requires_grad_(trainable)
    return commit(model, delta)


def _read(path: str | os.PathLike[str], values: bool) -> tuple[Info, dict[str, Tensor]]:
    shown = str(path)
    tensors: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(shown, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {}
            for key in sorted(file.keys()):
                part = file.get_slice(key)
                shapes[key] = (part.get_dtype(), tuple(part.get_shape()))
                if values:
                    tensors[key] = file.get_tensor(key)
    except FileNotFoundError as error:
        raise FileError(f"there is no file {shown!r}") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise FileError(f"{shown!r} is no safetensors file, or is damaged: {error}") from error
    if _KEY not in metadata:
        raise FileError(f"{shown!r} is a safetensors file, but not one that pl.save wrote")
    try:
        header = json.loads(metadata[_KEY])
        if header["format"] > FORMAT:
            raise FileError(
                f"{shown!r} has format {header['format']}, and this peftlite reads up to {FORMAT}: "
                "upgrade peftlite"
            )
        info = Info(
            name=header["name"],
            library=header["library"],
            methods=[(_method(entry, shown), list(entry["sites"])) for entry in header["methods"]],
            base=dict(header["base"]),
            tensors=shapes,
            num_bytes=os.path.getsize(shown),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{shown!r} has a header that can't be read: {error!r}") from error
    return info, tensors


def _method(entry: Mapping[str, Any], shown: str) -> Method:
    kind = Method.known.get(entry["method"])
    if kind is None:
        raise FileError(
            f"{shown!r} holds the method {entry['method']!r}, which isn't known here; known are "
            f"{', '.join(sorted(Method.known))} (a method of your own: import it first)"
        )
    config = dict(entry["config"])
    if config.get("dtype") is not None:
        config["dtype"] = getattr(torch, config["dtype"])
    fields = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(config) - fields):
        raise FileError(f"{shown!r}: {entry['method']} has no setting {unknown[0]!r} here")
    try:
        return kind(**config)
    except PeftliteError as error:
        raise FileError(f"{shown!r} has an impossible setting: {error}") from error


def _place(model: nn.Module, info: Info, path: Any) -> list[Placed]:
    addresses = [address for _, where in info.methods for address in where]
    if len(set(addresses)) < len(addresses):
        raise FileError(f"{str(path)!r} names a site twice")
    found, missing = site.locate(model, addresses)
    if missing:
        raise FileError(
            f"{str(path)!r} is for a model with other sites: this one has no {few(missing)}"
        )
    try:
        return [
            Placed.build(found[address], method)
            for method, where in info.methods
            for address in where
        ]
    except PeftliteError as error:
        raise FileError(f"{str(path)!r} doesn't fit this model: {error}") from error


def _check_base(info: Info, placed: Iterable[Placed], path: Any, mode: str) -> None:
    wholes = {whole_address(p.site.address): p.site.whole for p in placed if not p.site.is_call}
    wrong = [
        address
        for address, tensor in wholes.items()
        if not tensor.is_meta and info.base.get(address) != _fingerprint(tensor)
    ]
    if not wrong:
        return
    message = (
        f"{str(path)!r} was made for other base weights: {len(wrong)} of {len(wholes)} tensors "
        f"differ, {few(wrong)}; load it into the base it was trained on, or pass check_base='warn'"
    )
    if mode == "error":
        raise BaseMismatchError(message)
    warnings.warn(message, stacklevel=3)


def _fill(delta: Delta, tensors: Mapping[str, Tensor], path: Any) -> None:
    """Gives a delta, not yet attached, the values of a file, in the file's dtypes."""
    own = delta.state_dict()
    problems = [f"no {key}" for key in own if key not in tensors]
    problems += [f"{key}, which nothing asks for" for key in tensors if key not in own]
    for key in own:
        if key in tensors:
            mine, theirs = own[key], tensors[key]
            if mine.shape != theirs.shape:
                problems.append(f"{key} as {tuple(theirs.shape)}, not {tuple(mine.shape)}")
            elif mine.is_floating_point() != theirs.is_floating_point():
                problems.append(f"{key} as {theirs.dtype}, not {mine.dtype}")
            elif not theirs.isfinite().all():
                problems.append(f"{key} with values that aren't finite")
    if problems:
        raise FileError(f"{str(path)!r} doesn't fit this model: it has {few(problems)}")
    for key, parameter in delta.named_tensors():
        parameter.data = tensors[key].to(parameter.device)

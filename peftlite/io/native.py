"""peftlite's file: one safetensors file with the tensors, the methods and the base's fingerprint.

Tensors are named `address:parameter`. One metadata entry, `peftlite`, holds JSON:

    {"format": 1, "library": "0.1.0", "name": "sql",
     "methods": [{"method": "LoRA", "config": {"rank": 8, …}, "sites": ["layers.0.q.weight", …]}],
     "base": {"layers.0.q.weight": {"dtype": "float32", "shape": [16, 16], "sha256": "…"}, …},
     "tensors": {"layers.0.q.weight:a": "<sha-256 of its bytes>", …},
     "sha256": "<of this header without this entry>"}

The digests find damage, not forgery.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from peftlite import site, targets
from peftlite.assign import Placed, usable
from peftlite.attach import check, commit
from peftlite.delta import Delta, gather, misfits
from peftlite.errors import BaseMismatchError, FileError, PeftliteError, TargetError
from peftlite.merge import base_tensor
from peftlite.patch import Method
from peftlite.site import Site, whole_address
from peftlite.table import few, shown, size, table
from peftlite.version import __version__

FORMAT = 1
_KEY = "peftlite"


@dataclass(frozen=True)
class Info:
    """What a file says of itself: its delta's name, its methods with their sites, its tensors."""

    name: str
    library: str
    methods: list[tuple[Method, list[str]]]
    base: dict[str, dict[str, Any]]
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

    Saving twice gives the same bytes. Under FSDP2 every process has to call it, with one path.

    Raises:
        FileError: the file can't be written.
        PeftliteError: a value isn't finite, or is on the meta device.
    """
    if not isinstance(delta, Delta):
        raise PeftliteError(
            f"save takes a delta, such as pl.deltas(model)['sql']: not {shown(delta)}"
        )
    tensors = {}
    for key, tensor in delta.saved().items():
        if tensor.is_meta:
            raise PeftliteError(f"{key} is on the meta device and has no values to save")
        tensors[key] = gather(tensor).cpu().clone(memory_format=torch.contiguous_format)
        if not tensors[key].isfinite().all():
            raise PeftliteError(f"{key} has values that aren't finite, so it could not be loaded")
    groups: dict[int, list[str]] = {id(method): [] for method in delta.methods}
    for address, placed in delta.placed.items():
        placed.check()
        groups[id(placed.method)].append(address)
    header = {
        "format": FORMAT,
        "library": __version__,
        "name": delta.name,
        "methods": [
            {"method": type(m).__name__, "config": _config(m), "sites": groups[id(m)]}
            for m in delta.methods
            if groups[id(m)]
        ],
        "base": _fingerprints(delta),
        "tensors": {key: _sha256(tensor) for key, tensor in tensors.items()},
    }
    header["sha256"] = _digest(header)
    _write(_path(path), safetensors.torch.save(tensors, {_KEY: _canonical(header)}))


def _config(method: Method) -> dict[str, Any]:
    """A method's hyperparameters as JSON. Where it sits is in the sites, not in its targets."""
    return {name: _plain(getattr(method, name)) for name in _settings(type(method))}


def _plain(setting: Any) -> Any:
    """A setting as JSON: a dtype by its name, a method inside a method as one at the top."""
    if isinstance(setting, Method):
        return {"method": type(setting).__name__, "config": _config(setting)}
    return str(setting).removeprefix("torch.") if isinstance(setting, torch.dtype) else setting


def _settings(kind: type[Method]) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.name not in ("targets", "exclude")]


def _fingerprints(delta: Delta) -> dict[str, dict[str, Any]]:
    """What every tensor the delta changes is in the base without the delta."""
    found = {}
    for address, placed in delta.placed.items():
        whole = whole_address(address)
        if not placed.site.is_call and whole not in found:
            tensor = placed.site.whole
            if delta.merged_in is not None:
                tensor = base_tensor(delta.merged_in, whole, placed.site, but=delta)
            found[whole] = _fingerprint(tensor)
    return found


def _fingerprint(tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "sha256": _sha256(gather(tensor))}


def _sha256(tensor: Tensor) -> str:
    # a dimension of one may have any stride, and still passes for contiguous
    data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    return hashlib.sha256(data.view(torch.uint8).numpy() if data.numel() else b"").hexdigest()


def _canonical(header: dict[str, Any]) -> str:
    return json.dumps(header, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _digest(header: dict[str, Any]) -> str:
    """Of a header, but for the digest in it."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(_canonical(rest).encode()).hexdigest()


def _path(given: Any) -> Path:
    if not isinstance(given, str | os.PathLike) or isinstance(os.fspath(given), bytes):
        raise PeftliteError(f"a path is a str or an os.PathLike: not {shown(given)}")
    return Path(given)


def _write(path: Path, data: bytes) -> None:
    """Write, flush to the disk, rename, flush the folder: at no moment is there half a file."""
    try:
        path = Path(os.path.realpath(path))  # what a link stands for is replaced, not the link
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise FileError(f"can't write {str(path)!r}: it is {kind}")
        with _replacing(path) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, ValueError) as error:
        folder = str(path.parent)
        why = _reason(error) if os.path.isdir(folder) else f"there is no folder {folder!r}"
        raise FileError(f"can't write {str(path)!r}: {why}") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once its body is done, and is gone if it fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


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
    if isinstance(path, nn.Module):
        raise PeftliteError("load takes the model first, then the path")
    info, tensors = _read(path, values=True)
    check(model, info.name if name is None else name)
    sites = _locate(model, info, path)
    methods = [method for method, _ in info.methods]
    # a skeleton without memory first: a file may ask for more than there is
    _fit(Delta(info.name, methods, _build(info, sites, path, on="meta")), tensors, path)
    if check_base != "off":
        _check_base(info, sites, path, check_base)
    delta = Delta(info.name if name is None else name, methods, _build(info, sites, path))
    for key, tensor in delta.named_tensors():
        # in memory of torch's own: another alignment moves the last bits of a product
        held = tensors.get(key, torch.zeros_like(tensor))
        tensor.data = held.to(tensor.device).clone()
    delta.requires_grad_(bool(trainable))
    return commit(model, delta)


def _read(path: Any, values: bool) -> tuple[Info, dict[str, Tensor]]:
    at = str(_path(path))
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    if os.path.isdir(at):
        raise FileError(f"{at!r} is a folder: name the file in it")
    try:
        with safetensors.safe_open(at, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in sorted(file.keys()):
                part = file.get_slice(key)
                shapes[key] = (part.get_dtype(), tuple(part.get_shape()))
                if values:
                    tensors[key] = file.get_tensor(key)
    except FileNotFoundError as error:
        raise FileError(f"there is no file {at!r}") from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FileError(
            f"{at!r} is no safetensors file, or is damaged: {_reason(error)}"
        ) from error
    if _KEY not in metadata:
        held = few([*metadata, *shapes]) or "nothing"
        raise FileError(f"{at!r} is not of pl.save's making; it holds {held}")
    try:
        header = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{at!r} has a header that is no JSON: {error}") from error
    try:
        info = _info(header, shapes, at)
    except RecursionError as error:
        raise FileError(f"{at!r} has a broken header: methods within methods") from error
    if not _intact(header, metadata[_KEY]):
        raise FileError(f"{at!r} is damaged: its header isn't what was saved; copy it again")
    if damaged := [
        k for k, tensor in tensors.items() if header["tensors"].get(k) != _sha256(tensor)
    ]:
        raise FileError(f"{at!r} is damaged, copy it again: not what was saved is {few(damaged)}")
    return info, tensors


def _intact(header: dict[str, Any], text: str) -> bool:
    try:
        return _digest(header) == header.get("sha256") and _canonical(header) == text
    except ValueError:  # not text, or not a number, that pl.save could have written
        return False


def _info(header: Any, shapes: dict[str, tuple[str, tuple[int, ...]]], at: str) -> Info:
    """The header, each part of it looked at before it is believed."""

    def part(of: Any, name: str, kind: type) -> Any:
        value = of.get(name) if isinstance(of, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FileError(f"{at!r} has a broken header: its {name!r} is {value!r}")
        return value

    version = part(header, "format", int)
    if version < 1:
        raise FileError(f"{at!r} has a broken header: its 'format' is {version}")
    if version > FORMAT:
        raise FileError(
            f"{at!r} has format {version}, and this peftlite reads up to {FORMAT}: upgrade peftlite"
        )
    methods = []
    for entry in part(header, "methods", list):
        addresses = part(entry, "sites", list)
        if not addresses or not all(isinstance(address, str) for address in addresses):
            raise FileError(f"{at!r} has a broken header: its 'sites' are {addresses!r}")
        method = _method(part(entry, "method", str), part(entry, "config", dict), at)
        methods.append((method, addresses))
    part(header, "tensors", dict)
    base = part(header, "base", dict)
    for address, entry in base.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "sha256"}:
            raise FileError(f"{at!r} has a broken header: its base has {address!r}: {entry!r}")
    return Info(
        name=part(header, "name", str),
        library=part(header, "library", str),
        methods=methods,
        base=base,
        tensors=shapes,
        num_bytes=os.path.getsize(at),
    )


def _method(name: str, config: dict[str, Any], at: str) -> Method:
    kind = Method.known.get(name)
    if kind is None:
        raise FileError(
            f"{at!r} holds the method {name!r}, which isn't known here; known are "
            f"{', '.join(sorted(Method.known))} (a method of your own: import it first)"
        )
    settings = _settings(kind)
    for key in sorted({*config} ^ {*settings}):
        what = "has no" if key in config else "needs the"
        raise FileError(f"{at!r}: here {name} {what} setting {key!r}")
    for key, value in config.items():
        match value:
            case {"method": str(inner), "config": dict(its), **rest} if not rest:
                config = {**config, key: _method(inner, its, at)}
    if isinstance(config["dtype"], str):
        config = {**config, "dtype": getattr(torch, config["dtype"], config["dtype"])}
    try:
        return kind(**config)
    except (PeftliteError, TypeError) as error:
        raise FileError(f"{at!r} has an impossible setting of {name}: {error}") from error


def _locate(model: nn.Module, info: Info, path: Any) -> dict[str, Site]:
    """The sites in the model that a file names, by the address in the file."""
    addresses = [address for _, where in info.methods for address in where]
    if twice := [address for address, count in Counter(addresses).items() if count > 1]:
        raise FileError(f"{str(path)!r} names the site {twice[0]} twice")
    try:
        found, missing = site.locate(model, addresses)
        taken: dict[tuple[int, str], list[Site]] = {}
        for address, where in found.items():
            usable(where)
            others = taken.setdefault((id(where.module), where.slot), [])
            if any(where.overlaps(other) for other in others):
                raise TargetError(
                    f"{address} and {others[0].address} share entries of one tensor in this model"
                )
            others.append(where)
            if not where.is_call and where.whole.is_meta:
                raise TargetError(
                    f"{address} is on the meta device: give the model its weights, then load"
                )
    except TargetError as error:
        raise FileError(f"{str(path)!r} doesn't fit this model: {error}") from error
    if missing:
        raise FileError(
            f"{str(path)!r} is for a model with other sites: of {len(addresses)}, this one lacks "
            f"{len(missing)}: {few(missing)}; {targets.nearest(model, missing[0])}"
        )
    return found


def _build(info: Info, sites: Mapping[str, Site], path: Any, on: str | None = None) -> list[Placed]:
    try:
        placed = [
            item
            for method, addresses in info.methods
            for item in Placed.all(
                [dataclasses.replace(sites[a], address=a, on=on) for a in addresses], method
            )
        ]
        for item in placed:
            start = f"{item.site.address}:"
            held = {key: shape for key, (_, shape) in info.tensors.items() if key.startswith(start)}
            item.patch.resize({key.removeprefix(start): held[key] for key in held})
        return placed
    except (PeftliteError, RuntimeError, OverflowError, TypeError) as error:
        raise FileError(f"{str(path)!r} doesn't fit this model: {_reason(error)}") from error


def _fit(delta: Delta, tensors: Mapping[str, Tensor], path: Any) -> None:
    """Raises FileError unless the tensors of a file are those of the delta, and sound."""
    problems = misfits(delta.saved(), tensors)
    problems += [
        f"{key} with values that aren't finite"
        for key, tensor in tensors.items()
        if tensor.itemsize > 1 and not tensor.isfinite().all()
    ]
    if problems:
        raise FileError(f"{str(path)!r} doesn't fit this model: it has {few(problems)}")


def _check_base(info: Info, sites: Mapping[str, Site], path: Any, mode: str) -> None:
    wrong = []
    wholes = {whole_address(a): where for a, where in sites.items() if not where.is_call}
    for address, where in wholes.items():
        theirs, tensor = info.base.get(address), where.whole
        if theirs is None:
            raise FileError(f"{str(path)!r} lacks the fingerprint of {address}")
        if tensor.is_meta:
            continue
        mine = _fingerprint(tensor)
        for what in ("dtype", "shape", "sha256"):
            if mine[what] != theirs[what]:
                values = "" if what == "sha256" else f" ({what} {theirs[what]}, here {mine[what]})"
                wrong.append(address + values)
                break
    if not wrong:
        return
    message = (
        f"{str(path)!r} was made for other base weights: {len(wrong)} of {len(wholes)} tensors "
        f"differ: {few(wrong)}"
    )
    if mode == "error":
        raise BaseMismatchError(
            f"{message}; load it into the base it was trained on, or pass check_base='warn'"
        )
    warnings.warn(message, stacklevel=3)

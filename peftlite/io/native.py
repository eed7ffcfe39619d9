"""peftlite's file: one safetensors file with the tensors, the methods and the base's fingerprint.

Tensors are named `address:parameter`. One metadata entry, `peftlite`, holds JSON:

    {"format": 1, "library": "0.1.0", "name": "sql", "notes": {…},
     "methods": [{"method": "LoRA", "config": {"rank": 8, …}, "sites": ["layers.0.q.weight", …]}],
     "base": {"layers.0.q.weight": {"dtype": "float32", "shape": [16, 16], "sha256": "…"}, …},
     "modules": {"layers.0.q.weight": {"module": "Linear"}, …},
     "packed": {"layers.0.q.weight:a": {"as": "int8", "dtype": "float32", "error": 0.003}, …},
     "tensors": {"layers.0.q.weight:a": {"dtype": "float32", "shape": [8, 16], "sha256": "…"}, …},
     "sha256": "<of this header without this entry>"}

The digests find damage, not forgery.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.attach import settled, warn_of_buffers
from peftlite.core.delta import Delta
from peftlite.core.find import given_delta
from peftlite.core.merged import base_tensor
from peftlite.core.patch import Method
from peftlite.core.site import Site, whole_address
from peftlite.core.tensors import unshard
from peftlite.errors import FileError, PeftliteError
from peftlite.fields import check_given
from peftlite.io import packing, standin
from peftlite.io.content import Content, Info, told
from peftlite.io.files import (
    Entry,
    Tensors,
    ahead,
    as_json,
    as_path,
    is_finite,
    replacing,
    sha256,
    write_tensors,
)
from peftlite.io.fingerprint import KINDS, Fingerprint, fingerprints, kind_of
from peftlite.version import __version__

FORMAT = 1
KEY = "peftlite"


# -- writing


def save(
    delta: Delta | str,
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    notes: Mapping[str, Any] | None = None,
    pack: packing.Packing | None = None,
    base: Fingerprint = "sha256",
) -> None:
    """Writes a delta to one file, whole or not at all: an older file stays until the new is safe.

    Saving twice gives the same bytes. Under FSDP2 every process has to call it, with one path.

    Args:
        delta: a delta, or its name in `model`.
        notes: anything of your own that JSON can hold, by name; `pl.inspect` gives it back.
        pack: how to store the parameters in less space, with an error that the file states: "bf16"
            or "int8" (a scale a row); "sparse" leaves zeros out, and is exact. None: as they are.
        base: how the base is fingerprinted: "sha256" by all of every tensor that the delta
            changes; "sampled" by 4,096 entries of each, where hashing takes too long.

    Raises:
        FileError: the file can't be written.
        PeftliteError: a value isn't finite, or is on the meta device; an argument isn't of these.

    Example:
        delta = pl.attach(nn.Linear(4, 2), pl.LoRA(rank=2), name="sql")
        pl.save(delta, "sql.safetensors", notes={"epochs": 3})
    """
    delta = given_delta("save", delta, model)
    check_given("pack", pack, (None, *packing.PACKINGS))
    check_given("base", base, KINDS)
    warn_of_buffers(delta.home, stacklevel=3)
    write(delta, as_path(path), base, notes=notes, pack=pack)


def write(
    delta: Delta,
    path: Path,
    base: Fingerprint | dict[str, Any],
    *,
    notes: Mapping[str, Any] | None = None,
    pack: packing.Packing | None = None,
) -> None:
    """`save`, also for a base that was fingerprinted before."""
    with settled(delta) as unchanged:
        _write(delta, path, base, notes, pack, unchanged)


def _write(
    delta: Delta,
    path: Path,
    base: Fingerprint | dict[str, Any],
    notes: Mapping[str, Any] | None,
    pack: packing.Packing | None,
    unchanged: Callable[[], None],
) -> None:
    tensors = delta.saved()
    if empty := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise PeftliteError(f"{empty[0]} is on the meta device and has no values to save")
    for key, finite in zip(tensors, ahead(is_finite, map(unshard, tensors.values())), strict=True):
        if not finite:
            raise PeftliteError(f"{key} has values that aren't finite, so it could not be loaded")
    stored, about = packing.pack(tensors, pack)
    entries = {key: Entry.of(tensor) for key, tensor in stored.items()}
    header = {
        "format": FORMAT,
        "library": __version__,
        "name": delta.name,
        "methods": methods_of(delta),
        "base": base if isinstance(base, dict) else base_of(delta, base),
        "modules": {
            whole_address(address): standin.describe(placed.site)
            for address, placed in delta.placed.items()
            if not placed.site.is_call
        },
        **({"notes": as_json("notes", notes)} if notes else {}),
        **({"packed": about} if about else {}),
    }

    def metadata(digests: dict[str, str]) -> dict[str, str]:
        tensors = {key: {**entries[key].plain, "sha256": digests[key]} for key in digests}
        head = {**header, "tensors": tensors}
        return {KEY: _canonical({**head, "sha256": _digest(head)})}

    with replacing(path) as file:
        write_tensors(file, entries, stored.__getitem__, metadata)
        unchanged()


def methods_of(delta: Delta) -> list[dict[str, Any]]:
    """A delta's methods, as a file of it has them."""
    for placed in delta.placed.values():
        placed.check()
    return described(
        (method, [item.site.address for item in placed])
        for method, placed in delta.by_method()
        if placed
    )


def described(methods: Iterable[tuple[Method, list[str]]]) -> list[dict[str, Any]]:
    """Methods and the addresses of their sites, as JSON."""
    return [
        {"method": type(method).__name__, "config": _config(method), "sites": sites}
        for method, sites in methods
    ]


def _config(method: Method) -> dict[str, Any]:
    """A method's hyperparameters as JSON. Where it sits is in the sites, not in its targets."""
    given = {name: getattr(method, name) for name in _settings(type(method))}
    before = type(method).added
    return {n: _plain(v) for n, v in given.items() if n not in before or v != before[n]}


def _plain(setting: Any) -> Any:
    """A setting as JSON: a dtype by its name, a method inside a method as one at the top."""
    if isinstance(setting, Method):
        return {"method": type(setting).__name__, "config": _config(setting)}
    return str(setting).removeprefix("torch.") if isinstance(setting, torch.dtype) else setting


def _settings(kind: type[Method]) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.name not in ("targets", "exclude")]


def base_of(delta: Delta, kind: str) -> dict[str, dict[str, Any]]:
    """What every tensor the delta changes is in the base without the delta."""
    sites = {
        whole_address(address): placed.site
        for address, placed in delta.placed.items()
        if not placed.site.is_call
    }
    merged_in = delta.merged_in
    tensors = (
        site.whole if merged_in is None else base_tensor(merged_in, site, but=delta)
        for site in sites.values()
    )
    return dict(zip(sites, fingerprints((tensor, kind) for tensor in tensors), strict=True))


def _canonical(header: dict[str, Any]) -> str:
    return json.dumps(header, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _digest(header: dict[str, Any]) -> str:
    """Of a header, but for the digest in it."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(_canonical(rest).encode()).hexdigest()


# -- reading


def recognises(path: Path, file: Tensors | None) -> bool:
    """Whether a file (None: it's a folder) is of this format, going by what it holds."""
    return file is not None and KEY in file.metadata


def inspect(path: Path) -> Info:
    """What a file says, its values not looked at. Raises FileError."""
    file = Tensors(path)
    header, methods = _header(file)
    about = header.get("packed", {})
    return Info(
        name=header["name"],
        methods=methods,
        tensors=told(packing.unpacked(file.entries, about)),
        num_bytes=file.num_bytes,
        library=header["library"],
        base=header["base"],
        modules=header["modules"],
        notes=header.get("notes", {}),
        errors={key: its["error"] for key, its in about.items()},
    )


def read(path: Path, model: nn.Module | None = None, sites: Sequence[Site] = ()) -> Content:
    """A file's content, its header checked and each tensor as it is asked for. Raises FileError.

    It needs no model.
    """
    file = Tensors(path)
    header, methods = _header(file)
    about = header.get("packed", {})

    def get(key: str) -> Tensor:
        tensor = file.get(key)
        if header["tensors"].get(key) != {**file.entries[key].plain, "sha256": sha256(tensor)}:
            raise FileError(f"{file.path!r} is damaged, copy it again: not what was saved is {key}")
        return tensor

    def unpacked(key: str) -> Tensor:
        try:
            return packing.unpack(key, about, get)
        except ValueError as error:
            raise FileError(f"{file.path!r} has {key} in no sound packing: {error}") from error

    return Content(
        name=header["name"],
        methods=methods,
        entries=packing.unpacked(file.entries, about),
        get=unpacked,
        base=header["base"],
        modules=header["modules"],
    )


def _header(file: Tensors) -> tuple[dict[str, Any], list[tuple[Method, list[str]]]]:
    """The header and its methods, each part of it looked at before it is believed."""
    path = file.path
    try:
        header = json.loads(file.metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path!r} has a header that is no JSON: {error}") from error
    methods = _check(header, path)
    if not _intact(header, file):
        raise FileError(f"{path!r} is damaged: its header isn't what was saved; copy it again")
    for key, its in header.get("packed", {}).items():
        if not packing.is_sound(key, its, file.entries):
            raise FileError(f"{path!r} has a broken header: its 'packed' has {key!r}: {its!r}")
    return header, methods


def _intact(header: dict[str, Any], file: Tensors) -> bool:
    try:
        alone = file.metadata == {KEY: _canonical(header)}
        return alone and _digest(header) == header.get("sha256") and file.is_as_written
    except ValueError:  # not text, or not a number, that pl.save could have written
        return False


def _check(header: Any, path: str) -> list[tuple[Method, list[str]]]:
    def part(of: Any, name: str, kind: type) -> Any:
        value = of.get(name) if isinstance(of, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FileError(f"{path!r} has a broken header: its {name!r} is {value!r}")
        return value

    version = part(header, "format", int)
    if version < 1:
        raise FileError(f"{path!r} has a broken header: its 'format' is {version}")
    if version > FORMAT:
        raise FileError(
            f"{path!r} has format {version}, and this peftlite reads up to {FORMAT}: upgrade "
            "peftlite"
        )
    methods = []
    for entry in part(header, "methods", list):
        addresses = part(entry, "sites", list)
        if not addresses or not all(isinstance(address, str) for address in addresses):
            raise FileError(f"{path!r} has a broken header: its 'sites' are {addresses!r}")
        method = _method(part(entry, "method", str), part(entry, "config", dict), path)
        methods.append((method, addresses))
    for name, kind in (("tensors", dict), ("name", str), ("library", str)):
        part(header, name, kind)
    for name in ("notes", "packed"):
        part({name: {}, **header}, name, dict)
    for address, entry in part(header, "base", dict).items():
        if not isinstance(entry, dict) or kind_of(entry) is None:
            raise FileError(f"{path!r} has a broken header: its base has {address!r}: {entry!r}")
    for address, entry in part(header, "modules", dict).items():
        if not standin.is_sound(entry):
            raise FileError(
                f"{path!r} has a broken header: its 'modules' has {address!r}: {entry!r}"
            )
    return methods


def _method(name: str, config: dict[str, Any], path: str, depth: int = 0) -> Method:
    if depth > 8:
        raise FileError(f"{path!r} has a broken header: methods within methods within methods …")
    kind = Method.known.get(name)
    if kind is None:
        raise FileError(
            f"{path!r} holds the method {name!r}, which isn't known here; known are "
            f"{', '.join(sorted(Method.known))} (a method of your own: import it first)"
        )
    settings, config = _settings(kind), {**kind.added, **config}
    for key in sorted({*config} ^ {*settings}):
        what = "has no" if key in config else "needs the"
        raise FileError(f"{path!r}: here {name} {what} setting {key!r}")
    for key, value in config.items():
        match value:
            case {"method": str(inner), "config": dict(its), **rest} if not rest:
                config = {**config, key: _method(inner, its, path, depth + 1)}
    if isinstance(config["dtype"], str):
        config = {**config, "dtype": getattr(torch, config["dtype"], config["dtype"])}
    try:
        return kind(**config)
    except (PeftliteError, TypeError) as error:
        raise FileError(f"{path!r} has an impossible setting of {name}: {error}") from error

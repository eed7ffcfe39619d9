"""Commands on the files of deltas and checkpoints: inspect, verify, diff; merge, convert, …"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.commands.outcome import Outcome
from peftlite.core.patch import Method
from peftlite.core.tensors import distance
from peftlite.errors import FileError, PeftliteError
from peftlite.io import native
from peftlite.io.checkpoint import Checkpoint
from peftlite.io.content import Info
from peftlite.io.convert import convert
from peftlite.io.files import is_finite
from peftlite.io.fingerprint import fingerprint, kind_of
from peftlite.io.load import inspect, load
from peftlite.io.merge_files import merge_files
from peftlite.io.names import by_names_of
from peftlite.io.native import save
from peftlite.io.quantize_files import quantize_files
from peftlite.io.tied import base_of
from peftlite.methods.full import FullTuning
from peftlite.methods.lora import LoRA
from peftlite.progress import bar
from peftlite.table import listed, size, table
from peftlite.verbs.combine import combine
from peftlite.verbs.extract import extract

# -- looking


def run_inspect(args: argparse.Namespace) -> Outcome:
    info = inspect(args.file)
    return Outcome(str(info), _info(info))


def _info(info: Info) -> dict[str, Any]:
    plain = {f.name: getattr(info, f.name) for f in fields(info) if f.name != "methods"}
    methods = [{**_settings(method), "sites": sites} for method, sites in info.methods]
    return {**plain, "num_parameters": info.num_parameters, "methods": methods}


def _settings(method: Method) -> dict[str, Any]:
    return {"method": type(method).__name__, **asdict(method)}


def run_verify(args: argparse.Namespace) -> Outcome:
    if not Path(args.file).exists():
        raise FileError(f"there is no file {args.file!r}")
    try:
        info = inspect(args.file)
        wrong, count = [], 0
        for key, tensor in _tensors(args.file, info, f"verify {info.name}"):
            count += 1
            if not is_finite(tensor):
                wrong.append(f"{key} has values that aren't finite")
    except FileError as error:
        return Outcome(f"damaged: {error}", {"sound": False, "wrong": [str(error)]}, amiss=True)
    digests = "as they were saved" if info.format == "peftlite" else "which have no digests"
    lines = [*wrong] or [f"{count} tensors, {digests}"]
    data: dict[str, Any] = {"sound": not wrong, "tensors": count, "wrong": wrong}
    differing: list[str] = []
    if args.base is not None:
        differing = _differing(info, Checkpoint(args.base))
        data["base"] = {"tensors": len(info.base), "differing": differing}
        which = "are those that it was made for"
        if differing:
            which = f"aren't all those that it was made for: {listed(differing)}"
        lines.append(f"{len(info.base)} tensors of the base {which}")
    return Outcome("\n".join(lines), data, amiss=bool(wrong or differing))


def _differing(info: Info, base: Checkpoint) -> list[str]:
    """The tensors of a base that are missing, or aren't those that a delta was made for."""
    differing, info = [], by_names_of(base, info)
    for address, theirs in _with_bar(info.base.items(), "base"):
        names = [address, *info.modules[address].get("names", ())]
        there = [name for name in names if name in base]
        mine = [fingerprint(base[name], kind_of(theirs) or "") for name in there]
        if not there or any(entry != theirs for entry in mine):
            differing.append(address)
    return differing


def run_diff(args: argparse.Namespace) -> Outcome:
    a, b = (_Side(path) for path in (args.a, args.b))
    lines, data = [], {}
    if a.methods != b.methods:
        data["methods"] = [a.methods, b.methods]
        lines += [f"methods of {side.path!r}: {_listed(side.methods)}" for side in (a, b)]
    for name, one, other in (("only in a", a, b), ("only in b", b, a)):
        if lone := [key for key in one.tensors if key not in other.tensors]:
            data[name.replace(" ", "_")] = lone
            lines.append(f"only in {one.path!r}: {listed(lone)}")
    changes: dict[str, float | str] = {}
    for key in _with_bar([key for key in a.tensors if key in b.tensors], "diff"):
        x, y = a.tensors[key], b.tensors[key]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            changes[key] = f"{_kind(x)} in one, {_kind(y)} in the other"
        elif not torch.equal(x, y):
            changes[key] = distance(x, y)
    if changes:
        data["max_difference"] = changes
        rows = [[k, c if isinstance(c, str) else f"{c:.3g}"] for k, c in changes.items()]
        lines.append(table(["tensor", "max |difference|"], rows))
    same = f"the same: {len(a.tensors)} tensors"
    return Outcome("\n".join(lines) or same, {"same": not lines, **data}, amiss=bool(lines))


class _Side:
    """One of two files that are compared: a delta's, or any of tensors."""

    def __init__(self, path: str):
        self.path = path
        self.methods: list[dict[str, Any]] = []
        self.tensors: Mapping[str, Tensor]
        try:
            info = inspect(path)
        except FileError:
            self.tensors = checkpoint = Checkpoint(path)
            if any(native.KEY in file.metadata for file in checkpoint.files):
                raise
            return  # no delta, but tensors all the same
        self.methods = [{**_settings(m), "sites": sorted(sites)} for m, sites in info.methods]
        self.tensors = dict(_tensors(path, info))


def _kind(tensor: Tensor) -> str:
    shape = "×".join(map(str, tensor.shape))
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _listed(methods: list[dict[str, Any]]) -> str:
    return listed([f"{m['method']} at {len(m['sites'])} sites" for m in methods]) or "none"


def _tensors(path: str, info: Info, label: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a delta's file, unpacked where it's ours, each compared with its digest."""
    if info.format != "peftlite":
        tensors = Checkpoint(path)
        return ((key, tensors[key]) for key in _with_bar(list(tensors), label))
    content = native.read(Path(path))
    return ((key, content.get(key)) for key in _with_bar(list(content.entries), label))


def _with_bar(items: Any, label: str) -> Any:
    """The items, with a bar if it has a label."""
    return bar(items, label, unit="tensor", disable=not label, leave=False)


# -- making


def run_merge(args: argparse.Namespace) -> Outcome:
    receipt = merge_files(
        args.base, args.delta, args.out, check_base=args.check_base, progress=True
    )
    data = {"name": receipt.name, "out": args.out, "max_change": receipt.max_change}
    return Outcome(f"{receipt}\nwritten to {args.out}", data)


def run_quantize(args: argparse.Namespace) -> Outcome:
    packs = quantize_files(
        args.checkpoint, args.out, args.to, targets=args.targets, skip=args.skip or (),
        double_quant=not args.no_double_quant, block=args.block, scales=args.scales, progress=True,
    )  # fmt: skip
    return _written(args.out, {"to": args.to, "tensors": len(packs.shapes)}, str(packs))


def run_convert(args: argparse.Namespace) -> Outcome:
    model = None if args.base is None else _stand_in(args.base, [args.file], args.transposed)
    convert(args.file, args.out, args.to, model=model, alpha=args.alpha, parts=args.parts or ())
    return _written(args.out, {"to": args.to})


def run_extract(args: argparse.Namespace) -> Outcome:
    base, tuned = (_stand_in(path, [], args.transposed) for path in (args.base, args.tuned))
    rank = {} if args.rank is None else {"rank": args.rank}
    lora = LoRA(**rank, targets=args.targets, exclude=args.exclude)
    delta = extract(
        base,
        tuned,
        [lora] if args.ignore_rest else [lora, FullTuning()],
        args.name,
        energy=args.energy,
        rest="ignore" if args.ignore_rest else "error",
    )
    save(delta, args.out)
    share, worst = min((share, address) for address, share in delta.energy.items())
    about = f"{delta}\nof the change of {worst} it keeps least, {share:.2%}"
    return _written(args.out, {"energy": delta.energy}, about)


def run_combine(args: argparse.Namespace) -> Outcome:
    given = [_weighted(text) for text in args.deltas]
    model = _stand_in(args.base, [path for path, _ in given], args.transposed)
    weights = {}
    for i, (path, weight) in enumerate(given):
        weights[load(model, path, name=f"d{i}").name] = weight
    delta = combine(
        model, weights, args.how, args.name,
        rank=args.rank, energy=args.energy, density=args.density, seed=args.seed,
    )  # fmt: skip
    save(delta, args.out)
    return _written(args.out, {"energy": delta.energy}, str(delta))


def _weighted(text: str) -> tuple[str, float]:
    """A file and its weight, from `FILE=WEIGHT`."""
    path, _, weight = text.rpartition("=")
    try:
        return path or text, float(weight) if path else 1.0
    except ValueError as error:
        raise PeftliteError(f"{text!r} is no FILE=WEIGHT: {weight!r} is no number") from error


def _stand_in(base: str, files: list[str], transposed: bool) -> nn.Module:
    """A base of a checkpoint's tensors, in modules as the files of deltas tell them."""
    modules: dict[str, Any] = {}
    checkpoint = Checkpoint(base)
    for path in files:
        try:
            info = by_names_of(checkpoint, inspect(path))
        except FileError:
            continue  # a pickle, or what the command itself will refuse
        modules |= info.modules
        transposed = transposed or info.transposed
    return base_of(checkpoint, modules, transposed)


def _written(out: str, data: dict[str, Any], *about: str) -> Outcome:
    path = Path(out)
    count = sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
    text = "\n".join([*about, f"written to {out}: {size(count)}"])
    return Outcome(text, {"out": out, "bytes": count, **data})


RUNS = {
    "inspect": run_inspect, "verify": run_verify, "diff": run_diff, "convert": run_convert,
    "merge": run_merge, "quantize": run_quantize, "extract": run_extract, "combine": run_combine,
}  # fmt: skip
"""What runs each command."""

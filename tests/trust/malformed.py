"""R1 and R2: files that are no sound delta, made byte by byte, and what loading them does."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftlite as pl
from peftlite.io.files import DTYPES
from tests.trust.hostile import HOSTILE
from tests.trust.tally import Tally, difference, state
from tests.zoo import KINDS, seeded

GPT = next(kind for kind in KINDS if kind.name == "gpt")
METHODS = [pl.LoRA(rank=2, targets="q_proj"), pl.SparseMask(fraction=0.1, targets="lm_head")]
Pairs = list[tuple[str, Any]]


@dataclass
class Parts:
    """A file taken apart.

    Args:
        table: what safetensors' header says of each tensor, in order, keys possibly twice.
        header: peftlite's.
        payload: the tensors' bytes.
    """

    table: Pairs
    header: dict[str, Any]
    payload: bytes

    @classmethod
    def of(cls, data: bytes) -> Parts:
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        header = json.loads(table.pop("__metadata__")["peftlite"])
        return cls([*table.items()], header, data[8 + length :])

    def at(self, rng: random.Random) -> tuple[int, dict[str, Any]]:
        """The place and entry of some tensor that has bytes."""
        return rng.choice([(i, its) for i, (_, its) in enumerate(self.table) if _span(its)])

    def sealed(self, **changes: Any) -> bytes:
        """The file as one writes it who knows the format, its digests right; ... leaves one out."""
        told = {key: self._told(its) for key, its in self.table}
        header = {**self.header, "tensors": told, **changes}
        header = {k: v for k, v in header.items() if k != "sha256" and v is not ...}
        header["sha256"] = hashlib.sha256(_canonical(header).encode()).hexdigest()
        return self.packed(_canonical(header))

    def _told(self, its: dict[str, Any]) -> dict[str, Any]:
        start, stop = its["data_offsets"]
        dtype = str(DTYPES.get(its["dtype"])).removeprefix("torch.")
        digest = hashlib.sha256(self.payload[start:stop]).hexdigest()
        return {"dtype": dtype, "shape": its["shape"], "sha256": digest}

    def packed(self, header: str | None = None, *more: tuple[str, Any]) -> bytes:
        """The file with a header as it is given, else its own."""
        text = _canonical(self.header) if header is None else header
        return container([("__metadata__", {"peftlite": text}), *self.table, *more], self.payload)


def container(pairs: Pairs | str | bytes, payload: bytes, length: int | None = None) -> bytes:
    """A safetensors file of any header whatever."""
    if isinstance(pairs, list):
        pairs = "{" + ",".join(f"{json.dumps(k)}:{_json(v)}" for k, v in pairs) + "}"
    head = pairs if isinstance(pairs, bytes) else pairs.encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head) if length is None else length) + head + payload


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _canonical(header: Any) -> str:
    return json.dumps(header, ensure_ascii=False, sort_keys=True)


def _span(its: dict[str, Any]) -> int:
    return its["data_offsets"][1] - its["data_offsets"][0]


# -- the mutators: (rng, the sound file's bytes) -> a file that is not sound

Mutator = Callable[[random.Random, bytes], bytes]
MUTATORS: list[Mutator] = []


def mutator(function: Mutator) -> Mutator:
    MUTATORS.append(function)
    return function


def entry(change: Callable[[random.Random, dict[str, Any]], Any]) -> Mutator:
    """A mutator of what safetensors' header says of one tensor."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        parts = Parts.of(data)
        i, its = parts.at(rng)
        its = deepcopy(its)
        change(rng, its)
        parts.table[i] = (parts.table[i][0], its)
        return parts.packed() if rng.random() < 0.5 else _resealed(parts)

    mutate.__name__ = change.__name__
    return mutator(mutate)


def _resealed(parts: Parts) -> bytes:
    try:
        return parts.sealed()
    except (TypeError, ValueError, KeyError, OverflowError):
        return parts.packed()


def edited(change: Callable[[random.Random, dict[str, Any]], Any]) -> Mutator:
    """A mutator of peftlite's header by one who knows the format, digests and all."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        parts = Parts.of(data)
        change(rng, parts.header)
        return parts.sealed()

    mutate.__name__ = change.__name__
    return mutator(mutate)


@mutator
def cut_in_the_header(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(8 + struct.unpack("<Q", data[:8])[0])]


@mutator
def cut_in_the_payload(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(8 + struct.unpack("<Q", data[:8])[0], len(data))]


@mutator
def another_length(rng: random.Random, data: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    near = length + rng.choice([-8, -2, -1, 1, 2, 8])
    far = rng.choice([0, 1, 2, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_001, near])
    return struct.pack("<Q", far) + data[8:]


@mutator
def not_utf_8(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(9, 8 + struct.unpack("<Q", data[:8])[0])
    return data[:at] + rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80"]) + data[at + 1 :]


@mutator
def json_too_deep(rng: random.Random, data: bytes) -> bytes:
    deep = rng.choice(["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
    parts = Parts.of(data)
    return rng.choice([container(deep, parts.payload), parts.packed(deep)])


@mutator
def json_of_another_kind(rng: random.Random, data: bytes) -> bytes:
    other = rng.choice(["null", "[]", "3", '"a"', "", "{}", "{", "nan", "\0", "1e999", "true"])
    parts = Parts.of(data)
    return rng.choice([container(other, parts.payload), parts.packed(other)])


@mutator
def junk_after_it(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.randint(1, 99))


@mutator
def junk_before_it(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([b"PK\x03\x04", b"\x80\x04", b"#!/bin/sh\n", b"\0", b"GGUF"]) + data


@mutator
def a_part_zeroed(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) - 64)
    size = max(1, len(data[at : at + 64].rstrip(b"\0")))
    return data[:at] + bytes(size) + data[at + size :] if any(data[at : at + size]) else b""


@mutator
def a_part_repeated(rng: random.Random, data: bytes) -> bytes:
    at, size = rng.randrange(len(data)), rng.randint(1, 4096)
    return data[:at] + data[at : at + size] + data[at:]


@mutator
def other_bytes(rng: random.Random, data: bytes) -> bytes:
    return rng.randbytes(rng.randrange(5000))


@mutator
def a_tensor_listed_twice(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    i, its = parts.at(rng)
    other = rng.choice([{}, {"dtype": "I32"}, {"shape": [_span(its) // 4]}])
    return parts.packed(None, (parts.table[i][0], {**its, **other}))


@mutator
def metadata_twice(rng: random.Random, data: bytes) -> bytes:
    other = rng.choice([{"peftlite": "{}"}, {}, {"a": "b"}])
    return Parts.of(data).packed(None, ("__metadata__", other))


@mutator
def metadata_of_others(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    text = _canonical(parts.header)
    other: Any = rng.choice([
        {"peftlite": text, "format": "pt"}, {"peftlite": parts.header}, {"peftlite": [text]}, {},
        {"Peftlite": text}, text, {"peftlite": text + " "}, {"peftlite": text[:-1]},
        {"peftlite": text.replace(": ", ":")}, {"peftlite": text[:-1] + ', "sha256": ""}'},
        {"peftlite": text.replace('"name"', '"name": "x", "name"')}, {"peftlite": "\ufeff" + text},
    ])  # fmt: skip
    return container([("__metadata__", other), *parts.table], parts.payload)


@mutator
def blanks_in_the_header(rng: random.Random, data: bytes) -> bytes:
    head, payload = data[8 : 8 + struct.unpack("<Q", data[:8])[0]], Parts.of(data).payload
    places = [found.end() for found in re.finditer(rb'[\]\d"]},', head)]
    at = rng.choice(places)
    return container(head[:at] + rng.choice([b" ", b"\n", b"\t" * 8]) + head[at:], payload)


@mutator
def tensors_in_another_order(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    while (table := rng.sample(parts.table, len(parts.table))) == parts.table:
        pass
    parts.table = table
    return parts.packed()


@entry
def offsets_that_overlap(rng: random.Random, its: dict[str, Any]) -> None:
    start, stop = its["data_offsets"]
    its["data_offsets"] = [start - 4, stop - 4] if start else [start, stop + 4]


@entry
def offsets_that_cannot_be(rng: random.Random, its: dict[str, Any]) -> None:
    start, stop = its["data_offsets"]
    its["data_offsets"] = rng.choice([
        [stop, start], [start, 2**40], [-4, stop], [start, stop - 4], [start + 4, stop], [start],
        [2**64 - 4, 2**64], [2**63, 2**63 + _span(its)], [0.5, stop], None, "0", [], [start] * 2,
    ])  # fmt: skip


@entry
def a_shape_that_cannot_be(rng: random.Random, its: dict[str, Any]) -> None:
    shape = its["shape"]
    its["shape"] = rng.choice([
        [2**32, 2**32], [2**63], [-1], [*shape, 2], [*shape, 0], shape[1:], [0.5], None, "2", 3,
        [2**64], [n + 1 for n in shape],
    ])  # fmt: skip


@entry
def a_shape_of_as_many(rng: random.Random, its: dict[str, Any]) -> None:
    count = math.prod(its["shape"])
    its["shape"] = rng.choice([[1, *its["shape"]], [*its["shape"], 1], [1, 1, count]])


@entry
def an_unknown_dtype(rng: random.Random, its: dict[str, Any]) -> None:
    its["dtype"] = rng.choice(["F4", "f32", "", "object", None, 3, "F32 ", "torch.float32", "C128"])


@entry
def a_dtype_of_that_width(rng: random.Random, its: dict[str, Any]) -> None:
    width = _span(its) // max(math.prod(its["shape"]), 1)
    others = {4: ["I32", "U32"], 8: ["F64", "I64", "U64", "C64"]}[width]
    its["dtype"] = rng.choice([name for name in others if name != its["dtype"]])


@entry
def more_about_a_tensor(rng: random.Random, its: dict[str, Any]) -> None:
    its[rng.choice(["strides", "requires_grad", "__class__", ""])] = rng.choice([1, None, "x"])


@mutator
def a_tensor_missing(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    i = len(parts.table) - 1  # the last, so that no hole is left
    start, _ = parts.table.pop(i)[1]["data_offsets"]
    parts.payload = parts.payload[:start]
    return rng.choice([parts.packed, parts.sealed])()


@mutator
def a_tensor_too_many(rng: random.Random, data: bytes) -> bytes:
    parts, end = Parts.of(data), len(Parts.of(data).payload)
    key = rng.choice([
        "lm_head.weight", "blocks.0.attn.q_proj.weight", "model.lm_head.weight", "x", "",
        "blocks.0.attn.q_proj.weight:a0", "blocks.0.attn.q_proj.weight:a.weight", *HOSTILE,
    ])  # fmt: skip
    parts.table.append((key, {"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]}))
    parts.payload += bytes(8)
    return rng.choice([parts.packed, parts.sealed])()


@mutator
def a_tensor_renamed(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    i, its = parts.at(rng)
    key = parts.table[i][0]
    new = rng.choice([key + "0", key.upper(), key.replace(":", "."), "x:" + key, *HOSTILE])
    parts.table[i] = (new, its)
    return rng.choice([parts.packed, parts.sealed])()


@mutator
def tensors_swapped(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    a, b = [i for i, (key, _) in enumerate(parts.table) if key.endswith("q_proj.weight:a")][:2]
    (first, its), (second, theirs) = parts.table[a], parts.table[b]
    parts.table[a], parts.table[b] = (first, theirs), (second, its)
    return parts.packed()


@mutator
def values_of_another_save(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    values = torch.frombuffer(bytearray(parts.payload), dtype=torch.uint8)
    start, stop = parts.at(rng)[1]["data_offsets"]
    values[start + rng.randrange(stop - start)] ^= rng.randint(1, 255)
    parts.payload = bytes(values.numpy().tobytes())
    return parts.packed()


@mutator
def values_not_finite(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    spans = [its["data_offsets"] for _, its in parts.table if its["dtype"] == "F32" and _span(its)]
    start, stop = rng.choice(spans)
    at = rng.randrange(start, stop, 4)
    value = rng.choice([math.nan, math.inf, -math.inf])
    parts.payload = parts.payload[:at] + struct.pack("<f", value) + parts.payload[at + 4 :]
    return parts.sealed()


@mutator
def indices_out_of_the_tensor(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    spans = [i["data_offsets"] for _, i in parts.table if i["dtype"] in ("I32", "I64") and _span(i)]
    stop = rng.choice(spans)[1]
    bad = rng.choice([b"\xff" * 8, b"\0\0\0\x7f" * 2, b"\xff\xff\xff\x7f\0\0\0\0"])
    parts.payload = parts.payload[: stop - 8] + bad + parts.payload[stop:]
    return parts.sealed()


WRONG = (None, 3, -1, True, 0.5, "x", "", [], {}, [3], {"a": 3}, [[]], [None], ["x"], [{}])


@mutator
def a_part_of_the_header_gone(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    return parts.sealed(**{rng.choice(["format", "methods", "base", "name", "library"]): ...})


@edited
def a_part_of_the_header_wrong(rng: random.Random, header: dict[str, Any]) -> None:
    part = rng.choice(
        ["format", "methods", "base", "name", "library", "notes", "packed", "modules"]
    )
    fine = {
        "format": (),
        "name": (),
        "library": ("x", ""),
        "notes": ({}, {"a": 3}),
        "packed": ({},),
        "modules": ({},),
    }
    header[part] = rng.choice([value for value in WRONG if value not in fine.get(part, ())])
    if part == "name" and header[part] == "x":
        header[part] = "a/b"


@edited
def another_format(rng: random.Random, header: dict[str, Any]) -> None:
    header["format"] = rng.choice([2, 3, 10**9, 10**400, 0, -1, "1", True, None, 1.0, [1]])


@edited
def another_method(rng: random.Random, header: dict[str, Any]) -> None:
    header["methods"][0]["method"] = rng.choice(
        ["Method", "os.system", "builtins.eval", "torch.load", "lora", "IA3", "", None, 3, "LoRA\0",
         "peftlite.methods.lora.LoRA", "__import__", "WeightMethod", *HOSTILE]
    )  # fmt: skip


@edited
def another_part_of_a_method(rng: random.Random, header: dict[str, Any]) -> None:
    how = header["methods"][0]
    how[rng.choice(["method", "config", "sites"])] = rng.choice(WRONG)


@edited
def settings_that_are_none(rng: random.Random, header: dict[str, Any]) -> None:
    config = header["methods"][0]["config"]
    if rng.random() < 0.3:
        del config[rng.choice([*config])]
    else:
        unknown = ["targets", "exclude", "__class__", "known", "auto_mapping", "frob", *HOSTILE]
        config[rng.choice(unknown)] = rng.choice(["*", 3, None, ["x"]])


@edited
def settings_that_cannot_be(rng: random.Random, header: dict[str, Any]) -> None:
    config = header["methods"][0]["config"]
    name = rng.choice(["rank", "alpha", "dtype", "scaling", "init", "dropout"])
    more = {
        "rank": [0, -1, 10**9, 10**18, 10**400, 1.5, 3],
        "alpha": [math.nan, math.inf, -math.inf],
        "dtype": ["os", "load", "Tensor", "nn", "int8", "float32.__class__"],
        "dropout": [2.0, math.nan],
    }
    able = {"rank": (), "alpha": (None, 3, 0.5, -1), "dtype": (None,), "dropout": (0.5,)}
    fit = [value for value in WRONG if value not in able.get(name, ())]
    config[name] = rng.choice([*fit, *more.get(name, [])])


@edited
def methods_within_methods(rng: random.Random, header: dict[str, Any]) -> None:
    inner: Any = {"method": "LoRA", "config": {}}
    for _ in range(rng.choice([1, 50, 300])):
        inner = {"method": "Gated", "config": {"method": inner}}
    header["methods"][0] = {**header["methods"][0], **inner}


@edited
def sites_elsewhere(rng: random.Random, header: dict[str, Any]) -> None:
    sites = header["methods"][0]["sites"]
    at = rng.randrange(len(sites))
    sites[at] = rng.choice([
        "*", "*.weight", ".*", "re:.*", "blocks.*.attn.q_proj.weight", "(a+)+$", "q_proj", "",
        sites[at - 1], sites[at] + "[0:4]", sites[at] + "[99:100]", sites[at] + "()", "norm.weight",
        "blocks.0.attn()", "lm_head.weight", "embed.weight", "blocks.9.attn.q_proj.weight",
        "blocks.-1.attn.q_proj.weight", *HOSTILE,
    ])  # fmt: skip


@edited
def sites_added_or_gone(rng: random.Random, header: dict[str, Any]) -> None:
    sites = header["methods"][0]["sites"]
    if rng.random() < 0.5:
        sites.append(rng.choice([sites[0], "blocks.0.attn.k_proj.weight", "embed.weight"]))
    else:
        sites.pop()


@edited
def methods_added_or_gone(rng: random.Random, header: dict[str, Any]) -> None:
    if rng.random() < 0.5:
        header["methods"].append(deepcopy(header["methods"][0]))
    else:
        header["methods"].pop()


@edited
def another_base(rng: random.Random, header: dict[str, Any]) -> None:
    base = header["base"]
    address = rng.choice([*base])
    its = base[address]
    match rng.randrange(4):
        case 0:
            del base[address]
        case 1:
            its["sha256"] = rng.choice(["", "0" * 64, its["sha256"].upper(), 3, None])
        case 2:
            base[address] = rng.choice([{}, None, 3, [], {**its, "more": 1}, {"sha256": 0}])
        case _:
            its[rng.choice(["dtype", "shape"])] = rng.choice([None, [3], "float64", [], 3])


@edited
def packings_that_cannot_be(rng: random.Random, header: dict[str, Any]) -> None:
    its = {"as": "bf16", "dtype": "float32", "shape": [2, 16], "error": 0.0}
    key = "blocks.0.attn.q_proj.weight:a"
    other = rng.choice([
        {"as": "int4"}, {"as": None}, {"shape": [2**40, 2**20]}, {"shape": [-1]}, {"dtype": "load"},
        {"error": math.nan}, {"error": -1.0}, {"as": "sparse"}, {"as": "int8"}, {},
    ])  # fmt: skip
    header["packed"] = {rng.choice([key, "x", "lm_head.weight:a"]): {**its, **other}}


@edited
def a_hostile_name(rng: random.Random, header: dict[str, Any]) -> None:
    header["name"] = rng.choice(HOSTILE)


@mutator
def another_digest(rng: random.Random, data: bytes) -> bytes:
    parts = Parts.of(data)
    part = rng.choice(["sha256", "library", "notes", "alpha", "tensors"])
    if part == "tensors":
        parts.header["tensors"].pop(rng.choice([*parts.header["tensors"]]))
    elif part == "alpha":
        parts.header["methods"][0]["config"]["alpha"] = rng.choice([16, 1e30, -1])
    else:
        parts.header[part] = rng.choice(["0" * 64, "0.0.0", "", "x"])
    return parts.packed()


# -- the trials


def saved(model: nn.Module, methods: Any, path: Path) -> bytes:
    """A sound file of a model, which is then as it was."""
    with seeded(), torch.no_grad():
        delta = pl.attach(model, methods, "sql")
        for parameter in delta.parameters():
            parameter.normal_()
    pl.save(delta, path)
    pl.detach(model, "sql")
    return path.read_bytes()


def r1(cases: int, seed: int = 0) -> Tally:
    """Malformed files: each is refused with one of peftlite's errors, and the model untouched."""
    tally, rng, slowest = Tally(), random.Random(seed), 0.0
    model = GPT.model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sql.safetensors"
        good = saved(model, METHODS, path)
        pl.load(model, path)
        pl.detach(model, "sql")
        before = state(model)
        for what, data in _malformed(rng, good, cases):
            path.write_bytes(data)
            start = time.perf_counter()
            tally.refused(partial(pl.load, model, path), what)
            slowest = max(slowest, time.perf_counter() - start)
            if changed := difference(before, state(model)):
                tally.wrong.append(f"{what}: it changed {changed}")
                model = GPT.model()
                before = state(model)
        left = [file.name for file in Path(folder).iterdir()]
        tally.check(left == [path.name], f"files appeared: {left}")
    tally.notes.append(f"{len(MUTATORS)} mutators, slowest {slowest:.2f} s")
    tally.check(slowest < 1, f"a file took {slowest:.1f} s")
    return tally


def _malformed(rng: random.Random, good: bytes, cases: int) -> Iterator[tuple[str, bytes]]:
    for i in range(cases):
        mutate = MUTATORS[i % len(MUTATORS)]
        yield f"{mutate.__name__} ({i})", mutate(rng, good)


def r2(flips: int, seed: int = 0) -> Tally:
    """One bit of a file flipped: none loads."""
    tally, rng = Tally(), random.Random(seed)
    model = GPT.model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sql.safetensors"
        good = bytearray(saved(model, METHODS, path))
        before = state(model)
        for _ in range(flips):
            bit = rng.randrange(8 * len(good))
            good[bit // 8] ^= 1 << bit % 8
            path.write_bytes(good)
            good[bit // 8] ^= 1 << bit % 8
            tally.refused(lambda: pl.load(model, path), f"bit {bit}", pl.FileError)
        tally.check(not difference(before, state(model)), "the model changed")
    return tally


def memory(megabytes: int) -> Tally:
    """What it takes to refuse a file of that size: under twice as much, and 4 MB of Python's."""
    tally, rng, most = Tally(), random.Random(0), 0
    model = nn.Sequential(*(nn.Linear(512, 512, False) for _ in range(megabytes)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sql.safetensors"
        good = saved(model, pl.FullTuning(), path)
        for mutate in MUTATORS:
            try:
                path.write_bytes(mutate(rng, good))
            except (IndexError, KeyError, ValueError):
                continue  # it is for files of more methods
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = _resident("VmRSS")
            tally.refused(lambda: pl.load(model, path), mutate.__name__)
            most = max(most, _resident("VmHWM") - before)
    size = len(good)
    tally.check(most < 2 * size + 4e6, f"{most:,} bytes for a file of {size:,}")
    tally.notes.append(f"{most / size:.2f} of the file's size")
    return tally


def _resident(what: str) -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what)]
    return int(line.split()[1]) * 1024

"""quantize_files: a checkpoint's large weights packed, tensor by tensor, without the model."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.patch import Targets
from peftlite.errors import FileError, PeftliteError
from peftlite.io.base import packed_key
from peftlite.io.checkpoint import INDEX, Checkpoint, comes_along
from peftlite.io.files import (
    Entry,
    Tensors,
    as_path,
    data_of,
    flush_folder,
    is_finite,
    locking,
    placing,
    replacing,
    write_json,
    writing_to,
)  # fmt: skip
from peftlite.io.standin import embeds, stand_in
from peftlite.io.tied import tied_embedding, with_ties
from peftlite.progress import bar
from peftlite.quant import keys, nf4
from peftlite.quant.packing import Packing, pack
from peftlite.verbs.quantize import Packs, how_of, pick

_JOB = "quantize.json"


def quantize_files(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kind: str = "nf4",
    *,
    targets: Targets = None,
    skip: Targets = (),
    double_quant: bool = True,
    block: int = nf4.BLOCK,
    scales: str = "absmax",
    progress: bool = False,
) -> Packs:
    """Writes the checkpoint of a model that `quantize` packed, and never holds the model.

    It is read by `quantize(model, checkpoint=)` and, a folder, by transformers: nf4 and int8 with
    bitsandbytes, fp8 with compressed-tensors. One tensor and its codes are in memory at a time.
    Nothing is at `out` until all of it is there; what is killed goes on at the shard it was at.

    Args:
        checkpoint: a safetensors file, or a folder of shards with their index; then `out` is one.
        kind, targets, skip, double_quant, block, scales: as `quantize` has them. By default linear
            maps outside of numbered blocks, as output heads are, are left, too.
        progress: whether to show a bar.

    Raises:
        FileError: a file is missing or damaged, can't be written, or is packed already.
        PeftliteError: a tensor isn't finite, or of another dtype, or an argument is out of range.

    Example:
        from safetensors.torch import save_file

        save_file(nn.Sequential(nn.Linear(64, 64)).state_dict(), "base.safetensors")
        print(pl.quantize_files("base.safetensors", "packed.safetensors"))
    """
    how = how_of(kind, double_quant, block, scales)
    base, out = Checkpoint(checkpoint), as_path(out)
    chosen, left = _chosen(base, targets, skip)
    job = _Job(base, chosen, how)
    with _working(out, job.said, base.folder is not None) as folder:
        shown = {"total": base.num_bytes, "unit": "B", "unit_scale": True, "leave": False}
        with bar(None, f"quantize to {kind}", **shown, disable=not progress) as done:
            for tensors in base.files:
                path = folder / Path(tensors.path).name
                if not path.exists():
                    with replacing(path) as file:
                        job.write(tensors, file, done.update)
        config = job.config(left)
        if base.folder is not None:
            _write_rest(base, folder, job, config)
    return replace(job.packs, config=config)


class _Job:
    """What is to be done to each tensor of a checkpoint."""

    def __init__(self, base: Checkpoint, chosen: Mapping[str, str], how: Mapping[str, Any]):
        self.base, self.chosen, self.how = base, chosen, how
        self.packs = Packs(how["kind"], {}, {}, {}, {})
        for key, address in chosen.items():
            entry, parts = base.entry(key), self._entries(key, base.entry(key)).values()
            self.packs.shapes[address], self.packs.errors[address] = entry.shape, math.nan
            self.packs.bytes_before[address] = entry.num_bytes
            self.packs.bytes_after[address] = sum(part.num_bytes for part in parts)

    @property
    def said(self) -> dict[str, Any]:
        """What tells this job from another one on the same files."""
        files = [(Path(f.path).name, os.stat(f.path)) for f in self.base.files]
        there = [[name, its.st_size, its.st_mtime_ns] for name, its in files]
        return {**self.how, "files": there, "tensors": sorted(self.chosen)}

    def config(self, left: list[str]) -> Mapping[str, Any] | None:
        dtypes = [self.base.entry(key).dtype for key in self.chosen]
        if not dtypes or not all(map(self._is_linear, self.chosen)):
            return None
        return keys.config(self.how["kind"], dtypes[0], self.how["double"], left)

    def _is_linear(self, key: str) -> bool:
        """Whether it is the weight (o, i) of a linear map, as its bias (o) tells where it has one.

        A `Conv1D` of transformers has (i, o), which bitsandbytes would read the other way round.
        """
        shape, bias = self.base.shape(key), f"{key.removesuffix('weight')}bias"
        lies = bias not in self.base or self.base.shape(bias) == shape[:1]
        return len(shape) == 2 and key.endswith(".weight") and lies and not embeds(key)

    def entries(self, tensors: Tensors) -> dict[str, Entry]:
        """What a shard holds once its tensors are packed."""
        found: dict[str, Entry] = {}
        for key, entry in tensors.entries.items():
            found |= self._entries(key, entry) if key in self.chosen else {key: entry}
        return found

    def _entries(self, key: str, entry: Entry) -> dict[str, Entry]:
        how = Packing(self.how["kind"], torch.Size(entry.shape), entry.dtype, self.how["block"])
        empty = how.empty(self.how["double"])
        return {name: Entry.of(t) for name, t in keys.published(key, how, empty).items()}

    def write(self, tensors: Tensors, file: Any, advance: Any) -> None:
        """Writes a shard, each part of a packed tensor to its place."""
        entries = self.entries(tensors)
        places = placing(file, entries, {"format": "pt", **tensors.metadata})
        for key in tensors.entries:
            for name, tensor in self._made(key, tensors.get(key)).items():
                file.seek(places[name])
                file.write(data_of(tensor))
            advance(tensors.entries[key].num_bytes)

    def _made(self, key: str, w: Tensor) -> dict[str, Tensor]:
        if key not in self.chosen:
            return {key: w}
        if not is_finite(w):
            raise PeftliteError(f"{key} has numbers that aren't finite")
        how, parts = pack(w, **self.how)
        return keys.published(key, how, parts)


def _chosen(base: Checkpoint, targets: Targets, skip: Targets) -> tuple[dict[str, str], list[str]]:
    """The keys to pack with their addresses, and the linear maps that are left."""
    if key := packed_key(base):
        raise FileError(f"{str(base.path)!r} is packed already: it has {key}")
    model = stand_in(
        {key: base.entry(key).meta for key in base}, with_ties({}, base, tied_embedding(base))
    )
    blocks = any(path.rpartition(".")[2].isdigit() for path, _ in model.named_modules())
    found: dict[str, str] = {}
    for site in pick(model, targets, skip, in_blocks=blocks):
        found |= {next(name for name in site.names if name in base): site.address}
    linear = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    return found, [path for path in linear if f"{path}.weight" not in found]


@contextmanager
def _working(out: Path, said: Mapping[str, Any], whole: bool) -> Iterator[Path]:
    """A folder beside `out` for what is done so far; it, or the file in it, becomes `out`.

    whole: whether `out` is to be a folder.
    """
    with writing_to(out) as out:
        if out.exists():
            raise FileError(f"can't write {str(out)!r}: it is there already; name a new one")
        folder = out.with_name(f".{out.name}.part")
        folder.mkdir(exist_ok=True)
        with locking(folder) as ours:
            if not ours:
                raise FileError(f"can't write {str(out)!r}: another process is at it")
            if _said(folder) != json.loads(json.dumps(said)):
                for left in folder.iterdir():
                    left.unlink()
                write_json(folder / _JOB, said)
            try:
                yield folder
            except PeftliteError as error:  # which would come again; a full disk wouldn't
                if not isinstance(error, FileError):
                    shutil.rmtree(folder)
                raise
            (folder / _JOB).unlink()
            done = folder if whole else next(folder.iterdir())
            flush_folder(folder)
            done.rename(out)
            if not whole:
                folder.rmdir()
        flush_folder(out.parent)


def _said(folder: Path) -> Any:
    try:
        return json.loads((folder / _JOB).read_text())
    except (OSError, ValueError):
        return None


def _write_rest(base: Checkpoint, folder: Path, job: _Job, config: Mapping | None) -> None:
    """The index, config.json, and what else is in the folder."""
    assert base.folder is not None
    found = {Path(tensors.path).name: job.entries(tensors) for tensors in base.files}
    for other in sorted(base.folder.iterdir()):
        if not other.is_file() or not comes_along(other.name):
            continue
        if other.name.endswith(INDEX):
            size = sum(e.num_bytes for entries in found.values() for e in entries.values())
            where = {key: name for name, entries in found.items() for key in entries}
            write_json(folder / other.name, {"metadata": {"total_size": size}, "weight_map": where})
        elif other.name == "config.json" and config is not None:
            write_json(folder / other.name, {**base.config, "quantization_config": dict(config)})
        else:
            shutil.copyfile(other, folder / other.name)

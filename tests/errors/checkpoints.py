"""The errors of a checkpoint's files, without the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite import cli
from peftlite.io.checkpoint import Checkpoint
from tests.errors.case import ZOO, Case, bare, delta
from tests.errors.load import LACKS_ALL, SITES, good
from tests.errors.merge import Q, with_calls


def in_shards(path: Path) -> None:
    """A sound delta, and the base it was made for, in two shards."""
    path.write_bytes(good())
    tensors = list(bare().state_dict().items())
    write_shards(path, {"1.safetensors": dict(tensors[:9]), "2.safetensors": dict(tensors[9:])})


def write_shards(path: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    folder = path.with_name("base")
    folder.mkdir()
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / name)
    write_index(path, {key: name for name, tensors in shards.items() for key in tensors})


def write_index(path: Path, weight_map: Any) -> None:
    text = json.dumps({"weight_map": weight_map})
    (path.with_name("base") / "model.safetensors.index.json").write_text(text)


def with_base(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """The same files, but for what a stranger did to them."""

    def write(path: Path) -> None:
        in_shards(path)
        change(path)

    return write


def of_other(tensors: Callable[[], dict[str, Tensor]]) -> Callable[[Path], None]:
    """A sound delta, and another base."""

    def write(path: Path) -> None:
        path.write_bytes(good())
        write_shards(path, {"1.safetensors": tensors()})

    return write


def merging_files(out: str = "out", base: str = "base", **its: Any) -> Callable[[Any, Path], Any]:
    return lambda _, path: pl.merge_files(path.parent / base, path, path.parent / out, **its)


def offline(act: Any, says: str, file: Any, kind: Any = pl.FileError) -> Case:
    return Case(act, says, kind, nn.ReLU, file)


def calling(path: Path) -> None:
    in_shards(path)
    pl.save(delta(with_calls()), path)


def two_files(path: Path) -> None:
    (path.with_name("base") / "model.safetensors.index.json").unlink()


def shrinking(_: Any, path: Path) -> None:
    """A file that gets shorter after it was opened."""
    shard = path.with_name("base") / "1.safetensors"
    data, held = shard.read_bytes(), Checkpoint(shard)
    shard.write_bytes(data[:-9])
    try:
        held.rewrite(path, lambda key: None, lambda count: None)
    finally:
        shard.write_bytes(data)


def command(*args: str) -> Callable[[Any, Path], Any]:
    """A command, with PATH for the path."""

    def act(_: Any, path: Path) -> None:
        parsed = cli._parser().parse_args([arg.replace("PATH", str(path)) for arg in args])
        parsed.run(parsed)

    return act


NO_INDEX = "'…/base/model.safetensors.index.json' is no index of a checkpoint: …"
HOLDS_IT = ": name the one that holds the model"
INTO = "'…' was made for other base weights: " + Q + " differs"
ADVICE = "; merge it into the base it was trained on, or pass check_base='warn'"

CASES = [
    offline(merging_files(check_base=False), "check_base must be 'error', 'warn' or 'off', not "
            "False", in_shards, pl.PeftliteError),
    offline(merging_files(), INTO + ADVICE, of_other(lambda: {
        k: x + 1 for k, x in bare().state_dict().items()}), pl.BaseMismatchError),
    offline(merging_files(), f"{INTO} (dtype float32, here bfloat16){ADVICE}",
            of_other(bare().bfloat16().state_dict), pl.BaseMismatchError),
    offline(merging_files(), SITES + LACKS_ALL + "there are such as …",
            of_other(ZOO["mlp"].model().state_dict)),
    offline(merging_files(), "'sql' changes calls, which no weight can hold: blocks.0.attn() (2 "
            "sites); keep it attached", calling, pl.PeftliteError),
    offline(merging_files(base="lost"), "there is no file '…/lost'", in_shards),
    *(offline(merging_files(), NO_INDEX, with_base(lambda path, its=its: write_index(path, its)))
      for its in (None, [], 3)),
    offline(merging_files(), NO_INDEX, with_base(
        lambda path: (path.with_name("base") / "model.safetensors.index.json").write_text("{"))),
    *(offline(merging_files(), f"'…' names {its!r}, which is no name of a safetensors file",
              with_base(lambda path, its=its: write_index(path, {Q: its})))
      for its in ("../1.safetensors", "/1.safetensors", ".safetensors", "1.bin", 3)),
    offline(merging_files(), f"'…/base' has 1.safetensors; 2.safetensors{HOLDS_IT}",
            with_base(two_files)),
    offline(merging_files(), f"'…/base' has no safetensors file{HOLDS_IT}",
            lambda path: (path.write_bytes(good()), path.with_name("base").mkdir())),
    offline(merging_files(), "'…/base' has a tensor in two of its files", with_base(
        lambda path: (path.with_name("base") / "2.safetensors").write_bytes(
            (path.with_name("base") / "1.safetensors").read_bytes()))),
    offline(merging_files(), "'…/base' has a tensor named a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a."
            "… of 202 steps, and no model is so deep", with_base(
        lambda path: safetensors.torch.save_file(
            {"a." * 201 + "b": torch.ones(1)}, path.with_name("base") / "1.safetensors"))),
    offline(merging_files("base"), "can't write '…/base': it is there already; name a new folder",
            in_shards),
    offline(merging_files("deeper/out"),
            "can't write '…/deeper/out': there is no folder '…/deeper'",
            in_shards),
    offline(merging_files("sql.safetensors", "sql.safetensors"), "'…' is for a model with …",
            in_shards),
    offline(lambda _, path: Checkpoint(path).rewrite(path, lambda key: None, print),
            "'…' is the base itself: give the result another name", in_shards),
    offline(shrinking, "'…/base/1.safetensors' became shorter while it was read", in_shards),
    offline(command("verify", "PATH"), "there is no file '…'", None),
    offline(command("combine", "base", "PATH=much", "-o", "out"), "'…=much' is no FILE=WEIGHT: "
            "'much' is no number", None, pl.PeftliteError),
]  # fmt: skip

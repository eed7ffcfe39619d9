"""Loading and saving deltas of 100 MB and 1 GB, against safetensors with hashing and with fsync."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import safetensors
import safetensors.torch
import torch
from common import Figure, Timer, arguments, interleave, ratios, report
from torch import nn

import peftlite as pl

WIDTH = 1024
# layers, rank and rounds: 2 factors × 256 × 1024 × 4 B × 50 layers = 105 MB, and ten times that
SIZES = [(50, 256, 15), (125, 1024, 5)]


def once(act: Callable[[], object], after: Callable[[], object] = lambda: None) -> Timer:
    def run() -> float:
        start = perf_counter()
        act()
        seconds = perf_counter() - start
        after()
        return seconds

    return run


def load_theirs(path: Path) -> None:
    for tensor in safetensors.torch.load_file(path).values():
        hashlib.sha256(tensor.numpy()).digest()


def save_theirs(tensors: dict[str, torch.Tensor], path: Path) -> None:
    safetensors.torch.save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def measure(layers: int, rank: int, rounds: int) -> Iterator[Figure]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    delta = pl.attach(model, pl.LoRA(rank=rank, targets="*"), "sql")
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.safetensors", Path(folder) / "theirs.safetensors"
        tensors = delta.state_dict()
        saving = interleave(
            {
                "peftlite": once(lambda: pl.save(delta, ours)),
                "save_file and fsync": once(lambda: save_theirs(tensors, theirs)),
            },
            rounds,
        )
        loading = interleave(
            {
                "peftlite": once(
                    lambda: pl.load(model, ours, "new"), lambda: pl.detach(model, "new")
                ),
                "load_file and SHA-256": once(lambda: load_theirs(theirs)),
            },
            rounds,
        )
        size = ours.stat().st_size / 1e6
    for verb, times in (("save", saving), ("load", loading)):
        for name in times:
            yield Figure(f"{verb} {size:.0f} MB, {name}", times[name], "s")
        mine, other = times.values()
        ratio = ratios(mine, other)
        yield Figure(f"{verb} {size:.0f} MB, peftlite / theirs", ratio, at_most=1.3)


def main() -> None:
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    figures = [
        figure
        for layers, rank, rounds in SIZES[: 1 if quick else None]
        for figure in measure(layers, rank, 2 if quick else rounds)
    ]
    report("files", figures, quick=quick, safetensors=safetensors.__version__)


if __name__ == "__main__":
    main()

"""Loading and saving a delta of 100 MB, against what safetensors takes with hashing and fsync."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import safetensors
import safetensors.torch
import torch
from common import Figure, Timer, arguments, interleave, ratios, report
from torch import nn

import peftlite as pl

WIDTH, LAYERS, RANK = 1024, 50, 256  # 2 factors × 256 × 1024 × 4 B × 50 layers = 105 MB


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


def main() -> None:
    quick = arguments(__doc__).quick
    rounds = 2 if quick else 15
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    delta = pl.attach(model, pl.LoRA(rank=RANK, targets="*"), "sql")
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
    figures = []
    for verb, times in (("save", saving), ("load", loading)):
        figures += [Figure(f"{verb} {size:.0f} MB, {name}", times[name], "s") for name in times]
        mine, other = times.values()
        figures.append(Figure(f"{verb}, peftlite / theirs", ratios(mine, other), at_most=1.5))
    report("files", figures, quick=quick, safetensors=safetensors.__version__)


if __name__ == "__main__":
    main()

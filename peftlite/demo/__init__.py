"""`peftlite demo`: one base and two deltas on real text, and every law measured on them."""

from __future__ import annotations

import copy
import hashlib
import inspect
import platform
import shlex
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.demo import gpt, laws, training, words
from peftlite.demo.text import Text, texts
from peftlite.demo.training import Recipe, pretrain
from peftlite.progress import bar
from peftlite.table import size, table

BASE, DELTAS = "base", ("docs", "names")


@dataclass(frozen=True)
class Settings:
    """The base, its deltas, and how they are trained and measured."""

    dim: int
    layers: int
    heads: int
    base: Recipe
    lora: pl.LoRA
    delta: Recipe
    windows: int  # of each text held out
    swaps: int  # to time


SETTINGS = Settings(
    dim=128,
    layers=4,
    heads=4,
    base=Recipe(steps=1200, lr=2e-3),
    lora=pl.LoRA(rank=8, alpha=16),
    delta=Recipe(steps=250, lr=1e-2),
    windows=128,
    swaps=1000,
)


def run(cache: Path, fresh: bool = False, settings: Settings = SETTINGS) -> int:
    """Trains, measures and prints. Returns 0 if every law holds, else 1.

    Args:
        cache: a folder for the base and the deltas.
        fresh: trains the base even if the cache has it.
    """
    began = time.perf_counter()
    corpus = texts()
    digest = _digest(*(half for text in corpus.values() for half in (text.train, text.held)))
    # the sources are part of the key: weights made for another network are not this one's
    key = _digest(digest, settings, *map(inspect.getsource, (gpt, training)))
    folder = cache / f"demo-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.safetensors" for name in (BASE, *DELTAS)}
    print(_headline(corpus, digest))
    print(words.COMING.format(rank=settings.lora.rank), flush=True)

    torch.manual_seed(0)
    base = gpt.GPT(settings.dim, settings.layers, settings.heads)
    pretrain(base, corpus["code"].train, settings.base, files[BASE], key, fresh)
    x = torch.stack([text.held[: settings.base.context].long() for text in corpus.values()])

    trained, untrained = copy.deepcopy(base), {}
    for name in DELTAS:
        torch.manual_seed(0)
        delta = pl.attach(trained, settings.lora, name=name)
        untrained[name] = laws.answer(trained, x, name)
        training.train(
            trained, delta.parameters(), corpus[name].train, settings.delta, f"delta {name}"
        )
        pl.save(delta, files[name])

    loaded = copy.deepcopy(base)
    for name in DELTAS:
        pl.load(loaded, files[name], name=name)
    scores = _scores(loaded, corpus, files, settings)
    print(f"{words.COLUMNS}\n{scores}\n{words.WHY}", flush=True)

    kept = []
    for law in laws.measure(base, trained, loaded, untrained, x):
        print(law, flush=True)
        kept.append(law.holds)
    print(f"\n{sum(kept)} of {len(kept)} laws hold; {time.perf_counter() - began:.0f} s")
    print(f"the base and its deltas are in {folder}")
    print(words.NEXT.format(file=shlex.quote(str(files[DELTAS[0]]))))
    return 0 if all(kept) else 1


def _scores(
    model: nn.Module, corpus: Mapping[str, Text], files: Mapping[str, Path], settings: Settings
) -> str:
    """A row for the base and for each delta: its size, its losses, how soon it is swapped in."""
    counts = {name: delta.num_parameters for name, delta in pl.deltas(model).items()}
    counts[BASE] = sum(p.numel() for p in model.parameters()) - sum(counts.values())
    rows = []
    for name, file in bar(files.items(), "held out", unit="model"):
        with pl.using(model, None if name == BASE else name):
            losses = [
                training.held_out(model, text.held, settings.base.context, settings.windows)
                for text in corpus.values()
            ]
        share = f"{counts[name] / counts[BASE]:.1%}"
        swap = f"{_swap_time(model, name, settings.swaps):.1f} µs"
        held_out = [f"{loss:.3f}" for loss in losses]
        rows.append([name, f"{counts[name]:,}", share, size(file.stat().st_size), *held_out, swap])
    header = ["", "trainable", "of base", "file", *(f"bits on {kind}" for kind in corpus), "swap"]
    return table(header, rows)


def _swap_time(model: nn.Module, name: str, swaps: int) -> float:
    """The median time of pl.use in µs: to a delta from the base, or to the base from a delta."""
    here, there = (None, DELTAS[0]) if name == BASE else (name, None)
    times = []
    for _ in range(swaps):
        pl.use(model, there)
        began = time.perf_counter_ns()
        pl.use(model, here)
        times.append(time.perf_counter_ns() - began)
    return statistics.median(times) / 1000


def _headline(corpus: Mapping[str, Text], digest: str) -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    kinds = ", ".join(f"{size(len(text.train))} of {kind}" for kind, text in corpus.items())
    return f"{versions}\ncorpus {digest}: {kinds} to train on"


def _digest(*parts: Any) -> str:
    """A short name for what went in: tensors by their bytes, the rest by how it prints."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy() if isinstance(part, Tensor) else repr(part).encode())
    return digest.hexdigest()[:12]

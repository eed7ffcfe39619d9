"""METHODS: every row of the comparison, and how it is attached to a task's base."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

import peftlite as pl

from .task import Task

BASE, FULL, LOW, TURN, FEW, SPARSE, CALLS = KINDS = (
    "nothing",
    "whole tensors",
    "low rank",
    "rotation",
    "vectors",
    "sparse",
    "modules and prompts",
)

FROZEN, ALL = "frozen base", "full fine-tuning"  # the ends
USUAL = "LoRA r8"

Make = Callable[[Task], "pl.Method | list[pl.Method]"]


@dataclass(frozen=True)
class Row:
    """A method under a name, of a kind, which is its colour in the plot."""

    name: str
    kind: str
    make: Make
    b_ratio: float = 1.0

    @property
    def trains(self) -> bool:
        return self.kind != BASE

    def methods(self, task: Task) -> list[pl.Method]:
        """What to attach: where the head is new, its full tuning goes with every method."""
        made = self.make(task)
        methods = made if isinstance(made, list) else [made]
        head = pl.FullTuning(targets=task.head)
        add = task.new_head and self.trains and head not in methods
        return [*methods, head] if add else methods

    def key(self, task: Task) -> str:
        """A short name for what was asked for and the task's version: others aren't comparable."""
        asked = [_asked(method) for method in self.methods(task)]
        parts = (task.name, task.version, asked, self.b_ratio)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def _asked(method: pl.Method) -> tuple[str, dict[str, object]]:
    """A method's name and arguments but for defaults, to which others may come in time."""
    given = ((f.name, getattr(method, f.name), f.default) for f in fields(method))
    return type(method).__name__, {name: value for name, value, plain in given if value != plain}


def _adalora(task: Task) -> pl.Method:
    return pl.AdaLoRA(total_steps=task.steps, t_init=task.steps // 10, t_final=task.steps // 3)


def _ia3(task: Task) -> list[pl.Method]:
    keys, values, down = (task.places[name] for name in ("keys", "values", "down"))
    return [pl.IA3(targets=[keys, values]), pl.IA3(targets=down, feedforward=True)]


def _unipelt(task: Task) -> list[pl.Method]:
    three = (
        pl.LoRA(rank=8),
        pl.BottleneckAdapter(preset="pfeiffer"),
        pl.PrefixTuning(prefix_length=10),
    )
    return [pl.Gated(method) for method in three]


def _fish(task: Task) -> pl.Method:
    return pl.SparseMask(fraction=0.02, select="fish", scores=_scores(task))


@functools.cache
def _scores(task: Task) -> dict[str, Tensor]:
    """From 64 examples or a few more of the training split."""
    draw = torch.Generator().manual_seed(0)
    batches = [task.sample(draw) for _ in range(math.ceil(64 / task.batch))]
    return pl.fish_scores(copy.deepcopy(task.base), task.losses, batches)


METHODS = [
    Row(FROZEN, BASE, lambda task: []),
    Row("head", FULL, lambda task: pl.FullTuning(targets=task.head)),
    Row("last block", FULL, lambda task: pl.FullTuning(top_layers=1)),
    Row(ALL, FULL, lambda task: pl.FullTuning()),
    Row("LoRA r1", LOW, lambda task: pl.LoRA(rank=1)),
    Row(USUAL, LOW, lambda task: pl.LoRA(rank=8)),
    Row("LoRA r32", LOW, lambda task: pl.LoRA(rank=32)),
    Row("rsLoRA r32", LOW, lambda task: pl.LoRA(rank=32, scaling="rslora")),
    Row("rsLoRA r64", LOW, lambda task: pl.LoRA(rank=64, scaling="rslora")),
    # as many parameters as rank 8 has on all maps
    Row("LoRA r18, attention", LOW, lambda t: pl.LoRA(rank=18, targets=t.places["attention"])),
    Row("PiSSA r8", LOW, lambda t: pl.LoRA(rank=8, init="pissa", exclude=t.narrow)),
    Row("OLoRA r8", LOW, lambda t: pl.LoRA(rank=8, init="olora", exclude=t.narrow)),
    Row("LoRA+ r8", LOW, lambda task: pl.LoRA(rank=8), b_ratio=16.0),
    Row("LoRA-FA r8", LOW, lambda task: pl.LoRA(rank=8, freeze_a=True)),
    Row("DoRA r8", LOW, lambda task: pl.DoRA(rank=8)),
    Row("AdaLoRA r8", LOW, _adalora),
    Row("VeRA r256", LOW, lambda task: pl.VeRA(rank=256)),
    Row("VB-LoRA r4", LOW, lambda task: pl.VBLoRA()),
    Row("LoHa r8", LOW, lambda task: pl.LoHa(rank=8)),
    Row("LoKr r8", LOW, lambda task: pl.LoKr(rank=8)),
    Row("FourierFT", LOW, lambda task: pl.FourierFT()),
    Row("FourierFT from 0", LOW, lambda task: pl.FourierFT(init="zero")),
    Row("OFT b32", TURN, lambda task: pl.OFT(block_size=32)),
    Row("BOFT b8 m2", TURN, lambda task: pl.BOFT(block_size=8, m=2)),
    Row("HRA r8", TURN, lambda task: pl.HRA(rank=8)),
    Row("IA3", FEW, _ia3),
    Row("BitFit", FEW, lambda task: pl.BitFit(add_missing=True)),
    Row("norms", FEW, lambda task: pl.NormTuning()),
    Row("magnitude 2 %", SPARSE, lambda task: pl.SparseMask(fraction=0.02)),
    Row("random 2 %", SPARSE, lambda task: pl.SparseMask(fraction=0.02, select="random")),
    Row("FISH 2 %", SPARSE, _fish),
    Row("SHiRA r8", SPARSE, lambda task: pl.SHiRA(rank=8)),
    Row("LT-SFT 2 %", SPARSE, lambda task: pl.LTSFT(steps=task.steps // 2, fraction=0.02)),
    Row("diff pruning 2 %", SPARSE, lambda t: pl.DiffPruning(steps=t.steps // 2, fraction=0.02)),
    Row("Houlsby", CALLS, lambda task: [pl.BottleneckAdapter(preset="houlsby"), pl.NormTuning()]),
    Row("Pfeiffer", CALLS, lambda task: pl.BottleneckAdapter(preset="pfeiffer")),
    Row("parallel adapter", CALLS, lambda task: pl.BottleneckAdapter(preset="parallel")),
    Row("Compacter", CALLS, lambda task: [pl.Compacter(), pl.NormTuning()]),
    Row("LoReFT r4", CALLS, lambda task: pl.LoReFT(rank=4)),
    Row("prefix n10", CALLS, lambda task: pl.PrefixTuning(prefix_length=10)),
    Row("prompt n20", CALLS, lambda task: pl.PromptTuning(prompt_length=20)),
    Row("P-tuning n20", CALLS, lambda task: pl.PTuning(prompt_length=20)),
    Row("UniPELT", CALLS, _unipelt),
]

"""R3: a base in which one weight is one ULP off, by whatever way it got there, is another base."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import peftlite as pl
from tests.trust.malformed import saved
from tests.trust.tally import Tally, difference, state

Way = Callable[[nn.Linear, Tensor], object]
"""Gives a layer the weight of another value, as programs do."""


def _index_put(layer: nn.Linear, edited: Tensor) -> None:
    at = (edited != layer.weight).nonzero()[0].tolist()
    with torch.no_grad():
        layer.weight[at[0], at[1]] = edited[at[0], at[1]]


def _numpy(layer: nn.Linear, edited: Tensor) -> None:
    layer.weight.detach().view(torch.int16).numpy()[:] = edited.view(torch.int16).numpy()


def _storage(layer: nn.Linear, edited: Tensor) -> None:
    layer.weight.untyped_storage().copy_(edited.untyped_storage())


def _optimizer(layer: nn.Linear, edited: Tensor) -> None:
    # neighbours differ by what is exact in floating point: one step of rate 1 goes there
    layer.weight.grad = layer.weight.detach() - edited
    torch.optim.SGD([layer.weight], lr=1.0).step()
    layer.weight.grad = None


WAYS: dict[str, Way] = {
    "in place": _index_put,
    ".data": lambda layer, edited: layer.weight.data.copy_(edited),
    ".data set": lambda layer, edited: setattr(layer.weight, "data", edited),
    "detach": lambda layer, edited: layer.weight.detach().copy_(edited),
    "a NumPy view": _numpy,
    "its storage": _storage,
    "DLPack": lambda layer, edited: torch.from_dlpack(layer.weight.detach()).copy_(edited),
    "an optimizer": _optimizer,
    "load_state_dict": lambda layer, edited: layer.load_state_dict({"weight": edited}),
    "load_state_dict, assigned": lambda layer, edited: layer.load_state_dict(
        {"weight": edited}, assign=True
    ),
    "a new parameter": lambda layer, edited: setattr(layer, "weight", nn.Parameter(edited)),
    "_foreach_copy_": lambda layer, edited: torch._foreach_copy_([layer.weight.data], [edited]),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDE = 96  # so that a sample doesn't hold every entry


def r3(edits: int, seed: int = 0) -> Tally:
    """Edits of one ULP after the base's digest was taken, then two rows that change places."""
    tally, rng = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for number, dtype in enumerate(DTYPES):
            path = Path(folder) / str(number)
            model = nn.Sequential(nn.Linear(SIDE, SIDE, False), nn.Linear(SIDE, SIDE, False))
            model.to(dtype).requires_grad_(False)
            saved(model, pl.LoRA(rank=2, targets="*"), path)
            for i in range(number, edits, len(DTYPES)):
                _edit(model, path, _neighbour, rng, [*WAYS][i // len(DTYPES) % len(WAYS)], tally)
            for way in (".data", "a NumPy view", "its storage"):
                _edit(model, path, _swap, rng, way, tally)
    tally.notes.append(f"{len(WAYS)} ways to write")
    return tally


def _edit(
    model: nn.Sequential,
    path: Path,
    change: Callable[[Tensor, random.Random], None],
    rng: random.Random,
    way: str,
    tally: Tally,
) -> None:
    layer = rng.choice([*model])
    was = layer.weight.detach().clone()
    edited = was.clone()
    change(edited, rng)
    WAYS[way](layer, edited)
    layer.weight.requires_grad_(False)
    before = state(model)
    what = f"{change.__name__} by {way} in {was.dtype}"
    tally.refused(lambda: pl.load(model, path), what, pl.BaseMismatchError)
    if changed := difference(before, state(model)):
        tally.wrong.append(f"{what}: it changed {changed}")
    layer.weight.data.copy_(was)
    if rng.random() < 0.1:  # the base as it was is taken again
        pl.load(model, path)
        pl.detach(model, "sql")


def _neighbour(w: Tensor, rng: random.Random) -> None:
    bits = w.view(torch.int32 if w.itemsize == 4 else torch.int16).view(-1)
    bits[rng.randrange(len(bits))] += rng.choice([-1, 1])


def _swap(w: Tensor, rng: random.Random) -> None:
    a, b = rng.sample(range(len(w)), 2)
    w[[a, b]] = w[[b, a]]

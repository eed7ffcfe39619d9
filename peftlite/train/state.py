"""All that a training run is made of, as a tree of tensors and JSON: to snapshot, to write, to set.

Random numbers come from Python's, NumPy's and torch's global generators, as layers and data use
them; a run has states of its own, and the user's are as before afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftlite.errors import FileError
from peftlite.table import listed

Tree = Any
"""A tensor, what JSON holds, or a list or dict (of strings) of such."""


def random_state(device: torch.device) -> dict[str, Tree]:
    """The state of all the generators that code on a device draws from."""
    (version, words, gauss), (kind, keys, *rest), cpu, others = _generators(device)
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {"kind": kind, "keys": torch.from_numpy(keys.astype(np.int64)), "rest": rest},
        "torch": cpu,
        "device": others,
    }


def set_random_state(state: dict[str, Tree], device: torch.device) -> None:
    python, numpy = state["python"], state["numpy"]
    words = tuple(python["words"].tolist())
    keys = numpy["keys"].numpy().astype(np.uint32)
    given = (python["version"], words, python["gauss"]), (numpy["kind"], keys, *numpy["rest"])
    _set_generators((*given, state["torch"], state["device"]), device)


def mix_seeds(*numbers: int) -> int:
    """One seed, below 2⁶⁴, out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What data draws inside, from Python's, NumPy's and torch's generators, goes by a seed.

    `fork_rng` for the CPU alone, in a tenth of its time: NumPy's state isn't copied.
    """
    python, numpy, cpu = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.set_bit_generator(np.random.MT19937(seed))
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_bit_generator(numpy)
        torch.set_rng_state(cpu)


@contextmanager
def fork_rng(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """The generators inside begin from a seed; outside they are as before: nothing was drawn.

    `torch.random.fork_rng`, with Python's and NumPy's too. None leaves them where they are.
    """
    before = _generators(device)
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            if device.type != "cpu":
                kind = torch.get_device_module(device)
                getattr(kind, "manual_seed_all", kind.manual_seed)(seed)
        yield
    finally:
        _set_generators(before, device)


def _generators(device: torch.device) -> tuple[Any, ...]:
    """The states as Python, NumPy and torch have them."""
    others = []
    if device.type != "cpu":
        kind = torch.get_device_module(device)  # all of a kind: a model may be on several
        others = getattr(kind, "get_rng_state_all", lambda: [kind.get_rng_state()])()
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), others


def _set_generators(states: tuple[Any, ...], device: torch.device) -> None:
    python, numpy, cpu, others = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if device.type != "cpu":
        kind = torch.get_device_module(device)
        getattr(kind, "set_rng_state_all", lambda states: kind.set_rng_state(*states))(others)


Names = Mapping[nn.Parameter, str]


def optimizer_state(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, Tree]:
    """The state of an optimizer, with the name and shape of every parameter that it is of."""
    state = optimizer.state_dict()
    # JSON's keys are strings
    slots = {str(index): slots for index, slots in state["state"].items()}
    return {**state, "state": slots, "parameters": _owners(optimizer, names)}


def set_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Tree], names: Names
) -> None:
    """Gives each parameter the state that was its own. Raises FileError where that doesn't fit."""
    own, slots = _owners(optimizer, names), {int(i): slot for i, slot in state["state"].items()}
    given = state.get("parameters", own)  # earlier checkpoints have them in order alone
    places = {tuple(owner): i for i, owner in enumerate(given)}
    found = [places.get(tuple(owner), -1) for owner in own]
    misfits = [
        str(owner[0])
        for owner, place in zip(own, found, strict=True)
        if place < 0 or not _fits(optimizer, owner[1:], slots.get(place, {}))
    ]
    if misfits or len(places) != len(own):
        raise FileError(
            f"the checkpoint's optimizer has state for {len(places)} parameters, and here are "
            f"{len(own)}; of another name or shape is {listed(misfits) or 'none'}: train what was "
            "trained then"
        )
    of = {i: group for group in state["param_groups"] for i in group["params"]}
    groups = [
        {**of[found[group["params"][0]]], "params": group["params"]}
        for group in optimizer.state_dict()["param_groups"]
    ]
    theirs = {i: slots[place] for i, place in enumerate(found) if place in slots}
    optimizer.load_state_dict({"state": theirs, "param_groups": groups})
    for parameter, slots in optimizer.state.items():
        # moments lie as their parameter does, which torch's fused kernels take for granted
        for name, slot in slots.items():
            if isinstance(slot, Tensor) and slot.shape == parameter.shape:
                slots[name] = torch.empty_like(parameter, dtype=slot.dtype).copy_(slot)


def _owners(optimizer: torch.optim.Optimizer, names: Names) -> list[list[Any]]:
    """The name of every parameter, or its number, and its shape, in an optimizer's order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [[names.get(p, f"#{i}"), *p.shape] for i, p in enumerate(parameters)]


def _fits(optimizer: torch.optim.Optimizer, shape: Sequence[int], slots: Mapping[str, Any]) -> bool:
    """Whether moments have their parameter's shape; torch doesn't ask, and reads beyond them."""
    if not type(optimizer).__module__.startswith(("torch.optim", "peftlite.")):
        return True  # others keep theirs packed
    factors = ("row_var", "col_var")  # as Adafactor has them
    moments = (slot for name, slot in slots.items() if name not in factors)
    return all([*m.shape] == [*shape] for m in moments if isinstance(m, Tensor) and m.dim())


def clone(tree: Tree) -> Tree:
    """A tree whose tensors are copies, each on its own device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)


def pack(tree: Tree, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The tree as JSON, its tensors put into `tensors` and named instead."""
    if isinstance(tree, Tensor):
        tensors[path] = tree
        return {"tensor": path}
    if isinstance(tree, dict):
        return {key: pack(value, tensors, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [pack(value, tensors, f"{path}/{i}") for i, value in enumerate(tree)]
    return tree


def unpack(plain: Any, tensors: dict[str, Tensor]) -> Tree:
    """The tree that was packed."""
    if isinstance(plain, dict):
        if set(plain) == {"tensor"}:
            return tensors[plain["tensor"]]
        return {key: unpack(value, tensors) for key, value in plain.items()}
    return [unpack(value, tensors) for value in plain] if isinstance(plain, list) else plain

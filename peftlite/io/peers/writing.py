"""Writing: a delta in a peer's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.assign import Placed
from peftlite.core.delta import Delta
from peftlite.core.patch import Method
from peftlite.core.tensors import wide
from peftlite.errors import PeftliteError
from peftlite.io.files import is_finite, write_file
from peftlite.io.peers.peer import ALPHA, RANKS, Peer
from peftlite.io.refusal import not_by_itself, refusal
from peftlite.methods.dora import DoRA, DoRAPatch
from peftlite.methods.lora import LoRA
from peftlite.methods.low_rank import LowRankPatch
from peftlite.table import short


def write(peer: Peer, delta: Delta, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a delta as a file that the peer loads. Raises PeftliteError."""
    if not all(isinstance(x, str) for item in metadata.items() for x in item):
        raise PeftliteError(
            f"settings are a file's metadata in the format of {peer.name}, all of them text: not "
            f"{short(metadata)}"
        )
    write_file(path, _tensors(peer, delta), {"format": "pt", **metadata})


def _refuse(peer: Peer, item: Placed, why: str) -> PeftliteError:
    return refusal(item, f"a file of {peer.name}", why)


def _check(peer: Peer, item: Placed) -> None:
    """Raises PeftliteError if a site can't be in a peer's file."""
    item.check()
    site, module = item.site, item.site.module
    layers = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    if site.index is not None or site.slot != "weight" or not isinstance(module, layers):
        raise _refuse(peer, item, "there it has whole weights of linear layers and convolutions")
    if getattr(module, "groups", 1) > 1 and not peer.groups:
        raise _refuse(peer, item, "a change there sees the inputs of all groups")
    if why := not_by_itself(site):
        raise _refuse(peer, item, why)


@torch.no_grad()
def _tensors(peer: Peer, delta: Delta) -> dict[str, Tensor]:
    """All tensors by their keys."""
    modules = []
    for address, item in delta.placed.items():
        _check(peer, item)
        kind, own = _own(item.patch, item.method)
        if kind not in {**peer.methods, **peer.turns}:
            known = ", ".join(each.__name__ for each in (*peer.methods, *peer.turns))
            raise _refuse(peer, item, f"there it has {known}, and no {kind.__name__}")
        modules.append((peer.module(address.removesuffix(".weight")), item, kind, own))
    most = max(_rank(own) or 0 for *_, own in modules)
    tensors: dict[str, Tensor] = {}
    for module, item, kind, own in modules:
        found = {}
        for name, tensor in _named(peer, item, kind, own, most).items():
            if not is_finite(tensor):
                raise _refuse(peer, item, "it has values that aren't finite")
            found[f"{module}.{name}"] = tensor
        if found.keys() & tensors.keys():
            raise _refuse(peer, item, f"another module, too, is called {module} there")
        tensors |= found
    return tensors


def _own(patch: Any, method: Method) -> tuple[type[Method], dict[str, Tensor]]:
    """A patch's parameters, and the method whose they are: every product of low rank is LoRA's."""
    if not isinstance(patch, LowRankPatch):
        return type(method), dict(patch.named_parameters())
    own = dict(zip("ab", patch.factors(), strict=True))
    return (DoRA, {**own, "m": patch.m}) if isinstance(patch, DoRAPatch) else (LoRA, own)


def _rank(own: Mapping[str, Tensor]) -> int | None:
    return next((own[p].shape[dim] for p, dim in RANKS if p in own), None)


def _named(
    peer: Peer, item: Placed, kind: type[Method], own: dict[str, Tensor], most: int
) -> dict[str, Tensor]:
    """One module's tensors by the peer's names; `most` is the highest rank of all modules."""
    patch: Any = item.patch
    if kind in peer.turns:
        try:
            return {name: x.clone() for name, x in peer.turns[kind].write(item).items()}
        except ValueError as error:
            raise _refuse(peer, item, str(error)) from error
    rank, scale, names = _rank(own), patch.scale, peer.methods[kind]
    if peer.alpha == "rank" or rank is None:  # what is read has the scale 1
        last = "b" if "b" in own else "w2"
        own[last], scale = _times(own[last], scale), 1.0
    if peer.alpha == "rank" and rank:
        # of ranks that differ, older versions of diffusers take one for the α of all
        own["a"] = F.pad(own["a"], (0, 0, 0, most - rank))
        own["b"] = F.pad(own["b"], (0, most - rank))
    found = {names[p]: _shaped(peer, p, x.detach(), item.site.whole) for p, x in own.items()}
    if peer.alpha == "key":
        found[ALPHA] = torch.tensor(float(scale * (rank or 1)))
    return found


def _times(x: Tensor, scale: float) -> Tensor:
    """A tensor scaled, in a dtype that is no coarser for it."""
    power_of_two = math.frexp(scale)[0] == 0.5
    return scale * (x if power_of_two else x.to(wide(x)))


def _shaped(peer: Peer, parameter: str, x: Tensor, w: Tensor) -> Tensor:
    """A parameter in the peer's shape, at a weight."""
    taps, ones = w.shape[2:], [1] * (w.dim() - 2)
    if parameter in ("a", "w2"):
        return x.reshape(len(x), -1, *taps)
    if parameter == "b":
        return x.reshape(*x.shape, *ones)
    if parameter == "m" and (taps or not peer.norms):
        return x.reshape(-1, 1, *ones).transpose(0, peer.norms)
    return x

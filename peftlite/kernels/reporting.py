"""report: the way that every patched weight goes, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from peftlite.kernels import dispatch
from peftlite.kernels.native import kernels
from peftlite.table import table


def report(model: nn.Module) -> str:
    """A table of the modules with patches on a weight, the path that each takes, and why.

    The paths are those of `backend`, and "read": there W' is formed, and the module uses it. The
    files of C come last, which are built if they haven't been yet.

    Example:
        model = nn.Linear(4, 2)
        pl.attach(model, pl.LoRA(rank=2))
        print(pl.kernels.report(model))
    """
    rows = []
    for address, module in model.named_modules():
        if "peftlite" in vars(module):
            for slot, (w, path, why) in _weights(module):
                name = address if slot == "weight" else f"{address}.{slot}".removeprefix(".")
                rows.append([name, str(w.device), str(w.dtype).removeprefix("torch."), path, why])
    return table(["module", "device", "dtype", "path", "because"], rows + kernels.rows())


def _weights(module: Any) -> Iterator[tuple[str, tuple[Tensor, str, str]]]:
    """The tensors of two dimensions and more that patches of any delta are on, and their paths."""
    hosted = module.peftlite
    for slot, patches in hosted.active(tuple(hosted._modules)).items():
        w = module._parameters.get(slot)
        if w is None and slot != "()":  # made by a parametrization
            shown = getattr(module, slot)
            w = getattr(shown, "raw", shown)
        if w is None or w.dim() < 2:
            continue
        reading = [type(patch).__name__ for patch in patches if not patch.has_call]
        if hosted.kind is None or slot != "weight":
            yield slot, (w, "read", f"{type(module).__name__} reads it by itself")
        elif reading:
            yield slot, (w, "read", f"{reading[0]} has no way beside it")
        elif hosted.kind.because:
            yield slot, (w, "torch", hosted.kind.because)
        else:
            yield slot, (w, *dispatch.why(w))

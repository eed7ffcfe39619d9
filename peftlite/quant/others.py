"""Others: which of the layouts the tensors of another library's module are, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftlite.errors import PeftliteError
from peftlite.quant.packing import Packing

NAMES = {
    "qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format", "weight_packed", "weight_scale",
    "weight_scale_inv", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale",
}  # fmt: skip
"""What stands beside a weight, or in its place, in a module that was packed elsewhere."""

OF_INPUTS = {"input_scale", "input_zero_point", "input_global_scale", "output_scale"}
"""What is for the inputs of a module, which aren't rounded here."""

_SCALES = ("weight_scale", "weight_scale_inv")


def read(
    found: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype, said: Mapping[str, Any]
) -> tuple[Packing, dict[str, Tensor]]:
    """A weight's packing and parts (o, i), of a module's tensors by name; "" is `weight`.

    Args:
        dtype: what it is read in, which its codes don't tell.
        said: a checkpoint's `quantization_config`.

    Raises PeftliteError, without the tensor's name.
    """
    kind, parts = _named(found, shape, said)
    if kind is None or len(shape) != 2:
        there = sorted(name for name in found if name)
        raise PeftliteError(f"is of no packing that is known here: beside its codes are {there}")
    how = Packing(kind, shape, dtype)
    how.check(parts)
    return how, parts


def _named(
    found: Mapping[str, Tensor], shape: torch.Size, said: Mapping[str, Any]
) -> tuple[str | None, dict[str, Tensor]]:
    has, i = found.keys(), shape[-1]
    if {"qweight", "qzeros", "scales"} <= has:
        parts = _renamed(found, qweight="", qzeros="zero", scales="scale", g_idx="order")
        if parts[""].shape[-1] == parts["scale"].shape[-1]:
            v2 = "_v2" if said.get("checkpoint_format") == "gptq_v2" else ""
            return f"gptq{v2}-{len(parts['']) * 32 // i}", parts
        parts.pop("order", None)
        return "awq-4", parts
    if {"weight_packed", "weight_scale"} <= has:
        parts = _renamed(
            found, weight_packed="", weight_scale="scale", weight_zero_point="zero",
            weight_g_idx="order", weight_global_scale="global",
        )  # fmt: skip
        if parts[""].dtype is torch.uint8:
            return "e2m1", parts
        words = parts[""].shape[-1]
        fitting = [b for b in range(1, 9) if -(-i * b // 32) == words]
        return (f"packed-{fitting[0]}" if len(fitting) == 1 else None), parts
    if "" in has and "SCB" in has:
        return "int8", {"": found[""], "scale": found["SCB"].float().view(-1, 1) / 127}
    if "" in has and has & {*_SCALES}:
        return _scaled(_renamed(found, weight_zero_point="zero", **dict.fromkeys(_SCALES, "scale")))
    return None, {}


def _scaled(parts: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """As it is, or as int8 and fp8 of one scale a row are here."""
    q, scale = parts[""], parts["scale"]
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(q.dtype)
    if kind is None or "zero" in parts or scale.shape != (len(q), 1):
        return "scaled", parts
    codes = q if kind == "int8" else q.view(torch.uint8)
    return kind, {"": codes, "scale": scale.float()}


def _renamed(found: Mapping[str, Tensor], **names: str) -> dict[str, Tensor]:
    return {names.get(name, name): t for name, t in found.items() if name in names or not name}

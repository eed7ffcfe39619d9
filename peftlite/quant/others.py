"""Others: which of the layouts the tensors of another library's module are, by their names.

A module of bitsandbytes, compressed-tensors, GPTQ or AWQ is left as it is: its `weight` is a packed
tensor here, whose parts are the module's own tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.errors import PeftliteError
from peftlite.quant import compiled
from peftlite.quant.packed import Packed
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
    if kind == "scb":  # which is int8 of ours, of other scales
        return replace(how, kind="int8"), {**parts, "scale": parts["scale"].view(-1, 1) / 127}
    return how, parts


def _named(
    found: Mapping[str, Tensor], shape: torch.Size, said: Mapping[str, Any]
) -> tuple[str | None, dict[str, Tensor]]:
    has, i = found.keys(), shape[-1]
    if {"qweight", "qzeros", "scales"} <= has:
        parts = _renamed(found, qweight="", qzeros="zero", scales="scale", g_idx="order")
        if len(parts[""]) == len(parts["scale"]) == shape[0]:
            return _awq_gemv(parts, i, said.get("group_size"))
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
        return "scb", {"": found[""], "scale": found["SCB"].float()}
    if "" in has and has & {*_SCALES}:
        return _scaled(_renamed(found, weight_zero_point="zero", **dict.fromkeys(_SCALES, "scale")))
    return None, {}


def _awq_gemv(
    parts: dict[str, Tensor], i: int, size: object
) -> tuple[str | None, dict[str, Tensor]]:
    """There is room for more groups than there are, so the tensors don't tell a group's size."""
    size = i if size == -1 else size
    if type(size) is not int or size < 1 or i % size:
        return None, parts
    parts.pop("order", None)
    return "awq_gemv-4", {**parts, "scale": parts["scale"][:, : i // size].contiguous()}


def _scaled(parts: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """As it is, or as int8 and fp8 of one scale a row are here."""
    q, scale = parts[""], parts["scale"]
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(q.dtype)
    written = scale.dtype is torch.float32 and scale.shape == (len(q), 1)
    if kind is None or "zero" in parts or not written:
        return "scaled", parts
    codes = q if kind == "int8" else q.view(torch.uint8)
    return kind, {"": codes, "scale": scale}


def _renamed(found: Mapping[str, Tensor], **names: str) -> dict[str, Tensor]:
    return {names.get(name, name): t for name, t in found.items() if name in names or not name}


# -- modules


def hidden(module: nn.Module) -> set[str]:
    """The tensors of a module that make up its weight, if another library packed it; else none."""
    own = {name for name in (*module._parameters, *module._buffers) if name in NAMES}
    weight = module._parameters.get("weight")
    if weight is None:
        return own if own & {"qweight", "weight_packed"} else set()
    if _state_of(weight) is not None:
        return {"weight"}
    packs = weight.itemsize == 1 and (own or _scales_of(module, weight) is not None)
    return {"weight", *own} if packs and not hasattr(weight, "placements") else set()


def rewrites(module: nn.Module) -> bool:
    """Whether a module of bitsandbytes would rewrite its codes as it runs in eval mode on a CPU."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.is_cpu and _state_of(weight) is not None


def packed(module: Any) -> Tensor:
    """The weight of a module that another library packed, formed at once while compiling.

    Raises PeftliteError.
    """
    how, parts = _parts(module)
    if torch.compiler.is_compiling():
        return compiled.unpack(how, parts)
    made = Packed(how, parts)
    made.source = module._parameters.get("weight")
    return made


def why_not(module: Any) -> str | None:
    """Why the weight of a module that another library packed can't be read; None if it can."""
    how, parts = _parts(module)
    try:
        how.check(parts)
    except PeftliteError as error:
        return str(error)
    return None


def _parts(module: Any) -> tuple[Packing, dict[str, Tensor]]:
    weight = module._parameters.get("weight")
    state = None if weight is None else _state_of(weight)
    if weight is not None and state is not None:
        return _of_state(weight.data, state)
    found = {**module._parameters, **module._buffers}
    found = {("" if name == "weight" else name): found[name] for name in hidden(module)}
    if weight is not None and (scales := _scales_of(module, weight)) is not None:
        found["SCB"] = scales
    bias = {**module._buffers, **module._parameters}.get("bias")
    shape, floats = _shape(module), (bias, found.get("scales"))
    dtype = next((t.dtype for t in floats if t is not None), torch.get_default_dtype())
    said = {"group_size": getattr(module, "group_size", None)}
    if getattr(module, "qzero_format", int)() == 2:
        said["checkpoint_format"] = "gptq_v2"
    kind, parts = _named(found, shape, said)
    if kind is None:
        raise PeftliteError(
            f"the weight of a {type(module).__name__} is of no packing that is known here: it has "
            f"{sorted(found)}"
        )
    return Packing(kind, shape, dtype), dict(sorted(parts.items()))


def _shape(module: Any) -> torch.Size:
    sides = (("out_features", "outfeatures"), ("in_features", "infeatures"))
    found = [[getattr(module, n) for n in names if hasattr(module, n)] for names in sides]
    return torch.Size(sizes[0] for sizes in found)


def _state_of(weight: Tensor) -> Any:
    """What bitsandbytes keeps of four-bit codes."""
    return None if type(weight) is nn.Parameter else getattr(weight, "quant_state", None)


def _scales_of(module: Any, weight: Tensor) -> Tensor | None:
    """bitsandbytes' scales of eight-bit codes, which a forward moves from one place to another."""
    found = getattr(weight, "SCB", None)
    return getattr(module.__dict__.get("state"), "SCB", None) if found is None else found


def _of_state(codes: Tensor, state: Any) -> tuple[Packing, dict[str, Tensor]]:
    if getattr(state, "packing_format_for_cpu", False):
        raise PeftliteError(
            "a weight of bitsandbytes was rewritten as it ran in eval mode on a CPU, and gives no "
            "gradient: load the model again, and attach before it runs"
        )
    how = Packing(state.quant_type, state.shape, state.dtype, state.blocksize)
    parts = {"": codes.view(torch.uint8).view(-1, 1), "absmax": state.absmax}
    if state.nested:
        parts |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset}
    return how, parts

"""Keys: packed tensors in a state dict, 4-bit ones under the names that bitsandbytes gives them.

Of a tensor `weight` there are:

    weight                                     the codes
    weight.absmax, weight.quant_map, weight.nested_absmax, weight.nested_quant_map
    weight.quant_state.bitsandbytes__nf4       the rest, as the bytes of a JSON object
    weight.scale, weight.quant_state.peftlite__int8      of what has a scale a row
    weight.left, weight.right                            of what has a product of low rank beside it

Where there is such a product, the state is peftlite's, so that nobody reads the codes alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.errors import PeftliteError
from peftlite.quant import layouts, nf4
from peftlite.quant.packing import KINDS, Packing

_FOURS = {"nf4": nf4.levels, "fp4": layouts.fp4_levels}
"""The levels of what is packed as bitsandbytes packs four bits."""
_BY_ROWS = torch.zeros((), dtype=torch.uint8)
"""bitsandbytes' number for int8 that lies row by row."""
_STATE = re.compile(r"quant_state\.(?:bitsandbytes|peftlite)__(.+)")


def _state(kind: str, parts: Mapping[str, Tensor]) -> str:
    theirs = kind in _FOURS and "left" not in parts
    return f"quant_state.{'bitsandbytes' if theirs else 'peftlite'}__{kind}"


def written(how: Packing, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A packed tensor's entries, by what follows its own key: "" are its codes."""
    found = dict(parts)
    dtype = str(how.dtype).removeprefix("torch.")
    said = {"quant_type": how.kind, "dtype": dtype, "shape": list(how.shape)}
    if how.kind in _FOURS:
        device = parts[""].device
        found["quant_map"] = _FOURS[how.kind]().to(device, copy=True)
        said["blocksize"] = how.block
        if (offset := found.pop("nested_offset", None)) is not None:
            found["nested_quant_map"] = nf4.dynamic_map().to(device, copy=True)
            said |= {"nested_blocksize": nf4.NESTED_BLOCK, "nested_dtype": "float32"}
            said["nested_offset"] = offset.item()
    text = json.dumps(said).encode()
    return found | {_state(how.kind, parts): torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def published(key: str, how: Packing, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A packed tensor's entries in a checkpoint's file, of sizes that values don't change.

    An 8-bit matrix has the keys of bitsandbytes' int8, or of compressed-tensors' float8.
    """
    if how.kind == "nf4" or len(how.shape) != 2 or not key.endswith("weight"):
        found = {f"{key}.{name}".rstrip("."): part for name, part in written(how, parts).items()}
        state = f"{key}.{_state(how.kind, parts)}"
        return found | {state: F.pad(found[state], (0, 256 - len(found[state])), value=ord(" "))}
    path = key.removesuffix("weight")
    if how.kind == "fp8":
        return {key: parts[""].view(torch.float8_e4m3fn), f"{path}weight_scale": parts["scale"]}
    scale = parts["scale"].view(-1)
    largest = scale * 127
    for near in (torch.nextafter(largest, largest * end) for end in (2.0, 0.5)):
        largest = torch.where(largest / 127 == scale, largest, near)
    return {key: parts[""], f"{path}SCB": largest, f"{path}weight_format": _BY_ROWS}


def config(kind: str, dtype: torch.dtype, double: bool, left: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of a model whose linear maps are packed, but those that are `left`."""
    if kind == "fp8":
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        return {
            "quant_method": "compressed-tensors",
            "format": "naive-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": [*left],
        }
    bits = {"load_in_8bit": True}
    if kind == "nf4":
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        }
    return {"quant_method": "bitsandbytes", **bits, "llm_int8_skip_modules": [*left]}


def read(entries: Mapping[str, Tensor]) -> tuple[Packing, dict[str, Tensor]]:
    """The packing and the parts of entries that `written` or bitsandbytes made.

    Raises PeftliteError, without the tensor's name.
    """
    found = dict(entries)
    states = [key for key in found if _STATE.fullmatch(key)]
    kind = _STATE.sub(r"\1", states[0]) if len(states) == 1 else ""
    if kind not in (*KINDS, *_FOURS) and kind.partition("-")[0] not in layouts.GROUPED:
        there = sorted(key for key in found if key)
        raise PeftliteError(f"is of no packing that is known here: beside its codes are {there}")
    try:
        said = json.loads(bytes(found.pop(states[0]).cpu().tolist()))
        dtype = getattr(torch, said["dtype"])
        shape = torch.Size(said["shape"])
        block = int(said["blocksize"]) if kind in _FOURS else 0
        if said["quant_type"] != kind or not isinstance(dtype, torch.dtype):
            raise ValueError(said)
        if "nested_offset" in said:
            found["nested_offset"] = torch.tensor(float(said["nested_offset"]))
            if said["nested_blocksize"] != nf4.NESTED_BLOCK:
                raise ValueError(said["nested_blocksize"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PeftliteError(f"has a {states[0]!r} that can't be read: {error}") from error
    fours = {"quant_map": _FOURS.get(kind, nf4.levels), "nested_quant_map": nf4.dynamic_map}
    for name, made in fours.items():
        values = made()
        given = found.pop(name, values)
        if not torch.equal(given.float().cpu(), values):
            raise PeftliteError(f"has a {name!r} of its own, which isn't the one of {kind}")
    how = Packing(kind, shape, dtype, block)
    how.check(found)
    return how, found

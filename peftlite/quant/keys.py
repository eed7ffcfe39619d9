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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftlite.errors import PeftliteError
from peftlite.quant import beside, nf4
from peftlite.quant.packing import KINDS, Packing


def _state(kind: str, parts: Mapping[str, Tensor]) -> str:
    theirs = kind == "nf4" and "left" not in parts
    return f"quant_state.{'bitsandbytes' if theirs else 'peftlite'}__{kind}"


_STATES = {f"quant_state.peftlite__{kind}": kind for kind in KINDS}
_STATES["quant_state.bitsandbytes__nf4"] = "nf4"


def written(how: Packing, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A packed tensor's entries, by what follows its own key: "" are its codes."""
    found = dict(parts)
    dtype = str(how.dtype).removeprefix("torch.")
    said = {"quant_type": how.kind, "dtype": dtype, "shape": list(how.shape)}
    if how.kind == "nf4":
        device = parts[""].device
        found["quant_map"] = nf4.levels().to(device, copy=True)
        said["blocksize"] = how.block
        if (offset := found.pop("nested_offset", None)) is not None:
            found["nested_quant_map"] = nf4.dynamic_map().to(device, copy=True)
            said |= {"nested_blocksize": nf4.NESTED_BLOCK, "nested_dtype": "float32"}
            said["nested_offset"] = offset.item()
    text = json.dumps(said).encode()
    return found | {_state(how.kind, parts): torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def config(dtype: torch.dtype, double: bool, left: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of a model whose linear maps are in nf4, but those that are `left`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": [*left],
    }


def read(entries: Mapping[str, Tensor]) -> tuple[Packing, dict[str, Tensor]]:
    """The packing and the parts of entries that `written` or bitsandbytes made.

    Raises PeftliteError, without the tensor's name.
    """
    found = dict(entries)
    states = [key for key in found if key in _STATES]
    if len(states) != 1:
        there = sorted(key for key in found if key)
        raise PeftliteError(f"is of no packing that is known here: beside its codes are {there}")
    kind = _STATES[states[0]]
    try:
        said = json.loads(bytes(found.pop(states[0]).cpu().tolist()))
        dtype = getattr(torch, said["dtype"])
        shape = torch.Size(said["shape"])
        block = int(said["blocksize"]) if kind == "nf4" else 0
        if said["quant_type"] != kind or not isinstance(dtype, torch.dtype):
            raise ValueError(said)
        if "nested_offset" in said:
            found["nested_offset"] = torch.tensor(float(said["nested_offset"]))
            if said["nested_blocksize"] != nf4.NESTED_BLOCK:
                raise ValueError(said["nested_blocksize"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PeftliteError(f"has a {states[0]!r} that can't be read: {error}") from error
    for name, values in (("quant_map", nf4.levels()), ("nested_quant_map", nf4.dynamic_map())):
        given = found.pop(name, values)
        if not torch.equal(given.float().cpu(), values):
            raise PeftliteError(f"has a {name!r} of its own, which isn't the one of {kind}")
    how = Packing(kind, shape, dtype, block)
    wanted = how.sizes(nested="nested_offset" in found)
    sizes = {name: tuple(part.shape) for name, part in found.items()}
    of_codes = {name: size for name, size in sizes.items() if name not in beside.PARTS}
    if of_codes != wanted or not beside.fits(found, shape):
        raise PeftliteError(f"has parts of {sizes}, where {tuple(shape)} has {wanted}")
    return how, found

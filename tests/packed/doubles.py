"""Doubles: modules that hold what those of other libraries do, without the libraries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.quant.packing import pack


class Params4bit(nn.Parameter):
    """bitsandbytes': codes, with what else they need in an attribute."""

    quant_state: Any


class Linear4bit(nn.Linear):
    """bitsandbytes': in eval mode it rewrites its codes, on a CPU, as 0.50.2 does."""

    def __init__(self, w: Tensor):
        super().__init__(w.shape[1], w.shape[0], dtype=w.dtype)
        _, parts = pack(w, "nf4")
        nested = SimpleNamespace(absmax=parts["nested_absmax"])
        self._parameters["weight"] = Params4bit(parts[""], requires_grad=False)
        self._parameters["weight"].quant_state = SimpleNamespace(
            quant_type="nf4", shape=w.shape, dtype=w.dtype, blocksize=64, absmax=parts["absmax"],
            nested=True, state2=nested, offset=parts["nested_offset"],
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            self.weight.data = self.weight.data.view(len(self.bias), -1).flip(0)
            self.weight.quant_state.packing_format_for_cpu = True
        return input.new_zeros(*input.shape[:-1], len(self.bias))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = self.weight.quant_state.absmax


class Linear8bitLt(nn.Linear):
    """bitsandbytes': a forward moves the scales of its rows from the weight to its state."""

    def __init__(self, w: Tensor):
        super().__init__(w.shape[1], w.shape[0], dtype=w.dtype)
        _, parts = pack(w, "int8")
        codes = Params4bit(parts[""], requires_grad=False)
        codes.SCB = parts["scale"].view(-1) * 127
        self._parameters["weight"] = codes
        self.state = SimpleNamespace(SCB=None)

    def forward(self, input: Tensor) -> Tensor:
        self.state.SCB, self.weight.SCB = self.weight.SCB, None
        return F.linear(input, self.weight.to(input.dtype), self.bias)


class QuantLinear(nn.Module):
    """GPTQ's and AWQ's: buffers, and a kernel that is a GPU's."""

    def __init__(self, found: dict[str, Tensor], w: Tensor):
        super().__init__()
        self.in_features, self.out_features = w.shape[1], w.shape[0]
        for name, tensor in found.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", torch.zeros(w.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("a kernel for GPUs")


class Compressed(nn.Linear):
    """compressed-tensors': a linear map's class, with other parameters in it."""

    def __init__(self, found: dict[str, Tensor], w: Tensor):
        super().__init__(w.shape[1], w.shape[0])
        del self._parameters["weight"]
        for name, tensor in found.items():
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

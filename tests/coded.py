"""Coded: a quantised weight as torchao's are, a tensor that knows codes and can do little else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import seeded


class Coded(Tensor):
    """W = codes · scale, with int8 codes (o, i) and a scale (o, 1)."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls: Any, codes: Tensor, scale: Tensor) -> Coded:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, w, bias = args
            return F.linear(x, w.codes.to(x.dtype) * w.scale, bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} of codes")


class Packed(nn.Parameter):
    """A weight of bitsandbytes: bytes, two codes in each."""


Packed.__module__ = "bitsandbytes.nn.modules"


def quantize_(model: nn.Module) -> nn.Module:
    """Every linear map's weight as codes, as torchao's function of that name has them."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            w = module.weight.detach()
            scale = w.abs().amax(1, keepdim=True) / 127
            coded = Coded((w / scale).round().to(torch.int8), scale)
            module.weight = nn.Parameter(coded, requires_grad=False)
    return model


def linears() -> nn.Module:
    with seeded():
        return nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))


def packed() -> nn.Module:
    model = linears()
    for module in model:
        if isinstance(module, nn.Linear):
            bytes_ = torch.zeros(24, 1, dtype=torch.uint8)
            module._parameters["weight"] = Packed(bytes_, requires_grad=False)
    return model

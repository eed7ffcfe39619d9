"""Everything about a model that an operation may not disturb, in a form that compares."""

from typing import Any

import torch
from torch import nn

from peftlite.core.tensors import plain_parts


def digest(model: nn.Module) -> dict[str, Any]:
    """Classes, keys in order, storage, bits, `requires_grad`, hooks, modes and plain attributes."""
    found: dict[str, Any] = {"keys": list(model.state_dict())}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}: class"] = type(module)
        found[f"{path}: identity"] = id(module)
        found[f"{path}: training"] = module.training
        found[f"{path}: attributes"] = sorted(module.__dict__)
        found[f"{path}: children"] = list(module._modules)
        found[f"{path}: hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                found[f"{path}.{name}"] = (
                    id(tensor),
                    plain_parts(tensor)[0].data_ptr(),
                    tensor.requires_grad,
                    tensor.dtype,
                    bits(tensor),
                )
    return found


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    if tensor.is_meta:
        return b""
    if len(parts := plain_parts(tensor)) > 1:
        return b"".join(map(bits, parts))
    whole = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return whole.view(torch.uint8).numpy().tobytes()


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Names the first thing that differs."""
    assert list(before) == list(after), set(before) ^ set(after)
    for key, value in before.items():
        assert value == after[key], key

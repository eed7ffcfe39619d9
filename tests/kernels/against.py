"""How a fast path is compared: with the reference in fp64, each output and gradient by its name."""

from collections.abc import Mapping

import torch
from torch import Tensor

from peftlite.kernels import reference

NAMES = ("x", "w", "bias", "a", "b")
# of the norm: what a few roundings of sums of a few hundred terms come to
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}


def assert_close(found: Mapping[str, Tensor | None], truth: Mapping[str, Tensor | None]) -> None:
    assert list(found) == list(truth)
    for name, value in found.items():
        true = truth[name]
        assert (value is None) == (true is None), name
        if value is None:
            continue
        assert value.shape == true.shape, (name, value.shape, true.shape)
        error = (value.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30)
        assert not error > TOLERANCE[value.dtype], f"{name} is off by {error:.1e} of its norm"


def factors(*shape: int, i: int, o: int, rank: int, bias: bool = True) -> dict[str, Tensor | None]:
    """x, W, bias, A and B in fp64, of entries that a half holds exactly.

    All are above 0: nothing cancels, and an error is as small beside a sum as beside its terms.
    """
    shapes = {"x": (*shape, i), "w": (o, i), "bias": (o,), "a": (rank, i), "b": (o, rank)}
    made = {name: torch.randint(1, 65, size).double() / 64 for name, size in shapes.items()}
    return made if bias else made | {"bias": None}


def run(
    call,
    tensors: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    wanted=NAMES,
    factors: torch.dtype | None = None,
    **options,
) -> dict[str, Tensor | None]:
    """y and the gradients for what is wanted, of a call on the tensors in a dtype.

    A and B are in the one of `factors`, where that is given.
    """
    dtypes = dict.fromkeys("ab", factors or dtype)
    leaves = {
        name: None
        if tensor is None
        else tensor.to(dtypes.get(name, dtype)).detach().requires_grad_(name in wanted)
        for name, tensor in tensors.items()
    }
    y = call(*leaves.values(), **options)
    # above 0 and exact in a half, as the tensors are
    dy = (torch.arange(y.numel(), device=y.device) * 7 % 61 + 3) / 64
    y.backward(dy.view(y.shape).to(y.dtype))
    return {"y": y.detach()} | {
        name: None if leaf is None else leaf.grad for name, leaf in leaves.items()
    }


def truth(tensors: Mapping[str, Tensor | None], wanted=NAMES, **options):
    return run(reference.lora_linear, tensors, torch.float64, wanted, **options)

"""The error of lora_linear against fp64, beside that of peft's LoRA on the same tensors."""

import math

import peft
import pytest
import torch
from torch import Tensor, nn

from peftlite import kernels
from peftlite.kernels import lora_linear, reference
from tests.kernels.against import run, truth

SEED = torch.tensor(0x1234_5678_9ABC_DEF)
DRAWS, SCALE = 4, 2.0
# tokens, i, o, r, and how large the low-rank part of y is beside the base's
SHAPES = [(300, 200, 120, 8, 0.5), (64, 1024, 256, 16, 4.0), (1000, 100, 300, 64, 0.5)]
# what is rounded to half precision is so as often as by peft or less, and what stays in fp32
# differs by the order in which BLAS sums up: found are 0.71 to 1.00, and 0.77 to 1.05
ROUNDED, SUMMED = 1.005, 1.08


class Dropped(nn.Module):
    """A dropout with the mask of a seed."""

    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return reference.drop(x, self.dropout, SEED) if self.dropout else x


def with_peft(
    x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float, **_
) -> Tensor:
    """peft's own forward, with the very tensors for its parameters."""
    model = nn.Sequential(nn.Linear(*w.t().shape, dtype=w.dtype))
    config = peft.LoraConfig(r=len(a), lora_alpha=scale * len(a), target_modules=["0"])
    layer = peft.get_peft_model(model, config).base_model.model[0]
    layer.lora_dropout["default"] = Dropped(dropout)
    for part, name, tensor in [
        (layer.base_layer, "weight", w),
        (layer.base_layer, "bias", bias),
        (layer.lora_A["default"], "weight", a),
        (layer.lora_B["default"], "weight", b),
    ]:
        del part._parameters[name]
        setattr(part, name, tensor)
    return layer(x)


def drawn(
    tokens: int,
    i: int,
    o: int,
    rank: int,
    size: float,
    dtype: torch.dtype,
    factors: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of a layer, in fp64 but as the dtypes hold them."""
    made = {
        "x": torch.randn(tokens, i),
        "w": torch.randn(o, i) * i**-0.5,
        "bias": torch.randn(o) * 0.1,
        "a": torch.randn(rank, i) * i**-0.5,
        "b": torch.randn(o, rank) * rank**-0.5 * size / SCALE,
    }
    return {n: t.to(factors if n in "ab" else dtype).double() for n, t in made.items()}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_is_no_larger_than_peft_s(dtype, factors, shape, dropout, backend) -> None:
    options = {"scale": SCALE, "dropout": dropout, "seed": SEED}
    wanted, ours, theirs = ("x", "a", "b"), {}, {}
    for _ in range(DRAWS):
        tensors = drawn(*shape, dtype, factors)
        true = truth(tensors, wanted, **options)
        with kernels.backend(backend):
            found = run(lora_linear, tensors, dtype, wanted, factors, **options)
        peer = run(with_peft, tensors, dtype, wanted, factors, **options)
        for name in ("y", *wanted):
            for errors, result in ((ours, found), (theirs, peer)):
                error = (result[name].double() - true[name]).norm() / true[name].norm()
                errors[name] = math.hypot(errors.get(name, 0.0), error.item())
    ratios = {name: ours[name] / theirs[name] for name in ours}
    for name, ratio in ratios.items():
        exact = found[name].dtype is torch.float32
        assert ratio <= (SUMMED if exact else ROUNDED), ratios

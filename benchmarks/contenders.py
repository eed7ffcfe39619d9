"""The ways to run one LoRA linear that `lora_linear.py` times and `memory.py` weighs, on one layer.

All are given the same tensors; peft's parameters are set to them. `deviation` says how far each is
from fp64, so that nothing is compared that computes something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.kernels import reference

RANK = 16
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}
DROPOUTS = (0.0, 0.1)

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """One point of the grid, whose tensors are random: zeros would be multiplied faster."""

    device: str
    dtype: torch.dtype
    i: int
    o: int
    tokens: int
    rank: int
    dropout: float

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {self.i}->{self.o} t{self.tokens} r{self.rank} p{self.dropout:g}"

    def rows(self, width: int, tokens: int | None = None) -> Tensor:
        return torch.randn(tokens or self.tokens, width, device=self.device, dtype=self.dtype)


class Given:
    """A frozen linear layer, and factors whose product is half as large as its weight."""

    def __init__(self, cell: Cell):
        self.cell = cell
        self.layer = nn.Linear(cell.i, cell.o, device=cell.device, dtype=cell.dtype)
        self.layer.requires_grad_(False)
        self.a = torch.randn(cell.rank, cell.i, device=cell.device) * cell.i**-0.5
        self.b = torch.randn(cell.o, cell.rank, device=cell.device) * cell.rank**-0.5 * 0.3

    def copied(self) -> nn.Linear:
        """The layer as a module of its own, on the same weights."""
        layer = nn.Linear(self.cell.i, self.cell.o, device="meta", dtype=self.cell.dtype)
        layer.weight, layer.bias = self.layer.weight, self.layer.bias
        return layer

    def factors(self, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
        return nn.Parameter(self.a.to(dtype)), nn.Parameter(self.b.to(dtype))

    @torch.no_grad()
    def set(self, a: Tensor, b: Tensor) -> None:
        a.copy_(self.a)
        b.copy_(self.b)


def base(given: Given) -> Layer:
    return given.copied()


def with_peft(given: Given, widen: bool) -> Layer:
    cell, model = given.cell, nn.Sequential(given.copied())
    config = peft.LoraConfig(
        r=cell.rank, lora_alpha=cell.rank, lora_dropout=cell.dropout, target_modules=["0"]
    )
    layer = peft.get_peft_model(model, config, autocast_adapter_dtype=widen).base_model.model[0]
    given.set(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return layer


def compiled_peft(given: Given) -> Layer:
    torch.compiler.reset()
    return torch.compile(with_peft(given, True), fullgraph=True)


def with_peftlite(given: Given, dtype: torch.dtype | None) -> Layer:
    cell, model = given.cell, nn.Sequential(given.copied())
    method = pl.LoRA(rank=cell.rank, dropout=cell.dropout, dtype=dtype, targets="0")
    given.set(*pl.attach(model, method).parameters())
    return model[0]


class Torchtune(nn.Module):
    """LoRA as torchtune writes it: the base, a dropout and two linear maps, and their sum."""

    def __init__(self, given: Given):
        super().__init__()
        self.layer, self.dropout = given.copied(), nn.Dropout(given.cell.dropout)
        self.a, self.b = given.factors(given.cell.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        low = nn.functional.linear(self.dropout(x), self.a)
        return y + 1.0 * nn.functional.linear(low, self.b)


class Unsloth(torch.autograd.Function):
    """LoRA as Unsloth does it, by its description: x alone is kept, and x Aᵀ is formed again.

    It has no dropout, and forms dY B for dA and for dx.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, a, b)
        a, b = a.to(x.dtype), b.to(x.dtype)
        return torch.addmm(bias, x, w.t()).addmm_(x @ a.t(), b.t())

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b = ctx.saved_tensors
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        db = dy.t() @ (x @ low_a.t())
        da = (dy @ low_b).t() @ x
        dx = (dy @ w).addmm_(dy @ low_b, low_a)
        return dx, None, None, da.to(a.dtype), db.to(b.dtype)


class UnslothLayer(nn.Module):
    def __init__(self, given: Given):
        super().__init__()
        self.layer = given.copied()
        self.a, self.b = given.factors(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return Unsloth.apply(x, self.layer.weight, self.layer.bias, self.a, self.b)


def contenders(given: Given, compiled: bool) -> dict[str, Layer]:
    """By name, what each of them runs. A merged delta is a base; Unsloth's way has no dropout."""
    cell = given.cell
    found = {
        "base": base(given),
        "merged": base(given),
        "peft": with_peft(given, True),
        "torchtune's way": Torchtune(given),
        "peftlite": with_peftlite(given, None),
    }
    if cell.dtype is not torch.float32:
        found["peft, half adapters"] = with_peft(given, False)
        found["peftlite, half adapters"] = with_peftlite(given, cell.dtype)
    if not cell.dropout:
        found["Unsloth's way"] = UnslothLayer(given)
    if compiled:
        found["peft, compiled"] = compiled_peft(given)
    return found


def step(layer: Layer, x: Tensor, dy: Tensor) -> None:
    """Forward and backward, and no gradient left behind."""
    torch.autograd.backward(layer(x), dy)
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


def deviation(given: Given, layer: Layer) -> float:
    """The largest of the errors of y, dx, dA and dB against fp64, each over its norm."""
    cell = given.cell
    x, dy = cell.rows(cell.i, 64).requires_grad_(), cell.rows(cell.o, 64)
    trained = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    found = [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]
    wide = [t.detach().double() for t in (x, given.layer.weight, given.layer.bias)]
    factors = [p.detach().double().requires_grad_() for p in trained]
    if factors:
        y = reference.lora_linear(wide[0].requires_grad_(), *wide[1:], *factors)
    else:
        y = nn.functional.linear(wide[0].requires_grad_(), *wide[1:])
    true = [y.detach(), *torch.autograd.grad(y, [wide[0], *factors], dy.double())]
    return max(float((f.double() - t).norm() / t.norm()) for f, t in zip(found, true, strict=True))

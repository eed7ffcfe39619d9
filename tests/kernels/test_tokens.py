"""Each token with factors of its own: every path against a product with W' for each token."""

import pytest
import torch
from torch import Tensor

from peftlite import kernels
from peftlite.kernels.native import low_rank
from peftlite.kernels.tokens import by_tokens

E, K, IN, OUT, RANK = 3, 4, 64, 96, 5
OWN = torch.tensor([2, -1, 0, 2, 3, 0, 0, -1, 2])
EXPERTS = torch.tensor([1, 0, 2, 1, 1, 0, 2, 2, 0])
SCALE = torch.tensor([1.5, 9.0, -0.5, 2.0])
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}


def tables(experts: int, i: int = IN, o: int = OUT, rank: int = RANK) -> list[Tensor]:
    """U and V of every expert and delta, as a bank has them: a delta's are together."""
    arena = torch.randn(K, experts * rank * (i + o)).split(
        [experts * rank * i, experts * rank * o], 1
    )
    return [
        part.view(K, experts, *shape).transpose(0, 1)
        for part, shape in zip(arena, ((i, rank), (rank, o)), strict=True)
    ]


def told(y: Tensor, x: Tensor, left: Tensor, right: Tensor, experts: Tensor) -> Tensor:
    """A token at a time."""
    rows = [
        y[n] if k < 0 else y[n] + SCALE[k] * (x[n] @ left[e, k] @ right[e, k])
        for n, (k, e) in enumerate(zip(OWN.tolist(), experts.tolist(), strict=True))
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("of_experts", [True, False])
@pytest.mark.parametrize("each", [(), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["reference", "torch", "native"])
def test_a_token_has_what_its_delta_and_expert_add(
    path, dtype: torch.dtype, each: tuple[int, ...], of_experts: bool
) -> None:
    if path == "native" and not low_rank.runs(dtype):
        return
    factors = torch.promote_types(dtype, torch.float32)
    experts = EXPERTS if of_experts else torch.zeros_like(OWN)
    x, y, dy = (torch.randn(len(OWN), *each, side).to(dtype) for side in (IN, OUT, OUT))
    given = [x, *(table.to(factors) for table in tables(E if of_experts else 1))]
    exact = [t.double().requires_grad_() for t in given]
    given = [t.detach().requires_grad_() for t in given]
    with kernels.backend(path):
        found = by_tokens(
            y.clone(), given[0], OWN, experts if of_experts else None, *given[1:], SCALE
        )
        grads = torch.autograd.grad(found, given, dy)
    true = told(y.double(), *exact, experts)
    bounds = CLOSE[dtype], CLOSE[dtype], CLOSE[factors], CLOSE[factors]
    wanted = true, *torch.autograd.grad(true, exact, dy.double())
    for ours, theirs, bound in zip((found, *grads), wanted, bounds, strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm()
    assert torch.equal(found[OWN < 0], y[OWN < 0])


def test_what_is_not_to_learn_has_no_gradient_and_nothing_waits_for_autograd() -> None:
    left, right = (table.double() for table in tables(E))
    x, y = torch.randn(len(OWN), IN).double(), torch.randn(len(OWN), OUT).double()
    right.requires_grad_()
    with kernels.backend("torch"):
        found = by_tokens(y.clone(), x, OWN, EXPERTS, left, right, SCALE)
        (dright,) = torch.autograd.grad(found.sum(), [right])
        with torch.no_grad():
            same = by_tokens(y.clone(), x, OWN, EXPERTS, left, right, SCALE)
    (true,) = torch.autograd.grad(told(y, x, left, right, EXPERTS).sum(), [right])
    torch.testing.assert_close(dright, true)
    assert torch.equal(found, same) and not same.requires_grad


def test_a_gradient_of_a_gradient() -> None:
    given = torch.randn(len(OWN), 3), torch.randn(len(OWN), 2), *tables(E, 2, 3, 1)
    inputs = [t.double().requires_grad_() for t in given]

    def call(y: Tensor, *given: Tensor) -> Tensor:
        x, left, right = given
        return by_tokens(y * 1, x, OWN, EXPERTS, left, right, SCALE.double())

    with kernels.backend("torch"):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)

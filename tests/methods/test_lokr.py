"""LoKr: the paper's equation, its ranks and its count of parameters."""

import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftlite as pl
from peftlite.methods.lokr import LoKr, split
from tests.cells import close, disturb
from tests.zoo import KINDS, seeded

KIND = {kind.name: kind for kind in KINDS}


def anywhere(site: pl.Site) -> bool:
    return True


def factor(patch: pl.Patch, name: str) -> Tensor:
    """w1 or w2, whether it is kept whole or as a product."""
    own = dict(patch.named_parameters())
    return own[name] if name in own else own[name + "a"] @ own[name + "b"]


def test_a_dimension_is_split_nearest_its_root_and_no_further_than_the_factor() -> None:
    for n in range(1, 200):
        for most in (None, 1, 2, 3, 4, 7, 16):
            u, v = split(n, most)
            assert u * v == n and u <= v and (most is None or u <= most)
            assert not any(n % d == 0 and d * d <= n for d in range(u + 1, (most or n) + 1))
            if most is None or most * most <= n:  # beyond that peft makes the first the larger
                assert (u, v) == factorization(n, -1 if most is None else most)


@pytest.mark.parametrize("name", ["gpt", "experts", "conv2d_grouped", "conv_transpose", "hf_gpt2"])
@pytest.mark.parametrize("how", [{}, {"decompose_both": True}, {"factor": 2}])
def test_the_equation(name: str, how: dict) -> None:
    """ΔW = s·w1 ⊗ w2, of every matrix of the weight as it is stored, with the taps in w2."""
    method = LoKr(rank=1, alpha=3, targets=anywhere, **how)
    with seeded():
        delta = disturb(pl.attach(KIND[name].model(), method))
    for placed in delta.placed.values():
        w, patch = placed.site.tensor, placed.patch
        w1, w2 = factor(patch, "w1"), factor(patch, "w2")
        change = patch.value(w) - w
        if name == "experts" and w.dim() == 3:
            close(change, torch.stack([3 * torch.kron(*pair) for pair in zip(w1, w2, strict=True)]))
        elif w.dim() > 2:
            w2 = w2.reshape(w2.shape[0], -1, *w.shape[2:])
            close(change, 3 * torch.kron(w1[(..., *[None] * (w.dim() - 2))], w2))
        else:
            close(change, 3 * torch.kron(w1, w2))


@pytest.mark.parametrize(
    "how, rank, count",
    [
        ({"rank": 2}, 4 * 2, 16 + 2 * (6 + 5)),
        ({"rank": 1, "decompose_both": True}, 1, 4 + 4 + 6 + 5),
        ({"rank": 3}, 4 * 5, 16 + 6 * 5),
        ({"rank": 2, "factor": 1}, 2, 1 + 2 * (24 + 20)),
    ],
)
def test_the_rank_is_the_product_of_the_factors_ranks(how: dict, rank: int, count: int) -> None:
    model = nn.Sequential(nn.Linear(24, 20).double())
    with seeded():
        delta = disturb(pl.attach(model, LoKr(targets=anywhere, **how)))
    placed = delta.placed["0.weight"]
    w = placed.site.tensor
    assert torch.linalg.matrix_rank(placed.patch.value(w) - w, rtol=1e-9) == rank
    assert delta.num_parameters == count


class Shapes(TorchDispatchMode):
    """Keeps the shape of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.seen.add(made.shape)
        return made


@pytest.mark.parametrize("name", ["mlp", "conv1d_hf"])
def test_a_linear_map_never_forms_the_product(name: str) -> None:
    kind = KIND[name]
    delta = pl.attach(model := kind.model(), LoKr(rank=2))
    with Shapes() as shapes:
        kind.run(model, kind.batch()).sum().backward()
    assert shapes.seen.isdisjoint({placed.site.shape for placed in delta.placed.values()})

"""AdamW: torch's own, bit for bit, whatever is done to it between two steps."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from peftlite.train.adamw import AdamW


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 5), (4,), (), (3, 2)]
    return [nn.Parameter(torch.randn(s, generator=draw, dtype=dtype)) for s in shapes]


def groups(given: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": given[:2], "lr": 1e-2, "betas": (0.8, 0.95)},
        {"params": given[2:], "lr": 1e-3, "weight_decay": 0.0, "eps": 1e-6},
    ]


def reload(optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))


def move(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state.update({name: tensor.clone() for name, tensor in state.items()})


def one_without(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][1].grad = None


def another_rate(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.3


def another_kind(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[1]["maximize"] ^= True


def one_more(optimizer: torch.optim.Optimizer) -> None:
    more = nn.Parameter(torch.ones(3, dtype=optimizer.param_groups[0]["params"][0].dtype))
    optimizer.add_param_group({"params": [more]})


def gradients(optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.randn(p.shape, generator=draw, dtype=p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("do", [reload, move, one_without, another_rate, another_kind, one_more])
def test_it_is_torchs_to_the_bit(do: Callable[[Any], None], dtype: torch.dtype) -> None:
    kinds = (AdamW, torch.optim.AdamW)
    mine, theirs = (kind(groups(parameters(dtype)), fused=True) for kind in kinds)
    counted: list[Any] = []
    mine.register_step_post_hook(lambda *_: counted.append(None))
    for seed in range(8):
        for optimizer in (mine, theirs):
            gradients(optimizer, seed)
            if seed in (3, 5):
                do(optimizer)
            optimizer.step()
    assert len(counted) == 8
    own, others = mine.state_dict(), theirs.state_dict()
    torch.testing.assert_close(own["state"], others["state"], rtol=0, atol=0)
    assert own["param_groups"] == others["param_groups"]
    for a, b in zip(mine.param_groups, theirs.param_groups, strict=True):
        assert all(map(torch.equal, a["params"], b["params"]))


def test_a_copy_goes_on_by_itself() -> None:
    first = AdamW(groups(parameters(torch.float64)), fused=True)
    for seed in range(3):
        gradients(first, seed)
        first.step()
    second = copy.deepcopy(first)
    before = copy.deepcopy(first.state_dict()["state"])
    gradients(second, 3)
    second.step()
    torch.testing.assert_close(first.state_dict()["state"], before, rtol=0, atol=0)

"""Experts in 3-D parameters, and other weights that modules read: multiplied with, never formed."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import peftlite as pl
from peftlite.core import sum as sums
from peftlite.methods import LowRankPatch

EXPERTS, IN, OUT, TOKENS = 4, 16, 24, 60


def loop(w: Callable[[], Tensor], x: Tensor, ids: Tensor) -> Tensor:
    """As transformers' experts do, with the weight read anew for each."""
    y = x.new_zeros(len(x), OUT)
    for e in ids.unique():
        rows = torch.where(ids == e)[0]
        y = y.index_add(0, rows, F.linear(x[rows], w()[e]))
    return y


def loop_of_one(w: Callable[[], Tensor], x: Tensor, ids: Tensor) -> Tensor:
    """As Qwen3-VL's do, whose index is a list of one."""
    y = x.new_zeros(len(x), OUT)
    for e in ids.unique()[:, None]:
        rows = torch.where(ids == e)[0]
        y = y.index_add(0, rows, (x[rows] @ w()[e].mT)[0])
    return y


def batched(w: Callable[[], Tensor], x: Tensor, _: Tensor) -> Tensor:
    return torch.bmm(x.view(EXPERTS, -1, IN), w().transpose(-2, -1)).flatten(0, 1)


def every(w: Callable[[], Tensor], x: Tensor, _: Tensor) -> Tensor:
    return (x @ w().permute(0, 2, 1)).sum(0)


def from_the_left(w: Callable[[], Tensor], x: Tensor, _: Tensor) -> Tensor:
    return torch.matmul(w(), x.T).sum(0).T


def taken(w: Callable[[], Tensor], x: Tensor, ids: Tensor) -> Tensor:
    return torch.bmm(w()[ids], x[..., None])[..., 0]


def grouped(w: Callable[[], Tensor], x: Tensor, ids: Tensor) -> Tensor:
    order = torch.argsort(ids)
    offs = torch.bincount(ids, minlength=EXPERTS).cumsum(0).int()
    return F.grouped_mm(x[order], w().transpose(-2, -1), offs=offs)[torch.argsort(order)]


def summed(w: Callable[[], Tensor], x: Tensor, _: Tensor) -> Tensor:
    mix = torch.ones(len(x), EXPERTS, dtype=x.dtype).div(EXPERTS)
    return torch.einsum("te,eoi,ti->to", mix, w(), x)


def apart(w: Callable[[], Tensor], x: Tensor, _: Tensor) -> Tensor:
    return (
        sum(F.linear(x, one) for one in w())
        + sum(  # type: ignore[return-value]
            x @ one.squeeze(0).t() for one in w()[1:].chunk(3)
        )
    )


WAYS = (loop, loop_of_one, batched, every, from_the_left, taken, grouped, summed, apart)


class Experts(nn.Module):
    def __init__(self, way: Callable[..., Tensor]):
        super().__init__()
        self.way, self.w = way, nn.Parameter(torch.randn(EXPERTS, OUT, IN) / 4)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.way(lambda: self.w, x, ids)


def experts(
    way: Callable[..., Tensor], dtype: torch.dtype = torch.float64, **options: Any
) -> Experts:
    model = Experts(way).to(dtype)
    for name in ("one", "two"):
        delta = pl.attach(model, pl.LoRA(rank=3, alpha=5, targets="w", **options), name=name)
        for parameter in delta.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def results(model: Experts, x: Tensor, ids: Tensor) -> list[Tensor]:
    """The output, and every gradient."""
    x = x.clone().requires_grad_()
    y = model(x, ids)
    y.backward((torch.arange(y.numel()).view_as(y) % 7 - 3).to(y.dtype))  # exact in any dtype
    learned = [p for p in model.parameters() if p.grad is not None]
    found = [y.detach(), x.grad, *(p.grad for p in learned)]
    model.zero_grad()
    return found  # type: ignore[return-value]


def inputs(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, IN, dtype=dtype), torch.randint(EXPERTS - 1, (tokens,))


@pytest.mark.parametrize("path", ["torch", None])
@pytest.mark.parametrize("chosen", ["two", ["one", "two"]])
@pytest.mark.parametrize("way", WAYS)
def test_experts_without_their_weights_are_exact(
    way: Callable[..., Tensor], chosen: Any, path: Any
) -> None:
    dtype = torch.float32 if way is grouped else torch.float64  # as torch has it
    model, given = experts(way, dtype), inputs(dtype)
    pl.use(model, chosen)
    with mock.patch.object(LowRankPatch, "value", side_effect=AssertionError):
        with pl.kernels.backend(path):
            found = results(model, *given)
        with torch.no_grad():
            again = model(*given)
    with mock.patch.object(sums, "KNOWN", {}), mock.patch("peftlite.core.read.KNOWN", {}):
        expected = results(model, *given)
    assert len(found) == len(expected) >= 4
    bound = 1e-6 if way is grouped else 1e-13
    for ours, true in zip(found, expected, strict=True):
        assert (ours - true).norm() < bound * true.norm()
    torch.testing.assert_close(again, found[0])


@pytest.mark.parametrize("way", [loop, batched, taken, grouped])
def test_factors_in_fp32_beside_bf16_have_gradients_of_fp32(way: Callable[..., Tensor]) -> None:
    model, (x, ids) = experts(way, torch.bfloat16), inputs(torch.bfloat16)
    with pl.kernels.backend("torch"):
        found = results(model, x, ids)
    exact = experts(way if way is not grouped else loop)
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    expected = results(exact, x.double(), ids)
    for ours, true, bound in zip(found, expected, (4e-3, 4e-3, 1e-6, 1e-6), strict=True):
        assert (ours - true).norm() < bound * true.norm()


def test_a_backward_pass_can_be_differentiated() -> None:
    model, (x, ids) = experts(batched), inputs()
    x.requires_grad_()
    with pl.kernels.backend("torch"):
        assert torch.autograd.gradgradcheck(lambda x: model(x, ids).square(), x[:8], fast_mode=True)


@pytest.mark.parametrize("way", [loop, batched, taken, grouped])
def test_nothing_of_the_weights_size_is_made(way: Callable[..., Tensor]) -> None:
    model, (x, ids) = experts(way, torch.float32), inputs(torch.float32, 8)
    made, own = list[int](), model._parameters["w"].data_ptr()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            given = func(*args, **(kwargs or {}))
            new = [t.untyped_storage() for t in tree_leaves(given) if isinstance(t, Tensor)]
            made.extend(storage.nbytes() // 4 for storage in new if storage.data_ptr() != own)
            return given

    with Sizes():
        results(model, x, ids)
    assert max(made) < EXPERTS * OUT * IN or (way is taken and max(made) == 8 * OUT * IN)


def test_a_call_reads_a_weight_once_whatever_changes_it() -> None:
    model, given = Experts(loop).double(), inputs()
    pl.attach(model, pl.DoRA(rank=2, targets="w"), name="dora")
    patch = pl.deltas(model)["dora"].placed["w"].patch
    with mock.patch.object(
        type(patch), "value", autospec=True, side_effect=type(patch).value
    ) as value:
        model(*given)
        assert value.call_count == 1
        model(*given)
        assert value.call_count == 2
    assert model.w is not model.w


def test_dropout_is_drawn_once_a_call() -> None:
    model, (x, _) = (
        experts(lambda w, x, _: F.linear(x, w()[0]) - F.linear(x, w()[0]), dropout=0.5),
        inputs(),
    )
    assert not model(x, None).any()
    torch.manual_seed(0)
    model.way = lambda w, x, _: F.linear(x, w()[0])
    assert not torch.equal(model(x, None), model(x, None))


def test_checkpointed_parts_of_a_call_are_run_again() -> None:
    def parts(w: Callable[[], Tensor], x: Tensor, _: Tensor) -> Tensor:
        first = checkpoint(lambda x: F.linear(x, w()[0]), x, use_reentrant=False)
        second = checkpoint(lambda x: F.linear(x, w()[1] * 2), x, use_reentrant=False)
        return first + second  # type: ignore[operator]

    def plain(w: Callable[[], Tensor], x: Tensor, _: Tensor) -> Tensor:
        return F.linear(x, w()[0]) + F.linear(x, w()[1] * 2)

    model, given = experts(parts, dropout=0.5), inputs()
    torch.manual_seed(0)
    found = results(model, *given)
    assert all(f.isfinite().all() for f in found)
    model.eval()
    found = results(model, *given)
    model.way = plain
    for ours, true in zip(found, results(model, *given), strict=True):
        torch.testing.assert_close(ours, true)


def test_what_isnt_known_has_the_weight_formed() -> None:
    model, (x, ids) = experts(loop), inputs()
    value = model.w.clone()
    for look in (
        lambda w: w[:, 0],
        lambda w: w[0, 1],
        lambda w: w[torch.ones(EXPERTS, dtype=torch.bool)],
        lambda w: w[[0, 1]],
        lambda w: w[-1] + 1,
        lambda w: w[ids] * 2,
        lambda w: w.transpose(0, 1),
        lambda w: w.permute(2, 1, 0),
        lambda w: w.unbind(1)[0],
        lambda w: w.chunk(2, 2)[0],
        lambda w: w.sum((0, 1)),
        lambda w: w.reshape(-1, IN),
        lambda w: w.mT @ w,
        lambda w: torch.einsum("eoi,...i->...eo", w, x),
        lambda w: torch.einsum("eoi,eoj->eij", w, w),
        lambda w: torch.baddbmm(
            torch.ones(EXPERTS, 2, IN, dtype=w.dtype), x[:2, :1].expand(EXPERTS, 2, OUT), w
        ),
    ):
        torch.testing.assert_close(look(model.w) + 0, look(value) + 0)


def test_a_matrix_whose_rows_are_those_of_experts() -> None:
    """As DBRX keeps them."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(EXPERTS * OUT, IN))

        def forward(self, x: Tensor) -> Tensor:
            parts = self.w.view(EXPERTS, OUT, IN).chunk(EXPERTS, dim=0)
            return sum(x.matmul(part.squeeze(dim=0).t()) for part in parts)  # type: ignore

    model, x = Rows().double(), torch.randn(5, IN, dtype=torch.float64)
    delta = pl.attach(model, pl.LoRA(rank=2, targets="w"))
    nn.init.normal_(delta.placed["w"].patch.b)
    with mock.patch.object(LowRankPatch, "value", side_effect=AssertionError):
        y = model(x)
    torch.testing.assert_close(y, F.linear(x, model.w.view(EXPERTS, OUT, IN).clone().sum(0)))


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe"])
def test_experts_of_transformers(kind: str) -> None:
    sizes = dict(hidden_size=16, intermediate_size=24, vocab_size=32, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    config = transformers.AutoConfig.for_model(kind, num_local_experts=4, **sizes, **heads)
    model = transformers.AutoModelForCausalLM.from_config(config)
    names = [name for name, p in model.named_parameters() if p.dim() == 3]
    delta = pl.attach(model, pl.LoRA(rank=2, targets=names), name="experts")
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    with mock.patch.object(LowRankPatch, "value", side_effect=AssertionError):
        y = model(torch.arange(8)[None]).logits
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    pl.merge(model, "experts")
    torch.testing.assert_close(model(torch.arange(8)[None]).logits, y, rtol=1e-4, atol=1e-5)

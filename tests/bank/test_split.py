"""Split: experts and what reads its weights, in one pass for each delta of a batch."""

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftlite as pl
from peftlite.bank import DeltaBank
from peftlite.bank.families.reading import ReadLowRank
from peftlite.bank.split import Split

WIDTH, HIDDEN, EXPERTS, TOP = 32, 24, 4, 2
NAMES = ["d0", None, "d1", "d0"]


def looped(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """As transformers' experts run: an expert at a time, each for its tokens."""
    y = torch.zeros_like(x)
    for e in ids.unique():
        tokens, place = torch.where(ids == e)
        gate, up = F.linear(x[tokens], self.gate_up_proj[e]).chunk(2, dim=-1)
        own = F.linear(self.act(gate, up), self.down_proj[e])
        y.index_add_(0, tokens, own * weights[tokens, place, None])
    return y


def batched(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A matrix for each token and expert."""
    x, ids = x.repeat_interleave(TOP, dim=0), ids.reshape(-1)
    gate, up = torch.bmm(self.gate_up_proj[ids], x.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
    y = torch.bmm(self.down_proj[ids], (self.act(gate, up))[..., None])[..., 0]
    return (y * weights.reshape(-1, 1)).view(-1, TOP, WIDTH).sum(1)


def grouped(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """All experts in one product, for tokens that are sorted by them."""
    ids, order = ids.reshape(-1).sort()
    offs = torch.bincount(ids, minlength=EXPERTS).cumsum(0).int()
    x = x[order // TOP]
    gate, up = F.grouped_mm(x, self.gate_up_proj.transpose(-2, -1), offs=offs).chunk(2, dim=-1)
    y = F.grouped_mm(self.act(gate, up), self.down_proj.transpose(-2, -1), offs=offs)
    y = (y * weights.reshape(-1, 1)[order])[order.argsort()]
    return y.view(-1, TOP, WIDTH).sum(1)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def turned_round(gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up).flip(0).flip(0)


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return gated(self.map(gate), up)


class Experts(nn.Module):
    """As transformers 5 has them, with a matrix for all that comes in and one for all that goes."""

    def __init__(self, way: Callable[..., Tensor], act: Callable[..., Tensor] = gated):
        super().__init__()
        self.way, self.act = way, act
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) / 4)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.way(self, hidden_states, top_k_index, top_k_weights)


class Mixture(nn.Module):
    def __init__(self, *how: Any):
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, EXPERTS), Experts(*how)

    def forward(self, x: Tensor) -> Tensor:  # (b, t, i)
        flat = x.flatten(0, 1)
        weights, ids = self.gate(flat).softmax(-1).topk(TOP)
        return x + self.experts(flat, ids, weights).view_as(x)


def model_of(kind: str) -> nn.Module:
    """A small mixture of transformers."""
    sizes = dict(hidden_size=16, intermediate_size=24, vocab_size=32, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts_per_tok=2)
    experts = dict(num_local_experts=4, num_experts=4, moe_intermediate_size=24)
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, **experts)
    return transformers.AutoModelForCausalLM.from_config(config).double()


def loras(targets: Any, **options: Any) -> list[pl.Method]:
    return [pl.LoRA(rank=rank, alpha=3, targets=targets, **options) for rank in (4, 1, 3)]


def banked(model: nn.Module, methods: Sequence[pl.Method]) -> tuple[DeltaBank, nn.Module]:
    """A bank with room for the first of some methods and deltas of the rest; and a twin."""
    twin, (room, *made) = copy.deepcopy(model), methods
    bank = DeltaBank(model, 2, 4, room)
    for i, method in enumerate(made):
        delta = pl.attach(twin, method, name=f"d{i}")
        for parameter in delta.parameters():
            nn.init.normal_(parameter, std=0.5)
        bank.load(delta.name, delta)
    return bank, twin


def logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x) if x.is_floating_point() else model(x, use_cache=False).logits


def each_alone(twin: nn.Module, x: Tensor, names: Sequence[str | None] = NAMES) -> Tensor:
    rows = []
    for i, name in enumerate(names):
        with pl.using(twin, name):
            rows.append(logits(twin, x[i : i + 1]))
    return torch.cat(rows)


def check(
    bank: DeltaBank, twin: nn.Module, x: Tensor, bound: float = 1e-10, names: Any = NAMES
) -> None:
    """Rows have their own deltas' outputs, and train them."""
    with torch.no_grad(), bank.rows(names):
        y = logits(bank.model, x)
    with bank.train(names):
        logits(bank.model, x).square().sum().backward()
    wanted = each_alone(twin, x, names)
    wanted.square().sum().backward()
    assert (y - wanted).norm() < bound * wanted.norm()
    for name, delta in pl.deltas(twin).items():
        found = dict(bank.named_parameters(name))
        for key, parameter in delta.named_parameters():
            own, true = found[key.replace("difference", "d")].grad, parameter.grad
            if true is None:  # of an expert to which no token went
                assert own is None or not own.any()
            else:
                assert own is not None and (own - true).norm() <= bound * true.norm(), key


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe", "mixtral", "qwen3_moe"])
def test_experts_of_transformers(kind: str) -> None:
    model = model_of(kind)
    names = [n for n, p in model.named_parameters() if p.dim() == 3 or ".experts.2." in n]
    bank, twin = banked(model, loras(names))
    check(bank, twin, torch.randint(0, 32, (4, 5)))


def test_each_delta_may_have_its_rows_side_by_side() -> None:
    bank, twin = banked(Mixture(looped).double(), loras("experts"))
    check(bank, twin, torch.randn(4, 5, WIDTH).double(), names=["d0", "d0", "d1", "d1"])


@pytest.mark.parametrize("way", [looped, batched, grouped])
def test_experts_take_one_pass_and_multiply_by_parts(way: Callable[..., Tensor]) -> None:
    dtype = torch.float32 if way is grouped else torch.float64  # as torch has it
    model = Mixture(way).to(dtype)
    bank, twin = banked(model, loras("experts"))
    with (
        mock.patch.object(ReadLowRank, "value", side_effect=AssertionError),
        mock.patch.object(Split, "_only", side_effect=AssertionError),
    ):
        check(bank, twin, torch.randn(4, 5, WIDTH, dtype=dtype), 1e-5 if way is grouped else 1e-10)


def test_what_loses_its_tokens_takes_a_pass_for_each_delta() -> None:
    """They are turned round, come to a map that has a delta for each row, or W' is dense."""
    full = [pl.FullTuning(targets="experts")] * 3
    for act, methods in (
        (turned_round, loras("experts")),
        (Mapped(), loras("experts")),
        (gated, full),
    ):
        bank, twin = banked(Mixture(looped, act).double(), methods)
        only = mock.patch.object(Split, "_only", autospec=True, side_effect=Split._only)
        with only as passes:
            check(bank, twin, torch.randn(4, 5, WIDTH).double())
        assert passes.call_count == 6


def test_dropout_of_experts_is_drawn_for_each_delta() -> None:
    bank, _ = banked(Mixture(looped), loras("experts", dropout=0.5))
    x = torch.ones(4, 1, WIDTH)
    with bank.train(NAMES):
        y, other = bank.model(x), bank.model(x)
    assert torch.allclose(y[0], y[3]) and torch.allclose(y[1], other[1])
    assert not torch.allclose(y[0], other[0]) and not torch.allclose(y[2], other[2])


@pytest.mark.parametrize("way", [looped, grouped])
def test_nothing_of_the_weights_size_is_made(way: Callable[..., Tensor]) -> None:
    model, made = Mixture(way), list[int]()
    bank, _ = banked(model, loras("experts"))

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            given = func(*args, **(kwargs or {}))
            old = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
            new = [t.untyped_storage() for t in tree_leaves(given) if isinstance(t, Tensor)]
            made.extend(s.nbytes() // 4 for s in new if s._cdata not in old)
            return given

    with bank.train(NAMES), Sizes():
        model(torch.randn(4, 2, WIDTH)).sum().backward()
    assert max(made) < EXPERTS * HIDDEN * WIDTH


def test_rows_keep_their_experts_through_a_decode() -> None:
    model = model_of("gpt_oss")
    bank, twin = banked(model, loras("experts"))
    ids = torch.randint(1, 32, (4, 5))
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with bank.rows(NAMES):
        mixed: Any = model.generate(ids, **how)
    for i, name in enumerate(NAMES):
        with pl.using(twin, name):
            assert torch.equal(twin.generate(ids[i : i + 1], **how)[0], mixed[i])


class Turned(nn.Module):
    """A recurrent layer and an attention that have their tokens first, with states and masks."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.attn = nn.LSTM(8, 6), nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor, h: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        t = x.shape[1]
        y, (last, cell) = self.rnn(x.transpose(0, 1), hx=(h.mT[None], h.mT[None] / 2))
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        each = future.expand(2 * y.shape[1], t, t)
        y, weights = self.attn(y, y, value=y, key_padding_mask=padding, attn_mask=future)
        y = y + self.attn(y, y, y, attn_mask=each, need_weights=False)[0]
        return y.transpose(0, 1), last[0], cell[0], weights


def test_tokens_first_states_and_masks() -> None:
    model = Turned().double()
    bank, twin = banked(model, loras(lambda s: s.whole.dim() == 2))
    x, h = torch.randn(4, 4, 8).double(), torch.randn(6, 4).double()
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1, 2:] = padding[2, 3:] = True
    with bank.rows(NAMES):
        mixed = model(x, h, padding)
    for i, name in enumerate(NAMES):
        with pl.using(twin, name):
            own = twin(x[i : i + 1], h[:, i : i + 1], padding[i : i + 1])
        for got, true in zip(mixed, own, strict=True):
            torch.testing.assert_close(got[i : i + 1], true)


@pytest.mark.heavy
def test_compiled_code_steps_aside() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), layer).double()
    bank, _ = banked(model, loras(None))
    x = torch.randn(4, 3, 8).double()
    torch.compiler.reset()
    with torch.no_grad(), bank.rows(NAMES):
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
        torch.compiler.reset()
        with pytest.raises(Exception, match="compile without fullgraph"):
            torch.compile(model, backend="eager", fullgraph=True)(x)

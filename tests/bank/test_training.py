"""Training many deltas in one batch: each learns as it would alone, and is had back."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import peftlite as pl
from peftlite.bank import DeltaBank
from tests.bank.banks import WIDTH, Models, base, lora, resident, tuned


def step(model: torch.nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    (model(x) - target).square().sum().backward()


def same(bank: DeltaBank, name: str, delta: pl.Delta) -> None:
    own = bank.delta(name).state_dict()
    assert list(own) == list(delta.state_dict())
    for key, value in delta.state_dict().items():
        torch.testing.assert_close(own[key], value)


MIX = st.lists(st.sampled_from([None, *"abc"]), min_size=1, max_size=6).filter(any)
MIXES = st.lists(MIX, max_size=4)


@pytest.mark.heavy
@given(mixes=MIXES)
def test_each_delta_learns_as_it_would_alone(mixes: list[list[str | None]]) -> None:
    own = Models("abc")
    bank = own.bank
    mine = {name: torch.optim.AdamW(bank.parameters(name), lr=0.01) for name in "abc"}
    theirs = {name: torch.optim.AdamW(own.delta(name).parameters(), lr=0.01) for name in "abc"}
    for names in mixes:
        x = torch.randn(len(names), 3, WIDTH, dtype=torch.float64)
        target = torch.randn(len(names), 3, 8, dtype=torch.float64)
        with bank.train(names):
            step(own.model, x, target)
        for name in "abc":
            rows = [i for i, of in enumerate(names) if of == name]
            if not rows:
                assert all(p.grad is None for p in bank.parameters(name))
                continue
            step(own.alone[name], x[rows], target[rows])
            for optimizer in (mine[name], theirs[name]):
                optimizer.step()
                optimizer.zero_grad()
    for name in "abc":
        same(bank, name, own.delta(name))


def test_gradients_accumulate() -> None:
    own = Models("ab")
    x, target = torch.randn(2, WIDTH).double(), torch.randn(2, 8).double()
    for names in (["a", "b"], ["b", "b"]):
        with own.bank.train(names):
            step(own.model, x, target)
        for i, name in enumerate(names):
            step(own.alone[name], x[i : i + 1], target[i : i + 1])
    for name in "ab":
        theirs = [p.grad for p in own.delta(name).parameters()]
        for mine, want in zip(own.bank.parameters(name), theirs, strict=True):
            torch.testing.assert_close(mine.grad, want)


def test_whatever_the_default_device() -> None:
    own, x = Models("ab"), torch.randn(3, 2, WIDTH, dtype=torch.float64)
    with own.bank.train(["a", None, "b"]):
        wanted = torch.autograd.grad(own.model(x).sum(), [*own.bank.parameters("a")])
    with torch.device("meta"):
        with own.bank.train(["a", None, "b"]):
            got = torch.autograd.grad(own.model(x).sum(), [*own.bank.parameters("a")])
        own.bank.evict("a")
        same(own.bank, "a", own.delta("a"))
        rows = own.bank.static(3)
        rows.set(["b", "a", None])
    for mine, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, want)
    with torch.no_grad(), rows:
        torch.testing.assert_close(own.model(x), own.want(x, ["b", "a", None]))


def test_the_base_gets_no_gradient() -> None:
    own = Models("a")
    with own.bank.train(["a", None]):
        step(own.model, torch.randn(2, WIDTH).double(), torch.randn(2, 8).double())
    assert all(p.grad is None for p in own.model.parameters())


def _learn(own: Models, name: str) -> None:
    optimizers = [
        torch.optim.SGD(parameters, lr=0.01)
        for parameters in (own.bank.parameters(name), own.delta(name).parameters())
    ]
    x, target = torch.randn(2, WIDTH).double(), torch.randn(2, 8).double()
    with own.bank.train([name, name]):
        step(own.model, x, target)
    step(own.alone[name], x, target)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_what_was_trained_is_kept_and_served() -> None:
    own = Models("abc", slots=2)
    _learn(own, "a")
    own.check(["a"])
    own.check(["b"])
    own.check(["c"])
    assert "a" in resident(own.bank)
    leaves = list(own.bank.parameters("a"))
    own.bank.evict("a")
    own.check(["b", "c"])
    before = own.bank._arena.buffers[0].clone()
    with torch.no_grad():
        for leaf in leaves:
            leaf.add_(1)  # an optimizer that goes on writes into no one's slot
    assert torch.equal(own.bank._arena.buffers[0], before)
    own.check(["a"])
    same(own.bank, "a", own.delta("a"))


def test_what_was_trained_outlives_the_budget() -> None:
    own = Models("ab", slots=1, memory_budget=1)
    _learn(own, "a")
    own.bank.evict("a")
    own.check(["b"])
    own.check(["a"])
    _learn(own, "a")
    own.bank.evict("a")
    own.check(["b"])
    own.check(["a"])


def test_a_trained_delta_is_saved_and_loaded(tmp_path: Path) -> None:
    own = Models("a")
    _learn(own, "a")
    own.bank.save("a", tmp_path / "a.safetensors", notes={"by": "bank"})
    model = base()
    model.load_state_dict(own.base.state_dict())
    delta = pl.load(model, tmp_path / "a.safetensors")
    same(own.bank, "a", delta)
    assert pl.inspect(tmp_path / "a.safetensors").notes == {"by": "bank"}


def test_a_fresh_delta_is_trained() -> None:
    own = Models("")
    for name in "ab":
        own.bank.load(name, lora(rank=2))
    x, target = torch.randn(2, WIDTH).double(), torch.randn(2, 8).double()
    parameters = [p for name in "ab" for p in own.bank.parameters(name)]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    losses = []
    for _ in range(20):
        with own.bank.train(["a", "b"]):
            loss = (own.model(x) - target).square().sum()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize(
    "method",
    [
        lora(init="pissa"), pl.LoRA(rank=2, targets="2.weight[0:8]"),
        pl.VeRA(rank=4, targets="2.weight"),
    ],
)  # fmt: skip
def test_what_can_not_be_trained_in_a_bank_says_so(method: pl.Method) -> None:
    model = base()
    alone = tuned(model, method, "a")
    bank = DeltaBank(model, 2, 8, methods=lora())
    bank.load("a", pl.deltas(alone)["a"])
    with pytest.raises(pl.PeftliteError, match="can't be trained in a bank"):
        bank.parameters("a")
    with pytest.raises(pl.PeftliteError, match="can't be trained in a bank"), bank.train(["a"]):
        pass
    assert not any(entry.uses for entry in bank._slots.resident)


@pytest.mark.parametrize("names", [["a", "b", "c"], [*"aabbcc"], ["c", "a", None, "b", "a"]])
def test_inputs_are_dropped_by_each_delta_s_own_probability(names: list[str | None]) -> None:
    rates = {"a": 0.5, "b": 0.0, "c": 0.25, None: 0.0}
    model = torch.nn.Linear(200, 8).double().requires_grad_(False)
    w, bias = model.weight, model.bias
    bank = DeltaBank(model, 3, 2, pl.LoRA(targets="weight"))
    for name in "abc":
        bank.load(name, pl.LoRA(rank=2, alpha=3, dropout=rates[name], targets="weight"))
        for parameter in bank.parameters(name):
            parameter.data.normal_()
    x, dy = torch.randn(len(names), 200).double(), torch.randn(len(names), 8).double()
    x.requires_grad_()
    for training in (True, False):
        model.train(training)
        with bank.train(names):
            y = model(x)
            (dx,) = torch.autograd.grad(y, x, dy)
        for row, name in enumerate(names):
            if name is None:
                continue
            a, b = bank.parameters(name)
            # what of x came into the product, as its gradient has it
            kept = (dx[row] - dy[row] @ w) / (1.5 * dy[row] @ b @ a)
            p = rates[name] if training else 0.0
            near = torch.minimum(kept.abs(), (kept - 1 / (1 - p)).abs())
            assert near.max() < 1e-6 and abs((kept < 0.5).double().mean() - p) < 0.15
            change = 1.5 * (kept * x[row]) @ a.T @ b.T
            torch.testing.assert_close(y[row], w @ x[row] + bias + change)


def test_half_precision_is_for_inference() -> None:
    bank = DeltaBank(base(torch.bfloat16), 2, 8, methods=lora())
    bank.load("a", lora())
    with pytest.raises(pl.PeftliteError, match="small steps are lost"):
        bank.parameters("a")


@pytest.mark.heavy
def test_one_compiled_graph_trains_every_mix() -> None:
    own, x = Models("abc"), torch.randn(4, WIDTH, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(own.model, fullgraph=True, backend="aot_eager")
    counters.clear()
    for names in (["a", "b", None, "a"], ["c", "c", "c", "c"], ["b", "c", "a", None]):
        with own.bank.train(names):
            step(compiled, x, torch.ones(4, 8).double())
        for name, row in zip(names, x, strict=True):
            if name is not None:
                step(own.alone[name], row[None], torch.ones(1, 8).double())
    for name in "abc":
        theirs = [p.grad for p in own.delta(name).parameters()]
        for mine, want in zip(own.bank.parameters(name), theirs, strict=True):
            torch.testing.assert_close(mine.grad, want)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_model_in_training_is_not_moved() -> None:
    own = Models("a")
    leaves: Sequence[torch.nn.Parameter] = list(own.bank.parameters("a"))
    with pytest.raises(pl.PeftliteError, match="in training"):
        own.model.to("meta")
    assert not next(own.model.parameters()).is_meta and leaves
    own.model.float()


@pytest.mark.parametrize("method", [lora(init="pissa"), pl.DoRA(rank=2, targets="weight")])
def test_what_is_made_of_parameters_is_as_they_are(method: pl.Method) -> None:
    own, x = Models("ab"), torch.randn(4, WIDTH, dtype=torch.float64)
    own.alone["a"] = twin = tuned(own.base, method, "a")
    delta, model = pl.deltas(twin)["a"], copy.deepcopy(own.base)
    bank = own.bank = DeltaBank(model, 3, 8, methods=[lora(), pl.DoRA(rank=2, targets="weight")])
    own.model = model
    bank.load("b", own.delta("b"))
    bank.adopt("a", delta)
    for _ in range(2):
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.add_(0.1)
        own.check(["a", "b", None, "a"])
        own.check(["a", "b"], x)
        own.check(["a"], x)
        with bank.train(["b", "a", "a", None]):
            step(model, x, torch.zeros(4, 8).double())
        step(twin, x[1:3], torch.zeros(2, 8).double())
        got = [p.grad for p in delta.parameters()]
        assert all(grad is not None for grad in got)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.sub_(0.2)
    with bank.static(2) as rows, torch.no_grad():
        rows.set(["a", "b"])
        torch.testing.assert_close(model(x[:2]), own.want(x[:2], ["a", "b"]))
        rows.close()
    bank.evict("a")
    own.check(["b", "a"])

"""The Trainer: the loop a careful person would write, and nothing but the delta changes."""

import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import peftlite as pl
from peftlite.train import losses
from peftlite.train.data import collate
from peftlite.train.events import Log
from peftlite.train.loader import Loader
from peftlite.train.schedule import lr_factor
from tests.digest import assert_same, digest
from tests.train.test_losses import llama
from tests.train.tiny import LORA, gpt, texts, timeless, trainer, values

CPU = torch.device("cpu")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- what it computes


def by_hand(model: nn.Module, epochs: int = 3, size: int = 4, lr: float = 1e-2) -> None:
    """The same training, written out."""
    loader = Loader(texts(), size, collate, CPU, seed=0)
    parameters = list(pl.deltas(model)["sql"].parameters())
    adamw = torch.optim.AdamW(parameters, lr, weight_decay=0.01, fused=True)
    model.train()
    torch.manual_seed(0)
    steps = epochs * loader.steps_per_epoch
    for step in range(steps):
        adamw.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        ((batch, _),) = loader.micro_batches(step)
        logits = model(batch["input_ids"])[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        (losses / (batch["labels"][:, 1:] != -100).sum()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad()


def test_it_is_the_loop_by_hand_to_the_bit() -> None:
    ours, theirs = gpt(), gpt()
    trainer(ours, warmup=0.0).fit()
    by_hand(theirs)
    assert same(values(ours), values(theirs))


@pytest.mark.heavy
@settings(max_examples=15)
@given(st.integers(2, 12), st.integers(1, 12), st.sampled_from(["tokens", "rows"]))
def test_accumulation_is_one_big_batch(parts: int, size: int, kind: str) -> None:
    def rows(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["input_ids"]).square().mean((1, 2)).mean()

    data = texts() if kind == "tokens" else [{"input_ids": torch.arange(5) + i} for i in range(12)]
    loss = losses.causal_lm if kind == "tokens" else rows
    found = []
    for accumulate in (1, parts):
        model = gpt(pl.LoRA(rank=2), torch.float64)
        # no optimizer that divides gradients by themselves
        options: dict[str, Any] = {"optimizer": torch.optim.SGD, "epochs": 1}
        trainer(model, train=data, val=None, loss=loss, batch_size=size, accumulate=accumulate,
                **options).fit()  # fmt: skip
        found.append(values(model))
    for key, whole in found[0].items():
        torch.testing.assert_close(found[1][key], whole, rtol=1e-9, atol=1e-12)


def test_a_regularizer_counts_once_however_many_parts() -> None:
    found = []
    for parts in (1, 3):
        model = gpt(pl.AdaLoRA(total_steps=9, targets="q_proj"), torch.float64)
        trainer(model, accumulate=parts, optimizer=torch.optim.SGD).fit()
        found.append(values(model))
    for key, whole in found[0].items():
        torch.testing.assert_close(found[1][key], whole, rtol=1e-8, atol=1e-10)


def test_methods_act_after_every_step() -> None:
    method = pl.AdaLoRA(init_rank=3, target_rank=1, total_steps=9, t_init=2, t_final=2)
    model = gpt(method)
    trainer(model).fit()
    patches = [placed.patch for placed in pl.deltas(model)["sql"].placed.values()]
    assert all(int(patch.taken) == 9 for patch in patches)
    assert sum(int((patch.lam != 0).sum()) for patch in patches) == len(patches)


def test_groups() -> None:
    model = gpt([pl.LoRA(rank=2, targets="q_proj"), pl.IA3(targets="v_proj")])
    seen: list[dict[str, Any]] = []

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        seen.extend(dict(group) for group in groups)
        return torch.optim.AdamW(groups)

    trainer(model, optimizer=optimizer, b_ratio=16.0, lr_multiplier=0.5, weight_decay=0.2).fit()
    shown = {(g["lr"], g["weight_decay"], p.dim()) for g in seen for p in g["params"]}
    assert shown == {(0.005, 0.2, 2), (0.08, 0.2, 2), (0.005, 0.0, 1)}


@given(st.integers(1, 200), st.floats(0, 0.9), st.sampled_from(["cosine", "linear", "constant"]))
def test_the_rate_rises_and_then_declines(total: int, warmup: float, schedule: Any) -> None:
    factors = [lr_factor(step, total, warmup, schedule) for step in range(total)]
    rise = round(warmup * total)
    assert factors[:rise] == sorted(set(factors[:rise]))
    assert factors[rise:] == sorted(factors[rise:])[::-1]
    assert all(0 < share <= 1 for share in factors) and (rise == total or factors[rise] == 1)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_learns(dtype: str) -> None:
    history = trainer(gpt(pl.LoRA(rank=4)), autocast=dtype, lr=0.05, epochs=6).fit()
    assert history.epochs[-1]["train_loss"] < history.epochs[1]["train_loss"] - 0.02


def attached_llama() -> nn.Module:
    model = llama()
    pl.attach(model, LORA, "sql")
    return model


@pytest.mark.parametrize("build", [gpt, attached_llama])
def test_checkpointing_changes_nothing(build: Callable[[], nn.Module]) -> None:
    plain, ours = build(), build()
    trainer(plain).fit()
    trainer(ours, gradient_checkpointing=True).fit()
    assert same(values(plain), values(ours))
    assert not any("forward" in vars(module) for module in ours.modules())
    assert not getattr(ours, "is_gradient_checkpointing", False)


@pytest.mark.heavy
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain, ours = gpt(pl.LoRA(rank=2)), gpt(pl.LoRA(rank=2))
    once = {
        "train": [{"input_ids": x, "labels": x} for x in torch.randint(256, (8, 6))],
        "epochs": 1,
    }
    trainer(plain, val=None, **once).fit()
    trainer(ours, val=None, compile=True, **once).fit()
    assert calls
    for key, value in values(plain).items():
        torch.testing.assert_close(values(ours)[key], value)


# -- what it leaves alone


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


def normed() -> nn.Module:
    torch.manual_seed(0)
    model = Normed()
    pl.attach(model, pl.LoRA(rank=2, targets="a"), "sql")
    return model


def test_nothing_but_the_delta_changes() -> None:
    model = normed()
    model.norm.eval()
    model.b.weight.requires_grad_()  # the user's, whatever for
    before, fresh = values(model), digest(model)
    data = TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trainer(model, train=data, val=data, loss=losses.classification).fit()
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    assert not same(before, values(model))
    pl.deltas(model)["sql"].load_state_dict(before)
    assert_same(fresh, digest(model))
    assert all(p.grad is None for p in model.parameters())


def test_a_seed_says_it_all() -> None:
    found = []
    for seed in (0, 0, 1):
        model = gpt()
        torch.manual_seed(len(found))
        history = trainer(model, seed=seed).fit()
        found.append((values(model), timeless(history)))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not same(found[0][0], found[2][0])


def test_what_looks_on_changes_nothing() -> None:
    def draw(_: Any) -> float:
        return random.random() + np.random.rand() + float(torch.rand(()))

    class Drawing:
        def start(self, *_: Any) -> None: ...

        def event(self, _: Any) -> None:
            draw(None)

        def end(self, _: Any) -> None: ...

    plain, watched = gpt(), gpt()
    trainer(plain, val=None).fit()
    trainer(watched, valid_every=1, probes={"luck": draw}, callbacks=[Drawing()]).fit()
    assert same(values(plain), values(watched))


def test_it_trains_what_is_named() -> None:
    model = gpt()
    pl.attach(model, pl.LoRA(rank=1), "chat")
    pl.use(model, ["sql", "chat"])
    before = values(model), values(model, "chat")
    trainer(model, delta="chat").fit()
    assert same(before[0], values(model)) and not same(before[1], values(model, "chat"))
    assert all(p.requires_grad and p.grad is None for p in pl.deltas(model)["sql"].parameters())
    trainer(model).fit()
    assert not same(before[0], values(model))


class Partly(nn.Module):
    """What it reaches, what it runs without gradients, and what it never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return self.head(x)


def test_what_no_gradient_reaches_is_told_once() -> None:
    model, data = Partly(), [(torch.randn(4), i % 3) for i in range(8)]
    pl.attach(model, pl.LoRA(rank=1, targets="weight"), "sql")
    with pytest.warns(UserWarning, match=r"reached sql:frozen.weight; sql:unused.weight:") as told:
        trainer(model, train=data, val=None, loss=losses.classification).fit()
    assert len(told) == 1


# -- when it ends


def test_it_stops_early() -> None:
    scores = iter([0.5, 0.6, 0.7, 0.65, 0.7, 0.9])
    kind = {"probes": {"skill": lambda _: next(scores)}, "metric": "skill", "patience": 2}
    history = trainer(epochs=9, **kind).fit()
    assert history.stopped == "early"
    assert [row["skill"] for row in history.epochs] == [0.5, 0.6, 0.7, 0.65, 0.7]


def test_a_loss_is_to_fall() -> None:
    history = trainer(epochs=9, patience=1, lr=1e-9, lr_multiplier=1e-6).fit()
    assert history.stopped == "early" and len(history.epochs) == 3


def test_probes_tell_what_was_forgotten() -> None:
    scores = iter([0.75, 0.5, 0.25, 0.875])
    history = trainer(probes={"old task": lambda model: next(scores)}).fit()
    assert [row["old task forgotten"] for row in history.epochs] == [0, 0.25, 0.5, -0.125]
    assert "old task forgotten" in str(history)


@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_undone(check_every: int, what: str, tmp_path: Path) -> None:
    expected = gpt()
    trainer(expected, callbacks=[Stop(5)]).fit()

    model = gpt()
    loss = Faulty(6, what)
    failing = trainer(model, loss=loss, check_every=check_every, folder=tmp_path)
    with pytest.raises(pl.PeftliteError, match=r"at step 6 .* stays as after step 5"):
        failing.fit()
    assert same(values(expected), values(model))
    assert all(p.grad is None for p in model.parameters())
    saved = load_file(tmp_path / "not-finite-00000006.safetensors")
    ((expected_batch, _),) = Loader(texts(), 4, collate, CPU, seed=0).micro_batches(5)
    for key, tensor in expected_batch.items():
        assert torch.equal(saved[f"[0]['{key}']"], tensor)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 6  # before training, and 5 steps


class Stop:
    """Stops after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def start(self, trainer: Any, _: Any) -> None:
        self.trainer = trainer

    def event(self, event: Any) -> None:
        if event["step"] == self.step:
            self.trainer.stop()

    def end(self, _: Any) -> None: ...


class Faulty:
    """A loss that goes wrong with the batch of a step, whenever that comes."""

    def __init__(self, step: int, what: str) -> None:
        ((bad, _),) = Loader(texts(), 4, collate, CPU, seed=0).micro_batches(step - 1)
        self.bad, self.what = bad["input_ids"], what

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        found = losses.causal_lm(model, batch)
        loss = found["loss"]
        if model.training and torch.equal(batch["input_ids"], self.bad):
            wrong = loss * float("nan") if self.what == "loss" else (loss - loss.detach()).sqrt()
            loss = loss + wrong
        return {**found, "loss": loss}


def test_looking_seldom_changes_nothing() -> None:
    found = []
    for check_every in (1, 4):
        model = gpt()
        history = trainer(model, check_every=check_every, valid_every=2).fit()
        found.append((values(model), timeless(history)))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]


# -- what is left to it


def test_numbers_go_by_the_size_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    given = trainer(epochs="auto", batch_size="auto")
    settings = given.settings()
    assert (settings["epochs"], settings["batch_size"], given.total_steps) == (9, 1, 108)
    trainer(epochs=1, batch_size="auto", progress=True).fit()
    assert "lr_multiplier" in capsys.readouterr().out


# -- with data, and with other libraries


def test_packed_chats_are_the_same_chats() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    said = [{"prompt": word, "response": " ".join(words[: i + 1])} for i, word in enumerate(words)]
    data = pl.data.pairs(said)
    found = []
    for train in (data, data.pack(96)):
        model = llama(512)
        pl.attach(model, pl.LoRA(rank=2), "sql")
        history = trainer(model, train=train, val=train, epochs=1, batch_size=len(train)).fit()
        found.append((values(model), history.events[-1]))
    for key, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], value, rtol=1e-3, atol=1e-4)
    for name in ("full_valid_loss", "train_mean_token_accuracy"):
        assert found[0][1][name] == pytest.approx(found[1][1][name], rel=1e-4)


class Asked(TorchDispatchMode):
    """Counts what makes the host wait for a device: a tensor's value."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_device_is_asked_nothing_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, looks, flush = Asked(), [], Log.flush

    def look(log: Log, **more: Any) -> None:
        before = asked.count
        flush(log, **more)
        looks.append(asked.count - before)
        asked.count = before

    monkeypatch.setattr(Log, "flush", look)
    given = trainer(train=texts(48), val=None, epochs=1, check_every=5, accumulate=2)
    with asked:
        given.fit()
    assert looks == [0, 5, 5, 2] and asked.count == 3  # was all sound? after 5, 10 and 12 steps


def test_a_dataset_may_have_an_order_and_epochs() -> None:
    class Curriculum(list[Any]):
        epochs: ClassVar[list[int]] = []

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def order(self, generator: torch.Generator) -> list[int]:
            return sorted(range(len(self)), key=lambda i: len(self[i]["input_ids"]))

        def __getitem__(self, i: Any) -> Any:
            self.epochs.append(getattr(self, "epoch", 0))
            return super().__getitem__(i)

    data = Curriculum(texts())
    lengths = []

    def loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        if model.training:
            lengths.append(batch["input_ids"].shape[1])
        return losses.causal_lm(model, batch)

    trainer(train=data, val=data, loss=loss, epochs=2).fit()
    assert lengths[:3] == sorted(lengths[:3]) == lengths[3:]
    assert data.epochs[-12 - 4 :][:4] == [1] * 4 and data.epochs[-12:] == [0] * 12

"""Preferences on models: policy and reference in one forward, and what is learned of pairs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlite as pl
from peftlite.train.preference import told
from tests.train.chats import llama
from tests.train.tiny import gpt, timeless, trainer, values

ROWS = [
    {"prompt": f"{n} is ", "chosen": "even" if n % 2 == 0 else "odd", "rejected": "prime!"}
    for n in range(8)
]
PAIRS = pl.data.preference(ROWS, lambda text: list(text.encode()))
RATINGS = pl.data.ratings(
    [{"prompt": r["prompt"], "response": r[side], "rating": side == "chosen"}
     for r in ROWS for side in ("chosen", "rejected")],
    lambda text: list(text.encode()),
)  # fmt: skip
HEADED = [pl.LoRA(rank=2), pl.ScalarHead()]


def drawn(model: nn.Module, name: str = "sql") -> nn.Module:
    """A model whose delta has changed it."""
    torch.manual_seed(1)
    for parameter in pl.deltas(model)[name].parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def plain(model: nn.Module, batch: dict[str, Tensor], names: Any) -> Tensor:
    """log π of the labels, from all logits, by a forward of its own."""
    with pl.using(model, names):
        logits = getattr(out := model(batch["input_ids"]), "logits", out)[:, :-1]
    labels = batch["labels"][:, 1:]
    log_p = F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return log_p * (labels != -100)


class Capped(nn.Module):
    """A model that does more to its logits."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 30 * torch.tanh(self.inner(x) / 30)


def models() -> dict[str, nn.Module]:
    hf = llama()
    pl.attach(hf, pl.LoRA(rank=2), "sql")
    on_head = gpt(pl.LoRA(rank=2, targets=["q_proj", "lm_head"]))
    capped = Capped(gpt())
    return {"gpt": gpt(), "llama": hf, "head": on_head, "capped": capped}


@pytest.mark.parametrize("name", ["gpt", "llama", "head", "capped"])
@pytest.mark.parametrize("reference", [None, "other"])
def test_policy_and_reference_are_those_of_a_forward_each(name: str, reference: Any) -> None:
    model = models()[name].eval()
    root = model.inner if name == "capped" else model
    pl.attach(root, pl.LoRA(rank=1, targets="q_proj"), "other")
    pl.use(root, "sql")
    drawn(drawn(root), "other")
    batch = pl.data.collate(PAIRS[:3])
    found = told.tell(model, batch, reference)
    torch.testing.assert_close(
        found.reference, plain(model, batch, reference), rtol=1e-4, atol=1e-5
    )
    expected = plain(model, batch, "sql")
    torch.testing.assert_close(found.logps, expected, rtol=1e-4, atol=1e-5)
    parameters = [*pl.deltas(root)["sql"].parameters()]
    weights = torch.randn_like(expected)
    own = torch.autograd.grad((found.logps * weights).sum(), parameters)
    for a, b in zip(own, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert told._head(model, batch) is (None if name == "capped" else root.lm_head)
    assert "forward" not in vars(root.lm_head) and not found.reference.requires_grad


def test_both_go_through_one_call_of_the_model() -> None:
    model, calls = gpt(), []
    model.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    told.tell(model, (batch := pl.data.collate(PAIRS[:2])), None)
    told.tell(model, batch, None)
    assert calls == [1, 8, 8]  # the first looks whether anything comes after the head


@pytest.mark.parametrize("loss", [
    pl.losses.dpo(), pl.losses.dpo({"sigmoid": 1.0, "sft": 0.1}, ld_alpha=0.5), pl.losses.orpo(),
    pl.losses.cpo("simpo", beta=2.0, nll=0.0), pl.losses.kto(), pl.losses.dpo(reference="sql"),
], ids=["dpo", "mixed", "orpo", "simpo", "kto", "of a delta"])  # fmt: skip
def test_what_was_chosen_becomes_likelier(loss: Any) -> None:
    model = gpt(pl.LoRA(rank=4))
    delta = "sql"
    if getattr(loss, "reference", None) == "sql":
        pl.attach(model, pl.LoRA(rank=4), delta := "new")
    data = RATINGS if isinstance(loss, pl.losses.kto) else PAIRS
    history = trainer(model, train=data, val=None, loss=loss, epochs=6, batch_size=8, lr=2e-2).fit()
    batch = pl.data.collate(PAIRS[:])
    with torch.no_grad():
        chosen, rejected = plain(model, batch, delta).sum(-1).chunk(2)
        before = plain(model, batch, None).sum(-1).chunk(2)
    assert (chosen - rejected).mean() > (before[0] - before[1]).mean() + 0.2
    assert history.events[-1]["train_loss"] < history.events[1]["train_loss"]


def test_nothing_is_dropped_out() -> None:
    model, batch = gpt(pl.LoRA(rank=2, dropout=0.5)), pl.data.collate(PAIRS[:])
    drawn(model).train()
    first, second = (pl.losses.dpo()(model, batch)["loss"] for _ in range(2))
    assert torch.equal(first, second) and all(m.training for m in model.modules())


def test_it_goes_on_to_the_bit(tmp_path: Any) -> None:
    given = {"train": PAIRS, "val": PAIRS[:4], "loss": pl.losses.dpo(), "save_every": 1}
    whole = trainer(first := gpt(), **given).fit()
    part = trainer(second := gpt(), folder=tmp_path, **given)
    part.callbacks = [Stopping(part, 3)]
    part.fit()
    rest = trainer(second := gpt(), folder=tmp_path, **given).fit(resume=True)
    assert timeless(rest) == timeless(whole)
    for key, value in values(first).items():
        assert torch.equal(value, values(second)[key])


class Stopping(pl.Callback):
    def __init__(self, trainer: pl.Trainer, after: int):
        self.trainer, self.after = trainer, after

    def event(self, event: Any) -> None:
        if event["step"] == self.after:
            self.trainer.stop()


# -- rewards


def test_a_reward_model_learns_of_pairs() -> None:
    model = gpt(HEADED)
    given = {"train": PAIRS, "val": PAIRS, "loss": pl.losses.reward(centre=0.01)}
    history = trainer(model, epochs=6, batch_size=8, lr=2e-2, **given).fit()
    assert history.events[0]["full_valid_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert history.events[-1]["full_valid_reward_accuracy"] == 1


def test_a_reward_is_that_of_the_last_token_however_it_is_padded() -> None:
    model = drawn(gpt(HEADED)).eval()
    rows = [example["chosen"] for example in PAIRS]
    together = told.last_scalars(model, pl.data.collate(rows))
    apart = [told.last_scalars(model, pl.data.collate([row])) for row in rows]
    torch.testing.assert_close(together, torch.cat(apart))


def test_a_scalar_head_is_its_equation() -> None:
    model = drawn(gpt(pl.ScalarHead())).eval()
    ids = torch.randint(128, (2, 5))
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda _m, _i, h: seen.append(h))
    (placed,) = pl.deltas(model)["sql"].placed.values()
    y = model(ids)
    torch.testing.assert_close(y, seen[0] @ placed.patch.weight.T + placed.patch.bias)
    assert pl.plan(gpt(), pl.ScalarHead()).addresses == ["lm_head()"]

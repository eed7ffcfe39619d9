"""The ready-made losses: against their definitions, and transformers' own."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftlite as pl
from peftlite.train import losses
from peftlite.train.data import collate
from tests.train.tiny import gpt, texts


def llama(vocabulary: int = 128) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=16, intermediate_size=32,
                         num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    return LlamaForCausalLM(config)


def test_causal_lm_is_that_of_transformers() -> None:
    model, batch = llama(), collate(texts())
    found = losses.causal_lm(model, batch)
    torch.testing.assert_close(found["loss"], model(**batch).loss)
    assert found["count"] == (batch["labels"][:, 1:] != -100).sum()


def test_causal_lm_counts_what_is_right() -> None:
    model, batch = gpt(), collate(texts())
    found = losses.causal_lm(model, batch)
    predicted = model(batch["input_ids"])[:, :-1].argmax(-1)
    assert found["correct"] == (predicted == batch["labels"][:, 1:]).sum()


def test_a_model_without_a_mask_needs_none_of_padding_on_the_right() -> None:
    model, examples = gpt(pl.LoRA(rank=2)), texts()
    together = losses.causal_lm(model, collate(examples))
    apart = [losses.causal_lm(model, collate([each])) for each in examples]
    total = sum(each["loss"] * each["count"] for each in apart)
    torch.testing.assert_close(together["loss"], total / together["count"])


def test_a_mask_that_does_more_than_pad_is_not_left_out() -> None:
    batch = collate(texts())
    batch["attention_mask"] = torch.zeros(12, 1, 4, 4)
    with pytest.raises(pl.PeftliteError, match="the model takes no 'attention_mask'"):
        losses.causal_lm(gpt(), batch)


class Given(nn.Module):
    """A model that gives what it is given."""

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return x


@given(st.integers(1, 4), st.integers(2, 5), st.booleans(), st.floats(0, 0.5), st.integers(0, 99))
def test_classification(b: int, classes: int, weighted: bool, smoothing: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits, labels = torch.randn(b, 3, classes), torch.randint(classes, (b, 3))
    labels[0, 0] = -100
    weight = torch.rand(classes) + 0.1 if weighted else None
    kind = partial(losses.classification, weight=weight, label_smoothing=smoothing)
    found = kind(Given(), (logits, labels))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight,
                               label_smoothing=smoothing)  # fmt: skip
    torch.testing.assert_close(found["loss"], expected)
    assert 0 <= found["correct"] <= found["count"] * 1.0001


def test_no_labels_make_no_loss() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    found = losses.classification(Given(), (logits, torch.full((2,), -100)))
    found["loss"].backward()
    assert found["loss"] == 0 == found["count"] and not logits.grad.any()


def test_regression() -> None:
    x, y = torch.randn(4, 1), torch.randn(4)
    found = losses.regression(Given(), (x, y))["loss"]
    torch.testing.assert_close(found, ((x[:, 0] - y) ** 2).mean())


def test_contrastive() -> None:
    q, k = torch.randn(5, 8), torch.randn(5, 8)
    found = losses.contrastive(Given(), (q, k), scale=7)
    cos = F.cosine_similarity(q[:, None], k[None], dim=-1)
    torch.testing.assert_close(found["loss"], F.cross_entropy(7 * cos, torch.arange(5)))
    assert found["correct"] == (cos.argmax(1) == torch.arange(5)).sum()


def test_contrastive_averages_what_is_there() -> None:
    class Encoder(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return F.one_hot(input_ids, 8).float()

    def side(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids, "attention_mask": mask}

    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    changed = ids.masked_fill(mask == 0, 7)
    q, k = side(ids, mask), side(changed, mask)
    assert losses.contrastive(Encoder(), (q, k)) == losses.contrastive(Encoder(), (q, q))


@pytest.mark.parametrize("causal", [True, False])
def test_distillation_is_its_definition(causal: bool) -> None:
    student, teacher = gpt(dtype=torch.float64).eval(), gpt(dtype=torch.float64).eval()
    pl.use(teacher, None)
    for parameter in pl.deltas(student)["sql"].parameters():
        nn.init.normal_(parameter)
    batch = collate(texts())
    kind = partial(losses.distillation, temperature=3.0, share=0.25, causal=causal)
    found = kind(student, batch, teacher=teacher)
    labels = batch["labels"][:, 1:] if causal else batch["labels"]
    kept = slice(None, -1) if causal else slice(None)
    p, q = (m(batch["input_ids"])[:, kept][labels != -100] for m in (teacher, student))
    p3, q3 = (F.softmax(z / 3, -1) for z in (p, q))
    kl = (p3 * (p3.log() - q3.log())).sum(-1).mean()
    expected = 0.75 * F.cross_entropy(q, labels[labels != -100]) + 0.25 * 9 * kl
    torch.testing.assert_close(found["loss"], expected)
    # the base is that very teacher
    torch.testing.assert_close(kind(student, batch, teacher=None)["loss"], expected)


def test_a_teacher_drops_nothing_and_gets_no_gradients() -> None:
    model = gpt(pl.LoRA(rank=2, dropout=0.5))
    pl.attach(model, pl.LoRA(rank=2, dropout=0.5), "big")
    for parameter in pl.deltas(model)["big"].parameters():
        nn.init.normal_(parameter)
    pl.use(model, "sql")
    model.train()
    seen = []
    output = model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    loss = partial(losses.distillation, teacher="big", share=1.0)
    for _ in range(2):
        loss(model, collate(texts()))["loss"].backward()
    output.remove()
    assert torch.equal(seen[0], seen[2]) and all(m.training for m in model.modules())
    assert all(p.grad is None for p in pl.deltas(model)["big"].parameters())
    assert any(p.grad is not None for p in pl.deltas(model)["sql"].parameters())


@pytest.mark.parametrize("form", [lambda z: (z, None), lambda z: type("Out", (), {"logits": z})()])
def test_the_forms_of_an_output(form: Any) -> None:
    class Formed(Given):
        def forward(self, x: Tensor, *rest: Tensor) -> Any:
            return form(x)

    batch = torch.randn(2, 3), torch.tensor([0, 2])
    assert losses.classification(Formed(), batch) == losses.classification(Given(), batch)

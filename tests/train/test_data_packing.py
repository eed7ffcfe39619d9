"""Packing and collating: a packed example is as it is alone, in a model of transformers too."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import peftlite.train.data as data
from peftlite.train.data.packing import fill
from tests.train.chats import hf_tokenizer, llama, rows
from tests.zoo import seeded

MODELS = {
    "llama sdpa": lambda: llama(attn_implementation="sdpa"),
    "llama eager": lambda: llama(attn_implementation="eager"),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=600, n_positions=512, n_embd=32, n_layer=2, n_head=2)
    ).eval(),
}


def chats(length: int = 120) -> data.Data:
    return data.chat(rows()[:12], hf_tokenizer(data.CHATML), max_length=length)


def alone(model: Any, examples: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    return [model(input_ids=example["input_ids"][None]).logits[0] for example in examples]


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over the labels, each predicted from what comes before it."""
    return F.cross_entropy(logits[:-1], labels[1:], reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_examples_have_the_logits_they_have_alone(name: str, dtype: torch.dtype) -> None:
    with seeded():
        model = MODELS[name]().to(dtype)
    examples = chats()
    blocks = examples.pack(400)
    assert max(map(len, blocks.blocks)) >= 3
    batch = data.collate(list(blocks), multiple=64)
    got = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    for block, logits in zip(blocks.blocks, got, strict=True):
        want = torch.cat(alone(model, [examples[i] for i in block]))
        torch.testing.assert_close(
            logits[: len(want)], want, rtol=0, atol=5e-6 if dtype == torch.float32 else 0.02
        )


@torch.no_grad()
def test_without_the_mask_a_model_goes_by_positions() -> None:
    model, examples = llama(), chats()
    batch = data.collate(list(examples.pack(400)), mask=False)
    assert "attention_mask" not in batch
    batch.pop("labels")
    got = model(**batch, use_cache=False).logits
    want = torch.cat(alone(model, [examples[i] for i in examples.pack(400).blocks[0]]))
    torch.testing.assert_close(got[0, : len(want)], want, rtol=0, atol=5e-6)
    # why the mask is the default: with its cache on, the model lets examples see one another
    mixed = model(**batch).logits
    assert (mixed[0, : len(want)] - want).abs().max() > 0.01


@torch.no_grad()
def test_packed_loss_is_the_loss_alone() -> None:
    model, examples = llama(), chats()
    batch = data.collate(list(examples.pack(400)))
    labels = batch.pop("labels")
    packed = sum(loss(*pair) for pair in zip(model(**batch).logits, labels, strict=True))
    apart = [loss(y, e["labels"]) for y, e in zip(alone(model, examples), examples, strict=True)]
    torch.testing.assert_close(packed, sum(apart), rtol=1e-5, atol=0)


def test_the_first_token_is_never_learned_from_another_example() -> None:
    texts = data.text(["abc", "de", "f"])
    (block,) = texts.pack(16)
    assert block["input_ids"].tolist() == [97, 98, 99, 257, 100, 101, 257, 102, 257]
    assert block["labels"].tolist() == [-100, 98, 99, 257, -100, 101, 257, -100, 257]
    assert block["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert texts[0]["labels"][0] == 97  # the example itself is as it was


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_first_fit_decreasing(sizes: list[int], length: int) -> None:
    room: list[int] = []
    want: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [k for k, left in enumerate(room) if left >= sizes[i]]
        if not fits:
            room, want, fits = [*room, length], [*want, []], [len(room)]
        want[fits[0]].append(i)
        room[fits[0]] -= sizes[i]
    assert fill(sizes, length) == [sorted(block) for block in want]


def test_real_chats_fill_their_blocks() -> None:
    every = data.chat(rows(), hf_tokenizer(data.CHATML), max_length=512)
    blocks = every.pack(1024)
    assert len(blocks) == -(-sum(every.lengths) // 1024)  # no packing has fewer
    assert blocks.efficiency == sum(every.lengths) / (len(blocks) * 1024)
    assert sorted(i for block in blocks.blocks for i in block) == list(range(len(every)))
    assert sorted(blocks.order()) == list(range(len(blocks)))
    assert len(blocks[1:3]) == 2
    assert torch.equal(blocks[1:3][0]["input_ids"], blocks[1]["input_ids"])
    assert str(blocks) == f"Blocks({len(blocks)} of 1024 tokens, {blocks.efficiency:.1%} full)"


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from(["left", "right"]),
    st.integers(1, 7),
)  # fmt: skip
def test_padding_hides_nothing_and_adds_nothing(lengths: list[int], side: Any, by: int) -> None:
    examples = [
        {"input_ids": torch.arange(1, t + 1), "labels": torch.arange(t), "weight": torch.rand(t, 2)}
        for t in lengths
    ]
    batch = data.collate(examples, pad=77, side=side, multiple=by)
    b, t = batch["input_ids"].shape
    assert b == len(lengths) and t % by == 0 and max(lengths) <= t < max(lengths) + by
    for i, example in enumerate(examples):
        kept = batch["attention_mask"][i].bool()
        assert kept.sum() == lengths[i]
        assert kept[-1 if side == "left" else 0]
        for key, x in example.items():
            assert torch.equal(batch[key][i][kept], x)
        assert (batch["input_ids"][i][~kept] == 77).all()
        assert (batch["labels"][i][~kept] == -100).all()
        assert (batch["weight"][i][~kept] == 0).all()


@torch.no_grad()
def test_padded_examples_have_the_logits_they_have_alone() -> None:
    model, examples = llama(), chats()
    batch = data.collate(list(examples), multiple=32)
    batch.pop("labels")
    for logits, want in zip(model(**batch).logits, alone(model, examples), strict=True):
        torch.testing.assert_close(logits[: len(want)], want, rtol=0, atol=5e-6)


def test_labels_of_classes_are_stacked() -> None:
    examples = [{"input_ids": [1, 2, 3], "labels": 1}, {"input_ids": [1], "labels": 0}]
    batch = data.collate(examples)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_anything_else_is_torchs() -> None:
    x, y = data.collate([(torch.ones(3), 1), (torch.zeros(3), 0)])
    assert x.shape == (2, 3) and y.tolist() == [1, 0]
    assert data.collate([{"x": torch.ones(2)}] * 4)["x"].shape == (4, 2)


def test_loaders_of_torch_take_data() -> None:
    loader = DataLoader(chats(), batch_size=4, collate_fn=partial(data.collate, pad=1))
    assert [len(batch["labels"]) for batch in loader] == [4, 4, 4]

"""Pairs of answers and ratings: the rows that people have, the batches they make, the validator."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftlite as pl
from tests.train.chats import hf_tokenizer, write

ASKS, MORE = {"role": "user", "content": "a"}, {"role": "user", "content": "d"}
GOOD, BAD = ({"role": "assistant", "content": x} for x in "bc")
TEXTS = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHATS = {"prompt": [ASKS], "chosen": [GOOD], "rejected": [BAD]}
LONG = {"prompt": [ASKS, GOOD, MORE], "chosen": [GOOD], "rejected": [BAD]}

FORMS = [
    ({"chosen": [ASKS, GOOD], "rejected": [ASKS, BAD]}, CHATS),  # trl's, the prompt in both
    ({"prompt": "a", "chosen": [ASKS, GOOD], "rejected": [ASKS, BAD]}, CHATS),  # UltraFeedback's
    ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, CHATS),
    ({"messages": [ASKS], "chosen": "b", "rejected": "c"}, CHATS),
    ({"input": {"messages": [ASKS], "tools": []}, "preferred_output": [GOOD],
      "non_preferred_output": [BAD]}, CHATS),  # OpenAI's
    ({"messages": [ASKS, GOOD, MORE], "chosen": [GOOD], "rejected": [BAD]}, LONG),
    ({"chosen": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
      "rejected": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]}, CHATS),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
     {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"}),  # Anthropic's
]  # fmt: skip


@pytest.mark.parametrize(("row", "ours"), FORMS)
def test_rows_of_other_forms_are_read(row: Any, ours: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row] * 2)
    for source in (path, [row] * 2):
        (found, _), (want, _) = pl.data.preference(source), pl.data.preference([ours] * 2)
        for side in ("chosen", "rejected"):
            assert torch.equal(found[side]["input_ids"], want[side]["input_ids"])
            assert torch.equal(found[side]["labels"], want[side]["labels"])
    report = pl.data.validate(path).train
    assert report.examples == 4 and {p.kind for p in report.problems} == {"too few", "duplicate"}


def test_the_answer_is_learned_and_nothing_before_it() -> None:
    (example,) = pl.data.preference([LONG])
    chosen = example["chosen"]
    learned = chosen["labels"][chosen["labels"] != -100]
    assert pl.data.ByteTokenizer().decode(learned) == "b" and len(learned) == 2  # and its end
    (text,) = pl.data.preference([TEXTS])
    assert (text["chosen"]["labels"] != -100).tolist() == [False, True, True]


def test_chats_go_through_the_tokenizers_template() -> None:
    tokenizer = hf_tokenizer(pl.data.CHATML)
    (example,) = pl.data.preference([CHATS], tokenizer)
    whole = tokenizer.apply_chat_template([ASKS, GOOD])
    whole = whole if isinstance(whole, list) else whole["input_ids"]
    assert example["chosen"]["input_ids"].tolist() == whole


def test_a_batch_has_those_chosen_first() -> None:
    rows = [{**TEXTS, "chosen": "bb", "margin": 2}, {"prompt": "x", "chosen": "y", "rejected": "z"}]
    batch = pl.data.collate(pl.data.preference(rows)[:])
    decoded = [pl.data.ByteTokenizer().decode(ids) for ids in batch["input_ids"]]
    assert [text.rstrip("\0") for text in decoded] == ["abb", "xy", "ac", "xz"]
    assert batch["margin"].tolist() == [2, 0] and batch["attention_mask"].sum().item() == 13
    assert pl.data.preference(rows).lengths == [4, 3]


@pytest.mark.parametrize("label", [True, 1, 0.5])
def test_ratings(label: Any, tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "label": label}
    path = write(tmp_path / "rows.jsonl", [row, {**row, "label": False}])
    batch = pl.data.collate(pl.data.ratings(path)[:])
    assert batch["rating"].tolist() == [float(label), 0]
    chat = {"prompt": [ASKS], "completion": [GOOD], "label": label}
    (example,) = pl.data.ratings([chat])
    assert torch.equal(example["input_ids"], pl.data.preference([CHATS])[0]["chosen"]["input_ids"])


def test_every_problem_has_its_line(tmp_path: Path) -> None:
    rows = [TEXTS, {**TEXTS, "rejected": "b"}, {"prompt": "a", "chosen": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    report = pl.data.validate(path, max_length=2).train
    found = {(p.line, p.kind) for p in report.problems}
    assert {(2, "equal answers"), (3, "rejected"), (1, "too long")} <= found


def test_a_stream_of_pairs() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([TEXTS] * 3)

    assert len([*pl.data.preference(Endless(), max_length=8)]) == 3

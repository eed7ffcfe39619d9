"""The errors of training's data, and of the commands on it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Generator

import peftlite as pl
import peftlite.train.data as data
from peftlite.commands import local
from peftlite.commands.questions import questions
from peftlite.train.data import augment
from peftlite.train.data.packing import fill
from tests.errors.case import Case, linears
from tests.train.chats import hf_tokenizer, llama


def on(act: Callable[[], Any], says: str) -> Case:
    return Case(lambda *_: act(), says, model=linears)


def of_file(says: str, lines: list[str]) -> Case:
    def write(path: Path) -> None:
        path.write_text("".join(f"{line}\n" for line in lines))

    return Case(lambda _, path: data.chat(path), says, pl.FileError, linears, write)


def changed(_: Any, path: Path) -> Any:
    every = data.pairs(path)
    every.rows._stamp = None  # type: ignore
    return every[0]


NUMBERED = data.Data([{"n": i, "x": torch.zeros(2)} for i in range(4)])
LAST = {"role": "user", "content": "a"}
FORGETFUL = "{{ messages | length }} messages"


def chat(template: str | None) -> Any:
    rows = [{"messages": [LAST, {"role": "assistant", "content": "b"}]}] * 2
    return data.chat(rows, hf_tokenizer(template))[0]


CASES = [
    Case(lambda _, path: data.chat(path), "'…' can't be read: No such file or directory",
         pl.FileError, linears),
    of_file("'…' has problems: line 1: no JSON at column 1: Expecting value; line 2: 'messages' is "
            "3, not a list of messages", ["x", '{"messages": 3}']),
    Case(changed, "'…' has changed since it was read: read it again", pl.FileError, linears,
         lambda path: path.write_text(json.dumps({"prompt": "a", "response": "b"}))),
    on(lambda: data.chat(8), "give the path of a JSONL file, or a list of rows: not 8"),
    on(lambda: data.chat([{"messages": [LAST]}, "a"]), "the rows have problems: row 0: the "
       "last message is of 'user', not the assistant's; row 1: it is 'a', no dict"),
    on(lambda: data.pairs([("a", "b"), ("a",)]), "the rows have problems: row 1: it is "
       "('a',), no dict"),
    on(lambda: data.text([{"txt": "a"}]), "the rows have problems: row 0: there is no 'text': the "
       "keys are 'txt'"),
    on(lambda: data.text({"train": ["a"], "test": ["b"]}), "give one of the parts, source[name]: "
       "it has 'train'; 'test'"),
    on(lambda: data.pairs(iter([("a", "b")])), "source is a list_iterator, which can be gone "
       "through only once: give a list of it, or an object whose __iter__ begins anew"),
    on(lambda: [*data.pairs({("a", "b"): 1, "c": 2}.keys())], "row 1: it is 'c', no dict"),
    on(lambda: data.chat([], max_length=0), "max_length must be a whole number from 1 up, not 0"),
    # tokenizers
    on(lambda: data.as_tokenizer(8), "a tokenizer is one of transformers', a function from a text "
       "to ids, or None for bytes: not 8"),
    on(lambda: chat(None), "row 0: this tokenizer has no chat template: set "
       "tokenizer.chat_template, for one to pl.data.CHATML"),
    on(lambda: chat("{{ raise_exception('no') }}"), "row 0: the chat template refuses these "
       "messages: no"),
    on(lambda: chat(FORGETFUL), "row 0: the chat template writes the beginning of a chat "
       "otherwise when it goes on, so which ids of message 2 are the assistant's can't be told: "
       "put {% generation %} … {% endgeneration %} around them in tokenizer.chat_template, or give "
       "assistant_only=False"),
    # parts, orders, blocks
    *(on(lambda shares=shares: NUMBERED.split(*shares), "give the shares to take out, such as 0.1, "
         f"together less than 1: not {shares}") for shares in ((), (0.0,), (0.5, 0.5), (-0.1,))),
    on(lambda: NUMBERED.split(0.1), "shares of (0.1,) of 4 examples leave a part empty: the "
       "smallest of 4 groups has 1; give other shares, or more examples"),
    on(lambda: NUMBERED.split(0.5, group="user"), "row 0 has no field 'user'"),
    on(lambda: NUMBERED.split(0.5, group=[1, 2]), "there are 4 examples, and 2 values for them"),
    on(lambda: NUMBERED.curriculum(lambda row: [row["n"]]), "a key's values are texts, numbers or "
       "tuples of them: not [0]"),
    on(lambda: NUMBERED.curriculum("n", stages=2.5), "stages must be a whole number from 1 up, not "  # type: ignore
       "2.5"),
    on(lambda: NUMBERED.augment(augment.Noise()).pack(8), "augmented examples have other lengths "
       "in each epoch: pack those that aren't"),
    on(lambda: fill([3, 9], 8), "example 1 has 9 tokens, and a block 8: read the data with "
       "max_length=8, or pack longer blocks"),
    on(lambda: data.Data([{"input_ids": torch.zeros(3), "label": 1}]).pack(8)[0], "examples with "
       "'label', which isn't one per token, can't be packed"),
    on(lambda: data.collate([{"input_ids": [1]}], multiple=0), "multiple must be a whole number "
       "from 1 up, not 0"),
    on(lambda: data.collate([{"input_ids": [1]}], side="start"),  # type: ignore
       "side must be one of 'right', 'left', not 'start'"),
    # the commands
    Case(lambda _, path: local.model(str(path)),
         "there is no folder '…' of a model, as save_pretrained leaves one", pl.FileError, linears),
    Case(lambda _, path: local.model(str(path.parent)), "'…' can't be read by transformers: …",
         pl.FileError, linears),
    Case(lambda _, path: local.tokenizer(str(path)), "'…' has no tokenizer: "
         "tokenizer.save_pretrained('…') puts one there", pl.FileError, linears,
         lambda path: llama().save_pretrained(path)),
    on(mock.patch.dict(sys.modules, transformers=None)(lambda: local.tokenizer("base")),
       "this needs transformers: pip install transformers"),
    Case(lambda _, path: list(questions(str(path))), "'…' can't be read as text: …", pl.FileError,
         linears, lambda path: path.write_bytes(b"\xff")),
    # weights and augmentations
    on(lambda: data.collate([{"x": torch.ones(1)}, {"x": torch.ones(2)}]), "what has no input_ids "
       "is stacked as it is, and here …: give a collate"),
    on(lambda: data.collate([{"input_ids": [1], "text": "a"}] * 2), "'text' is 'a' in the first "
       "example of a batch, and such can't be put together as numbers of one shape: leave it out "
       "of the examples, or give a collate"),
    on(lambda: data.collate([{"x": None}]), "what has no input_ids is stacked as it is, and …"),
    on(lambda: data.collate([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}]), "the "
       "examples of a batch have the same fields, not input_ids, labels and input_ids"),
    on(lambda: data.class_weights([0, 1, -1]), "labels are whole numbers from 0 up, or -100: not "
       "[0, 1, -1]"),
    on(lambda: data.class_weights([0, 1], how="log"),  # type: ignore
       "how must be one of 'inverse', 'effective', not 'log'"),
    on(lambda: data.class_weights([0, 1], beta=1.0), "beta must be in [0, 1), not 1.0"),
    on(lambda: data.class_weights([0, 3], 3), "there are labels up to 3, and 3 classes"),
    on(lambda: data.class_weights([0, 3]), "no example has the labels [1, 2], so they can't be "
       "weighed"),
    on(lambda: augment.Crop((3,))(torch.zeros(2), Generator()), "a window of 3 can't be cropped "
       "out of 2"),
    on(lambda: augment.Mixup()({"y": torch.zeros(2).long()}, Generator()), "'y' is torch.int64 and "
       "can't be mixed: give labels as nn.functional.one_hot(labels, classes).float()"),
]  # fmt: skip

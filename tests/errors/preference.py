"""The errors of learning from preferences: losses, their data, and what samples."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

import peftlite as pl
from peftlite.train import data
from peftlite.train.preference import sampling
from tests.errors.case import SMALL, Case, bare, linears, two

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
GOOD = {"prompt": "a", "response": "b", "rating": True}
MESSAGE = {"role": "user", "content": "a"}
SAID = {"role": "assistant", "content": "b"}


def on(act: Callable[[], Any], says: str) -> Case:
    return Case(lambda *_: act(), says, model=linears)


def of_rows(read: Any, rows: list[Any], what: str, **options: Any) -> Case:
    return on(lambda: read(rows, **options), f"the rows have problems: {what}")


class Passes:
    """Rows that can be gone through again."""

    def __init__(self, rows: list[Any]):
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def pairs(count: int = 2) -> Any:
    return data.collate(data.preference([PAIR] * count)[:])


def ratings() -> Any:
    return data.collate(data.ratings([GOOD] * 2)[:])


def measuring(loss: Any, batch: Callable[[], Any]) -> Callable[[Any, Path], Any]:
    def act(model: nn.Module, _: Path) -> Any:
        small = {k: v % 8 if k == "input_ids" else v for k, v in batch().items()}
        return loss(model, small)

    return act


def kept() -> Any:
    """Pairs with a reference, of whatever numbers."""
    batch = pairs()
    return {**batch, "reference": torch.zeros(batch["input_ids"].shape)}


def both() -> nn.Module:
    pl.use(model := two(), ["sql", "chat"])
    return model


def moved(model: nn.Module, _: Path) -> None:
    pl.losses.moving(pl.losses.dpo(), every=1).after_step(model)


def of_file(says: str, *rows: Any) -> Case:
    def write(path: Path) -> None:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    return Case(lambda _, path: data.preference(path), says, pl.FileError, linears, write)


def online(reward: Any = None, prompts: Any = ("a", "b"), **options: Any) -> Any:
    def act(model: nn.Module, _: Path) -> Any:
        given = {"tokenizer": Lines(), "max_new_tokens": 2, "batch_size": 2, "progress": False}
        scores = reward or (lambda prompts, answers: [0.0] * len(answers))
        return pl.GRPO(
            model, scores, prompts, **{**given, "lr": 1e-3, "epochs": 1, **options}
        ).fit()

    return act


def placed() -> nn.Module:
    """A model of eight places."""
    model: Any = two()
    model.config = SimpleNamespace(max_position_embeddings=8)
    return model


def encoding() -> nn.Module:
    model: Any = two()
    model.config = SimpleNamespace(is_encoder_decoder=True)
    return model


def scoring() -> nn.Module:
    pl.attach(model := bare(), [SMALL, pl.ScalarHead()], "sql")
    return model


class Classifier(nn.Module):
    """One number for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids).sum((1, 2))


def classifying() -> nn.Module:
    pl.attach(model := Classifier(), pl.LoRA(rank=2, targets="table"), "sql")
    return model


class Lines(pl.data.ByteTokenizer):
    end = (1,)
    pad = 0

    def encode(self, text: str | bytes) -> list[int]:
        return [i % 8 for i in super().encode(text)]


class Unknown(Lines):
    def encode(self, text: str | bytes) -> list[int]:
        return list(str(text).encode())


class Endless(Lines):
    end = ()


def of_the_base(run: Any) -> Any:
    def sampled(model: Any, *given: Any) -> Any:
        with pl.using(model, None):
            return run(model, *given)

    return sampled


CASES = [
    # what samples
    Case(online(tokenizer=len), "what is sampled is to be read, and len has no decode: give a "
         "tokenizer of transformers', or pl.data.ByteTokenizer or a class of yours like it",
         model=two),
    Case(online(tokenizer=Endless()), "the tokenizer has no token that ends an answer, nor one to "
         "pad with: set tokenizer.eos_token, or the end of a class of yours", model=two),
    Case(online(temperature=0.0), "temperature must be finite and above 0, not 0.0", model=two),
    Case(online(loss=pl.losses.grpo(temperature=0.5)), "answers are sampled at temperature 1, and "
         "learned of at 0.5: give both the same, above 0", model=two),
    Case(online(loss=pl.losses.dpo()), "loss= is a pl.losses.grpo or pl.losses.rloo, not a "
         "dpo", model=two),
    Case(online(kl=0.1), "kl=0.1 is a part of the reward with pl.losses.rloo; pl.losses.grpo has "
         "it in the loss: give loss=pl.losses.grpo(beta=0.1)", model=two),
    Case(online(reward=3), "a reward is the name of a delta with a ScalarHead, or a function of "
         "two lists, of prompts and of answers: not 3", model=two),
    Case(online(prompts=None), "prompts are a list of texts or chats, not None", model=two),
    Case(online(prompts="ab"), "prompts are a list of texts or chats, not 'ab'", model=two),
    Case(lambda model, _: pl.PPO(model, "sql", ["a"], loss=pl.losses.ppo(value="chat"),
                                 tokenizer=Lines(), max_new_tokens=2),
         "'chat' gives the values, and is chosen as the policy, too: pl.use(model, name) of the "
         "delta that is to answer", model=two),
    Case(lambda model, _: pl.best_of(model, "sql", ["a"], 0), "n must be a whole number from 1 up, "
         "not 0", model=two),
    Case(online(prompts=[]), "prompts are a list of texts or chats, not []", model=two),
    Case(online(batch_size=3), "there are 2 prompts, and a batch has 3: give a batch_size",
         model=two),
    Case(online(prompts=["a", "", 3, "b" * 9]), "the prompts have problems: row 1: it is empty; "
         "row 2: 3 is neither a text nor a list of messages", model=two),
    Case(online(prompts=["a", "b" * 9]), "the prompts have problems: row 1: with an answer "
         "of 2 tokens it has 11, and the model takes 8: leave it out, or give less max_new_tokens",
         model=placed),
    Case(online(val=["a", ""]), "the prompts held out have problems: row 1: it is empty",
         model=two),
    Case(online(val=[]), "val has no examples", model=two),
    Case(online(tokenizer=Unknown()), "the prompts have problems: row 0: its ids go up to 97, and "
         "the model knows …: give its own tokenizer; row 1: …", model=two),
    Case(online(tokenizer=pl.data.ByteTokenizer()), "the tokenizer ends an answer by 257 and pads "
         "by 256, and the model knows ids below …: give its own tokenizer, or set the end and the "
         "pad of a class of yours", model=two),
    Case(online(lambda prompts, answers: [None] * 16), "a reward gives a number for each of 16 "
         "answers, not a list", model=two),
    Case(online(lambda prompts, answers: [0.0]), "a reward gives a number for each of 16 answers, "
         "not [0.0]", model=two),
    Case(online(lambda prompts, answers: [float("nan")] * 16), "the reward of '…', as an answer to "
         "'…', is nan: it has to be finite", model=two),
    Case(mock.patch.object(sampling, "_by_hand", of_the_base(sampling._by_hand))(online()),
         "what sampled isn't what trains: with 'chat' chosen, of digest …, the model ran deltas of "
         "digest …", model=two),
    # a reference that is kept, or moves
    Case(measuring(pl.losses.dpo(reference="sql"), kept), "the batch has its reference's "
         "log-probabilities kept, and the loss names 'sql': leave reference= out, or give the data "
         "as it was", model=two),
    Case(lambda model, _: pl.keep_reference(model, [PAIR]), "what is kept is of answers that stay "
         "as they are, as pl.data.preference and pl.data.ratings have them: not of [{'prompt': …",
         model=two),
    Case(lambda model, _: pl.keep_reference(model, data.preference([PAIR]).augment(len)), "what is "
         "kept is of answers that stay as they are, as pl.data.preference and pl.data.ratings have "
         "them: not of Data(1 examples) that is augmented", model=two),
    on(lambda: pl.losses.moving(pl.losses.orpo()), "the reference that moves is that of "
       "pl.losses.dpo or kto, not orpo(beta=0.1)"),
    Case(measuring(pl.losses.moving(pl.losses.dpo()), kept), "the batch has its reference's "
         "log-probabilities kept, and a reference that moves has others: give the data as it was "
         "before pl.keep_reference", model=two),
    Case(measuring(pl.losses.moving(pl.losses.dpo(), name="sql"), pairs), "a delta named 'sql' is "
         "attached already: choose another name= for the reference, or detach it; what it begins "
         "as, the loss has: dpo(reference=...)", model=two),
    Case(moved, "the reference follows one delta, and 'sql'; 'chat' is chosen: pl.combine them "
         "first", model=both),
    # settings of losses
    on(lambda: pl.losses.dpo(beta=0), "beta must be finite and above 0, not 0"),
    on(lambda: pl.losses.dpo("best"), "no kind 'best': there are sigmoid, hinge, ipo, exo_pair, "
       "nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, "
       "sft, sigmoid_norm"),
    on(lambda: pl.losses.dpo("aot", divergence="forward_kl"), "aot goes by log-ratios, so "
       "divergence='forward_kl' has no meaning there: leave it out"),
    on(lambda: pl.losses.dpo("hinge", label_smoothing=0.1), "label_smoothing is a part of sigmoid, "
       "exo_pair, robust, aot, aot_unpaired, and not of hinge: leave it out"),
    on(lambda: pl.losses.cpo("hinge", label_smoothing=0.1), "label_smoothing is a part of sigmoid, "
       "simpo, and not of hinge: leave it out"),
    *(on(lambda kind=kind: pl.losses.dpo(kind), "kind is a name, or a dict of several with their "
         f'weights, such as {{"sigmoid": 0.8, "sft": 1.0}}: not {kind!r}')
      for kind in (None, {}, ["sigmoid"], {"sft": "x"}, {"sft": float("nan")})),
    on(lambda: pl.losses.dpo("exo_pair"), "exo_pair divides by label_smoothing: give one, such as "
       "1e-3"),
    on(lambda: pl.losses.grpo("best"), "no kind 'best': there are grpo, sapo, bnpo, dapo, cispo, "
       "vespo, dr_grpo, luspo"),
    on(lambda: pl.losses.grpo("dr_grpo"), "dr_grpo divides by the longest answer there could be: "
       "longest="),
    # batches of another kind
    Case(lambda model, _: pl.losses.dpo()(model, (1, 2)), "a loss of preferences takes batches of "
         "pl.data.preference or pl.data.ratings, with 'input_ids' and 'labels': not (1, 2)",
         model=two),
    Case(measuring(pl.losses.dpo(), ratings), "this loss takes pairs, the rows of those chosen "
         "before those rejected: read them by pl.data.preference; for single answers there is "
         "pl.losses.kto", model=two),
    *(Case(measuring(loss, pairs), "this loss goes by sampled answers, and the batch has no "
           f"{name} of any: pl.GRPO and pl.PPO sample and reward them; for pairs there is "
           "pl.losses.dpo",
           model=two)
      for loss, name in ((pl.losses.grpo(), "'advantages'"), (pl.losses.rloo(), "'advantages'"),
                         (pl.losses.ppo(), "'returns'"))),
    Case(measuring(pl.losses.dpo(reference="chat"), pairs), "the reference, 'chat', is the policy "
         "itself, so nothing can be learned: name a frozen delta, or None for the base", model=two),
    Case(measuring(pl.losses.orpo(), pairs), "the policy, or its reference, has a scalar head, "
         "which gives rewards in place of logits: pl.use(model, name) of another delta",
         model=scoring),
    Case(measuring(pl.losses.orpo(), pairs), "a loss of preferences takes prompts and answers as "
         "one text, and this model reads the one by an encoder and writes the other by a decoder: "
         "take a causal language model", model=encoding),
    Case(measuring(pl.losses.orpo(), pairs), "a loss of preferences goes by the logits of every "
         "token, and this model gives (4,) for ids (4, 3): take one that has the head of a "
         "language model", model=classifying),
    Case(measuring(pl.losses.kto(), pairs), "kto takes answers with a rating each: read them by "
         "pl.data.ratings", model=two),
    Case(measuring(pl.losses.causal_lm, pairs), "the batch has answers that are not all to be "
         "learned: give the Trainer a loss of preferences, such as pl.losses.dpo() for pairs or "
         "pl.losses.kto() for ratings", model=two),
    Case(measuring(pl.losses.reward(), pairs), "a reward is one number, and this model gives "
         "(4, 3, …) for (4, 3) tokens: choose a delta with a head of its own, such as "
         "pl.attach(model, [pl.LoRA(), pl.ScalarHead()], name='reward')", model=two),
    Case(measuring(pl.losses.dpo(), pairs), "this model has no deltas; pl.attach or pl.load one "
         "first", model=bare),
    Case(lambda *_: pl.kernels.log_probs(torch.ones(2, 3, 4), torch.nn.Linear(4, 4),
                                         torch.ones(2, 2).long()),
         "h of shape (2, 3, 4) is for labels of shape (2, 3), not (2, 2)"),
    # rows of data
    of_rows(data.preference, [PAIR, {"prompt": "a", "chosen": "b"}, 3], "row 1: there is no "
            "'rejected': the keys are 'prompt', 'chosen'; row 2: it is 3, no dict"),
    of_rows(data.preference, [{**PAIR, "chosen": "c"}, {**PAIR, "chosen": " "}],
            "row 0: the answers chosen and rejected are the same: there is no choice; row 1: "
            "'chosen' is empty"),
    of_rows(data.preference, [{**PAIR, "margin": float("nan")}],
            "row 0: 'margin' is nan, not a finite number"),
    of_rows(data.preference, [{"prompt": [MESSAGE], "chosen": [SAID], "rejected": [MESSAGE]},
                              {"prompt": [MESSAGE], "chosen": [SAID], "rejected": []},
                              {"prompt": [MESSAGE], "chosen": [SAID], "rejected": [3]},
                              {"prompt": 3, "chosen": [SAID], "rejected": "b"}],
            "row 0: 'rejected': the last message is of 'user', not the assistant's; row 1: "
            "'rejected' has no messages; row 2: 'rejected' has what is no object with a role and a "
            "content; row 3: 'prompt' and 'chosen' are both texts, or both lists of messages; …"),
    of_rows(data.preference, [PAIR, {**PAIR, "prompt": "a" * 9}], "row 1: the prompt has 9 tokens, "
            "so max_length=4 leaves nothing of 'chosen': raise it, or leave the row out",
            max_length=4),
    on(lambda: data.preference(Passes([{**PAIR, "prompt": "a" * 9}]), max_length=4), "row 0: the "
       "prompt has 9 tokens, so max_length=4 leaves nothing of 'chosen': raise it, or leave the "
       "row out"),
    of_rows(data.ratings, [GOOD, {**GOOD, "rating": "yes"}, {"prompt": "a", "response": "b"}],
            "row 1: 'rating' is 'yes', neither true nor false nor finite; row 2: there is no "
            "'rating', and no 'label', which is true of a good answer"),
    of_file("'…' has problems: line 2: the answers chosen and rejected are the same: there is no "
            "choice", PAIR, {**PAIR, "chosen": "c"}),
    on(lambda: data.preference([PAIR]).pack(8), "answers that are compared or rated aren't packed: "
       "batch them"),
]  # fmt: skip

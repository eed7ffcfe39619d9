"""Prompts and prefixes of real peft: what it saves gives its outputs here after pl.load alone."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftlite as pl
from tests.zoo import perturb, seeded

N = 3
IDS = torch.tensor([[5, 7, 11, 3, 9, 2], [3, 4, 15, 9, 1, 1]])
MASK = (IDS != 1).long()  # 1 is padding
SIZES = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 1,
}  # fmt: skip
GPT2 = {
    "vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 1
}  # fmt: skip


def made(name: str, **config: Any) -> nn.Module:
    """A model of transformers by the name of its class, the same on every call."""
    kind = getattr(transformers, name)
    with seeded():
        return perturb(kind(kind.config_class(**config))).eval()


@torch.no_grad()
def adapted(base: nn.Module, config: Any, path: Path) -> Any:
    """A model of peft's, its values drawn, saved in a folder."""
    theirs: Any = peft.get_peft_model(base, config).eval()
    with seeded(3):
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(path)
    return theirs


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- prompts of classifiers: whatever their heads read

CLASSIFIERS = {
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "Electra": {**SIZES, "embedding_size": 16},
    "BigBird": {**SIZES, "attention_type": "original_full"},
    "Esm": {**SIZES, "mask_token_id": 2},  # counts masked ids, if it gets ids
    "GPT2": GPT2,  # peft takes the last position of a padded row
}


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
@torch.no_grad()
def test_classifiers_read_the_virtual_tokens_that_pefts_read(
    name: str, kind: Any, tmp_path: Path
) -> None:
    model, base = (made(f"{name}ForSequenceClassification", **CLASSIFIERS[name]) for _ in range(2))
    theirs = adapted(base, kind(task_type="SEQ_CLS", num_virtual_tokens=N), tmp_path / "sql")
    pl.load(model, tmp_path / "sql")
    for mask in (MASK, None):
        close(
            model(IDS, attention_mask=mask).logits,
            theirs(input_ids=IDS, attention_mask=mask).logits,
        )
    labels = torch.tensor([0, 1])
    close(model(IDS, labels=labels).loss, theirs(input_ids=IDS, labels=labels).loss)


@torch.no_grad()
def test_a_prompt_that_a_classifier_reads_goes_back(tmp_path: Path) -> None:
    """As it's attached for peft; a default one on a decoder, whose head reads the last, as well."""
    virtual = pl.PromptTuning(prompt_length=N, targets="()", cut=False)
    for name, config, head, method in (
        ("BertForSequenceClassification", SIZES, "classifier", virtual),
        ("GPT2ForSequenceClassification", GPT2, "score", pl.PromptTuning(prompt_length=N)),
    ):
        model = made(name, **config)
        delta = pl.attach(model, [method, pl.FullTuning(targets=head)])
        pl.export(delta, tmp_path / name, settings={"task_type": "SEQ_CLS"})
        theirs: Any = peft.PeftModel.from_pretrained(made(name, **config), tmp_path / name)
        close(model(IDS[:1]).logits, theirs.eval()(input_ids=IDS[:1]).logits)

"""The errors of GGUF."""

import builtins
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import peftlite as pl
from tests.errors.case import Case, delta, linears, on
from tests.errors.peft_files import exporting


def without_gguf(model: nn.Module, path: Path) -> None:
    real = builtins.__import__

    def fake(name: str, *args: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args)

    with mock.patch("builtins.__import__", fake):
        pl.export(delta(model), path, "gguf")


def refused(at: str, method: Any, why: str, model: Any = None) -> Case:
    says = (
        f"{at} can't go into a GGUF, since {why}: leave it out with exclude=, or keep the delta "
        "with pl.save"
    )
    return exporting(method, says, model or on("hf_llama"), format="gguf")


def on_meta() -> nn.Module:
    return on("hf_llama")().to("meta")


def no_number() -> nn.Module:
    model = on("hf_llama")()
    pl.attach(model, Q, "sql")
    next(delta(model).parameters()).data[0, 0] = torch.nan
    return model


Q = pl.LoRA(rank=2, targets="model.layers.0.self_attn.q_proj")
HERE = "model.layers.0.self_attn.q_proj.weight"
KNOWN = (
    "a GGUF has llama.cpp's names, which go by the model's config.model_type: this has {}, and …"
)

CASES = [
    Case(without_gguf, "format='gguf' needs gguf: pip install 'peftlite[gguf]'"),
    exporting(pl.LoRA(rank=2), KNOWN.format("None"), linears, format="gguf"),
    exporting(pl.LoRA(rank=2), KNOWN.format("'t5'"), on("hf_t5"), format="gguf"),
    exporting(
        Q,
        "settings are a file's metadata, all text: not {'step': 3}",
        on("hf_llama"),
        format="gguf",
        settings={"step": 3},
    ),
    refused(HERE, pl.DoRA(rank=2, targets="q_proj"), "there it has LoRA, and no DoRA"),
    refused(HERE, pl.IA3(targets="q_proj"), "there it has LoRA, and no IA3"),
    refused(
        f"{HERE}[0:4]",
        pl.LoRA(rank=2, targets=f"{HERE}[0:4]"),
        "there it has whole matrices of linear layers and embeddings",
    ),
    refused(
        "transformer.wte.weight",
        pl.LoRA(rank=2, targets="wte"),
        "it is tied to lm_head.weight",
        on("hf_gpt2"),
    ),
    refused(
        "classifier.weight",
        pl.LoRA(rank=2, targets="classifier"),
        "llama.cpp's bert has no name for it",
        on("hf_bert"),
    ),
    refused(HERE, Q, "it is on the meta device and has no values", on_meta),
    Case(
        lambda model, path: pl.export(delta(model), path, "gguf"),
        f"{HERE} can't go into a GGUF, since it has values that aren't finite: …",
        model=no_number,
    ),
]

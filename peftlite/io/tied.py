"""Tied: the other names of a checkpoint's tensors, which the model has and the file leaves out.

safetensors' `save_model` says them in the file's metadata, transformers in config.json: the input
embedding is the weight of the output head, too, and in an encoder-decoder that of both halves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from peftlite.io.checkpoint import Checkpoint
from peftlite.io.standin import embeds, stand_in

_HEADED = re.compile(r".*(CausalLM|LMHead|MaskedLM|ConditionalGeneration|PreTraining|Seq2Seq).*")

UNTIE = (
    "and this model ties them: untie them first, model.{0}.weight = "
    "torch.nn.Parameter(model.{0}.weight.detach().clone()), and in a model of transformers "
    "model.config.tie_word_embeddings = False (also in its text_config), or saving ties them again"
)

Modules = Mapping[str, Mapping[str, Any]]


def with_ties(modules: Modules, checkpoint: Checkpoint, embedding: str | None) -> Modules:
    """What is known of modules, by a tensor's address, with the other names of tied tensors.

    embedding: as `tied_embedding` has it.
    """
    found = dict(modules)

    def add(name: str, *others: str) -> None:  # where a delta's own file doesn't say it
        its = found.get(name, {"module": "Embedding" if embeds(name) else "Module"})
        found[name] = {"names": [*others], **its}

    for file in checkpoint.files:
        for name, kept in file.metadata.items():
            if kept in checkpoint and name not in checkpoint:
                add(kept, name)
    if embedding is not None:
        start = re.sub(r"(embed_tokens|shared)\.weight", "", embedding)
        halves = ("encoder", "decoder") if checkpoint.config.get("is_encoder_decoder") else ()
        names = [f"{start}{half}.embed_tokens.weight" for half in halves]
        # the bias of the head tells where it is
        rows = checkpoint.shape(embedding)[:1]
        biases = [k for k in checkpoint if k.endswith(".bias") and checkpoint.shape(k) == rows]
        heads = [f"{bias.removesuffix('bias')}weight" for bias in biases or ["lm_head.bias"]]
        add(embedding, *names, *heads)
    return found


def tied_embedding(checkpoint: Checkpoint) -> str | None:
    """The input embedding that is the output head's weight, too, as config.json says."""
    config = checkpoint.config
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    kinds = config.get("architectures") or ["LMHead"]
    # transformers 4 leaves out what is so by default
    if not (True in said or not said) or not any(map(_HEADED.match, map(str, kinds))):
        return None
    rows = max([n for part in parts if isinstance(n := part.get("vocab_size"), int)], default=0)
    return next((name for name in checkpoint if _is_vocabulary(checkpoint, name, rows)), None)


def _is_vocabulary(checkpoint: Checkpoint, name: str, rows: int) -> bool:
    shape = checkpoint.shape(name)
    return len(shape) == 2 and shape[0] >= rows > 0 and embeds(name) and "pos" not in name


def base_of(checkpoint: Checkpoint, modules: Modules, transposed: bool = False) -> nn.Module:
    """A stand-in of a checkpoint's tensors, the tied ones as one, with what its config.json says.

    Args:
        modules, transposed: as `stand_in` has them.
    """
    embedding = tied_embedding(checkpoint)
    model = stand_in(checkpoint, with_ties(modules, checkpoint, embedding), transposed)
    its: Any = model
    its.checkpoint = checkpoint
    its.config = SimpleNamespace(
        **{**checkpoint.config, "tie_word_embeddings": embedding is not None}
    )
    path = (embedding or "").rpartition(".")[0]
    its.get_input_embeddings = lambda: model.get_submodule(path) if path else None
    return model

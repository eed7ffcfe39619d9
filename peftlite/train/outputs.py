"""Outputs: what a model gives for the inputs of a batch, whatever form it gives it in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftlite.errors import PeftliteError
from peftlite.table import short


def split_labels(batch: Any) -> tuple[Any, Tensor]:
    """The inputs of the model, and the labels."""
    if isinstance(batch, Mapping) and {"margin", "rating"} & batch.keys():
        raise PeftliteError(
            "the batch has answers that are not all to be learned: give the Trainer a loss of "
            "preferences, such as pl.losses.dpo() for pairs or pl.losses.kto() for ratings"
        )
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, Sequence) and len(batch) > 1 and isinstance(batch[-1], Tensor):
        return batch[:-1], batch[-1]
    given = f"one with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else short(batch)
    raise PeftliteError(
        f"a batch is a mapping with 'labels', or a tuple that ends with them: not {given}"
    )


def run_model(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    if not isinstance(inputs, Mapping):
        return model(*inputs)
    rest = dict(inputs)
    mask = rest.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not takes(model, "attention_mask"):
        del rest["attention_mask"]
    # the first argument of every model of text, whatever it is called
    ids = (rest.pop("input_ids"),) if "input_ids" in rest else ()
    try:
        return model(*ids, **rest)
    except TypeError as error:
        if not (unknown := [name for name in rest if not takes(model, name)]):
            raise
        raise PeftliteError(
            f"the model takes no {unknown[0]!r}, which the batch has as {short(rest[unknown[0]])}: "
            "leave it out of the examples, or write the loss as a function of (model, batch)"
        ) from error
    except IndexError as error:
        if not ids or "out of range in self" not in str(error):
            raise
        raise PeftliteError(
            f"the model has no embedding for some of the input_ids, which go up to {ids[0].max()}, "
            f"or for some of {ids[0].shape[-1]} places: give data the model's own tokenizer, and a "
            "max_length"
        ) from error


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's `forward`, under torch.compile or DDP, has an argument of this name."""
    model = model._modules.get("_orig_mod") or model
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    known = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in known)


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """The logits of a model, or another output that is a tensor."""
    output = run_model(model, inputs)
    found = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(found, Tensor):
        raise PeftliteError(
            f"the model gives {short(output)}, neither a tensor nor one with .logits: write the "
            "loss as a function of (model, batch)"
        )
    return found

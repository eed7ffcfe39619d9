"""export: a delta as a file or a folder that a peer reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from torch import nn

from peftlite.core.attach import settled, warn_of_buffers
from peftlite.core.delta import Delta
from peftlite.core.find import given_delta
from peftlite.fields import check_given
from peftlite.io import gguf, peft
from peftlite.io.files import as_path
from peftlite.io.peers import DIFFUSERS, KOHYA

Format = Literal["peft", "kohya", "diffusers", "gguf"]

_WRITERS: dict[str, Callable[..., None]] = {
    "peft": peft.write,
    "kohya": KOHYA.write,
    "diffusers": DIFFUSERS.write,
    "gguf": gguf.write,
}


def export(
    delta: Delta | str,
    path: str | os.PathLike[str],
    format: Format = "peft",
    *,
    model: nn.Module | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a delta in a peer's format, for the same outputs in that peer.

    "peft": a folder with adapter_config.json and adapter_model.safetensors, as
    `PeftModel.from_pretrained(model, path)` reads it. It gets its name when it is complete; an
    older adapter there is replaced, and a folder with anything else in it is left alone.
    "kohya", "diffusers": one safetensors file, of low-rank products (kohya: LoHa and LoKr, too).
    "gguf": one file of low-rank products in fp32, for llama.cpp's --lora; it needs the package gguf
    and a model of transformers, whose config tells the names.

    Args:
        delta: a delta, or its name in `model`.
        settings: more for adapter_config.json, such as
            {"base_model_name_or_path": "gpt2", "task_type": "CAUSAL_LM"}; for the others more for
            the file's metadata, all text.

    Raises:
        FileError: the path can't be written.
        PeftliteError: the peer has nothing that is this delta.

    Example:
        delta = pl.attach(nn.Sequential(nn.Linear(4, 2)), pl.LoRA(rank=2))
        pl.export(delta, "sql", format="peft")
    """
    delta = given_delta("export", delta, model)
    check_given("format", format, get_args(Format))
    warn_of_buffers(delta.home, stacklevel=3)
    with settled(delta) as unchanged:
        _WRITERS[format](delta, as_path(path), settings)
        unchanged()

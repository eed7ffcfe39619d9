"""Folder: what PEFT's directories are made of: their files' names, their keys, their settings."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from peftlite.errors import FileError, reason
from peftlite.io.files import Tensors, read_json
from peftlite.io.peft.config import Config
from peftlite.io.peft.forms import FORMS
from peftlite.table import listed, short

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
START, WRAPPED = "base_model.model.", "base_model."  # the latter where there is a prompt
LAYER, TOKENS = ".ln_tuning_layers.", ".trainable_tokens_delta"
PREFIX, PROMPTS = "PREFIX_TUNING", ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
CLASSIFIES, GENERATES = "SEQ_CLS", ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # tasks
ALONE = "LN_TUNING"  # which trains a copy of any module, for what isn't beside another method
CLASSIFIER = ("score", "classifier")  # what peft's classifiers have for a head
FACTORS = (".lora_A.weight", ".lora_B.weight")
ROWS = "TRAINABLE_TOKENS"  # which trains rows of embeddings
KNOWN = (*FORMS, *PROMPTS, ALONE, ROWS)


def folders(path: Path) -> list[str]:
    """The folders in a folder that hold an adapter."""
    with contextlib.suppress(OSError):
        return sorted(child.name for child in path.iterdir() if (child / CONFIG).is_file())
    return []


def read_settings(path: str) -> Any:
    """What a file of JSON says. Raises FileError."""

    def refuse(number: str) -> None:
        raise ValueError(f"{number} is no number")

    try:
        return read_json(Path(path), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path!r} is no JSON: {reason(error)}") from error


def read_config(folder: Path) -> Config:
    """The settings in a folder. Raises FileError."""
    path = str(folder / CONFIG)
    data = read_settings(path)
    kind = data.get("peft_type") if isinstance(data, dict) else None
    if kind not in KNOWN:
        raise FileError(
            f"{path!r} has the peft_type {short(kind)}, which can't be read; these can: "
            f"{', '.join(sorted(KNOWN))}; peft.save_as_lora(path, model, rank) makes one that can "
            "of many that change weights, and pl.extract of the model before and after merging"
        )
    return Config(data, path)


def open_folder(path: Path) -> tuple[Config, Tensors]:
    """The settings and the tensors in a folder, which may be named by its file of tensors."""
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).exists():
        names = folders(folder)
        raise FileError(
            f"{str(folder)!r} has its adapters in folders of their own: {listed(names)}; load one: "
            f"{str(folder / names[0])!r}"
        )
    old, new = folder / "adapter_model.bin", folder / MODEL
    if old.exists() and not new.exists():
        raise FileError(
            f"{str(old)!r} is a pickle, which may run code as it is read; convert it first: "
            f"safetensors.torch.save_file(torch.load({str(old)!r}, weights_only=True), "
            f"{str(new)!r})"
        )
    config, file = read_config(folder), Tensors(new)
    _check_gathered(config, file)
    return config, file


def _check_gathered(config: Config, file: Tensors) -> None:
    """Raises FileError if the tensors were elsewhere when they were saved."""
    kind, shapes = config.data["peft_type"], {key: its.shape for key, its in file.entries.items()}
    none = kind in ("ADALORA", "OFT")  # a rank that was cut to none, a block of one
    cut = [key for key, shape in shapes.items() if none and shape[1:]]
    empty = [key for key, shape in shapes.items() if 0 in shape and key not in cut]
    flat = [k for k, shape in shapes.items() if len(shape) == 1 and k.endswith(FACTORS)]
    if empty or flat or not shapes:
        what = f"empty tensors, such as {empty[0]}" if empty else "no tensors"
        what = f"a flat tensor for {flat[0]}" if flat and not empty else what
        raise FileError(
            f"{file.path!r} has {what}: DeepSpeed's ZeRO-3 and FSDP save so what wasn't gathered; "
            "save it within deepspeed.zero.GatheredParameters(parameters, modifier_rank=None), or "
            "FullyShardedDataParallel.summon_full_params(model)"
        )

"""State: an adapter's tensors by PEFT's names, out of a model and into it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlite.compat.peft.model import PeftModel
from peftlite.core.attach import deltas
from peftlite.core.find import named, require
from peftlite.io.files import write_file
from peftlite.io.load import read
from peftlite.io.peft.folder import CONFIG, MODEL, PREFIX, PROMPTS, START
from peftlite.io.peft.writing import AS_IN, plan


def get_peft_model_state_dict(
    model: Any, state_dict: Any = None, adapter_name: str = "default", **_: Any
) -> dict[str, Tensor]:
    """An adapter's tensors, of any shape, as a folder of peft's has them. Raises PeftliteError.

    Example:
        from peftlite.compat.peft import LoraConfig, get_peft_model, get_peft_model_state_dict

        model = get_peft_model(nn.Sequential(nn.Linear(4, 2)), LoraConfig(target_modules=["0"]))
        assert "base_model.model.0.lora_A.weight" in get_peft_model_state_dict(model)
    """
    start = "" if isinstance(model, PeftModel) else START  # which peft's wrapper adds
    tensors = _planned(model, adapter_name)[1]
    return {key.removeprefix(start): tensor.detach() for key, tensor in tensors.items()}


def _planned(model: Any, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's settings and its tensors, as a folder of peft's has them."""
    delta = named(require(model)[1], name)
    task = model.peft_config[name].to_dict()["task_type"]
    config, tensors = plan(delta, task)
    return {**config, "task_type": task}, tensors


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    **_: Any,
) -> Any:
    """Copies values, by peft's names, into an adapter that is there: all of them, or none.

    Gives what peft gives: no keys are missing, and none unexpected.

    Raises:
        FileError: they aren't those of this adapter in this model.
    """
    config, _ = _planned(model, adapter_name)
    rows = peft_model_state_dict.get("prompt_embeddings")
    if rows is not None and config["peft_type"] == PREFIX:
        config["num_layers"] = rows.shape[1] // (2 * config["token_dim"])
    elif rows is not None and config["peft_type"] in PROMPTS:
        config["num_transformer_submodules"] = len(rows) // config["num_virtual_tokens"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps({**config, "peft_version": AS_IN}))
        write_file(Path(folder) / MODEL, dict(peft_model_state_dict), {"format": "pt"})
        values = read(model, folder, "off").state_dict()
    delta = deltas(model)[adapter_name]
    if config["peft_type"] == PREFIX:  # of which layers may share one
        values = {key: values[key] for key in delta.state_dict() if key in values}
    delta.load_state_dict(values)
    return torch.nn.modules.module._IncompatibleKeys([], [])


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    **_: Any,
) -> Any:
    """The model, frozen, and in fp32 but for what is packed."""
    model.requires_grad_(False)
    for parameter in model.parameters():
        packed = hasattr(parameter, "quant_state")
        if parameter.is_floating_point() and parameter.itemsize == 2 and not packed:
            parameter.data = parameter.data.float()
    return model

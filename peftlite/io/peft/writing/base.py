"""Base: what peft's settings say of the model, so that AutoPeftModel finds and loads it."""

from __future__ import annotations

from typing import Any

from peftlite.core.delta import Delta
from peftlite.core.host import base_class
from peftlite.core.site import walk


def about(delta: Delta) -> dict[str, Any]:
    """Where the base is, and its task, as far as a model of transformers says them.

    The tasks that need a head of the adapter's own are the user's to say.
    """
    root = None if delta.home is None else delta.home.root
    if root is None:
        return {}
    _, model = next(walk(root))
    its: Any = model
    config, found = getattr(model, "config", None), {}
    if isinstance(path := getattr(config, "name_or_path", None), str) and path:
        found["base_model_name_or_path"] = path
    name, generates = base_class(model).__name__, hasattr(its, "prepare_inputs_for_generation")
    if generates and name.endswith(("ForCausalLM", "LMHeadModel")):
        found["task_type"] = "CAUSAL_LM"
    elif generates and getattr(config, "is_encoder_decoder", False):
        found["task_type"] = "SEQ_2_SEQ_LM"
    return found

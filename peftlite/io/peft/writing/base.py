"""Base: what peft's settings say of the model, so that AutoPeftModel finds and loads it."""

from __future__ import annotations

from typing import Any

from peftlite.core.delta import Delta
from peftlite.core.host import base_class
from peftlite.core.site import walk
from peftlite.io.peft.forms import FORMS
from peftlite.io.peft.writing.draft import module_of
from peftlite.io.peft.writing.replaced import head_of

CLASSES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
METHODS = {kind for form in FORMS.values() for kind in form.kinds}


def about(delta: Delta) -> dict[str, Any]:
    """Where the base is, and its task, as far as a model of transformers says them.

    For the tasks that have heads peft takes these whole, beside a method that is elsewhere.
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
    elif task := next((task for end, task in CLASSES.items() if name.endswith(end)), None):
        own = [item for item in delta.placed.values() if type(item.method) in METHODS]
        if own and not any(head_of(module_of(item), task) for item in own):
            found["task_type"] = task
    return found

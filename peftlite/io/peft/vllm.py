"""check_vllm: what keeps vLLM from serving a delta, or a PEFT directory.

The rules are those of vLLM 0.33, as its `vllm/lora/peft_helper.py` and `lora_model.py` have them.
"""

from __future__ import annotations

import os

from peftlite.core.delta import Delta
from peftlite.errors import PeftliteError
from peftlite.io.files import Tensors, as_path
from peftlite.io.peft.config import Config
from peftlite.io.peft.folder import CLASSIFIER, MODEL, read_config
from peftlite.io.peft.writing import plan

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def check_vllm(what: Delta | str | os.PathLike[str], max_lora_rank: int = 16) -> list[str]:
    """What keeps vLLM 0.33 from serving a delta, or a PEFT directory; empty if nothing does.

    Args:
        max_lora_rank: what the server is started with.

    Raises:
        FileError: there is no such directory.

    Example:
        delta = pl.attach(nn.Sequential(nn.Linear(4, 2)), pl.LoRA(rank=2))
        print(pl.check_vllm(delta, max_lora_rank=8) or "it can be served")
    """
    if isinstance(what, Delta):
        try:
            config, tensors = plan(what)
        except PeftliteError as error:
            return [str(error)]
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    else:
        config = read_config(as_path(what)).data
        entries = Tensors(as_path(what) / MODEL).entries
        shapes = {key: entry.shape for key, entry in entries.items()}
    if config["peft_type"] != "LORA":
        return [f"it is a {config['peft_type']}, and vLLM serves LoRA alone"]
    found = [f"it has {name}, which vLLM doesn't" for name in _UNSERVED if config.get(name)]
    if others := {*(config.get("modules_to_save") or ())} - {*CLASSIFIER}:
        found.append(
            f"it has {', '.join(sorted(others))} in modules_to_save, where vLLM takes classifier "
            "and score"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS:
        found.append(
            f"it begins with init_lora_weights={init!r}, which changes the base: save it with "
            "path_initial_model_for_weight_conversion= in peft"
        )
    if config.get("bias", "none") != "none":
        found.append(f"it has biases (bias={config['bias']!r}), which vLLM leaves out")
    for name in config.get("target_parameters") or ():
        if not f".{name}".endswith(_EXPERTS):
            found.append(f"it changes {name} by itself, where vLLM takes parameters of experts")
    for key, shape in shapes.items():
        factor = key.endswith((".lora_A.weight", ".lora_B.weight")) and len(shape) == 2
        if not (factor or key.endswith(_OTHERS)):
            found.append(f"{key} isn't a factor of a linear map's change")
    settings = Config(config, "adapter_config.json")
    ranks = settings.take("rank_pattern", {}, dict).values()
    rank = max(int(n) for n in (settings.number("r", 8), *ranks) if isinstance(n, int | float))
    if rank > max_lora_rank:
        enough = next((r for r in RANKS if r >= rank), None)
        cure = f"start it with --max-lora-rank {enough}" if enough else "it takes 512 at most"
        found.append(f"its rank is {rank}, and the server takes {max_lora_rank}: {cure}")
    return found


_UNSERVED = (
    "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora",
    "use_qalora", "trainable_token_indices",
)  # fmt: skip
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # which leave the base as it is
_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
_OTHERS = (  # copies, which vLLM passes over, and heads
    ".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight", ".score.weight", ".score.bias",
    ".classifier.weight", ".classifier.bias",
)  # fmt: skip

"""check_vllm: what keeps vLLM from serving a delta, or a PEFT directory."""

from __future__ import annotations

import os

from peftlite.core.delta import Delta
from peftlite.errors import PeftliteError
from peftlite.io.files import Tensors, as_path
from peftlite.io.peft.folder import MODEL, read_config
from peftlite.io.peft.writing import plan

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def check_vllm(what: Delta | str | os.PathLike[str], max_lora_rank: int = 16) -> list[str]:
    """What keeps vLLM from serving a delta, or a PEFT directory; empty if nothing does.

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
    if config.get("bias", "none") != "none":
        found.append(f"it has biases (bias={config['bias']!r}), which vLLM leaves out")
    for key, shape in shapes.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")) or len(shape) != 2:
            found.append(f"{key} isn't a factor of a linear map's change")
    rank = max([s[0] for key, s in shapes.items() if key.endswith(".lora_A.weight")], default=0)
    if rank > max_lora_rank:
        enough = next((r for r in RANKS if r >= rank), None)
        cure = f"start it with --max-lora-rank {enough}" if enough else "it takes 512 at most"
        found.append(f"its rank is {rank}, and the server takes {max_lora_rank}: {cure}")
    return found


_UNSERVED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices",
    "target_parameters", "lora_bias",
)  # fmt: skip

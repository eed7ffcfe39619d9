"""The small Llama of which others packed the linear maps."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tests.zoo import seeded

HERE = Path(__file__).parent
WEIGHTS = HERE / "plain.safetensors"


def llama(weights: Path | None = WEIGHTS) -> Any:
    """In bf16, with the numbers that others packed, or with some of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=16, max_position_embeddings=32,
    )  # fmt: skip
    with seeded():
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if weights is not None:
        model.load_state_dict(safetensors.torch.load_file(weights))
    return model

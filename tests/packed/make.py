"""Writes this folder's files by the libraries themselves: `python -m tests.packed.make`.

It needs bitsandbytes==0.50.2 beside transformers 4.57.6, in an environment of their own.
"""

import shutil
from pathlib import Path

import safetensors.torch
import torch

from tests.packed.llama import HERE, WEIGHTS, llama


def bitsandbytes(folder: Path) -> None:
    """A small Llama, its codes, and what bitsandbytes makes of them."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bf16 = torch.bfloat16
    llama().save_pretrained(folder)
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=bf16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=bf16, quantization_config=how
    )
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    formed = {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
    safetensors.torch.save_file(formed, HERE / "bitsandbytes_formed.safetensors")


if __name__ == "__main__":
    safetensors.torch.save_file(llama(None).state_dict(), WEIGHTS)
    bitsandbytes(HERE / "bitsandbytes")

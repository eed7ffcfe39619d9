"""Writes this folder's files by the libraries themselves: `python -m tests.packed.make`.

It needs bitsandbytes==0.50.2 and compressed-tensors==0.20.1 beside transformers 4.57.6, in an
environment of their own.
"""

import shutil
from pathlib import Path

import safetensors.torch
import torch

from tests.packed.llama import HERE, WEIGHTS, llama
from tests.zoo import seeded


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


def tensors() -> dict[str, torch.Tensor]:
    """Of each packing NAME what its module holds, `NAME.weight…`, and `NAME.formed`."""
    import bitsandbytes.functional as bnb

    with seeded():
        w = torch.randn(24, 64, dtype=torch.bfloat16)
    q, state = bnb.quantize_4bit(w, quant_type="fp4", compress_statistics=True)
    found = {"fp4.weight": q, "fp4.formed": bnb.dequantize_4bit(q, state)}
    found |= {f"fp4.weight.{k}": t for k, t in state.as_dict(packed=True).items()}
    q, largest, _ = bnb.int8_vectorwise_quant(w.half())
    formed = bnb.int8_vectorwise_dequant(q, largest)
    found |= {"int8.weight": q, "int8.SCB": largest, "int8.formed": formed}
    for name, (format, scale, zero, whole, args) in _schemes(w).items():
        found |= _compressed(name, format, w, scale, zero, whole, args)
    return {name: t.clone().contiguous() for name, t in found.items()}


def _schemes(w: torch.Tensor) -> dict[str, tuple]:
    bf16, rows = torch.bfloat16, w.abs().amax(1, keepdim=True)

    def groups(size: int) -> torch.Tensor:
        return w.float().view(len(w), -1, size).abs().amax(-1)

    def ints(bits: int, **how) -> dict:
        return {"num_bits": bits, "type": "int", "symmetric": True, **how}

    def floats(bits: int, **how) -> dict:
        return {"num_bits": bits, "type": "float", "symmetric": True, **how}

    g32 = {"strategy": "group", "group_size": 32}
    s4, zero = (groups(32) / 7.5).to(bf16), torch.randint(-3, 3, (24, 2), dtype=torch.int8)
    whole = torch.tensor([448 * 6 / float(w.abs().max())])
    nv = (whole * groups(16) / 6).to(torch.float8_e4m3fn).float()
    mx = torch.exp2(torch.floor(torch.log2(groups(32) / 6)))
    blocks = {"strategy": "block", "block_structure": [16, 16]}
    many = torch.rand(2, 4) / 100 + 0.005
    return {
        "packed4": ("pack-quantized", s4, None, None, ints(4, **g32)),
        "packed4zero": ("pack-quantized", s4, zero, None, ints(4, **g32, symmetric=False)),
        "packed4row": ("pack-quantized", rows / 7.5, None, None, ints(4, strategy="channel")),
        "packed3": ("pack-quantized", s4 * 2, None, None, ints(3, **g32)),
        "packed8": ("pack-quantized", s4 / 16, None, None, ints(8, **g32)),
        "fp8": ("float-quantized", rows / 448, None, None, floats(8, strategy="channel")),
        "fp8whole": ("float-quantized", rows.max()[None] / 448, None, None,
                     floats(8, strategy="tensor")),
        "fp8blocks": ("float-quantized", many, None, None, floats(8, **blocks)),
        "ct_int8": ("int-quantized", rows / 127, None, None, ints(8, strategy="channel")),
        "nvfp4": ("nvfp4-pack-quantized", nv, None, whole,
                  floats(4, strategy="tensor_group", group_size=16)),
        "mxfp4": ("mxfp4-pack-quantized", mx, None, None, floats(4, **g32)),
    }  # fmt: skip


def _compressed(name: str, format: str, w, scale, zero, whole, args) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    compressor = BaseCompressor.get_value_from_registry(format)
    given = {
        "weight": w.to(scale.dtype), "weight_scale": scale, "weight_zero_point": zero,
        "weight_global_scale": whole,
    }  # fmt: skip
    made = compressor.compress({k: t for k, t in given.items() if t is not None}, scheme)
    formed = compressor.decompress(made, scheme)["weight"]
    return {f"{name}.formed": formed} | {f"{name}.{key}": t for key, t in made.items()}


if __name__ == "__main__":
    safetensors.torch.save_file(llama(None).state_dict(), WEIGHTS)
    bitsandbytes(HERE / "bitsandbytes")
    safetensors.torch.save_file(tensors(), HERE / "tensors.safetensors")

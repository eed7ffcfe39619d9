"""Weights that other libraries packed: the numbers that those form of them, and models on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlite as pl
from peftlite.commands import local
from peftlite.quant import keys, others
from peftlite.quant.layouts import bits
from tests.cells import disturb
from tests.packed.doubles import QuantLinear
from tests.packed.llama import HERE, llama
from tests.zoo import seeded

TENSORS = safetensors.torch.load_file(HERE / "tensors.safetensors")
NAMES = sorted({key.partition(".")[0] for key in TENSORS})
EIGHTS = [0, 2, 4, 6, 1, 3, 5, 7]


def of_theirs(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """A module's tensors by name, as the library wrote them, and what it forms of them."""
    start = f"{name}."
    found = {k.removeprefix(start): t for k, t in TENSORS.items() if k.startswith(start)}
    return found, found.pop("formed")


def packed(q: Tensor, b: int) -> Tensor:
    """Codes (n, m) of b bits, one after another along the first dimension, in int32."""
    stream = ((q[:, None] >> torch.arange(b)[:, None]) & 1).reshape(-1, 32, q.shape[1]).long()
    words = (stream << torch.arange(32)[:, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gptq(b: int, version: int = 1, order: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """As the authors' code has it: W = s (q − z), z kept less 1; (o, i) of 32 and 64."""
    with seeded():
        q, z = torch.randint(2**b, (64, 32)), torch.randint(1, 2**b, (2, 32))
        scale = torch.rand(2, 32, dtype=torch.float16) / 10
        group = torch.arange(64) // 32
        group = group[torch.randperm(64)] if order else group
    told = z - int(version == 1)
    found = {
        "qweight": packed(q, b), "qzeros": packed(told.t(), b).t().contiguous(),
        "scales": scale, "g_idx": group.int(),
    }  # fmt: skip
    return found, ((q - z[group]).float() * scale[group].float()).t()


def awq() -> tuple[dict[str, Tensor], Tensor]:
    with seeded():
        q, z = torch.randint(16, (64, 32)), torch.randint(16, (2, 32))
        scale = torch.rand(2, 32, dtype=torch.float16) / 10

    def words(n: Tensor) -> Tensor:
        return packed(n.view(-1, 4, 8)[..., EIGHTS].reshape(-1, 32).t(), 4).t().contiguous()

    found = {"qweight": words(q), "qzeros": words(z), "scales": scale}
    w = (q - z.repeat_interleave(32, 0)).float() * scale.float().repeat_interleave(32, 0)
    return found, w.t()


def awq_gemv() -> tuple[dict[str, Tensor], Tensor]:
    """As AWQ has it for its products of a few rows: with room for more groups than there are."""
    with seeded():
        q, z = torch.randint(16, (32, 64)), torch.randint(16, (32, 2))
        scale = torch.rand(32, 2, dtype=torch.float16) / 10
    more = (0, 30)
    found = {
        "qweight": packed(q.t(), 4).t().contiguous(),
        "qzeros": packed(F.pad(z, more).t(), 4).t().contiguous(),
        "scales": F.pad(scale, more),
    }
    w = (q - z.repeat_interleave(32, 1)).float() * scale.float().repeat_interleave(32, 1)
    return found, w


MADE: dict[str, Callable[[], tuple[dict[str, Tensor], Tensor]]] = {
    **{f"gptq{b}": lambda b=b: gptq(b) for b in (2, 3, 4, 8)},
    "gptq_order": lambda: gptq(4, order=True),
    "awq": awq,
    **{name: lambda name=name: of_theirs(name) for name in NAMES},
}
each = pytest.mark.parametrize("name", MADE)


def plain(w: Tensor) -> nn.Module:
    with seeded():
        return nn.Sequential(nn.Linear(w.shape[1], w.shape[0]), nn.Linear(w.shape[0], 4))


def checkpoint(path: Path, name: str) -> tuple[nn.Module, Tensor]:
    """A model, and a file of it whose first weight is packed; and what that stands for."""
    found, w = MADE[name]()
    model = plain(w)
    state = {k: t for k, t in model.state_dict().items() if k != "0.weight"}
    packed = {f"0.{key}": tensor for key, tensor in found.items()}
    extra = {"0.input_scale": torch.ones(1)}
    safetensors.torch.save_file({**state, **packed, **extra}, path)
    return model, w


@each
def test_the_numbers_are_theirs(name: str) -> None:
    found, w = MADE[name]()
    if "weight.absmax" in found:
        parts = {key.removeprefix("weight").lstrip("."): t for key, t in found.items()}
        how, parts = keys.read(parts)
    else:
        parts = {"" if key == "weight" else key: t for key, t in found.items()}
        how, parts = others.read(parts, w.shape, w.dtype, {})
    formed = how.cast(w.dtype).unpack(parts)
    # bitsandbytes multiplies by 1/127, rounded, where all others divide
    torch.testing.assert_close(formed, w, rtol=1e-6 if name == "int8" else 0, atol=0)
    assert keys.read(keys.written(how, parts))[0] == how


@each
def test_a_checkpoint_fills_a_plain_model(name: str, tmp_path: Path) -> None:
    """It trains, goes through a state dict, is known by its codes, and becomes plain again."""
    model, w = checkpoint(tmp_path / "m.safetensors", name)
    pl.quantize(model, checkpoint=tmp_path / "m.safetensors")
    reference = plain(w)
    with torch.no_grad():
        reference[0].weight.copy_(w)
    with seeded():
        x = torch.randn(3, w.shape[1])
    close: Any = {"rtol": 5e-2, "atol": 5e-2} if w.dtype.itemsize == 2 else {}
    torch.testing.assert_close(model(x), reference(x), **close)
    delta = disturb(pl.attach(model, pl.LoRA(rank=2, targets="0"), "a"))
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in delta.parameters())
    pl.save(delta, tmp_path / "a.safetensors")
    expected = model(x)
    if name == "int8":
        pl.merge(model, "a")
        pl.unmerge(model, "a")
    else:
        with pytest.raises(pl.PeftliteError, match="is read here, and not written"):
            pl.merge(model, "a")
    assert torch.equal(model(x), expected)
    again = plain(w)
    state = {k: t for k, t in model.state_dict().items() if ".peftlite." not in k}
    safetensors.torch.save_file(state, tmp_path / "again.safetensors")
    pl.quantize(again, checkpoint=tmp_path / "again.safetensors")
    pl.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again(x), expected)
    pl.detach(again, "a")
    pl.dequantize(again)
    torch.testing.assert_close(again(x), reference(x), **close)


def test_a_second_version_keeps_zeros_as_they_are(tmp_path: Path) -> None:
    found, w = gptq(4, version=2)
    model = plain(w)
    state = {k: t for k, t in model.state_dict().items() if k != "0.weight"}
    packed = {f"0.{key}": tensor for key, tensor in found.items()}
    safetensors.torch.save_file({**state, **packed}, tmp_path / "model.safetensors")
    said = '{"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}'
    (tmp_path / "config.json").write_text(said)
    pl.quantize(model, checkpoint=tmp_path)
    assert torch.equal(model[0].weight + 0, w)


def test_how_many_inputs_share_a_scale_may_have_to_be_told() -> None:
    found, w = awq_gemv()
    how, parts = others.read(found, w.shape, w.dtype, {"group_size": 32})
    assert torch.equal(how.unpack(parts), w)
    assert keys.read(keys.written(how, parts))[0] == how
    for said in ({}, {"group_size": 48}, {"group_size": "all"}):
        with pytest.raises(pl.PeftliteError, match="of no packing that is known here"):
            others.read(found, w.shape, w.dtype, said)
    module: Any = QuantLinear(found, w)
    module.group_size = 32
    assert torch.equal(others.packed(module) + 0, w)


FOLDERS = {
    "gptq4": (lambda: gptq(4), {"quant_method": "gptq"}),
    "gptq_order": (lambda: gptq(4, order=True), {"quant_method": "gptq"}),
    "awq": (awq, {"quant_method": "awq"}),
    "awq_gemv": (awq_gemv, {"quant_method": "awq", "version": "gemv", "group_size": 32}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_it_is_read_as_a_model(name: str, tmp_path: Path) -> None:
    """With what config.json says of it there, and none of the libraries that it names."""
    make, said = FOLDERS[name]
    found, w = make()
    model, key = llama(), "model.layers.0.self_attn.k_proj."
    model.get_submodule(key[:-1]).weight.data = w.bfloat16()
    model.save_pretrained(tmp_path / "plain")
    model.config.quantization_config = said
    model.save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    state = safetensors.torch.load_file(file)
    del state[f"{key}weight"]
    safetensors.torch.save_file(state | {key + k: t for k, t in found.items()}, file)
    ids = torch.arange(12)[None]
    plain, packed = (local.model(str(tmp_path / folder)) for folder in ("plain", "packed"))
    assert torch.equal(plain(ids).logits, packed(ids).logits)


@pytest.mark.parametrize("b", range(1, 9))
def test_codes_of_any_width_are_read(b: int) -> None:
    with seeded():
        q = torch.randint(2**b, (64, 3))
    assert torch.equal(bits(packed(q, b).t(), b, 61), q.t()[:, :61].to(torch.uint8))


def test_one_scale_of_all_may_be_a_number_without_a_dimension() -> None:
    q = torch.randn(8, 4).to(torch.float8_e4m3fn)
    found = {"": q, "weight_scale": torch.tensor(0.5)}
    how, parts = others.read(found, q.shape, torch.float32, {})
    assert torch.equal(how.unpack(parts), q.float() / 2)

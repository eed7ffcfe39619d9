"""Checkpoints that others packed, in a plain model; and what is packed here, for them to read."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import peftlite as pl
from peftlite.commands import local
from peftlite.core.tensors import raw
from tests.digest import assert_same, digest
from tests.packed.llama import HERE, llama
from tests.test_packed import mlp, packed_bytes

BNB = HERE / "bitsandbytes"
STATE = "quant_state.bitsandbytes__nf4"
X = torch.arange(6)[None]


def on_meta() -> Any:
    """A model without numbers, as one too large for memory is built; its buffers have theirs."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return llama(None)


@pytest.mark.parametrize("build", [on_meta, llama], ids=["meta", "plain"])
def test_a_packed_checkpoint_fills_a_plain_model(build: Any) -> None:
    """The weights are those that bitsandbytes forms, and what trains on them trains."""
    model = build().eval()
    packs = pl.quantize(model, checkpoint=BNB)
    formed = safetensors.torch.load_file(HERE / "bitsandbytes_formed.safetensors")
    assert packs.shapes.keys() == formed.keys() and packs.kind == "nf4"
    for name, theirs in formed.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(raw(module, "weight").form(), theirs)
    plain = llama()
    plain.load_state_dict(formed, strict=False)
    assert torch.equal(model(X).logits, plain(X).logits)
    delta = pl.attach(model, pl.LoRA(rank=2), "a")
    model(X).logits.float().square().sum().backward()
    assert all(p.grad is not None for p in delta.parameters())


def test_a_tied_head_is_tied_again_where_the_model_was_built_without_numbers(
    tmp_path: Path,
) -> None:
    """`init_empty_weights` makes a parameter of each place, and the file has the tied one once."""
    from accelerate import init_empty_weights
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=16, tie_word_embeddings=True, **heads, **sizes)
    model = Qwen2ForCausalLM(config).eval()
    pl.quantize(model, "nf4")
    model.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = Qwen2ForCausalLM(config).eval()
    pl.quantize(empty, checkpoint=tmp_path)
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert torch.equal(empty(X).logits, model(X).logits)


def test_what_is_packed_here_is_the_checkpoint_that_bitsandbytes_writes(tmp_path: Path) -> None:
    """Every key, every byte and what config.json has to say, so that transformers reads it."""
    model, theirs = llama(), safetensors.torch.load_file(BNB / "model.safetensors")
    packs = pl.quantize(model, "nf4", targets="*_proj")
    model.config.quantization_config = packs.config
    model.save_pretrained(tmp_path)
    mine = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        if key.endswith(STATE):
            said = [json.loads(bytes(t.tolist())) for t in (tensor, theirs[key])]
            assert said[0] == said[1]
        else:
            assert torch.equal(tensor, theirs[key])
    said = [json.loads((f / "config.json").read_text()) for f in (tmp_path, BNB)]
    ours, known = (config["quantization_config"] for config in said)
    known["llm_int8_skip_modules"] = ["lm_head"]  # what transformers leaves by itself
    assert ours.items() <= known.items()


def test_what_no_library_has_layers_for_has_no_config() -> None:
    assert pl.quantize(mlp(), "int8").config is None
    conv = nn.Sequential(nn.Conv1d(64, 64, 3), nn.Linear(64, 2))
    assert pl.quantize(conv).config is None
    packs = pl.quantize(mlp(), targets="0")
    assert packs.config is not None and packs.config["llm_int8_skip_modules"] == ["2"]


def test_tied_and_other_tensors_come_along(tmp_path: Path) -> None:
    """Statistics and biases, a tied table once, each in the dtype that the model has."""

    def build() -> Any:
        table, head = nn.Embedding(80, 64), nn.Linear(64, 80, bias=False)
        head.weight = table.weight
        return nn.Sequential(table, nn.Linear(64, 64), nn.BatchNorm1d(64), head)

    model, other = build(), build().to(torch.bfloat16)
    model[2].running_mean.fill_(0.5)
    pl.quantize(model, targets=["0", "1"])
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("3.")}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    packs = pl.quantize(other, checkpoint=tmp_path / "m.safetensors")
    assert [*packs.shapes] == ["0.weight", "1.weight"]
    assert other[0]._parameters["weight"] is other[3]._parameters["weight"]
    assert packed_bytes(other).keys() == packed_bytes(model).keys()
    assert other[2].running_mean.float().eq(0.5).all() and other[1].bias.dtype is torch.bfloat16
    ids = torch.randint(80, (4,))
    torch.testing.assert_close(other.eval()(ids).float(), model.eval()(ids), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("cut", ["header", "tensor"])
def test_a_file_that_is_cut_short_changes_nothing(cut: str, tmp_path: Path) -> None:
    model = llama()
    before = digest(model)
    data = (BNB / "model.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[: 100 if cut == "header" else -100])
    with pytest.raises(pl.FileError, match="damaged"):
        pl.quantize(model, checkpoint=tmp_path / "m.safetensors")
    assert_same(before, digest(model))


def test_what_a_model_computes_may_be_in_an_older_file(tmp_path: Path) -> None:
    model = mlp()
    pl.quantize(model)
    state = {**model.state_dict(), "0.position_ids": torch.arange(3)}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    other = mlp()
    with pytest.raises(pl.FileError, match="that the model lacks: 0"):
        pl.quantize(other, checkpoint=tmp_path / "m.safetensors")
    other[0].register_buffer("position_ids", torch.arange(4), persistent=False)
    pl.quantize(other, checkpoint=tmp_path / "m.safetensors")
    assert other[0].position_ids.tolist() == [0, 1, 2, 3]
    assert packed_bytes(other).keys() == packed_bytes(model).keys()


def test_a_folder_of_bitsandbytes_is_read_as_a_model() -> None:
    model, filled = llama(), local.model(str(BNB))
    pl.quantize(model, checkpoint=BNB)
    theirs, ours = filled.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())
    assert filled.config.quantization_config["quant_method"] == "bitsandbytes"
    assert filled.model.rotary_emb.inv_freq.dtype is torch.float32

"""GGUF: what llama.cpp reads of a delta is the delta, in its names and its order of rows."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from gguf import GGUFReader
from torch import Tensor, nn

import peftlite as pl
from peftlite import cli
from peftlite.io.gguf import ARCHITECTURES
from tests.zoo import seeded

HEADS, KV = 4, 2
PLAIN = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=HEADS,
    num_key_value_heads=KV, vocab_size=32, max_position_embeddings=16, pad_token_id=0,
    bos_token_id=0, eos_token_id=0, num_experts=2, num_local_experts=2, moe_intermediate_size=8,
)  # fmt: skip
OTHERS = dict(n_embd=16, n_layer=2, n_head=HEADS, n_positions=16, vocab_size=32, pad_token_id=0,
              hidden_size=16, d_model=16, n_layers=2, n_heads=HEADS,
              bos_token_id=0, eos_token_id=0)  # fmt: skip
FALCON = {**PLAIN, "num_kv_heads": KV, "new_decoder_architecture": True}
CONFIGS = {
    **dict.fromkeys(ARCHITECTURES, PLAIN),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "bloom", "mpt"), OTHERS),
    "falcon": FALCON,
}


def base(kind: str, **more: Any) -> Any:
    with seeded():
        config = hf.AutoConfig.for_model(kind, **CONFIGS[kind], **more)
        auto = hf.AutoModel if kind == "bert" else hf.AutoModelForCausalLM
        return auto.from_config(config).eval()


def attached(model: nn.Module) -> pl.Delta:
    """Scales that differ from module to module, and from what any rank gives."""
    names = [name for name, _ in model.named_modules()]
    left = [name for name in names if name.endswith((".experts", "pooler"))]
    outputs = [name for name in names if re.search(r"[.]0[.].*(o_proj|c_proj|dense)$", name)]
    methods = [pl.LoRA(rank=2, alpha=5, scaling="rslora", exclude=left)]
    if outputs:
        methods.append(pl.LoRA(rank=3, alpha=1, targets=outputs))
    delta = pl.attach(model, methods, name="sql")
    return drawn(delta)


def drawn(delta: pl.Delta) -> pl.Delta:
    with seeded(1):
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
    return delta


def changes(path: Path) -> dict[str, Tensor]:
    """(α/r)·BA of each tensor, in fp64, as llama.cpp has it."""
    reader = GGUFReader(path)
    t = {tensor.name: torch.from_numpy(np.array(tensor.data)).double() for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    found = {}
    for name in t:
        if name.endswith(".lora_a"):
            a, b = t[name], t[name[:-1] + "b"]
            a = a.T if "token_embd" in name else a
            found[name.removesuffix(".weight.lora_a")] = alpha / b.shape[1] * b @ a
    assert len(t) == 2 * len(found)
    return found


def ours(delta: pl.Delta) -> dict[str, Tensor]:
    """s·BA of each site, outputs first, in fp64."""
    found = {}
    for address, item in delta.placed.items():
        patch: Any = item.patch
        r = patch.a.shape[0]
        s = item.method.alpha / (r**0.5 if item.method.scaling == "rslora" else r)
        found[address] = (s * patch.b.double() @ patch.a.double()).detach()
    return found


# -- the order of rows, one by one


def halves(rows: Tensor, heads: int) -> Tensor:
    """Within a head, the first of each half, then the second of each half, …"""
    d, found = len(rows) // heads, torch.empty_like(rows)
    for row in range(len(rows)):
        head, place = divmod(row, d)
        half, at = divmod(place, d // 2)
        found[head * d + 2 * at + half] = rows[row]
    return found


def fused(rows: Tensor, groups: int) -> Tensor:
    """Of each group its queries; then all keys; then all values."""
    d = 16 // HEADS
    each = [list(group.split(d)) for group in rows.split(len(rows) // groups)]
    return torch.cat([*(x for g in each for x in g[:-2]), *(g[-2] for g in each),
                      *(g[-1] for g in each)])  # fmt: skip


def expected(kind: str, address: str, change: Tensor) -> Tensor:
    order: dict[str, Callable[[Tensor], Tensor]] = {}
    if kind in ("llama", "mistral", "mixtral", "arcee", "granite", "olmo", "smollm3"):
        order = {"q_proj": lambda x: halves(x, HEADS), "k_proj": lambda x: halves(x, KV)}
    if kind in ("bloom", "falcon", "gpt_neox"):
        order = {"query_key_value": lambda x: fused(x, KV if kind == "falcon" else HEADS)}
    return order.get(address.split(".")[-2], lambda x: x)(change)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_holds_each_change_to_the_last_digits(kind: str, tmp_path: Path) -> None:
    model = base(kind)
    delta = attached(model)
    pl.export(delta, tmp_path / "sql.gguf", format="gguf")
    found = changes(tmp_path / "sql.gguf")
    assert len(found) == len(delta.placed)
    for (address, change), (name, other) in zip(ours(delta).items(), found.items(), strict=True):
        assert [n for n in address.split(".") if n.isdigit()] == [name.split(".")[1]]
        torch.testing.assert_close(
            other, expected(kind, address, change), rtol=0, atol=3e-7 * change.abs().max().item()
        )


def test_says_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    model = base("llama", tie_word_embeddings=False)
    delta = attached(model)
    pl.export(delta, tmp_path / "sql.gguf", "gguf", settings={"general.author": "me"})
    reader = GGUFReader(tmp_path / "sql.gguf")
    told = {key: field.contents() for key, field in reader.fields.items() if "." in key}
    assert told.pop("adapter.lora.alpha") > 0
    assert {key: told[key] for key in told if not key.startswith("GGUF.")} == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
        "general.name": "sql", "general.author": "me",
    }  # fmt: skip
    names = [tensor.name for tensor in reader.tensors]
    assert names[:2] == ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]
    assert all(tensor.data.dtype == np.float32 for tensor in reader.tensors)


def test_one_scale_for_all_leaves_every_bit(tmp_path: Path) -> None:
    model = base("qwen2", tie_word_embeddings=False)
    delta = pl.attach(model, pl.LoRA(rank=3, alpha=7, targets=["embed_tokens", "lm_head"]))
    drawn(delta)
    pl.export(delta, tmp_path / "sql.gguf", "gguf")
    reader = GGUFReader(tmp_path / "sql.gguf")
    t = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    own = {key.rpartition(".")[2]: p for key, p in delta.named_parameters()}
    assert float(reader.fields["adapter.lora.alpha"].contents()) == 7
    assert t.keys() == {f"{n}.weight.lora_{x}" for n in ("token_embd", "output") for x in "ab"}
    patches: dict[str, Any] = {a: item.patch for a, item in delta.placed.items()}
    embed, head = patches["model.embed_tokens.weight"], patches["lm_head.weight"]
    assert torch.equal(t["token_embd.weight.lora_a"], embed.a.detach().T), own.keys()
    assert torch.equal(t["token_embd.weight.lora_b"], embed.b.detach())
    assert torch.equal(t["output.weight.lora_a"], head.a.detach())
    assert torch.equal(t["output.weight.lora_b"], head.b.detach())


@pytest.mark.parametrize("queries", [True, False])
def test_falcons_of_one_key_and_of_many(queries: bool, tmp_path: Path) -> None:
    config = {**FALCON, "new_decoder_architecture": False, "multi_query": queries}
    del config["num_kv_heads"]
    model: Any = hf.FalconForCausalLM(hf.FalconConfig(**config))
    delta = pl.attach(model, pl.LoRA(rank=2, alpha=3, targets="query_key_value"))
    drawn(delta)
    pl.export(delta, tmp_path / "sql.gguf", "gguf")
    (change, _), (found, _) = ours(delta).values(), changes(tmp_path / "sql.gguf").values()
    torch.testing.assert_close(found, fused(change, 1 if queries else HEADS), atol=1e-6, rtol=0)


def test_turned_neighbours_are_turned_halves() -> None:
    """Why llama.cpp orders rows: it turns pairs of neighbours, and transformers halves."""
    q, k, angle = torch.randn(2, 8), torch.randn(2, 8), torch.randn(4)
    scores = []
    for turned, order in ((False, lambda x: x), (True, lambda x: halves(x.T, 1).T)):
        a, b = order(q), order(k)
        turn = (lambda x: (x[:, ::2], x[:, 1::2])) if turned else (lambda x: x.chunk(2, 1))
        (a0, a1), (b0, b1) = turn(a), turn(b)
        a = a0 * angle.cos() - a1 * angle.sin(), a0 * angle.sin() + a1 * angle.cos()
        scores.append(a[0] @ b0.T + a[1] @ b1.T)
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon"])
def test_convert_needs_no_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = base(kind)
    model.save_pretrained("base")
    delta = attached(model)
    pl.save(delta, "sql.safetensors")
    pl.export(delta, "one.gguf", format="gguf")
    given = "convert", "sql.safetensors", "two.gguf", "--to", "gguf", "--base", "base"
    assert cli.main([*given]) == 0
    one, two = changes(Path("one.gguf")), changes(Path("two.gguf"))
    assert one.keys() == two.keys()
    assert all(torch.equal(change, two[name]) for name, change in one.items())

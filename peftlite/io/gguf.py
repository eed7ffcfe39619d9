"""GGUF: a delta of low-rank products as a file that llama.cpp takes with --lora.

    blk.0.attn_q.weight.lora_a (r, i), blk.0.attn_q.weight.lora_b (o, r): W' = W + (α/r)·BA

There is one α for all, so what a module's own scale differs by goes into its B. Rows of B are in
the order that llama.cpp's converter gives the rows of W.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlite.core import maps
from peftlite.core.assign import Placed
from peftlite.core.delta import Delta
from peftlite.core.site import walk
from peftlite.errors import PeftliteError
from peftlite.io.files import is_finite, replacing
from peftlite.io.names import unwrapped
from peftlite.io.refusal import not_by_itself, refusal
from peftlite.methods.dora import DoRAPatch
from peftlite.methods.low_rank import LowRankPatch
from peftlite.table import short

Order = Callable[[Tensor, Any], Tensor]
_MATRICES = (maps.TransposedLinear, maps.Embedding)


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Rows by heads of two halves each, which rotate together: one of either after another."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _queries(rows: Tensor, config: Any) -> Tensor:
    return _paired(rows, _first(config, "num_attention_heads"))


def _keys(rows: Tensor, config: Any) -> Tensor:
    return _paired(rows, _first(config, "num_key_value_heads", "num_attention_heads"))


def _apart(rows: Tensor, config: Any) -> Tensor:
    """Rows by groups of heads, each its queries, a key and a value: all queries, keys, values."""
    heads = _first(config, "num_attention_heads", "n_head")
    groups = _first(config, "num_kv_heads", "n_head_kv") or heads
    if getattr(config, "multi_query", False) and not _first(config, "new_decoder_architecture"):
        groups = 1
    each = rows.unflatten(0, (groups, heads // groups + 2, -1))
    return torch.cat([part.flatten(0, 2) for part in (each[:, :-2], each[:, -2:-1], each[:, -1:])])


def _first(config: Any, *names: str) -> Any:
    """The first of some numbers that a config has."""
    return next((n for name in names if (n := getattr(config, name, None))), None)


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's name of an architecture, and how it orders the rows of its modules."""

    name: str
    orders: Mapping[str, Order] = field(default_factory=dict)


_PAIRS = {"q_proj": _queries, "k_proj": _keys}
_FUSED = {"query_key_value": _apart}

# by transformers' model_type: those whose rows llama.cpp's converter is known to order so
ARCHITECTURES = {
    **{kind: Architecture("llama", _PAIRS) for kind in ("llama", "mistral", "mixtral")},
    **{kind: Architecture(kind, _PAIRS) for kind in ("arcee", "granite", "olmo", "smollm3")},
    **{kind: Architecture(kind, _FUSED) for kind in ("bloom", "falcon")},
    **{
        kind: Architecture(kind)
        for kind in ("bert", "cohere2", "gemma", "gemma2", "gpt2", "mpt", "nemotron", "olmo2",
                     "phi3", "qwen2", "qwen3", "stablelm", "starcoder2")
    },
    "cohere": Architecture("command-r"),
    "gemma3_text": Architecture("gemma3"),
    "gpt_bigcode": Architecture("starcoder"),
    "gpt_neox": Architecture("gptneox", _FUSED),
    "phi": Architecture("phi2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3_moe": Architecture("qwen3moe"),
}  # fmt: skip


def write(delta: Delta, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes a delta as a file that llama.cpp loads. Raises PeftliteError."""
    try:
        import gguf
    except ImportError as error:
        raise PeftliteError("format='gguf' needs gguf: pip install 'peftlite[gguf]'") from error
    metadata = {"general.name": delta.name, **(settings or {})}
    if not all(isinstance(x, str) for item in metadata.items() for x in item):
        raise PeftliteError(f"settings are a file's metadata, all text: not {short(settings)}")
    config, architecture = _architecture(delta)
    alpha, tensors = _tensors(delta, config, architecture, gguf)
    with tempfile.TemporaryDirectory() as folder, replacing(path) as out:
        writer = gguf.GGUFWriter(made := Path(folder) / "lora.gguf", architecture.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for key, text in metadata.items():
            writer.add_string(key, text)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(made, "rb") as file:
            shutil.copyfileobj(file, out)


def _architecture(delta: Delta) -> tuple[Any, Architecture]:
    """The config of a delta's model, and what llama.cpp has for it. Raises PeftliteError."""
    root = None if delta.home is None else delta.home.root
    _, model = (None, None) if root is None else next(walk(root))
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise PeftliteError(
            f"a GGUF has llama.cpp's names, which go by the model's config.model_type: this has "
            f"{short(kind)}, and these are known: {', '.join(sorted(ARCHITECTURES))}"
        )
    return config, ARCHITECTURES[kind]


@torch.no_grad()
def _tensors(
    delta: Delta, config: Any, architecture: Architecture, gguf: Any
) -> tuple[float, dict[str, Tensor]]:
    """α, and all tensors by llama.cpp's names."""
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    blocks = 1 + max(map(int, re.findall(r"\d+", " ".join(delta.placed))), default=0)
    names = gguf.get_tensor_name_map(arch, blocks).mapping
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    for item in delta.placed.values():
        path = _check(item)
        name = next((names[p][1] for p in _paths(path) if p in names), "")
        # by other names it has heads, which differ from model to model
        if not name.startswith(("blk.", "token_embd", "output")):
            raise _refuse(item, f"llama.cpp's {architecture.name} has no name for it")
        patch: Any = item.patch
        a, b = (x.double() for x in patch.factors())
        if order := architecture.orders.get(path.rpartition(".")[2]):
            b = order(b, config)
        a = a.mT if maps.kind_of(item.site.module) is maps.Embedding else a
        found[name] = a, b, patch.scale * b.shape[1]
    alpha = float(np.float32(max(alpha for *_, alpha in found.values()))) or 1.0
    tensors = {}
    for name, (a, b, own) in found.items():
        tensors |= {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b * (own / alpha)}
    return alpha, tensors


def _paths(path: str) -> tuple[str, str, str]:
    """A path, and what it would be in a model with a head, and in one without."""
    return path, f"model.{path}", path.partition(".")[2]


def _check(item: Placed) -> str:
    """The path of a matrix that can be in a GGUF. Raises PeftliteError."""
    item.check()
    site, patch = item.site, item.patch
    if not isinstance(patch, LowRankPatch) or isinstance(patch, DoRAPatch):
        raise _refuse(item, f"there it has LoRA, and no {type(item.method).__name__}")
    matrix = isinstance(site.module, nn.Linear) or maps.kind_of(site.module) in _MATRICES
    if site.index is not None or site.slot != "weight" or not matrix:
        raise _refuse(item, "there it has whole matrices of linear layers and embeddings")
    if why := not_by_itself(site):
        raise _refuse(item, why)
    if not all(map(is_finite, patch.factors())):
        raise _refuse(item, "it has values that aren't finite")
    return unwrapped(site.address).removesuffix(".weight")


def _refuse(item: Placed, why: str) -> PeftliteError:
    return refusal(item, "a GGUF", why)

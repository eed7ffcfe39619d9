"""Real adapters beside the methods that change calls: from the same values, the same logits.

A preset is compared on models where AdapterHub's library puts it to the use of its paper: under
transformers whose norms come before the sublayers, its pfeiffer reads the residual stream with the
output added, and its parallel the residual stream before the norm. A prefix takes no positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPTJConfig,
    GPTJForCausalLM,
)

import peftlite as pl
from peftlite.methods.compacter import Compacter
from peftlite.methods.loreft import LoReFT
from peftlite.methods.prefix import PrefixTuning
from tests.zoo import (
    CLASSES,
    HIDDEN,
    KINDS,
    TOKENS,
    VOCAB,
    WIDTH,
    Kind,
    bert_inputs,
    logits,
    seeded,
)

if int(transformers.__version__.partition(".")[0]) >= 5:
    pytest.skip("adapters 1.3 is for transformers 4.57", allow_module_level=True)

import adapters
from adapters import (
    CompacterConfig,
    DoubleSeqBnConfig,
    LoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)

# its own T5
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning")


def distilbert() -> nn.Module:
    """Its norms come after the sums, as BERT's do, and its feed-forward is a module."""
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCAB,
            dim=WIDTH,
            n_layers=2,
            n_heads=2,
            hidden_dim=HIDDEN,
            max_position_embeddings=TOKENS,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            num_labels=CLASSES,
        )
    )


def gptj() -> nn.Module:
    sizes = {"n_positions": TOKENS, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
    return GPTJForCausalLM(GPTJConfig(vocab_size=VOCAB, **sizes))


KIND = {kind.name: kind for kind in KINDS}
KIND["hf_gptj"] = replace(KIND["hf_gpt2"], name="hf_gptj", make=gptj)
KIND["hf_distilbert"] = Kind("hf_distilbert", distilbert, bert_inputs, logits)

# where adapters keeps the bottleneck at a call
HOMES = {
    "hf_bert": {"output.dense()": "output", "output.LayerNorm()": "output"},
    "hf_distilbert": {
        "attention()": "attention_adapters",
        "ffn()": "output_adapters",
        "output_layer_norm()": "output_adapters",
    },
    "hf_gpt2": {"attn()": "attention_adapters", "mlp()": "output_adapters"},
    "hf_llama": {"self_attn()": "attention_adapters", "mlp()": "output_adapters"},
    "hf_t5": {".SelfAttention()": "", ".EncDecAttention()": "", ".DenseReluDense()": ""},
    "hf_vit": {
        "attention.output.dense()": "attention_adapters",
        "output.dense()": "output.output_adapters",
        "output()": "output.output_adapters",
    },
}


# -- what is ours, and what adapters has for it

Pairs = Iterator[tuple[Tensor, Tensor]]


def homes(model: nn.Module, kind: Kind, delta: pl.Delta) -> Iterator[tuple[Any, Any]]:
    """Each patch with the bottleneck of adapters."""
    for address, placed in delta.placed.items():
        call, home = next(pair for pair in HOMES[kind.name].items() if address.endswith(pair[0]))
        path = address.removesuffix(call) + home
        yield placed.patch, model.get_submodule(f"{path}.adapters.a")


def bottleneck(model: nn.Module, kind: Kind, delta: pl.Delta) -> Pairs:
    for patch, adapter in homes(model, kind, delta):
        down, up = adapter.adapter_down[0], adapter.adapter_up
        yield from ((patch.down, down.weight), (patch.down_bias, down.bias))
        yield from ((patch.up, up.weight), (patch.up_bias, up.bias))


def compacter(model: nn.Module, kind: Kind, delta: pl.Delta) -> Pairs:
    """Its maps are written for rows, x Σⱼ Aⱼ ⊗ uⱼvⱼ: the transposes of ours."""
    for patch, adapter in homes(model, kind, delta):
        down, up = adapter.adapter_down[0], adapter.adapter_up
        yield patch.a, model.base_model.shared_parameters["a"]["phm_rule"].mT
        yield from ((patch.down_u, down.W_right), (patch.down_v, down.W_left.mT))
        yield from ((patch.up_u, up.W_right), (patch.up_v, up.W_left.mT))
        yield from ((patch.down_bias, down.b), (patch.up_bias, up.b))


def loreft(model: nn.Module, kind: Kind, delta: pl.Delta) -> Pairs:
    """R is that of the reflections of its QR, but for signs: S·R with S·W and S·b is the same."""
    for address, placed in delta.placed.items():
        path = address.removesuffix("()") + ".reft_layer.refts.a.units.0"
        unit = model.get_submodule(path)
        packed, _ = torch.geqrf(unit.projection.weight.mT)
        signs = packed.diagonal().sign()
        yield placed.patch.v, packed.tril(-1).fill_diagonal_(1.0).mT
        yield placed.patch.w, signs[:, None] * unit.learned_source.weight
        yield placed.patch.b, signs * unit.learned_source.bias


def pool(model: nn.Module) -> Any:
    """The one network, or table, that gives the prefixes of all layers."""
    found = (m for name, m in model.named_modules() if name.endswith("prefix_tunings.a"))
    (prefix,) = next(found).values()
    return prefix


def prefixes(model: nn.Module, kind: Kind, delta: pl.Delta) -> Pairs:
    """A token's keys and values lie side by side for all layers."""
    for i, placed in enumerate(delta.placed.values()):
        prefix = placed.patch.prefix
        _, h, n, d = prefix.shape
        yield prefix, pool(model).control_trans.view(n, -1, 2, h, d)[:, i].permute(1, 2, 0, 3)


def reparametrized(model: nn.Module, kind: Kind, delta: pl.Delta) -> Pairs:
    patches = [placed.patch for placed in delta.placed.values()]
    trunk, (down, _, up) = patches[0].trunk, pool(model).control_trans
    yield from ((trunk.embedding, pool(model).wte.weight), (trunk.down, down.weight))
    yield trunk.down_bias, down.bias
    yield from zip((p.up for p in patches), up.weight.chunk(len(patches)), strict=True)
    yield from zip((p.up_bias for p in patches), up.bias.chunk(len(patches)), strict=True)


# -- the table


@dataclass(frozen=True)
class Row:
    """A method in both libraries."""

    name: str
    ours: pl.Method
    theirs: adapters.AdapterConfig
    pairs: Callable[[nn.Module, Kind, pl.Delta], Pairs]
    kinds: tuple[str, ...] = tuple(HOMES)


ROWS = (
    Row(
        "houlsby",
        pl.BottleneckAdapter(reduction_factor=4, activation="silu"),
        DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True),
        bottleneck,
    ),
    Row(
        "pfeiffer",
        pl.BottleneckAdapter(preset="pfeiffer", reduction_factor=4),
        SeqBnConfig(reduction_factor=4),
        bottleneck,
        ("hf_bert", "hf_vit"),
    ),
    Row(
        "pfeiffer_named",
        pl.BottleneckAdapter(preset="pfeiffer", reduction_factor=4, targets="output_layer_norm()"),
        SeqBnConfig(reduction_factor=4),
        bottleneck,
        ("hf_distilbert",),
    ),
    Row(
        "parallel",
        pl.BottleneckAdapter(preset="parallel", reduction_factor=4),
        ParBnConfig(reduction_factor=4),
        bottleneck,
        ("hf_distilbert",),
    ),
    Row(
        "compacter",
        Compacter(reduction_factor=4, phm_dim=2),
        CompacterConfig(reduction_factor=4, phm_dim=2, cross_adapter=True),
        compacter,
    ),
    Row(
        "compacter++",  # its preset of this name goes where its pfeiffer does
        Compacter(preset="compacter++", reduction_factor=4, phm_rank=2),
        CompacterConfig(reduction_factor=4, phm_rank=2, mh_adapter=False),
        compacter,
    ),
    Row(
        "loreft",
        LoReFT(rank=2, positions="f3"),
        LoReftConfig(r=2, prefix_positions=3, tied_weights=True, dropout=0.0),
        loreft,
    ),
    Row(
        "loreft_ends",
        LoReFT(rank=2, positions="f2+l2"),
        LoReftConfig(r=2, prefix_positions=2, suffix_positions=2, tied_weights=True, dropout=0.0),
        loreft,
        ("hf_gpt2", "hf_llama", "hf_vit"),
    ),
    Row(
        "prefix",
        PrefixTuning(3),
        PrefixTuningConfig(prefix_length=3, flat=True),
        prefixes,
        ("hf_bert", "hf_gpt2", "hf_llama", "hf_vit", "hf_gptj"),  # the last attends by hand
    ),
    Row(
        "prefix_reparametrized",
        PrefixTuning(3, reparametrize=True, hidden_size=5),
        PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
        reparametrized,
        ("hf_bert", "hf_gpt2", "hf_vit"),
    ),
)


@pytest.mark.parametrize(
    "row, kind",
    [pytest.param(row, KIND[kind], id=f"{row.name}-{kind}") for row in ROWS for kind in row.kinds],
)
@torch.no_grad()
def test_the_same_values_give_the_same_logits(row: Row, kind: Kind) -> None:
    ours, theirs, batch = kind.model(), kind.model(), kind.batch()
    base, configs = kind.run(ours, batch), type(theirs.config)
    theirs.set_attn_implementation("eager")  # under sdpa its prefix is lost in causal attention
    delta = pl.attach(ours, row.ours)
    with mock.patch.object(configs, "attribute_map", configs.attribute_map):  # it adds its names
        adapters.init(theirs)
        theirs.add_adapter("a", row.theirs, set_active=True)
        learned = {name: p for name, p in theirs.named_parameters() if ".a." in name}
        with seeded(3):
            for name, parameter in learned.items():
                if not name.endswith(".original"):  # an R is random, and not orthonormal if moved
                    parameter.add_(0.3 * torch.randn_like(parameter))
        expected = kind.run(theirs.eval(), batch)
    assert sum(p.numel() for p in learned.values()) == delta.num_parameters
    pairs = list(row.pairs(theirs, kind, delta))
    assert {id(own) for own, _ in pairs} == {id(own) for own in delta.parameters()}
    for own, their in pairs:
        assert own.shape == their.shape
        own.copy_(their)
    output = kind.run(ours, batch)
    assert (output - expected).abs().max() <= 1e-5 < (expected - base).abs().max()

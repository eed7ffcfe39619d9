"""Targets: what every pattern takes, on every kind of model, and the plan that shows it first."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import LlamaConfig, LlamaForCausalLM

import peftlite as pl
from peftlite.core.site import sites
from tests.digest import assert_same, bits, digest
from tests.zoo import KINDS, Kind

ZOO = {kind.name: kind for kind in KINDS}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


class Watch(pl.Patch):
    """A call left as it is."""

    def call(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)


@dataclass(frozen=True)
class Watching(pl.Method):
    """A method that works on calls, as adapters and prefixes do."""

    takes = "calls"

    def accepts(self, site: pl.Site) -> bool:
        return site.is_call

    def build(self, site: pl.Site) -> Watch:
        if not site.is_call:
            raise self.refuse(site)
        return Watch()


def taken(model: nn.Module | str, method: pl.Method | list[pl.Method]) -> list[str]:
    """The addresses that a method takes, in the order of the alphabet."""
    model = ZOO[model].make() if isinstance(model, str) else model
    return sorted(pl.plan(model, method).addresses)


def expand(pattern: str) -> list[str]:
    """`a.{0,1}.b {c,d}` is `a.0.b a.1.b c d`."""
    words = []
    for word in pattern.split():
        parts = re.split(r"\{([^}]*)\}", word)
        expanded = [parts[0]]
        for options, rest in zip(parts[1::2], parts[2::2], strict=True):
            expanded = [head + o + rest for head in expanded for o in options.split(",")]
        words += expanded
    return sorted(words)


# -- what a pattern takes

ALL = "blocks.{0,1}.attn.{q,k,v,o}_proj.weight blocks.{0,1}.mlp.{0,2}.weight"
ATTENTION, MLP = ALL.split()


def in_mlp(site: pl.Site) -> bool:
    return ".mlp." in site.address


LORA_ON_GPT: list[tuple[Any, str]] = [
    # a word is the end of a path
    ("q_proj", "blocks.{0,1}.attn.q_proj.weight"),
    ("attn", ATTENTION),
    ("lm_head", "lm_head.weight"),
    ("embed", "embed.weight"),
    ("2", "blocks.{0,1}.mlp.2.weight"),
    ("1", "blocks.1.attn.{q,k,v,o}_proj.weight blocks.1.mlp.{0,2}.weight"),
    # so are words with dots, unless they are a whole path
    ("attn.q_proj", "blocks.{0,1}.attn.q_proj.weight"),
    ("mlp.0", "blocks.{0,1}.mlp.0.weight"),
    ("q_proj.weight", "blocks.{0,1}.attn.q_proj.weight"),
    ("0.attn", "blocks.0.attn.{q,k,v,o}_proj.weight"),
    # a path names a module and all in it, or a tensor
    ("blocks", ALL),
    ("blocks.1", "blocks.1.attn.{q,k,v,o}_proj.weight blocks.1.mlp.{0,2}.weight"),
    ("blocks.0.attn", "blocks.0.attn.{q,k,v,o}_proj.weight"),
    ("blocks.0.attn.q_proj", "blocks.0.attn.q_proj.weight"),
    ("blocks.0.attn.q_proj.weight", "blocks.0.attn.q_proj.weight"),
    # a glob crosses dots, and takes only what the method can
    ("*", "embed.weight position.weight lm_head.weight " + ALL),
    ("*attn*", ATTENTION),
    ("*.attn.*", ATTENTION),
    ("blocks.0.*", "blocks.0.attn.{q,k,v,o}_proj.weight blocks.0.mlp.{0,2}.weight"),
    ("blocks.*.mlp.2", "blocks.{0,1}.mlp.2.weight"),
    ("*_proj.weight", ATTENTION),
    # a regex matches a whole path, of a module or of a tensor
    (re.compile(r".*\.(q|v)_proj"), "blocks.{0,1}.attn.{q,v}_proj.weight"),
    (re.compile(r"blocks\.\d\.mlp\.\d\.weight"), MLP),
    (re.compile(r".*\.Q_PROJ", re.IGNORECASE), "blocks.{0,1}.attn.q_proj.weight"),
    # a predicate sees every site that the method can take
    (in_mlp, MLP),
    (lambda site: min(site.shape) > 12, "embed.weight lm_head.weight " + MLP),
    (lambda site: isinstance(site.module, nn.Embedding), "embed.weight position.weight"),
    (lambda site: site.head, "lm_head.weight"),
    (lambda site: site.linear and site.tensor.mean() != 0 and site.names[0][:8] == "blocks.1",
     "blocks.1.attn.{q,k,v,o}_proj.weight blocks.1.mlp.{0,2}.weight"),
    # any of several; a site named twice is one
    (["q_proj", "v_proj"], "blocks.{0,1}.attn.{q,v}_proj.weight"),
    (("q_proj", "blocks.0.attn.q_proj"), "blocks.{0,1}.attn.q_proj.weight"),
    ({"lm_head", "embed"}, "lm_head.weight embed.weight"),
    (["lm_head", "*.mlp.0", re.compile(r".*k_proj"), in_mlp],
     "lm_head.weight blocks.{0,1}.attn.k_proj.weight blocks.{0,1}.mlp.{0,2}.weight"),
]  # fmt: skip


@pytest.mark.parametrize("targets, expected", LORA_ON_GPT)
def test_lora_takes(targets: Any, expected: str) -> None:
    assert taken("gpt", pl.LoRA(targets=targets)) == expand(expected)


OTHERS = [
    (pl.BitFit(targets="attn"), "blocks.{0,1}.attn.{v,o}_proj.bias"),
    (pl.BitFit(targets="*norm"), "blocks.{0,1}.{attn,mlp}_norm.bias norm.bias"),
    # a word is a whole name: this is no attn_norm
    (pl.BitFit(targets="norm"), "norm.bias"),
    (pl.BitFit(targets="v_proj.bias"), "blocks.{0,1}.attn.v_proj.bias"),
    (pl.FullTuning(targets="norm"), "norm.weight norm.bias"),
    (pl.FullTuning(targets="blocks.0.mlp"), "blocks.0.mlp.{0,2}.{weight,bias}"),
    (pl.FullTuning(targets="bias"), "blocks.{0,1}.{attn_norm,mlp_norm,attn.v_proj,attn.o_proj}.bias"
     " blocks.{0,1}.mlp.{0,2}.bias norm.bias"),
    # for a method that works on calls, a path names the call of that module alone
    (Watching(targets="blocks.0.attn()"), "blocks.0.attn()"),
    (Watching(targets="attn()"), "blocks.{0,1}.attn()"),
    (Watching(targets="blocks.0.attn"), "blocks.0.attn()"),
    (Watching(targets="attn"), "blocks.{0,1}.attn()"),
    (Watching(targets="()"), "()"),
    (Watching(targets="blocks.0.mlp.*"), "blocks.0.mlp.{0,1,2}()"),
    (Watching(targets=re.compile(r"blocks\.\d")), "blocks.{0,1}()"),
    (Watching(targets=lambda site: isinstance(site.module, nn.GELU)), "blocks.{0,1}.mlp.1()"),
    # … and, to leave out, that module with all in it
    (Watching(targets="blocks.0.*", exclude="attn"), "blocks.0.{attn_norm,mlp_norm,mlp}() "
     "blocks.0.mlp.{0,1,2}()"),
]  # fmt: skip


@pytest.mark.parametrize("method, expected", OTHERS)
def test_other_methods_take(method: pl.Method, expected: str) -> None:
    assert taken("gpt", method) == expand(expected)


EXCLUDED: list[tuple[Any, Any, str]] = [
    (None, "mlp", ATTENTION),
    (None, "*.mlp.*", ATTENTION),
    (None, re.compile(r".*\.mlp"), ATTENTION),
    (None, in_mlp, ATTENTION),
    (None, ["mlp.0", "mlp.2.weight"], ATTENTION),
    (None, ["blocks.1", "mlp"], "blocks.0.attn.{q,k,v,o}_proj.weight"),
    (None, "blocks.0.attn.q_proj.weight", "blocks.1.attn.q_proj.weight "
     "blocks.{0,1}.attn.{k,v,o}_proj.weight " + MLP),
    (None, [], ALL),
    (None, "lm_head", ALL),  # the head was not taken anyway
    (None, "blocks.0.attn()", ALL),  # a call is not the tensors in it
    ("attn", "q_proj", "blocks.{0,1}.attn.{k,v,o}_proj.weight"),
    (["q_proj", "lm_head"], "blocks.0", "blocks.1.attn.q_proj.weight lm_head.weight"),
    ("*", "*.*.*", "embed.weight position.weight lm_head.weight"),
    (in_mlp, "*.0.weight", "blocks.{0,1}.mlp.2.weight"),
]  # fmt: skip


@pytest.mark.parametrize("targets, exclude, expected", EXCLUDED)
def test_exclude(targets: Any, exclude: Any, expected: str) -> None:
    assert taken("gpt", pl.LoRA(targets=targets, exclude=exclude)) == expand(expected)


def test_exclude_takes_from_every_method_alike() -> None:
    everything = taken("gpt", pl.FullTuning())
    kept = taken("gpt", pl.FullTuning(exclude=["blocks", "*embed*"]))
    assert kept == expand("position.weight norm.{weight,bias} lm_head.weight")
    assert set(kept) < set(everything)
    assert taken("gpt", pl.BitFit(exclude="*norm*")) == expand(
        "blocks.{0,1}.attn.{v,o}_proj.bias blocks.{0,1}.mlp.{0,2}.bias"
    )


@every_kind
def test_an_address_takes_that_site_under_each_of_its_names(kind: Kind) -> None:
    model = kind.make()
    for site in sites(model):
        method = Watching if site.is_call else pl.FullTuning
        for name in site.names:
            picked = taken(model, method(targets=re.compile(re.escape(name))))
            assert site.address in picked if site.is_call else picked == [site.address]
            if "." in name:  # a word alone is the end of a path
                assert taken(model, method(targets=name)) == [site.address]


@every_kind
def test_an_excluded_address_takes_everything_else(kind: Kind) -> None:
    model = kind.make()
    everything = taken(model, pl.FullTuning())
    for site in sites(model):
        if not site.is_call:
            for name in site.names:
                rest = taken(model, pl.FullTuning(exclude=re.compile(re.escape(name))))
                assert rest == [address for address in everything if address != site.address]


def test_a_path_that_is_there_is_no_ending_and_a_word_always_is() -> None:
    mlp = {"mlp": nn.Sequential(nn.Linear(4, 4))}
    model = nn.ModuleDict({**mlp, "block": nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4))})})
    for targets, expected in {
        "mlp": "mlp.0.weight block.mlp.0.weight",
        "mlp.0": "mlp.0.weight",
        "mlp.0.weight": "mlp.0.weight",
        "block.mlp": "block.mlp.0.weight",
        "0.weight": "mlp.0.weight block.mlp.0.weight",
        "*mlp.0": "mlp.0.weight block.mlp.0.weight",
    }.items():
        assert taken(model, pl.LoRA(targets=targets)) == expand(expected), targets


def test_tensors_that_hold_no_floats_are_passed_over() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    for method in (
        pl.FullTuning(),
        pl.FullTuning(targets="*"),
        pl.FullTuning(targets=lambda s: True),
    ):
        assert taken(model, method) == ["0.bias", "0.weight"]
    assert taken(model, pl.FullTuning(exclude="codes")) == ["0.bias", "0.weight"]


# -- parts of tensors

QKV = "blocks.{0,1}.attn.qkv.weight"

PARTS: list[tuple[str, Any, str, list[str]]] = [
    ("gpt_fused", "qkv[q]", QKV, ["[0:12]"]),
    ("gpt_fused", "qkv.weight[q]", QKV, ["[0:12]"]),
    ("gpt_fused", "blocks.0.attn.qkv.weight[k]", "blocks.0.attn.qkv.weight", ["[12:24]"]),
    ("gpt_fused", "*qkv.weight[v]", QKV, ["[24:36]"]),
    ("gpt_fused", ["qkv[q]", "qkv[v]"], QKV, ["[0:12]", "[24:36]"]),
    ("gpt_fused", "qkv.weight[0:12]", QKV, ["[0:12]"]),
    ("gpt_fused", "qkv.weight[ 3 : 7 ]", QKV, ["[3:7]"]),
    ("gpt_fused", "qkv.weight[:12]", QKV, ["[0:12]"]),
    ("gpt_fused", "qkv.weight[24:]", QKV, ["[24:36]"]),
    ("gpt_fused", "qkv.weight[:]", QKV, ["[0:36]"]),
    ("gpt_fused", "qkv.weight[:, 4:8]", QKV, ["[:, 4:8]"]),
    ("gpt_fused", "qkv.weight[:,:8]", QKV, ["[:, 0:8]"]),
    ("gpt_fused", "qkv.weight[:, 8:]", QKV, ["[:, 8:16]"]),
    # a weight stored as (i, o) has its outputs in the columns
    ("hf_gpt2", "c_attn.weight[q]", "transformer.h.{0,1}.attn.c_attn.weight", ["[:, 0:16]"]),
    ("hf_gpt2", "c_attn[v]", "transformer.h.{0,1}.attn.c_attn.weight", ["[:, 32:48]"]),
    ("mha_seq_first", "in_proj_weight[q]", "attn.in_proj_weight", ["[0:16]"]),
    ("mha_encoder", "*in_proj_weight[v]", "0.layers.{0,1}.self_attn.in_proj_weight", ["[32:48]"]),
    # the first expert of a stack
    ("experts", "w_in[0:1]", "w_in", ["[0:1]"]),
]


@pytest.mark.parametrize("kind, targets, paths, parts", PARTS)
def test_parts(kind: str, targets: Any, paths: str, parts: list[str]) -> None:
    expected = sorted(path + part for path in expand(paths) for part in parts)
    assert taken(kind, pl.LoRA(rank=2, targets=targets)) == expected


def test_parts_of_weight_and_bias_go_together() -> None:
    assert taken("gpt_fused", pl.FullTuning(targets="blocks.0.attn.qkv[k]")) == [
        "blocks.0.attn.qkv.bias[12:24]",
        "blocks.0.attn.qkv.weight[12:24]",
    ]
    assert taken("gpt_fused", pl.BitFit(targets="blocks.1.attn.qkv[q]")) == [
        "blocks.1.attn.qkv.bias[0:12]"
    ]


def test_parts_can_be_excluded() -> None:
    method = pl.LoRA(rank=2, targets=["qkv[q]", "qkv[k]"], exclude="blocks.0.attn.qkv.weight[q]")
    assert taken("gpt_fused", method) == [
        "blocks.0.attn.qkv.weight[12:24]",
        "blocks.1.attn.qkv.weight[0:12]",
        "blocks.1.attn.qkv.weight[12:24]",
    ]
    assert taken("gpt_fused", pl.LoRA(targets=["qkv[q]", "lm_head"], exclude="qkv")) == [
        "lm_head.weight"
    ]


WEIGHTS = {  # where each kind keeps its fused q, k and v, and along which dimension
    "gpt_fused": ("blocks.0.attn.qkv", "weight", 0),
    "hf_gpt2": ("transformer.h.0.attn.c_attn", "weight", 1),
    "mha_seq_first": ("attn", "in_proj_weight", 0),
}


@pytest.mark.parametrize("part", "qkv")
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("method", [pl.LoRA, pl.FullTuning])
def test_a_third_changes_its_outputs_alone(method: type, kind: str, part: str) -> None:
    path, slot, dim = WEIGHTS[kind]
    model = ZOO[kind].model()
    module = model.get_submodule(path)
    before = getattr(module, slot).detach().clone()
    delta = pl.attach(model, method(targets=f"{path}.{slot}[{part}]"))
    shake(delta)
    third = before.shape[dim] // 3
    change = (getattr(module, slot).detach() - before).unflatten(dim, (3, third))
    where = change.movedim(dim, 0).flatten(1).ne(0).any(dim=1).tolist()
    assert where == [letter == part for letter in "qkv"]


@torch.no_grad()
def shake(delta: pl.Delta) -> None:
    for parameter in delta.parameters():
        parameter.normal_()


def test_what_is_computed_changes_in_the_same_place() -> None:
    model = ZOO["gpt_fused"].model()
    qkv = model.blocks[0].attn.qkv
    x = torch.randn(3, 16)
    before = qkv(x)
    shake(pl.attach(model, pl.LoRA(rank=2, targets="blocks.0.attn.qkv.weight[k]")))
    q, k, v = (qkv(x) - before).chunk(3, dim=-1)
    assert not q.any() and not v.any() and k.all()


# -- what a method takes by itself


def single() -> nn.Module:
    return nn.Linear(4, 3)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 8)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


class NamesHead(nn.Module):
    """A model that says which of its layers is the head."""

    def __init__(self, answer: Callable[[Any], Any]):
        super().__init__()
        self.out, self.body = nn.Linear(4, 3), nn.Linear(4, 4)
        self.answer = answer

    def get_output_embeddings(self) -> Any:
        return self.answer(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


def normed() -> nn.Module:
    return nn.Sequential(*(weight_norm(nn.Linear(4, 4)) for _ in range(2)))


def unsaid(model: nn.Module) -> None:
    raise NotImplementedError


LORA_DEFAULTS: list[tuple[Any, str]] = [
    ("mlp", "0.weight 2.weight"),
    ("gpt", ALL),
    ("gpt_tied", ALL),
    ("gpt_fused", "blocks.{0,1}.attn.{qkv,o_proj}.weight blocks.{0,1}.mlp.{0,2}.weight"),
    ("mha_encoder", "0.layers.{0,1}.self_attn.{in_proj_weight,out_proj.weight} "
     "0.layers.{0,1}.linear{1,2}.weight"),
    ("mha_decoder", "self_attn.{in_proj_weight,out_proj.weight} "
     "cross_attn.{q_proj_weight,k_proj_weight,v_proj_weight,out_proj.weight}"),
    ("shared", "up.weight first.weight"),
    ("experts", "router.weight"),
    ("bilinear", "bilinear.weight"),
    ("conv1d", "0.weight"),
    ("conv_transpose", "up1d.weight"),
    ("lstm", "rnn.weight_{ih,hh}_l{0,1} rnn.weight_{ih,hh}_l{0,1}_reverse"),
    ("gru", "rnn.weight_{ih,hh}_l0 cell.weight_{ih,hh}"),
    ("weight_norm", "0.weight 2.weight"),
    ("conv1d_hf", "0.weight"),
    ("hf_gpt2", "transformer.h.{0,1}.attn.{c_attn,c_proj}.weight "
     "transformer.h.{0,1}.mlp.{c_fc,c_proj}.weight"),
    ("hf_llama", "model.layers.{0,1}.self_attn.{q,k,v,o}_proj.weight "
     "model.layers.{0,1}.mlp.{gate,up,down}_proj.weight"),
    # the only linear map is no head; nor is the last one in a numbered block
    (single, "weight"),
    (lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), "1.weight"),
    (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))),
     "{0,1}.0.weight"),
    (normed, "0.weight"),  # a weight that is computed is another each time
    (encoder,
     "layers.{0,1}.self_attn.{in_proj_weight,out_proj.weight} layers.{0,1}.linear{1,2}.weight"),
    # what a model says of its head counts, if it says anything
    (lambda: NamesHead(lambda model: model.out), "body.weight"),
    (lambda: NamesHead(lambda model: None), "out.weight"),
    (lambda: NamesHead(unsaid), "out.weight"),
]  # fmt: skip


@pytest.mark.parametrize("model, expected", LORA_DEFAULTS)
def test_lora_takes_every_linear_map_but_the_head(model: Any, expected: str) -> None:
    assert taken(model if isinstance(model, str) else model(), pl.LoRA()) == expand(expected)


@pytest.mark.parametrize("kind, head", [("hf_bert", "classifier"), ("hf_vit", "classifier")])
def test_a_classifier_is_a_head(kind: str, head: str) -> None:
    model = ZOO[kind].make()
    linear = {path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert taken(model, pl.LoRA()) == sorted(f"{path}.weight" for path in linear - {head})


def test_lora_finds_the_224_sites_of_an_8b_llama() -> None:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    plan = pl.plan(model, pl.LoRA(rank=16))
    assert len(plan) == 224
    assert plan.num_parameters == 41_943_040  # as published for all linear layers at r = 16
    assert plan.base_parameters == 8_030_261_248
    assert not any("lm_head" in address for address in plan.addresses)
    delta = pl.attach(model, pl.LoRA(rank=16))
    assert list(delta.placed) == plan.addresses
    assert all(parameter.is_meta for parameter in delta.parameters())


BIASES = [
    ("mlp", "0.bias 4.bias"),
    ("gpt", "blocks.{0,1}.{attn_norm,mlp_norm}.bias blocks.{0,1}.attn.{v,o}_proj.bias "
     "blocks.{0,1}.mlp.{0,2}.bias norm.bias"),
    ("mha_encoder", "0.layers.{0,1}.self_attn.{in_proj_bias,out_proj.bias} "
     "0.layers.{0,1}.{linear1,linear2,norm1,norm2}.bias 1.bias"),
    ("lstm", "rnn.bias_{ih,hh}_l{0,1} rnn.bias_{ih,hh}_l{0,1}_reverse head.bias"),
    ("norms", "0.bias 1.bias 4.bias 6.bias 7.bias 8.bias"),
    ("conv1d_hf", "0.bias 2.bias"),
]  # fmt: skip


@pytest.mark.parametrize("kind, expected", BIASES)
def test_bitfit_takes_every_bias(kind: str, expected: str) -> None:
    assert taken(kind, pl.BitFit()) == expand(expected)


def test_what_is_called_bias_need_not_be_one() -> None:
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)  # bias_k and bias_v are tokens
    assert taken(attention, pl.BitFit()) == ["in_proj_bias", "out_proj.bias"]
    model = nn.Linear(4, 4)
    model.bias = nn.Parameter(torch.zeros(4, 4))
    model.bias_scale = nn.Parameter(torch.ones(4))
    model.more = nn.Linear(4, 4)
    assert taken(model, pl.BitFit()) == ["more.bias"]


@every_kind
def test_full_tuning_takes_every_tensor_once(kind: Kind) -> None:
    model = kind.make()
    plan = pl.plan(model, pl.FullTuning())
    computed = sum(  # a parametrization makes one tensor out of several
        m.weight.numel() - sum(p.numel() for p in m.parametrizations.parameters())
        for m in model.modules()
        if nn.utils.parametrize.is_parametrized(m)
    )
    assert plan.num_parameters == sum(p.numel() for p in model.parameters()) + computed
    assert plan.base_parameters == sum(p.numel() for p in model.parameters())


# -- one site per tensor, whatever its names

TIED = [
    ("gpt_tied", ("embed.weight", "lm_head.weight"), 2),
    ("hf_gpt2", ("transformer.wte.weight", "lm_head.weight"), 2),
    ("hf_t5", ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
               "lm_head.weight"), 4),
    ("shared", ("first.weight", "second.weight"), 1),
]  # fmt: skip


@pytest.mark.parametrize("kind, names, owners", TIED)
def test_a_tied_tensor_is_one_site_under_all_its_names(
    kind: str, names: tuple[str, ...], owners: int
) -> None:
    model = ZOO[kind].model()
    (site,) = [site for site in sites(model) if names[0] in site.names]
    assert site.address == names[0] and set(site.names) == set(names)
    modules = {id(model.get_submodule(name.rpartition(".")[0])) for name in names}
    assert {id(module) for module, _ in site.owners} == modules and len(site.owners) <= owners
    for name in names:
        for target in (name, name.removesuffix(".weight")):
            assert names[0] in taken(model, pl.FullTuning(targets=target))
    assert taken(model, pl.LoRA(rank=2, targets=list(names))) == [names[0]]
    for name in names:
        assert names[0] not in taken(model, pl.FullTuning(exclude=name))


@pytest.mark.parametrize("kind, names, owners", TIED)
def test_every_owner_of_a_tied_tensor_reads_it_changed(
    kind: str, names: tuple[str, ...], owners: int
) -> None:
    model = ZOO[kind].model()
    read = [operator.attrgetter(name) for name in names]
    base = bits(read[0](model))
    shake(pl.attach(model, pl.LoRA(rank=2, targets=names[-1])))
    changed = {bits(tensor(model).detach()) for tensor in read}
    assert len(changed) == 1 and base not in changed


def test_a_tied_tensor_asked_for_under_two_names_is_asked_for_twice() -> None:
    methods = [pl.LoRA(targets="embed"), pl.FullTuning(targets="lm_head")]
    with pytest.raises(
        pl.TargetError, match=r"embed\.weight is taken by LoRA .* and by FullTuning"
    ):
        pl.plan(ZOO["gpt_tied"].make(), methods)
    assert len(pl.plan(ZOO["gpt"].make(), methods)) == 2


# -- several methods in one delta


def methods_at(model: nn.Module | str, methods: list[pl.Method]) -> dict[str, str]:
    model = ZOO[model].make() if isinstance(model, str) else model
    placed = pl.plan(model, methods).delta.placed
    return {address: type(item.method).__name__ for address, item in placed.items()}


@pytest.mark.parametrize("order", [1, -1])
def test_a_site_that_is_asked_for_is_taken_from_defaults(order: int) -> None:
    methods = [pl.LoRA(), pl.FullTuning(targets=["q_proj", "lm_head"])][::order]
    found = methods_at("gpt", methods)
    full = {address for address, method in found.items() if method == "FullTuning"}
    assert sorted(full) == expand("blocks.{0,1}.attn.q_proj.weight lm_head.weight")
    assert sorted(set(found) - full) == expand(
        "blocks.{0,1}.attn.{k,v,o}_proj.weight blocks.{0,1}.mlp.{0,2}.weight"
    )


@pytest.mark.parametrize("order", [1, -1])
def test_three_methods_share_a_model(order: int) -> None:
    methods = [pl.LoRA(targets="*.attn.*"), pl.BitFit(), pl.FullTuning(targets=["lm_head", "norm"])]
    found = methods_at("gpt", methods[::order])
    by_method = {
        name: sorted(address for address, method in found.items() if method == name)
        for name in ("LoRA", "BitFit", "FullTuning")
    }
    assert by_method == {
        "LoRA": expand(ATTENTION),
        "BitFit": [bias for bias in taken("gpt", pl.BitFit()) if bias != "norm.bias"],
        "FullTuning": expand("lm_head.weight norm.{weight,bias}"),
    }


def test_ranks_differ_by_place_with_two_methods() -> None:
    model = ZOO["gpt"].make()
    delta = pl.attach(model, [pl.LoRA(rank=2), pl.LoRA(rank=5, targets="mlp")])
    ranks = {address: p.patch.a.shape[0] for address, p in delta.placed.items()}
    assert ranks == {address: 5 if ".mlp." in address else 2 for address in expand(ALL)}


CLASHES = [
    [pl.LoRA(), pl.LoRA(rank=4)],
    [pl.LoRA(targets="q_proj"), pl.FullTuning(targets="attn")],
    [pl.FullTuning(targets="attn"), pl.LoRA(targets="q_proj")],
    [pl.BitFit(targets="norm"), pl.FullTuning(targets="norm.bias")],
    [pl.FullTuning(), pl.BitFit()],
]


@pytest.mark.parametrize("methods", CLASHES)
def test_a_site_asked_for_twice_is_an_error(methods: list[pl.Method]) -> None:
    model = ZOO["gpt"].model()
    before = digest(model)
    for verb in (pl.plan, pl.attach):
        with pytest.raises(pl.TargetError, match=r"is taken by \w+ at .* and by \w+"):
            verb(model, methods)
    assert_same(before, digest(model))


OVERLAPS = [
    [pl.LoRA(targets=["lm_head.weight[0:8]", "lm_head.weight[4:12]"])],
    [pl.LoRA(targets=["lm_head.weight", "lm_head.weight[4:12]"])],
    [pl.LoRA(targets=["lm_head.weight[:, 0:8]", "lm_head.weight[0:8]"])],
    [pl.LoRA(targets="lm_head.weight[0:8]"), pl.FullTuning(targets="lm_head")],
    [pl.LoRA(targets="lm_head.weight[0:8]"), pl.FullTuning(targets="lm_head.weight[7:9]")],
]


@pytest.mark.parametrize("methods", OVERLAPS)
def test_parts_that_overlap_are_an_error(methods: list[pl.Method]) -> None:
    model = ZOO["gpt"].model()
    before = digest(model)
    for verb in (pl.plan, pl.attach):
        with pytest.raises(pl.TargetError, match=r"lm_head\.weight.* is taken by LoRA at lm_head"):
            verb(model, methods)
    assert_same(before, digest(model))


def test_parts_that_touch_do_not_overlap() -> None:
    parts = ["lm_head.weight[0:8]", "lm_head.weight[8:12]", "lm_head.weight[20:]"]
    assert taken("gpt", pl.LoRA(targets=parts)) == [
        "lm_head.weight[0:8]",
        "lm_head.weight[20:29]",
        "lm_head.weight[8:12]",
    ]
    columns = [f"lm_head.weight[:, {i}:{i + 4}]" for i in (0, 4, 12)]
    both = [pl.LoRA(targets=columns[:2]), pl.LoRA(targets=columns[2])]
    assert taken("gpt", both) == sorted(columns)


# -- the plan

PLANS: list[tuple[str, Any]] = [
    ("mlp", pl.LoRA(rank=3)),
    ("gpt", pl.LoRA(rank=2, init="pissa")),
    ("gpt", [pl.LoRA(targets="*attn*"), pl.BitFit(), pl.FullTuning(targets=["lm_head", "*norm"])]),
    ("gpt", Watching(targets="attn")),
    ("gpt_tied", pl.FullTuning()),
    ("gpt_fused", pl.LoRA(rank=2, targets=["qkv[q]", "qkv[v]"])),
    ("shared", pl.FullTuning()),
    ("experts", pl.LoRA(rank=2, targets=["w_in", "w_out"])),
    ("lstm", pl.LoRA()),
    ("weight_norm", pl.BitFit()),
    ("hf_llama", pl.LoRA(rank=2, dtype=torch.bfloat16)),
]
plans = pytest.mark.parametrize("kind, method", PLANS)


@plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plan_agrees_with_attach(kind: str, method: Any, dtype: torch.dtype) -> None:
    model = ZOO[kind].model(dtype)
    plan = pl.plan(model, method)
    delta = pl.attach(model, method)
    assert plan.addresses == list(delta.placed)
    assert len(plan) == len(delta.placed)
    assert plan.num_parameters == delta.num_parameters
    assert plan.num_bytes == delta.num_bytes
    table = str(plan).rpartition(" (")[0]
    assert str(delta) == f"delta 'default'\n{table}"


@plans
def test_a_plan_changes_nothing(kind: str, method: Any) -> None:
    model = ZOO[kind].model()
    before, random = digest(model), torch.get_rng_state()
    for context in (torch.no_grad(), torch.inference_mode(), torch.device("meta")):
        with context:
            str(pl.plan(model, method))
    assert_same(before, digest(model))
    assert torch.equal(random, torch.get_rng_state())


def test_a_plan_is_the_same_beside_other_deltas() -> None:
    model = ZOO["gpt"].model()
    method = pl.LoRA(rank=2, targets="attn")
    fresh = str(pl.plan(model, method))
    for name in ("default", "other"):
        pl.attach(model, pl.FullTuning(), name)
    assert str(pl.plan(model, method)) == fresh


def test_a_plan_allocates_nothing() -> None:
    plan = pl.plan(nn.Linear(4, 4), pl.LoRA(rank=10**12))
    assert plan.num_parameters == 8 * 10**12


def test_a_plan_prints_as_a_table() -> None:
    methods = [
        pl.LoRA(rank=2, targets=["*.attn.*", "blocks.0.mlp.0"]),
        Watching(targets="blocks.1.mlp"),
    ]
    assert str(pl.plan(ZOO["gpt"].make(), methods)) == PRINTED


PRINTED = """\
site                         sites  method    shape  parameters
---------------------------  -----  --------  -----  ----------
blocks.*.attn.q_proj.weight      2  LoRA      12×16         112
blocks.*.attn.k_proj.weight      2  LoRA      12×16         112
blocks.*.attn.v_proj.weight      2  LoRA      12×16         112
blocks.*.attn.o_proj.weight      2  LoRA      16×12         112
blocks.0.mlp.0.weight            1  LoRA      20×16          72
blocks.1.mlp()                   1  Watching  call            0
LoRA at 9, Watching at 1 sites: 520 parameters, 2.0 KiB (12.405% of the base's 4,192)
memory: base 16.4 KiB, gradients 2.0 KiB, AdamW 4.1 KiB"""


def test_targets_are_read_when_the_method_is_used() -> None:
    method = pl.LoRA(targets="extra")
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(pl.TargetError, match="'extra' matches nothing"):
        pl.plan(model, method)
    model.add_module("extra", nn.Linear(4, 4))
    assert taken(model, method) == ["extra.weight"]


def test_a_plan_names_patches_that_are_larger_than_their_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(64, 64))
    plan = pl.plan(model, pl.LoRA(rank=8, targets="weight"))
    assert plan.larger == ["0.weight"]
    assert "larger than the tensors that they change are 1 of 2 patches: 0.weight;" in str(plan)
    for method in (pl.LoRA(rank=1, targets="weight"), pl.FullTuning()):
        plan = pl.plan(model, method)
        assert not plan.larger and "larger" not in str(plan)

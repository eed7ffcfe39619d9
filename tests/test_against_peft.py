"""Every method that real peft has too: from the same values, the same function.

A row is a method in both libraries, a cell that method on a model. peft's values are drawn at
random and copied into ours; then every changed tensor and every logit must agree to 1e-5 in fp32.
Where peft deviates from a method's paper, a row has the setting, or the sign, that is the paper's.
Prompts are compared in methods/test_prompt.py, budgets in methods/test_adalora.py.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_boft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import peftlite as pl
from peftlite.methods.adalora import AdaLoRA
from peftlite.methods.fourier import FourierFT
from peftlite.methods.prefix import PrefixTuning
from peftlite.methods.vblora import VBLoRA
from tests.zoo import KINDS, TOKENS, Kind, floats, hf_llama, seeded

# of peft 0.21: its prefixes on transformers 5, its LN tuning, and its SHiRA
pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


# -- models


def biased_llama() -> nn.Module:
    """The zoo's, with biases for the methods that change those."""
    config = hf_llama().config
    config.attention_bias = config.mlp_bias = True
    return LlamaForCausalLM(config)


def conv2d() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 5, 2, stride=2))


KIND = {kind.name: kind for kind in KINDS}
KIND["hf_llama"] = replace(KIND["hf_llama"], make=biased_llama)
KIND["conv2d"] = Kind("conv2d", conv2d, floats(input=(4, 6, 6)))

TRANSFORMERS = ("hf_bert", "hf_gpt2", "hf_llama", "hf_t5")
CONV2D = (*TRANSFORMERS, "conv2d")
CONVS = (*CONV2D, "conv1d")


def straightened(model: nn.Module) -> nn.Module:
    """The same function with a Linear for each Conv1D, which most of peft doesn't take."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.load_state_dict({"weight": child.weight.T, "bias": child.bias})
                setattr(parent, name, linear)
    return model


# -- peft's values, under our names

Values = Callable[[Any, Any], dict[str, Tensor]]  # of peft's layer, for what is placed in ours


def peer(layer: Any, name: str) -> Tensor:
    """A tensor of the one adapter at a layer."""
    found = getattr(layer, name)["default"]
    return getattr(found, "weight", found)


def named(**names: str) -> Values:
    return lambda layer, placed: {key: peer(layer, name) for key, name in names.items()}


def lora(layer: Any, placed: Any) -> dict[str, Tensor]:
    kind = "lora_embedding_" if "default" in layer.lora_embedding_A else "lora_"
    return {"a": peer(layer, kind + "A"), "b": peer(layer, kind + "B")}


def hira(layer: Any, placed: Any) -> dict[str, Tensor]:
    kind = "hira_embedding_" if "default" in layer.hira_embedding_A else "hira_"
    return {"a": peer(layer, kind + "A"), "b": peer(layer, kind + "B")}


def dora(layer: Any, placed: Any) -> dict[str, Tensor]:
    return {**lora(layer, placed), "m": peer(layer, "lora_magnitude_vector")}


def vblora(layer: Any, placed: Any) -> dict[str, Tensor]:
    a, b = peer(layer, "vblora_logits_A"), peer(layer, "vblora_logits_B")
    bank = peer(layer, "vblora_vector_bank")
    return {"logits_a": a, "logits_b": b.transpose(0, 1), "bank.vectors": bank}


def lokr(layer: Any, placed: Any) -> dict[str, Tensor]:
    """Each factor is whole or a product; ours are of W as it is stored: (w1 ⊗ w2)ᵀ = w1ᵀ ⊗ w2ᵀ."""
    turned, keys = placed.site.layout.transposed, dict(placed.patch.named_parameters())
    sides = {"": "", "a": "_b", "b": "_a"} if turned else {"": "", "a": "_a", "b": "_b"}
    found = {key: peer(layer, f"lokr_{key[:2]}{sides[key[2:]]}") for key in keys}
    return {key: tensor.T if turned else tensor for key, tensor in found.items()}


def neumann(layer: Any, placed: Any) -> dict[str, Tensor]:
    """peft's series turns the other way than its exact map."""
    return {"q": -peer(layer, "oft_R")}


def boft(layer: Any, placed: Any) -> dict[str, Tensor]:
    """peft learns a whole matrix for each skew one."""
    whole, k = peer(layer, "boft_R"), placed.patch.block
    above = torch.triu_indices(k, k, 1)
    return {"q": ((whole - whole.mT) / 2)[..., above[0], above[1]], "s": peer(layer, "boft_s")}


def hra(layer: Any, placed: Any) -> dict[str, Tensor]:
    return {"u": peer(layer, "hra_u").T}


def norm(layer: Any, placed: Any) -> dict[str, Tensor]:
    """peft trains a copy of the layer."""
    trained, slot = layer.ln_tuning_layers["default"], placed.site.slot
    return {"difference": getattr(trained, slot) - getattr(layer.base_layer, slot)}


def sparse(layer: Any, placed: Any) -> dict[str, Tensor]:
    """At the entries that peft has drawn."""
    o, i = layer.shira_indices["default"].long()
    rows, columns = (i, o) if placed.site.layout.transposed else (o, i)
    entries, order = (rows * placed.site.shape[1] + columns).sort()
    if not torch.equal(placed.patch.indices, entries):
        placed.patch.place(entries)
    return {"values": peer(layer, "shira_weight")[order]}


# -- the table


@dataclass(frozen=True)
class Row:
    """A method in both libraries."""

    name: str
    ours: pl.Method | list[pl.Method]
    theirs: peft.PeftConfig
    values: Values
    kinds: tuple[str, ...] = TRANSFORMERS
    conv1d: bool = False  # whether peft takes the Conv1D of GPT-2
    merged: tuple[str, ...] = ()  # where peft is right only once it has merged


def biases(site: pl.Site) -> bool:
    """Of the maps, to which alone peft adds biases."""
    return site.slot == "bias" and not site.head and isinstance(site.module, nn.Linear | Conv1D)


HADA = named(w1a="hada_w1_a", w1b="hada_w1_b", w2a="hada_w2_a", w2b="hada_w2_b")
DOWN = r".*(layer\.\d\.output\.dense|mlp\.c_proj|down_proj|\.wo)"  # of a feed-forward network

# it pads kernels with zeros, whatever their padding_mode
GROUPED = dict(kinds=(*CONVS, "conv2d_grouped"), merged=("conv2d_grouped",))

ROWS = (
    Row(
        "lora",
        pl.LoRA(rank=3, alpha=5),
        peft.LoraConfig(r=3, lora_alpha=5),
        lora,
        (*CONVS, "conv3d", "conv1d_hf", "embedding"),
        conv1d=True,
    ),
    Row(
        "lora_rslora",
        pl.LoRA(rank=3, alpha=5, scaling="rslora"),
        peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True),
        lora,
        conv1d=True,
    ),
    Row(
        "lora_pissa",
        pl.LoRA(rank=3, alpha=5, init="pissa"),
        peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa"),
        lora,
        conv1d=True,
    ),
    Row(
        "lora_olora",
        pl.LoRA(rank=3, alpha=5, init="olora"),
        peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights="olora"),
        lora,
    ),
    Row(
        "dora",
        pl.DoRA(rank=3, alpha=5),
        peft.LoraConfig(r=3, lora_alpha=5, use_dora=True),
        dora,
        (*CONVS, "conv3d", "conv1d_hf", "embedding", "hf_vit"),
        conv1d=True,
    ),
    Row(
        "vera",
        pl.VeRA(rank=6),
        peft.VeraConfig(r=6),
        named(d="vera_lambda_d", b="vera_lambda_b"),
        conv1d=True,
    ),
    Row(
        "vblora",
        VBLoRA(rank=3, num_vectors=7, vector_length=4),
        peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=4),
        vblora,
        conv1d=True,
    ),
    Row(
        "adalora",  # it divides α by r + 1e-5
        AdaLoRA(total_steps=9, init_rank=3, target_rank=2, alpha=5 / (1 + 1e-5 / 3)),
        peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=9),
        named(p="lora_B", lam="lora_E", q="lora_A"),
        conv1d=True,
    ),
    Row(
        "fourierft",
        FourierFT(n=40, alpha=20.0, seed=777),
        peft.FourierFTConfig(n_frequency=40, scaling=20.0, random_loc_seed=777),
        named(c="fourierft_spectrum"),
        conv1d=True,
    ),
    Row(
        "hira",
        pl.HiRA(rank=3),
        peft.HiraConfig(r=3),
        hira,
        (*CONVS, "conv3d", "conv1d_hf", "embedding"),
        conv1d=True,
    ),
    Row("loha", pl.LoHa(rank=3, alpha=5), peft.LoHaConfig(r=3, alpha=5), HADA, **GROUPED),
    Row(
        "lokr",
        pl.LoKr(rank=1, alpha=3),
        peft.LoKrConfig(r=1, alpha=3, init_weights="lycoris"),
        lokr,
        **GROUPED,
    ),
    Row(
        "lokr_both",
        pl.LoKr(rank=1, alpha=3, decompose_both=True),
        peft.LoKrConfig(r=1, alpha=3, decompose_both=True, init_weights="lycoris"),
        lokr,
    ),
    Row(
        "lokr_factor",
        pl.LoKr(rank=1, alpha=3, factor=1),
        peft.LoKrConfig(r=1, alpha=3, decompose_factor=1, init_weights="lycoris"),
        lokr,
    ),
    Row(
        "oft",
        pl.OFT(block_size=4),
        peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False),
        named(q="oft_R"),
        CONV2D,
        merged=("conv2d",),  # it folds turned patches back into an image
    ),
    Row(
        "oft_neumann",  # a series of n numbers, n ≥ 4, is ours of n − 2
        pl.OFT(block_size=4, neumann_terms=4),
        peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=6),
        neumann,
    ),
    Row(
        "oft_coft",
        pl.OFT(block_size=4, eps=0.5),
        peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, coft=True, eps=0.5),
        named(q="oft_R"),
    ),
    Row(
        "boft",
        pl.BOFT(block_size=4, m=1),
        peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1),
        boft,
        CONV2D,
    ),
    Row(
        "boft_butterfly",
        pl.BOFT(block_size=2, m=2),
        peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2),
        boft,
    ),
    Row("hra", pl.HRA(rank=4), peft.HRAConfig(r=4), hra, CONV2D),
    Row(
        "ia3",
        [pl.IA3(exclude=re.compile(DOWN)), pl.IA3(targets=re.compile(DOWN), feedforward=True)],
        peft.IA3Config(feedforward_modules=DOWN),
        named(l="ia3_l"),
        conv1d=True,
    ),
    Row(
        "ia3_kernels",
        [pl.IA3(targets="0"), pl.IA3(targets="2", feedforward=True)],
        peft.IA3Config(feedforward_modules="2"),
        named(l="ia3_l"),
        ("conv2d",),
    ),
    Row(
        "bitfit",  # where there are biases: BEFT adds them to a T5, which then can't merge
        pl.BitFit(targets=biases),
        peft.BeftConfig(),
        named(difference="beft_bias"),
        ("hf_bert", "hf_gpt2", "hf_llama"),
    ),
    Row("norm", pl.NormTuning(), peft.LNTuningConfig(), norm),
    Row("shira", pl.SHiRA(rank=2), peft.ShiraConfig(r=2), sparse),
    Row("sparse", pl.SparseMask(), peft.ShiraConfig(r=2), sparse),
)


# -- the test of weights


def module_of(placed: Any) -> str:
    return placed.site.address.rpartition(".")[0]


def under_peft(row: Row, kind: Kind, modules: set[str]) -> tuple[peft.PeftModel, dict[str, Any]]:
    """The kind's model in peft, and its adapted layers."""
    model, config = kind.model(), copy.deepcopy(row.theirs)
    config.target_modules = modules
    if row.conv1d:
        config.fan_in_fan_out = kind.name in ("hf_gpt2", "conv1d_hf")
    else:
        model = straightened(model)
    theirs = peft.get_peft_model(model, config).eval()
    found = theirs.get_base_model().named_modules()
    layers = {path: module for path, module in found if isinstance(module, BaseTunerLayer)}
    assert set(layers) == modules
    return theirs, layers


def apart(a: Tensor, b: Tensor) -> float:
    """How far two tensors are from one another, at most anywhere."""
    assert a.shape == b.shape and a.dtype is b.dtype is torch.float32
    return (a - b).abs().max().item()


def disturb(parameters: Iterable[Tensor]) -> None:
    with seeded(3):
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn_like(parameter))


def block_diagonals(blocks: Tensor) -> Tensor:
    """What the CUDA extension of peft's BOFT does."""
    return torch.stack([torch.block_diag(*each) for each in blocks])


@pytest.fixture(autouse=True)
def butterflies() -> Iterator[None]:
    """Without its extension peft takes m = 1, whatever the config says."""
    with (
        mock.patch.object(peft_boft, "get_fbd_cuda", lambda: True),
        mock.patch.object(peft_boft.FastBlockDiag, "apply", block_diagonals),
    ):
        yield


@pytest.mark.parametrize(
    "row, kind",
    [pytest.param(row, KIND[kind], id=f"{row.name}-{kind}") for row in ROWS for kind in row.kinds],
)
@torch.no_grad()
def test_the_same_values_are_the_same_function(row: Row, kind: Kind) -> None:
    ours, batch = kind.model(), kind.batch()
    delta = pl.attach(ours, row.ours)
    modules = {module_of(placed) for placed in delta.placed.values()}
    theirs, layers = under_peft(row, kind, modules)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trained) == len(list(delta.parameters()))

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for placed in delta.placed.values():
            values = row.values(layers[module_of(placed)], placed)
            own = dict(placed.patch.named_parameters())
            assert set(values) == set(own)
            yield from ((own[key], values[key].reshape(own[key].shape)) for key in own)

    own, their = (sum(bool(t.any()) for t in side) for side in zip(*pairs(), strict=True))
    assert own == their  # as many begin at zero
    disturb(trained)
    for own, their in pairs():
        own.copy_(their)

    output = kind.run(ours, batch)
    agree = apart(kind.run(theirs, batch), output) <= 1e-5
    assert agree == (kind.name not in row.merged)
    theirs.merge_adapter()
    assert apart(kind.run(theirs, batch), output) <= 1e-5
    for placed in delta.placed.values():
        site, w = placed.site, placed.site.whole
        merged = getattr(layers[module_of(placed)].get_base_layer(), site.slot)
        merged = merged.T if site.layout.transposed and not row.conv1d else merged
        assert apart(placed.patch.value(w), merged) <= 1e-5 < apart(merged, w)


# -- prefixes

Pairs = Iterator[tuple[Tensor, Tensor]]  # ours, and what peft has for it


def prefixes(encoder: Any, delta: pl.Delta) -> Pairs:
    """A token's keys and values lie side by side for all layers."""
    for i, placed in enumerate(delta.placed.values()):
        prefix = placed.patch.prefix
        layers = encoder.embedding.weight.unflatten(-1, (-1, 2, *prefix.shape[1::2]))
        yield prefix, layers[:, i].permute(1, 2, 0, 3)


def reparametrized(encoder: Any, delta: pl.Delta) -> Pairs:
    patches = [placed.patch for placed in delta.placed.values()]
    trunk, (down, _, up) = patches[0].trunk, encoder.transform
    yield from ((trunk.embedding, encoder.embedding.weight), (trunk.down, down.weight))
    yield trunk.down_bias, down.bias
    yield from zip((p.up for p in patches), up.weight.chunk(len(patches)), strict=True)
    yield from zip((p.up_bias for p in patches), up.bias.chunk(len(patches)), strict=True)


PREFIX = {
    "free": (PrefixTuning(3), {}, prefixes),
    "reparametrized": (
        PrefixTuning(3, reparametrize=True, hidden_size=5),
        {"prefix_projection": True, "encoder_hidden_size": 5},
        reparametrized,
    ),
}


@pytest.mark.parametrize("kind", ["hf_bert", "hf_gpt2", "hf_llama"])  # T5's attention isn't torch's
@pytest.mark.parametrize("form", PREFIX)
@torch.no_grad()
def test_the_same_prefixes_give_the_same_states(form: str, kind: str) -> None:
    """peft moves the tokens n positions on; here they keep theirs, which it's given less n."""
    method, settings, pairs = PREFIX[form]
    config = peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, **settings
    )
    ours, base = (KIND[kind].model().base_model for _ in range(2))
    delta = pl.attach(ours, method)
    theirs = peft.get_peft_model(base, config).eval()
    encoder = theirs.prompt_encoder["default"]
    disturb(encoder.parameters())
    filled = list(pairs(encoder, delta))
    assert {id(own) for own, _ in filled} == {id(own) for own in delta.parameters()}
    for own, their in filled:
        assert own.shape == their.shape
        own.copy_(their)
    batch, positions = KIND[kind].batch(), torch.arange(TOKENS)[None] - 3
    expected = theirs(**batch, position_ids=positions).last_hidden_state
    assert apart(ours(**batch).last_hidden_state, expected) <= 1e-5

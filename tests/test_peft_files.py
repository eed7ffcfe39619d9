"""PEFT's directories: what real peft saves is read, what is written real peft loads, to 1e-6.

A row is an adapter, a cell that adapter on a model. peft's values are drawn at random and saved;
the delta read from them gives peft's outputs, and its export gives them again, loaded by peft.
"""

import contextlib
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftlite as pl
from tests.digest import assert_same, digest
from tests.test_against_peft import KIND, straightened
from tests.test_against_peft import butterflies as butterflies
from tests.zoo import Kind, seeded

# of peft 0.21 itself, its LN tuning, its SHiRA, and of what it finds in a model from no hub
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

MODELS = ("hf_bert", "hf_gpt2", "hf_llama", "hf_t5", "hf_vit")
DOWN = r".*(output\.dense|mlp\.c_proj|down_proj|\.wo)"


@dataclass(frozen=True)
class Row:
    """An adapter: peft's config, and for which kinds of models."""

    name: str
    config: type[peft.PeftConfig]
    settings: dict[str, Any]
    kinds: tuple[str, ...] = MODELS
    targets: Any = None  # the linear maps but for the head's, if None
    conv1d: bool = False  # whether peft takes the Conv1D of GPT-2
    dtype: torch.dtype = torch.float64
    same: bool = True  # whether what is exported is what was read, tensor by tensor


LORA = dict(r=3, lora_alpha=5)
MIXED = dict(rank_pattern={"query": 2, "layer.1.output.dense": 4}, alpha_pattern={"query": 7})
FLOAT = torch.float32
ROWS = (
    Row("lora", peft.LoraConfig, LORA, conv1d=True),
    Row("rslora", peft.LoraConfig, dict(LORA, use_rslora=True), ("hf_gpt2",), conv1d=True),
    Row("patterns", peft.LoraConfig, dict(LORA, **MIXED), ("hf_bert",)),
    Row("dora", peft.LoraConfig, dict(LORA, use_dora=True), conv1d=True),
    # peft takes it out of the base in fp32
    Row("pissa", peft.LoraConfig, dict(LORA, init_lora_weights="pissa"),
        ("hf_bert", "hf_vit"), dtype=FLOAT, same=False),
    Row("olora", peft.LoraConfig, dict(LORA, init_lora_weights="olora"),
        ("hf_bert",), dtype=FLOAT, same=False),
    Row("bias_only", peft.LoraConfig, dict(LORA, bias="lora_only"), ("hf_bert", "hf_vit")),
    Row("bias_all", peft.LoraConfig, dict(LORA, bias="all"), ("hf_bert",)),
    Row("lora_bias", peft.LoraConfig, dict(LORA, lora_bias=True), ("hf_bert",), same=False),
    Row("whole", peft.LoraConfig, dict(LORA, modules_to_save=["classifier"]), ("hf_vit",)),
    Row("head", peft.LoraConfig, dict(LORA, modules_to_save=["lm_head"]), ("hf_llama",)),
    Row("embedding", peft.LoraConfig, LORA, ("hf_llama",), ["embed_tokens"], same=False),
    Row("padding", peft.LoraConfig, LORA, ("embedding",), ["embed"]),
    Row("dora_embedding", peft.LoraConfig, dict(LORA, use_dora=True), ("embedding",), ["embed"]),
    Row("convs", peft.LoraConfig, LORA, ("conv1d", "conv2d", "conv3d"), ["0", "2"]),
    Row("dora_convs", peft.LoraConfig, dict(LORA, use_dora=True), ("conv2d",), ["0", "2"]),
    Row("tokens", peft.LoraConfig, dict(LORA, trainable_token_indices=[7, 2, 3]),
        ("hf_bert", "hf_gpt2"), conv1d=True, same=False),
    Row("tokens_alone", peft.TrainableTokensConfig, dict(token_indices=[2, 3, 7]),
        ("hf_llama",), ["embed_tokens"]),
    Row("experts", peft.LoraConfig, dict(LORA, target_parameters=["mlp.w_out", "mlp.w_in"]),
        ("experts",), ["router"]),
    Row("ia3", peft.IA3Config, dict(feedforward_modules=DOWN), conv1d=True),
    Row("ia3_convs", peft.IA3Config, dict(feedforward_modules=["2"]), ("conv2d", "conv2d_same"),
        ["0", "2"]),
    Row("ln", peft.LNTuningConfig, {}, targets="norms"),
    Row("hira", peft.HiraConfig, dict(r=3), conv1d=True),
    Row("hira_embedding", peft.HiraConfig, dict(r=3), ("hf_llama",), ["embed_tokens"], same=False),
    Row("hira_convs", peft.HiraConfig, dict(r=3), ("conv1d", "conv2d", "conv3d"), ["0", "2"]),
    Row("loha", peft.LoHaConfig, dict(r=3, alpha=5)),
    Row("loha_convs", peft.LoHaConfig, dict(r=3, alpha=5), ("conv2d", "conv1d"), ["0", "2"]),
    Row("loha_tucker", peft.LoHaConfig, dict(r=2, alpha=5, use_effective_conv2d=True),
        ("conv2d", "conv1d"), ["0", "2"], same=False),
    Row("lokr", peft.LoKrConfig, dict(r=1, alpha=3, init_weights="lycoris")),
    Row("lokr_both", peft.LoKrConfig, dict(
        r=1, alpha=3, decompose_both=True, init_weights="lycoris", decompose_factor=2,
    ), ("hf_bert",)),
    Row("lokr_factor", peft.LoKrConfig, dict(r=2, alpha=3, decompose_factor=8), ("hf_bert",)),
    Row("lokr_convs", peft.LoKrConfig, dict(r=9, alpha=3), ("conv2d",), ["0", "2"]),
    # whose taps are mixed with the inputs, as no Kronecker product has them
    Row("lokr_conv1d", peft.LoKrConfig, dict(r=9, alpha=3), ("conv1d",), ["0", "2"], same=False),
    Row("lokr_tucker", peft.LoKrConfig, dict(r=1, alpha=3, use_effective_conv2d=True),
        ("conv2d",), ["0", "2"], same=False),
    Row("oft", peft.OFTConfig, dict(oft_block_size=4, use_cayley_neumann=False)),
    Row("oft_neumann", peft.OFTConfig, dict(oft_block_size=4), ("hf_llama",)),
    Row("oft_embedding", peft.OFTConfig, dict(oft_block_size=4, use_cayley_neumann=False),
        ("hf_bert",), ["word_embeddings"]),
    Row("oft_neumann_embedding", peft.OFTConfig, dict(oft_block_size=4),
        ("embedding",), ["embed"]),
    Row("oft_coft", peft.OFTConfig,
        dict(oft_block_size=4, use_cayley_neumann=False, coft=True, eps=0.5), ("hf_bert",)),
    Row("oft_shared", peft.OFTConfig, dict(oft_block_size=4, block_share=True), ("hf_bert",),
        same=False),
    Row("boft", peft.BOFTConfig, dict(boft_block_size=4), same=False),
    Row("butterflies", peft.BOFTConfig,
        dict(boft_block_size=2, boft_n_butterfly_factor=2), ("hf_bert",), same=False),
    Row("boft_convs", peft.BOFTConfig, dict(boft_block_size=4), ("conv2d",), ["0", "2"],
        same=False),
    Row("hra", peft.HRAConfig, dict(r=4)),
    Row("hra_orthogonal", peft.HRAConfig, dict(r=4, apply_GS=True), ("hf_bert",), same=False),
    Row("hra_convs", peft.HRAConfig, dict(r=4), ("conv2d",), ["0", "2"]),
    Row("vera", peft.VeraConfig, dict(r=6), conv1d=True),
    Row("vera_drawn", peft.VeraConfig, dict(r=6, save_projection=False), ("hf_bert",), same=False),
    Row("vblora", peft.VBLoRAConfig, dict(r=3, num_vectors=7, vector_length=4), conv1d=True),
    Row("vblora_topk", peft.VBLoRAConfig, dict(
        r=3, num_vectors=7, vector_length=4, save_only_topk_weights=True,
    ), ("hf_bert",), dtype=FLOAT),
    # whose transform is in fp32 in peft
    Row("fourierft", peft.FourierFTConfig, dict(n_frequency=40, scaling=4.0), conv1d=True),
    Row("fourierft_patterns", peft.FourierFTConfig,
        dict(n_frequency=40, scaling=4.0, n_frequency_pattern={"query": 7}), ("hf_bert",)),
    Row("adalora", peft.AdaLoraConfig, dict(init_r=3, target_r=2, total_step=9), conv1d=True),
    Row("adalora_passes_over", peft.AdaLoraConfig, dict(
        init_r=3, target_r=2, total_step=9, use_rslora=True, alpha_pattern={"query": 7},
    ), ("hf_bert",)),
    Row("adalora_convs", peft.AdaLoraConfig, dict(init_r=3, target_r=2, total_step=9),
        ("conv2d",), ["0", "2"]),
    Row("shira", peft.ShiraConfig, dict(r=2)),
    Row("beft", peft.BeftConfig, {}, ("hf_bert", "hf_vit"), same=False),
    # the factors of its backward pass are left out
    Row("velora", peft.LoraConfig,
        dict(LORA, velora_config=peft.VeloraConfig(num_groups=2, init_type="random")),
        ("hf_llama",), same=False),
    Row("monteclora", peft.LoraConfig,
        dict(LORA, monteclora_config=peft.MontecloraConfig(num_samples=2)), ("hf_bert",),
        same=False),
    Row("mica", peft.LoraConfig, dict(LORA, init_lora_weights="mica"), ("hf_bert",), dtype=FLOAT),
    Row("bdlora", peft.LoraConfig, dict(LORA, r=4, use_bdlora=BdLoraConfig(
        nblocks=2, target_modules_bd_a=["query"], target_modules_bd_b=["value"],
        match_strict=False,
    )), ("hf_bert",), same=False),
    Row("bias_all_whole", peft.LoraConfig, dict(LORA, bias="all", modules_to_save=["classifier"]),
        ("hf_bert",), same=False),
)  # fmt: skip


class Holding(nn.Module):
    """A model in another: peft takes no parameters of the outermost module."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.mlp(**inputs)


def target_modules(row: Row, model: nn.Module) -> list[str]:
    """The modules of a row in a model."""
    if row.targets == "norms":
        method: pl.Method = pl.NormTuning()
    elif row.targets is None:
        linear = {nn.Linear, Conv1D}
        method = pl.LoRA(targets=lambda s: s.linear and not s.head and type(s.module) in linear)
    else:
        names = dict(model.named_modules())
        return [t for t in row.targets if any(n == t or n.endswith(f".{t}") for n in names)]
    delta = pl.attach(model, method)
    paths = {address.rpartition(".")[0] for address in delta.placed}
    pl.detach(model, delta.name)
    return sorted(paths)


def base(row: Row, kind: Kind) -> nn.Module:
    model = kind.model()
    if kind.name == "experts":
        model = Holding(model)
    return (model if row.conv1d else straightened(model)).to(row.dtype)


def tensors(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    with seeded(3):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:  # which peft doesn't save
                parameter.add_(0.2 * torch.randn_like(parameter))


def peer(row: Row, kind: Kind) -> peft.PeftModel:
    """peft's model, all that it trains somewhere else than at first."""
    model = base(row, kind)
    config = row.config(**row.settings)
    config.target_modules = target_modules(row, model)
    if row.conv1d and kind.name == "hf_gpt2":
        config.fan_in_fan_out = True
    theirs = peft.get_peft_model(model, config).eval()
    disturb(theirs)
    return theirs


@pytest.mark.parametrize(
    "row, kind",
    [pytest.param(row, KIND[kind], id=f"{row.name}-{kind}") for row in ROWS for kind in row.kinds],
)
@torch.no_grad()
def test_both_ways(row: Row, kind: Kind, tmp_path: Path) -> None:
    theirs, batch = peer(row, kind), kind.batch(dtype=row.dtype)
    theirs.save_pretrained(tmp_path / "sql")
    plain = kind.run(base(row, kind), batch)
    expected = kind.run(theirs, batch)
    assert apart(plain, expected) > 1e-3

    ours = base(row, kind)
    delta = pl.load(ours, tmp_path / "sql")
    assert delta.name == "sql"
    assert apart(kind.run(ours, batch), expected) <= 1e-6
    assert pl.inspect(tmp_path / "sql").format == "peft"

    pl.export(delta, tmp_path / "out")
    back = peft.PeftModel.from_pretrained(base(row, kind), tmp_path / "out").eval()
    assert apart(kind.run(back, batch), expected) <= 1e-6
    if row.same:
        mine, other = (tensors(tmp_path / name) for name in ("out", "sql"))
        # the head goes along, as peft asks for it where it knows the task
        mine = {key: x for key, x in mine.items() if key in other or ".classifier." not in key}
        assert mine.keys() == other.keys()
        rounding = torch.finfo(row.dtype).eps * 16
        assert all(apart(mine[key], other[key]) <= rounding for key in mine)
    else:
        again = base(row, kind)
        pl.load(again, tmp_path / "out")
        assert apart(kind.run(again, batch), expected) <= 1e-6


# -- beyond the table


@pytest.mark.filterwarnings("ignore:The following rank_pattern:RuntimeWarning")
@torch.no_grad()
def test_an_adapter_that_was_cut_to_its_budget(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.name == "adalora")
    kind, theirs = KIND["hf_bert"], peer(row, KIND["hf_bert"])
    theirs.peft_config["default"].rank_pattern = {
        "bert.encoder.layer.0.attention.self.query.lora_E": [True, False, True],
        "bert.encoder.layer.1.attention.self.query.lora_E": [False, False, False],
    }
    for name, its in theirs.peft_config["default"].rank_pattern.items():
        e = theirs.get_base_model().get_submodule(name.removesuffix(".lora_E")).lora_E["default"]
        e[~torch.tensor(its)] = 0
    theirs.save_pretrained(tmp_path / "sql")
    batch = kind.batch(dtype=torch.float64)
    expected, ours = kind.run(theirs, batch), base(row, kind)
    delta = pl.load(ours, tmp_path / "sql")
    assert apart(kind.run(ours, batch), expected) <= 1e-6
    pl.export(delta, tmp_path / "out")
    back = peft.PeftModel.from_pretrained(base(row, kind), tmp_path / "out").eval()
    assert apart(kind.run(back, batch), expected) <= 1e-6


@pytest.mark.filterwarnings("ignore:.*base layer has no bias:UserWarning")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("config", [peft.BeftConfig(), peft.LoraConfig(**LORA, lora_bias=True)])
@torch.no_grad()
def test_a_bias_that_a_layer_was_made_without(config: peft.PeftConfig, tmp_path: Path) -> None:
    with seeded():
        plain = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).double()
        x = torch.randn(5, 4, dtype=torch.float64)
    config.target_modules = ["0", "2"]
    theirs = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "sql")
    expected, ours = theirs(x), copy.deepcopy(plain)
    delta = pl.load(ours, tmp_path / "sql")
    assert apart(ours(x), expected) <= 1e-12
    with pl.using(ours, None):
        assert torch.equal(ours(x), plain(x))
    with pytest.raises(pl.PeftliteError, match="changes calls, which no weight can hold"):
        pl.merge(ours, delta)
    pl.export(delta, tmp_path / "out")
    mine, other = tensors(tmp_path / "out"), tensors(tmp_path / "sql")
    assert mine.keys() == other.keys() and all(apart(mine[k], other[k]) <= 1e-12 for k in mine)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "out")
    assert apart(back(x), expected) <= 1e-12


HEADED = {
    "lora": peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
    "norms": peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("form", HEADED)
@torch.no_grad()
def test_a_head_goes_whole_for_a_task(form: str, tmp_path: Path) -> None:
    """peft saves it whole beside any method, and asks for all of it where it knows the task."""

    def model() -> nn.Module:
        made = KIND["hf_bert"].model(torch.float64)
        with seeded():
            made.classifier = nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 5)).double()
        return made

    batch, run = KIND["hf_bert"].batch(), KIND["hf_bert"].run
    theirs = peft.get_peft_model(model(), copy.deepcopy(HEADED[form])).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "sql")
    ours = model()
    delta = pl.load(ours, tmp_path / "sql")
    expected = run(theirs, batch)
    assert apart(run(ours, batch), expected) <= 1e-6
    pl.export(delta, tmp_path / "out", settings={"task_type": "SEQ_CLS"})
    back = peft.PeftModel.from_pretrained(model(), tmp_path / "out").eval()
    assert apart(run(back, batch), expected) <= 1e-6


SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=24, max_position_embeddings=32, pad_token_id=0)  # fmt: skip
DISTIL = dict(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
GPT2 = dict(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0)
BASES: dict[str, tuple[dict[str, Any], str]] = {
    "Bert": (SMALL, "query"), "Roberta": (SMALL, "query"), "DistilBert": (DISTIL, "q_lin"),
    "GPT2": (GPT2, "c_attn"), "Llama": (SMALL, "q_proj"),
}  # fmt: skip
TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("does", TASKS)
@torch.no_grad()
def test_a_head_that_stays_goes_with_the_task(does: str, base: str, tmp_path: Path) -> None:
    """peft asks for the heads of a task, and a base that was pretrained for another lacks them."""
    config, target = BASES[base]
    kind = getattr(transformers, f"{base}For{does}")
    with seeded():
        model = kind(getattr(transformers, f"{base}Config")(**config)).eval()
    model.save_pretrained(tmp_path / "base")
    model.config.name_or_path = str(tmp_path / "base")
    delta = pl.attach(model, pl.LoRA(rank=2, targets=target))
    disturb(model)
    ids = torch.tensor([[5, 7, 9, 1], [3, 8, 4, 1]])
    expected = model(ids)[0]
    pl.export(delta, tmp_path / "out")
    auto = getattr(peft, f"AutoPeftModelFor{does}")
    back = auto.from_pretrained(tmp_path / "out").eval()
    assert back.peft_config["default"].task_type == TASKS[does]
    assert apart(back(input_ids=ids)[0], expected) <= 1e-6
    with seeded(5):  # another head
        other = kind(getattr(transformers, f"{base}Config")(**config)).eval()
    heads = ("classifier", "score", "qa_outputs")
    its = {k: x for k, x in model.state_dict().items() if not any(h in k for h in heads)}
    other.load_state_dict(its, strict=False)
    back = peft.PeftModel.from_pretrained(other, tmp_path / "out").eval()
    assert apart(back(input_ids=ids)[0], expected) <= 1e-6


@torch.no_grad()
def test_attention_agrees_in_its_weights(tmp_path: Path) -> None:
    """peft adds the change of an attention's last map twice, when it runs and when merged."""
    kind = KIND["mha_encoder"]
    names = [f"0.layers.{i}.self_attn" for i in range(2)]
    config = peft.LoraConfig(**LORA, target_modules=names)
    theirs = peft.get_peft_model(kind.model(torch.float64), config).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "sql")
    delta = pl.load(kind.model(torch.float64), tmp_path / "sql")
    for name in names:
        layer = theirs.get_base_model().get_submodule(name)
        last = layer.base_layer.out_proj
        for slot, its, times in (("in_proj_weight", layer, 1), ("out_proj.weight", last, 2)):
            placed = delta.placed[f"{name}.{slot}"]
            change = placed.patch.value(placed.site.whole) - placed.site.whole
            assert apart(change, times * its.get_delta_weight("default")) <= 1e-12
    pl.export(delta, tmp_path / "out")
    mine, other = tensors(tmp_path / "out"), tensors(tmp_path / "sql")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    peft.PeftModel.from_pretrained(kind.model(torch.float64), tmp_path / "out")


PROMPTED = {
    "hf_bert": "SEQ_CLS", "hf_gpt2": "CAUSAL_LM", "hf_llama": "CAUSAL_LM", "hf_t5": "SEQ_2_SEQ_LM"
}  # fmt: skip


@pytest.mark.parametrize("kind", PROMPTED)
@pytest.mark.parametrize("form", ["prompt", "p_tuning"])
@torch.no_grad()
def test_prompts_both_ways(kind: str, form: str, tmp_path: Path) -> None:
    make = {"prompt": peft.PromptTuningConfig, "p_tuning": peft.PromptEncoderConfig}[form]
    its, task = KIND[kind], PROMPTED[kind]
    model = its.model(torch.float64)
    theirs = peft.get_peft_model(model, make(task_type=task, num_virtual_tokens=3)).eval()
    theirs.double()
    disturb(theirs)
    batch = its.batch(dtype=torch.float64)
    theirs.save_pretrained(tmp_path / "sql")
    ours = its.model(torch.float64)
    delta = pl.load(ours, tmp_path / "sql")
    n = -its.run(ours, batch).shape[1] if kind != "hf_bert" else 0  # peft gives those of the prompt
    assert apart(its.run(ours, batch), its.run(theirs, batch)[:, n:]) <= 1e-6
    pl.export(delta, tmp_path / "out", settings={"task_type": task})
    back = peft.PeftModel.from_pretrained(its.model(torch.float64), tmp_path / "out").eval()
    assert apart(its.run(back, batch), its.run(theirs, batch)) <= 1e-6


OURS: dict[str, pl.Method | list[pl.Method]] = {
    "pissa": pl.LoRA(rank=3, alpha=5, init="pissa"),
    "pissa_rslora": pl.LoRA(rank=3, alpha=5, scaling="rslora", init="pissa"),
    "dora_olora": pl.DoRA(rank=2, init="olora"),
    "ranks": [pl.LoRA(rank=2, targets="query"), pl.LoRA(rank=5, alpha=3, targets="value")],
    "biases": [pl.LoRA(rank=2), pl.BitFit()],
    "whole": [pl.LoRA(rank=2), pl.FullTuning(targets=["classifier", "pooler.dense"])],
    "norms": [pl.LoRA(rank=2), pl.NormTuning()],
    "rows": [pl.LoRA(rank=2), pl.FullTuning(targets="word_embeddings.weight[3:5]")],
    "bitfit": pl.BitFit(),
    "full": pl.FullTuning(targets=["query", "LayerNorm"]),
    "lora_fa": pl.LoRA(rank=2, freeze_a=True),
}


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_deltas_of_our_own(name: str, tmp_path: Path) -> None:
    kind = KIND["hf_bert"]
    model, batch = kind.model(torch.float64), kind.batch(dtype=torch.float64)
    delta = pl.attach(model, OURS[name])
    with seeded():
        for parameter in delta.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    expected = kind.run(model, batch)
    assert apart(expected, kind.run(kind.model(torch.float64), batch)) > 1e-3
    pl.export(delta, tmp_path / "out")
    back = peft.PeftModel.from_pretrained(kind.model(torch.float64), tmp_path / "out").eval()
    assert apart(kind.run(back, batch), expected) <= 1e-6
    again = kind.model(torch.float64)
    pl.load(again, tmp_path / "out")
    assert apart(kind.run(again, batch), expected) <= 1e-6
    pl.merge(model, delta.name)
    pl.export(delta, tmp_path / "merged")
    assert tensors(tmp_path / "merged").keys() == tensors(tmp_path / "out").keys()
    mine, other = tensors(tmp_path / "merged"), tensors(tmp_path / "out")
    assert all(torch.equal(mine[key], other[key]) for key in mine)


# -- strictness


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a Llama and a head of its own, from peft."""
    row = next(row for row in ROWS if row.name == "head")
    folder = tmp_path_factory.mktemp("peft") / "sql"
    peer(row, KIND["hf_llama"]).save_pretrained(folder)
    return folder


def rewritten(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of an adapter, with other tensors."""
    held = tensors(folder)
    change(held)
    to.mkdir()
    (to / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    held = {key: tensor.contiguous() for key, tensor in held.items()}
    safetensors.torch.save_file(held, to / "adapter_model.safetensors", {"format": "pt"})
    return to


WRONG: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
    "gone": lambda held, key: held.pop(key),
    "renamed": lambda held, key: held.update({f"{key}_": held.pop(key)}),
    "moved": lambda held, key: held.update({key.replace("model.model.", "model."): held.pop(key)}),
    "longer": lambda held, key: held.update({key: torch.cat([held[key], held[key][:1]])}),
    "turned": lambda held, key: held.update({key: held[key].T}),
    "deeper": lambda held, key: held.update({key: held[key][None]}),
    "integers": lambda held, key: held.update({key: held[key].long()}),
    "scalar": lambda held, key: held.update({key: held[key].sum()}),
    "empty": lambda held, key: held.update({key: held[key][:0]}),
    "nan": lambda held, key: held[key][0, 0].fill_(float("nan")),
    "infinite": lambda held, key: held[key][-1, -1].fill_(float("inf")),
    "doubled": lambda held, key: held.update({f"base_model.model.{key}": held[key].clone()}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_any_tensor_is_refused(wrong: str, saved: Path, tmp_path: Path) -> None:
    model = KIND["hf_llama"].model(torch.float64)
    before = digest(model)
    for i, key in enumerate(tensors(saved)):
        if i % 5 and "lm_head" not in key:
            continue
        at = rewritten(saved, tmp_path / f"{i}", lambda held, key=key: WRONG[wrong](held, key))
        with pytest.raises(pl.FileError):
            pl.load(model, at)
    assert_same(before, digest(model))


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in (
    "lora", "ia3", "lokr", "vera", "shira",
)], ids=lambda row: row.name)  # fmt: skip
def test_any_setting_is_taken_or_refused(row: Row, tmp_path: Path) -> None:
    kind = KIND["mlp"]
    peer(row, kind).save_pretrained(tmp_path / "sql")
    path, model = tmp_path / "sql/adapter_config.json", base(row, kind)
    config = json.loads(path.read_text())
    for name in config:
        for value in (None, -1, 3.5, 1e300, True, "x" * 5000, [[]], {"": [-1]}):
            path.write_text(json.dumps({**config, name: value}))
            with contextlib.suppress(pl.FileError):
                pl.detach(model, pl.load(model, tmp_path / "sql").name)


def test_a_folder_is_replaced_as_one(saved: Path, tmp_path: Path) -> None:
    model = KIND["hf_llama"].model(torch.float64)
    delta, out = pl.load(model, saved), tmp_path / "out"
    pl.export(delta, out)
    (out / "README.md").write_text("mine")
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    pl.export(delta, out, settings={"base_model_name_or_path": "llama"})
    again = {path.name: path.read_bytes() for path in out.iterdir()}
    config = json.loads(again["adapter_config.json"])
    assert config["base_model_name_or_path"] == "llama" and config["inference_mode"] is True
    pl.export(delta, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    with mock.patch.object(Path, "rename", side_effect=OSError("no space")):
        with pytest.raises(pl.FileError, match="no space"):
            pl.export(delta, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_puts_the_older_one_back(saved: Path, tmp_path: Path) -> None:
    delta, out = pl.load(KIND["hf_llama"].model(torch.float64), saved), tmp_path / "out"
    pl.export(delta, out)
    first, rename, calls = {p.name: p.read_bytes() for p in out.iterdir()}, Path.rename, []

    def failing(path: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == 2:
            raise OSError("pulled out")
        return rename(path, to)

    with mock.patch.object(Path, "rename", failing), pytest.raises(pl.FileError, match="pulled"):
        pl.export(delta, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_it_is_looked_at_without_a_model(saved: Path) -> None:
    info = pl.inspect(saved)
    assert info.name == "sql"
    assert info.num_parameters == sum(map(Tensor.numel, tensors(saved).values()))
    (lora, modules), (full, wholes) = info.methods
    assert lora == pl.LoRA(rank=3, alpha=5) and full == pl.FullTuning()
    assert "model.layers.0.self_attn.q_proj" in modules and wholes == ["lm_head.weight"]
    assert pl.inspect(saved / "adapter_model.safetensors") == info


def test_what_vllm_serves(saved: Path, tmp_path: Path) -> None:
    def problems(method: Any, rank: int = 16) -> list[str]:
        return pl.check_vllm(pl.attach(KIND["hf_llama"].model(), method), rank)

    lora = pl.LoRA(rank=8, scaling="rslora")
    assert problems(lora) == []
    delta = pl.attach(KIND["hf_llama"].model(), lora)
    pl.export(delta, tmp_path / "out")
    assert pl.check_vllm(tmp_path / "out") == []
    assert problems(lora, 4) == [
        "its rank is 8, and the server takes 4: start it with --max-lora-rank 8"
    ]
    assert problems(pl.LoRA(rank=8, init="pissa"), 8)[0].endswith("--max-lora-rank 16")
    assert problems(pl.DoRA(rank=8))[0] == "it has use_dora, which vLLM doesn't"
    assert problems(pl.IA3()) == ["it is a IA3, and vLLM serves LoRA alone"]
    assert "BottleneckAdapter" in problems(pl.BottleneckAdapter())[0]
    assert "bias='all'" in problems([pl.LoRA(), pl.BitFit(targets=["q_proj", "up_proj"])])[0]
    assert "lora_embedding_A" in problems(pl.LoRA(targets="embed_tokens"))[0]
    ranks = [pl.LoRA(rank=2, targets="q_proj"), pl.LoRA(rank=4, targets="k_proj")]
    assert problems(ranks) == []
    assert problems(ranks, 3)[0].startswith("its rank is 4, and the server takes 3")
    assert "it has lm_head in modules_to_save" in pl.check_vllm(saved)[0]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    for settings, says in (
        ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights='pissa_niter_4', which chan"]),
        ({"init_lora_weights": "LoftQ"}, ["init_lora_weights='LoftQ', which changes the base"]),
        ({"init_lora_weights": "eva"}, []),
        ({"layer_replication": [[0, 2]]}, ["it has layer_replication, which vLLM doesn't"]),
        ({"alora_invocation_tokens": [1], "use_qalora": True}, ["it has alora", "it has use_qa"]),
        ({"target_parameters": ["experts.gate_up_proj"]}, []),
        ({"target_parameters": ["mlp.router"]}, ["mlp.router by itself"]),
        ({"modules_to_save": ["score"]}, []),
    ):
        (tmp_path / "out/adapter_config.json").write_text(json.dumps({**config, **settings}))
        found = pl.check_vllm(tmp_path / "out")
        assert len(found) == len(says), found
        assert all(part in line for part, line in zip(says, found, strict=True)), found


def test_a_tied_weight_is_changed_for_both_or_not_at_all(tmp_path: Path) -> None:
    kind, full = KIND["gpt_tied"], pl.FullTuning(targets="lm_head")
    model = kind.model()
    delta = pl.attach(model, full)
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    pl.export(delta, tmp_path / "out")
    assert len(tensors(tmp_path / "out")) == 2
    again = kind.model()
    pl.load(again, tmp_path / "out")
    assert apart(kind.run(again, kind.batch()), kind.run(model, kind.batch())) <= 1e-6
    key = "base_model.model.embed.ln_tuning_layers.weight"
    at = rewritten(tmp_path / "out", tmp_path / "apart", lambda held: held[key].mul_(2))
    with pytest.raises(pl.FileError, match="this model ties them"):
        pl.load(again, at, "apart")


def test_bf16_and_an_older_dtype(tmp_path: Path) -> None:
    """The file keeps its dtype, whatever the model's."""
    kind = KIND["hf_llama"]
    delta = pl.attach(kind.model(torch.bfloat16), pl.LoRA(rank=2, dtype=torch.bfloat16))
    pl.export(delta, tmp_path / "out")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    back = pl.load(kind.model(), tmp_path / "out")
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["hra", "lokr_both", "boft"])
@torch.no_grad()
def test_the_same_bits_once_saved_and_whether_it_trains(name: str, tmp_path: Path) -> None:
    row, kind = next(row for row in ROWS if row.name == name), KIND["hf_bert"]
    peer(row, kind).save_pretrained(tmp_path / "sql")
    model, batch = base(row, kind), kind.batch(dtype=row.dtype)
    pl.save(pl.load(model, tmp_path / "sql"), tmp_path / "own.safetensors")
    expected = kind.run(model, batch)
    for path in ("sql", "own.safetensors"):
        for trainable in (False, True):
            again = base(row, kind)
            pl.load(again, tmp_path / path, trainable=trainable)
            assert torch.equal(kind.run(again, batch), expected), (path, trainable)


@torch.no_grad()
def test_peft_finds_the_base_of_an_export(tmp_path: Path) -> None:
    kind = KIND["hf_llama"]
    kind.model().save_pretrained(tmp_path / "base")
    model = type(kind.model()).from_pretrained(tmp_path / "base")
    delta = pl.attach(model, pl.LoRA(rank=2))
    nn.init.normal_(next(iter(delta.placed.values())).patch.b)
    pl.export(delta, tmp_path / "out")
    back = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert apart(kind.run(back, kind.batch()), kind.run(model.eval(), kind.batch())) <= 1e-5

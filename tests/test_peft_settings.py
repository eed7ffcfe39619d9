"""PEFT's settings: which modules they name, what they say of each, and whether the tensors agree.

peft makes the adapters, of small models of its kinds of layers, and its outputs are the right ones.
"""

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn

import peftlite as pl
from peftlite.io.peft.regex import Regexes
from tests.test_against_peft import KIND
from tests.test_against_peft import butterflies as butterflies
from tests.zoo import seeded

# of what peft finds in a model from no hub, and of its own settings
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*_pattern entries:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:target_modules=.* were set but:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]


class Experts(nn.Module):
    """Two stacks of matrices, (e, i, o), as transformers has them, or (e, o, i)."""

    def __init__(self, is_transposed: bool, e: int = 3):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(e, 6, 6) * 0.3)
        self.down = nn.Parameter(torch.randn(e, 6, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return (torch.tanh(x @ up) @ down).mean(0)


class Block(nn.Module):
    def __init__(self, is_transposed: bool, e: int):
        super().__init__()
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)
        self.experts = Experts(is_transposed, e)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.k(torch.tanh(self.q(x))))


class Net(nn.Module):
    """Layers of one name at several depths, an attention, and a table."""

    def __init__(self, is_transposed: bool = False, e: int = 3):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.q = nn.Linear(6, 6)
        self.mha = nn.MultiheadAttention(6, 2)
        self.layers = nn.ModuleList(Block(is_transposed, e) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(self.embed(x))
        y = y + self.mha(y, y, y)[0]
        for layer in self.layers:
            y = y + layer(y)
        return y


X = torch.arange(8)


def net(**options: Any) -> nn.Module:
    with seeded(5):
        return Net(**options).double().eval()


def saved(folder: Path, config: peft.PeftConfig, base: nn.Module) -> Tensor:
    """What peft's model gives whose adapter is in a folder, after it was loaded from there."""
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with seeded(7), torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    with torch.no_grad():
        return theirs.eval()(X)


def error(folder: Path, base: nn.Module, expected: Tensor) -> float:
    """How far the loaded outputs are from peft's, and those of its export here and there."""
    ours = copy.deepcopy(base)
    delta = pl.load(ours, folder)
    with torch.no_grad():
        found = [ours(X)]
        if delta.placed:
            pl.export(delta, folder / "out")
            back = copy.deepcopy(base)
            pl.load(back, folder / "out")
            peer = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "out").eval()
            found += [back(X), peer(X)]
    return max((y - expected).abs().max().item() for y in found)


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q"]} | settings)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the settings in a folder."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def drop(folder: Path, gone: str) -> None:
    """Takes tensors out of a folder."""
    path = folder / "adapter_model.safetensors"
    held = safetensors.torch.load_file(path)
    assert any(gone in key for key in held)
    kept = {key: tensor for key, tensor in held.items() if gone not in key}
    safetensors.torch.save_file(kept, path, {"format": "pt"})


# -- regexes


def some_regex(rng: random.Random, depth: int) -> str:
    def inner() -> str:
        return some_regex(rng, depth - 1)

    if not depth or rng.random() < 0.3:
        return rng.choice(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", r"[a-c\d]", r"\W",
                           r"\b", r"\B", "^", "$", r"\s"])  # fmt: skip
    match rng.randrange(6):
        case 0 | 1:
            return inner() + inner()
        case 2:
            return f"(?:{inner()}|{inner()})"
        case 3:
            return f"({inner()})" + rng.choice(["*", "+", "?", "{1,2}", "{2}", "*?", "+?", "{,3}"])
        case 4:
            return f"{rng.choice(['(?=', '(?!'])}{inner()})"
    return rng.choice([r"(?<=a)", r"(?<!ab)", r"(?<=[ab]\.)", "(?<=^a)"]) + inner()


def test_a_regex_matches_as_in_python() -> None:
    rng, matched = random.Random(0), 0
    for _ in range(6000):
        pattern = rng.choice(["", "", "(?i)"]) + some_regex(rng, 4)
        text = "".join(rng.choice("ab.1_A") for _ in range(rng.randrange(1, 8)))
        expected = re.fullmatch(pattern, text) is not None
        assert Regexes().matches(pattern, text) is expected, (pattern, text)
        matched += expected
    assert matched > 100


@pytest.mark.parametrize("pattern", [r"(a|a)*b", r"((a*)*)*b", r"(.*)*(.*)*(.*)*b", "(a|a)" * 40])
def test_a_regex_ends(pattern: str) -> None:
    assert Regexes().matches(pattern, "a" * 300) is False


# -- patterns


PATTERNS: dict[str, dict[str, Any]] = {
    "regexes": dict(alpha_pattern={r".*\.[qk]": 16, "q": 3}, rank_pattern={r"layers\.\d\.q": 3}),
    "first": dict(alpha_pattern={"layers.0.*": 16, r"layers.(0|1).q": 32}),
    "anchored": dict(alpha_pattern={"^q": 16}, rank_pattern={"^layers.0.q": 5}),
    "dots": dict(alpha_pattern={"layers.1.q": 16, "0.k": 1}),
    "parameter": dict(alpha_pattern={"experts.up": 16}, rank_pattern={"1.experts.down": 1}),
    "not_its_module": dict(alpha_pattern={"experts": 16}, rank_pattern={"experts": 4}),
    "attention": dict(alpha_pattern={"mha": 16}, rank_pattern={"m.a": 3}),
    "not_its_last_map": dict(alpha_pattern={"out_proj": 16}),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_hold_where_they_do_in_peft(name: str, tmp_path: Path) -> None:
    config = lora(
        target_modules=["q", "k", "mha"], target_parameters=["experts.up", "experts.down"],
        **PATTERNS[name],
    )  # fmt: skip
    base = net()
    expected = saved(tmp_path, config, base)
    assert (expected - base(X)).abs().max() > 1e-3
    assert error(tmp_path, base, expected) <= 1e-6


def test_patterns_of_other_methods(tmp_path: Path) -> None:
    for i, config in enumerate((
        peft.LoHaConfig(r=2, alpha=4, rank_pattern={"^q": 3}, alpha_pattern={r".*\.\d\.q": 9}),
        peft.LoKrConfig(r=1, alpha=4, alpha_pattern={"^q": 9}, init_weights="lycoris"),
        peft.FourierFTConfig(n_frequency=7, scaling=3.0, n_frequency_pattern={"layers.0.q": 5}),
        peft.IA3Config(feedforward_modules=r"layers\.(0|1)\.q"),
    )):  # fmt: skip
        base = net()
        config.target_modules = ["q"]
        expected = saved(tmp_path / f"{i}", config, base)
        # peft's transform is in fp32
        assert error(tmp_path / f"{i}", base, expected) <= 1e-6


# -- layouts


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("e", [1, 3])
def test_parameters(is_transposed: bool, e: int, tmp_path: Path) -> None:
    names = ["experts.up", "experts.down", "k.weight", "in_proj_weight", "embed.weight"]
    base = net(is_transposed=is_transposed, e=e)
    config = lora(target_parameters=names, alpha_pattern={"k": 9, "embed.weight": 3})
    expected = saved(tmp_path, config, base)
    ours = copy.deepcopy(base)
    pl.load(ours, tmp_path)
    with torch.no_grad():
        assert (ours(X) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("version", ["0.18.1", "0.17.0", None])
@torch.no_grad()
def test_stacks_of_an_older_peft(version: str | None, tmp_path: Path) -> None:
    """ΔW = s·(BA)ᵀ for each matrix, as before peft 0.19."""
    base = net()
    expected, s = copy.deepcopy(base), 2.0
    tmp_path.mkdir(exist_ok=True)
    held = {}
    with seeded():
        for i, layer in enumerate(expected.layers):
            for outer, w in (("", layer.experts.up), (".base_layer", layer.experts.down)):
                a, b = torch.randn(6, 6).double(), torch.randn(6, 6).double()
                w += s * (b.view(6, 2, 3).permute(2, 0, 1) @ a.view(3, 2, 6)).mT
                key = f"base_model.model.layers.{i}.experts{outer}.lora_"
                key = key.replace(outer, "") if not outer else key
                held |= {f"{key}A.weight": a, f"{key}B.weight": b}
    swapped = {
        key.replace("experts.base_layer", "experts.X"): x for key, x in held.items()
    }  # the last parameter is outermost
    swapped = {
        key.replace("experts.X", "experts") if "X" in key
        else key.replace("experts", "experts.base_layer"): x
        for key, x in swapped.items()
    }  # fmt: skip
    safetensors.torch.save_file(swapped, tmp_path / "adapter_model.safetensors")
    settings = dict(
        peft_type="LORA", r=2, lora_alpha=4, peft_version=version,
        target_parameters=["experts.up", "experts.down"],
    )  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    ours = copy.deepcopy(base)
    delta = pl.load(ours, tmp_path)
    assert (ours(X) - expected(X)).abs().max() <= 1e-6
    pl.export(delta, tmp_path / "out")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    assert (again(X) - expected(X)).abs().max() <= 1e-6


ATTENTIONS: dict[str, dict[str, Any]] = {
    "both": dict(target_modules=["mha"]),
    "rslora": dict(target_modules=["mha"], use_rslora=True, rank_pattern={"mha": 3}),
    "biases": dict(target_modules=["mha"], bias="all"),
    "last": dict(target_modules=["q", "out_proj"]),
    "all": dict(target_modules="all-linear"),
    "parameter": dict(target_parameters=["in_proj_weight"]),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_is_as_peft_runs_it(name: str, tmp_path: Path) -> None:
    """Its last map has its change twice; where it's named by itself, peft never runs it."""
    base = net()
    expected = saved(tmp_path, lora(**ATTENTIONS[name]), base)
    if name == "parameter":  # peft has no name for it but its module's, which has both maps
        delta = pl.load(base, tmp_path)
        assert (base(X) - expected).abs().max() <= 1e-6
        with pytest.raises(pl.PeftliteError, match=r"out_proj\.weight with it"):
            pl.export(delta, tmp_path / "out")
    else:
        assert error(tmp_path, base, expected) <= 1e-6


def test_an_attention_that_is_tuned_as_a_norm(tmp_path: Path) -> None:
    """peft has the adapter's name in the names of what is inside."""
    base = net()
    expected = saved(tmp_path, peft.LNTuningConfig(target_modules=["mha"]), base)
    assert error(tmp_path, base, expected) <= 1e-6


def test_a_base_that_goes_without_its_last_singular_components(tmp_path: Path) -> None:
    """Which peft finds, and takes out, in fp32."""
    base = net()
    kasa = lora(kasa_config=peft.KasaConfig(), use_rslora=True, rank_pattern={"layers.0.q": 1})
    expected = saved(tmp_path, kasa, base)
    assert error(tmp_path, base, expected) <= 1e-5


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_a_bias_that_is_trained_and_shifted(which: Any, tmp_path: Path) -> None:
    base = net()
    expected = saved(tmp_path, lora(bias=which, lora_bias=True), base)
    assert error(tmp_path, base, expected) <= 1e-6


# -- what is named


NAMED: dict[str, dict[str, Any]] = {
    "list": dict(target_modules=["q", "k"]),
    "regex": dict(target_modules=r"(.*\.)?[qk]"),
    "all_linear": dict(target_modules="all-linear"),
    "excluded": dict(target_modules=["q", "k"], exclude_modules=["layers.0.k"]),
    "excluded_by_regex": dict(target_modules=["q", "k"], exclude_modules=r"layers\.0\..*k"),
    "layers": dict(target_modules=["q", "k"], layers_to_transform=[1], layers_pattern="layers"),
    "one_layer": dict(target_modules=["q", "k"], layers_to_transform=1, layers_pattern=["layers"]),
    "parameters": dict(target_parameters=["experts.up", "experts.down"], target_modules=["q"]),
    "biases": dict(target_modules=["q", "mha"], bias="lora_only"),
    "all_biases": dict(target_modules=["q", "mha"], bias="all"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_module_without_its_tensors_is_missed(name: str, tmp_path: Path) -> None:
    base = net()
    expected = saved(tmp_path, lora(**NAMED[name]), base)
    assert error(tmp_path, base, expected) <= 1e-6
    gone = {"parameters": "experts.", "biases": "q.base_layer.bias", "all_biases": "k.bias"}
    drop(tmp_path, f"layers.1.{gone.get(name, 'q.')}")
    with pytest.raises(
        pl.FileError, match=r"lacks the tensors of \d mod.*layers\.1\.(q|k|experts)"
    ):
        pl.load(base, tmp_path)
    assert not pl.deltas(base)


# -- agreement


def tables() -> dict[str, tuple[peft.PeftConfig, dict[str, Any]]]:
    """Adapters with settings that their tensors deny."""
    return {
        "lora": (lora(), dict(r=3, rank_pattern={"layers.0.q": 1}, use_dora=True, lora_bias=True)),
        "experts": (lora(target_parameters=["experts.up"]), dict(r=6, rank_pattern={"up": 1})),
        "dora": (lora(use_dora=True), dict(r=1, use_dora=False)),
        "biased": (lora(lora_bias=True), dict(lora_bias=False)),
        "loha": (peft.LoHaConfig(r=2), dict(r=3, rank_pattern={"q": 1})),
        "lokr": (peft.LoKrConfig(r=1), dict(r=2, decompose_factor=1)),
        "adalora": (peft.AdaLoraConfig(init_r=3, total_step=9), dict(
            init_r=2, rank_pattern={"q.lora_E": [True, False, True]})),
        "oft": (peft.OFTConfig(oft_block_size=2), dict(oft_block_size=3, r=3)),
        "oft_blocks": (peft.OFTConfig(r=3, oft_block_size=0), dict(r=2)),
        "boft": (peft.BOFTConfig(boft_block_size=2), dict(boft_block_size=3, boft_block_num=2)),
        "hra": (peft.HRAConfig(r=4), dict(r=2)),
        "hira": (peft.HiraConfig(r=4), dict(r=2)),
        "vera": (peft.VeraConfig(r=4), dict(r=2)),
        "vblora": (peft.VBLoRAConfig(r=4, num_vectors=7, vector_length=3), dict(
            r=2, num_vectors=8, vector_length=6, topk=8)),
        "fourierft": (peft.FourierFTConfig(n_frequency=7), dict(
            n_frequency=8, n_frequency_pattern={"layers.0.q": 3})),
        "shira": (peft.ShiraConfig(r=2), dict(r=1)),
        "ia3": (peft.IA3Config(feedforward_modules=[]), dict(feedforward_modules=["q"])),
        "tokens": (lora(trainable_token_indices={"embed": [1, 2]}), dict(
            trainable_token_indices={"embed": [1, 2, 3]})),
    }  # fmt: skip


@pytest.mark.parametrize("name", tables())
def test_settings_that_the_tensors_deny_are_refused(name: str, tmp_path: Path) -> None:
    config, wrong = tables()[name]
    config.target_modules, base = config.target_modules or ["q"], net()
    saved(tmp_path, config, base)
    path = tmp_path / "adapter_config.json"
    text = path.read_text()
    pl.detach(base, pl.load(base, tmp_path).name)
    for setting, value in wrong.items():
        path.write_text(text)
        rewrite(tmp_path, lambda its, setting=setting, value=value: its.update({setting: value}))
        with pytest.raises(pl.FileError):
            pl.load(base, tmp_path)
    assert not pl.deltas(base)


PROMPTS = {
    "prompt": (peft.PromptTuningConfig, dict(num_virtual_tokens=4, token_dim=8)),
    "p_tuning": (peft.PromptEncoderConfig, dict(num_virtual_tokens=2, token_dim=32)),
    "prefix": (peft.PrefixTuningConfig, dict(num_virtual_tokens=4, num_layers=1, token_dim=16)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_sizes_of_prompts_that_the_tensors_deny(name: str, tmp_path: Path) -> None:
    make, wrong = PROMPTS[name]
    kind = KIND["hf_llama"]
    config = make(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(kind.model(), config).save_pretrained(tmp_path)
    base, text = kind.model(), (tmp_path / "adapter_config.json").read_text()
    pl.detach(base, pl.load(base, tmp_path).name)
    for setting, value in wrong.items():
        (tmp_path / "adapter_config.json").write_text(text)
        rewrite(tmp_path, lambda its, setting=setting, value=value: its.update({setting: value}))
        with pytest.raises(pl.FileError, match="aren't of one adapter"):
            pl.load(base, tmp_path)


def test_a_rank_that_was_padded_for_compiling(tmp_path: Path) -> None:
    base = net()
    theirs = peft.get_peft_model(copy.deepcopy(base), lora())
    prepare_model_for_compiled_hotswap(theirs, target_rank=4)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(pl.FileError, match=r"has 'r' as 2 for .*q, and the tensors there have 4"):
        pl.load(base, tmp_path)


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("bfloat16", "float32"),
                                    ("float16", "bfloat16")])  # fmt: skip
@torch.no_grad()
def test_factors_of_two_dtypes(dtypes: tuple[str, str], tmp_path: Path) -> None:
    base = net().float()
    saved(tmp_path, lora(target_modules=["q", "mha", "embed"]), base)
    path = tmp_path / "adapter_model.safetensors"
    a, b = (getattr(torch, dtype) for dtype in dtypes)
    held = safetensors.torch.load_file(path)
    held = {key: tensor.to(a if "_A" in key else b) for key, tensor in held.items()}
    safetensors.torch.save_file(held, path, {"format": "pt"})
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(X)
    delta = pl.load(base, tmp_path)
    assert (base(X) - expected).abs().max() <= 1e-6
    assert {p.dtype for p in delta.parameters()} == {torch.float32}

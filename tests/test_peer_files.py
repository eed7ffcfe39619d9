"""Peers' files of one list of tensors: the same function here as there, both ways, and strictly.

LyCORIS and loralib write and read their files themselves. Those of diffusers, torchtune, litgpt and
minLoRA are made here, of the names and shapes that their code gives.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loralib
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from torch import Tensor, nn
from torch.nn.utils import parametrize

import peftlite as pl
from peftlite.io.convert import convert
from tests.digest import assert_same, digest
from tests.test_against_lycoris import KIND as LAYERS
from tests.test_against_lycoris import PADDED
from tests.zoo import KINDS, Kind, floats, seeded

ZOO = {kind.name: kind for kind in KINDS}
TOLERANCE = 1e-5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "theirs.safetensors"


@torch.no_grad()
def drawn(*tensors: Tensor) -> None:
    with seeded(3):
        for tensor in tensors:
            tensor.add_(0.3 * torch.randn_like(tensor))


def randn(*shape: int) -> Tensor:
    return 0.3 * torch.randn(shape)


def write(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    apart = {key: tensor.clone() for key, tensor in tensors.items()}
    safetensors.torch.save_file(apart, path, metadata or None)


@torch.no_grad()
def assert_equal(kind: Kind, ours: nn.Module, theirs: nn.Module) -> None:
    batch = kind.batch()
    expected = kind.run(theirs, batch)
    assert (kind.run(ours, batch) - expected).abs().max() <= TOLERANCE
    assert (kind.run(kind.model(), batch) - expected).abs().max() > 100 * TOLERANCE


def changed(model: nn.Module, address: str) -> Tensor:
    """How a weight is read, less what it is in the base: to the last bits of the weight."""
    path, _, slot = address.rpartition(".")
    module = model.get_submodule(path)
    return (getattr(module, slot) - module._parameters[slot]).detach()


# -- kohya and LyCORIS

LYCORIS = {
    "lora": dict(algo="lora"),
    "dora": dict(algo="lora", dora_wd=True),
    "loha": dict(algo="loha"),
    "lokr": dict(algo="lokr"),
    "lokr_both": dict(algo="lokr", decompose_both=True),
    "lokr_factor": dict(algo="lokr", factor=2),
    "lokr_whole": dict(algo="lokr", full_matrix=True),
    "loha_dora": dict(algo="loha", dora_wd=True),
    "lokr_dora": dict(algo="lokr", dora_wd=True),
    "lokr_whole_dora": dict(algo="lokr", dora_wd=True, full_matrix=True),
    "lora_tucker": dict(algo="lora", use_tucker=True),
    "dora_tucker": dict(algo="lora", use_tucker=True, dora_wd=True),
    "loha_tucker": dict(algo="loha", use_tucker=True),
    "lokr_tucker": dict(algo="lokr", use_tucker=True, decompose_both=True),
    "lokr_tucker_dora": dict(algo="lokr", use_tucker=True, dora_wd=True),
}


@pytest.mark.parametrize("kind", [k for k in LAYERS.values() if k.name not in PADDED], ids=str)
@pytest.mark.parametrize("how", LYCORIS.values(), ids=LYCORIS)
def test_lycoris_and_back(how: dict[str, Any], kind: Kind, path: Path) -> None:
    theirs, ours, again = kind.model(), kind.model(), kind.model()
    network = create_lycoris(theirs, linear_dim=2, linear_alpha=3, warn_on_unmatched=False, **how)
    network.apply_to()
    drawn(*network.eval().parameters())
    network.save_weights(path, None, {})
    delta = pl.load(ours, path)
    assert_equal(kind, ours, theirs)
    pl.export(delta, path, "kohya")
    network, _ = create_lycoris_from_weights(1.0, str(path), again)
    network.apply_to()
    network.eval()
    assert_equal(kind, again, theirs)


@pytest.mark.parametrize(
    ("o", "i", "how"),
    [
        (48, 16, dict(factor=16)),
        (4, 12, dict(factor=4)),
        (12, 8, dict(unbalanced_factorization=True)),
        (24, 8, dict(unbalanced_factorization=True, linear_dim=1, decompose_both=True)),
    ],
)
def test_lokr_of_any_sizes(o: int, i: int, how: dict[str, Any], path: Path) -> None:
    """w1 may have the larger part of a dimension; the factors' shapes tell."""
    kind = Kind("one", lambda: nn.Sequential(nn.Linear(i, o)), floats(input=(i,)))
    theirs, ours = kind.model(), kind.model()
    network = create_lycoris(theirs, **dict(linear_dim=99, linear_alpha=1, algo="lokr") | how)
    network.apply_to()
    drawn(*network.eval().parameters())
    network.save_weights(path, None, {})
    delta = pl.load(ours, path)
    assert_equal(kind, ours, theirs)
    pl.save(delta, path)
    again = kind.model()
    pl.load(again, path)
    assert_equal(kind, again, theirs)


TURNS = {
    "diag-oft": dict(algo="diag-oft"),
    "diag-oft, scaled": dict(algo="diag-oft", rescaled=True),
    "diag-oft, bounded": dict(algo="diag-oft", constraint=0.05),
    "boft": dict(algo="boft"),
    "boft, scaled": dict(algo="boft", rescaled=True),
    "boft, bounded": dict(algo="boft", constraint=0.05, rescaled=True),
    "ia3": dict(algo="ia3"),
    "ia3, of inputs": dict(algo="ia3", train_on_input=True),
}


class Turned(nn.Module):
    """Linear maps and a convolution, of whose outputs some can't be turned in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 24, (2, 3), padding=1), nn.Linear(24, 16)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(F.gelu(self.conv(x)).mean((2, 3)))))


@pytest.mark.parametrize("how", TURNS.values(), ids=TURNS)
def test_lycoris_rotations_and_scales(how: dict[str, Any], path: Path) -> None:
    """What isn't a product of factors, running and merged, and back."""
    kind = Kind("turned", Turned, floats(x=(3, 4, 4)))
    theirs, ours = kind.model(), kind.model()
    network = create_lycoris(theirs, linear_dim=6, linear_alpha=1, warn_on_unmatched=False, **how)
    network.apply_to()
    drawn(*network.eval().parameters())
    network.save_weights(path, None, {})
    delta = pl.load(ours, path)
    assert_equal(kind, ours, theirs)
    for n, layer in enumerate(network.loras):
        merged, _ = layer.get_merged_weight()
        own = ours.get_submodule(("conv", "up", "down")[n]).weight
        assert (own - merged.view(own.shape)).abs().max() <= TOLERANCE
    written = path.with_name("ours.safetensors")
    pl.export(delta, written, "kohya")
    again, back = kind.model(), kind.model()
    network = create_lycoris(again, linear_dim=6, linear_alpha=1, warn_on_unmatched=False, **how)
    network.apply_to()
    assert not network.load_weights(written)
    if "bounded" not in how:
        assert_equal(kind, again, theirs)
    pl.load(back, written)
    assert_equal(kind, back, theirs)


@pytest.mark.parametrize("rescaled", [True, False])
def test_lycoris_blocks_of_one(rescaled: bool, path: Path) -> None:
    """5 outputs are 5 blocks, which can't be turned, but scaled."""
    kind = Kind("five", lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5)), floats(input=(4,)))
    theirs, ours = kind.model(), kind.model()
    network = create_lycoris(theirs, linear_dim=4, algo="diag-oft", rescaled=rescaled)
    network.apply_to()
    drawn(*network.eval().parameters())
    network.save_weights(path, None, {})
    delta = pl.load(ours, path)
    assert_equal(kind, ours, theirs)
    assert ("1.weight" in delta.placed) is rescaled


class Normed(nn.Module):
    """A norm between two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm, self.out = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.q(x)))


@pytest.mark.parametrize("one_full", [True, False])
@pytest.mark.parametrize("algo", ["lora", "loha", "full"])
def test_lycoris_differences_of_whole_tensors(algo: str, one_full: bool, path: Path) -> None:
    """`train_norm=True`, and `full` for every layer or for one."""
    kind = Kind("normed", Normed, floats(x=(4,)))
    theirs, ours = kind.model(), kind.model()
    LycorisNetwork.apply_preset({"name_algo_map": {"q": {"algo": "full"}} if one_full else {}})
    network = create_lycoris(theirs, linear_dim=2, linear_alpha=1, algo=algo, train_norm=True)
    LycorisNetwork.apply_preset({"name_algo_map": {}})
    network.apply_to()
    drawn(*network.eval().parameters())
    network.save_weights(path, None, {})
    delta = pl.load(ours, path)
    assert_equal(kind, ours, theirs)
    assert ("q.bias" in delta.placed) is (one_full or algo == "full")
    assert {"norm.weight", "norm.bias"} < {*delta.placed}
    assert pl.NormTuning() in dict(pl.inspect(path).methods)


def test_lora_with_the_difference_of_a_bias(path: Path) -> None:
    """As ComfyUI reads and writes it."""
    model = Pipeline().unet
    start, d = "lora_unet_to_q", randn(4)
    write(
        path, {f"{start}.lora_down.weight": A, f"{start}.lora_up.weight": B, f"{start}.diff_b": d}
    )
    pl.load(model, path)
    assert torch.allclose(changed(model, "to_q.weight"), B @ A, atol=1e-6)
    assert torch.allclose(changed(model, "to_q.bias"), d, atol=1e-6)


class Pipeline(nn.Module):
    """Models in one, as for making images from text."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.ModuleDict({"to_q": nn.Linear(4, 4), "conv_in": nn.Conv2d(4, 6, 3)})
        self.text_encoder = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
        self.text_encoder_2 = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("lora_unet_to_q", "unet.to_q.weight"),
        ("lora_te_self_attn_q_proj", "text_encoder.self_attn.q_proj.weight"),
        ("lora_te1_self_attn_q_proj", "text_encoder.self_attn.q_proj.weight"),
        ("lora_te_text_model_self_attn_q_proj", "text_encoder.self_attn.q_proj.weight"),
        ("lora_te2_q_proj", "text_encoder_2.q_proj.weight"),
        ("lycoris_unet_to_q", "unet.to_q.weight"),
    ],
)
def test_kohya_says_which_part_of_a_pipeline(name: str, address: str, path: Path) -> None:
    """Names as kohya's scripts give them, of a pipeline and of each model in it."""
    model, a, b = Pipeline(), randn(2, 4), randn(4, 2)
    tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    write(path, {**tensors, f"{name}.alpha": torch.tensor(3.0)})
    delta = pl.load(model, path)
    assert [*delta.placed] == [address]
    assert torch.allclose(changed(model, address), 1.5 * b @ a, atol=1e-6)
    pl.export(delta, path, "kohya")
    pl.detach(model, "default")
    assert [*pl.load(model, path).placed] == [address]
    pl.detach(model, "default")
    write(path, tensors)  # without α, it is the rank
    pl.load(model, path)
    assert torch.allclose(changed(model, address), b @ a, atol=1e-6)
    bare = model.get_submodule(address.partition(".")[0])
    if not name.startswith("lycoris"):
        pl.detach(model, "default")
        assert address.endswith(*pl.load(bare, path).placed)


# -- diffusers

with seeded():  # whichever files were imported before
    A, B = randn(2, 4), randn(4, 2)
DIFFUSERS = {
    "now": ("lora_A.weight", "lora_B.weight"),
    "before": ("lora.down.weight", "lora.up.weight"),
    "text encoder, before": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("names", DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers(names: tuple[str, str], path: Path) -> None:
    """Keys as `save_lora_weights` has them, and α as it is in metadata since diffusers 0.34."""
    start = "unet.to_q"
    tensors = {f"{start}.{name}": tensor for name, tensor in zip(names, (A, B), strict=True)}
    config = {"r": 2, "lora_alpha": 8, "bias": "none", "init_lora_weights": True}
    for alpha, metadata, more in (
        (2, {}, {}),
        (3, {}, {f"{start}.alpha": torch.tensor(3.0)}),
        (8, config, {}),
        (8 * 2**0.5, {**config, "use_rslora": True}, {}),
        (6, {**config, "alpha_pattern": {"to_q": 6}}, {}),
        (8, {**config, "alpha_pattern": {"q": 6}}, {}),
    ):
        its = json.dumps({f"unet.{key}": value for key, value in metadata.items()})
        write(path, {**tensors, **more}, **({"lora_adapter_metadata": its} if metadata else {}))
        for model in (Pipeline(), Pipeline().unet):
            (address,) = pl.load(model, path).placed
            assert torch.allclose(changed(model, address), alpha / 2 * B @ A, atol=1e-6)


def test_diffusers_of_another_transformers(path: Path) -> None:
    """Which had a `text_model` in its encoders of text."""
    model, start = Pipeline(), "text_encoder.text_model.self_attn.q_proj"
    write(path, {f"{start}.lora_A.weight": A, f"{start}.lora_B.weight": B})
    delta = pl.load(model, path)
    assert [*delta.placed] == ["text_encoder.self_attn.q_proj.weight"]
    pl.export(delta, path, "diffusers")
    assert {*safetensors.torch.load_file(path)} == {
        f"text_encoder.self_attn.q_proj.lora_{factor}.weight" for factor in "AB"
    }


def test_diffusers_norms_of_a_convolution(path: Path) -> None:
    model = Pipeline()
    a, b, m = randn(2, 4, 3, 3), randn(6, 2, 1, 1), torch.rand(1, 6, 1, 1)
    named = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": m}
    write(path, {f"unet.conv_in.{name}": tensor for name, tensor in named.items()})
    delta = pl.load(model, path)
    v = model.unet["conv_in"]._parameters["weight"] + (b.flatten(1) @ a.flatten(1)).view(6, 4, 3, 3)
    expected = v * m.view(6, 1, 1, 1) / v.flatten(1).norm(dim=1).view(6, 1, 1, 1)
    assert torch.allclose(model.unet["conv_in"].weight, expected, atol=1e-6)
    pl.export(delta, path, "diffusers")
    written = safetensors.torch.load_file(path)
    assert all(torch.equal(written[f"unet.conv_in.{name}"], x) for name, x in named.items())


# -- both ways here

PRODUCTS = {
    "lora": pl.LoRA(rank=3, alpha=4),
    "rslora": pl.LoRA(rank=3, alpha=4, scaling="rslora"),
    "pissa": pl.LoRA(rank=2, init="pissa"),
    "dora": pl.DoRA(rank=2, alpha=3),
    "dora, olora": pl.DoRA(rank=2, init="olora"),
    "adalora": pl.AdaLoRA(init_rank=3, target_rank=2, total_steps=10),
    "vera": pl.VeRA(rank=5),
    "ranks": [pl.LoRA(rank=2, alpha=5, targets="0"), pl.LoRA(rank=4, alpha=3, targets="2")],
}


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", [LAYERS["mlp"], LAYERS["conv3d"]], ids=str)
@pytest.mark.parametrize("method", PRODUCTS.values(), ids=PRODUCTS)
def test_every_product_of_low_rank(method: Any, kind: Kind, format: Any, path: Path) -> None:
    model, other = kind.model(), kind.model()
    delta = pl.attach(model, method)
    drawn(*delta.parameters())
    pl.export(delta, path, format)
    back = pl.load(other, path)
    assert_equal(kind, other, model)
    first = path.read_bytes()
    pl.export(back, path, format)
    assert path.read_bytes() == first
    assert pl.inspect(path).format == format


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_half_precision_stays_as_exact(format: Any, path: Path) -> None:
    kind = LAYERS["mlp"]
    model, other = kind.model(), kind.model()
    delta = pl.attach(model, pl.LoRA(rank=3, alpha=5, dtype=torch.bfloat16))
    drawn(*delta.parameters())
    pl.export(delta, path, format)
    pl.load(other, path)
    for address in delta.placed:
        assert torch.allclose(changed(other, address), changed(model, address), atol=1e-6)


# -- loralib


class Their(nn.Module):
    """A model of loralib's layers: each kind, and a weight of three parts, lying either way."""

    def __init__(self, **how: Any):
        super().__init__()
        fused = how and dict(enable_lora=[True, False, True])
        self.embed = layer(nn.Embedding, loralib.Embedding, how)(7, 6)
        self.up = layer(nn.Linear, loralib.Linear, how)(6, 8)
        self.qkv = layer(nn.Linear, loralib.MergedLinear, how | fused if how else {})(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.qkv(F.gelu(self.up(self.embed(ids))))))


def layer(plain: Any, theirs: Any, how: dict[str, Any]) -> Callable[..., nn.Module]:
    return lambda *sizes: theirs(*sizes, **how) if how else plain(*sizes)


def test_loralib(path: Path) -> None:
    """What loralib itself writes: a pickle, which says neither α nor the parts."""
    kind = Kind("loralib", Their, lambda b: {"ids": torch.randint(7, (b, 5))})
    ours, theirs = kind.model(), Their(r=2, lora_alpha=3, merge_weights=False).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    drawn(*(p for name, p in theirs.named_parameters() if "lora_" in name))
    torch.save(loralib.lora_state_dict(theirs), path.with_suffix(".pt"))
    convert(path.with_suffix(".pt"), path, alpha=3, parts=["q", "v"])
    delta = pl.load(ours, path)
    assert_equal(kind, ours, theirs)
    assert [*delta.placed][1:3] == ["qkv.weight[q]", "qkv.weight[v]"]
    ((method, names),) = pl.inspect(path).methods
    assert method == pl.LoRA(rank=2, alpha=3) and names == ["embed", "qkv", "up"]


@pytest.mark.parametrize("k", [1, 3])
def test_loralib_of_a_kernel(k: int, path: Path) -> None:
    """Whose change is of rank r·k², being BA as it lies in memory."""
    kind = Kind("conv", lambda: nn.Sequential(nn.Conv2d(4, 6, k)), floats(input=(4, 5, 5)))
    ours = kind.model()
    theirs = nn.Sequential(loralib.Conv2d(4, 6, k, r=2, lora_alpha=3, merge_weights=False))
    theirs.load_state_dict({f"0.conv.{n}": x for n, x in ours[0].state_dict().items()}, False)
    theirs.eval()
    drawn(*(p for name, p in theirs.named_parameters() if "lora_" in name))
    torch.save(loralib.lora_state_dict(theirs), path.with_suffix(".pt"))
    convert(path.with_suffix(".pt"), path, alpha=3)
    pl.load(ours, path)
    assert_equal(kind, ours, theirs)


# -- litgpt, torchtune, minLoRA


def test_litgpt(path: Path) -> None:
    """A file as `litgpt finetune_lora` saves it, with two groups of queries: q (8), k, v (4)."""
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, 16)})})
    a, b = randn(4, 8), randn(12, 2)
    torch.save({"model": {"attn.qkv.lora_A": a, "attn.qkv.lora_B": b}}, path)
    convert(path, path, alpha=6, parts=["0:8", "12:16"])
    pl.load(model, path)
    expected = torch.zeros(16, 8)
    expected[:8], expected[12:] = 3 * b[:8] @ a[:2], 3 * b[8:] @ a[2:]
    assert torch.allclose(changed(model, "attn.qkv.weight"), expected, atol=1e-6)


def test_torchtune(path: Path) -> None:
    """`adapter_model.pt` by the names of its LoRALinear and DoRALinear."""
    model, m = nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}), torch.rand(4)
    pairs = {f"{x}.lora_a.weight": A for x in "qv"} | {f"{x}.lora_b.weight": B for x in "qv"}
    torch.save({**pairs, "v.magnitude": m}, path)
    convert(path, path, alpha=4)
    delta = pl.load(model, path)
    assert [type(method) for method in delta.methods] == [pl.LoRA, pl.DoRA]
    v = model["v"]._parameters["weight"] + 2 * B @ A
    assert torch.allclose(model["v"].weight, m[:, None] * v / v.norm(dim=1, keepdim=True))
    assert torch.allclose(changed(model, "q.weight"), 2 * B @ A, atol=1e-6)


class Low(nn.Module):
    """A change of a weight as minLoRA parametrizes it: with its inputs first for an embedding."""

    def __init__(self, w: Tensor, swapped: bool):
        super().__init__()
        self.swapped, (o, i) = swapped, w.flatten(1).shape
        self.lora_A = nn.Parameter(randn(*((o, 2) if swapped else (2, i))))
        self.lora_B = nn.Parameter(randn(*((2, i) if swapped else (o, 2))))

    def forward(self, w: Tensor) -> Tensor:
        change = self.lora_A @ self.lora_B if self.swapped else self.lora_B @ self.lora_A
        return w + 2 * change.view(w.shape)


@pytest.mark.parametrize("kind", [ZOO["embedding"], LAYERS["conv2d"]], ids=str)
def test_minlora(kind: Kind, path: Path) -> None:
    """The names are torch.nn.utils.parametrize's, which minLoRA goes by."""
    theirs, ours = kind.model(), kind.model()
    for module in [*theirs.modules()]:
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            low = Low(module.weight, isinstance(module, nn.Embedding))
            parametrize.register_parametrization(module, "weight", low)
    torch.save({k: v for k, v in theirs.state_dict().items() if "lora_" in k}, path)
    convert(path, path, alpha=4)
    pl.load(ours, path)
    assert_equal(kind, ours, theirs)
    ((method, _),) = pl.inspect(path).methods
    assert method == pl.LoRA(rank=2, alpha=4)


# -- mlx-lm


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx(kind: str, tmp_path: Path) -> None:
    """A folder as `mlx_lm.lora` leaves it: y = Wx + scale·(x a) b."""
    layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 6)}) for _ in range(2))
    model = nn.ModuleDict({"layers": layers, "embed": nn.Embedding(7, 4)})
    q, e = [(randn(n, 2), randn(2, o)) for n, o in ((4, 6), (7, 4))]
    names = {f"layers.1.q.lora_{x}": t for x, t in zip("ab", q, strict=True)}
    names |= {f"embed.lora_{x}": t for x, t in zip("ab", e, strict=True)}
    if kind == "dora":
        names |= {"layers.1.q.m": torch.rand(6), "embed.m": torch.rand(7)}
    write(tmp_path / "adapters.safetensors", names)
    settings = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["q"]}
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert pl.inspect(tmp_path).format == "mlx-lm"
    if kind == "dora":
        del names["embed.lora_a"], names["embed.lora_b"], names["embed.m"]
        write(tmp_path / "adapters.safetensors", names)
    pl.load(model, tmp_path)
    v = model.layers[1]["q"]._parameters["weight"] + 20 * (q[0] @ q[1]).T
    if kind == "dora":
        expected = names["layers.1.q.m"][:, None] * v / v.norm(dim=1, keepdim=True)
        assert torch.allclose(model.layers[1]["q"].weight, expected, atol=1e-6)
    else:
        assert torch.allclose(model.layers[1]["q"].weight, v, atol=1e-6)
        assert torch.allclose(changed(model, "embed.weight"), 20 * e[0] @ e[1], atol=1e-5)
    pl.detach(model, "default")
    assert [*pl.load(model, tmp_path / "adapters.safetensors").placed]


# -- convert


@pytest.mark.parametrize("to", ["peftlite", "peft", "kohya", "diffusers"])
def test_from_any_format_to_any(to: Any, path: Path, tmp_path: Path) -> None:
    kind = LAYERS["mlp"]
    model = kind.model()
    delta = pl.attach(model, pl.DoRA(rank=2, alpha=3))
    drawn(*delta.parameters())
    for number, start in enumerate(("peftlite", "peft", "kohya", "diffusers")):
        given, out = tmp_path / f"{number}.in", tmp_path / f"{number}.out"
        pl.save(delta, given) if start == "peftlite" else pl.export(delta, given, start)
        base = kind.model()
        before = digest(base)
        convert(given, out, to, model=base)
        assert_same(before, digest(base))
        pl.load(base, out)
        assert_equal(kind, base, model)


def test_a_pickle_of_kohya_becomes_a_delta(path: Path) -> None:
    model = Pipeline().unet
    torch.save({"lora_unet_to_q.lora_down.weight": A, "lora_unet_to_q.lora_up.weight": B}, path)
    convert(path, path.with_name("ours"), "peftlite", model=model)
    pl.load(model, path.with_name("ours"))
    assert torch.allclose(changed(model, "to_q.weight"), B @ A, atol=1e-6)


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("evil"),)


@pytest.mark.parametrize("legacy", [True, False])
def test_no_pickle_runs_code(legacy: bool, path: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"q.lora_A": A, "q": Evil()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pl.FileError, match="it may run code"):
        convert(path, path.with_name("out"), alpha=1)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# -- linear in the file


@pytest.mark.parametrize("config", [{"peft_type": "LN_TUNING"}, None], ids=["peft", "tensors"])
def test_a_name_of_many_steps_takes_no_time(config: Any, path: Path, tmp_path: Path) -> None:
    start = time.process_time()
    for stem in (".", "a.", "base_layer."):
        for end in ("q.lora_A.weight", "bias", "ln_tuning_layers.weight"):
            key = "base_model.model." + 50_000 // len(stem) * stem + end
            if config is not None:
                (tmp_path / "adapter_config.json").write_text(json.dumps(config))
                path = tmp_path / "adapter_model.safetensors"
            write(path, {key: torch.ones(4)})
            with pytest.raises(pl.FileError):
                pl.load(Pipeline(), path)
    assert time.process_time() - start < 10


# -- strict, in both directions

GOOD = {
    "lycoris_to_q.lora_down.weight": A,
    "lycoris_to_q.lora_up.weight": B,
    "lycoris_to_q.alpha": torch.tensor(2.0),
    "lycoris_conv_in.lora_down.weight": randn(2, 4, 3, 3),
    "lycoris_conv_in.lora_up.weight": randn(6, 2, 1, 1),
    "lycoris_conv_in.dora_scale": torch.rand(6, 1, 1, 1),
}


def without(key: str) -> dict[str, Tensor]:
    return {k: v for k, v in GOOD.items() if k != key}


BAD = {
    **{f"no {k}": without(k) for k in GOOD if not k.endswith(("alpha", "dora_scale"))},
    **{f"{k} renamed": {**without(k), f"{k}_": GOOD[k]} for k in GOOD},
    **{f"{k} elsewhere": {**without(k), k.replace("_", "_x", 1): GOOD[k]} for k in GOOD},
    **{f"{k} larger": {**GOOD, k: torch.stack([GOOD[k]] * 2)} for k in GOOD},
    **{f"{k} not finite": {**GOOD, k: GOOD[k] / 0} for k in GOOD},
    **{f"{k} of integers": {**GOOD, k: GOOD[k].long()} for k in GOOD if not k.endswith("alpha")},
    "alpha negative": {**GOOD, "lycoris_to_q.alpha": torch.tensor(-1.0)},
    "norms of inputs": {**GOOD, "lycoris_conv_in.dora_scale": torch.rand(1, 6, 1, 1)},
    "transposed": {**GOOD, "lycoris_to_q.lora_down.weight": B, "lycoris_to_q.lora_up.weight": A},
    "tucker": {**GOOD, "lycoris_conv_in.lora_mid.weight": randn(2, 2, 3, 3)},
    "lokr, half of it": {"lycoris_to_q.lokr_w1_a": torch.rand(2, 1)},
}


@pytest.mark.parametrize("tensors", BAD.values(), ids=BAD)
def test_is_refused_whole(tensors: dict[str, Tensor], path: Path) -> None:
    model = Pipeline().unet
    write(path, GOOD)
    pl.load(model, path)
    pl.detach(model, "default")
    before = digest(model)
    write(path, tensors)
    with pytest.raises(pl.FileError, match="theirs"):
        pl.load(model, path)
    assert_same(before, digest(model))


def test_names_that_may_be_two_modules(path: Path) -> None:
    inner = nn.ModuleDict({"b": nn.Linear(4, 4)})
    write(path, {"lycoris_a_b.lora_down.weight": A, "lycoris_a_b.lora_up.weight": B})
    one = nn.ModuleDict({"a": inner})
    assert [*pl.load(one, path).placed] == ["a.b.weight"]
    pl.detach(one, "default")
    both = nn.ModuleDict({"a": inner, "a_b": nn.Linear(4, 4)})
    with pytest.raises(pl.FileError, match=r"lycoris_a_b may be a\.b or a_b in this model"):
        pl.load(both, path)
    both["a_b"] = inner["b"]  # one module by two names is one
    assert [*pl.load(both, path).placed] == ["a.b.weight"]

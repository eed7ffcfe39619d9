"""Names in files: torch's wrappers, modules that were renamed, experts that became a parameter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import peftlite as pl
from tests.test_peft_files import disturb, rewritten
from tests.zoo import seeded

E, H, W = 3, 6, 4  # experts, and their widths


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(H, W), nn.Linear(W, H))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).tanh()


class Averaged(AveragedModel):
    """A wrapper that peftlite doesn't know: what it's around is `module`."""


def inner_compiled(net: Net) -> nn.Module:
    net.layers[1] = torch.compile(net.layers[1])
    return net


WRAPPED: dict[str, Callable[[Net], nn.Module]] = {
    "plain": lambda net: net,
    "compiled": torch.compile,
    "data_parallel": nn.DataParallel,
    "checkpointed": lambda net: checkpoint_wrapper(net),
    "averaged": Averaged,
    "a layer compiled": inner_compiled,
}


def made(cls: type, seed: int = 0) -> Any:
    with seeded(seed):
        return cls().double()


def moved(delta: pl.Delta) -> pl.Delta:
    with seeded(3), torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_()
    return delta


def x() -> Tensor:
    with seeded(1):
        return torch.randn(5, H, dtype=torch.float64)


@pytest.mark.parametrize(
    "of, into",
    [*((name, "plain") for name in WRAPPED), *(("plain", name) for name in WRAPPED),
     ("compiled", "averaged")],
)  # fmt: skip
@torch.no_grad()
def test_a_wrapper_is_no_part_of_a_path(of: str, into: str, tmp_path: Path) -> None:
    """Without a call of a wrapper, which would compile."""
    net, other = made(Net), made(Net)
    delta = moved(pl.attach(WRAPPED[of](net), [pl.LoRA(rank=2, targets="weight"), pl.BitFit()]))
    pl.save(delta, tmp_path / "delta.safetensors")
    again = pl.load(WRAPPED[into](other), tmp_path / "delta.safetensors")
    for (name, mine), (_, theirs) in zip(
        delta.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    if of != "averaged":
        assert set(delta.placed) == {f"layers.{n}.{s}" for n in "01" for s in ("weight", "bias")}
        pl.export(delta, tmp_path / "out")
        back = peft.PeftModel.from_pretrained(made(Net), tmp_path / "out")
        plain = made(Net)
        pl.load(plain, tmp_path / "out")
        torch.testing.assert_close(back(x()), plain(x()))


@pytest.mark.parametrize("word", ["_orig_mod", "module", "_fsdp_wrapped_module"])
@torch.no_grad()
def test_a_wrappers_word_in_a_peers_keys(word: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(made(Net), peft.LoraConfig(r=2, target_modules=["0", "1"]))
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "sql")

    def wrap(held: dict[str, Tensor]) -> None:
        for key in list(held):
            held[key.replace("model.layers", f"model.{word}.layers")] = held.pop(key)

    ours = made(Net)
    pl.load(ours, rewritten(tmp_path / "sql", tmp_path / "wrapped", wrap))
    torch.testing.assert_close(ours(x()), theirs(x()))


class Old(nn.Module):
    """As an older release has it: a Linear for each expert, and the head inside."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.text.moe = nn.Module(), nn.Module()
        self.text.q, self.text.head = nn.Linear(H, H), nn.Linear(H, 2)
        self.text.moe.gate = nn.Linear(H, E, bias=False)
        wide, narrow = (W, H), (H, W)
        self.text.moe.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: nn.Linear(i, o, bias=False)
                    for name, (o, i) in (("w1", wide), ("w3", wide), ("w2", narrow))
                }
            )
            for _ in range(E)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, moe = self.text.q(x), self.text.moe
        y = sum(
            g[:, None] * its["w2"](its["w1"](x).sigmoid() * its["w3"](x))
            for g, its in zip(moe.gate(x).T, moe.experts, strict=True)
        )
        return self.text.head(y)


class New(nn.Module):
    """The same in a newer one, whose class knows what has become of the names."""

    _checkpoint_conversion_mapping = {r"^text\.head": "head", r"^text(\.moe)?\.": r"model.text."}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        old = Old()
        self.model, self.head = nn.Module(), old.text.head
        self.model.text = text = nn.Module()
        text.q, text.gate, text.experts = old.text.q, old.text.moe.gate, nn.Module()
        its = old.text.moe.experts
        fused = [torch.cat([e["w1"].weight, e["w3"].weight]) for e in its]
        text.experts.gate_up_proj = nn.Parameter(torch.stack(fused))
        text.experts.down_proj = nn.Parameter(torch.stack([e["w2"].weight for e in its]))

    def forward(self, x: Tensor) -> Tensor:
        text = self.model.text
        x = text.q(x)
        up = torch.einsum("eoi,bi->ebo", text.experts.gate_up_proj, x)
        y = up[..., :W].sigmoid() * up[..., W:]
        y = torch.einsum("eoi,ebi->ebo", text.experts.down_proj, y)
        return self.head(torch.einsum("be,ebo->bo", text.gate(x), y))


MANY = ["w1", "w2", "w3"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": dict(target_modules=["q", "head"]),
    "regex": dict(target_modules=r"text\.(q|head)", rank_pattern={r"text\.q": 3}),
    "excluded": dict(target_modules=["q", "gate"], exclude_modules=["text.moe.gate"]),
    "whole": dict(target_modules=["q"], modules_to_save=["head"]),
    "experts": dict(target_modules=["q", "gate", *MANY]),
    "rslora": dict(target_modules=MANY, use_rslora=True),
    "one of two": dict(target_modules=["w3"]),
    "ranks": dict(
        target_modules=MANY,
        rank_pattern={"1.w1": 3, "w2": 1},
        alpha_pattern={"0.w3": 7, "2.w2": 1},
    ),
}


def saved(settings: dict[str, Any], folder: Path) -> Tensor:
    """What peft's adapter of the older model gives."""
    theirs = peft.get_peft_model(made(Old), peft.LoraConfig(r=2, lora_alpha=5, **settings))
    disturb(theirs)
    theirs.save_pretrained(folder)
    return theirs(x())


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_an_older_models_adapter_gives_what_it_gave(name: str, tmp_path: Path) -> None:
    expected, ours = saved(SETTINGS[name], tmp_path / "sql"), made(New)
    torch.testing.assert_close(ours(x()), made(Old)(x()))
    pl.load(ours, tmp_path / "sql")
    torch.testing.assert_close(ours(x()), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_an_older_models_delta_of_our_own(tmp_path: Path) -> None:
    old, new = made(Old), made(New)
    methods = [pl.LoRA(rank=2, targets=["q", "head"]), pl.FullTuning(targets="q.bias")]
    pl.save(moved(pl.attach(old, methods)), tmp_path / "delta.safetensors")
    delta = pl.load(new, tmp_path / "delta.safetensors")
    assert set(delta.placed) == {"model.text.q.weight", "head.weight", "model.text.q.bias"}
    torch.testing.assert_close(new(x()), old(x()))


@torch.no_grad()
def test_what_this_model_lacks_is_named_first(tmp_path: Path) -> None:
    saved(SETTINGS["plain"], tmp_path / "sql")

    def rename(held: dict[str, Tensor]) -> None:
        for key in list(held):
            held[key.replace("text.q", "speech.q")] = held.pop(key)

    at = rewritten(tmp_path / "sql", tmp_path / "renamed", rename)
    with pytest.raises(pl.FileError, match=r"this one lacks 1: speech\.q\.weight"):
        pl.load(made(Old), at)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    saved(SETTINGS["experts"], tmp_path / "sql")
    lost = "base_model.model.text.moe.experts.1.w1.lora_A.weight"
    at = rewritten(tmp_path / "sql", tmp_path / "less", lambda held: held.pop(lost))
    with pytest.raises(pl.FileError, match=r"lacks text\.moe\.experts\.1\.w1$"):
        pl.load(made(New), at)


def test_an_expert_has_the_rank_of_the_settings(tmp_path: Path) -> None:
    saved(SETTINGS["experts"], tmp_path / "sql")
    config = tmp_path / "sql/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rank_pattern": {"w2": 7}}))
    with pytest.raises(pl.FileError, match=r"'r' as 7 for text\.moe\.experts\.0\.w2, .* have \d:"):
        pl.load(made(New), tmp_path / "sql")


STARTS = {
    "kohya": ("lora_unet__orig_mod_", "lora_transformer_", "diffusion_model.", "transformer.", ""),
    "diffusers": ("diffusion_model.", "transformer._orig_mod.", "base_model.model.", "module."),
}


@pytest.mark.parametrize(
    "form, start", [(form, start) for form in STARTS for start in STARTS[form]]
)
@torch.no_grad()
def test_other_starts_of_a_pipelines_keys(form: Any, start: str, tmp_path: Path) -> None:
    net, file = made(Net), tmp_path / "delta.safetensors"
    pl.export(moved(pl.attach(net, pl.LoRA(rank=2, targets="layers"))), file, form)
    held = safetensors.torch.load_file(file)
    joint = "_" if start.endswith("_") else "."
    for key in list(held):
        path = f"layers{joint}{key.split('layers')[1][1:]}"
        held[start + path] = held.pop(key)
    safetensors.torch.save_file(held, file)
    ours = made(Net)
    pl.load(ours, file)
    torch.testing.assert_close(ours(x()), net(x()))

"""Modules that other libraries packed, as they are: methods attach, and no byte of them moves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.core.tensors import raw
from tests.cells import disturb
from tests.packed.doubles import Compressed, Linear4bit, Linear8bitLt, QuantLinear
from tests.test_layouts import MADE
from tests.zoo import seeded


def drawn() -> Tensor:
    with seeded():
        return torch.randn(32, 64)


def compressed(name: str) -> nn.Module:
    found, w = MADE[name]()
    return Compressed({k: t for k, t in found.items() if k != "weight_shape"}, w.float())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes4": lambda: Linear4bit(drawn()),
    "bitsandbytes8": lambda: Linear8bitLt(drawn()),
    "gptq": lambda: QuantLinear(*MADE["gptq_order"]()),
    "awq": lambda: QuantLinear(*MADE["awq"]()),
    **{name: lambda name=name: compressed(name) for name in ("packed4", "fp8", "nvfp4", "mxfp4")},
}
METHODS = {
    "LoRA": pl.LoRA(rank=2, targets="0.weight"),
    "DoRA": pl.DoRA(rank=2, targets="0.weight"),
    "PiSSA": pl.LoRA(rank=2, init="pissa", targets="0.weight"),
    "IA3": pl.IA3(targets="0"),
    "OFT": pl.OFT(block_size=4, targets="0.weight"),
    "VeRA": pl.VeRA(rank=2, targets="0.weight"),
    "adapter": pl.BottleneckAdapter(targets="0"),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str) -> nn.Module:
    with seeded():
        layer = LAYERS[name]()
        out = raw(layer, "weight").shape[0]
        return nn.Sequential(layer, nn.GELU(), nn.Linear(out, 4))


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in model.state_dict().items() if "peftlite" not in k}


@each_layer
@pytest.mark.parametrize("method", METHODS)
def test_methods_attach(name: str, method: str) -> None:
    """Outputs are those of the weight as read, in train and eval, and so are gradients."""
    model, x = build(name), torch.randn(3, 64)
    if method == "adapter" and not isinstance(model[0], nn.Linear):
        return  # one goes around a block of these
    before, kind = bytes_of(model), type(model[0])
    w = raw(model[0], "weight").form()
    delta = pl.attach(model, METHODS[method], "a")
    expected = nn.functional.linear(x, w, model[0].bias)
    torch.testing.assert_close(model(x), model[2](model[1](expected)))
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in delta.parameters())
    now = bytes_of(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(before[k], now[k]) for k in now)
    pl.detach(model, "a")
    assert type(model[0]) is kind and isinstance(model[0], kind)


@each_layer
@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_of_any_dtype(name: str, method: str) -> None:
    """Codes without a bias don't tell the model's dtype, so W is in the inputs'."""
    model, x = build(name)[:1], torch.randn(3, 64).bfloat16()
    if method == "adapter" and not isinstance(model[0], nn.Linear):
        return
    for kept in (model[0]._parameters, model[0]._buffers):
        if "bias" in kept:
            kept["bias"] = None
    w = raw(model[0], "weight").form().bfloat16()
    delta = pl.attach(model, METHODS[method], "a")
    y = model(x)
    y.sum().backward()
    true = nn.functional.linear(x.double(), w.double())
    assert (y - true).norm() < 4e-3 * true.norm()
    assert all(p.grad is not None for p in delta.parameters())


@each_layer
def test_files_know_its_bytes(name: str, tmp_path: Path) -> None:
    model, x = build(name), torch.randn(3, 64)
    disturb(pl.attach(model, METHODS["LoRA"], "a"))
    pl.save(pl.deltas(model)["a"], tmp_path / "a")
    other = build(name)
    pl.load(other, tmp_path / "a")
    assert torch.equal(other(x), model(x))
    plain = nn.Sequential(nn.Linear(64, len(model[0].bias)), nn.GELU(), nn.Linear(4, 4))
    with pytest.raises(pl.BaseMismatchError):
        pl.load(plain, tmp_path / "a")


@each_layer
def test_a_merge_packs_again_or_says_why_not(name: str) -> None:
    model, x = build(name), torch.randn(3, 64)
    disturb(pl.attach(model, METHODS["LoRA"], "a"))
    before, output = bytes_of(model), model(x)
    if name == "bitsandbytes4":
        assert pl.merge(model, "a").rounding["0.weight"] > 0
        assert any(not torch.equal(before[k], t) for k, t in bytes_of(model).items())
        pl.unmerge(model, "a")
    else:
        with pytest.raises(pl.PeftliteError, match="is read here, and not written"):
            pl.merge(model, "a")
    now = bytes_of(model)
    assert all(torch.equal(before[k], now[k]) for k in now)
    assert torch.equal(model(x), output)


def test_layers_beside_the_patched_ones_rewrite_nothing() -> None:
    """As they would in eval mode on a CPU, and then give no gradient to what is before them."""
    with seeded():
        model = nn.Sequential(nn.Linear(64, 64), Linear4bit(torch.randn(32, 64)), nn.Linear(32, 4))
    delta = pl.attach(model, pl.LoRA(rank=2, targets="0"), "a")
    before, x = bytes_of(model), torch.randn(3, 64)
    with torch.no_grad():
        model.eval()(x)
        with pl.using(model, None):
            model(x)
    model.train()(x).sum().backward()
    assert next(iter(delta.parameters())).grad is not None
    assert all(torch.equal(before[k], t) for k, t in bytes_of(model).items())
    pl.detach(model, "a")
    assert type(model[1]) is Linear4bit

"""Gated: its equations at calls and at tensors, what it hands on to the method inside, files."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.methods.gated import Gated
from tests.digest import assert_same, digest
from tests.zoo import KINDS, autocast_error, seeded

ZOO = {kind.name: kind for kind in KINDS}


def attached(model: nn.Module, method: pl.Method, name: str = "a") -> pl.Delta:
    """A delta that makes a difference."""
    with seeded(1), torch.no_grad():
        delta = pl.attach(model, method, name)
        for parameter in delta.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return delta


def ungated(layer: nn.Module, method: pl.Method, gated: pl.Delta, x: Tensor) -> Tensor:
    """What the method inside gives on its own, with the same factors."""
    alone = pl.attach(layer, method, "alone")
    state = gated.state_dict()
    alone.load_state_dict({k: state[k.replace(":", ":patch.")] for k in alone.state_dict()})
    y = layer(x)
    pl.detach(layer, "alone")
    pl.use(layer, gated.name)
    return y


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


ADAPTER = pl.BottleneckAdapter(targets="()", bottleneck_size=3)


@pytest.mark.parametrize("inside", [
    ADAPTER,
    pl.BottleneckAdapter(targets="()", preset="parallel"),
    pl.IA3(targets="weight"),
    pl.LoRA(rank=2, targets="weight"),
], ids=["after", "beside", "ia3", "lora"])  # fmt: skip
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_the_equation(inside: pl.Method, per: Any) -> None:
    layer, x = nn.Linear(10, 8), torch.randn(2, 5, 10)
    y = layer(x)
    delta = attached(layer, Gated(inside, per=per))
    own = {k.rpartition(":")[2]: p for k, p in delta.state_dict().items()}
    g = torch.sigmoid(own["bias"])
    if "weight" in own:
        g = torch.sigmoid(x @ own["weight"].T + own["bias"])
        g = g.mean(1, keepdim=True) if per == "sequence" else g
    close(layer(x), y + g * (ungated(layer, inside, delta, x) - y))


def test_after_a_norm_the_gate_reads_what_the_norm_is_given() -> None:
    norm, x = nn.LayerNorm(8), torch.randn(2, 5, 8)
    y, inside = norm(x), pl.BottleneckAdapter(preset="pfeiffer", targets="()")
    delta = attached(norm, Gated(inside))
    own = delta.state_dict()
    g = torch.sigmoid(x @ own["():weight"].T + own["():bias"]).mean(1, keepdim=True)
    close(norm(x), y + g * (ungated(norm, inside, delta, x) - y))


@pytest.mark.parametrize("shape", [(3, 8), (8,), (2, 3, 4, 8)])
def test_a_batch_is_what_comes_first(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(8, 8), torch.randn(shape)
    attached(layer, Gated(ADAPTER))
    y = layer(x)
    assert y.shape == x.shape
    if len(shape) > 1:
        close(y[:1], layer(x[:1]))


@pytest.mark.parametrize("layer, x", [
    (nn.Embedding(9, 8), torch.tensor([[1, 2, 3]])),
    (nn.Conv2d(4, 6, 3, stride=2), torch.randn(2, 4, 9, 8)),
])  # fmt: skip
def test_where_there_is_no_x_the_gate_is_a_number(layer: nn.Module, x: Tensor) -> None:
    y = layer(x)
    delta = attached(layer, Gated(ADAPTER))
    assert "():weight" not in delta.state_dict()
    g = torch.sigmoid(delta.state_dict()["():bias"])
    close(layer(x), y + g * (ungated(layer, ADAPTER, delta, x) - y))


class Counts(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_a_call_that_is_only_added_to_is_made_once() -> None:
    layer = Counts(8, 8)
    attached(layer, Gated(ADAPTER))
    layer(torch.randn(2, 8))
    assert layer.calls == 1


def test_a_merge_holds_the_gate() -> None:
    model, batch = ZOO["mlp"].model(), ZOO["mlp"].batch()
    attached(model, Gated(pl.LoRA(rank=2)))
    before, output = digest(model), model(**batch)
    pl.merge(model, "a")
    close(model(**batch), output)
    pl.unmerge(model, "a")
    assert_same(before, digest(model))


# -- what is inside


def test_targets_and_dtype_are_those_of_the_method_inside() -> None:
    model = ZOO["gpt"].model()
    inside = pl.LoRA(rank=2, targets=["q_proj", "v_proj"], exclude="blocks.1", dtype=torch.float64)
    delta = pl.attach(model, Gated(inside))
    assert [*delta.placed] == [f"blocks.0.attn.{name}.weight" for name in ("q_proj", "v_proj")]
    assert {p.dtype for p in delta.parameters()} == {torch.float64}
    assert pl.plan(model, Gated(inside, targets="k_proj", exclude="0")).addresses == [
        "blocks.1.attn.k_proj.weight"
    ]


def test_parts_of_a_tensor() -> None:
    model, batch = ZOO["gpt_fused"].model(), ZOO["gpt_fused"].batch()
    base = model(**batch)
    attached(model, Gated(pl.LoRA(rank=2, targets=["qkv.weight[q]", "qkv.weight[v]"])))
    w = model.blocks[0].attn.qkv
    assert torch.equal(w.weight[12:24], w._parameters["weight"][12:24])
    assert not torch.allclose(model(**batch), base)


def test_what_methods_share_and_find_at_the_start_they_share_in_here() -> None:
    model = ZOO["gpt"].model()
    vera = pl.attach(model, Gated(pl.VeRA(rank=3)), "vera")
    patches = [placed.patch.patch for placed in vera.placed.values()]
    assert len({id(patch.projection) for patch in patches}) == 1
    sparse = pl.attach(model, Gated(pl.SparseMask(fraction=0.1)), "sparse")
    chosen = sum(placed.patch.patch.values.numel() for placed in sparse.placed.values())
    assert chosen == round(0.1 * sum(p.site.tensor.numel() for p in sparse.placed.values()))


@pytest.mark.parametrize("inside", [
    pl.LoRA(rank=2, alpha=5, dtype=torch.bfloat16),
    pl.SparseMask(fraction=0.2, select="random"),
    pl.VeRA(rank=4),
    pl.BottleneckAdapter(bottleneck_size=3),
    Gated(pl.LoRA(rank=1)),
], ids=lambda method: type(method).__name__)  # fmt: skip
def test_files_hold_the_method_inside(inside: pl.Method, tmp_path: Any) -> None:
    model, batch, path = ZOO["gpt"].model(), ZOO["gpt"].batch(), tmp_path / "a.safetensors"
    delta = attached(model, Gated(inside, per="token"))
    pl.save(delta, path)
    ((method, _),) = pl.inspect(path).methods
    assert method == Gated(inside, per="token")
    fresh = ZOO["gpt"].model()
    loaded = pl.load(fresh, path)
    close(fresh(**batch), model(**batch))
    twin = copy.deepcopy(fresh)
    assert torch.equal(twin(**batch), fresh(**batch))
    pl.save(loaded, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("given, shown", [("lora", "'lora'"), (pl.LoRA, "LoRA"), (None, "None")])
def test_what_is_no_method_cant_be_gated(given: Any, shown: str) -> None:
    with pytest.raises(pl.PeftliteError, match=f"Gated takes a method such as .*{shown}"):
        Gated(given)


def test_refusals_are_those_of_the_method_inside() -> None:
    with pytest.raises(pl.TargetError, match="takes tensors of 2 or more dimensions"):
        pl.attach(ZOO["gpt"].model(), Gated(pl.LoRA(targets="blocks.0.attn.v_proj.bias")))
    with pytest.raises(pl.PeftliteError, match="per must be one of 'sequence', 'token', not 'row'"):
        Gated(pl.LoRA(), per="row")  # pyright: ignore[reportArgumentType]


def test_half_precision_and_autocast() -> None:
    kind = ZOO["hf_llama"]
    model = kind.model(torch.bfloat16)
    delta = attached(model, Gated(pl.BottleneckAdapter()))
    logits = kind.run(model, kind.batch())
    logits.float().square().mean().backward()
    assert logits.dtype is torch.bfloat16 and all(p.grad.any() for p in delta.parameters())
    model, batch = ZOO["gpt"].model(), ZOO["gpt"].batch()
    of_the_base = autocast_error(model, batch)
    attached(model, Gated(pl.BottleneckAdapter()))
    assert autocast_error(model, batch) < 2 * of_the_base

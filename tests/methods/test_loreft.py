"""LoReFT: its equation, its rotation, which blocks and positions it takes, generation, refusals."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import DynamicCache

import peftlite as pl
from peftlite.core.site import sites
from peftlite.methods.calls import is_block
from peftlite.methods.loreft import LoReFT, LoReFTPatch
from tests.zoo import KINDS, VOCAB, WIDTH, autocast_error, seeded

ZOO = {kind.name: kind for kind in KINDS}


def attached(model: nn.Module, name: str = "a", **config: Any) -> pl.Delta:
    with seeded(1):
        return pl.attach(model, LoReFT(**config), name)


def patch_of(delta: pl.Delta, address: str) -> Any:
    return delta.placed[address].patch


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- the equation and the rotation


def by_hand(patch: LoReFTPatch, h: Tensor) -> Tensor:
    """h + Rᵀ(Wh + b − Rh)."""
    r = patch.rotation()
    return h + (h @ patch.w.T + patch.b - h @ r.T) @ r


def test_the_equation() -> None:
    layer, x = nn.Linear(6, 10), torch.randn(2, 3, 6)
    h = layer(x)
    delta = attached(layer, targets="()", rank=3)
    close(layer(x), by_hand(patch_of(delta, "()"), h))


def test_the_rotation_is_a_product_of_reflections() -> None:
    for rank in (1, 3, 7):
        patch = patch_of(attached(nn.Linear(7, 7), targets="()", rank=rank), "()")
        product = torch.eye(7)
        for v in patch.v:
            product = (torch.eye(7) - 2 * torch.outer(v, v) / v.dot(v)) @ product
        close(patch.rotation(), product[:rank])


class Reference(nn.Module):
    """The intervention as its authors' library computes it."""

    def __init__(self, d: int, r: int):
        super().__init__()
        self.rotate = orthogonal(nn.Linear(d, r, bias=False))
        self.source = nn.Linear(d, r)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.linear(self.source(h) - self.rotate(h), self.rotate.weight.T)


def test_it_agrees_with_the_authors_in_values_and_gradients() -> None:
    d, r, h = 12, 4, torch.randn(2, 5, 12)
    with seeded():
        reference = Reference(d, r)
    layer = nn.Identity()
    patch = patch_of(attached(layer, targets="()", width=d, rank=r), "()")
    with torch.no_grad():
        rotation = reference.rotate.weight
        patch.v.copy_(torch.geqrf(rotation.T)[0].tril(-1).fill_diagonal_(1.0).T)
        # one row's sign may be another: the same intervention with W's and b's turned as well
        signs = (patch.rotation() * rotation).sum(1)
        patch.w.copy_(signs[:, None] * reference.source.weight)
        patch.b.copy_(signs * reference.source.bias)
    close(signs.abs(), torch.ones(r))
    close(patch.rotation(), signs[:, None] * rotation)
    close(layer(h), reference(h))
    for module in (layer, reference):
        module(h).pow(3).sum().backward()
    close(patch.w.grad, signs[:, None] * reference.source.weight.grad, 1e-4)
    close(patch.b.grad, signs * reference.source.bias.grad, 1e-4)


def test_r_is_a_random_subspace_and_stays_orthonormal() -> None:
    layer, x, target = nn.Linear(16, 16), torch.randn(64, 16), torch.randn(64, 16)
    patch = patch_of(delta := attached(layer, targets="()", rank=5), "()")
    first = patch.rotation().detach()
    assert (first.abs() < 0.9).all()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.3, weight_decay=0.1)
    losses = []
    for _ in range(50):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    last = patch.rotation()
    assert (last - first).abs().max() > 0.3
    close(last @ last.T, torch.eye(5), 1e-6)


def test_the_identity_changes_no_bit_and_learns() -> None:
    model, batch = ZOO["gpt"].model(), ZOO["gpt"].batch()
    before = model(**batch)
    delta = attached(model, init="identity", dtype=torch.bfloat16)
    assert torch.equal(model(**batch), before)
    model(**batch).square().mean().backward()
    assert all(p.grad.any() for key, p in delta.named_parameters() if not key.endswith(":v"))


# -- what it takes


BLOCKS = {
    "gpt": ["blocks.0()", "blocks.1()"],
    "gpt_fused": ["blocks.0()", "blocks.1()"],
    "mha_encoder": ["0.layers.0()", "0.layers.1()"],
    "hf_bert": ["bert.encoder.layer.0()", "bert.encoder.layer.1()"],
    "hf_gpt2": ["transformer.h.0()", "transformer.h.1()"],
    "hf_llama": ["model.layers.0()", "model.layers.1()"],
    "hf_t5": ["encoder.block.0()", "encoder.block.1()", "decoder.block.0()", "decoder.block.1()"],
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_by_default_it_takes_blocks(kind: str) -> None:
    assert pl.plan(ZOO[kind].model(), LoReFT()).addresses == BLOCKS[kind]


@pytest.mark.parametrize("path, taken", [
    ("transformer_blocks", True),
    ("decoder_layers", True),
    ("resblocks", True),
    ("experts", False),
    ("norm_layer_names", False),
])  # fmt: skip
def test_blocks_go_by_the_name_of_their_list(path: str, taken: bool) -> None:
    model = nn.ModuleDict({path: nn.ModuleList([nn.Linear(4, 4)])})
    assert any(map(is_block, sites(model))) == taken


def test_a_model_without_blocks_says_so() -> None:
    with pytest.raises(pl.TargetError, match="LoReFT takes none of this model's sites by default"):
        pl.attach(ZOO["mlp"].model(), LoReFT())


# -- positions


def changed(model: nn.Module, batch: dict[str, Tensor]) -> list[list[int]]:
    """For each row, the positions whose output is another with the delta than without."""
    with pl.using(model, None):
        base = model(**batch)
    there = ((model(**batch) - base).abs() > 1e-7).any(-1)
    return [row.nonzero().flatten().tolist() for row in there]


@pytest.mark.parametrize("positions, expected", [
    ("all", [0, 1, 2, 3, 4, 5]),
    ("f2", [0, 1]),
    ("l1", [5]),
    ("f1+l2", [0, 4, 5]),
    ("f4+l4", [0, 1, 2, 3, 4, 5]),
    ("f9", [0, 1, 2, 3, 4, 5]),
])  # fmt: skip
def test_of_positions_only_those_asked_for_change(positions: str, expected: list[int]) -> None:
    model, batch = ZOO["gpt"].model(), ZOO["gpt"].batch()
    delta = attached(model, targets="blocks.1()", positions=positions)
    assert changed(model, batch) == [expected, expected]
    hidden = []
    model.norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model(**batch)
    with pl.using(model, None):
        model(**batch)
    after, before = hidden
    close(after[:, expected], by_hand(patch_of(delta, "blocks.1()"), before)[:, expected])


def llama() -> nn.Module:
    return ZOO["hf_llama"].model()


def padded(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the left."""
    t = max(lengths)
    with seeded():
        ids = torch.randint(1, VOCAB, (len(lengths), t))
    mask = (torch.arange(t) >= t - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


OPTIONS: dict[str, Any] = dict(
    max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None,
    output_logits=True, return_dict_in_generate=True,
)  # fmt: skip


@pytest.mark.parametrize("positions", ["f2+l1", "f1", "l2", "all"])
def test_in_generation_padded_rows_are_as_if_alone(positions: str) -> None:
    model, batch = llama(), padded((5, 3, 2))
    attached(model, positions=positions)
    together = model.generate(**batch, **OPTIONS)
    for i, length in enumerate((5, 3, 2)):
        alone = model.generate(batch["input_ids"][i : i + 1, -length:], **OPTIONS)
        assert torch.equal(alone.sequences[0, length:], together.sequences[i, 5:])
        for a, b in zip(alone.logits, together.logits, strict=True):
            close(a[0], b[i])


def test_generation_changes_the_prompt_and_leaves_what_comes_after() -> None:
    model, ids = llama(), padded((5, 5))["input_ids"]
    attached(model, positions="f2+l1")
    cached = model.generate(ids, **OPTIONS)
    prompt = torch.tensor([True, True, False, False, True])
    for step, logits in enumerate(cached.logits):
        so_far = cached.sequences[:, : 5 + step]
        at = F.pad(prompt, (0, step)).expand(2, -1)
        close(model(so_far, reft_positions=at).logits[:, -1], logits)


def test_rows_may_have_positions_of_their_own() -> None:
    model, batch = llama(), padded((4, 4))
    attached(model, positions="f1")
    at = torch.tensor([[False, True, True, False], [False, False, False, True]])
    both = model(**batch, reft_positions=at).logits
    for i, places in enumerate(([1, 2], [3])):
        one = torch.zeros(1, 4, dtype=torch.bool)
        one[0, places] = True
        row = {k: v[i : i + 1] for k, v in batch.items()}
        close(model(**row, reft_positions=one).logits, both[i : i + 1])
        with pl.using(model, None):
            base = model(**row, reft_positions=one).logits  # the base takes it, without effect
        assert torch.equal(base[0, : places[0]], both[i, : places[0]])
        assert not torch.allclose(base[0, places[0]], both[i, places[0]])


def test_two_deltas_see_the_positions() -> None:
    model, ids = llama(), padded((4, 4))["input_ids"]
    for name in "ab":
        attached(model, name, targets="model.layers.1()")
    nowhere = torch.zeros(2, 4, dtype=torch.bool)
    with pl.using(model, None):
        base = model(ids).logits
    with pl.using(model, ["a", "b"]):
        assert torch.equal(model(ids, reft_positions=nowhere).logits, base)


# -- what is refused


def test_without_positions_there_are_none_to_choose_from() -> None:
    layer = nn.Linear(4, 4)
    attached(layer, targets="()", positions="f1+l1")
    says = r"positions='f1\+l1' need a tensor \(b, t, d\); \(\) gives \(3, 4\)"
    with pytest.raises(pl.PeftliteError, match=says):
        layer(torch.randn(3, 4))


def test_positions_of_another_length_are_an_error() -> None:
    model, ids = llama(), padded((4, 4))["input_ids"]
    attached(model)
    at = torch.ones(2, 5, dtype=torch.bool)
    says = r"reft_positions of shape \(2, 5\) need a tensor \(b, t, d\); model.layers.0\(\) gives"
    with pytest.raises(pl.PeftliteError, match=says):
        model(ids, reft_positions=at)


def test_there_is_no_subspace_larger_than_the_space() -> None:
    says = r"blocks.0\(\) is a call; LoReFT takes calls .* at least rank of them"
    with pytest.raises(pl.TargetError, match=says):
        pl.attach(ZOO["gpt"].model(), LoReFT(rank=WIDTH + 1))


@pytest.mark.parametrize("config, says", [
    ({"rank": 0}, "rank must be a whole number from 1 up, not 0"),
    ({"init": "zero"}, "init must be one of 'linear', 'identity', not 'zero'"),
    *(({"positions": p}, f"positions must be 'all' or such as .*, not {p!r}")
      for p in ("", "+", "f0", "f0+l0", "7", "f", "l2+f2", "f7+", "f1l1", "fx", 3, None)),
])  # fmt: skip
def test_settings_are_checked(config: dict[str, Any], says: str) -> None:
    with pytest.raises(pl.PeftliteError, match=says.replace("+", r"\+")):
        LoReFT(**config)


def test_under_autocast_and_in_half_precision() -> None:
    kind = ZOO["hf_llama"]
    model = kind.model(torch.bfloat16)
    delta = attached(model, positions="f2")
    logits = kind.run(model, kind.batch())
    logits.float().square().mean().backward()
    assert logits.dtype is torch.bfloat16 and all(p.grad.any() for p in delta.parameters())
    model, batch = ZOO["gpt"].model(), ZOO["gpt"].batch()
    of_the_base = autocast_error(model, batch)
    attached(model)
    assert autocast_error(model, batch) < 2 * of_the_base


class Counting(nn.Module):
    """A block that is given its cache alone, as T5's and Bloom's are from transformers 5 on."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        if cache is not None:
            cache.update(x[:, None], x[:, None], 0)
        return self.map(x)


@pytest.mark.parametrize("positions", ["f2", "f4+l1"])
def test_without_positions_a_cache_tells_them(positions: str) -> None:
    model, x = nn.ModuleDict({"layers": nn.ModuleList([Counting()])}), torch.randn(2, 5, 4)
    attached(model, positions=positions)
    (block,), cache = model["layers"], DynamicCache()
    steps = [block(x[:, :3], cache), *(block(x[:, t : t + 1], cache=cache) for t in (3, 4))]
    close(torch.cat(steps, 1)[:, :2], block(x)[:, :2])
    with pl.using(model, None):
        base = block(x)
    changed = ((torch.cat(steps, 1) - base).abs() > 1e-5).any(-1)[0].tolist()
    assert changed == [True, True, positions != "f2", positions != "f2", False]

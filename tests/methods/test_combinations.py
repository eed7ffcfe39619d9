"""Combinations from the literature, each one delta: trained, saved, loaded, taken off again."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peftlite as pl
from peftlite.methods.compacter import Compacter
from peftlite.methods.gated import Gated
from peftlite.methods.prefix import PrefixTuning
from tests.digest import assert_same, bits, digest
from tests.zoo import KINDS, seeded

ZOO = {kind.name: kind for kind in KINDS}

ADAPTER = pl.BottleneckAdapter(preset="pfeiffer", bottleneck_size=4)
PREFIX = PrefixTuning(prefix_length=3)
LORA = pl.LoRA(rank=2, targets=re.compile(r".*\.(q_proj|v_proj|query|value)"))
HEADS = {"gpt": "lm_head", "hf_bert": "classifier", "hf_llama": "lm_head"}


def combination(name: str, kind: str) -> list[pl.Method]:
    """A combination's methods, for a kind of model."""
    match name:
        case "MAM adapter":  # He et al., arXiv:2110.04366, §4.6
            return [PREFIX, pl.BottleneckAdapter(preset="parallel", bottleneck_size=8)]
        case "UniPELT":  # Mao et al., arXiv:2110.07577, §3
            return [Gated(PREFIX), Gated(ADAPTER), Gated(LORA)]
        case "Compacter and norms":  # Karimi Mahabadi et al., arXiv:2106.04647
            return [Compacter(), pl.NormTuning()]
        case "LoRA, biases and a fresh head":
            return [LORA, pl.BitFit(), pl.FullTuning(targets=HEADS[kind])]
    raise KeyError(name)


CELLS = [
    (name, kind)
    for name, kinds in {
        "MAM adapter": ("gpt", "hf_llama"),  # BERT makes no call of a feed-forward as a whole
        "UniPELT": ("gpt", "hf_bert", "hf_llama"),
        "Compacter and norms": ("gpt", "hf_bert", "hf_llama"),
        "LoRA, biases and a fresh head": ("gpt", "hf_bert"),
    }.items()
    for kind in kinds
]


@pytest.mark.parametrize("name, kind", CELLS)
def test_it_is_trained_saved_loaded_and_detached(name: str, kind: str, tmp_path: Any) -> None:
    made = ZOO[kind]
    model, batch, path = made.model(), made.batch(4), tmp_path / "delta.safetensors"
    before, base = digest(model), made.run(model, batch)
    with seeded(2):
        target = torch.randint(base.shape[-1], base.shape[:-1])
        delta = pl.attach(model, combination(name, kind))
    assert {type(p.method) for p in delta.placed.values()} == {type(m) for m in delta.methods}
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.01)
    first, losses = {key: bits(p) for key, p in delta.named_parameters()}, []
    for _ in range(12):
        loss = F.cross_entropy(made.run(model, batch).flatten(0, -2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not [key for key, p in delta.named_parameters() if bits(p) == first[key]]

    output = made.run(model, batch)
    pl.save(delta, path)
    fresh = made.model()
    loaded = pl.load(fresh, path)
    loaded.requires_grad_()
    assert torch.equal(made.run(fresh, batch), output)
    assert [type(method) for method in loaded.methods] == [type(m) for m in delta.methods]

    pl.detach(model, "default")
    assert_same(before, digest(model))
    assert torch.equal(made.run(model, batch), base)


def test_a_gated_prefix_fills_no_cache() -> None:
    model = ZOO["hf_llama"].model()
    pl.attach(model, combination("UniPELT", "hf_llama"))
    ids = torch.tensor([[1, 2, 3]])
    options: dict[str, Any] = dict(max_new_tokens=2, do_sample=False, pad_token_id=0)
    says = "called with a cache, .* filled twice, .* pass use_cache=False"
    with pytest.raises(pl.PeftliteError, match=says):
        model.generate(ids, use_cache=True, **options)
    assert model.generate(ids, use_cache=False, **options).shape == (1, 5)


def test_gates_of_one_site_or_another_learn_apart() -> None:
    model, batch = ZOO["gpt"].model(), ZOO["gpt"].batch()
    delta = pl.attach(model, combination("UniPELT", "gpt"))
    gates = {key: p for key, p in delta.named_parameters() if ":patch." not in key}
    assert {key.split(":")[0].rpartition(".")[2] for key in gates} == {"attn()", "mlp()", "weight"}
    nn.Module.train(model)
    model(**batch).square().mean().backward()
    assert all(p.grad.any() for key, p in gates.items() if "attn()" in key)

"""VB-LoRA: the paper's equation, its bank, its count of numbers, its compact file."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.methods.vblora import Bank, VBLoRA
from tests.cards.card import anywhere
from tests.cells import close, disturb
from tests.zoo import KINDS, seeded

KIND = {kind.name: kind for kind in KINDS}


def banks(model: nn.Module) -> list[Bank]:
    return [module for module in model.modules() if isinstance(module, Bank)]


def attached(name: str, method: VBLoRA) -> tuple[nn.Module, pl.Delta]:
    model = KIND[name].model()
    with seeded():
        return model, disturb(pl.attach(model, method))


def row(logits: Tensor, bank: Tensor, k: int, size: int) -> Tensor:
    """A row of A or a column of B, as equations 3.2 and 3.3 have it."""
    pieces = []
    for sigma in logits:
        least = sigma.sort(descending=True).values[k - 1]
        w = sigma.where(sigma >= least, -torch.inf).softmax(0)
        pieces.append(sum(w[s] * bank[s] for s in range(len(bank))))
    return torch.cat(pieces)[:size]


@pytest.mark.parametrize("name", ["gpt", "experts", "conv2d_grouped", "conv_transpose", "hf_gpt2"])
def test_the_equation(name: str) -> None:
    """ΔW = Σ bₖ ⊗ aₖ of every matrix; some sizes are no multiples of 6."""
    method = VBLoRA(rank=2, num_vectors=7, vector_length=6, topk=3, targets=anywhere)
    model, delta = attached(name, method)
    (bank,) = banks(model)
    for placed in delta.placed.values():
        w, patch, layout = placed.site.tensor, placed.patch, placed.site.layout
        change = (patch.value(w) - w).reshape(-1, layout.rows, layout.columns)
        change = change.mT if layout.transposed else change
        pairs = (logits.flatten(0, -4) for logits in (patch.logits_a[None], patch.logits_b[None]))
        for made, a, b in zip(change, *pairs, strict=True):
            o, i = made.shape
            a = torch.stack([row(logits, bank.vectors, 3, i) for logits in a])
            b = torch.stack([row(logits, bank.vectors, 3, o) for logits in b])
            close(made, b.T @ a)


def test_it_begins_as_in_the_paper() -> None:
    """Table 7: U(−0.02, 0.02) and N(0, 0.01); neither factor is zero, so the output changes."""
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    before = model(torch.ones(512))
    with seeded():
        delta = pl.attach(model, VBLoRA(targets=anywhere))
    (bank,) = banks(model)
    assert bank.vectors.shape == (256, 256)
    assert 0.0199 < bank.vectors.abs().max() <= 0.02
    for placed in delta.placed.values():
        assert placed.patch.logits_a.shape == placed.patch.logits_b.shape == (4, 2, 256)
        assert 0.095 < placed.patch.logits_a.std() < 0.105
    assert 0 < (model(torch.ones(512)) - before).abs().max() < 0.1


def test_only_the_chosen_vectors_learn() -> None:
    """Section 3.2: at most k vectors are affected by the backpropagation through a piece."""
    layer = nn.Linear(4, 4, bias=False)
    with seeded():
        delta = pl.attach(layer, VBLoRA(rank=1, num_vectors=50, vector_length=4, targets=anywhere))
    layer(torch.ones(1, 4)).sum().backward()
    grads = {key.removeprefix("weight:"): p.grad for key, p in delta.named_parameters()}
    assert 2 <= grads["bank.vectors"].any(1).sum() <= 4
    assert (grads["logits_a"] != 0).sum() == (grads["logits_b"] != 0).sum() == 2


def test_one_bank_is_shared_by_all_sites_and_stays_so() -> None:
    method = VBLoRA(num_vectors=5, vector_length=4)
    model, delta = attached("mlp", method)
    assert [key for key in delta.state_dict() if "bank" in key] == ["0.weight:bank.vectors"]
    assert len(banks(copy.deepcopy(model))) == 1
    model.to("meta").to_empty(device="cpu")
    assert len(banks(model)) == 1
    model = KIND["mlp"].model()
    pl.attach(model, [VBLoRA(targets="0"), VBLoRA(targets="2")])
    assert len(banks(model)) == 2


@pytest.mark.parametrize("h, width", [(256, 1), (257, 4)])
def test_the_compact_file_has_what_the_paper_counts(h: int, width: int, tmp_path: Path) -> None:
    """§3.4: h·b numbers, and for every piece k − 1 weights and k indices, of a byte each."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    method = VBLoRA(num_vectors=h, vector_length=8, save_only_topk_weights=True, targets=anywhere)
    delta = pl.attach(model, method)
    pieces = 2 * 3 * 4 * (16 // 8)
    assert delta.num_bytes == 4 * h * 8 + pieces * (4 + 2 * width)
    assert delta.num_parameters == h * 8 + pieces * h
    x, path = torch.randn(2, 16), tmp_path / "vblora.safetensors"
    output = model(x)
    pl.save(delta, path)
    pl.detach(model, "default")
    loaded = pl.load(model, path, trainable=True)
    assert torch.equal(model(x), output)
    model(x).square().sum().backward()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    before = {key: p.detach().clone() for key, p in loaded.named_parameters()}
    optimizer.step()
    assert all(not torch.equal(p, before[key]) for key, p in loaded.named_parameters())

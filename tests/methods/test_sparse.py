"""SparseMask, SHiRA and Fisher scores: which entries, how many, and what is kept of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlite as pl
from peftlite import kernels
from peftlite.methods.fish import fish_scores
from peftlite.methods.shira import SHiRA
from peftlite.methods.sparse import SparseMask, draw, largest, split
from tests.cells import close, disturb
from tests.zoo import KINDS, seeded

KIND = {kind.name: kind for kind in KINDS}


def mlp() -> nn.Module:
    return KIND["mlp"].model()


def chosen(delta: pl.Delta) -> dict[str, Tensor]:
    return {a: placed.patch.indices.long() for a, placed in delta.placed.items()}


def test_the_largest_of_all_sites_together() -> None:
    model = mlp()
    delta = pl.attach(model, SparseMask(fraction=0.1))
    weights = [model.get_submodule(str(i))._parameters["weight"] for i in (0, 2)]
    everything = torch.cat([w.detach().abs().flatten() for w in weights])
    count = round(0.1 * len(everything))
    top = set(everything.topk(count).indices.tolist())
    first, second = chosen(delta).values()
    assert {*first.tolist(), *(second + weights[0].numel()).tolist()} == top
    assert delta.num_parameters == count == pl.plan(mlp(), SparseMask(fraction=0.1)).num_parameters
    assert len(first) != len(second) * weights[0].numel() // weights[1].numel()  # no even shares


@pytest.mark.parametrize("count", (1, 3, 5, 6, 8))
def test_of_equal_ones_the_first(count: int) -> None:
    scores = [torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0])]
    order = [(1, 1), (0, 1), (0, 0), (0, 2), (1, 0), (1, 2), (1, 4), (1, 3)]
    found = [
        (i, j) for i, at in enumerate(largest(lambda: iter(scores), count)) for j in at.tolist()
    ]
    assert found == sorted(order[:count])


def test_random_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, size in ((1, 1), (5, 7), (10, 1000), (249, 1000), (250, 1000)):
        found = draw(count, size, generator)
        assert len(found) == count and 0 <= found.min() and found.max() < size
        assert torch.equal(found, found.unique())
    parts = split(torch.tensor([0, 1, 5, 9]), [2, 0, 3, 5])
    assert [part.tolist() for part in parts] == [[0, 1], [], [], [0, 4]]
    one, same, other = (
        pl.attach(mlp(), SparseMask(fraction=0.1, select="random", seed=seed)) for seed in (1, 1, 2)
    )
    assert [*map(Tensor.tolist, chosen(one).values())] == [
        *map(Tensor.tolist, chosen(same).values())
    ]
    assert chosen(one)["0.weight"].tolist() != chosen(other)["0.weight"].tolist()


def test_only_the_chosen_entries_change_and_learn() -> None:
    model, x = mlp(), torch.randn(3, 10)
    delta = disturb(pl.attach(model, SparseMask(fraction=0.1)))
    patch, w = delta.placed["0.weight"].patch, model[0]._parameters["weight"]
    change = (model[0].weight - w).detach().flatten()
    expected = torch.zeros_like(change).index_add(0, patch.indices, patch.values.detach())
    close(change, expected, 1e-6)
    twin = copy.deepcopy(model)
    pl.merge(twin, "default")
    for p in twin.parameters():
        p.requires_grad_()
    model(x).square().sum().backward()
    with pl.using(twin, None):
        twin(x).square().sum().backward()
    dense = twin[0]._parameters["weight"].grad.flatten()
    close(patch.values.grad, dense[patch.indices])


@pytest.mark.parametrize("order", [["lora", "sparse"], ["sparse", "lora"], ["sparse", "other"]])
def test_rides_beside_other_deltas(order: list[str]) -> None:
    """Whatever lies below it on a weight, the call is that of the weight as read."""
    model, x = nn.Sequential(nn.Linear(9, 7)).double(), torch.randn(4, 9).double()
    methods = {"lora": pl.LoRA(rank=2), "sparse": SHiRA(rank=1), "other": SparseMask(0.3)}
    for name in order:
        disturb(pl.attach(model, methods[name], name))
    pl.use(model, order)
    with kernels.backend("torch"):
        parameters = [p for p in model.parameters() if p.requires_grad]
        called = model(x)
        read = F.linear(x, model[0].weight.clone(), model[0].bias)
        close(called, read, 1e-12)
        upstream = torch.randn_like(read)
        ours = torch.autograd.grad(called, parameters, upstream)
        for one, other in zip(ours, torch.autograd.grad(read, parameters, upstream), strict=True):
            close(one, other, 1e-12)


def test_scores_are_given_by_address() -> None:
    model = KIND["gpt_fused"].model()
    name = "blocks.1.attn.qkv.weight"
    scores = {name: torch.zeros(36, 16)}
    scores[name][13, 2], scores[name][3, 3] = 9, 99
    method = SparseMask(1 / 192, "given", scores=scores, targets=f"{name}[12:24]")
    delta = pl.attach(model, method)
    assert [i.tolist() for i in chosen(delta).values()] == [[18]]
    assert copy.deepcopy(method) == method and copy.deepcopy(method).scores is None
    for bad in ({}, None, {name: torch.zeros(3)}):
        with pytest.raises(pl.PeftliteError, match=r"goes by scores\['blocks.1.attn.qkv.weight'\]"):
            pl.attach(model, SparseMask(select="fish", scores=bad, targets=name), "b")


def nll(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    return F.cross_entropy(model(x), labels, reduction="none")


def test_fish_scores_are_means_of_squared_gradients_of_single_examples() -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)
    with seeded():
        x, labels = torch.randn(5, 10), torch.randint(5, (5,))
    scores = fish_scores(model, nll, [(x[:3], labels[:3]), (x[3:], labels[3:])])
    assert set(scores) == {"0.weight", "2.weight", "4.weight", "4.bias"}
    total = torch.zeros_like(model[2].weight)
    for i in range(5):
        loss = nll(model, (x[i : i + 1], labels[i : i + 1])).sum()
        total += torch.autograd.grad(loss, model[2].weight)[0] ** 2
    close(scores["2.weight"], total / 5)
    delta = pl.attach(model, SparseMask(select="fish", scores=scores, targets="2"))
    (best,) = chosen(delta).values()
    assert set(best.tolist()) == set(total.flatten().topk(len(best)).indices.tolist())
    with pytest.raises(pl.PeftliteError, match="saw no gradient"):
        fish_scores(model, nll, [(x, labels)])  # attached, so frozen


def test_a_file_holds_the_entries_alone(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    delta = disturb(pl.attach(model, SparseMask(fraction=0.005)))
    pl.save(delta, tmp_path / "a.safetensors")
    held = pl.inspect(tmp_path / "a.safetensors").tensors
    count = round(0.005 * 256 * 256)
    assert held == {
        "0.weight:indices": ("int32", (count,)),
        "0.weight:values": ("float32", (count,)),
    }
    fresh = copy.deepcopy(model)
    pl.detach(fresh, "default")
    pl.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh[0].weight, model[0].weight)


def test_shira_has_as_many_entries_as_a_lora() -> None:
    for name in ("hf_bert", "conv2d_grouped", "experts"):
        model = KIND[name].model()
        weights = {"targets": lambda site: not site.is_call and site.whole.dim() > 1}
        shira, lora = (pl.plan(model, method(rank=1, **weights)) for method in (SHiRA, pl.LoRA))
        assert shira.num_parameters == lora.num_parameters

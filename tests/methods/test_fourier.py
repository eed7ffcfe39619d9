"""FourierFT: the paper's equation, its entries, the turned inputs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.methods.fourier import FourierFT, FourierFTPatch, draw
from tests import test_contract as contract
from tests.cards.card import Row, anywhere
from tests.cells import close
from tests.zoo import KINDS, seeded

KIND = {kind.name: kind for kind in KINDS}


@pytest.fixture
def turning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has inputs turned however small a map is."""
    monkeypatch.setattr(FourierFTPatch, "sparse", 0)


def literal(c: Tensor, o: int, i: int, method: FourierFT) -> Tensor:
    """ΔW as the paper's Algorithm 1 has it."""
    spectrum = torch.zeros(o, i, dtype=c.dtype)
    generator = torch.Generator().manual_seed(method.seed)
    places = torch.randperm(o * i, generator=generator)[: method.n]
    spectrum[places // i, places % i] = c
    return method.alpha * torch.fft.ifft2(spectrum).real


@pytest.mark.parametrize("name", ["gpt", "experts", "conv2d_grouped", "conv_transpose", "hf_gpt2"])
def test_the_equation(name: str) -> None:
    """Of every matrix, kernels flattened, outputs by inputs however the weight is stored."""
    method = FourierFT(n=24, alpha=5.0, seed=7, targets=anywhere)
    with seeded():
        delta = pl.attach(KIND[name].model(), method)
    for placed in delta.placed.values():
        w, patch, layout = placed.site.tensor, placed.patch, placed.site.layout
        change = (patch.value(w) - w).reshape(-1, layout.rows, layout.columns)
        change = change.mT if layout.transposed else change
        for made, c in zip(change, patch.c.view(len(change), -1), strict=True):
            close(made, literal(c, *made.shape, method))


@pytest.mark.parametrize("o", [1, 2, 5, 8])
@pytest.mark.parametrize("i", [1, 2, 7, 12])
@pytest.mark.usefixtures("turning")
def test_turned_inputs_are_the_equation_and_so_are_gradients(o: int, i: int) -> None:
    """With every entry of C in use, in fp64; also of no inputs at all."""
    method = FourierFT(n=o * i, alpha=3.0, targets=anywhere)
    layer = nn.Linear(i, o, bias=False, dtype=torch.float64)
    with seeded():
        (placed,) = pl.attach(layer, method).placed.values()
        x = torch.randn(3, 2, i, dtype=torch.float64, requires_grad=True)
    assert placed.patch.has_call
    c = placed.patch.c
    w = placed.site.tensor + literal(c, o, i, method)
    y = layer(x)
    close(y, x @ w.T, 1e-12)
    ours = torch.autograd.grad(y.square().sum(), (c, x))
    theirs = torch.autograd.grad((x @ w.T).square().sum(), (c, x))
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other, 1e-10)
    assert layer(x[:0]).shape == (0, 2, o)


# law 12 is about attaching, and goes by no path
LAWS = [name for name in dir(contract) if name.startswith("test_law") and "_12_" not in name]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.usefixtures("turning")
def test_turned_inputs_keep_the_laws(law: str, tmp_path: Path) -> None:
    """The contract's own models are too small for them."""
    row = Row("fourier", FourierFT(n=20, alpha=8.0), fresh=False)
    for name in ("mlp",) if "_9_" in law else ("mlp", "conv1d_hf", "gpt_tied", "hf_llama"):
        arguments = {"tmp_path": tmp_path} if "_6_" in law else {}
        getattr(contract, law)(row, KIND[name], **arguments)


def test_inputs_are_turned_where_that_is_cheaper() -> None:
    def turns(model: nn.Module, n: int, targets: object = anywhere) -> list[bool]:
        delta = pl.attach(model, FourierFT(n=n, targets=targets))
        return [placed.patch.has_call for placed in delta.placed.values()]

    assert turns(nn.Linear(64, 64, bias=False), 4) == [True]
    assert turns(nn.Linear(64, 64, bias=False), 5) == [False]
    assert turns(nn.Linear(64, 128, bias=False), 4, "weight[0:64]") == [False]
    assert turns(nn.Conv2d(64, 64, 3, bias=False), 1) == [False]
    tied = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Embedding(64, 64))
    tied[1].weight = tied[0].weight
    assert turns(tied, 1) == [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("turning")
def test_a_half_precision_base_is_transformed_in_fp32(dtype: torch.dtype) -> None:
    layer = nn.Linear(48, 40, dtype=dtype)
    with seeded():
        x = torch.randn(8, 48, dtype=dtype)
        (placed,) = pl.attach(layer, FourierFT(n=30, alpha=50.0)).placed.values()
    w, bias = placed.site.tensor, layer.bias
    exact = w.float() + literal(placed.patch.c, 40, 48, FourierFT(n=30, alpha=50.0))
    close(placed.patch.value(w).float(), exact, torch.finfo(dtype).eps)
    close(layer(x).float(), x.float() @ exact.T + bias.float(), 4 * torch.finfo(dtype).eps)


def test_the_entries_are_those_of_the_seed_on_any_torch() -> None:
    state = torch.get_rng_state()
    for size, n, seed in ((1, 1, 0), (10, 10, 777), (3000, 2999, 2**32 - 1), (10**6, 1000, 5)):
        shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        assert draw(n, size, seed) == shuffled[:n].tolist()
    assert draw(5, 768 * 768, 2024) == [466568, 254852, 455206, 248204, 53127]
    assert torch.equal(state, torch.get_rng_state())


def test_rows_of_a_round_differ_and_half_the_rows_do() -> None:
    patch = pl.attach(nn.Linear(31, 12), FourierFT(n=200)).placed["weight"].patch
    order, u, _ = patch.places
    assert sorted(order.tolist()) == list(range(200)) and u.max() == 6
    for rows in u.split(patch.rounds):
        assert len(rows.unique()) == len(rows)


def test_the_places_come_back_wherever_the_model_goes() -> None:
    model = KIND["mlp"].model()
    delta = pl.attach(model, FourierFT(n=9))
    before = [placed.patch.places.clone() for placed in delta.placed.values()]
    model.to("meta").to_empty(device="cpu")
    now = [placed.patch.places for placed in delta.placed.values()]
    assert all(map(torch.equal, before, now))


def test_it_learns_and_saves_n_numbers_a_site() -> None:
    """|Θ| = n × L: Section 3.2; a matrix has no more entries than it has."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(3, 2))
    delta = pl.attach(model, FourierFT(n=40, targets=anywhere))
    assert {key: len(c) for key, c in delta.saved().items()} == {
        "0.weight:c": 40,
        "1.weight:c": 40,
        "2.weight:c": 6,
    }


def test_it_begins_as_it_is_told() -> None:
    with seeded():
        layer, x = nn.Linear(200, 300), torch.randn(4, 200)
        before = layer(x)
        (placed,) = pl.attach(layer, FourierFT(n=500)).placed.values()
    assert 0.9 < placed.patch.c.std() < 1.1
    change = placed.patch.value(placed.site.tensor) - placed.site.tensor
    assert change.std().item() == pytest.approx(300 * 250**0.5 / (200 * 300), rel=0.1)
    pl.detach(layer, "default")
    delta = pl.attach(layer, FourierFT(n=500, init="zero"))
    assert torch.equal(layer(x), before)
    layer(x).square().sum().backward()
    assert all(p.grad.all() for p in delta.parameters())

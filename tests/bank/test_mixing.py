"""Rows of a batch that each have their own delta: law 10, whatever the model and the mix."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peftlite as pl
from peftlite.bank import DeltaBank
from peftlite.core.site import Site, sites
from tests.bank.banks import WIDTH, Models, base, lora, tuned
from tests.digest import assert_same, digest
from tests.zoo import KINDS, Kind

NAMES = "abcdef"
MIXES = st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(NAMES, slots=len(NAMES))


@given(names=MIXES, each=st.integers(1, 3), shape=st.sampled_from([(), (1,), (4,), (2, 3)]))
def test_a_mixed_batch_is_each_row_alone(
    models: Models, names: list[str | None], each: int, shape: tuple[int, ...]
) -> None:
    models.check(names, torch.randn(each * len(names), *shape, WIDTH, dtype=torch.float64))


@given(names=MIXES)
def test_gradients_of_the_input_are_those_of_each_row_alone(
    models: Models, names: list[str | None]
) -> None:
    x = torch.randn(len(names), 3, WIDTH, dtype=torch.float64, requires_grad=True)
    with models.bank.rows(names):
        (own,) = torch.autograd.grad(models.model(x).square().sum(), x)
    alone = torch.cat([models.alone[name](x[i : i + 1]) for i, name in enumerate(names)])
    torch.testing.assert_close(own, torch.autograd.grad(alone.square().sum(), x)[0])


def test_without_a_scope_it_is_the_base(models: Models) -> None:
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    assert torch.equal(models.model(x), models.base(x))
    with models.bank.use(None):
        assert torch.equal(models.model(x), models.base(x))


def test_the_innermost_scope_holds(models: Models) -> None:
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    with torch.no_grad(), models.bank.use("a"), models.bank.rows(["b", "c"]):
        inner = models.model(x)
    torch.testing.assert_close(inner, models.want(x, ["b", "c"]))


def test_rows_first_named_without_gradients_serve_them(models: Models) -> None:
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    names = ["a", "b", "a"]
    models.bank._batches._rows.clear()
    with torch.inference_mode(), models.bank.rows(names):
        models.model(x)
    x.requires_grad_()
    with models.bank.rows(names):
        models.model(x).sum().backward()
    assert x.grad is not None


def _rides(site: Site) -> bool:
    return site.linear and site.rides and "attn.out_proj" not in site.address


def _mixed(kind: Kind) -> tuple[DeltaBank, nn.Module, list[nn.Module]]:
    """A bank on a model of the zoo with two deltas, and the models that have one each."""
    model = kind.model(torch.float64)
    alone = [tuned(model, pl.LoRA(rank=r, targets=_rides), f"d{r}") for r in (2, 3)]
    bank = DeltaBank(model, 2, 4, methods=pl.LoRA(targets=_rides))
    for twin in alone:
        for name, delta in pl.deltas(twin).items():
            bank.load(name, delta)
    return bank, model, alone


BATCHED = [kind for kind in KINDS if kind.batched]


@pytest.mark.parametrize("kind", BATCHED, ids=str)
def test_every_kind_of_model(kind: Kind) -> None:
    if not any(_rides(site) for site in sites(kind.model())):
        with pytest.raises(pl.TargetError):
            _mixed(kind)
        return
    bank, model, alone = _mixed(kind)
    batch = kind.batch(4, torch.float64)
    with torch.no_grad():
        ways = [kind.run(m, batch) for m in (*alone, kind.model(torch.float64))]
        with bank.rows(["d3", None, "d2", "d3"]):
            got = kind.run(model, batch)
    want = torch.stack([ways[1][0], ways[2][1], ways[0][2], ways[1][3]])
    torch.testing.assert_close(got, want)


def test_dtypes_of_base_and_slots() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = base(dtype)
        alone = tuned(model, lora(), "a")
        for slots in (None, torch.float32):
            mixed = copy.deepcopy(model)
            bank = DeltaBank(mixed, 1, 4, methods=lora(dtype=slots))
            bank.load("a", pl.deltas(alone)["a"])
            x = torch.randn(2, 3, WIDTH, dtype=dtype)
            with torch.no_grad(), bank.rows(["a", None]):
                got = mixed(x)
            assert got.dtype is dtype
            want = torch.stack([alone(x)[0], model(x)[1]])
            torch.testing.assert_close(got, want, atol=20 * torch.finfo(dtype).eps, rtol=0.02)
            bank.close()


def test_one_delta_has_parts_of_a_tensor() -> None:
    model = base()
    parts = [pl.LoRA(rank=2, targets=f"2.weight[{at}]") for at in ("0:8", "10:20")]
    parts.append(pl.LoRA(rank=3, alpha=1, targets="4.weight[:, 3:9]"))
    alone = tuned(model, parts, "a")
    bank = DeltaBank(model, 1, 4, methods=lora())
    bank.load("a", pl.deltas(alone)["a"])
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    with torch.no_grad(), bank.rows(["a", None]):
        torch.testing.assert_close(model(x)[0], alone(x)[0])


@pytest.mark.parametrize(
    "method",
    [
        pl.LoRA(rank=2, init="pissa", targets="weight"),
        pl.VeRA(rank=4, targets="2.weight"),
        pl.AdaLoRA(target_rank=2, init_rank=3, total_steps=10, targets="weight"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_every_method_of_low_rank(method: pl.Method) -> None:
    model = base()
    alone = tuned(model, method, "a")
    bank = DeltaBank(model, 1, 4, methods=lora())
    bank.load("a", pl.deltas(alone)["a"])
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    with torch.no_grad(), bank.rows([None, "a"]):
        torch.testing.assert_close(model(x)[1], alone.eval()(x)[1])


class Turned(nn.Module):
    """Has its tokens first inside, as CLIP's transformer has."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x.transpose(0, 1)).transpose(0, 1)


def test_rows_that_can_not_be_told_apart_are_refused() -> None:
    model = Turned()
    bank = DeltaBank(model, 1, 2, methods=pl.LoRA(targets="map"))
    bank.load("a", pl.LoRA(rank=2, targets="map"))
    for tokens in (3, 4):
        with bank.rows(["a", None]), pytest.raises(pl.PeftliteError, match="exclude="):
            model(torch.randn(2, tokens, 4))
    with bank.rows(["a", None, None]), pytest.raises(pl.PeftliteError, match="the batch has 2"):
        model(torch.randn(2, 3, 4))
    with bank.use("a"):  # where all rows have one delta, it's the same
        model(torch.randn(2, 3, 4))


class Boom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("boom")


def test_an_exception_in_a_mixed_forward_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Boom())
    bank = DeltaBank(model, 1, 2, methods=pl.LoRA(targets="weight"))
    bank.load("a", tuned_delta(model))
    x = torch.randn(2, 4)
    before, traced = digest(model), bank._router.traced
    with pytest.raises(ValueError, match="boom"), bank.rows(["a", None]):
        model(x)
    assert_same(before, digest(model))
    assert bank._router.traced is traced
    assert torch.equal(model[0](x), nn.functional.linear(x, *model[0]._parameters.values()))
    assert not [entry for entry in bank._slots.resident if entry.uses]


def tuned_delta(model: nn.Module) -> pl.Delta:
    plain = nn.Sequential(nn.Linear(4, 4))
    plain.load_state_dict(model.state_dict(), strict=False)
    return pl.deltas(tuned(plain, pl.LoRA(rank=2, targets="weight"), "a"))["a"]


def test_close_leaves_the_model_as_it_was() -> None:
    model = base()
    before = digest(model)
    with DeltaBank(model, 2, 4, methods=lora()) as bank:
        bank.load("a", lora())
        assert list(model.state_dict()) == list(base().state_dict())
    assert_same(before, digest(model))
    DeltaBank(model, 2, 4, methods=lora()).close()
    assert_same(before, digest(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps, lambda m: pl.view(m, None)])
def test_a_model_with_a_bank_is_not_copied(copied: Any) -> None:
    model = base()
    DeltaBank(model, 2, 4, methods=lora())
    with pytest.raises(pl.PeftliteError, match=r"bank.close\(\) first"):
        copied(model)


def test_a_shared_delta_goes_with_a_bank() -> None:
    model = base()
    bank = DeltaBank(model, 2, 4, methods=lora())
    alone = tuned(base(), lora(), "a")
    bank.load("a", pl.deltas(alone)["a"], check_base="off")
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    with bank.rows(["a", None]):
        mixed = model(x)
        pl.attach(model, pl.BitFit(targets="4.bias"), "shared")
        nn.init.ones_(next(pl.deltas(model)["shared"].parameters()))
    with pytest.raises(pl.PeftliteError, match="not the model's choice"), bank.use("a"):
        pass
    pl.use(model, ["(bank)", "shared"])
    with bank.rows(["a", None]):
        torch.testing.assert_close(model(x), mixed + 1)


def test_the_memory_moves_with_the_model(models: Models) -> None:
    own = Models("ab")
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    want = own.want(x, ["a", "b"]).float()
    own.model.float()
    with torch.no_grad(), own.bank.rows(["a", "b"]):
        torch.testing.assert_close(own.model(x.float()), want)
    own.model.to("meta")
    assert own.bank._arena.buffers[0].is_meta


def test_names_for_fewer_rows_are_a_mistake_unless_it_is_said(models: Models) -> None:
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    with models.bank.rows(["a", None]), pytest.raises(pl.PeftliteError, match="the batch has 6"):
        models.model(x)
    with torch.no_grad(), models.bank.rows(["a", None], repeat=3):
        torch.testing.assert_close(models.model(x), models.want(x, ["a", None]))
        with pytest.raises(pl.PeftliteError, match="the batch has 4"):
            models.model(x[:4])

"""Verbs: each takes a delta or its name, and does the same with either."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftlite as pl
from tests.errors.case import two

Given = Callable[[nn.Module], Any]

GIVEN: dict[str, Given] = {"delta": lambda model: pl.deltas(model)["sql"], "name": lambda _: "sql"}


def merged(model: nn.Module, given: Any) -> None:
    pl.merge(model, given)


def unmerged(model: nn.Module, given: Any) -> None:
    pl.merge(model, given)
    pl.unmerge(model, given)


VERBS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "detach": pl.detach,
    "merge": merged,
    "unmerge": unmerged,
    "use": pl.use,
    "use several": lambda model, given: pl.use(model, ["chat", given]),
    "combine": lambda model, given: pl.combine(model, {given: 2, "chat": 1}, name="new"),
    "rescale": lambda model, given: pl.rescale(model, given, 2, name="new"),
    "resize_rank": lambda model, given: pl.resize_rank(model, given, rank=1, name="new"),
}


def model_with_changes() -> nn.Module:
    torch.manual_seed(0)
    model = two()
    for delta in pl.deltas(model).values():
        for parameter in delta.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def both(act: Callable[[nn.Module, Any], Any]) -> list[nn.Module]:
    models = []
    for given in GIVEN.values():
        model = model_with_changes()
        act(model, given(model))
        models.append(model)
    return models


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_a_delta_or_its_name(verb: str) -> None:
    by_delta, by_name = both(VERBS[verb])
    own, other = by_delta.state_dict(), by_name.state_dict()
    assert list(own) == list(other) and all(torch.equal(own[key], other[key]) for key in own)
    assert list(pl.deltas(by_delta)) == list(pl.deltas(by_name))
    ids = torch.arange(6).view(2, 3)
    assert torch.equal(by_delta(ids), by_name(ids))


@pytest.mark.parametrize("given", GIVEN)
def test_a_scope_and_a_view_take_either(given: str) -> None:
    model = model_with_changes()
    ids, it = torch.arange(6).view(2, 3), GIVEN[given](model)
    pl.use(model, "sql")
    want = model(ids)
    pl.use(model, None)
    with pl.using(model, it):
        assert torch.equal(model(ids), want)
    with pl.using(model, rows=[it, None]):
        assert torch.allclose(model(ids)[0], want[0], atol=1e-6)  # in a batch of its own or not
    assert torch.equal(pl.view(model, it)(ids), want)


def test_files_take_either(tmp_path: Path) -> None:
    model = model_with_changes()
    for name, (given, options) in {
        "delta": (pl.deltas(model)["sql"], {}),
        "name": ("sql", {"model": model}),
        "both": (pl.deltas(model)["sql"], {"model": model}),
    }.items():
        pl.save(given, tmp_path / name, **options)
        pl.export(given, tmp_path / f"{name}-peft", **options)
    assert len({path.read_bytes() for path in tmp_path.glob("*") if path.is_file()}) == 1
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len({(f / "adapter_model.safetensors").read_bytes() for f in folders}) == 1


def test_data_starts_either() -> None:
    for given in GIVEN.values():
        model = two()
        pl.detach(model, "sql")
        pl.attach(model, pl.LoRA(rank=2, init="eva", targets="q_proj"), "sql")
        before = {k: v.clone() for k, v in pl.deltas(model)["sql"].state_dict().items()}
        batches = [{"ids": torch.randint(29, (8, 6))}]
        pl.initialize(
            model, given(model), batches, loss=lambda model, batch: model(batch["ids"]).sum()
        )
        after = pl.deltas(model)["sql"].state_dict()
        assert any(not torch.equal(after[key], before[key]) for key in before)

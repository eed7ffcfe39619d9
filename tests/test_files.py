"""The file: what beside the tensors is in it, how it is packed, and that a base is hashed once."""

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftlite as pl
from peftlite.core.site import sites
from peftlite.io import fingerprint, packing
from tests.digest import assert_same, digest
from tests.zoo import KINDS, seeded

GPT = next(kind for kind in KINDS if kind.name == "gpt")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, pl.Delta, Path]:
    model = GPT.model()
    with seeded():
        delta = pl.attach(model, [pl.LoRA(rank=16), pl.FullTuning(targets="lm_head")], "sql")
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
    return model, delta, tmp_path / "sql.safetensors"


def test_anyone_can_read_the_tensors(saved) -> None:
    _, delta, path = saved
    pl.save(delta, path)
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == delta.state_dict().keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in delta.state_dict().items())


def test_notes_come_back(saved) -> None:
    _, delta, path = saved
    notes = {"data": "sql-2026", "seeds": [1, 2], "loss": 0.25, "clean": True, "ü": None}
    pl.save(delta, path, notes=notes)
    assert pl.inspect(path).notes == notes
    assert "data: sql-2026" in str(pl.inspect(path))
    pl.load(GPT.model(), path)


@pytest.mark.parametrize("pack", ["bf16", "int8", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_packed_file_says_its_error(saved, pack: str, dtype: torch.dtype) -> None:
    _, delta, path = saved
    with torch.no_grad():
        delta.placed["lm_head.weight"].patch.difference[:, 1:].zero_()
    for parameter in delta.parameters():
        parameter.data = parameter.data.to(dtype)
    pl.save(delta, path)
    plain = path.stat().st_size
    pl.save(delta, path, pack=pack)
    assert path.stat().st_size < plain
    info, back = pl.inspect(path), pl.load(GPT.model(), path).state_dict()
    for key, tensor in delta.state_dict().items():
        assert back[key].dtype is dtype
        error = (back[key].double() - tensor.double()).abs().max().item()
        assert error == info.errors.get(key, 0.0)
        assert error <= tensor.abs().max() * {"bf16": 2**-8, "int8": 1 / 253, "sparse": 0}[pack]
    again = path.with_name("again")
    pl.save(delta, again, pack=pack)
    assert again.read_bytes() == path.read_bytes()


shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3)


@given(shapes, st.sampled_from(packing.PACKINGS), st.data())
@settings(deadline=None, max_examples=100)
def test_packing_any_tensor(shape: list[int], how: str, data: st.DataObject) -> None:
    values = st.floats(-1e6, 1e6, width=32)
    count = torch.Size(shape).numel()
    flat = data.draw(st.lists(values, min_size=count, max_size=count))
    tensor = torch.tensor(flat, dtype=torch.float32).reshape(shape)
    stored, about = packing.pack({"x": tensor}, how)
    entries = {key: packing.Entry(t.dtype, tuple(t.shape)) for key, t in stored.items()}
    assert all(packing.is_sound(key, its, entries) for key, its in about.items())
    assert packing.unpacked(entries, about) == {"x": packing.Entry(torch.float32, tuple(shape))}
    back = packing.unpack("x", about, stored.__getitem__)
    error = (back.double() - tensor.double()).abs().max().item() if count else 0.0
    assert error == (about["x"]["error"] if about else 0.0)


def test_a_base_is_hashed_once_and_again_when_it_changed(saved) -> None:
    model, delta, path = saved
    hashed: list[Tensor] = []
    whole = fingerprint.sha256

    def counting(tensor: Tensor) -> str:
        hashed.append(tensor)
        return whole(tensor)

    with mock.patch.object(fingerprint, "sha256", counting):
        pl.save(delta, path)
        first = len(hashed)
        assert first == len(delta.placed)
        pl.save(delta, path)
        pl.load(model, path, name="again")
        assert len(hashed) == first
        pl.detach(model, "again")
        model.lm_head.weight.data.view(-1)[7] += 1e-7  # which torch doesn't count
        with pytest.raises(pl.BaseMismatchError, match=r"1 of 13 tensors differ: lm_head\.weight;"):
            pl.load(model, path, name="again")
        assert len(hashed) == first + 1


def test_a_sample_sees_another_model_and_says_that_it_is_one(saved) -> None:
    _, delta, path = saved
    pl.save(delta, path, base="sampled")
    assert all("sampled" in entry for entry in pl.inspect(path).base.values())
    pl.load(GPT.model(), path)
    other = GPT.model()
    with torch.no_grad():
        other.blocks[0].attn.q_proj.weight.mul_(1.01)
    before = digest(other)
    with pytest.raises(pl.BaseMismatchError, match="q_proj"):
        pl.load(other, path)
    assert_same(before, digest(other))


@pytest.mark.parametrize("its", [
    {}, {"as": "int4"}, {"as": 3}, {"dtype": "int8"}, {"dtype": "load"}, {"shape": [-1, 16]},
    {"shape": [8.0, 16]}, {"shape": [16, 8]}, {"shape": "8×16"}, {"error": "nan"}, {"error": -1.0},
    {"as": "bf16"}, {"as": "sparse"}, {"dtype": 3}, {"error": None},
])  # fmt: skip
def test_what_is_said_of_a_packing_is_looked_at(its: dict) -> None:
    stored, about = packing.pack({"x": torch.randn(8, 16)}, "int8")
    entries = {key: packing.Entry(t.dtype, tuple(t.shape)) for key, t in stored.items()}
    assert packing.is_sound("x", about["x"], entries)
    assert not packing.is_sound("x", {**about["x"], **its} if its else {}, entries)


def test_an_index_beyond_a_tensor_is_damage() -> None:
    stored, about = packing.pack({"x": torch.eye(8)}, "sparse")
    stored["x#at"][-1] = 64
    with pytest.raises(ValueError, match="index"):
        packing.unpack("x", about, stored.__getitem__)


def test_the_header_is_json_in_order(saved) -> None:
    _, delta, path = saved
    pl.save(delta, path)
    with safetensors.safe_open(path, framework="pt") as file:
        text = file.metadata()["peftlite"]
    assert text == json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)


@pytest.mark.parametrize("format", ["peftlite", "peft", "kohya"])
def test_a_models_sites_are_looked_up_once(format: str, tmp_path: Path) -> None:
    path, looked = tmp_path / "sql", 0
    delta = pl.attach(GPT.model(), pl.LoRA(rank=2), "sql")
    pl.save(delta, path) if format == "peftlite" else pl.export(delta, path, format)

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal looked
        looked += event == "call" and frame.f_code is sites.__code__

    model = GPT.model()
    sys.setprofile(count)
    try:
        pl.load(model, path)
    finally:
        sys.setprofile(None)
    assert looked == 1


def test_the_disk_begins_before_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = pl.attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), pl.LoRA(rank=2))
    at_once, meanwhile = tmp_path / "at_once.safetensors", tmp_path / "meanwhile.safetensors"
    pl.save(delta, at_once)
    monkeypatch.setattr("peftlite.io.files._FLUSH", 1)
    pl.save(delta, meanwhile)
    assert meanwhile.read_bytes() == at_once.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(pl.FileError, match="No space left"):
        pl.save(delta, meanwhile)
    assert meanwhile.read_bytes() == at_once.read_bytes()
    assert len([*tmp_path.iterdir()]) == 2

"""Checkpoints packed without a model: what quantize gives, in little memory, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import peftlite as pl
from peftlite.io import quantize_files as module
from tests.packed.llama import HERE, llama
from tests.test_packed_files import X, on_meta

PROJ = "*_proj"
KINDS = ("nf4", "int8", "fp8")
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint in shards."""
    llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len([*(tmp_path / "base").glob("*.safetensors")]) > 2
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


@each_kind
def test_it_is_what_quantize_gives(kind: str, base: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", llama()
    packs = pl.quantize_files(base, out, kind, targets=PROJ)
    expected = pl.quantize(model, kind, targets=PROJ)
    assert packs.shapes.keys() == expected.shapes.keys()
    fresh = on_meta().eval()
    pl.quantize(fresh, checkpoint=out)
    assert torch.equal(fresh(X).logits, model(X).logits)
    pl.save(pl.attach(model, pl.LoRA(rank=2), "a"), tmp_path / "a")
    pl.load(fresh, tmp_path / "a")  # whose base is the same, then
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not left and (out / "tokenizer.json").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {}
    for name in {*index["weight_map"].values()}:
        tensors |= safetensors.torch.load_file(out / name)
    assert tensors.keys() == index["weight_map"].keys()
    assert sum(t.nbytes for t in tensors.values()) == index["metadata"]["total_size"]
    assert json.loads((out / "config.json").read_text())["quantization_config"] == packs.config


def test_four_bits_are_the_file_that_bitsandbytes_writes(tmp_path: Path) -> None:
    pl.quantize_files(HERE / "plain.safetensors", tmp_path / "out.safetensors", targets=PROJ)
    mine = safetensors.torch.load_file(tmp_path / "out.safetensors")
    theirs = safetensors.torch.load_file(HERE / "bitsandbytes" / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        if key.endswith("bitsandbytes__nf4"):
            said = [json.loads(bytes(t.tolist())) for t in (tensor, theirs[key])]
            assert said[0] == said[1]
        else:
            assert torch.equal(tensor, theirs[key])


def test_it_goes_on_at_the_shard_it_was_at(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, pack, count = tmp_path / "out", module.pack, 0

    def counted(*given: Any, **how: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return pack(*given, **how)

    monkeypatch.setattr(module, "pack", counted)
    with pytest.raises(KeyboardInterrupt):
        pl.quantize_files(base, out, targets=PROJ)
    assert not out.exists()
    done = sorted((tmp_path / ".out.part").glob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in done]
    assert done and not [*(tmp_path / ".out.part").glob("*.tmp")]
    shapes = pl.quantize_files(base, out, targets=PROJ).shapes
    assert [(out / path.name).stat().st_mtime_ns for path in done] == times
    assert count < 4 + len(shapes)  # not all of them again
    pl.quantize_files(base, tmp_path / "whole", targets=PROJ)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_another_job_begins_anew(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "model-00001-of-00003.safetensors").write_text("of another")
    (tmp_path / ".out.part" / "quantize.json").write_text('{"kind": "int8"}')
    pl.quantize_files(base, out, targets=PROJ)
    pl.quantize(llama(), checkpoint=out)


KILLED = """
    import os, signal, sys
    import peftlite as pl
    from peftlite.io import quantize_files as module
    pack, count = module.pack, [0]
    def killing(*given, **how):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return pack(*given, **how)
    module.pack = killing
    pl.quantize_files(*sys.argv[1:], targets="*_proj")
"""
PEAK = """
    import resource, sys
    import peftlite as pl
    import torch
    torch.set_num_threads(1)
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pl.quantize_files("warm.safetensors", f"warm-{sys.argv[3]}.safetensors", sys.argv[3])
    before = peak()
    pl.quantize_files(*sys.argv[1:])
    print(peak() - before)
"""


def run(code: str, *args: Any, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    paths = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    env = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


@pytest.mark.heavy
def test_a_kill_leaves_nothing_at_the_name(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(KILLED, base, out, folder=tmp_path).returncode == -signal.SIGKILL
    assert not out.exists()
    pl.quantize_files(base, out, targets=PROJ)
    assert (
        not [*out.glob("*.tmp")] and not [*out.glob(".*")] and not (out / "quantize.json").exists()
    )
    pl.quantize(llama(), checkpoint=out)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_memory_is_that_of_the_largest_tensor(kind: str, tmp_path: Path) -> None:
    """≤ 1.52 times, and 150 MB for all that Python and torch take as they run."""
    with torch.no_grad():
        w = torch.empty(8192, 4096, dtype=torch.bfloat16).uniform_()  # 64 MiB
    tensors = {f"layers.{i}.weight": w.clone() for i in range(3)}
    safetensors.torch.save_file(tensors, tmp_path / "base.safetensors")
    small = {"layers.0.weight": w[:256].clone()}
    safetensors.torch.save_file(small, tmp_path / "warm.safetensors")
    found = run(PEAK, "base.safetensors", "out.safetensors", kind, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) <= 1.52 * w.nbytes + 40e6


def test_what_is_outside_of_blocks_is_left(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(80, 64),
            "layers": nn.ModuleList([nn.Linear(64, 64), nn.Conv1d(64, 64, 3)]),
            "lm_head": nn.Linear(64, 80),
        }
    )
    state = {k: t for k, t in model.state_dict().items() if k != "embed_tokens.weight"}
    state["embed_tokens.weight"] = state["lm_head.weight"].clone()
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    packs = pl.quantize_files(tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    assert [*packs.shapes] == ["layers.0.weight", "layers.1.weight"]
    assert packs.config is None  # of a convolution no library has such a layer
    packs = pl.quantize_files(
        tmp_path / "m.safetensors", tmp_path / "two.safetensors", targets=["lm_head", "layers.0"]
    )
    assert packs.config is not None and packs.config["llm_int8_skip_modules"] == []


def test_what_transformers_would_read_the_other_way_round_has_no_config(tmp_path: Path) -> None:
    """A `Conv1D` lies as (i, o), and bitsandbytes has no embeddings."""
    conv = {"h.0.c_attn.weight": torch.randn(64, 192), "h.0.c_attn.bias": torch.zeros(192)}
    linear = {"h.0.fc.weight": torch.randn(192, 64), "h.0.fc.bias": torch.zeros(192)}
    table = {"embed_tokens.weight": torch.randn(64, 64), "h.0.fc.weight": torch.randn(64, 64)}
    for i, (tensors, targets) in enumerate([(conv, None), (linear, None), (table, "*.weight")]):
        safetensors.torch.save_file(tensors, tmp_path / f"{i}")
        packs = pl.quantize_files(
            tmp_path / f"{i}", tmp_path / f"{i}q", targets=targets, progress=False
        )
        assert (packs.config is None) is (tensors is not linear)

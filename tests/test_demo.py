"""`peftlite demo` with tiny sizes: the same path, every law, and a cache that can't hurt."""

import functools
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import peftlite as pl
from peftlite import cli, demo
from peftlite.demo import gpt, text, training

pytestmark = pytest.mark.heavy

LEARNS = training.Recipe(steps=40, lr=2e-2, context=32)
TINY = demo.Settings(
    dim=32,
    layers=2,
    heads=2,
    base=LEARNS,
    lora=pl.LoRA(rank=4, alpha=8),
    delta=LEARNS,
    windows=32,
    swaps=10,
)
CORPUS = functools.cache(text.texts)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "texts", CORPUS)
    monkeypatch.setattr(demo, "run", functools.partial(demo.run, settings=TINY))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The file of a pretrained base, made by a first run."""
    assert cli.main(["demo", "--cache", str(tmp_path)]) == 0
    (found,) = tmp_path.glob("demo-*/base.safetensors")
    return found


def _losses(out: str) -> dict[str, list[float]]:
    """The rows of the table: bits per byte on code, docs and names."""
    rows = re.findall(r"^(base|docs|names) +(.*µs)$", out, re.M)
    return {name: [float(cell) for cell in re.findall(r"\d\.\d{3}", row)] for name, row in rows}


def test_prints_a_table_and_every_law(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    out, err = capsys.readouterr()
    assert re.search(r"^corpus [0-9a-f]{12}: ", out, re.M)
    losses = _losses(out)
    assert losses["docs"][1] < losses["base"][1]
    assert losses["names"][2] < losses["base"][2] - 1
    assert len(re.findall(r"^holds  .*\d", out, re.M)) == 8
    assert "8 of 8 laws hold" in out and "FAILS" not in out
    # what it says of its columns, and what it says to type, is so
    for column in ("trainable", "file", "bits on", "swap"):
        assert re.search(f"^  {column} .* {{2,}}", out, re.M) and f" {column}" in out
    (told,) = re.findall(r"^  peftlite (inspect .*)$", out, re.M)
    assert cli.main(shlex.split(told)) == 0 and "LoRA at" in capsys.readouterr().out
    assert all(f"{bar}: 100%" in err for bar in ("pretrain the base", "delta docs", "delta names"))


def test_a_second_run_reads_the_base(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    first, _ = capsys.readouterr()
    written = base.stat().st_mtime_ns
    assert cli.main(["demo", "--cache", str(base.parents[1])]) == 0
    second, err = capsys.readouterr()
    assert base.stat().st_mtime_ns == written and "pretrain" not in err
    assert _losses(second) == _losses(first)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        _flip,
        lambda file: file.write_bytes(file.read_bytes()[:1000]),
        lambda file: file.write_bytes(b""),
        lambda file: save_file({"weight": torch.ones(2)}, file),
    ],
    ids=["a flipped bit", "half", "empty", "another's"],
)
def test_a_spoiled_base_is_retrained(base: Path, spoil: Callable[[Path], None]) -> None:
    whole = base.read_bytes()
    spoil(base)
    assert cli.main(["demo", "--cache", str(base.parents[1])]) == 0
    assert base.read_bytes() == whole
    assert {file.name for file in base.parent.iterdir()} == {
        "base.safetensors",
        "docs.safetensors",
        "names.safetensors",
    }


def test_fresh_retrains(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["demo", "--fresh", "--cache", str(base.parents[1])]) == 0
    assert "pretrain the base: 100%" in capsys.readouterr().err


def test_the_cache_is_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["demo"]) == 0
    assert len(list(tmp_path.glob("peftlite/demo-*/base.safetensors"))) == 1


def test_a_broken_law_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = pl.load

    def lossy(*args: object, **kwargs: object) -> None:
        next(whole(*args, **kwargs).parameters()).mul_(1.001)

    monkeypatch.setattr(pl, "load", lossy)
    assert cli.main(["demo", "--cache", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert re.findall("^FAILS  (.*?)  ", out, re.M) == ["a reloaded delta changes no output"]
    assert "7 of 8 laws hold" in out


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--cache", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("peftlite: ")


def test_no_piece_of_text_is_on_both_sides() -> None:
    for kind, separator in (("docs", b"\n\n"), ("names", b"\n")):
        own = CORPUS()[kind]
        train, held = (set(bytes(half.tolist()).split(separator)) for half in (own.train, own.held))
        assert not train & held - {b""}


def test_gpt_sees_no_later_byte() -> None:
    model = gpt.GPT(16, 2, 2)
    x = torch.arange(8)[None]
    later = x.clone()
    later[0, 5] = 200
    same = torch.isclose(model(x), model(later)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_learning_rate_rises_and_falls() -> None:
    pace = [training.Recipe(steps=100, lr=1, warmup=0.1).pace(step) for step in range(101)]
    assert pace[:10] == sorted(pace[:10]) and max(pace) == pace[9] == 1
    assert pace[10:] == sorted(pace[10:], reverse=True) and pace[100] == 0

"""The command line: what each command prints, finds and writes, in words, in JSON and in codes."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import peftlite as pl
from peftlite import cli
from peftlite.io.checkpoint import Checkpoint
from tests.cells import disturb
from tests.digest import bits
from tests.zoo import KINDS, seeded

LLAMA = next(kind for kind in KINDS if kind.name == "hf_llama")
GPT2 = next(kind for kind in KINDS if kind.name == "hf_gpt2")
Q = "model.layers.0.self_attn.q_proj.weight"


class Desk:
    """A folder with a base and deltas for it, and a terminal."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys
        LLAMA.model().save_pretrained(folder / "base", max_shard_size="6KB")
        self.delta("sql", pl.LoRA(rank=2, targets=["q_proj", "v_proj"]))
        self.delta("chat", [pl.LoRA(rank=3, targets="q_proj"), pl.FullTuning(targets="*norm")], 2)

    def delta(self, name: str, method: Any, seed: int = 1, **options: Any) -> None:
        model = LLAMA.model()
        with seeded(seed):
            disturb(pl.attach(model, method, name))
        pl.save(pl.deltas(model)[name], self.folder / name, **options)

    def __call__(self, *args: str, code: int = 0) -> str:
        """What a command prints, given the code that it exits with."""
        self.capsys.readouterr()
        assert cli.main(list(args)) == code, self.capsys.readouterr()
        out, err = self.capsys.readouterr()
        assert bool(err) == (code == 2)
        return err if code == 2 else out

    def json(self, *args: str, code: int = 0) -> Any:
        return json.loads(self(*args, "--json", code=code))


@pytest.fixture
def desk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, capsys)


def spoil(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_inspect(desk: Desk) -> None:
    desk.delta("sql", pl.LoRA(rank=2, targets="q_proj"), notes={"data": "2026"})
    assert desk("inspect", "sql") == f"{pl.inspect('sql')}\n"
    found = desk.json("inspect", "sql")
    (method,) = found["methods"]
    assert (method["method"], method["rank"], method["sites"][0]) == ("LoRA", 2, Q)
    assert found["tensors"][f"{Q}:a"] == ["float32", [2, 16]]
    assert found["notes"] == {"data": "2026"} and found["num_parameters"] == 128
    assert found["modules"][Q] == {"module": "Linear"}


def test_verify(desk: Desk) -> None:
    assert desk("verify", "sql") == "8 tensors, as they were saved\n"
    assert desk("verify", "sql", "--base", "base").endswith(
        "\n4 tensors of the base are those that it was made for\n"
    )
    shard = Path(Checkpoint("base")._home[Q].path)
    tensors = safetensors.torch.load_file(shard)
    tensors[Q].view(torch.int32)[0, 0] += 1
    safetensors.torch.save_file(tensors, shard)
    assert f"aren't all those that it was made for: {Q}\n" in desk(
        "verify", "sql", "--base", "base", code=1
    )
    found = desk.json("verify", "sql", "--base", "base", code=1)
    assert found == {
        "sound": True, "tensors": 8, "wrong": [], "base": {"tensors": 4, "differing": [Q]}
    }  # fmt: skip
    spoil(desk.folder / "sql")
    assert desk("verify", "sql", code=1).startswith("damaged: 'sql' is damaged, copy it again")
    assert not desk.json("verify", "sql", code=1)["sound"]
    assert desk("verify", "lost", code=2) == "peftlite: there is no file 'lost'\n"


def test_verify_a_peers(desk: Desk) -> None:
    model = LLAMA.model()
    pl.export(disturb(pl.attach(model, pl.LoRA(rank=2, targets="q_proj"))), "peft", format="peft")
    assert desk("verify", "peft") == "4 tensors, which have no digests\n"
    tensors = safetensors.torch.load_file("peft/adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    safetensors.torch.save_file(tensors, "peft/adapter_model.safetensors")
    assert "values that aren't finite" in desk("verify", "peft", code=1)


def test_diff(desk: Desk) -> None:
    assert desk("diff", "sql", "sql") == "the same: 8 tensors\n"
    assert desk.json("diff", "sql", "sql") == {"same": True}
    text = desk("diff", "sql", "chat", code=1)
    assert "methods of 'sql': LoRA at 4 sites\n" in text
    assert "methods of 'chat': LoRA at 2 sites; FullTuning at 5 sites\n" in text
    assert "only in 'chat': model.layers.0.input_layernorm.weight:difference;" in text
    assert f"{Q}:a" in text and "2×16 float32 in one, 3×16 float32 in the other" in text
    desk.delta("other", pl.LoRA(rank=2, targets=["q_proj", "v_proj"]), seed=3)
    found = desk.json("diff", "sql", "other", code=1)
    assert set(found) == {"same", "max_difference"}
    mine, theirs = (safetensors.torch.load_file(name) for name in ("sql", "other"))
    assert found["max_difference"][f"{Q}:a"] == pytest.approx(
        (mine[f"{Q}:a"].double() - theirs[f"{Q}:a"].double()).abs().max().item()
    )
    assert desk("diff", "base", "base") == "the same: 21 tensors\n"
    spoil(desk.folder / "other", 300)
    assert "damaged" in desk("diff", "sql", "other", code=2)


def test_merge(desk: Desk) -> None:
    text = desk("merge", "base", "sql", "-o", "out")
    assert text.startswith("merged 'sql', for good\n") and text.endswith("\nwritten to out\n")
    model = LLAMA.model()
    pl.load(model, "sql")
    receipt = pl.merge(model, "sql", backup="none")
    assert all(bits(x) == bits(model.state_dict()[key]) for key, x in Checkpoint("out").items())
    again = desk.json("merge", "base", "sql", "--out", "again")
    assert again == {"name": "sql", "out": "again", "max_change": receipt.max_change}
    refused = desk("merge", "out", "sql", "-o", "twice", code=2)
    assert refused.startswith("peftlite: 'sql' was made for other base weights: model.layers.0")
    assert not Path("twice").exists()
    desk("merge", "out", "sql", "-o", "twice", "--check-base", "off")


def test_convert_there_and_back(desk: Desk) -> None:
    desk("convert", "sql", "peft", "--to", "peft", "--base", "base")
    desk("convert", "peft", "back", "--to", "peftlite", "--base", "base")
    model = LLAMA.model()
    pl.load(model, "sql", name="a")
    pl.load(model, "back", name="b")
    a, b = (pl.deltas(model)[name].state_dict() for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert "goes by a model" in desk("convert", "sql", "other", "--to", "peft", code=2)


def test_convert_reads_pickles_of_tensors_alone(desk: Desk) -> None:
    tensors = safetensors.torch.load_file("sql")
    torch.save(tensors, "sql.pt")
    desk("convert", "sql.pt", "new")
    assert safetensors.torch.load_file("new").keys() == tensors.keys()
    torch.save({"x": nn.Linear(2, 2)}, "code.pt")
    assert "may run code" in desk("convert", "code.pt", "code", code=2)
    assert not Path("code").exists()


def test_quantize(desk: Desk) -> None:
    desk(
        "quantize",
        "base",
        "-o",
        "packed",
        "--to",
        "int8",
        "--targets",
        "*_proj",
        "--skip",
        "o_proj",
    )
    model = LLAMA.model()
    packs = pl.quantize(model, checkpoint="packed")
    assert packs.kind == "int8" and not any("o_proj" in name for name in packs.shapes)
    assert "packed already" in desk("quantize", "packed", "-o", "twice", code=2)


def test_extract(desk: Desk) -> None:
    desk("merge", "base", "sql", "-o", "tuned")
    text = desk("extract", "base", "tuned", "-o", "back", "--rank", "2")
    assert "of the change of model.layers" in text and "keeps least, 100.00%" in text
    model = LLAMA.model()
    pl.load(model, "back")
    pl.merge(model, "extracted", backup="none")
    for key, tensor in Checkpoint("tuned").items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=1e-5)
    found = desk.json("extract", "base", "tuned", "-o", "less", "--energy", "0.5")
    assert 0.5 <= min(found["energy"].values()) < 1
    assert "the same as base" in desk("extract", "base", "base", "-o", "none", code=2)


def test_a_delta_of_a_wrong_guess_does_not_load(desk: Desk) -> None:
    model = GPT2.model()
    model.save_pretrained("gpt2")
    # a square matrix: its shape doesn't tell that GPT-2 stores it as (inputs, outputs)
    disturb(pl.attach(model, pl.LoRA(rank=2, targets="attn.c_proj.weight"), "sql"))
    pl.save(pl.deltas(model)["sql"], "delta")
    desk("merge", "gpt2", "delta", "-o", "tuned")
    given = "extract", "gpt2", "tuned", "--rank", "2", "-o"
    desk(*given, "guessed")
    with pytest.raises(pl.FileError, match=r"stored as \(inputs, outputs\), and was as"):
        pl.load(GPT2.model(), "guessed")
    desk(*given, "told", "--transposed")
    pl.merge(model, "sql", backup="none")
    found = GPT2.model()
    pl.load(found, "told")
    pl.merge(found, "extracted", backup="none")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=1e-5)


def test_what_is_tied_is_extracted_as_one(desk: Desk) -> None:
    model = GPT2.model()
    model.save_pretrained("gpt2")
    disturb(pl.attach(model, pl.FullTuning(targets="wte"), "sql"))
    pl.save(pl.deltas(model)["sql"], "delta")
    desk("merge", "gpt2", "delta", "-o", "tuned")
    desk("extract", "gpt2", "tuned", "-o", "back", "--transposed")
    found = GPT2.model()
    pl.load(found, "back")
    ids = GPT2.batch()
    torch.testing.assert_close(GPT2.run(found, ids), GPT2.run(model, ids), rtol=0, atol=1e-5)


def test_combine(desk: Desk) -> None:
    desk("combine", "base", "sql=0.5", "chat", "-o", "both", "--name", "both")
    model = LLAMA.model()
    for name in ("sql", "chat"):
        pl.load(model, name)
    expected = pl.combine(model, {"sql": 0.5, "chat": 1.0}, name="both")
    pl.load(model, "both", name="found")
    found = pl.deltas(model)["found"].state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[key], x) for key, x in expected.state_dict().items())
    assert "is no FILE=WEIGHT" in desk("combine", "base", "sql=much", "-o", "x", code=2)


def test_usage_is_shown(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ([], ["frobnicate"], ["merge", "base"], ["convert", "a", "b", "--to", "ggml"]):
        with pytest.raises(SystemExit) as error:
            cli.main(wrong)
        assert error.value.code == 2 and "usage: peftlite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        cli.main(["--version"])
    assert error.value.code == 0 and capsys.readouterr().out == f"{pl.__version__}\n"


class Gone(io.StringIO):
    """What a pipe is whose reader has left."""

    def write(self, _: str) -> int:
        raise BrokenPipeError


def test_every_end_has_its_code(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, interrupts: None
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        assert cli.main(["inspect", "sql"]) == 141
    monkeypatch.setattr("peftlite.commands.files.inspect", lambda _: signal.raise_signal(2))
    desk.capsys.readouterr()
    assert cli.main(["inspect", "sql"]) == 130
    assert desk.capsys.readouterr() == ("", "peftlite: interrupted\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_reads_well(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{cli.COMMANDS[name].help}. " in text and "exit codes: 0 all well" in text
    assert "(default: None)" not in text


@pytest.mark.heavy
def test_runs_as_a_program(desk: Desk) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peftlite", "verify", "lost"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "peftlite: there is no file 'lost'\n")

"""peftlite train: what it leaves, that it is the Trainer's own run, and how it goes on."""

import dataclasses
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import peftlite as pl
import peftlite.train.data as data
from peftlite import cli
from peftlite.commands import local
from peftlite.commands.catalog import COMMANDS
from peftlite.commands.train import SETTINGS
from peftlite.io.load import inspect
from peftlite.quant.packing import KINDS
from peftlite.train import Trainer, losses
from peftlite.train.state import fork_rng
from tests.train.chats import hf_tokenizer, llama, rows, write
from tests.zoo import seeded

Run = Callable[..., str]
SHORT = ["--max-length", "64", "--epochs", "2", "--batch-size", "8"]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `peftlite train` in a folder with a model and chats, and gives what it prints."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("model")
    hf_tokenizer(data.CHATML).save_pretrained("model")
    write(Path("chats.jsonl"), rows()[:24])

    def run(*args: str, code: int = 0, source: str = "chats.jsonl") -> str:
        capsys.readouterr()
        command = ["train", "--model", "model", "--data", source, *SHORT, *args]
        assert cli.main(command) == code, capsys.readouterr()
        out, err = capsys.readouterr()
        return err if code > 1 else out

    return run


def found(run: Run, *args: str, **options: Any) -> Any:
    return json.loads(run(*args, "--json", **options))


def test_is_the_trainers_own_run(run: Run) -> None:
    told = found(
        run, "--out", "sql", "--rank", "4", "--targets", "q_proj", "v_proj", "--set",
        "dropout=0.1", "--validation", "0.25", "--lr-multiplier", "2", "--seed", "3",
        "--num-workers", "1",
    )  # fmt: skip
    model, tokenizer = local.model("model"), local.tokenizer("model")
    train, val = data.chat("chats.jsonl", tokenizer, max_length=64).split(0.25, seed=3)
    with fork_rng(torch.device("cpu"), 3):
        delta = pl.attach(model, pl.LoRA(rank=4, dropout=0.1, targets=["q_proj", "v_proj"]), "sql")
    trainer = Trainer(
        model, losses.causal_lm, train, val, epochs=2, batch_size=8, lr_multiplier=2, seed=3,
        progress=False, folder="own",
    )  # fmt: skip
    history = trainer.fit()
    assert told["settings"] == trainer.settings() and told["parameters"] == delta.num_parameters
    timeless = ("step", "train_loss", "full_valid_loss")
    for one, other in zip(told["epochs"], history.epochs, strict=True):
        assert [one[k] for k in timeless] == [other[k] for k in timeless]
    best = history.best / "sql.safetensors"
    assert (
        Path(told["delta"]).read_bytes() == best.read_bytes() and told["best"] == best.parent.name
    )
    lines = Path("sql/events.jsonl").read_text().splitlines()
    assert (
        len(lines)
        == len(history.events)
        == len(Path("sql/history.csv").read_text().splitlines()) - 1
    )


def test_says_what_it_does(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("--out", "runs/sql", "--method", "ia3", "--name", "mine")
    assert "train loss" in out and "valid loss" not in out
    assert out.splitlines()[-1].startswith("written to runs/sql/mine.safetensors: ")
    assert out.endswith(", as after the last step\n")
    assert inspect("runs/sql/mine.safetensors").methods[0][0] == pl.IA3()
    cli.main(["train", "--model", "model", "--data", "chats.jsonl", *SHORT, "--out", "other"])
    err = capsys.readouterr().err
    assert "LoRA at 14 sites" in err and "batch_size" in err and "6/6" in err


def test_settings_are_the_trainers(run: Run) -> None:
    given = {
        "lr": 1e-3, "lr_multiplier": 0.5, "b_ratio": 4.0, "schedule": "linear", "warmup": 0.5,
        "weight_decay": 0.1, "clip": 0.5, "accumulate": 2, "autocast": "bf16", "patience": 2,
        "metric": "full_valid_perplexity", "seed": 5,
    }  # fmt: skip
    typed = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    told = found(run, "--out", "a", "--validation", "0.2", *typed)
    assert {name: told["settings"][name] for name in given} == given
    llama().bfloat16().save_pretrained("model")
    told = found(run, "--out", "b", "--save-every", "2", "--keep", "1")
    assert {base["dtype"] for base in inspect(told["delta"]).base.values()} == {"bfloat16"}
    assert len(list(Path("b").glob("step-*"))) == 2  # one between epochs, one at an end


def test_help_has_the_trainers_defaults() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Trainer)}
    for name in (*SETTINGS, "accumulate"):
        how = cli.COMMANDS["train"].arguments[f"--{name.replace('_', '-')}"]
        stated = re.search(r"\(default: ([\w.]+)\)", how["help"])
        if isinstance(default := defaults[name], bool):
            assert default is False and "metavar" not in how
        elif default not in (None, "auto"):
            assert stated and stated[1] == f"{default:g}" if default != str(default) else default


WRONG = {
    "--max-length 0": "--max-length must be a whole number from 1 up, not 0",
    "--lr -1": "--lr must be finite and above 0, or 'auto', not -1.0",
    "--rank 0": "--rank must be a whole number from 1 up, not 0",
    "--batch-size 0": "--batch-size must be a whole number from 1 up, or 'auto', not 0",
    "--patience 1": "--patience goes by full_valid_loss: give --validation, or another --metric",
    "--set dropout=2": "dropout must be in [0, 1), not 2",
}


@pytest.mark.parametrize("given", WRONG)
def test_names_options_as_they_are_typed(given: str, run: Run) -> None:
    assert run("--out", "run", *given.split(), code=2) == f"peftlite: {WRONG[given]}\n"


def test_other_words_for_options() -> None:
    said = "try accumulate=2, for the same, or gradient_checkpointing=True, or autocast='bf16'; "
    typed = "try --accumulate 2, for the same, or --gradient-checkpointing, or --autocast bf16; "
    rest = "fit(resume=True) goes on; pl.load(name='a'), my_rank=2, targets=['q', 'v']"
    also = "--resume goes on; pl.load(--name a), my_rank=2, --targets q v"
    assert cli._as_typed(said + rest, cli.COMMANDS["train"]) == typed + also


class Killer:
    """What comes between, in the middle of the second epoch."""

    def start(self, trainer: Any, history: Any) -> None: ...

    def event(self, event: Any) -> None:
        if event["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    def end(self, history: Any) -> None: ...


def test_goes_on_after_a_break(run: Run, monkeypatch: pytest.MonkeyPatch, interrupts: None) -> None:
    whole = found(run, "--out", "whole", "--name", "sql")
    with monkeypatch.context() as patch:
        patch.setattr("peftlite.commands.train.Progress", Killer)
        kept = run("--out", "broken", "--name", "sql", code=130)
    assert kept.endswith(
        "\nending after this step; Ctrl-C again ends at once\n"
        "peftlite: interrupted after step 5 of 6, which 'broken' keeps: --resume goes on from "
        "there\n"
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not Path("broken/sql.safetensors").exists()
    assert "--resume goes on from them" in run("--out", "broken", "--name", "sql", code=2)
    again = found(run, "--out", "broken", "--name", "sql", "--resume")
    assert Path(again["delta"]).read_bytes() == Path(whole["delta"]).read_bytes()
    assert [e["train_loss"] for e in again["epochs"]] == [e["train_loss"] for e in whole["epochs"]]
    assert "other settings, --epochs 2, not 3; steps=6, not 9: go on" in run(
        "--out", "broken", "--name", "sql", "--resume", "--epochs", "3", code=2
    )


@pytest.mark.parametrize("kind", ["text", "pairs", "plain"])
def test_reads_other_files(kind: str, run: Run) -> None:
    texts = [row["messages"][2]["content"] for row in rows()[:20]]
    path = Path("data.txt" if kind == "plain" else "data.jsonl")
    if kind == "plain":
        path.write_text("\n\n".join(texts))
    else:
        lines = [
            {"prompt": "Why?", "response": t} if kind == "pairs" else {"text": t} for t in texts
        ]
        write(path, lines)
    told = found(run, "--out", "run", "--validation", str(path), "--seed", "1", source=str(path))
    tokenizer = hf_tokenizer()
    want = {
        "text": lambda: data.text(texts, tokenizer, length=64),
        "plain": lambda: data.text(["\n\n".join(texts)], tokenizer, length=64),
        "pairs": lambda: data.pairs([("Why?", t) for t in texts], tokenizer, max_length=64),
    }[kind]()
    assert told["settings"]["examples"] == len(want)
    losses_by_epoch = [epoch["full_valid_loss"] for epoch in told["epochs"]]
    assert losses_by_epoch[-1] < losses_by_epoch[0]


def test_trains_on_a_packed_base(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftlite.verbs.quantize.SMALL", 512)
    path = found(run, "--out", "sql", "--rank", "2", "--epochs", "1", "--quantize", "int8")["delta"]
    assert pl.load(local.model("model", packed="int8"), path).name == "sql"
    with pytest.raises(pl.BaseMismatchError):
        pl.load(local.model("model"), path)
    ask = ["generate", "model", path, "--prompt", "hi", "--max-new-tokens", "2"]
    assert [cli.main(ask), cli.main([*ask, "--quantize", "int8"])] == [2, 0]
    assert COMMANDS["train"].arguments["--quantize"]["choices"] == KINDS


def test_trains_on_a_folder_that_is_packed(run: Run) -> None:
    """Packed by a command, by no other library read; the delta is of just those codes."""
    assert cli.main(["quantize", "model", "-o", "packed", "--targets", "*_proj"]) == 0
    path = found(run, "--out", "a", "--rank", "2", "--epochs", "1", "--model", "packed")["delta"]
    filled, written = local.model("packed"), llama()
    pl.quantize(written, "nf4", targets="*_proj")
    assert filled.config.quantization_config["quant_method"] == "bitsandbytes"
    assert filled.generation_config.to_dict() == local.model("model").generation_config.to_dict()
    ids, outputs = torch.arange(12)[None], []
    for model in (filled, written):
        pl.load(model, path)
        outputs.append(model.eval()(ids).logits)
    assert torch.equal(*outputs)
    assert cli.main(["generate", "packed", path, "--prompt", "hi", "--max-new-tokens", "2"]) == 0
    half = local.model("packed", "bf16")
    assert half.dtype is torch.bfloat16 and half.model.rotary_emb.inv_freq.dtype is torch.float32


def test_contrastive_takes_an_encoder_and_pairs(run: Run) -> None:
    with seeded():
        config = BertConfig(
            vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        BertModel(config, add_pooling_layer=False).save_pretrained("encoder")
    hf_tokenizer().save_pretrained("encoder")
    pairs = [(row["messages"][1]["content"], row["messages"][2]["content"]) for row in rows()[:24]]
    write(Path("pairs.jsonl"), [{"prompt": p, "response": r} for p, r in pairs])
    told = found(
        run, "--model", "encoder", "--out", "run", "--loss", "contrastive", "--validation",
        "pairs.jsonl", "--method", "LoRA", source="pairs.jsonl",
    )  # fmt: skip
    assert inspect(told["delta"]).name == "run"
    first, *_, last = (epoch["full_valid_loss"] for epoch in told["epochs"])
    assert last < first

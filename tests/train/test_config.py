"""peftlite train --config: a file is the options as they are typed, both ways, to the letter."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import peftlite as pl
from peftlite import cli
from peftlite.commands import config
from peftlite.commands.train import _method

OPTIONS = cli.COMMANDS["train"].options
RUN = """\
model: llama/
data: train.jsonl   # a comment
validation: 0.1
out: runs/sql
rank: 16
targets: [q_proj, v_proj]
exclude: lm_head
set: {dropout: 1e-1, init: pissa}
lr: 1e-4
weight-decay: 0
clip: .inf
gradient_checkpointing: yes
compile: false
patience:
name: 010
"""
TYPED = [
    "--model=llama/", "--data=train.jsonl", "--validation=0.1", "--out=runs/sql", "--rank=16",
    "--targets", "q_proj", "v_proj", "--exclude", "lm_head", "--set", "dropout=0.1", "init=pissa",
    "--lr=0.0001", "--weight-decay=0", "--clip=inf", "--gradient-checkpointing", "--no-compile",
    "--name=010",
]  # fmt: skip


def parsed(*argv: str) -> argparse.Namespace:
    typed = ["train", *argv]
    return cli._with_config(cli._parser().parse_args(typed), typed)


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """What a command goes by."""
    aside = {**vars(args), "config": None, "print_config": False}
    return {**aside, "set": dict(map(config.key_and_value, args.set or []))}


def test_reads_what_would_be_typed(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    file = ["--config", str(tmp_path / "run.yaml")]
    assert plain(parsed(*file)) == plain(parsed(*TYPED))
    assert _method(parsed(*file)) == pl.LoRA(
        rank=16, targets=["q_proj", "v_proj"], exclude=["lm_head"], dropout=0.1, init="pissa"
    )
    over = ["--rank", "4", "--no-gradient-checkpointing", "--set", "dropout=0", "--targets", "k"]
    for argv in ([*over, *file], [*file, *over]):
        assert plain(parsed(*argv)) == plain(parsed(*TYPED, *over))


WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda w: w[0] != "-")
NUMBERS = st.floats(allow_nan=False)


def strategy(how: Any) -> st.SearchStrategy[Sequence[str]]:
    """Ways to type an option's value."""
    if "metavar" not in how:
        return st.just(())
    if how["metavar"] == "KEY=VALUE":
        value = st.sampled_from(["pissa", "0.1", "true", '"8"', "1e-4", "null", "[1, a]", "x: y"])
        return st.lists(st.builds("{}={}".format, st.sampled_from("abc"), value), min_size=1)
    if how.get("choices"):
        return st.sampled_from([[choice] for choice in how["choices"]])
    kind = {int: st.integers(), float: NUMBERS}.get(how.get("type"), WORDS)
    words = kind.map(str)
    return st.lists(words, min_size=1) if "nargs" in how else st.tuples(words)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20
)
@example(given={"name": ["yes"], "out": ["a: b"], "validation": ["1e-4"], "data": ["null"]})
@example(given={"name": ["1:30"], "out": ["é\n\t "], "model": ["#"], "data": ["'"]})
@given(given=st.fixed_dictionaries({}, optional={
    name: strategy(how) for name, how in config._options(OPTIONS).items()
}))  # fmt: skip
def test_prints_what_reads_back(given: dict[str, Sequence[str]], tmp_path: Path) -> None:
    typed = []
    for name, words in given.items():
        option = f"--{name.replace('_', '-')}"
        typed += (
            [f"{option}={words[0]}"] if isinstance(words, tuple) and words else [option, *words]
        )
    args = parsed(*typed)
    (tmp_path / "run.yaml").write_text(config.written(args, OPTIONS), encoding="utf-8")
    assert plain(parsed("--config", str(tmp_path / "run.yaml"))) == plain(args)


def test_print_config_does_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["--model", "lost", "--rank", "16", "--targets", "q", "v", "--print-config"]
    assert cli.main(["train", *typed, "--set", "dropout=0.1", "--no-compile"]) == 0
    assert capsys.readouterr().out == (
        "model: lost\nrank: 16\ntargets:\n- q\n- v\nset:\n  dropout: 0.1\ncompile: false\n"
    )

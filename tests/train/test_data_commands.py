"""The commands on data: what validate-data and compare print, in words, in JSON and in codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import peftlite as pl
import peftlite.train.data as data
from peftlite import cli
from tests.train.chats import hf_tokenizer, llama, rows, write

ASKED = [{"role": "user", "content": "What is if?"}, {"role": "assistant", "content": "A test."}]
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in a folder with a model, and gives what it prints."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("model")
    hf_tokenizer(data.CHATML).save_pretrained("model")

    def run(*args: str, code: int = 0) -> str:
        capsys.readouterr()
        assert cli.main(list(args)) == code, capsys.readouterr()
        out, err = capsys.readouterr()
        return err if code == 2 else out

    return run


def learn(name: str, messages: list[dict[str, str]]) -> None:
    """A delta of the model that answers one question."""
    model = llama()
    delta = pl.attach(model, pl.FullTuning(targets="*"), name)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=3e-3)
    batch = data.collate(list(data.chat([{"messages": messages}], hf_tokenizer(data.CHATML))))
    labels = batch.pop("labels")
    for _ in range(40):
        logits = model(**batch).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    pl.save(delta, f"{name}.safetensors")


def test_validate_data(run: Run) -> None:
    write(Path("train.jsonl"), rows())
    report = data.validate("train.jsonl")
    assert run("validate-data", "train.jsonl") == f"{report}\n"
    assert "train.jsonl: no problems" in str(report)
    found = json.loads(run("validate-data", "train.jsonl", "--json"))
    assert found == {"ok": True, **json.loads(json.dumps(report.as_dict()))}
    write(Path("held.jsonl"), [rows()[3], b"{"])
    args = ["validate-data", "train.jsonl", "--validation", "held.jsonl", "--tokenizer", "model"]
    found = json.loads(run(*args, "--max-length", "300", "--json", code=1))
    want = data.validate(
        "train.jsonl", "held.jsonl", hf_tokenizer(data.CHATML), max_length=300
    ).as_dict()
    assert {**found, "tokenizer": ""} == {**json.loads(json.dumps(want)), "tokenizer": ""}
    assert [p["kind"] for p in found["validation"]["problems"]] == ["leakage", "JSON"]
    assert "can't be read" in run("validate-data", "lost.jsonl", code=2)
    assert "there is no folder 'lost'" in run(
        "validate-data", "train.jsonl", "--tokenizer", "lost", code=2
    )
    assert "from 1 up" in run("validate-data", "train.jsonl", "--max-length", "0", code=2)


def answers(run: Run, *args: str) -> Any:
    return json.loads(run("compare", "model", *args, "--json"))


@pytest.mark.heavy
def test_compare(run: Run) -> None:
    learn("sql", ASKED)
    model = llama()
    other = pl.attach(model, pl.LoRA(rank=2), "other")
    pl.save(other, "other.safetensors")  # fresh: it answers as the base does
    write(Path("asked.jsonl"), [{"messages": ASKED}, {"messages": ASKED[:1]}])
    args = ["sql.safetensors", "other.safetensors", "--prompts", "asked.jsonl"]
    found = answers(run, *args, "--max-new-tokens", "8")
    assert found["as_wanted"] == {"base": 0, "sql": 1, "other": 0}
    first, second = found["questions"]
    assert (first["prompt"], first["wanted"], second["wanted"]) == (ASKED[:1], "A test.", None)
    assert first["answers"] == second["answers"]
    assert first["answers"]["sql"] == "A test." != first["answers"]["base"]
    assert first["answers"]["other"] == first["answers"]["base"]
    text = run("compare", "model", *args)
    assert "prompt  user: What is if?\nwanted  A test.\n  base  " in text
    assert "\n   sql  A test.\n other  " in text
    assert text.count("wanted") == 2 and "as wanted, of 1" in text


@pytest.mark.heavy
def test_compare_on_plain_prompts(run: Run) -> None:
    learn("sql", ASKED)
    Path("folder").mkdir()
    Path("sql.safetensors").rename("folder/sql.safetensors")
    learn("sql", ASKED)
    Path("prompts.txt").write_text("if x:\n\n  while\n")
    args = ["sql.safetensors", "folder/sql.safetensors", "--prompts", "prompts.txt"]
    found = answers(run, *args, "--max-new-tokens", "3")
    assert [q["prompt"] for q in found["questions"]] == ["if x:", "  while"]
    assert list(found["questions"][0]["answers"]) == [
        "base", "sql", "folder/sql.safetensors"
    ]  # fmt: skip
    write(Path("pairs.jsonl"), [{"prompt": "if x:"}, {"prompt": "if x:", "response": "pass"}])
    again = answers(run, "sql.safetensors", "--prompts", "pairs.jsonl", "--max-new-tokens", "3")
    bases = [q["answers"]["base"] for q in (*found["questions"][:1], *again["questions"])]
    assert len(set(bases)) == 1 and [q["wanted"] for q in again["questions"]] == [None, "pass"]
    model, ids = llama(), hf_tokenizer().encode("if x:", return_tensors="pt")
    want = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert bases[0] == hf_tokenizer().decode(want[0, ids.shape[1] :], skip_special_tokens=True)


def test_compare_tells_what_it_lacks(run: Run) -> None:
    def refused(model: str, delta: str, prompts: str) -> str:
        return run("compare", model, delta, "--prompts", prompts, code=2)

    learn("sql", ASKED)
    write(Path("bad.jsonl"), [{"question": "Why?"}])
    Path("good.txt").write_text("Why?")
    assert "there is no 'prompt'" in refused("model", "sql.safetensors", "bad.jsonl")
    assert "'model' can't be read as text" in refused("model", "sql.safetensors", "model")
    assert "there is no folder 'lost'" in refused("lost", "sql.safetensors", "good.txt")
    assert "there is no file 'lost'" in refused("model", "lost", "good.txt")

"""peftlite generate and chat: what transformers' own generate gives with the delta."""

import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import peftlite as pl
import peftlite.train.data as data
from peftlite import cli
from peftlite.commands.answers import Stream
from tests.cells import disturb
from tests.train.chats import hf_tokenizer, llama, write
from tests.zoo import seeded

Run = Callable[..., str]
MOST = ["--max-new-tokens", "6"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, one of which has a chat template, and two deltas."""
    folder = tmp_path_factory.mktemp("desk")
    llama().save_pretrained(folder / "model")
    hf_tokenizer(data.CHATML).save_pretrained(folder / "model")
    llama().save_pretrained(folder / "plain")
    hf_tokenizer().save_pretrained(folder / "plain")
    for seed, name in enumerate(["sql", "chat"]):
        model = llama()
        with seeded(seed):
            disturb(pl.attach(model, pl.LoRA(rank=2), name))
        pl.save(pl.deltas(model)[name], folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def run(desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in that folder, with what is typed into it, and gives what it prints."""
    monkeypatch.chdir(desk)

    def run(*args: str, typed: str = "", code: int = 0, terminal: bool = False) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)(typed))
        assert cli.main([*args, *MOST]) == code, capsys.readouterr()
        out, err = capsys.readouterr()
        return err if code == 2 else out

    return run


def expected(prompt: Any, *deltas: str, **options: Any) -> str:
    """What a user's own lines of Python give."""
    model, tokenizer = llama(), hf_tokenizer(data.CHATML)
    for name in deltas:
        pl.load(model, f"{name}.safetensors")
    if deltas:
        pl.use(model, [*deltas])
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    how = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6, **options}
    return tokenizer.decode(model.generate(ids, **how)[0, ids.shape[1] :], skip_special_tokens=True)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_generate_is_transformers_with_the_delta(run: Run) -> None:
    given = ["sql.safetensors", "--prompt", "What is if?"]
    assert run("generate", "model", *given) == expected([user("What is if?")], "sql") + "\n"
    assert run("generate", "model", *given, "--raw") == expected("What is if?", "sql") + "\n"
    assert run("generate", "plain", *given) == expected("What is if?", "sql") + "\n"
    assert run("generate", "plain", *given[1:]) == expected("What is if?") + "\n"
    system = [{"role": "system", "content": "Be brief."}, user("Why?")]
    told = run("generate", "model", "sql.safetensors", "--system", "Be brief.", "--prompt", "-",
               typed="Why?\n")  # fmt: skip
    assert told == expected(system, "sql") + "\n"


def test_generate_draws_as_transformers_does(run: Run) -> None:
    told = run("generate", "plain", "sql.safetensors", "--prompt", "if", "--temperature", "0.7",
               "--top-k", "9", "--top-p", "0.9", "--seed", "3")  # fmt: skip
    state = torch.get_rng_state()
    torch.manual_seed(3)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9}
    assert told == expected("if", "sql", **options) + "\n" != expected("if", "sql") + "\n"
    torch.set_rng_state(state)


def test_generate_with_several(run: Run) -> None:
    both = ["--delta", "a=sql.safetensors", "chat.safetensors", "--prompt", "if", "while"]
    told = json.loads(run("generate", "plain", *both, "--without", "--json"))["questions"]
    for question, prompt in zip(told, ["if", "while"], strict=True):
        assert question == {"prompt": prompt, "answers": {
            "base": expected(prompt), "a": expected(prompt, "sql"),
            "chat": expected(prompt, "chat"),
        }}  # fmt: skip
    told = json.loads(run("generate", "plain", *both, "--use", "chat", "a+chat", "--json"))
    assert [question["answers"] for question in told["questions"]] == [
        {"chat": expected("if", "chat")}, {"a+chat": expected("while", "sql", "chat")}
    ]  # fmt: skip
    # what the tokenizer learned of Python differs by Python's version, line breaks too
    answers = [expected(prompt).replace("\n", "\n" + " " * 8) for prompt in ("if", "while")]
    assert run("generate", "plain", *both, "--use", "base") == (
        f"prompt  if\n  base  {answers[0]}\n\nprompt  while\n  base  {answers[1]}\n"
    )


def test_generate_reads_prompts(run: Run) -> None:
    write(Path("asked.jsonl"), [{"messages": [user("Why?")]}, {"prompt": "if"}])
    given = ["generate", "model", "sql.safetensors", "--json", "--prompt-file"]
    told = json.loads(run(*given, "asked.jsonl"))["questions"]
    assert [list(question["answers"].values()) for question in told] == [
        [expected([user("Why?")], "sql")], [expected([user("if")], "sql")]
    ]  # fmt: skip
    told = json.loads(run(*given, "-", typed="if\n\n  while\n"))["questions"]
    assert [question["prompt"] for question in told] == ["if", "  while"]


def test_chat(run: Run) -> None:
    one, two = user("What is if?"), user("Go on.")
    first, base = expected([one], "sql"), expected([one])
    said = {"role": "assistant", "content": first}
    lines = [
        (one["content"], first), (two["content"], expected([one, said, two], "sql")), ("", None),
        ("/off", None), ("/retry", expected([one, said, two])), ("/use sql", None),
        ("/reset", None), ("/off", None), (one["content"], base), ("/reset", None),
        ("/load b=chat.safetensors", None), (one["content"], expected([one], "chat")),
        ("/reset", None), ("/use sql+b", None), (one["content"], expected([one], "sql", "chat")),
        ("/quit", None), ("never", None),
    ]  # fmt: skip
    told = run("chat", "model", "sql.safetensors", typed="\n".join(line for line, _ in lines))
    assert told == "".join(f"{answer}\n" for _, answer in lines if answer is not None)
    assert run("chat", "model") == ""
    system = [{"role": "system", "content": "Be brief."}, one]
    assert run("chat", "model", "--system", "Be brief.", typed=one["content"]) == (
        expected(system) + "\n"
    )


def test_chat_goes_on_after_a_wrong_line(run: Run) -> None:
    one = user("What is if?")
    typed = f"/use lost\n/load lost\n/load\n/help\n/turn\n{one['content']}\n"
    err = run("chat", "model", "sql.safetensors", typed=typed, code=2)
    told = [line for line in err.splitlines() if line.startswith("peftlite: ")]
    assert told == [
        "peftlite: no delta is called 'lost'; there are base; sql",
        "peftlite: there is no file 'lost'",
        "peftlite: /load takes the path of a delta's file",
        "peftlite: there is no /turn: there are /use, /off, /load, /retry, /reset, /help, /quit",
    ]
    assert "/use NAME" in err


def test_an_interrupt_ends_a_chat_or_in_a_terminal_an_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch, interrupts: None
) -> None:
    monkeypatch.setattr(Stream, "put", lambda *_: signal.raise_signal(signal.SIGINT))
    typed = "Why?\n/use lost\n"
    run("chat", "model", typed=typed, code=130)
    assert run("chat", "model", typed=typed, terminal=True) == "> " * 3


def test_text_is_shown_as_it_is_written() -> None:
    tokenizer, shown = hf_tokenizer(), []
    text = "Ünïcode – 漢字 and words\n\n  in lines\n"
    stream = Stream(tokenizer, shown.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in tokenizer(text)["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(shown) == text and len([part for part in shown if part]) > 10


def test_a_model_of_another_kind_is_refused(run: Run) -> None:
    config = BertConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    BertModel(config).save_pretrained("bert")
    hf_tokenizer().save_pretrained("bert")
    said = run("generate", "bert", "--prompt", "a", code=2)
    assert said.startswith(
        "peftlite: 'bert' is no causal language model, or not all of one: it lacks cls.predictions"
    )
    wrong = run("generate", "model", "sql.safetensors", "--dtype", "bf16", "--prompt", "a", code=2)
    assert wrong.endswith("or pass --check-base warn\n")

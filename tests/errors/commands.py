"""The errors of the command line: of configs, and of what a model is asked to write."""

import io
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn
from transformers import BertConfig, BertModel

import peftlite as pl
from peftlite import cli
from peftlite.commands.chat import Chat
from tests.errors.case import Case
from tests.errors.train_more import folder
from tests.train.chats import hf_tokenizer, llama


def typing(*argv: str) -> Any:
    """A command as it is typed, with PATH for the path."""

    def act(_: Any, path: Path) -> Any:
        typed = [word.replace("PATH", str(path)) for word in argv]
        args = cli._with_config(cli._parser().parse_args(typed), typed)
        return args.run(args)

    return act


def config(text: str, says: str) -> Case:
    """`peftlite train --config`, with a file of this text."""
    typed = typing("train", "--config", "PATH")
    return Case(typed, says, pl.FileError, nn.ReLU, lambda path: path.write_text(text))


def asking(*argv: str) -> Any:
    """`peftlite generate`, with the small model beside the path."""

    def act(_: Any, path: Path) -> Any:
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8")):
            return typing("generate", str(path.parent / "files"), *argv)(_, path)

    return act


def answering(*argv: str, says: str, kind: Any = pl.PeftliteError, file: Any = None) -> Case:
    return Case(asking(*argv), says, kind, nn.ReLU, file or folder())


def untold(path: Path) -> None:
    """A model whose tokenizer has no chat template."""
    llama().save_pretrained(path)
    hf_tokenizer().save_pretrained(path)


def headless(path: Path) -> None:
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
    config = BertConfig(vocab_size=30, hidden_size=8, intermediate_size=8, **sizes)
    BertModel(config).save_pretrained(path)
    hf_tokenizer().save_pretrained(path)


def packed(path: Path) -> None:
    model = llama()
    pl.quantize(model, targets="*_proj")
    model.save_pretrained(path)
    hf_tokenizer().save_pretrained(path)


CASES = [
    # configs
    Case(typing("train", "--data", "x"), "train needs --model, --out: give what it lacks, or a "
         "--config that has it", model=nn.ReLU),
    Case(mock.patch.dict(sys.modules, yaml=None)(typing("train", "--config", "PATH")),
         "a config needs pyyaml: pip install pyyaml", model=nn.ReLU),
    Case(typing("train", "--config", "PATH"), "'…' can't be read as text: No such file or "
         "directory", pl.FileError, nn.ReLU),
    config("rank: 8\n\nleraning_rate: 1", "'…', line 3: there is no option 'leraning_rate'; there "
           "is lr"),
    config("bach-size: 8", "'…', line 1: there is no option 'bach-size'; there is batch_size"),
    config("lora_alpha: 8", "'…', line 1: there is no option 'lora_alpha'; there is alpha"),
    config("bf16: true", "'…', line 1: there is no option 'bf16'; for it, autocast='bf16'"),
    config("config: a", "'…', line 1: there is no option 'config': there are model; data; …"),
    config("rank: 8\nlr: 1\nrank: 9", "'…', line 3: rank is on line 1 already"),
    config("rank: many", "'…', line 1: rank takes a whole number, not 'many'"),
    config("a: b\nlr: much", "'…', line 1: there is no option 'a': there are …"),
    config("lr: much", "'…', line 1: lr takes a number, not 'much'"),
    config("seed: 0\nrank: [8, 9]", "'…', line 2: rank takes one value, not [8, 9]"),
    config("schedule: cosin", "'…', line 1: schedule takes one of cosine, linear, constant, not "
           "'cosin'"),
    config("resume: 1", "'…', line 1: resume takes true or false, not 1"),
    config("rank: 8\ndata: 'x", "'…', line …: no YAML: found unexpected end of stream"),
    config("rank 8", "'…' isn't of options, such as `rank: 8`, a line each"),
    Case(typing("chat", "PATH"), "'…' has no chat template, by which a chat is written: peftlite "
         "generate goes on from a text; or set tokenizer.chat_template, for one to pl.data.CHATML, "
         "and tokenizer.save_pretrained('…')", model=nn.ReLU, file=untold),
    Case(typing("generate", "PATH", "--prompt", "a"), "'…' is no causal language model, or not all "
         "of one: it lacks cls.predictions.bias; …", pl.FileError, nn.ReLU, headless),
    Case(typing("generate", "PATH", "--prompt", "a", "--quantize", "nf4"), "the model is packed "
         "already: leave out --quantize", model=nn.ReLU, file=packed),
    answering(says="there is nothing to answer: give a --prompt, or a --prompt-file"),
    answering("--prompt", "-", says="stdin can't be read as text: …", kind=pl.FileError),
    answering("--prompt", "a", "--system", "b", "--raw", says="--system opens a chat, and --raw is "
              "given: write it into the prompt"),
    answering("--prompt", "a", "b", "c", "--use", "base", "base", says="--use has 2 names for 3 "
              "prompts: give one for all, or one for each"),
    answering("--prompt", "a", "--use", "sql+b", says="no delta is called 'sql'; there are base"),
    answering("--prompt", "", "--raw", says="the prompt has 0 tokens, and this model takes 1 to "
              "4095"),
    answering("base=x", "--prompt", "a", says="'base' is taken: give another, NAME=x"),
    Case(lambda *_: Chat(None, "base", []).take("/load "),  # type: ignore
         "/load takes the path of a delta's file", model=nn.ReLU),
    Case(lambda *_: Chat(None, "base", []).take("/exit"),  # type: ignore
         "there is no /exit: there are /use, /off, /load, /retry, /reset, /help, /quit",
         model=nn.ReLU),
    Case(lambda *_: Chat(None, "base", []).take("/retry"),  # type: ignore
         "/retry answers the last message again, and none was answered", model=nn.ReLU),
    config("[1, 2]", "'…' isn't of options, such as `rank: 8`, a line each"),
]  # fmt: skip

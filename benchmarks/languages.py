"""A delta for each of many languages, trained at once on one base of Python source.

    pip download --no-deps django==5.2.19 -d FOLDER   # its translations; nothing of it is installed
    python benchmarks/languages.py --django FOLDER

The base is T4's, a byte-level GPT. A language's text is what Django's messages are in it; a message
is in one split only, and in the same for all languages. One delta a language learns, all in one
bank, from as many bytes, by the rate that was best for LoRA on T4. Every delta, and some mixtures,
are tested on every language: results/languages.csv has bits per byte, and what the files take.
Deltas that are there already, in --deltas, aren't trained again. Some 3 minutes of one core, and 5
more where quality.py didn't make the base before.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import HERE, machine, write_csv
from comparison.bytelm import ByteLM
from quality import CACHE
from torch import Tensor, nn

import peftlite as pl
from peftlite.demo.training import bits, windows
from peftlite.table import table

WHEEL = "django-5.2.19-py3-none-any.whl"
SHA256 = "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"
FAMILIES: Mapping[str, Sequence[str]] = {
    "Romance": ("es", "pt", "gl", "ca", "it", "fr"),
    "Germanic": ("de", "nl", "da", "nb", "sv"),
    "Slavic": ("cs", "sk", "pl", "ru", "uk", "be", "bg"),
    "Uralic": ("fi", "et"),
    "each its own": ("tr", "el", "ar", "ja"),
}
FAMILY = {language: family for family, found in FAMILIES.items() for language in found}
LANGUAGES = list(FAMILY)
MIXES: Mapping[str, Sequence[str]] = {  # for a language: of which others
    "gl": ("es", "pt"),
    "ca": ("es", "fr"),
    "nb": ("da", "sv"),
    "sk": ("cs", "pl"),
    "be": ("ru", "uk"),
    "bg": ("ru", "uk"),
}
RATE = 8e-3  # the best for LoRA r8 on the validation split of T4
METHOD = pl.LoRA(rank=8)
CONTEXT, TRAIN, HELD = 64, 224, 24  # bytes of a window; windows of a language
BATCH, EPOCHS = 4, 2
COLUMNS = ("delta", "language", "bits", "file_bytes")

ENTRY = re.compile(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"\n)+)', re.M)
Texts = dict[str, dict[str, Tensor]]  # by language and split, windows (n, CONTEXT + 1)


def messages(folder: Path, language: str) -> dict[str, str]:
    """Messages of Django, and what they are in a language."""
    path = folder / WHEEL
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise FileNotFoundError(
            f"{path} isn't there, or isn't that of 5.2.19: type pip download --no-deps "
            f"django==5.2.19 -d {folder}"
        )
    found: dict[str, str] = {}
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(f"/locale/{language}/LC_MESSAGES/django.po"):
                for entry in ENTRY.finditer(wheel.read(name).decode()):
                    message, translated = (_unquoted(text) for text in entry.groups())
                    if message and translated:
                        found[message] = translated
    return found


def _unquoted(lines: str) -> str:
    return "".join(ast.literal_eval(line) for line in lines.splitlines())


def texts(folder: Path, languages: Sequence[str], quick: bool) -> Texts:
    most = {"train": 8 if quick else TRAIN, "validation": HELD, "test": HELD}
    found: Texts = {}
    for language in languages:
        split: dict[str, list[str]] = {name: [] for name in most}
        for message, translated in messages(folder, language).items():
            draw = hashlib.sha256(message.encode()).digest()[0] % 10
            split[{8: "validation", 9: "test"}.get(draw, "train")].append(translated)
        found[language] = {name: _windows(split[name], count) for name, count in most.items()}
    return found


def _windows(strings: Sequence[str], most: int) -> Tensor:
    text = torch.frombuffer(bytearray("\n".join(strings).encode()), dtype=torch.uint8)
    return windows(text, torch.arange(0, len(text) - CONTEXT, CONTEXT)[:most], CONTEXT)


def trainer(model: nn.Module, texts: Texts, language: str) -> pl.Trainer:
    def rows(split: str) -> list[dict[str, Tensor]]:
        return [{"input_ids": row, "labels": row} for row in texts[language][split]]

    pl.attach(model, METHOD, name=language)
    given: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "lr": RATE, "progress": False}
    data = rows("train"), rows("validation")
    return pl.Trainer(model, pl.losses.causal_lm, *data, delta=language, **given)


def learn(model: nn.Module, texts: Texts, folder: Path) -> None:
    """Leaves a file for every language that has none."""
    missing = [name for name in texts if not (folder / f"{name}.safetensors").exists()]
    if missing:
        pl.fit_together([trainer(model, texts, language) for language in missing])
    for language in missing:
        pl.save(pl.deltas(model)[language], folder / f"{language}.safetensors")
        pl.detach(model, language)


@torch.no_grad()
def tested(model: nn.Module, texts: Texts) -> dict[str, float]:
    """Bits per byte of every language's test split."""
    return {lang: bits(model, splits["test"]).item() for lang, splits in texts.items()}


def everything(model: nn.Module, texts: Texts, folder: Path) -> Iterator[dict[str, Any]]:
    files = {language: folder / f"{language}.safetensors" for language in texts}
    for language, file in files.items():
        pl.load(model, file, name=language)
    for parts in dict.fromkeys(MIXES.values()):
        if texts.keys() >= {*parts}:
            pl.combine(model, dict.fromkeys(parts, 1 / len(parts)), name="_".join(parts))
    for name in (None, *pl.deltas(model)):
        pl.use(model, name)
        size = files[name].stat().st_size if name in files else ""
        for language, found in tested(model, texts).items():
            cells = {"delta": name or "base", "language": language, "file_bytes": size}
            yield {**cells, "bits": f"{found:.4f}"}


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """For every language: the base, its own delta, the best other one, and the mixture for it."""
    bits = {(row["delta"], row["language"]): float(row["bits"]) for row in rows}
    lines = []
    for own in dict.fromkeys(language for _, language in bits):
        others = {d: x for (d, of), x in bits.items() if of == own and d in LANGUAGES and d != own}
        near = min(others, key=others.__getitem__)
        line = [FAMILY[own], own, f"{bits['base', own]:.2f}", f"{bits[own, own]:.2f}"]
        mix = "_".join(MIXES.get(own, ()))
        mixed = f"{mix} {bits[mix, own]:.2f}" if (mix, own) in bits else ""
        lines.append([*line, f"{near} {others[near]:.2f}", mixed])
    return table(["family", "language", "base", "its own", "the best other", "a mixture"], lines)


def main() -> None:
    parser = argparse.ArgumentParser("languages.py", description=__doc__.splitlines()[0])
    parser.add_argument("--django", type=Path, default=CACHE, help="the folder with its wheel")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder for the base")
    parser.add_argument("--deltas", type=Path, help="a folder for the deltas; else in the cache")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES)
    parser.add_argument("--quick", action="store_true", help="a few steps, and no CSV file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = ByteLM(args.cache, args.quick).base
    folder = args.deltas or args.cache / ("languages-quick" if args.quick else "languages")
    folder.mkdir(parents=True, exist_ok=True)
    found = texts(args.django, args.languages, args.quick)
    learn(model, found, folder)
    about = machine()
    rows = [{**row, **about} for row in everything(model, found, folder)]
    print(summary(rows))
    if not args.quick:
        write_csv(HERE / "results" / "languages.csv", [*COLUMNS, *about], rows)


if __name__ == "__main__":
    main()

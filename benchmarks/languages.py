"""A delta for each of many languages, trained at once on one base of Python source.

    pip download --no-deps django==5.2.19 -d FOLDER   # its translations; nothing of it is installed
    python benchmarks/languages.py --django FOLDER

The base is T4's, a byte-level GPT. A language's text is what Django's messages are in it; a message
is in one split only, and in the same for all languages. The rate of learning is the best of three
on the validation split of four languages; then one delta a language learns, all in one bank, from
as many bytes. Every delta, and some mixtures, are tested on every language:
results/languages.csv has bits per byte, and what the files take. Deltas that are there already,
in --deltas, aren't trained again. Some 10 minutes of one core, and 5 more where quality.py didn't
make the base before.
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
LANGUAGES = [language for family in FAMILIES.values() for language in family]
MIXES: Mapping[str, Sequence[str]] = {  # for a language: of which others
    "gl": ("es", "pt"),
    "ca": ("es", "fr"),
    "nb": ("da", "sv"),
    "sk": ("cs", "pl"),
    "be": ("ru", "uk"),
    "bg": ("ru", "uk"),
}
RATES, SOUGHT_ON = (4e-3, 8e-3, 1.6e-2), ("es", "fi", "ru", "ja")
METHOD = pl.LoRA(rank=8)
CONTEXT, TRAIN, HELD = 64, 224, 24  # bytes of a window; windows of a language
BATCH, EPOCHS = 4, 4
COLUMNS = ("delta", "language", "bits", "file_bytes", "rate")

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


def texts(folder: Path, quick: bool) -> Texts:
    most = {"train": 8 if quick else TRAIN, "validation": HELD, "test": HELD}
    found: Texts = {}
    for language in LANGUAGES:
        split: dict[str, list[str]] = {name: [] for name in most}
        for message, translated in messages(folder, language).items():
            draw = hashlib.sha256(message.encode()).digest()[0] % 10
            split[{8: "validation", 9: "test"}.get(draw, "train")].append(translated)
        found[language] = {name: _windows(split[name], count) for name, count in most.items()}
    return found


def _windows(strings: Sequence[str], most: int) -> Tensor:
    text = torch.frombuffer(bytearray("\n".join(strings).encode()), dtype=torch.uint8)
    return windows(text, torch.arange(0, len(text) - CONTEXT, CONTEXT)[:most], CONTEXT)


def trainer(model: nn.Module, texts: Texts, language: str, rate: float, name: str) -> pl.Trainer:
    def rows(split: str) -> list[dict[str, Tensor]]:
        return [{"input_ids": row, "labels": row} for row in texts[language][split]]

    pl.attach(model, METHOD, name=name)
    given: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "progress": False}
    data = rows("train"), rows("validation")
    return pl.Trainer(model, pl.losses.causal_lm, *data, delta=name, lr=rate, **given)


def sought(model: nn.Module, texts: Texts) -> float:
    """The rate with the least loss on the validation splits of the languages it's sought on."""
    tried = {f"{lang}_{i}": (lang, rate) for i, rate in enumerate(RATES) for lang in SOUGHT_ON}
    jobs = [trainer(model, texts, *what, name) for name, what in tried.items()]
    found = zip(tried.items(), pl.fit_together(jobs), strict=True)
    losses = dict.fromkeys(RATES, 0.0)
    for (name, (_, rate)), history in found:
        losses[rate] += history.events[-1]["full_valid_loss"]
        pl.detach(model, name)
    print("loss on the validation split by rate:", losses)
    return min(losses, key=losses.__getitem__)


def learn(model: nn.Module, texts: Texts, folder: Path) -> float:
    """Leaves a file for every language, and returns the rate by which they learned."""
    rate = sought(model, texts)
    pl.fit_together([trainer(model, texts, language, rate, language) for language in LANGUAGES])
    for language in LANGUAGES:
        pl.save(pl.deltas(model)[language], folder / f"{language}.safetensors")
        pl.detach(model, language)
    (folder / "rate").write_text(repr(rate))
    return rate


@torch.no_grad()
def tested(model: nn.Module, texts: Texts) -> dict[str, float]:
    """Bits per byte of every language's test split."""
    return {lang: bits(model, splits["test"]).item() for lang, splits in texts.items()}


def everything(
    model: nn.Module, texts: Texts, folder: Path, rate: float
) -> Iterator[dict[str, Any]]:
    files = {language: folder / f"{language}.safetensors" for language in LANGUAGES}
    for language, file in files.items():
        pl.load(model, file, name=language)
    for parts in dict.fromkeys(MIXES.values()):
        pl.combine(model, dict.fromkeys(parts, 1 / len(parts)), name="_".join(parts))
    for name in (None, *pl.deltas(model)):
        pl.use(model, name)
        size = files[name].stat().st_size if name in files else ""
        for language, found in tested(model, texts).items():
            yield {"delta": name or "base", "language": language, "bits": f"{found:.4f}",
                   "file_bytes": size, "rate": rate}  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """For every language: the base, its own delta, the best other one, and the mixture for it."""
    bits = {(row["delta"], row["language"]): float(row["bits"]) for row in rows}
    lines = []
    for family, languages in FAMILIES.items():
        for own in languages:
            others = {other: bits[other, own] for other in LANGUAGES if other != own}
            near = min(others, key=others.__getitem__)
            line = [family, own, f"{bits['base', own]:.2f}", f"{bits[own, own]:.2f}"]
            line += [f"{near} {others[near]:.2f}"]
            mix = "_".join(MIXES.get(own, ()))
            lines.append([*line, f"{mix} {bits[mix, own]:.2f}" if mix else ""])
    return table(["family", "language", "base", "its own", "the best other", "a mixture"], lines)


def main() -> None:
    parser = argparse.ArgumentParser("languages.py", description=__doc__.splitlines()[0])
    parser.add_argument("--django", type=Path, default=CACHE, help="the folder with its wheel")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder for the base")
    parser.add_argument("--deltas", type=Path, help="a folder for the deltas; else in the cache")
    parser.add_argument("--quick", action="store_true", help="a few steps, and no CSV file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = ByteLM(args.cache, args.quick).base
    folder = args.deltas or args.cache / ("languages-quick" if args.quick else "languages")
    folder.mkdir(parents=True, exist_ok=True)
    found = texts(args.django, args.quick)
    done = folder / "rate"
    rate = float(done.read_text()) if done.exists() else learn(model, found, folder)
    about = machine()
    rows = [{**row, **about} for row in everything(model, found, folder, rate)]
    print(summary(rows))
    if not args.quick:
        write_csv(HERE / "results" / "languages.csv", [*COLUMNS, *about], rows)


if __name__ == "__main__":
    main()

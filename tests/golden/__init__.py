"""R14: golden deltas, one of every method as each release wrote it, and what loading them gives."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.io import native
from tests.cards import CARDS
from tests.digest import bits
from tests.trust.malformed import Parts
from tests.trust.tally import Tally
from tests.zoo import GPT, seeded

HERE = Path(__file__).parent
IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])


def model() -> nn.Module:
    """A small GPT whose weights are written down here: no generator of random numbers made them."""
    made = GPT().eval()
    _write(made.parameters(), 37, 101, 64)
    return made


def complete() -> None:
    """Writes what this release lacks; a file that would come out otherwise is a format's change."""
    folder = HERE / pl.__version__
    folder.mkdir(exist_ok=True)
    written = write(folder)
    print(f"{len(written)} files, {sum(path.stat().st_size for path in written):,} bytes")


def write(folder: Path) -> list[Path]:
    """Writes the golden delta of every card that has none there; those that it wrote."""
    paths = {folder / f"{card.name}.safetensors": card.golden for card in CARDS}
    new = {path: method for path, method in paths.items() if not path.exists()}
    for path, method in new.items():
        base = model()
        with seeded():  # what isn't trained may be drawn, and is in the file
            delta = pl.attach(base, method, "golden")
        _write(delta.parameters(), 29, 89, 256)
        pl.save(delta, path, notes={"output": output(base).tolist()})
    return list(new)


@torch.no_grad()
def _write(parameters, step: int, modulus: int, divisor: int) -> None:
    for i, parameter in enumerate(parameters):
        k = torch.arange(parameter.numel()).view(parameter.shape)
        parameter.copy_(((step * k + i) % modulus - modulus // 2) / divisor)


@torch.no_grad()
def output(base: nn.Module) -> Tensor:
    """Some numbers that a model computes."""
    return base(IDS)[:, -1, :4].flatten()


def r14() -> Tally:
    """Every golden delta: its tensors, its model's output, and the same bytes again."""
    tally = Tally()
    paths = sorted(HERE.rglob("*.safetensors"))
    for path in paths:
        _check(path, f"{path.parent.name} {path.stem}", tally)
    releases = {path.parent.name for path in paths}
    lacks = {card.name for card in CARDS} - {p.stem for p in (HERE / pl.__version__).iterdir()}
    tally.check(not lacks, f"none of {pl.__version__} for {lacks}: python -m tests.made")
    tally.notes.append(f"releases {', '.join(sorted(releases))}")
    return tally


def _check(path: Path, what: str, tally: Tally) -> None:
    base, info = model(), pl.inspect(path)
    delta = pl.load(base, path)
    held = safetensors.torch.load_file(path)
    same = {key: bits(tensor) for key, tensor in delta.saved().items()} == {
        key: bits(tensor) for key, tensor in held.items()
    }
    tally.check(same, f"{what}: the tensors differ")
    expected = torch.tensor(info.notes["output"])
    tally.check(torch.allclose(output(base), expected, 1e-4, 1e-5), f"{what}: another output")
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again"
        with mock.patch.object(native, "__version__", info.library):
            pl.save(delta, again, notes=info.notes)
        tally.check(again.read_bytes() == path.read_bytes(), f"{what}: saved otherwise")
        again.write_bytes(Parts.of(path.read_bytes()).sealed(format=native.FORMAT + 1))
        try:
            pl.load(model(), again)
            tally.check(False, f"{what}: a newer format loads")
        except pl.FileError as error:
            tally.check("upgrade peftlite" in str(error), f"{what}, newer: {error}")

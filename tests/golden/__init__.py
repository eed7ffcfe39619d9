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
from tests.digest import bits
from tests.trust.malformed import Parts
from tests.trust.tally import Tally
from tests.zoo import GPT, seeded

HERE = Path(__file__).parent
METHODS = (
    pl.AdaLoRA(init_rank=3, target_rank=2, total_steps=9), pl.BitFit(), pl.BOFT(block_size=2, m=2),
    pl.BottleneckAdapter(bottleneck_size=2), pl.Compacter(reduction_factor=4, phm_dim=2),
    pl.DiffPruning(steps=9, targets="v_proj"), pl.DoRA(rank=2), pl.FourierFT(n=9),
    pl.FullTuning(targets="q_proj"), pl.Gated(pl.LoRA(rank=2)), pl.HRA(rank=2), pl.IA3(),
    pl.LoHa(rank=2), pl.LoKr(rank=2), pl.LoRA(rank=2, alpha=3), pl.LoReFT(rank=2),
    pl.LTSFT(steps=9, targets="v_proj"), pl.NormTuning(), pl.OFT(block_size=2),
    pl.PrefixTuning(prefix_length=2), pl.PromptTuning(prompt_length=2),
    pl.PTuning(prompt_length=2, hidden_size=4), pl.SHiRA(rank=1), pl.SparseMask(fraction=0.05),
    pl.VBLoRA(rank=2, num_vectors=8, vector_length=4), pl.VeRA(rank=2),
)  # fmt: skip
IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])


def model() -> nn.Module:
    """A small GPT whose weights are written down here: no generator of random numbers made them."""
    made = GPT().eval()
    _write(made.parameters(), 37, 101, 64)
    return made


def write(folder: Path) -> None:
    """Writes a golden delta of every method."""
    for method in METHODS:
        base = model()
        with seeded():  # what isn't trained may be drawn, and is in the file
            delta = pl.attach(base, method, "golden")
        _write(delta.parameters(), 29, 89, 256)
        path = folder / f"{type(method).__name__}.safetensors"
        pl.save(delta, path, notes={"output": output(base).tolist()})


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
    tally.check(pl.__version__ in releases, f"none of {pl.__version__}: python -m tests.golden")
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

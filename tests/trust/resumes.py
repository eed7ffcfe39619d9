"""R6: a run that goes on with anything else than it began with ends to the bit, or is refused."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import peftlite as pl
from peftlite.demo.gpt import GPT
from peftlite.train import checkpoints
from tests.train.test_trainer import Stop
from tests.train.tiny import trainer, values
from tests.trust.tally import Tally, difference, state

NAMES = ("sql", "chat", "law")
METHODS = {
    "as it was": {},
    "alpha": {"alpha": 16},
    "scaling": {"scaling": "rslora"},
    "dropout": {"dropout": 0.2},
    "rank": {"rank": 3},
    "init": {"init": "gaussian"},
    "targets": {"targets": "q_proj"},
    "exclude": {"exclude": "v_proj"},
    "freeze_a": {"freeze_a": True},
    "dtype": {"dtype": torch.float64},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "the same": partial(torch.optim.AdamW, fused=True),
    "reversed": lambda groups: torch.optim.AdamW(
        [{**group, "params": group["params"][::-1]} for group in groups], fused=True
    ),
    "in other groups": lambda groups: torch.optim.AdamW(groups[::-1], fused=True),
    "betas": partial(torch.optim.AdamW, fused=True, betas=(0.8, 0.9)),
    "amsgrad": partial(torch.optim.AdamW, fused=True, amsgrad=True),
    "another": torch.optim.SGD,
}


def model(
    attached: Sequence[str] = NAMES, chosen: Sequence[str] = NAMES, ranks: Any = (2, 2, 3),
    **options: Any,
) -> nn.Module:  # fmt: skip
    torch.manual_seed(0)
    made = GPT(16, 1, 2)
    for name in attached:
        own = {"rank": ranks[NAMES.index(name)], "alpha": 8, "targets": ["q_proj", "v_proj"]}
        torch.manual_seed(NAMES.index(name))
        pl.attach(made, pl.LoRA(**{**own, **options}), name)
    pl.use(made, chosen)
    return made


def r6(most: int) -> Tally:
    """Resumes with orders, methods and optimizers changed, and with damaged moments."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        _orders(tally, Path(folder), most)
        _changes(tally, Path(folder))
        _moments(tally, Path(folder))
    return tally


def _went_on(
    tally: Tally, whole: nn.Module, begun: Path, again: nn.Module, what: str, **how: Any
) -> bool:
    """Goes on with a copy of a run, to the bit of the whole one or not at all; whether it did."""
    before = state(again)
    try:
        trainer(again, begun, **how).fit(resume=True)
    except pl.PeftliteError:
        odd = difference(before, state(again))
        tally.check(not odd, f"{what}: refused, and {odd} differs")
        return False
    pairs = ((values(whole, name), values(again, name)) for name in pl.deltas(whole))
    same = all(torch.equal(a[key], b[key]) for a, b in pairs for key in {**a, **b})
    tally.check(same, f"{what}: went on to another end")
    return True


def _begun(folder: Path, how: dict[str, Any], **options: Any) -> nn.Module:
    """A run that was broken off in a folder, and the model of one that wasn't."""
    whole = model(**options)
    trainer(whole, **how).fit()
    trainer(model(**options), folder, callbacks=[Stop(4)], **how).fit()
    return whole


def _orders(tally: Tally, folder: Path, most: int) -> None:
    """However deltas were attached and chosen the second time, those of equal rank among them."""
    how = {"epochs": 2, "save_every": 1}
    whole = _begun(folder / "orders", how)
    orders = itertools.permutations(NAMES)
    pairs = itertools.islice(itertools.product(orders, list(itertools.permutations(NAMES))), most)
    for number, (attached, chosen) in enumerate(pairs):
        copy = _copied(folder / "orders", folder / f"orders-{number}")
        what = f"attached {attached}, chosen {chosen}"
        went = _went_on(tally, whole, copy, model(attached, chosen), what, **how)
        tally.check(went == (chosen == NAMES), f"{what}: {'went on' if went else 'was refused'}")


def _changes(tally: Tally, folder: Path) -> None:
    """Every setting of a method, and every other optimizer."""
    one: dict[str, Any] = {"attached": NAMES[:1], "chosen": NAMES[:1]}
    whole = _begun(folder / "methods", {"epochs": 2}, **one)
    for what, options in METHODS.items():
        copy = _copied(folder / "methods", folder / f"methods-{what}")
        went = _went_on(tally, whole, copy, model(**one, **options), what, epochs=2)
        tally.check(went == (not options), f"{what}: {'went on' if went else 'was refused'}")
    for what, optimizer in OPTIMIZERS.items():
        copy = _copied(folder / "methods", folder / f"optimizers-{what}")
        _went_on(
            tally, whole, copy, model(**one), f"{what} optimizer", epochs=2, optimizer=optimizer
        )


def _moments(tally: Tally, folder: Path) -> None:
    """Moments of another shape, in a checkpoint that is whole as far as its manifest says."""
    one: dict[str, Any] = {"attached": NAMES[:1], "chosen": NAMES[:1]}
    begun = folder / "methods"
    for number, change in enumerate((lambda t: t[:1], lambda t: t.flatten(), lambda t: t.mT)):
        copy = _copied(begun, folder / f"moments-{number}")
        newest = sorted(copy.glob("step-*"))[-1]
        file = newest / f"{checkpoints.STATE}.safetensors"
        tensors = safetensors.torch.load_file(file)
        for key, tensor in tensors.items():
            if "exp_avg" in key and tensor.dim() > 1:
                tensors[key] = change(tensor).contiguous()
        safetensors.torch.save_file(tensors, file)
        (newest / checkpoints.MANIFEST).write_text(checkpoints._manifest(newest))
        again = model(**one)
        before, going_on = state(again), trainer(again, copy, epochs=2)
        tally.refused(partial(going_on.fit, resume=True), f"moment {number}")
        tally.check(not difference(before, state(again)), f"moment {number}: the model differs")


def _copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to

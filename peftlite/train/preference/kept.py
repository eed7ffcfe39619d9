"""Kept: log π₀ of a dataset's answers, computed once, so that a step runs the policy alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.find import find
from peftlite.errors import PeftliteError
from peftlite.progress import bar
from peftlite.table import short
from peftlite.train.data.checks import check_counts
from peftlite.train.data.dataset import Data
from peftlite.train.data.padding import collate
from peftlite.train.data.rated import SIDES
from peftlite.train.modes import without_dropout
from peftlite.train.preference.told import tell
from peftlite.verbs.use import Choosable, using


@dataclass(eq=False, repr=False)
class Kept(Data):
    """Data whose examples have log π₀ of each token as `reference`; so do its slices and parts."""

    references: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)

    def _made(self, pick: int, row: Any) -> Any:
        example, own = super()._made(pick, row), self.references[pick]
        if len(own) == 1:
            return {**example, "reference": own[0]}
        sides = zip(SIDES, own, strict=True)
        return {**example, **{side: {**example[side], "reference": x} for side, x in sides}}


@torch.no_grad()
def keep_reference(
    model: nn.Module,
    data: Data,
    reference: Choosable = None,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> Data:
    """The same data, each example with log π₀ of its tokens, which the losses then go by.

    A step of `dpo` runs the policy alone, so it costs about half; the reference runs here, once for
    all epochs, rates and seeds. What a loss gives is the same to rounding. Four bytes a token.

    Args:
        model: with or without deltas; nothing is dropped out.
        data: of `pl.data.preference` or `pl.data.ratings`, not augmented.
        reference: the frozen delta that is π₀, several, or None for the base. The loss names none.
        batch_size: examples at a time.
        progress: whether to show a bar.

    Raises:
        PeftliteError: the data isn't such, an argument isn't of these, or there is no such delta.

    Example:
        pairs = pl.data.preference([{"prompt": "1 + 2 = ", "chosen": "3", "rejected": "4"}])
        model = nn.Sequential(nn.Embedding(264, 4), nn.Linear(4, 4), nn.Linear(4, 264))
        kept = pl.keep_reference(model, pairs, progress=False)
        assert kept[0]["chosen"]["reference"].shape == kept[0]["chosen"]["labels"].shape
    """
    check_counts(batch_size=batch_size)
    if not isinstance(data, Data) or data._augmentations:
        raise PeftliteError(
            "what is kept is of answers that stay as they are, as pl.data.preference and "
            f"pl.data.ratings have them: not of {short(data)}"
            + (" that is augmented" if isinstance(data, Data) else "")
        )
    parts = [range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
    found: dict[int, Sequence[Tensor]] = {}
    with without_dropout(model), using(model, reference) if find(model) else nullcontext():
        for part in bar(parts, "the reference", disable=not progress):
            examples = [data[i] for i in part]
            picks = [data.picks[i] for i in part]
            found |= dict(zip(picks, zip(*_sides(model, examples), strict=True), strict=True))
    own = {f.name: getattr(data, f.name) for f in fields(Data) if f.name != "_cache"}
    return Kept(**own, references=found)


def _sides(model: nn.Module, examples: Sequence[Any]) -> Iterator[list[Tensor]]:
    """log π of every answer, each (t): of a pair of those chosen, and of those rejected."""
    device = next(model.parameters()).device
    batch = {k: x.to(device) for k, x in collate(examples).items()}
    logps = F.pad(tell(model, batch).logps, (1, 0)).cpu()
    for i, rows in enumerate(logps.split(len(examples))):
        own = [e if "input_ids" in e else e[SIDES[i]] for e in examples]
        yield [x[: len(e["input_ids"])].clone() for x, e in zip(rows, own, strict=True)]

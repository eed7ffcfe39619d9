"""LTSFT: W' = W + D, with D zero but where full fine-tuning moved the weights the most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from peftlite.fields import number
from peftlite.methods.search import SearchMethod, SearchPatch


class LTSFTPatch(SearchPatch):
    """W' = W + D: all of D is `values` at first, then its entries that moved most, from zero."""

    def fix(self, indices: Tensor) -> None:
        super().fix(indices)
        self.values.zero_()  # the lottery ticket's rewind


@dataclass(frozen=True)
class LTSFT(SearchMethod):
    """W' = W + D, with D zero but where full fine-tuning moved the weights the most.

    Lottery-ticket sparse fine-tuning, Ansell et al., arXiv:2110.07560, §3: D (o, i) is dense at
    first; after `steps` calls of `delta.step()` the entries with the largest |D|, of all sites
    taken together, are kept, everything goes back to zero, and from then on only those train. By
    default it takes every weight of a linear map but the output head's; deltas compose by being
    added up.

    Training needs the memory of full fine-tuning in both phases, since its parameters stay the
    ones that the optimizer holds. The file has the kept entries alone, and so has memory once it is
    loaded. The authors begin the second phase with a new optimizer and schedule; an optimizer that
    goes on begins it with the moments of the first.

    Args:
        steps: of the first phase. The authors make both phases equally long.
        fraction: of the entries that are kept; the authors' code takes 0.01.
    """

    fraction: float = number(0.01, float, lambda f: 0 < f <= 1, "above 0 and at most 1")

    patch: ClassVar[type[LTSFTPatch]] = LTSFTPatch

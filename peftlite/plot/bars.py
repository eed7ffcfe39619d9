"""Bars: what a bank's deltas were asked for, and whether they were there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftlite.plot.drawing import COLOURS, axes, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from peftlite.bank import DeltaBank

MOST = 24
"""Deltas that have bars of their own; the others are summed."""


def bank(bank: DeltaBank, ax: Axes | None = None) -> Axes:
    """How often each delta of a bank was in a slot when a batch named it, came in, and left.

    Hits and misses stand end to end, so that a bar is as long as its delta was named often; what
    was named most is at the top.

    Args:
        ax: matplotlib's axes to draw into; new ones if None.

    Raises PeftliteError if matplotlib isn't installed.

    Example:
        bank = pl.DeltaBank(nn.Linear(8, 4), slots=1, max_rank=4)
        for name in ("sql", "chat"):
            bank.load(name, pl.LoRA(rank=4))
            with bank.use(name):
                bank.model(torch.randn(2, 8))
        ax = pl.plot.bank(bank)
    """
    counts = bank.counts
    named = {name: hits + counts.misses[name] for name, hits in counts.hits.items()}
    names = sorted(named, key=lambda name: -named[name])
    groups = {name: [name] for name in names[:MOST]}
    if rest := names[MOST:]:
        groups[f"{len(rest)} others"] = rest
    ax = axes(ax, 6, 1.2 + 0.3 * len(groups))

    sums = {
        what: [sum(values[name] for name in group) for group in groups.values()]
        for what, values in vars(counts).items()
    }
    at = [*range(len(groups))]
    ax.barh(at, sums["hits"], 0.5, label="hits", color=COLOURS[0])
    ax.barh(at, sums["misses"], 0.5, sums["hits"], label="misses", color=COLOURS[1])
    beneath = [y + 0.35 for y in at]
    ax.barh(beneath, sums["evictions"], 0.2, label="evictions", color=COLOURS[3])
    ax.set_yticks(at, [*groups])
    ax.invert_yaxis()
    ax.set_xlabel("times")
    ax.set_title(counts._summary())
    legend(ax)
    return ax

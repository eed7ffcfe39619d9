"""Curves: the losses of a training run, and what it scored, over its steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from peftlite.plot.drawing import axes, legend, panels, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"train": "training", "valid": "validation, one batch", "full_valid": "validation"}
Points = Sequence[tuple[int, float]]


class Run(Protocol):
    """What `pl.Trainer.fit` gives: a `pl.History`."""

    @property
    def curves(self) -> Mapping[str, Points]: ...


def history(history: Run, ax: Axes | None = None) -> Axes:
    """The losses of training and validation over the steps; below them accuracies, and probes.

    Args:
        history: as `pl.Trainer(...).fit()` gives it.
        ax: matplotlib's axes to draw into, whose lower part the others take; new ones if None.

    Raises PeftliteError if matplotlib isn't installed.

    Example:
        model, data = nn.Linear(4, 3), [(torch.randn(4), i % 3) for i in range(30)]
        pl.attach(model, pl.LoRA(rank=2, targets="weight"))
        trainer = pl.Trainer(model, pl.losses.classification, data[6:], data[:6], progress=False)
        ax = pl.plot.history(trainer.fit())
        ax.figure.savefig("history.png")
    """
    groups: dict[str, dict[str, Points]] = {"loss": {}, "accuracy": {}, "score": {}}
    for name, points in history.curves.items():
        what = next((what for what in groups if name.endswith(f"_{what}")), "score")
        groups[what][name] = points
    shown = {what: curves for what, curves in groups.items() if curves or what == "loss"}
    ax = axes(ax, 7, 2 + 1.5 * len(shown))
    drawn = panels(ax, [2, 1, 1][: len(shown)])
    for panel, (what, curves) in zip(drawn, shown.items(), strict=True):
        _draw(panel, curves)
        panel.set_ylabel(what)
    drawn[-1].set_xlabel("step")
    return ax


def _draw(ax: Axes, curves: Mapping[str, Points]) -> None:
    most = max((len(points) for points in curves.values()), default=0)
    for (name, points), style in zip(curves.items(), styles(), strict=False):
        # what is measured at every step is a thin line, and what is rare has marks
        often = len(points) > max(most / 2, 20)
        look = {"color": style["color"], "linewidth": 1} if often else style
        ax.plot(*zip(*points, strict=True), label=_named(name), **look)
    if curves:
        legend(ax, beside=True)


def _named(curve: str) -> str:
    """What a curve is called in a legend: by whose it is, since its axis says what it is."""
    return NAMES.get(re.sub("_(loss|mean_token_accuracy|accuracy)$", "", curve), curve)

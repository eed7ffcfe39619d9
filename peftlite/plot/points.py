"""Points: what methods reach, and how many parameters they take for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftlite.errors import PeftliteError
from peftlite.plot.drawing import COLOURS, axes, ink
from peftlite.table import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def quality(
    results: Mapping[str, tuple[Any, float]],
    ax: Axes | None = None,
    *,
    metric: str = "quality",
    lower: bool = False,
) -> Axes:
    """What each of several methods reaches over the parameters that it trains.

    A line joins those that nothing smaller, or as small, beats.

    Args:
        results: by name, the parameters (a number, or a delta or plan, which has it) and the score.
        ax: matplotlib's axes to draw into; new ones if None.
        metric: what the score is called.
        lower: whether a lower score is better, as of a loss.

    Raises PeftliteError if the results aren't such, or matplotlib isn't installed.

    Example:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        results = {
            "LoRA": (pl.plan(model, pl.LoRA(rank=2)), 0.91),
            "BitFit": (pl.plan(model, pl.BitFit()), 0.84),
        }
        ax = pl.plot.quality(results, metric="accuracy")
    """
    points = _points(results)
    ax = axes(ax, 6, 4)
    best = _front(points, lower)
    ax.step(*zip(*[points[name] for name in best], strict=True), where="post", color=COLOURS[0],
            linestyle="--", linewidth=1)  # fmt: skip
    for name, (count, score) in points.items():
        ax.plot(count, score, "o", color=COLOURS[0 if name in best else 1])
    ax.set_xscale("log")
    ax.margins(x=0.15, y=0.12)
    ax.set_xlabel("parameters trained")
    ax.set_ylabel(f"{metric}, {'lower' if lower else 'higher'} is better")
    ax.grid(alpha=0.3)
    _label(ax, points)
    return ax


def _label(ax: Axes, points: Mapping[str, tuple[int, float]]) -> None:
    """Names points, each on the side where it hides no other's name and no point."""
    ax.figure.draw_without_rendering()  # for where in the figure they are
    taken = [_around(ax, at) for at in points.values()]
    for name, at in points.items():
        sides = [_named(ax, name, at, *side) for side in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
        hidden = [side.get_window_extent().count_overlaps(taken) for side in sides]
        best = sides[hidden.index(min(hidden))]
        for side in sides:
            if side is not best:
                side.remove()
        taken.append(best.get_window_extent())


def _named(ax: Axes, name: str, at: tuple[int, float], across: int, up: int) -> Any:
    return ax.annotate(
        name, at, (6 * across, 5 * up), textcoords="offset points", color=ink(ax),
        ha="left" if across > 0 else "right", va="bottom" if up > 0 else "top",
    )  # fmt: skip


def _around(ax: Axes, at: tuple[int, float]) -> Any:
    """The box of a point's mark in the figure, in pixels."""
    from matplotlib.transforms import Bbox

    x, y = ax.transData.transform(at)
    return Bbox.from_bounds(x - 4, y - 4, 8, 8)


def _points(results: Any) -> dict[str, tuple[int, float]]:
    """The parameters and the score of each. Raises PeftliteError."""
    try:
        return {
            str(name): (int(getattr(size, "num_parameters", size)), float(score))
            for name, (size, score) in results.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise PeftliteError(
            "quality takes by name the parameters, or a delta that has them, and a score, such as "
            f"{{'LoRA': (delta, 0.9), 'BitFit': (1024, 0.8)}}: not {short(results)}"
        ) from error


def _front(points: Mapping[str, tuple[int, float]], lower: bool) -> list[str]:
    """Those that nothing as small or smaller beats, from the smallest up."""
    sign = 1 if lower else -1
    order = sorted(points, key=lambda name: (points[name][0], sign * points[name][1]))
    best: list[str] = []
    for name in order:
        if not best or sign * points[name][1] < sign * points[best[-1]][1]:
            best.append(name)
    return best

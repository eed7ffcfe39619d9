"""Drawing: the axes of a plot, its colours and its legend; an error where matplotlib is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, product
from typing import TYPE_CHECKING, Any

from peftlite.errors import PeftliteError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of Okabe and Ito's colours those that show on white and on black; marks and dashes do the rest
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKS = "osD^vPX*"
DASHES = ("-", "--", ":")


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes to draw into: those given, or those of a new figure of so many inches."""
    try:
        from peftlite.plot.picture import picture
    except ImportError as error:
        raise PeftliteError(
            'pl.plot draws with matplotlib, which isn\'t installed: pip install "peftlite[plot]"'
        ) from error
    ax = picture(width, height) if ax is None else ax
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def panels(ax: Axes, heights: Sequence[float]) -> list[Axes]:
    """Axes, and others cut from their lower part, of these heights and with the same x axis."""
    spec, box = ax.get_subplotspec(), ax.get_position()
    if spec is None:
        edges = {"left": box.x0, "right": box.x1, "bottom": box.y0, "top": box.y1}
        spec = ax.figure.add_gridspec(1, 1, **edges)[0]
    grid = spec.subgridspec(len(heights), 1, height_ratios=heights, hspace=0.1)
    ax.set_subplotspec(grid[0])
    others = [ax.figure.add_subplot(grid[i], sharex=ax) for i in range(1, len(heights))]
    for panel in (found := [ax, *others]):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
        panel.tick_params(labelbottom=panel is found[-1])
    return found


def styles() -> Iterator[dict[str, Any]]:
    """How each of several lines looks: no two alike in colour and mark and dashes."""
    for dashes, i in cycle(product(DASHES, range(len(COLOURS)))):
        mark = MARKS[(i + len(COLOURS) * DASHES.index(dashes)) % len(MARKS)]
        yield {"color": COLOURS[i], "marker": mark, "linestyle": dashes}


def legend(ax: Axes, beside: bool = False, **options: Any) -> None:
    """Says what the lines of axes are, in the colour of their labels; among them or beside."""
    where = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {}
    ax.legend(frameon=False, labelcolor=ink(ax), **where, **options)


def ink(ax: Axes) -> Any:
    """The colour of the text of axes, which their style gave them."""
    return ax.xaxis.label.get_color()

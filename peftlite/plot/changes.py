"""Changes: how large a delta's change of each weight is, and how alike several deltas are."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from peftlite.core.delta import Delta
from peftlite.errors import PeftliteError
from peftlite.plot.drawing import axes, ink, legend, panels, styles
from peftlite.table import short
from peftlite.verbs.measure import cosines, sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def change(delta: Delta, ax: Axes | None = None) -> Axes:
    """‖ΔW‖ of each weight, layer by layer, and below it the effective rank of ΔW.

    The norm is Frobenius's, and the effective rank exp(−Σ pₖ ln pₖ) with pₖ = σₖ / Σ σ, where σ are
    the singular values of ΔW (o, i): how many directions it really changes, between 1 and its rank.
    Both come of the factors where ΔW = s·BA has them, and W' is never formed. Where there are
    several of a kind in a layer, as experts are, it is their mean; vectors have no rank here.
    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Args:
        ax: matplotlib's axes to draw into; new ones if None.

    Raises PeftliteError if the delta changes calls, is on no model, or matplotlib isn't installed.

    Example:
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        delta = pl.attach(model, pl.LoRA(rank=4, targets="weight"), name="sql")
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
        ax = pl.plot.change(delta)
    """
    found = sizes(delta)
    layers = [*dict.fromkeys(map(_layer, found))]
    norms = _by_kind({address: each.norm for address, each in found.items()})
    ranks = _by_kind({a: each.rank for a, each in found.items() if each.rank is not None})
    shown = {"‖ΔW‖": norms, **({"effective rank": ranks} if ranks else {})}
    alone, ax = ax is None, axes(ax, 8, 5)
    looks = dict(zip(norms, styles(), strict=False))
    drawn = panels(ax, [1] * len(shown))
    for panel, (what, values) in zip(drawn, shown.items(), strict=True):
        for kind, means in values.items():
            panel.plot(*_line(means, layers), label=kind, **looks[kind])
        panel.set_ylabel(what)
        panel.set_ylim(bottom=0)
    _name_layers(drawn[-1], layers)
    if alone:  # beside all panels, else it takes its height of the first
        handles = ax.get_legend_handles_labels()
        ax.figure.legend(*handles, loc="outside right upper", frameon=False, labelcolor=ink(ax))
    else:
        legend(ax)
    ax.set_title(f"delta {delta.name!r}", loc="left")
    return ax


def _by_kind(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The means of what is of one kind in one layer, by kind and by layer."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for address, value in values.items():
        layer = _layer(address)
        kind = re.sub(r"\b\d+\b", "*", address[len(layer) :].lstrip("."))
        found[kind][layer].append(value)
    return {
        kind: {layer: sum(own) / len(own) for layer, own in layers.items()}
        for kind, layers in found.items()
    }


def _layer(address: str) -> str:
    """The layer that a site is in: its address up to the first number, or else its module."""
    found = re.match(r"(.*?\.)?\d+(?=\.)", address)
    return found[0] if found else address.rpartition(".")[0]


def _stem(layer: str) -> str:
    """What numbered layers that follow one another have in common; of another one, all of it."""
    stem, _, number = layer.rpartition(".")
    return stem if number.isdigit() else f"{layer}."


def _line(means: Mapping[str, float], layers: Sequence[str]) -> tuple[list[int], list[float]]:
    """The points of a line, which is broken where another stem begins."""
    xs, ys = [], []
    for _, run in groupby(means, _stem):
        points = [(layers.index(layer), means[layer]) for layer in run]
        xs += [*(x for x, _ in points), points[-1][0]]
        ys += [*(y for _, y in points), math.nan]
    return xs[:-1], ys[:-1]


def _name_layers(ax: Axes, layers: Sequence[str]) -> None:
    """Layers under the x axis, as many as fit: numbered ones by number, but for the first."""
    stems = [_stem(layer) for layer in layers]
    names = [
        layer.rpartition(".")[2] if i and stems[i] == stems[i - 1] else layer or "model"
        for i, layer in enumerate(layers)
    ]
    shown = range(0, len(names), -(-len(names) // 24))
    ax.set_xticks([*shown], [names[i] for i in shown])
    if any(len(names[i]) > 3 for i in shown):
        ax.tick_params(axis="x", labelrotation=30 if len(shown) < 8 else 90)


def similarity(deltas: Mapping[str, Delta] | Iterable[Delta], ax: Axes | None = None) -> Axes:
    """cos(ΔWᵢ, ΔWⱼ) = ⟨ΔWᵢ, ΔWⱼ⟩ / ‖ΔWᵢ‖‖ΔWⱼ‖ of deltas of one model, as a heat map.

    All weights count together. 1 is the same direction, 0 none in common, -1 the opposite; what
    changes nothing has none. Of factors it is computed without forming ΔW.

    Args:
        deltas: such as `pl.deltas(model)` gives, or a list of them.
        ax: matplotlib's axes to draw into; new ones if None.

    Raises PeftliteError if a delta changes calls, they aren't of one model, or matplotlib isn't
    installed.

    Example:
        model = nn.Linear(8, 8)
        for name in ("sql", "chat"):
            delta = pl.attach(model, pl.LoRA(rank=4, targets="weight"), name)
            nn.init.normal_(next(delta.parameters()))
        ax = pl.plot.similarity(pl.deltas(model))
    """
    given = [*(deltas.values() if isinstance(deltas, Mapping) else deltas)]
    if not given or not all(isinstance(delta, Delta) for delta in given):
        raise PeftliteError(
            f"similarity takes deltas, such as pl.deltas(model) gives: not {short(deltas)}"
        )
    values = cosines(given).numpy()
    ax = axes(ax, 1.8 + 0.7 * len(given), 1 + 0.6 * len(given))
    ax.spines[:].set_visible(False)
    image = ax.imshow(values, vmin=-1, vmax=1, cmap="PuOr")
    for (i, j), value in np.ndenumerate(values):
        # the map is dark at its ends and light in the middle, whatever the style
        dark = abs(value) > 0.6
        text = "–" if np.isnan(value) else f"{value:.2f}"
        ax.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    names = [delta.name for delta in given]
    ax.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 6 else 0)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.figure.colorbar(image, ax=ax, label="cosine")
    return ax

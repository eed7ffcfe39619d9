"""The results: a row for every method and task in a CSV file, and a picture of the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, write_csv
from scipy.stats import t as student

from .methods import ALL, FROZEN, KINDS, METHODS, USUAL
from .sweep import ABOUT, SEEDS, Line, Record
from .task import Task

Cells = dict[str, Any]

SPREAD = ("quality", "loss", "own_loss")  # with a standard deviation over the seeds
MEANS = ("file_bytes", "step_bytes")
EVEN = 0.1  # of the gap: what counts as no difference
COLUMNS = (
    "task", "method", "kind", "parameters",
    "gap_closed", "gap_low", "gap_high", "beside_full", "beside_lora",
    *(column for name in SPREAD for column in (name, f"{name}_sd")),
    "forgetting", *MEANS, "rate", "rate_at_edge", "seeds", "error",
)  # fmt: skip


def summary(record: Record, tasks: Sequence[type[Task]]) -> list[Cells]:
    """A row for every method that was run on a task, with means over the seeds that count."""
    return [row for task in tasks for row in _of_task(record, task)]


def _of_task(record: Record, task: type[Task]) -> list[Cells]:
    rows = []
    for method in METHODS:
        lines = _latest(record, task, method.name)
        cells: Cells = {"task": task.name, "method": method.name, "kind": method.kind}
        if final := _tested(lines):
            cells |= _means(final) | {"rate_at_edge": _at_edge(lines)}
            of = [_ends(record, task, final, name) for name in (FROZEN, ALL, USUAL)]
            if of[0]:
                cells["forgetting"] = cells["own_loss"] - float(of[0][0]["own_loss"])
            if method.trains and (gaps := _gaps(final, *of[:2])):
                cells |= _compared(gaps, _gaps(of[2], *of[:2]), cells["rate_at_edge"] != "")
        elif refused := [line for line in lines if line["error"]]:
            cells |= {name: refused[-1][name] for name in ("error", *ABOUT)}
        else:
            continue  # not run, or not to the end
        rows.append(cells)
    return rows


def _latest(record: Record, task: type[Task], method: str, **of: str) -> list[Line]:
    """The runs of a method as it is now, or was when it last ran, on the base that it ran on."""
    lines = record.find(task=task.name, method=method, **of)
    last = lines[-1] if lines else {}
    return [line for line in lines if all(line[k] == last[k] for k in ("key", "base"))]


def _tested(lines: Sequence[Line]) -> list[Line]:
    """The runs that count, at the rate that is best on the validation split."""
    tried = {line["rate"]: float(line["validation"]) for line in lines if not _counts(line)}
    known = {rate: loss for rate, loss in tried.items() if not math.isnan(loss)}
    best = min(known, key=known.__getitem__, default=None)
    return [line for line in lines if _counts(line) and best in (None, line["rate"])]


def _counts(line: Line) -> bool:
    return int(line["seed"]) in SEEDS


def _means(lines: Sequence[Line]) -> Cells:
    cells: Cells = {"parameters": int(lines[0]["parameters"]), "rate": float(lines[0]["rate"])}
    for name in SPREAD:
        cells |= _spread(name, [float(line[name]) for line in lines])
    for name in MEANS:
        cells[name] = float(np.mean([float(line[name]) for line in lines]))
    for name in ABOUT:
        cells[name] = " ".join(dict.fromkeys(line[name] for line in lines))
    return {**cells, "seeds": len(lines)}


def _at_edge(lines: Sequence[Line]) -> str:
    """Which end of the rates that were tried the chosen one is, if any: a better may lie beyond."""
    tried = {float(line["rate"]) for line in lines if not _counts(line)}
    rate = float(_tested(lines)[0]["rate"])
    if len(tried) < 2 or min(tried) < rate < max(tried):
        return ""
    return "low" if rate == min(tried) else "high"


def _spread(name: str, values: Sequence[float]) -> Cells:
    # not of the statistics module, whose own fails where a run has diverged to nan
    sd = {f"{name}_sd": float(np.std(values, ddof=1))} if len(values) > 1 else {}
    return {name: float(np.mean(values)), **sd}


def _ends(record: Record, task: type[Task], lines: Sequence[Line], method: str) -> list[Line]:
    """The runs that count of another method, on the base that some lines are of."""
    return _tested(_latest(record, task, method, base=lines[0]["base"]))


def _gaps(lines: Sequence[Line], frozen: Sequence[Line], full: Sequence[Line]) -> dict[str, float]:
    """How much of the way from the frozen base to full fine-tuning each seed goes in quality.

    A seed draws the same batches for all, so what is left of the spread is the method's own. One
    on which full fine-tuning changes nothing has no way to go, and is left out.
    """
    ends = {line["seed"]: float(line["quality"]) for line in full if frozen}
    start = float(frozen[0]["quality"]) if frozen else math.nan
    return {
        line["seed"]: (float(line["quality"]) - start) / (ends[line["seed"]] - start)
        for line in lines
        if line["seed"] in ends and ends[line["seed"]] != start
    }


def _compared(gaps: dict[str, float], usual: dict[str, float], at_edge: bool) -> Cells:
    """The mean, its interval, and a word beside full fine-tuning and the usual method."""
    low, high = interval([*gaps.values()])
    beside = ({seed: 1.0 for seed in gaps}, usual)
    words = [
        _verdict([gaps[s] - other[s] for s in gaps if s in other], at_edge) for other in beside
    ]
    mean = float(np.mean([*gaps.values()]))
    cells = {"gap_closed": mean, "gap_low": low, "gap_high": high}
    return cells | dict(zip(("beside_full", "beside_lora"), words, strict=True))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's, around the mean, which is right 95 times of 100."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _verdict(differences: Sequence[float], at_edge: bool) -> str:
    """Of shares of the gap; "open" if the interval allows no word, or another rate may do more."""
    low, high = interval(differences)
    if -EVEN <= low and high <= EVEN:
        return "even"
    return "ahead" if low > 0 else "behind" if high < 0 and not at_edge else "open"


def write(path: Path, rows: Sequence[Cells], versions: Mapping[str, str]) -> None:
    about = machine() | versions
    short = ({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_csv(path, [*COLUMNS, *about], ({**about, **row} for row in short))


def plot(folder: Path, rows: Sequence[Cells], tasks: Sequence[type[Task]]) -> None:
    """What of the gap each method closes, with its interval: a panel for each task; twice."""
    import matplotlib.style

    for look, style in {"light": "default", "dark": "dark_background"}.items():
        with matplotlib.style.context([style, {"font.size": 8}]):
            _panels(rows, tasks).savefig(folder / f"which-{look}.png", dpi=110, transparent=True)


def _panels(rows: Sequence[Cells], tasks: Sequence[type[Task]]) -> Any:
    from matplotlib.figure import Figure

    closed = [row for row in rows if "gap_closed" in row and row["method"] != ALL]
    means: dict[str, list[float]] = {}
    for row in closed:
        means.setdefault(row["method"], []).append(row["gap_closed"])
    order = sorted(means, key=lambda method: max(-1.0, float(np.mean(means[method]))))
    figure = Figure((9, 0.17 * len(order) + 1), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        mine = [row for row in closed if row["task"] == task.name]
        _dots(panel, mine, order)
        panel.set(title=task.name, xlim=(-0.25, 1.5), ylim=(-1, len(order)))
    panels[0].set_yticks(range(len(order)), order)
    figure.supxlabel("of the gap between the frozen base and full fine-tuning", fontsize=8)
    used = [kind for kind in KINDS if any(row["kind"] == kind for row in closed)]
    marks = [panels[0].plot([], [], "o", color=_colour(kind))[0] for kind in used]
    figure.legend(marks, used, loc="outside upper center", ncols=len(used), frameon=False)
    return figure


def _dots(panel: Any, rows: Sequence[Cells], order: Sequence[str]) -> None:
    panel.axvline(1, color="gray", linewidth=0.8)
    panel.grid(axis="y", alpha=0.25, linewidth=0.5)
    for row in rows:
        y, (low, high) = order.index(row["method"]), (row["gap_low"], row["gap_high"])
        style = {
            "color": _colour(row["kind"]),
            "fillstyle": "none" if row["rate_at_edge"] else None,
        }
        panel.plot([low, high], [y, y], color=style["color"], linewidth=0.8)
        panel.plot(max(-0.2, row["gap_closed"]), y, "<" if row["gap_closed"] < -0.2 else "o",
                   markersize=4, **style)  # fmt: skip


def _colour(kind: str) -> str:
    return f"C{KINDS.index(kind) - 1}"

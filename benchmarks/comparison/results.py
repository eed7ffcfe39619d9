"""The results: a row for every method and task in a CSV file, and a plot of the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, write_csv
from scipy.stats import t as student

from .methods import ALL, BASE, FROZEN, KINDS, METHODS
from .sweep import ABOUT, SEEDS, Line, Record
from .task import Task

Cells = dict[str, Any]

DPI = 80

SPREAD = ("quality", "loss", "own_loss")  # with a standard deviation over the seeds
MEANS = ("file_bytes", "step_bytes")
EVEN = 0.1  # of the gap: what counts as no difference
COLUMNS = (
    "task", "method", "kind", "parameters", "gap_closed", "gap_low", "gap_high", "verdict",
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
            of_base = {"base": final[0]["base"]}
            ends = (_latest(record, task, name, **of_base) for name in (FROZEN, ALL))
            frozen, full = map(_tested, ends)
            if frozen:
                cells["forgetting"] = cells["own_loss"] - float(frozen[0]["own_loss"])
            if method.trains and (gaps := list(_gaps(final, frozen, full))):
                cells |= _interval(gaps, cells["rate_at_edge"] != "")
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


def _interval(gaps: Sequence[float], at_edge: bool) -> Cells:
    """The mean, Student's interval around it that is right 95 times of 100, and what it says."""
    mean, n = float(np.mean(gaps)), len(gaps)
    if n < 2:
        return {"gap_closed": mean}
    half = float(student.ppf(0.975, n - 1) * np.std(gaps, ddof=1) / math.sqrt(n))
    low, high = mean - half, mean + half
    verdict = _verdict(low, math.inf if at_edge else high)  # another rate may reach more
    return {"gap_closed": mean, "gap_low": low, "gap_high": high, "verdict": verdict}


def _verdict(low: float, high: float) -> str:
    """Beside full fine-tuning; "open" where the interval allows no word."""
    if 1 - EVEN <= low and high <= 1 + EVEN:
        return "even"
    return "ahead" if low > 1 else "behind" if high < 1 else "open"


def _gaps(lines: Sequence[Line], frozen: Sequence[Line], full: Sequence[Line]) -> Iterator[float]:
    """How much of the way from the frozen base to full fine-tuning each seed goes in quality.

    A seed draws the same batches for all, so what is left of the spread is the method's own.
    """
    ends = {line["seed"]: float(line["quality"]) for line in full}
    for line in lines:
        if frozen and line["seed"] in ends:
            start, quality = float(frozen[0]["quality"]), float(line["quality"])
            yield (quality - start) / (ends[line["seed"]] - start)


def write(path: Path, rows: Sequence[Cells], versions: Mapping[str, str]) -> None:
    about = machine() | versions
    short = ({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_csv(path, [*COLUMNS, *about], ({**about, **row} for row in short))


def plot(path: Path, rows: Sequence[Cells], tasks: Sequence[type[Task]]) -> None:
    """Quality against trainable parameters: a panel for each task, up is better."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    size = (12, 6 * len(tasks))
    figure, panels = plt.subplots(len(tasks), figsize=size, dpi=DPI, squeeze=False)
    for panel, task in zip(panels[:, 0], tasks, strict=True):
        shown = _shown(rows, task)
        panel.set(xscale="log", title=task.name, xlabel="trainable parameters", ylabel=task.quality)
        panel.grid(alpha=0.3)
        for kind, colour in zip(KINDS, plt.cm.tab10.colors, strict=False):
            _points(panel, [row for row in shown if row["kind"] == kind], kind, colour)
        if task.less_is_better:
            panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    for panel, task in zip(panels[:, 0], tasks, strict=True):
        _label(panel, [row for row in _shown(rows, task) if row["kind"] != BASE])
    figure.savefig(path)
    plt.close(figure)


def _shown(rows: Sequence[Cells], task: type[Task]) -> list[Cells]:
    """The points of a panel; what lies far below the frozen base is moved up, and says so."""
    mine = {row["method"]: row for row in rows if row["task"] == task.name and "quality" in row}
    if not {FROZEN, ALL} <= mine.keys():
        return [*mine.values()]
    frozen, full = (mine[name]["quality"] for name in (FROZEN, ALL))
    least = frozen - 0.2 * (full - frozen)
    for name, row in mine.items():
        if row.get("gap_closed", 0.0) < -0.2:
            moved = {"method": f"{name} (at {row['quality']:.3g})", "quality": least}
            mine[name] = {**row, **moved, "quality_sd": 0.0}
    return [*mine.values()]


def _points(panel: Any, rows: Sequence[Cells], kind: str, colour: Any) -> None:
    if kind == BASE:
        for row in rows:
            panel.axhline(row["quality"], color=colour, linestyle=":", label=row["method"])
        return
    x = [row["parameters"] for row in rows]
    y, sd = ([row.get(name, 0.0) for row in rows] for name in ("quality", "quality_sd"))
    panel.errorbar(x, y, sd, fmt="o", color=colour, markersize=4, elinewidth=0.5, label=kind)


def _label(panel: Any, rows: Sequence[Cells]) -> None:
    """Writes each name beside its point, or as near as there is room."""
    taken: list[tuple[float, float, float]] = []  # in pixels: left, right, middle
    for row in rows:
        at = row["parameters"], row["quality"]
        left, y = panel.transData.transform(at)
        right = left + 5 * len(row["method"]) + 5
        for shift in (sign * step for step in range(0, 200, 2) for sign in (1, -1)):
            middle = y + shift
            if all(b < left or right < a or abs(middle - m) > 8 for a, b, m in taken):
                break
        taken.append((left, right, middle))
        panel.annotate(
            row["method"],
            at,
            (5, shift * 72 / DPI),
            textcoords="offset points",
            fontsize=6.5,
            va="center",
        )

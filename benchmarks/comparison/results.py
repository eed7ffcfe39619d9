"""The results: a row for every method and task in a CSV file, and a plot of the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, write_csv

from .methods import ALL, BASE, FROZEN, KINDS, METHODS, Row
from .sweep import SEEDS, Line, Record
from .task import Task

Cells = dict[str, Any]

DPI = 80

SPREAD = ("quality", "loss", "own_loss")  # with a standard deviation over the seeds
MEANS = ("file_bytes", "step_ms", "step_bytes")
COLUMNS = (
    "task", "method", "kind", "parameters", "gap_closed", "gap_closed_sd",
    *(column for name in SPREAD for column in (name, f"{name}_sd")),
    "forgetting", *MEANS, "rate", "rate_at_edge", "seeds", "error",
)  # fmt: skip


def summary(record: Record, tasks: Sequence[type[Task]]) -> list[Cells]:
    """A row for every method that was run on a task, with means over the seeds that count."""
    return [row for task in tasks for row in _of_task(record, task)]


def _of_task(record: Record, task: type[Task]) -> list[Cells]:
    found = {method: _latest(record, task, method) for method in METHODS}
    tested = {method.name: _tested(lines) for method, lines in found.items()}
    frozen, full = tested.get(FROZEN, []), tested.get(ALL, [])
    rows = []
    for method, lines in found.items():
        cells: Cells = {"task": task.name, "method": method.name, "kind": method.kind}
        if final := tested[method.name]:
            cells |= _means(final) | {"rate_at_edge": _at_edge(lines)}
            if frozen:
                cells["forgetting"] = cells["own_loss"] - float(frozen[0]["own_loss"])
            if method.trains and (gaps := list(_gaps(final, frozen, full))):
                cells |= _spread("gap_closed", gaps)
        elif refused := [line for line in lines if line["error"]]:
            cells |= {name: refused[-1][name] for name in ("error", "commit")}
        else:
            continue  # not run, or not to the end
        rows.append(cells)
    return rows


def _latest(record: Record, task: type[Task], method: Row) -> list[Line]:
    """The runs of a method as it is now, or was when it last ran."""
    lines = record.find(task=task.name, method=method.name)
    return [line for line in lines if line["key"] == lines[-1]["key"]]


def _tested(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if int(line["seed"]) in SEEDS]


def _means(lines: Sequence[Line]) -> Cells:
    cells: Cells = {"parameters": int(lines[0]["parameters"]), "rate": float(lines[0]["rate"])}
    for name in SPREAD:
        cells |= _spread(name, [float(line[name]) for line in lines])
    for name in MEANS:
        cells[name] = float(np.mean([float(line[name]) for line in lines]))
    cells["commit"] = " ".join(dict.fromkeys(line["commit"] for line in lines))
    return {**cells, "seeds": len(lines)}


def _at_edge(lines: Sequence[Line]) -> str:
    """Which end of the rates that were tried the chosen one is, if any: a better may lie beyond."""
    tried = {float(line["rate"]) for line in lines if int(line["seed"]) not in SEEDS}
    rate = float(_tested(lines)[0]["rate"])
    if len(tried) < 2 or min(tried) < rate < max(tried):
        return ""
    return "low" if rate == min(tried) else "high"


def _spread(name: str, values: Sequence[float]) -> Cells:
    # not of the statistics module, whose own fails where a run has diverged to nan
    sd = {f"{name}_sd": float(np.std(values, ddof=1))} if len(values) > 1 else {}
    return {name: float(np.mean(values)), **sd}


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

"""Forgetting: what was lost of each task while others were learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftlite.errors import PeftliteError
from peftlite.table import Shown, listed, short, table

Scores = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True, repr=False)
class Forgetting(Shown):
    """What was forgotten, by task; it prints as a table.

    Attributes:
        learned: each task's score once it was learned.
        best: its best score before now.
        now: its score now.
    """

    learned: Mapping[str, float]
    best: Mapping[str, float]
    now: Mapping[str, float]

    @property
    def tasks(self) -> dict[str, float]:
        """How much lower than its best each task's score is now, fⱼ; below 0 where it rose."""
        return {task: best - self.now[task] for task, best in self.best.items()}

    @property
    def mean(self) -> float:
        """The average forgetting F = Σ fⱼ / n. Chaudhry et al., arXiv:1801.10112, §4.1."""
        return sum(self.tasks.values()) / len(self.tasks)

    @property
    def backward_transfer(self) -> float:
        """The mean of (now − just learned), negative where tasks were forgotten.

        Lopez-Paz and Ranzato, arXiv:1706.08840, §2.
        """
        return sum(self.now[t] - score for t, score in self.learned.items()) / len(self.learned)

    def _summary(self) -> str:
        return f"{self.mean:.4g} on average; backward transfer {self.backward_transfer:.4g}"

    def _lines(self) -> Iterator[str]:
        columns = (self.learned, self.best, self.now, self.tasks)
        rows = [[task, *(f"{column[task]:.4g}" for column in columns)] for task in self.tasks]
        yield table(["task", "just learned", "best", "now", "forgotten"], rows)
        yield self._summary()


def forgetting(before: Scores, after: Mapping[str, float]) -> Forgetting:
    """fⱼ = max(before) − after, for each task j.

    Args:
        before: by task, its score once it was learned, higher is better; or all its scores since
            then, one for each task that followed, the last one left out.
        after: by task, its score now. Tasks that aren't in `before` had nothing to lose.

    Raises PeftliteError if a score is missing, or no number.

    Example:
        lost = pl.forgetting({"sql": 0.9, "chat": [0.8, 0.7]}, {"sql": 0.6, "chat": 0.7})
        print(lost)
    """
    if not isinstance(before, Mapping) or not isinstance(after, Mapping) or not before:
        raise PeftliteError(
            "forgetting takes scores by task, {'sql': 0.9, 'chat': [0.8, 0.7]}, and those of now, "
            f"{{'sql': 0.6, 'chat': 0.7}}: not {short(before)} and {short(after)}"
        )
    if lost := [repr(task) for task in before if task not in after]:
        raise PeftliteError(f"there is no score after for {listed(lost)}: measure every task again")
    history = {task: _numbers(task, scores) for task, scores in before.items()}
    return Forgetting(
        {task: scores[0] for task, scores in history.items()},
        {task: max(scores) for task, scores in history.items()},
        {task: _numbers(task, after[task])[0] for task in before},
    )


def _numbers(task: str, given: Any) -> list[float]:
    """One score, or several."""
    scores = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    try:
        found = [float(score) for score in scores]
    except (TypeError, ValueError):
        found = []
    if not found or any(score != score for score in found):
        raise PeftliteError(f"a task's score is a number, and for {task!r} it is {short(given)}")
    return found

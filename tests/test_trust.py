"""Trust: the goals of benchmarks/trust.py, in small."""

import pytest

import peftlite as pl
from benchmarks.trust import GOALS, Goal
from tests import golden


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.what.replace(" ", "_"))
def test_nothing_goes_wrong(goal: Goal) -> None:
    outcome = goal.trial(*goal.small)
    assert outcome.tried
    assert not outcome.wrong, "\n".join(outcome.wrong[:20])


def test_every_method_has_a_golden_delta() -> None:
    library = {
        name
        for name, kind in vars(pl).items()
        if isinstance(kind, type) and issubclass(kind, pl.Method) and kind is not pl.Method
    }
    assert library == {type(method).__name__ for method in golden.METHODS}

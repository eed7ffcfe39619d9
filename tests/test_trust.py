"""Trust: the goals of benchmarks/trust.py, in small."""

import pytest

from benchmarks.trust import GOALS, Goal


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.what.replace(" ", "_"))
def test_nothing_goes_wrong(goal: Goal) -> None:
    outcome = goal.trial(*goal.small)
    assert outcome.tried
    assert not outcome.wrong, "\n".join(outcome.wrong[:20])

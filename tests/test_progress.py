"""progress.bar: in a file, a line every so often and one at the end; a bar where somebody looks."""

import io
import sys
from typing import Any

import pytest
from tqdm import tqdm

from peftlite.progress import Lines, bar


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("tqdm.std.time", made)
    return made


def written(clock: Clock, steps: int, seconds: float, **options: Any) -> list[str]:
    """What a loop of steps that take so many seconds each writes to a file."""
    out = io.StringIO()
    for _ in Lines(range(steps), "train", file=out, unit="step", **options):
        clock.now += seconds
    assert not {"\r", "\x1b"} & {*out.getvalue()}
    return out.getvalue().splitlines()


def test_a_line_every_ten_seconds(clock: Clock) -> None:
    lines = written(clock, 100, 0.5)
    assert [line.split("%")[0].split()[-1] for line in lines] == [
        "20", "40", "60", "80", "100", "100"
    ]  # fmt: skip
    assert lines[0] == "train:  20% 20/100 [00:10<00:40,  2.00step/s]"


def test_fewer_as_time_goes_by(clock: Clock) -> None:
    assert 100 < len(written(clock, 24 * 3600, 1.0)) < 150


def test_what_is_short_has_its_end_alone(clock: Clock) -> None:
    assert written(clock, 5, 1.0) == ["train: 100% 5/5 [00:05<00:00,  1.00step/s]"]
    assert written(clock, 5, 1.0, leave=False) == []
    assert written(clock, 5, 1.0, disable=True) == []


def test_without_a_total(clock: Clock) -> None:
    out = io.StringIO()
    with Lines(None, "read", file=out, unit="line", initial=4) as shown:
        clock.now += 12
        shown.set_postfix({"loss": 1.5}, refresh=False)
        shown.update(24)
    assert out.getvalue().splitlines() == ["read: 28 [00:12,  2.00line/s, loss=1.5]"] * 2


@pytest.mark.parametrize(("terminal", "kind"), [(True, tqdm), (False, Lines)])
def test_a_bar_where_somebody_looks(
    terminal: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with bar(None, "train", total=3, unit="step") as made:
        assert type(made) is kind
        made.update(3)
    assert ("\r" in sys.stderr.getvalue()) is terminal and "3/3" in sys.stderr.getvalue()

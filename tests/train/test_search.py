"""Search: what is chosen, that it follows from the seed, goes on after a break, and prunes."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftlite as pl
from peftlite.demo.gpt import GPT
from peftlite.train import losses
from peftlite.train.space import at_random, by_optuna, from_grid, grid_size
from peftlite.train.trials import STARTUP, Trials, search
from tests.train.tiny import texts, values

SPACE = {"lr": (1e-4, 1e-1, "log"), "rank": (1, 8), "method": [pl.LoRA(rank=2), pl.IA3()]}
HOWS = ("random", "bayes")


def base() -> GPT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT(16, 2, 2)


def builder(model: GPT, **options: Any) -> Callable[[dict[str, Any]], pl.Trainer]:
    """Trainers on the same base, the delta attached anew."""

    def build(choice: dict[str, Any]) -> pl.Trainer:
        method = choice.get("method", pl.LoRA(rank=choice.get("rank", 2)))
        pl.attach(model, method, "trial")
        return pl.Trainer(
            model, losses.causal_lm, texts(), texts(4, seed=1), epochs=2, batch_size=6,
            lr=choice["lr"], progress=False, **options,
        )  # fmt: skip

    return build


def quiet(build: Any, *args: Any, **options: Any) -> Trials:
    return search(build, *args, progress=False, **options)


# -- what is chosen


@given(
    st.dictionaries(st.text(), st.lists(st.integers(), min_size=1, max_size=4, unique=True),
                    min_size=1, max_size=4)
)  # fmt: skip
def test_a_grid_is_every_combination_once(space: dict[str, list[int]]) -> None:
    choices = [from_grid(space, i) for i in range(grid_size(space))]
    assert len({tuple(choice.values()) for choice in choices}) == len(choices)
    assert all(choice[k] in space[k] for choice in choices for k in space)
    assert len(choices) < 2 or [*choices[0]] == [*space]
    last = [*space][-1]
    assert [c[last] for c in choices[: len(space[last])]] == space[last]


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.booleans(), st.text())
def test_random_stays_in_the_space(low: int, more: int, log: bool, seed: str) -> None:
    end = ("log",) if log else ()
    space = {
        "whole": (low, low + more, *end),
        "real": (low / 7, (low + more) / 7, *end),
        "of": ["a", "b"],
    }
    found = at_random(space, seed)
    assert found == at_random(space, seed)
    assert isinstance(found["whole"], int) and low <= found["whole"] <= low + more
    assert low / 7 <= found["real"] <= (low + more) / 7 and found["of"] in ("a", "b")


def test_random_is_even() -> None:
    drawn = [at_random({"rank": (1, 4, "log"), "x": (0, 3)}, str(i)) for i in range(4000)]
    ranks, xs = (Counter(choice[name] for choice in drawn) for name in ("rank", "x"))
    assert set(xs) == {0, 1, 2, 3} and min(xs.values()) > 900
    # log(1.5 / 0.5) : log(2.5 / 1.5) : … of log(4.5 / 0.5)
    shares = [ranks[rank] / 4000 for rank in (1, 2, 3, 4)]
    assert shares == pytest.approx([0.5, 0.232, 0.153, 0.114], abs=0.03)


def test_bayes_finds_more_than_chance() -> None:
    space = {"x": (-4.0, 4.0), "y": [0, 1, 2]}

    def value(choice: dict[str, Any]) -> float:
        return (choice["x"] - 1) ** 2 + choice["y"]

    tried: list[Any] = []
    for seed in range(40):
        choice = by_optuna(space, tried, True, seed)
        assert choice == by_optuna(space, tried, True, seed)
        tried.append((choice, None if seed == 3 else value(choice)))
    found = sorted(x for _, x in tried[20:])
    chance = sorted(value(at_random(space, str(i))) for i in range(20))
    assert found[10] < 0.5 * chance[10]


# -- trials


def test_a_grid_of_trials_is_trainers_by_themselves() -> None:
    model, seen = base(), []
    build = builder(model)
    found = quiet(build, {"lr": [1e-3, 1e-2], "rank": [1, 2]}, how="grid")
    for trial in found.trials:
        torch.manual_seed(0)
        trainer = build(trial.choice)
        events = trainer.fit().epochs[1:]
        assert trial.values == [event["full_valid_loss"] for event in events]
        seen.append(trial.value)
        pl.detach(model, "trial")
    assert found.best.value == min(seen) and pl.deltas(model) == {}
    assert [t.choice for t in found.trials[:2]] == [
        {"lr": 1e-3, "rank": 1},
        {"lr": 1e-3, "rank": 2},
    ]


@pytest.mark.heavy
@pytest.mark.parametrize("how", HOWS)
def test_goes_on_after_a_break(how: Any, tmp_path: Path) -> None:
    build = builder(base())
    whole = quiet(build, SPACE, 12, how)
    assert {trial.state for trial in whole.trials} <= {"done", "pruned"}
    file = tmp_path / "study.jsonl"
    quiet(build, SPACE, 3, how, file=file)
    with file.open("ab") as study:
        study.write(b'{"number": 4, "choice"')  # killed while it wrote
    again = quiet(build, SPACE, 12, how, file=file)
    assert again == whole == quiet(build, SPACE, 12, how, file=file)
    assert len(file.read_text().splitlines()) == 13
    assert quiet(build, SPACE, 5, how, file=file).trials == whole.trials[:5]
    assert quiet(build, SPACE, 3, how, seed=1) != Trials(whole.trials[:3])


def test_an_interrupted_trial_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    class Kill:
        def start(self, trainer: Any, history: Any) -> None: ...

        def event(self, event: Any) -> None:
            if event["step"] == 3:
                raise KeyboardInterrupt

        def end(self, history: Any) -> None: ...

    space, file = {"lr": [1e-2]}, tmp_path / "study.jsonl"
    whole = quiet(builder(base()), space, how="grid")
    for callbacks in ([Kill()], []):
        build = builder(base(), folder=tmp_path / "trial", callbacks=callbacks)
        try:
            found = quiet(build, space, how="grid", file=file)
        except KeyboardInterrupt:
            assert callbacks
    assert found == whole


@pytest.mark.heavy
def test_worse_trials_are_stopped() -> None:
    scores = [0.0, 0.5, 0.6] * STARTUP + [0.0, 0.4] + [0.0, 0.5, 0.4] + [0.0, 0.7, 0.1]
    found = scored(scores, trials=STARTUP + 3)
    states = [(trial.state, trial.values) for trial in found.trials[STARTUP:]]
    assert states == [("pruned", [0.4]), ("done", [0.5, 0.4]), ("done", [0.7, 0.1])]
    assert found.best is found.trials[-1] and found.best.value == 0.7
    few = scored([0.0, 0.5, 0.6] * (STARTUP - 1) + [0.0, 0.4, 0.4], trials=STARTUP)
    kept = scored([0.0, 0.5, 0.6] * STARTUP + [0.0, 0.4, 0.4], trials=STARTUP + 1, prune=False)
    assert {trial.state for trial in (*few.trials, *kept.trials)} == {"done"}


def scored(scores: list[float], trials: int, **options: Any) -> Trials:
    """Trials with these scores, of which each uses one before training and one an epoch."""
    build = builder(base(), metric="score", probes={"score": lambda model: scores.pop(0)})
    return quiet(build, {"lr": (1e-3, 1e-2)}, trials, **options)


def test_a_trial_that_fails_is_noted() -> None:
    found = quiet(builder(base()), {"lr": [1e30, 1e-2]}, how="grid")
    first, second = found.trials
    assert (first.state, first.values, second.state) == ("failed", [], "done")
    assert "lower lr_multiplier" in first.error and found.best is second
    with pytest.raises(pl.PeftliteError, match="lr must be finite"):
        quiet(builder(base()), {"lr": [-1.0]}, how="grid")


def test_leaves_generators_and_the_base_alone() -> None:
    model = base()
    before, state = torch.get_rng_state(), {k: t.clone() for k, t in model.state_dict().items()}
    quiet(builder(model), SPACE, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_the_best_is_there_to_be_had_again() -> None:
    model = base()
    build = builder(model)
    best = quiet(build, {"lr": [1e-3, 1e-2]}, how="grid").best
    torch.manual_seed(0)
    first = build(best.choice).fit()
    assert min(e["full_valid_loss"] for e in first.epochs[1:]) == best.value
    assert values(model, "trial")


def test_table_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = {"lr": [1e-2, 1e30], "method": [pl.LoRA(rank=2)]}
    found = search(builder(base()), space, how="grid", file=tmp_path / "study.jsonl")
    first, second = capsys.readouterr().out.splitlines()
    value = f"{found.best.value:.4g}"
    assert first == f"trial 1 of 2: lr=0.01, method=LoRA(rank=2): full_valid_loss {value}, done"
    assert second.startswith("trial 2 of 2: lr=1e+30, method=LoRA(rank=2): at step")
    head, _, row, _ = str(found).splitlines()
    assert head.split() == ["trial", "lr", "method", "full_valid_loss", "epochs", "state", "error"]
    assert row.split() == ["1", "0.01", "LoRA(rank=2)", value, "2", "done"]
    found.to_csv(tmp_path / "trials.csv")
    lines = (tmp_path / "trials.csv").read_text().splitlines()
    assert lines[0].split(",") == head.split() and len(lines) == 3
    kept = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert kept[0]["space"]["method"] == ["LoRA(rank=2)"] and kept[1]["values"]

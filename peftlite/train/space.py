"""Space: what a search chooses from, and how it chooses: by grid, at random, or by optuna."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, product
from typing import Any, Literal, TypeAlias, get_args

from peftlite.errors import PeftliteError
from peftlite.fields import check_given
from peftlite.table import short
from peftlite.train.data.checks import check_counts
from peftlite.train.study import plain

How = Literal["grid", "random", "bayes"]
Choice: TypeAlias = "dict[str, Any]"
Space: TypeAlias = "Mapping[str, Any]"  # by name: a list, (low, high), or (low, high, "log")


def count_trials(space: Any, how: How, trials: int | None, together: int = 1) -> int:
    """How many trials to make. Raises PeftliteError for what can't be searched."""
    check_given("how", how, get_args(How))
    _check_space(space, how)
    check_counts(trials=trials, together=together)
    if how == "grid":
        return min(trials or grid_size(space), grid_size(space))
    if trials is None:
        raise PeftliteError(f"say how many trials: {how!r} has no end of its own")
    return trials


def _check_space(space: Any, how: How) -> None:
    if not isinstance(space, Mapping) or not space:
        raise PeftliteError(
            f"a space is a dict of what there is to choose from, by name: not {short(space)}"
        )
    for name, given in space.items():
        if not ((isinstance(given, list) and given) or _is_range(given)):
            raise PeftliteError(
                f"{name} must be a list, or a range (low, high) or (low, high, 'log') of numbers, "
                f"not {short(given)}"
            )
        if how == "grid" and not isinstance(given, list):
            raise PeftliteError(f"a grid takes lists, and {name} is the range {given}")


def grid_size(space: Space) -> int:
    return math.prod(map(len, space.values()))


def choose(
    space: Space, how: How, tried: Sequence[tuple[Choice, float | None]], minimise: bool, seed: int
) -> Choice:
    """The next choice after those that were tried, each with its value, None where one failed.

    It follows from the arguments alone. Raises PeftliteError if optuna is missing.
    """
    number = len(tried)
    if how == "grid":
        return from_grid(space, number)
    if how == "random":
        return at_random(space, f"{seed} {number}")
    return by_optuna(space, tried, minimise, seed + number)


def from_grid(space: Space, number: int) -> Choice:
    """One of all combinations; the last name varies fastest."""
    values = next(islice(product(*space.values()), number, None))
    return dict(zip(space, values, strict=True))


def at_random(space: Space, seed: str) -> Choice:
    """A choice that follows from the seed."""
    rng = random.Random(seed)
    return {name: _draw(given, rng) for name, given in space.items()}


def by_optuna(
    space: Space, tried: Sequence[tuple[Choice, float | None]], minimise: bool, seed: int
) -> Choice:
    """The proposal of tree-structured Parzen estimators; the arguments are those of `choose`."""
    try:
        import optuna
    except ImportError as error:
        raise PeftliteError("how='bayes' needs optuna: pip install 'peftlite[search]'") from error
    kinds = {name: _distribution(optuna.distributions, given) for name, given in space.items()}
    sampler = optuna.samplers.TPESampler(seed=seed)
    with _quiet(optuna.logging):
        direction = "minimize" if minimise else "maximize"
        study = optuna.create_study(direction=direction, sampler=sampler)
        for choice, value in tried:
            state = optuna.trial.TrialState["FAIL" if value is None else "COMPLETE"]
            params = {name: _to_optuna(space[name], each) for name, each in choice.items()}
            given = {"state": state, "value": value, "params": params, "distributions": kinds}
            study.add_trial(optuna.trial.create_trial(**given))
        proposed = study.ask(kinds).params
    return {name: _from_optuna(space[name], value) for name, value in proposed.items()}


def restored(space: Space, choice: Choice) -> Choice:
    """A choice as JSON holds it, with the values that are in the space."""
    return {
        name: _from_optuna(space[name], _to_optuna(space[name], each))
        for name, each in choice.items()
    }


def _is_range(given: Any) -> bool:
    if not isinstance(given, tuple) or given[2:] not in ((), ("log",)) or len(given) < 2:
        return False
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in given[:2]):
        return False
    low, high = given[:2]
    return -math.inf < low < high < math.inf and (len(given) == 2 or low > 0)


def _is_integer(given: tuple[Any, ...]) -> bool:
    return isinstance(given[0], int) and isinstance(given[1], int)


def _draw(given: Any, rng: random.Random) -> Any:
    if isinstance(given, list):
        return rng.choice(given)
    low, high = given[:2]
    if len(given) == 2:
        return rng.randint(low, high) if _is_integer(given) else rng.uniform(low, high)
    # a whole number stands for the half on each side of it
    edge = 0.5 if _is_integer(given) else 0.0
    x = math.exp(rng.uniform(math.log(low - edge), math.log(high + edge)))
    return min(max(round(x) if edge else x, low), high)


def _distribution(kinds: Any, given: Any) -> Any:
    if isinstance(given, list):
        return kinds.CategoricalDistribution(range(len(given)))
    kind = kinds.IntDistribution if _is_integer(given) else kinds.FloatDistribution
    return kind(*given[:2], log=len(given) == 3)


def _to_optuna(given: Any, value: Any) -> Any:
    """A value as optuna has it: of a list, its index."""
    return [*map(plain, given)].index(plain(value)) if isinstance(given, list) else value


def _from_optuna(given: Any, value: Any) -> Any:
    return given[value] if isinstance(given, list) else value


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without a line for every study that is made."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)

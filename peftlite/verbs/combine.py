"""combine: one delta of several, by what they do to the weights; and rescale and resize_rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.attach import check
from peftlite.core.delta import Delta, Registry, Weighted
from peftlite.core.find import named, require
from peftlite.core.turns import in_turn
from peftlite.errors import PeftliteError
from peftlite.fields import check_fields, integer, number, one_of
from peftlite.methods.sparse import largest
from peftlite.table import short
from peftlite.verbs.draft import Draft, Factors, truncated
from peftlite.verbs.how import How
from peftlite.verbs.parts import Part, Weights, parts_of


@torch.no_grad()
@in_turn
def combine(
    model: nn.Module,
    deltas: Mapping[str | Delta, float] | Weighted,
    how: How = "sum",
    name: str = "combined",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Delta:
    """Attaches a new delta made of others, frozen, and makes it the standing choice.

    What is combined is what they do to the weights, ΔWᵢ = W'ᵢ − W, whatever their methods: in fp64,
    rounded once. Site by site the result is held in the form that takes the least memory: `LoRA`
    where it is a sum of products of low rank, `SparseMask` where more than half of it is zero, and
    `FullTuning` elsewhere.

    - "sum": Σ wᵢΔWᵢ.
    - "linear": Σ wᵢΔWᵢ / Σ wᵢ.
    - "cat": the sum as LoRA, the factors side by side; only of products of low rank.
    - "svd": the first singular directions of the sum, as LoRA; vectors stay as they are.
    - "ties": each ΔWᵢ without its smaller entries, then, entry by entry, the mean of the wᵢΔWᵢ that
      have the sign of their sum. Yadav et al., arXiv:2306.01708, §3; as there, a delta is trimmed
      as a whole, not tensor by tensor.
    - "dare": Σ wᵢΔWᵢ/density, each ΔWᵢ without the entries that chance drops. Yu et al.,
      arXiv:2311.03099, §3.
    - "magnitude_prune": the sum of the ΔWᵢ, trimmed as for "ties".

    Args:
        deltas: weights by name, `{"sql": 0.7, "chat": -1}`, or the same as `0.7 * sql - chat`.
        rank: what "svd" keeps, at most; or
        energy: the share of the squared singular values that it keeps, by the smallest rank that
            does. `delta.energy` says what was kept, by address.
        density: the share of its entries that a delta keeps.
        seed: of the chance.

    Raises:
        PeftliteError: a delta changes calls, or is another model's; an argument is missing, or not
            one of these; a value would not be finite. The model is as it was.

    Example:
        model = nn.Linear(4, 2)
        sql = pl.attach(model, pl.LoRA(rank=2), name="sql")
        chat = pl.attach(model, pl.LoRA(rank=1), name="chat")
        both = pl.combine(model, 0.7 * sql - chat, name="both")
    """
    options = Options(how, rank, energy, density, seed)
    root, registry, weights = _weights(model, deltas, how)
    check(root, name)
    draft, parts = Draft(name), parts_of(registry, [*weights])
    changes = (_pruned if options.prunes else _added)(parts, weights, options)
    for part, change in zip(parts, changes, strict=True):
        draft.check(part.site, change)
        if how == "svd" and part.whole.dim() >= 2:
            change, kept = truncated(part.site, change, options.rank, options.energy)
            draft.energy[part.site.address] = kept
        draft.put(part.site, change)
    return draft.attach(root)


def rescale(model: nn.Module, delta: Delta | str, factor: float, *, name: str) -> Delta:
    """Attaches a delta's change of the weights times a factor, as `combine` does.

    Example:
        model = nn.Linear(4, 2)
        pl.attach(model, pl.LoRA(rank=2), name="sql")
        half = pl.rescale(model, "sql", 0.5, name="half")
    """
    return combine(model, {delta: factor}, name=name)


def resize_rank(
    model: nn.Module,
    delta: Delta | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    name: str,
) -> Delta:
    """Attaches the nearest delta of another rank, which is `combine`'s "svd" of one delta.

    Example:
        model = nn.Linear(4, 2)
        pl.attach(model, pl.LoRA(rank=2), name="sql")
        small = pl.resize_rank(model, "sql", rank=1, name="small")
    """
    return combine(model, {delta: 1.0}, "svd", name, rank=rank, energy=energy)


@dataclass(frozen=True)
class Options:
    """How deltas are combined, checked."""

    how: str = one_of("sum", How)
    rank: int | None = integer(None)
    energy: float | None = number(None, float, lambda f: 0 < f <= 1, "above 0 and at most 1")
    density: float | None = number(None, float, lambda f: 0 < f <= 1, "above 0 and at most 1")
    seed: int = number(0, int, lambda s: 0 <= s < 2**63, "a whole number from 0 up")

    def __post_init__(self) -> None:
        check_fields(self)
        takes = ("rank", "energy") if self.how == "svd" else ("density",) if self.prunes else ()
        given = [n for n in ("rank", "energy", "density") if getattr(self, n) is not None]
        if len(given) != bool(takes) or not {*given} <= {*takes}:
            needs = " or ".join(f"{n}=" for n in takes) or "nothing more"
            got = " and ".join(f"{n}=" for n in given) or "nothing"
            raise PeftliteError(f"how={self.how!r} needs {needs}, and was given {got}")

    @property
    def prunes(self) -> bool:
        return self.how in ("ties", "dare", "magnitude_prune")


def _weights(
    model: nn.Module, given: Mapping[str | Delta, float] | Weighted, how: str
) -> tuple[nn.Module, Registry, Weights]:
    """What is combined, with its weights, and where."""
    terms: Any = given.terms if isinstance(given, Weighted) else given
    if not isinstance(terms, Mapping) or not terms:
        raise PeftliteError(
            "combine takes weights by name, such as {'sql': 0.7, 'chat': -1}, or "
            f"0.7 * sql - chat: not {short(given)}"
        )
    root, registry = require(model)
    pairs = [(named(registry, each), weight) for each, weight in terms.items()]
    weights = {delta: _weight(delta.name, weight) for delta, weight in pairs}
    if len(weights) < len(pairs):
        raise PeftliteError("combine takes a delta once, with one weight")
    if how == "linear":
        total = math.fsum(weights.values())
        if abs(total) <= 1e-12 * math.fsum(map(abs, weights.values())):
            raise PeftliteError("how='linear' divides by the sum of the weights, and that is 0")
        weights = {delta: weight / total for delta, weight in weights.items()}
    return root, registry, weights


def _weight(name: str, given: Any) -> float:
    try:
        weight = math.nan if isinstance(given, str) else float(given)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not math.isfinite(weight):
        raise PeftliteError(f"the weight of {name!r} must be a finite number, not {short(given)}")
    return weight


# -- how


def _added(parts: Sequence[Part], weights: Weights, options: Options) -> Iterator[Tensor | Factors]:
    """Σ wᵢΔWᵢ, part by part."""
    for part in parts:
        site, factors = part.site, part.factors(weights)
        if factors is None:
            if options.how == "cat":
                raise PeftliteError(
                    "how='cat' puts the factors of products of low rank side by side, and "
                    f"{site.address} is changed in another way: take 'sum' or 'svd'"
                )
            yield torch.stack([weights[d] * part.change(d) for d in part.patches]).sum(0)
        elif options.how in ("cat", "svd") or sum(map(torch.numel, factors)) <= site.shape.numel():
            yield factors
        else:
            yield site.layout.product(*factors)


def _pruned(parts: Sequence[Part], weights: Weights, options: Options) -> Iterator[Tensor]:
    """What is left of the wᵢΔWᵢ, taken together, part by part."""
    density: Any = options.density
    kept = {delta: _largest(parts, delta, density) for delta in weights}
    chance = torch.Generator().manual_seed(options.seed)
    for part in parts:
        changes = []
        for delta, weight in weights.items():
            if delta not in part.patches:
                continue
            change = part.change(delta)
            if options.how == "dare":
                mask = torch.rand(change.shape, generator=chance).lt(density)
                change = change * mask.to(change.device) / density
            else:
                mask = torch.zeros(change.numel(), dtype=torch.bool, device=change.device)
                mask[next(kept[delta])] = True
                change = change * mask.view(change.shape)
            changes.append(weight * change)
        stacked = torch.stack(changes)
        if options.how == "ties":
            elected = stacked.sign() == stacked.sum(0).sign()
            stacked = stacked * elected / elected.sum(0).clamp(min=1)
        yield stacked.sum(0)


def _largest(parts: Sequence[Part], delta: Delta, density: float) -> Iterator[Tensor]:
    """Where the largest entries of a delta are, in each of the parts that it changes."""
    own = [part for part in parts if delta in part.patches]
    entries = sum(placed.site.shape.numel() for placed in delta.placed.values())
    count = max(1, round(density * entries))
    return largest(lambda: (part.change(delta).abs().reshape(-1) for part in own), count)

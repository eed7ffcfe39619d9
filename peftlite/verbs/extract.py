"""extract: what makes one model of another, as a delta of given methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from peftlite.core.assign import Placed, assign, methods_in
from peftlite.core.attach import check
from peftlite.core.delta import Delta, misfits
from peftlite.core.find import find
from peftlite.core.patch import Method
from peftlite.core.site import Site, sites, walk, whole_address
from peftlite.core.tensors import narrow
from peftlite.core.turns import in_turn
from peftlite.core.values import change_of
from peftlite.errors import PeftliteError
from peftlite.methods.lora import LoRA
from peftlite.table import listed, short
from peftlite.verbs.combine import Options
from peftlite.verbs.draft import Draft, truncated


@torch.no_grad()
@in_turn
def extract(
    base: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor],
    method: Method | Sequence[Method],
    name: str = "extracted",
    *,
    energy: float | None = None,
    rest: Literal["error", "ignore"] = "error",
) -> Delta:
    """Attaches to `base` what makes it `tuned`, as a delta of given methods, frozen.

    Of ΔW = tuned − base, in fp64, `LoRA` and `DoRA` take the first singular directions, and
    `SparseMask` the largest entries; `FullTuning`, `BitFit` and `NormTuning` take it as it is.
    Sites that don't differ get no patch. `delta.energy` says which share of ΣΔW² each site kept.

    Args:
        tuned: a model of the same kind, or its state dict.
        method: what to hold the change in, or several methods, each of which takes what those
            before it leave: `[pl.LoRA(rank=16), pl.FullTuning()]` takes everything.
        energy: for LoRA, in place of its rank: the share to keep, by the smallest rank that does.
        rest: "error" if tensors differ where no method takes them, or "ignore".

    Raises:
        TargetError: a target names nothing, or something the method can't take.
        PeftliteError: `tuned` is another kind of model, or differs elsewhere, or nowhere; a method
            can't be fitted to a change; a value is not finite. The base is as it was.

    Example:
        base, tuned = nn.Linear(4, 2), nn.Linear(4, 2)
        delta = pl.extract(base, tuned, [pl.LoRA(rank=1), pl.FullTuning()])
        print(delta.energy)
    """
    if rest not in ("error", "ignore"):
        raise PeftliteError(f"rest must be 'error' or 'ignore', not {rest!r}")
    if energy is not None:
        energy = Options("svd", energy=energy).energy
    # LoRA's factors are found, and don't begin in some way
    methods = [replace(m, init="kaiming") if isinstance(m, LoRA) else m for m in methods_in(method)]
    if energy is not None and not any(isinstance(how, LoRA) for how in methods):
        raise PeftliteError("energy= gives LoRA its ranks, and none of these methods is LoRA")
    check(base, name)
    (before, after), assigned = _both(base, tuned), _assigned(base, methods)
    for how, found in assigned:  # says what a method can't take before the work begins
        Placed.all([replace(site, on="meta") for site in found], how)
    taken = [site for _, found in assigned for site in found]
    if calls := [site.address for site in taken if site.is_call]:
        raise PeftliteError(f"weights don't say how calls differ: {listed(calls)}")
    if rest == "error" and (left := _left(before, after, taken)):
        raise PeftliteError(
            f"tuned differs from base where no method takes it: {listed(left)}; add "
            "pl.FullTuning(), which takes the parameters that others leave, or pass rest='ignore'"
        )
    draft = Draft(name)
    for how, found in assigned:
        changes = Changes(found, after)
        changed = [site for site, d in zip(found, changes, strict=True) if d.any()]
        _hold(draft, how, Changes(changed, after), energy)
    if not draft.placed:
        raise PeftliteError("tuned is the same as base wherever these methods could take it")
    return draft.attach(base)


@dataclass(frozen=True)
class Changes:
    """ΔW at each of some sites, in fp64, formed anew whenever one goes through them."""

    sites: Sequence[Site]
    after: Mapping[str, Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        for site in self.sites:
            w = site.tensor.double()
            yield narrow(self.after[whole_address(site.names[0])], site.index).to(w) - w


def _hold(draft: Draft, how: Method, changes: Changes, energy: float | None) -> None:
    """Fits a method to the changes, and notes what of them it has kept."""
    first = len(draft.placed)
    for site, change in zip(changes.sites, changes, strict=True):
        draft.check(site, change)
        if isinstance(how, LoRA):
            rank = how.rank if energy is None else None
            draft.put_product(site, truncated(site, change, rank, energy)[0], how)
    if not isinstance(how, LoRA):
        patches = draft.place(changes.sites, how)
        how.fit_all(patches, [site.tensor for site in changes.sites], changes)
    for placed, change in zip(draft.placed[first:], changes, strict=True):
        lost = change - narrow(change_of([placed.patch], placed.site.whole), placed.site.index)
        draft.energy[placed.site.address] = 1 - (lost.norm() / change.norm()).item() ** 2


def _assigned(base: nn.Module, methods: Sequence[Method]) -> list[tuple[Method, list[Site]]]:
    """The sites that each method takes of those that the methods before it leave."""
    taken: dict[str, list[Site]] = {}
    assigned = []
    for method in methods:
        [(how, found)] = assign(base, [method])
        free = []
        for site in found:
            others = taken.setdefault(whole_address(site.address), [])
            if not any(site.overlaps(other) for other in others):
                free.append(site)
        for site in free:
            taken[whole_address(site.address)].append(site)
        assigned.append((how, free))
    return assigned


# -- the two models


def _both(
    base: nn.Module, tuned: nn.Module | Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of both, by every name. Raises PeftliteError if they don't match."""
    if isinstance(tuned, nn.Module):
        found = find(tuned)
        if found and found[1].choice.standing:
            names = ", ".join(map(repr, found[1].choice.standing))
            raise PeftliteError(f"tuned has unmerged deltas, {names}: pl.merge them first")
        after = _tensors(tuned)
    elif isinstance(tuned, Mapping):
        after = dict(tuned)
    else:
        raise PeftliteError(f"tuned must be a model or a state dict, not {short(tuned)}")
    for site in sites(base):
        # of a tied tensor a checkpoint may have one name alone
        given = [after[name] for name in site.names if name in after]
        after.update({name: after.get(name, given[0]) for name in site.names if given})
    before = _tensors(base)
    unreal = [f"{key} without values in base" for key, w in before.items() if w.is_meta]
    if problems := misfits(before, after) + unreal:
        raise PeftliteError(f"tuned doesn't match base: there is {listed(problems)}")
    return before, after


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors without deltas, by every name: parameters, and the buffers it saves."""
    found = {name: site.whole for site in sites(model) if not site.is_call for name in site.names}
    for path, module in walk(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found


def _left(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], taken: Sequence[Site]
) -> list[str]:
    """The tensors that would still differ if all that is taken were as in `after`."""
    by_name: dict[str, list[Site]] = {}
    for site in taken:
        for name in site.names:
            by_name.setdefault(whole_address(name), []).append(site)
    left = []
    for name, w in before.items():
        w = w.to(torch.promote_types(w.dtype, torch.float64), copy=True)
        for site in by_name.get(name, ()):
            tuned = after[whole_address(site.names[0])]
            narrow(w, site.index).copy_(narrow(tuned, site.index))
        if not torch.allclose(w, after[name].to(w), rtol=0, atol=0, equal_nan=True):
            left.append(name)
    return left

"""AdamW as torch has it, with less to do around its kernel: a delta is many small tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_torchs: Any = inspect.unwrap(torch.optim.AdamW.step)  # without the hooks, which ours has, too
_OTHER = ("amsgrad", "maximize", "capturable", "differentiable")


class Work(NamedTuple):
    """What a group's steps work on; `steps` are views of `counts`, so that one addition counts."""

    params: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]
    counts: Tensor

    @classmethod
    def of(cls, params: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> Work | None:
        """None where there is no state yet, or nothing that one kernel does."""
        if not all(states) or len({(p.device, p.dtype) for p in params}) != 1:
            return None
        counts = torch.stack([state["step"] for state in states])
        for state, step in zip(states, counts.unbind(), strict=True):
            state["step"] = step
        first, second, steps = (
            [s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        return cls([*params], first, second, steps, counts)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, bit for bit, with its state: what a step works on is listed once."""

    _kept: tuple[Any, list[Work | None]] = (None, [])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        works = self._works()
        scaled = getattr(self, "found_inf", None) is not None  # by a GradScaler
        if closure is not None or scaled or not all(map(_is_plain, self.param_groups, works)):
            return _torchs(self, closure)
        for group, work in zip(self.param_groups, works, strict=True):
            work.counts.add_(1)
            given = {name: group[name] for name in ("lr", "weight_decay", "eps")}
            given |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
            grads = [p.grad for p in work.params]
            torch._fused_adamw_(  # type: ignore[attr-defined]
                work.params, grads, work.first, work.second, [], work.steps,
                amsgrad=False, maximize=False, **given,
            )  # fmt: skip
        return None

    def _works(self) -> list[Any]:
        """Of each group; listed anew where the state is another, as `load_state_dict` leaves it."""
        if not self._is_kept(*self._kept):
            groups = [group["params"] for group in self.param_groups]
            works = [Work.of(own, [self.state.get(p, {}) for p in own]) for own in groups]
            self._kept = self.state, works
        return self._kept[1]

    def _is_kept(self, of: Any, works: list[Work | None]) -> bool:
        """Whether the list is of this state; of its tensors the first of each group tells."""
        groups = [group["params"] for group in self.param_groups]
        if of is not self.state or [*map(len, groups)] != [
            len(w.params) if w else 0 for w in works
        ]:
            return False
        pairs = [(own[0], work) for own, work in zip(groups, works, strict=True) if work]
        return all(self.state[first]["exp_avg"] is work.first[0] for first, work in pairs)


def _is_plain(group: dict[str, Any], work: Work | None) -> bool:
    """Whether a group's step is one kernel."""
    if work is None or not group["fused"] or isinstance(group["lr"], Tensor):
        return False
    return not any(map(group.get, _OTHER)) and all(p.grad is not None for p in work.params)

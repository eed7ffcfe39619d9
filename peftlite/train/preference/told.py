"""Told: log π of the tokens of a batch, by the policy, and by its reference in the same forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftlite.core.choice import Names
from peftlite.core.find import find, named, require
from peftlite.core.site import output_head
from peftlite.core.tensors import is_sharded
from peftlite.errors import PeftliteError
from peftlite.kernels import log_probs
from peftlite.table import listed, short
from peftlite.train.data.packing import IGNORED
from peftlite.train.outputs import logits_of, takes
from peftlite.verbs.use import Choosable, using

OURS = (
    "labels",
    "reference",
    "rating",
    "margin",
    "index",
    "advantages",
    "old",
    "reward",
    "values",
    "returns",
)
"""What a batch has for the loss, and not for the model."""

_alone = threading.RLock()  # one at a time has a head replaced
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Told(NamedTuple):
    """What is said of the tokens after the first one of each row.

    Attributes:
        logps: log π, (b, t), 0 where nothing is learned.
        mask: 1 where something is, (b, t).
        entropy: of what comes next, (b, t).
        reference: log π₀, (b, t); the batch's own where it has that.
    """

    logps: Tensor
    mask: Tensor
    entropy: Tensor
    reference: Tensor


def tell(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    reference: Choosable | bool = False,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> Told:
    """log π of a batch's labels. Raises PeftliteError.

    Args:
        batch: `input_ids` (b, t), `labels` (b, t), and what else the model takes.
        reference: the deltas that make π₀, None for the base; False for none.
    """
    check_batch(batch)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise PeftliteError(
            "a loss of preferences takes prompts and answers as one text, and this model reads the "
            "one by an encoder and writes the other by a decoder: take a causal language model"
        )
    roles: list[Names | None] = [None]  # as it is chosen now
    if reference not in (None, False) and "reference" in batch:
        raise PeftliteError(
            "the batch has its reference's log-probabilities kept, and the loss names "
            f"{short(reference)}: leave reference= out, or give the data as it was"
        )
    if reference is not False and "reference" not in batch:
        roles = [current(model), tuple(chosen(model, reference))]
        if reference is not None and roles[0] == roles[1]:
            raise PeftliteError(
                f"the reference, {listed(map(repr, roles[1] or ()))}, is the policy itself, so "
                "nothing can be learned: name a frozen delta, or None for the base"
            )
    labels = batch["labels"][:, 1:]
    found = [
        of_labels(labels, temperature, entropy_gradient)
        for of_labels in _by_role(model, batch, roles)
    ]
    logps, entropy = found[0]
    told = found[1][0].detach() if len(found) > 1 else batch.get("reference")
    if told is not None and len(found) == 1:
        told = told[:, 1:].to(logps)
    mask = (labels != IGNORED).to(logps)
    return Told(logps, mask, entropy, logps.detach() if told is None else told)


def scalars(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a model with a `ScalarHead` says of every token, (b, t), or of each row, (b).

    Raises PeftliteError for a model that gives logits.
    """
    given = logits_of(model, inputs_of(model, batch))
    rows = batch["input_ids"].shape
    if given.shape[-1:] == (1,):
        given = given[..., 0]
    if given.shape not in (rows, rows[:1]):
        raise PeftliteError(
            f"a reward is one number, and this model gives {tuple(given.shape)} for {tuple(rows)} "
            "tokens: choose a delta with a head of its own, such as pl.attach(model, [pl.LoRA(), "
            "pl.ScalarHead()], name='reward')"
        )
    return given.to(torch.promote_types(given.dtype, torch.float32))


def last_scalars(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What it says of the last token of each row, (b). Raises PeftliteError."""
    given = scalars(model, batch)
    if given.dim() == 1:
        return given
    there = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    last = there.shape[1] - 1 - there.flip(1).argmax(1)
    return given.gather(1, last[:, None])[:, 0]


def current(model: nn.Module) -> Names:
    """The deltas that are chosen here and now. Raises PeftliteError without a delta."""
    names = require(model)[1].choice.now()
    return names if isinstance(names, tuple) else ()


def chosen(model: nn.Module, given: Any) -> list[str]:
    """The names of deltas, given as a choice. Raises PeftliteError for one that isn't there."""
    registry = require(model)[1]
    several = given if isinstance(given, list | tuple) else [given]
    return [named(registry, each).name for each in several if each is not None]


def check_batch(batch: Any) -> None:
    """Raises PeftliteError unless a batch has ids and labels."""
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        raise PeftliteError(
            "a loss of preferences takes batches of pl.data.preference or pl.data.ratings, with "
            f"'input_ids' and 'labels': not {short(batch)}"
        )


def inputs_of(model: nn.Module, batch: Mapping[str, Any], times: int = 1) -> dict[str, Any]:
    """What a model takes of a batch, each row so many times, the whole batch after itself."""
    inputs = {name: x for name, x in batch.items() if name not in OURS}
    if times > 1:
        inputs = {
            k: torch.cat([x] * times) if isinstance(x, Tensor) else x for k, x in inputs.items()
        }
    return {**inputs, "use_cache": False} if takes(model, "use_cache") else inputs


Labelled = Callable[[Tensor, float, bool], tuple[Tensor, Tensor]]


def _by_role(
    model: nn.Module, batch: Mapping[str, Tensor], roles: Sequence[Names | None]
) -> Iterator[Labelled]:
    """For each choice of deltas, what gives log π and the entropy of labels: of one forward."""
    b = len(batch["input_ids"])
    inputs = inputs_of(model, batch, len(roles))
    head = _head(model, batch)
    with _as_rows(model, roles, b), _headless(head):
        given = logits_of(model, inputs)
    if given.dim() != 3 or given.shape[:2] != inputs["input_ids"].shape:
        raise PeftliteError(
            f"a loss of preferences goes by the logits of every token, and this model gives "
            f"{tuple(given.shape)} for ids {tuple(inputs['input_ids'].shape)}: take one that has "
            "the head of a language model"
        )
    for role, h in zip(roles, given.split(b), strict=True):
        with _as_rows(model, [role], b):
            if (h if head is None else head(h[:0])).shape[-1] == 1:
                raise PeftliteError(
                    "the policy, or its reference, has a scalar head, which gives rewards in place "
                    "of logits: pl.use(model, name) of another delta"
                )
            yield lambda labels, *options, h=h: _of(h[:, :-1], head or _as_it_is, labels, *options)


def _of(h: Tensor, head: Any, labels: Tensor, temperature: float, gradient: bool) -> Any:
    return log_probs(h, head, labels, temperature=temperature, entropy_gradient=gradient)


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


@contextmanager
def _as_rows(model: nn.Module, roles: Sequence[Names | None], b: int) -> Iterator[None]:
    if len(roles) > 1:
        with using(model, rows=[role for role in roles for _ in range(b)]):
            yield
    elif roles[0] is not None:
        with using(model, roles[0]):
            yield
    else:
        yield


# -- the head, apart from the rest


def _head(model: nn.Module, batch: Mapping[str, Tensor]) -> nn.Module | None:
    """The output head, if what it gives is what the model gives; else None."""
    found = find(model)
    head = output_head(found[0] if found else model)
    if head is None or "_orig_mod" in model._modules or any(map(is_sharded, head.parameters())):
        return None
    if model not in _plain:
        _plain[model] = _is_plain(model, head, batch["input_ids"][:1, :2])
    return head if _plain[model] else None


@torch.no_grad()
def _is_plain(model: nn.Module, head: nn.Module, ids: Tensor) -> bool:
    """Whether nothing comes after the head: it is given numbers that would show that."""
    seen: list[Tensor] = []

    def show(h: Tensor) -> Tensor:
        o = head(h.new_empty(0, h.shape[-1])).shape[-1] if not seen else seen[0].shape[-1]
        seen.append(
            torch.linspace(-99, 99, o, dtype=h.dtype, device=h.device).expand(*h.shape[:-1], o)
        )
        return seen[0]

    with _replaced(head, show):
        given = logits_of(model, inputs_of(model, {"input_ids": ids}))
    return len(seen) == 1 and given.shape == seen[0].shape and bool((given == seen[0]).all())


@contextmanager
def _headless(head: nn.Module | None) -> Iterator[None]:
    """The model gives what its head is given."""
    if head is None:
        yield
        return
    with _replaced(head, _as_it_is):
        yield


@contextmanager
def _replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A module computes something else, for this thread alone."""
    me = threading.get_ident()
    inside: list[bool] = []

    def call(h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if threading.get_ident() != me or inside:
            return own(h, *args, **kwargs)
        inside.append(True)
        try:
            return forward(h)
        finally:
            inside.clear()

    with _alone:
        own = module.forward
        before = module.__dict__.get("forward")
        module.__dict__["forward"] = call
        try:
            yield
        finally:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before

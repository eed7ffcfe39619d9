"""Patch and Method, the one abstraction: a method builds a patch for every site it takes.

A patch changes what a site *reads* (`value`), what it *computes* (`call`), or both where they
agree. Everything else (attaching, choosing, saving, merging) the core does once, for all methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from peftlite.core.site import Site
from peftlite.errors import PeftliteError, TargetError
from peftlite.fields import check_fields
from peftlite.spelling import Spelled

Target: TypeAlias = "str | re.Pattern[str] | Callable[[Site], bool]"
Targets: TypeAlias = "Target | Collection[Target] | None"


class Patch(nn.Module):
    """The trainable change at one site. Its parameters and buffers are what a file holds.

    Override `value`, or `call`, or both where they agree; then `call` is the fast path, taken where
    the module's operation is a known linear map, and never forms W'.
    """

    slot: str = ""
    """Where it sits in its module: a tensor's name, or `()` for the call. Set when attached."""
    index: tuple[int, int, int] | None = None
    """The part of the tensor it changes, as `(dim, start, stop)`; all of it if None."""
    unsaved: ClassVar[frozenset[str]] = frozenset()
    """Buffers that training alone needs: in `state_dict`, so that it can go on, not in files."""
    later: ClassVar[frozenset[str]] = frozenset()
    """The parameters that LoRA+ trains faster: factors B, which begin at zero."""

    has_value: bool = False
    """Whether the change can be read off a tensor, and so merged into it."""
    has_call: bool = False
    """Whether the change can be made to a call. A class that overrides `call` has one; a patch says
    no for itself where its `call` doesn't agree with its `value`, or costs more."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.has_value = cls.value is not Patch.value
        cls.has_call = cls.call is not Patch.call

    def value(self, w: Tensor) -> Tensor:
        """The tensor as read, in the shape of `w`, the tensor as it was, and in its dtype."""
        raise PeftliteError(f"{type(self).__name__} changes calls, not tensors")

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        """U (…, m, r), V (…, r, n) and s, where `value` is W + s·UV for a W (…, m, n); or None.

        A module that reads W and only multiplies with it then does so without W'.
        """

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call as made; `inner` is what stood there before.

        At a tensor of a linear map, `inner` is the `peftlite.core.maps.Map` itself.
        """
        raise PeftliteError(f"{type(self).__name__} changes tensors, not calls")

    def reset(self, w: Tensor | None) -> None:
        """Fills the parameters as the method begins; `w` is the base tensor, in the shape of
        its site; None at a call."""

    def fit(self, w: Tensor, change: Tensor) -> None:
        """Fills the parameters so that W' is `w + change`, or as near to it as they allow.

        `change` is in the shape of `w`, in fp64. Raises PeftliteError where a method can't.
        """
        raise PeftliteError(
            f"{type(self).__name__} can't be fitted to a change of weights: extract with methods "
            "such as pl.LoRA, pl.FullTuning or pl.SparseMask"
        )

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Takes on the shapes that a file has, where they come from data and not from the site."""

    def verify(self) -> None:
        """Raises ValueError if the values that a file gave it can't be."""

    def saved(self) -> dict[str, Tensor]:
        """What a file holds of it, by name: its state but for what training alone needs."""
        state = self.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name not in self.unsaved}

    def regularizer(self) -> Tensor | None:
        """A scalar that the method adds to the loss."""


@dataclass(frozen=True, kw_only=True)
class Method(Spelled):
    """The hyperparameters of one method; subclasses are frozen dataclasses.

    Args:
        targets: the sites to take (see `docs/concepts.md`, "Targets"); the method's own if None.
        exclude: sites not to take, in the same language.
        dtype: of the patch's parameters; by default the tensor's own, or fp32 where that is half.

    Raises:
        PeftliteError: a setting is none of those allowed.
    """

    targets: Targets = None
    exclude: Targets = None
    dtype: torch.dtype | None = None

    known: ClassVar[dict[str, type[Method]]] = {}
    added: ClassVar[Mapping[str, Any]] = {}
    """Settings that older files lack, and what theirs was; a file has them where they differ."""
    takes: ClassVar[str] = "nothing"
    """What the method works on, as its error messages say it: "tensors of 2 or more dimensions"."""
    rate: ClassVar[float] = 1.0
    """The learning rate for AdamW, times LoRA's for the model's width: see train/auto.py."""
    rate_by_width: ClassVar[bool] = True
    """Whether that is so; or else `rate` is the rate itself, for every width."""

    def __post_init__(self) -> None:
        dtype = self.dtype
        if dtype is not None and not (
            isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        ):
            raise PeftliteError(f"dtype must be such as torch.float32 or bfloat16, not {dtype!r}")
        check_fields(self)

    def __init_subclass__(cls, abstract: bool = False) -> None:
        # a file names its methods by class name
        super().__init_subclass__()
        if not abstract:
            Method.known[cls.__name__] = cls

    def default(self, site: Site) -> bool:
        """Whether to take `site` when no targets are given."""
        return self.accepts(site)

    def accepts(self, site: Site) -> bool:
        """Whether to take `site` when the module around it is named."""
        raise PeftliteError(f"{type(self).__name__} is no method: it doesn't override `accepts`")

    def choose(self, picked: Sequence[Site], everything: Sequence[Site]) -> Sequence[Site]:
        """The sites to take, given those picked; override it where one depends on the others.

        Raises TargetError if there is nothing to go by.
        """
        return picked

    def build(self, site: Site) -> Patch:
        """A patch for `site` on its device, parameters not yet filled. Raises TargetError."""
        raise PeftliteError(f"{type(self).__name__} is no method: it doesn't override `build`")

    def build_all(self, sites: Sequence[Site]) -> list[Patch]:
        """A patch for each of a delta's sites; override it to share parameters among them.

        Raises TargetError.
        """
        return [self.build(site) for site in sites]

    def reset_all(self, patches: Sequence[Patch], tensors: Sequence[Tensor | None]) -> None:
        """Fills a fresh delta's parameters; override it where one site depends on the others.

        `tensors` are the base's, each in the shape of its site. Raises PeftliteError where they
        can't be gone by.
        """
        for patch, w in zip(patches, tensors, strict=True):
            patch.reset(w)

    def fit_all(
        self, patches: Sequence[Patch], tensors: Sequence[Tensor], changes: Iterable[Tensor]
    ) -> None:
        """Fits patches to changes of their tensors, which are formed anew on each pass.

        A change is in the shape of its tensor, in fp64. Raises PeftliteError where it can't.
        """
        for patch, w, change in zip(patches, tensors, changes, strict=True):
            patch.fit(w, change)

    def step(self, patches: Sequence[Patch]) -> None:
        """What the method does to its patches of one delta after each step of the optimizer.

        Raises PeftliteError where it lacks what it goes by, such as gradients.
        """

    def check(self, *sites: Site) -> None:
        """Raises TargetError for a site that was spelled out and that the method doesn't accept."""
        for site in sites:
            if not self.accepts(site):
                raise self.refuse(site)

    def refuse(self, site: Site) -> TargetError:
        """The error to raise for a site that was spelled out and can't be taken."""
        what = "a call" if site.is_call else f"a tensor of shape {tuple(site.shape)}"
        return TargetError(f"{site.address} is {what}; {type(self).__name__} takes {self.takes}")


class WeightMethod(Method, abstract=True):
    """A method of matrices: by default every weight of a linear map but the output head's."""

    takes = "tensors of 2 or more dimensions"
    patch: ClassVar[type[Any]]
    """What makes a patch for a site of a method; where a method doesn't override `build`."""

    def default(self, site: Site) -> bool:
        return site.linear and not site.head

    def accepts(self, site: Site) -> bool:
        return not site.is_call and site.whole.dim() >= 2

    def build(self, site: Site) -> Patch:
        self.check(site)
        return type(self).patch(site, self)


def apply(patches: Sequence[Patch], w: Tensor) -> Tensor:
    """W' in the shape of `w`, as `patches` on all or parts of it change it, one after another."""
    for patch in patches:
        if patch.index is None:
            w = patch.value(w)
        else:
            dim, start, stop = patch.index
            part = patch.value(w.narrow(dim, start, stop - start))
            w = w.slice_scatter(part, dim, start, stop)
    return w


def trainable(*shape: int, site: Site, dtype: torch.dtype | None) -> nn.Parameter:
    """An unfilled parameter for a patch at `site`; of a dtype of its own, or that of the site's.

    Example:
        site = pl.plan(nn.Linear(4, 2), pl.BitFit()).delta.placed["bias"].site
        d = pl.methods.trainable(2, site=site, dtype=None)
    """
    return nn.Parameter(torch.empty(shape, dtype=dtype or site.parameter_dtype, device=site.device))

"""initialize: starts LoRA's factors from data: inputs, gradients, or what quantising lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.assign import Placed
from peftlite.core.delta import Delta
from peftlite.core.find import named, require
from peftlite.core.site import whole_address
from peftlite.core.tensors import narrow, wide
from peftlite.core.turns import in_turn
from peftlite.errors import PeftliteError
from peftlite.methods.lora import LoRAPatch
from peftlite.quant.packed import Packed
from peftlite.table import listed, short
from peftlite.verbs.use import using

Loss = Callable[[nn.Module, Any], Any]


@in_turn
def initialize(
    model: nn.Module,
    delta: Delta | str,
    batches: Iterable[Any] = (),
    *,
    loss: Loss | None = None,
    original: Mapping[str, Tensor] | None = None,
) -> None:
    """Starts the factors of a fresh LoRA delta from data, as its `init` says.

    - "eva": A holds the first r right singular vectors of the map's inputs; B is zero. Paischer et
      al., arXiv:2410.07170, §3; every site keeps its rank.
    - "lora_ga": A = κ·V[:r]ᵀ and B = κ·U[:, r:2r], with USVᵀ the gradient of W and κ = o^¼/√γ,
      γ = 16, so that the first step of the factors is the nearest to one of W itself. Wang et al.,
      arXiv:2407.05000, §3.
    - "corda": s·BA is the part of W that matters most to the inputs, the first r terms of
      svd(WC)·C⁻¹, with C their covariance. Yang et al., arXiv:2406.05223, §3, the mode for
      learning a task ("instruction-previewed").
    - "loftq": s·BA is the best product of rank r for W₀ − W, with W₀ the weights before they were
      quantised and W those of the model. Li et al., arXiv:2310.08659, algorithm 1 with T = 1;
      `pl.quantize(model, rank=..., iterations=T)` does it with any T, in the base.

    With "lora_ga" and "corda" the model gives what it gave before; "loftq" brings it nearer to the
    original. Everything is computed before anything is changed.

    Args:
        batches: examples of the task, enough for every map to see r inputs or more.
        loss: `loss(model, batch)` runs the model on a batch and gives the loss, a scalar. By
            default `model(**batch).loss`.
        original: the state dict of the model before it was quantised, for "loftq".

    Raises:
        PeftliteError: no site goes by data, or the data for one is missing or isn't finite.

    Example:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        delta = pl.attach(model, pl.LoRA(rank=2, init="eva"))
        pl.initialize(model, delta, [torch.randn(8, 4)], loss=lambda model, x: model(x).sum())
    """
    delta = named(require(model)[1], delta)
    sites = {a: p for a, p in delta.placed.items() if _init(p) in _STARTS}
    if delta.merged or not sites:
        raise PeftliteError(
            f"{delta.name!r} has nothing to initialize in this model: give a delta that is "
            "not merged, and of pl.LoRA(init=...) with one of " + ", ".join(map(repr, _STARTS))
        )
    found = _look(model, sites, batches, loss or (lambda model, batch: model(**batch).loss))
    for address, placed in _having(sites, "loftq").items():
        found[address] = _before_quantising(address, placed, original or {})
    if missing := [address for address in sites if address not in found]:
        raise PeftliteError(
            f"the batches reached {len(found)} of {len(sites)} sites, and not {listed(missing)}: "
            "give batches that the model runs on, or leave those sites out with exclude="
        )
    starts = {address: _start(placed, found[address]) for address, placed in sites.items()}
    for address, (a, b) in starts.items():
        patch: Any = sites[address].patch
        patch.start(sites[address].site.tensor, a, b)


def _init(placed: Placed) -> str | None:
    return placed.method.init if isinstance(placed.patch, LoRAPatch) else None


def _having(sites: Mapping[str, Placed], *inits: str) -> dict[str, Placed]:
    return {address: placed for address, placed in sites.items() if _init(placed) in inits}


def _finite(address: str, data: Tensor) -> Tensor:
    if not data.isfinite().all():
        raise PeftliteError(f"the data for {address} has values that aren't finite")
    return data


def _before_quantising(address: str, placed: Placed, original: Mapping[str, Any]) -> Tensor:
    """What a site's tensor was before it was quantised. Raises PeftliteError."""
    name, shape = whole_address(address), placed.site.whole.shape
    whole = original.get(name)
    if not isinstance(whole, Tensor) or whole.shape != shape:
        raise PeftliteError(
            f"init='loftq' goes by original[{name!r}], the tensor before it was quantised, of "
            f"shape {tuple(shape)}: not {short(whole)}"
        )
    return _finite(address, _part(placed, whole.to(placed.site.device)))


def _part(placed: Any, whole: Tensor) -> Tensor:
    """What of a whole tensor a site takes, as its matrices (o, i)."""
    return placed.patch.matrices(narrow(whole, placed.site.index))


# -- looking


def _look(
    model: nn.Module, sites: dict[str, Placed], batches: Iterable[Any], loss: Loss
) -> dict[str, Any]:
    """The statistics of the sites, by address, in one pass over the batches."""
    seen: dict[str, Any] = {}
    by_gradient = _having(sites, "lora_ga")
    tensors = {address: placed.site.whole for address, placed in by_gradient.items()}
    for address in (a for a, tensor in tensors.items() if isinstance(tensor, Packed)):
        raise PeftliteError(
            f"{address} is packed, and init='lora_ga' goes by a gradient, which codes have none "
            "of: take another init, such as 'eva'"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(using(model, None))
        stack.enter_context(_learning(tensors.values()))
        for address, placed in _having(sites, "eva", "corda").items():
            stack.enter_context(_listening(seen, address, placed))
        for batch in batches:
            with torch.set_grad_enabled(bool(tensors)):
                value = loss(model, batch)
            if tensors:
                grads = torch.autograd.grad(value, [*tensors.values()], allow_unused=True)
                for (address, placed), grad in zip(by_gradient.items(), grads, strict=True):
                    if grad is not None:
                        part = _finite(address, _part(placed, grad.to_dense()))
                        seen[address] = seen.get(address, 0) + part
    return seen


@contextlib.contextmanager
def _learning(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Weights that get gradients for once."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


@contextlib.contextmanager
def _listening(seen: dict[str, Any], address: str, placed: Placed) -> Iterator[None]:
    """Takes in what the site's module is called with."""
    patch, site = placed.patch, placed.site
    start, stop = site.index[1:] if site.index and site.cuts_inputs else (0, None)
    kind = Covariance if patch.method.init == "corda" else Directions

    @torch.no_grad()
    def listen(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = (*args, *kwargs.values())[0][..., start:stop].flatten(0, -2)
        seen.setdefault(address, kind(patch.method.rank)).add(_finite(address, x.to(wide(x))))

    handle = site.module.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Directions:
    """The first right singular vectors of rows that come batch by batch, in bounded memory."""

    def __init__(self, rank: int):
        self.kept: int = 4 * rank
        self.rows: Any = None

    def add(self, x: Tensor) -> None:  # (tokens, i)
        rows = x if self.rows is None else torch.cat([self.rows, x])
        _, s, v = torch.linalg.svd(rows, full_matrices=False)
        self.rows = (s[:, None] * v)[: self.kept]

    def first(self, r: int) -> Tensor:
        # complete where there were fewer rows than r; svd's own vectors are of unit length
        return torch.linalg.svd(self.rows, full_matrices=True).Vh[:r]


class Covariance:
    """XᵀX of rows that come batch by batch."""

    def __init__(self, _: int):
        self.total: Any = 0.0

    def add(self, x: Tensor) -> None:  # (tokens, i)
        x = x.double()
        self.total = self.total + x.T @ x


# -- starting


@torch.no_grad()
def _start(placed: Placed, found: Any) -> tuple[Tensor, Tensor]:
    return _STARTS[placed.method.init](placed.patch, _part(placed, placed.site.whole), found)


def _eva(patch: LoRAPatch, w: Tensor, inputs: Directions) -> tuple[Tensor, Tensor]:
    return inputs.first(patch.method.rank), torch.zeros_like(patch.b)


def _lora_ga(patch: LoRAPatch, w: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    r, o = patch.method.rank, w.shape[-2]
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    factor = o**0.25 / 16**0.5
    return factor * v[..., :r, :], factor * u[..., r : 2 * r]


def _corda(patch: LoRAPatch, w: Tensor, inputs: Covariance) -> tuple[Tensor, Tensor]:
    c = inputs.total
    # fewer inputs than features, or features that are always zero, and there is no C⁻¹
    c.diagonal().add_(1e-6 * c.diagonal().mean() + torch.finfo(c.dtype).tiny)
    u, s, v = torch.linalg.svd(w.double() @ c, full_matrices=False)
    r = patch.method.rank
    root = s[:r].div(patch.scale).sqrt()
    return root[:, None] * torch.linalg.solve(c, v[:r].T).T, u[:, :r] * root


def _loftq(patch: LoRAPatch, w: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    r = patch.method.rank
    u, s, v = torch.linalg.svd(original - w, full_matrices=False)
    root = s[..., :r].div(patch.scale).sqrt()
    return root[..., :, None] * v[..., :r, :], u[..., :r] * root[..., None, :]


_STARTS: dict[str | None, Callable[..., tuple[Tensor, Tensor]]] = {
    "eva": _eva,
    "lora_ga": _lora_ga,
    "corda": _corda,
    "loftq": _loftq,
}

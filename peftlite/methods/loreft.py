"""LoReFT: h + Rᵀ(Wh + b − Rh), an intervention in a subspace of what blocks give."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import solve_triangular, vector_norm

from peftlite.core.patch import trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.errors import PeftliteError
from peftlite.fields import integer, one_of
from peftlite.methods.calls import CallMethod, CallPatch, is_block, is_made
from peftlite.methods.features import Features, arguments, by_name, change_first
from peftlite.methods.keywords import POSITIONS, begun, real

Init = Literal["linear", "identity"]
Counted = Literal["sequence", "call"]


def rotation(v: Tensor) -> Tensor:
    """R (r, d) of the rows v (r, d): for unit vectors, H_r … H₁ = I − Vᵀ(½I + L)⁻¹V, L the lower
    part of VVᵀ."""
    v = v.to(wide(v))
    with torch.autocast(v.device.type, enabled=False):
        v = v / vector_norm(v, dim=-1, keepdim=True)
        identity = torch.eye(*v.shape, dtype=v.dtype, device=v.device)
        r = len(v)
        inverse = (v @ v.mT).tril(-1) + identity[:, :r] / 2
        return identity - v[:, :r].mT @ solve_triangular(inverse, v, upper=False)


def reflections(matrix: Tensor) -> Tensor:
    """The rows v (r, d) whose R spans what the rows of a matrix (r, d) span."""
    return torch.geqrf(matrix.mT)[0].tril(-1).fill_diagonal_(1.0).mT


class LoReFTPatch(CallPatch):
    """h + Rᵀ((W − R)h + b), with `w` W (r, d) and `b` b (r).

    R is the first r rows of the product of reflections H_r … H₁, with H = I − 2vvᵀ/|v|² for the
    rows v of `v` (r, d): whatever they become in training, R's rows are orthonormal.
    """

    method: LoReFT
    everywhere: bool
    v: nn.Parameter
    w: nn.Parameter
    b: nn.Parameter

    def __init__(self, site: Site, method: LoReFT, widths: Features):
        super().__init__(site, widths)
        self.method, self.everywhere = method, method.positions == "all"
        self.ends: tuple[int, int] = method.ends
        self.names: tuple[str, ...] = arguments(site.module)
        shapes = (method.rank, self.o), (method.rank, self.o), (method.rank,)
        self.v, self.w, self.b = (
            trainable(*shape, site=site, dtype=method.dtype) for shape in shapes
        )

    def reset(self, w: Tensor | None) -> None:
        if self.v.is_meta:
            return
        # the reflections that a QR of a random matrix is made of: R spans a random subspace
        self.v.copy_(reflections(torch.randn(self.v.mT.shape, device=self.v.device).mT))
        if self.method.init == "identity":
            self.w.copy_(self.rotation())
            self.b.zero_()
        else:
            bound = self.o**-0.5
            for parameter in (self.w, self.b):
                nn.init.uniform_(parameter, -bound, bound)

    def rotation(self) -> Tensor:
        """R (r, d)."""
        return rotation(self.v)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(self.names, args, kwargs)
        return change_first(inner(*args, **kwargs), lambda h: self._intervene(h, given))

    def _intervene(self, h: Any, given: Mapping[str, Any]) -> Tensor:
        self.check(h, self.o)
        change = self.along(self._change, h)
        places = self.positions(h, given, *self.ends)
        return h + (change if places is None else change * places[..., None])

    def _change(self, h: Tensor) -> Tensor:
        rotation = self.rotation()
        inward = self.w - rotation.to(self.w.dtype)  # exactly zero at W = R
        hidden = F.linear(h, inward.to(h.dtype), self.b.to(h.dtype))
        return F.linear(hidden, rotation.mT.to(h.dtype))

    def positions(self, h: Tensor, given: Mapping[str, Any], first: Any, last: Any) -> Any:
        """Where to intervene, (b, t) or (t), by how many are first and last; everywhere if None."""
        places = given.get("reft_positions")
        if places is None and self.everywhere:
            return None
        t = h.shape[-2] if h.dim() > 2 and self.dim == -1 else None
        if t is None or (places is not None and places.shape[-1] != t):
            what = f"positions={self.method.positions!r}"
            what = what if places is None else f"reft_positions of shape {tuple(places.shape)}"
            raise PeftliteError(
                f"{what} need a tensor (b, t, d); {self.address} gives {tuple(h.shape)}"
            )
        if places is not None:
            return places
        places = torch.arange(t, device=h.device)
        if self.method.counted == "call":
            return _ends(places, real(given, self.address, t), first, last)
        known = (given.get(name) for name in POSITIONS)
        index = next((p for p in known if isinstance(p, Tensor) and p.dim() < 3), None)
        if index is None:
            index = places + begun(given, self.address, t)
        begins = (index == 0).any(-1, keepdim=True)
        return (index < first) | ((places >= t - last) & begins)


def _ends(places: Tensor, real: Tensor | None, first: Any, last: Any) -> Tensor:
    """Which places (t) are the first and last of those that are real (b, t); of all if None."""
    begin, end = 0, len(places)
    if real is not None:
        begin = real.int().argmax(-1, keepdim=True)
        end = begin + real.sum(-1, keepdim=True)
    index, left = places - begin, end - places
    return ((index >= 0) & (index < first)) | ((left > 0) & (left <= last))


@dataclass(frozen=True)
class LoReFT(CallMethod):
    """h' = h + Rᵀ(Wh + b − Rh) for the vectors h (d) that a block gives. R (r, d), W (r, d), b (r).

    Wu et al., arXiv:2404.03592, §3.2. R's rows are orthonormal, and stay so in training. By
    default it takes the calls of blocks, the residual stream: of modules that are numbered in a
    list called layers, blocks, h or the like, and in no other such. As in the paper it changes the
    output from the start.

    Positions are counted by the `position_ids` or `cache_position` that a block is given, as
    transformers do. So padding on the left isn't counted, and generation changes the prompt and
    leaves what is decoded from a cache alone. A block that is given neither counts from the start
    of its cache, or else of the call. Where each row has its own, as where answers follow prompts,
    say so by `model(…, reft_positions=at)`, with `at` (b, t) true where to intervene: models that
    hand keyword arguments down to their blocks, as decoders in transformers do, take it.

    Args:
        rank: r.
        positions: "all", or the first and last of a prompt: "f7+l7", "f7", "l7".
        counted: "sequence": from where a sequence begins, as above; "call": by each call on its
            own, between the padding that its mask has on either side. So what is decoded from a
            cache is a first and last position, too: adapters' way, for its files.
        init: "linear": the paper's, R of a random subspace, W and b uniform in ±1/√d; "identity":
            W = R and b = 0, so that nothing changes at first.
        width: d, where it can't be told from a module's layers.

    Raises:
        PeftliteError: `positions` can't be read.
    """

    rank: int = integer(4)
    positions: str = "all"
    init: Init = one_of("linear", Init)
    counted: Counted = one_of("sequence", Counted)

    added: ClassVar[Mapping[str, Any]] = {"counted": "sequence"}
    # 9e-4 for LLaMA-7B (×3): stanfordnlp/pyreft, examples/loreft/README.md
    rate: ClassVar[float] = 3
    takes = "calls that are made and give features, at least rank of them"
    patch = LoReFTPatch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "all" and not any(self.ends):
            raise PeftliteError(
                f"positions must be 'all' or such as 'f7+l7', 'f7' or 'l7', not {self.positions!r}"
            )

    @property
    def ends(self) -> tuple[int, int]:
        """How many of the first and of the last positions it takes; (0, 0) if it isn't said so."""
        said = re.fullmatch(r"f(\d{1,9})(?:\+l(\d{1,9}))?|l(\d{1,9})", str(self.positions))
        return (int(said[1] or 0), int(said[2] or said[3] or 0)) if said else (0, 0)

    def default(self, site: Site) -> bool:
        return is_made(site) and is_block(site)

    def suits(self, wide: Features) -> bool:
        return wide.o >= self.rank

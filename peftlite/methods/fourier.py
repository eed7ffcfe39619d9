"""FourierFT: W' = W + α·Re(F⁻¹(C)), a change whose Fourier transform has a few entries, learned."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peftlite.core.layout import Layout
from peftlite.core.maps import Map
from peftlite.core.patch import Patch, WeightMethod, trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.fields import integer, number, one_of, positive

Init = Literal["normal", "zero"]


class FourierFTPatch(Patch):
    """`c` (*stack, n) holds the entries of C that aren't zero: c[j] is the j-th that is drawn.

    As ΔW is real, an entry c at (u, v) is as good as c/2 there and c/2 at (−u, −v), and a real
    transform needs but the half of C with u ≤ o/2: all of it, where −u is u, and else one of both.
    """

    layout: Layout
    alpha: float
    i: int
    o: int
    normal: bool
    seed: int

    places: Tensor
    rounds: list[int]

    sparse: ClassVar[int] = 1024
    """From how many entries of W for one of c on turning the inputs is cheaper than forming W'."""

    def __init__(self, site: Site, method: FourierFT):
        super().__init__()
        self.layout, self.alpha = site.layout, method.alpha
        self.i, self.o = self.layout.i, self.layout.o
        self.normal, self.seed = method.init == "normal", method.seed
        self.n: int = min(method.n, self.o * self.i)
        self.c: nn.Parameter = trainable(*self.layout.stack, self.n, site=site, dtype=method.dtype)
        self._place()
        if not site.rides or self.n * self.sparse > self.o * self.i:
            self.has_call = False

    def reset(self, w: Tensor | None) -> None:
        self.c.normal_() if self.normal else self.c.zero_()

    def _place(self) -> None:
        if self.c.is_meta:
            places, self.rounds = torch.empty(3, self.n, dtype=torch.int64), [self.n]
        else:
            places, self.rounds = _places(self.o, self.i, self.n, self.seed)
        self.register_buffer("places", places.to(self.c.device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierFTPatch:
        super()._apply(fn, recurse)
        self._place()  # what `fn` made of them may be empty
        return self

    def _entries(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α·c/2 in fp32 at least, the rows u ≤ o/2 and columns v of C, and whether −u is u."""
        order, u, v = self.places.unbind()
        c = self.alpha / 2 * self.c.to(wide(w, self.c))[..., order]
        return c, u, v, 2 * u % self.o == 0

    def value(self, w: Tensor) -> Tensor:
        c, u, v, both = self._entries(w)
        half = c.new_zeros(*c.shape[:-1], (self.o // 2 + 1) * self.i)
        half = half.index_add(-1, u * self.i + v, c)
        half = half.index_add(-1, u * self.i + -v % self.i, torch.where(both, c, 0))
        half = torch.fft.ifft(half.unflatten(-1, (-1, self.i)))
        return self.layout.add(w, torch.fft.irfft(half, n=self.o, dim=-2))

    def call(self, inner: Map, input: Tensor) -> Tensor:
        c, u, v, both = self._entries(input)
        if not input.numel():  # of an expert without tokens: MKL transforms no empty batch
            return inner(input) + 0 * c.sum()
        # ΔW x is F⁻¹(C F⁻¹(x)), and F⁻¹(x) at v is F(x) at −v, the conjugate of F(x) at v
        high = 2 * v > self.i
        real, imaginary = torch.where(both, 2 * c, c), torch.where(high, c, -c)
        factors = torch.stack([real, torch.where(both, 0, imaginary)], -1)
        x = torch.view_as_real(torch.fft.rfft(input.to(c.dtype), norm="forward"))
        terms = x.index_select(-2, torch.where(high, self.i - v, v)) * factors
        sums = terms.new_zeros(*terms.shape[:-2], self.o // 2 + 1, 2)
        for rows, part in zip(u.split(self.rounds), terms.split(self.rounds, -2), strict=True):
            sums.index_add_(-2, rows, part)
        y = inner(input)
        return y + torch.fft.irfft(torch.view_as_complex(sums), n=self.o).to(y.dtype)


@functools.cache
def _places(o: int, i: int, n: int, seed: int) -> tuple[Tensor, list[int]]:
    """Which c sits where: (3, n) of its number j, its row u ≤ o/2 and its column v.

    They come in rounds, of the sizes given, none of which has a row twice: so sums over a row have
    one order on any device.
    """
    places, taken = [], Counter[int]()
    for j, place in enumerate(draw(n, o * i, seed)):
        u, v = divmod(place, i)
        if 2 * u > o:
            u, v = o - u, -v % i
        places.append((taken[u], j, u, v))
        taken[u] += 1
    places.sort()
    sizes = Counter(place[0] for place in places)
    return torch.tensor(places).T[1:].contiguous(), list(sizes.values())


def draw(n: int, size: int, seed: int) -> list[int]:
    """`torch.randperm(size)[:n]` of a seed, without the rest and whatever version of torch runs.

    It is a shuffle by the Mersenne Twister, whose numbers NumPy promises never to change.
    """
    import numpy

    words = numpy.random.RandomState(seed).randint(2**32, size=n, dtype=numpy.uint32)
    drawn, moved = [], dict[int, int]()
    for k, word in enumerate(words.tolist()):
        at = k + word % (size - k)
        drawn.append(moved.get(at, at))
        moved[at] = moved.get(k, k)
    return drawn


@dataclass(frozen=True)
class FourierFT(WeightMethod):
    """W' = W + α·Re(F⁻¹(C)): C (o, i) is zero but at n random entries, which are learned.

    Gao et al., arXiv:2405.03003, §3.1. F⁻¹ is the inverse discrete Fourier transform, divided by
    o·i as in the paper's Algorithm 1. Sites of one shape have their entries at the same places,
    those that peft draws from the same seed, so the file holds the learned numbers alone. Where
    they are few for a linear map, W' is never formed: y = Wx + α·Re(F⁻¹(C F⁻¹(x))). A weight of
    more than two dimensions is a stack of matrices, each with its own numbers; a convolution's
    kernel is one matrix of its first dimension by the rest. By default it takes every weight of a
    linear map but the output head's.

    Args:
        n: the number of entries, at most all.
        alpha: α. The entries of a fresh ΔW have a standard deviation of about α·√(n/2)/(o·i); the
            paper tunes it, and has 300 for LLaMA and ViT.
        init: what the numbers start at: "normal": the paper's N(0, 1), so that a fresh delta
            changes the output; "zero": it changes nothing.
        seed: of the places.
    """

    n: int = integer(1000)
    alpha: float = positive(300.0)
    init: Init = one_of("normal", Init)
    seed: int = number(2024, int, lambda seed: 0 <= seed < 2**32, "in [0, 2**32)")

    # 0.05 for Llama-2-7B, 0.05 to 0.12 for RoBERTa-base: Chaos96/fourierft, experiments
    rate: ClassVar[float] = 0.03
    rate_by_width = False
    patch: ClassVar[type[FourierFTPatch]] = FourierFTPatch

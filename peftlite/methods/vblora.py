"""VB-LoRA: W' = W + BA, with A and B put together from vectors of one bank that all sites share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import Patch, WeightMethod, trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.fields import integer, set_number
from peftlite.methods.low_rank import LowRankPatch


class Bank(nn.Module):
    """`vectors` (h, b), which all sites of a delta choose from."""

    def __init__(self, site: Site, method: VBLoRA):
        super().__init__()
        shape = method.num_vectors, method.vector_length
        self.vectors: nn.Parameter = trainable(*shape, site=site, dtype=method.dtype)


class VBLoRAPatch(LowRankPatch):
    """`logits_a` (*stack, r, ⌈i/b⌉, h) and `logits_b` (*stack, r, ⌈o/b⌉, h) choose the vectors.

    In its compact form the choice is made: of the k logits there are the k − 1 differences from the
    largest, which is all that softmax goes by, and `indices_a`, `indices_b` (…, k) tell whose.
    """

    method: VBLoRA
    bank: Bank

    logits_a: nn.Parameter
    logits_b: nn.Parameter
    indices_a: Any  # None but in the compact form, like the next
    indices_b: Any

    def __init__(self, site: Site, method: VBLoRA, bank: Bank):
        super().__init__(site)
        self.method, self.bank = method, bank
        for x, size in (("a", self.i), ("b", self.o)):
            shape = *self.stack, method.rank, -(-size // method.vector_length), method.num_vectors
            logits = trainable(*shape, site=site, dtype=method.dtype)
            self.register_parameter(f"logits_{x}", logits)
            self.register_buffer(f"indices_{x}", None)

    def reset(self, w: Tensor | None) -> None:
        self.logits_a.normal_(std=0.1)
        self.logits_b.normal_(std=0.1)

    def saved(self) -> dict[str, Tensor]:
        state = super().saved()
        return state | self._compact() if self.method.save_only_topk_weights else state

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        if "indices_a" in shapes:
            for name, x in self._compact().items():
                setattr(self, name, nn.Parameter(x.detach()) if name.startswith("logits") else x)

    def verify(self) -> None:
        chosen = [x for x in (self.indices_a, self.indices_b) if x is not None]
        if not all(0 <= int(x.min()) <= int(x.max()) < self.method.num_vectors for x in chosen):
            raise ValueError("indices of no vector in the bank")

    def _compact(self) -> dict[str, Tensor]:
        found, small = {}, self.method.num_vectors <= 256
        for x in "ab":
            logits, indices = self._choice(x)
            found[f"logits_{x}"] = logits[..., 1:] - logits[..., :1]
            found[f"indices_{x}"] = indices.to(torch.uint8 if small else torch.int32)
        return found

    def _choice(self, x: str) -> tuple[Tensor, Tensor]:
        """The k largest logits of every piece of A or B, and which vectors they are of."""
        logits, indices = getattr(self, f"logits_{x}"), getattr(self, f"indices_{x}")
        logits = logits.to(wide(logits))
        if indices is None:
            return logits.topk(self.method.topk)
        return F.pad(logits, (1, 0)), indices.long()

    def factors(self) -> tuple[Tensor, Tensor]:
        made = []
        for x, size in (("a", self.i), ("b", self.o)):
            logits, indices = self._choice(x)
            weights = logits.softmax(-1)
            vectors = self.bank.vectors.to(weights)[indices]  # (*stack, r, ⌈size/b⌉, k, b)
            made.append((weights[..., None] * vectors).sum(-2).flatten(-2)[..., :size])
        return made[0], made[1].mT


@dataclass(frozen=True)
class VBLoRA(WeightMethod):
    """W' = W + BA, where each piece of b numbers in a row of A or column of B is Σ softmax(σ)ₛ αₛ.

    Li et al., arXiv:2405.15179, §3.2. The α are the vectors of one bank (h, b) that all sites
    share, which is learned, and saved once. Every piece has its own h logits, whose k largest are
    its σ. Where b doesn't divide a size, the last piece is cut. A fresh delta changes the output a
    little: neither factor begins at zero, as a bank of zeros would never learn. Further dimensions
    of a weight are a stack of matrices, a convolution's kernel is one matrix of its first dimension
    by the rest. By default it takes every weight of a linear map but the output head's.

    Args:
        rank: r.
        num_vectors: h. The vectors begin uniform in ±0.02, the logits with σ = 0.1.
        vector_length: b.
        topk: k, at least 2: of one, the weight would be 1 whatever its logit.
        save_only_topk_weights: whether a file has, of the logits, only the choice and the weights
            of what is chosen, as the paper stores it (§3.4). It gives the same bits; what is loaded
            from it can be trained on, but for the choice.

    Raises:
        PeftliteError: `num_vectors` is below `topk`.
    """

    rank: int = integer(4)
    num_vectors: int = 256
    vector_length: int = integer(256)
    topk: int = integer(2, least=2)
    save_only_topk_weights: bool = False

    # * 1e-3 for vectors, 1e-2 for logits of RoBERTa-base (×1, ×9): leo-yangli/VB-LoRA, NLU/NLU
    rate: ClassVar[float] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        enough = f"a whole number from topk={self.topk} up"
        set_number(self, "num_vectors", int, lambda h: h >= self.topk, enough)

    def build_all(self, sites: Sequence[Site]) -> list[Patch]:
        self.check(*sites)
        banks = [Bank(site, self) for site in sites[:1]]
        return [VBLoRAPatch(site, self, banks[0]) for site in sites]

    def reset_all(self, patches: Sequence[Any], tensors: Sequence[Tensor | None]) -> None:
        for patch in patches[:1]:
            patch.bank.vectors.uniform_(-0.02, 0.02)
        super().reset_all(patches, tensors)

"""Prefix tuning: n learned keys and values in front of those of every attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import Method, Patch, trainable
from peftlite.core.site import Site, walk
from peftlite.errors import PeftliteError, TargetError
from peftlite.fields import integer, one_of
from peftlite.methods.attention import Prepend, is_attention, key_heads
from peftlite.methods.by_hand import ByHand, is_by_hand
from peftlite.methods.features import arguments, by_name
from peftlite.methods.past import (
    PastPatch,
    cache_of,
    dtype_of,
    empty,
    has_place,
    layer_of,
    past_sites,
)
from peftlite.methods.prompt import holds
from peftlite.table import listed

Positions = Literal["kept", "shifted"]


class Trunk(nn.Module):
    """tanh(E·Wᵀ + w) with `embedding` E: what all prefixes of one delta are made from."""

    embedding: nn.Parameter
    down: nn.Parameter
    down_bias: nn.Parameter

    def __init__(self, site: Site, method: PrefixTuning, d: int):
        super().__init__()
        self.embedding, self.down, self.down_bias = (
            trainable(*shape, site=site, dtype=method.dtype)
            for shape in ((method.prefix_length, d), (method.hidden_size, d), (method.hidden_size,))
        )

    def reset(self) -> None:
        self.embedding.normal_()
        _fill(self.down, self.down_bias)

    def forward(self) -> Tensor:
        return torch.tanh(F.linear(self.embedding, self.down, self.down_bias))


class PrefixPatch(Patch):
    """`prefix` (2, h, n, d), keys and values; reparametrised, a buffer for what `up` gives."""

    address: str
    prefix: nn.Parameter

    unsaved: ClassVar[frozenset[str]] = frozenset(
        {"trunk.embedding", "trunk.down", "trunk.down_bias", "up", "up_bias"}
    )

    up: Any  # where it is reparametrised, like the next
    up_bias: Any

    def __init__(self, site: Site, method: PrefixTuning, h: int, d: int, trunk: Trunk | None):
        super().__init__()
        self.address, self.trunk = site.address, trunk
        self.by_hand: ByHand | None = ByHand(site) if is_by_hand(site.module) else None
        make = functools.partial(trainable, site=site, dtype=method.dtype)
        prefix = make(2, h, method.prefix_length, d)
        if trunk is None:
            self.prefix = prefix
        else:
            self.register_buffer("prefix", prefix.data)
            self.up, self.up_bias = make(2 * h * d, method.hidden_size), make(2 * h * d)

    def reset(self, w: Tensor | None) -> None:
        if self.trunk is None:
            self.prefix.normal_()
        else:
            self.trunk.reset()
            _fill(self.up, self.up_bias)

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        # a file has the prefix alone
        if self.trunk is not None:
            self.trunk = self.up = self.up_bias = None
            self.prefix = nn.Parameter(self.prefix)

    def current(self) -> Tensor:
        """The prefix (2, h, n, d)."""
        if self.trunk is None:
            return self.prefix
        _, h, n, d = self.prefix.shape
        rows = F.linear(self.trunk().to(self.up.device), self.up, self.up_bias)
        return rows.view(n, 2, h, d).permute(1, 2, 0, 3)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.trunk is not None:
            with torch.no_grad():
                self.prefix.copy_(self.current())
        super()._save_to_state_dict(*args, **kwargs)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.attend(Prepend(self.current(), self.address), inner, *args, **kwargs)

    def attend(self, mode: Prepend, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call, with a prefix of its own or of a `mode`'s."""
        if self.by_hand is not None:
            output = self.by_hand.call(mode, inner, *args, **kwargs)
        else:
            with mode:
                output = inner(*args, **kwargs)
        if not mode.reached:
            raise PeftliteError(
                f"{self.address} came to no F.scaled_dot_product_attention in this call, so its "
                "prefix had no effect: for transformers, type "
                'model.set_attn_implementation("sdpa"), and ask for no output_attentions'
            )
        return output


class CachedPrefixPatch(PrefixPatch):
    """A prefix that its attention finds in the cache, where the `stack` puts it."""

    stack: Site
    site: Site
    layer: int | None
    names: tuple[str, ...]
    cache: str | None

    def __init__(self, stack: Site, site: Site, *rest: Any):
        super().__init__(site, *rest)
        self.stack, self.site, self.layer = stack, site, layer_of(site.module)
        self.names, self.cache = arguments(site.module), cache_of(site)

    def put(self, cache: Any, b: int) -> None:
        """Begins a layer of a cache, for a batch of b."""
        keys, values = self.current().to(dtype_of(self.stack))[:, None].expand(-1, b, -1, -1, -1)
        cache.update(keys, values, self.layer)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(self.names, args, kwargs)
        if given.get(self.cache) is None:  # checkpointing took it away
            given[self.cache] = empty(self.stack, False)
            self.put(given[self.cache], len(next(x for x in given.values() if x is not None)))
        return inner(**given)


@dataclass(frozen=True)
class PrefixTuning(Method):
    """softmax(q[P_k; K]ᵀ/√d)·[P_v; V]: n learned keys and values before those of an attention.

    Li & Liang, arXiv:2101.00190, §4. P_k and P_v (h, n, d) are learned for each attention. With the
    prefix an output changes from the start.

    With `positions="kept"` every query sees the prefix, whatever its masks, and it takes no
    positions: those of the tokens, and what a cache holds of them, stay as they are. By default it
    takes every attention that comes to torch's scaled_dot_product_attention: modules that call it,
    nn.MultiheadAttention, and transformers with attn_implementation="sdpa"; and T5's and GPT-J's,
    which are known. Others can't be reached, nor can attention whose values are narrower than its
    keys.

    With `positions="shifted"`, which is peft's, the prefix stands in the cache of a model of
    transformers as n tokens that went before: the tokens' positions begin at n, masks, position
    biases and sliding windows count it, and a cache keeps it. It takes the attention of every
    layer, however that is computed, of a decoder alone where there is one. As with prompts, such a
    cache is no start for another `generate`, and a static one has no room for it.

    Args:
        prefix_length: n.
        reparametrize: whether to learn, in place of P, a network that gives it (§4.3):
            P = tanh(E·Wᵀ + w)·Uᵀ + u, where E (n, h·d), W and w are shared by all sites. A file
            holds P alone, and a delta loaded from one goes on learning P itself.
        hidden_size: the width of the tanh.
        positions: "kept": the tokens keep theirs; "shifted": they begin behind the prefix.
        num_heads: h, the heads of the keys, where it can't be told from a module.
        head_dim: d, likewise.
    """

    prefix_length: int = integer(10)
    reparametrize: bool = False
    hidden_size: int = integer(512)
    positions: Positions = one_of("kept", Positions)
    num_heads: int | None = integer(None)
    head_dim: int | None = integer(None)

    added: ClassVar[Mapping[str, Any]] = {"positions": "kept"}
    # 5e-3 to 1e-2 for BERT- and RoBERTa-large (×6 to 12), 20 epochs and more:
    # THUDM/P-tuning-v2, run_script; * in 20 to 100 steps the highest tried were best, ×18 to 100
    rate: ClassVar[float] = 30
    takes = (
        "calls of attention that come to F.scaled_dot_product_attention (for transformers, type "
        'model.set_attn_implementation("sdpa") first) or of nn.MultiheadAttention'
    )

    @property
    def shifted(self) -> bool:
        """Whether the tokens begin behind the prefix."""
        return self.positions == "shifted"

    def default(self, site: Site) -> bool:
        if self.shifted:
            return has_place(site)
        # of two, one in the other, the inner one
        return self.accepts(site) and sum(_attends(m) for _, m in walk(site.module)) == 1

    def accepts(self, site: Site) -> bool:
        return has_place(site) if self.shifted else site.is_call and _attends(site.module)

    def choose(self, picked: Sequence[Site], everything: Sequence[Site]) -> Sequence[Site]:
        if not self.shifted:
            return picked
        found = past_sites(everything)
        if missing := [site.address for site in found[1:] if site not in picked]:
            raise TargetError(
                f"positions='shifted' takes the attention of every layer, and {listed(missing)} "
                "is left out: leave targets= and exclude= out"
            )
        return found

    def build_all(self, sites: Sequence[Site]) -> list[Patch]:
        if not self.shifted:
            return self._build(sites, PrefixPatch)
        stack, *attentions = sites
        if not attentions or not all(has_place(s) and holds(stack, s) for s in attentions):
            raise self.refuse(stack)
        layers = self._build(attentions, functools.partial(CachedPrefixPatch, stack))
        return [PastPatch(stack, self.prefix_length, layers), *layers]

    def _build(self, sites: Sequence[Site], make: Callable[..., Any]) -> list[Any]:
        shapes = [self._shape(site) for site in sites]
        trunk = None
        if self.reparametrize and sites:
            trunk = Trunk(sites[0], self, max(h * d for h, d in shapes))
        pairs = zip(sites, shapes, strict=True)
        return [make(site, self, h, d, trunk) for site, (h, d) in pairs]

    def _shape(self, site: Site) -> tuple[int, int]:
        """h and d of a site's keys. Raises TargetError."""
        given = self.num_heads and self.head_dim
        if not site.is_call or not (given or self.accepts(site)):
            raise self.refuse(site)
        h, d = key_heads(site.module)
        h, d = self.num_heads or h, self.head_dim or d
        if not h or not d:
            raise TargetError(
                f"how many heads the keys of {site.address} have, and how wide they are, can't be "
                "told from its attributes: say num_heads= and head_dim="
            )
        return h, d


def _attends(module: nn.Module) -> bool:
    """Whether a module's own attention can be given a prefix."""
    return is_attention(module) or is_by_hand(module)


def _fill(weight: Tensor, bias: Tensor) -> None:
    """As nn.Linear begins."""
    bound = weight.shape[1] ** -0.5
    for parameter in (weight, bias):
        nn.init.uniform_(parameter, -bound, bound)

"""Attention: what comes to torch's, with how many heads, and a prefix before its keys."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftlite.core import maps
from peftlite.core.site import walk
from peftlite.errors import PeftliteError
from peftlite.methods.features import of_layer

ATTENTION = SDPA, MHA = F.scaled_dot_product_attention, F.multi_head_attention_forward


class Prepend(TorchFunctionMode):
    """Within it, every attention that torch computes has `prefix` (2, h, n, d) before its tokens.

    It may be (2, b, h, n, d), a prefix for every row of a batch, and `hidden` (b, n) true where a
    row has no such token.

    A mode belongs to its thread. Of two, the one entered last goes first, and the other sees what
    it calls: prefixes add up.
    """

    prefix: Tensor
    n: int
    address: str
    hidden: Tensor | None
    reached: bool

    def __init__(self, prefix: Tensor, address: str, hidden: Tensor | None = None):
        super().__init__()
        self.prefix, self.n, self.address = prefix, prefix.shape[-2], address
        self.hidden, self.reached = hidden, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self._attend(*args, **kwargs)
        if func is MHA:
            return self._attend_in_module(*args, **kwargs)
        if func is Tensor.unflatten:  # written in Python in a way that dynamo can't trace from here
            func = torch.unflatten
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        n = self.n
        if self.hidden is not None:
            attn_mask, is_causal = self._hide(query, key, attn_mask, is_causal), False
        elif attn_mask is not None:
            attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.shape[-2])
            attn_mask = self.widen(attn_mask, len(key))
        if is_causal:
            # with n queries more in front, a query at i sees the prefix and the tokens up to i: no
            # mask is needed, which the fastest kernels don't take
            query = F.pad(query, (0, 0, n, 0))
        key, value = self.prepend(key, value)
        y = SDPA(query, key, value, attn_mask, dropout_p, is_causal, **options)
        return y[..., n:, :].clone() if is_causal else y  # code may want to view it

    def _hide(self, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """A mask (b, h, q, n + t) for rows with prefixes of their own."""
        if mask is None:
            mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
            mask = mask.tril() if is_causal else mask
        return self.widen(mask.expand(*mask.shape[:-1], key.shape[-2]), len(key))

    def widen(self, mask: Tensor, b: int) -> Tensor:
        """A mask (…, q, t), or what is added to scores, as one of (…, q, n + t) for b rows."""
        if self.hidden is None:
            return F.pad(mask, (self.n, 0), value=mask.dtype == torch.bool)
        front = self._front(b, mask.dtype)[:, None, None]
        lead = torch.broadcast_shapes(mask.shape[:-1], front.shape[:-1])
        return torch.cat([front.expand(*lead, -1), mask.expand(*lead, -1)], -1)

    def _front(self, b: int, dtype: torch.dtype) -> Tensor:
        """What a mask has for the prefixes of b rows (b, n): true, or 0, where one is there."""
        assert self.hidden is not None
        hidden = _for_each(self.hidden, b)
        if dtype == torch.bool:
            return ~hidden
        return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)

    def _attend_in_module(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Any,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        *rest: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """nn.MultiheadAttention's: it is handed its keys and values (b·h, t, d) ready made."""
        apart = options.get("use_separate_proj_weight")
        weights = (options[f"{x}_proj_weight"] for x in "qkv") if apart else in_proj_weight.chunk(3)
        w_q, w_k, w_v = weights
        _, b_k, b_v = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)

        def project(x: Tensor, w: Tensor, b: Any, last: Any, made: Any) -> Tensor:
            if made is not None:  # by another prefix
                return made.unflatten(0, (-1, num_heads))
            y = F.linear(x, w, b).view(len(x), -1, embed_dim_to_check)
            y = y if last is None else torch.cat([y, last.expand(-1, y.shape[1], -1)])
            return y.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)

        keys, values = self.prepend(
            project(key, w_k, b_k, bias_k, options.get("static_k")),
            project(value, w_v, b_v, bias_v, options.get("static_v")),
        )
        for name in ("attn_mask", "key_padding_mask"):
            if options.get(name) is not None:
                options[name] = F.pad(options[name], (self.n, 0 if bias_k is None else 1))
        if self.hidden is not None:
            options["key_padding_mask"] = self._hide_in_module(keys, **options)
        # it projects its inputs all the same: those without features cost nothing
        empty = key.new_empty(keys.shape[-2], *key.shape[1:-1], 0)
        options |= {"use_separate_proj_weight": True, "is_causal": False, "q_proj_weight": w_q}
        options |= {"k_proj_weight": w_k[:, :0], "static_k": keys.flatten(0, 1)}
        options |= {"v_proj_weight": w_v[:, :0], "static_v": values.flatten(0, 1)}
        shape = embed_dim_to_check, num_heads
        y, seen = MHA(
            query, empty, empty, *shape, in_proj_weight, in_proj_bias, None, None, *rest, **options
        )
        return y, None if seen is None else seen[..., self.n :]

    def _hide_in_module(
        self,
        keys: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """A key_padding_mask (b, n + t) for rows with prefixes of their own."""
        b, n = len(keys), self.n
        if key_padding_mask is None:
            dtype = torch.bool if attn_mask is None else attn_mask.dtype
            key_padding_mask = keys.new_zeros(b, keys.shape[-2], dtype=dtype)
        front = self._front(b, key_padding_mask.dtype)
        if front.dtype == torch.bool:
            front = ~front  # there true is what is masked
        return torch.cat([front, key_padding_mask[:, n:]], -1)

    def prepend(self, key: Tensor, value: Tensor) -> Iterator[Tensor]:
        """Keys and values (…, h, t, d), or (…, t, d) of one head, with the prefix in front."""
        self.reached = True
        *_, h, _, d = self.prefix.shape
        heads = key.shape[-3] if key.dim() > 3 else 1
        if heads % h or key.shape[-1] != d or value.shape[-1] != d:
            raise PeftliteError(
                f"{self.address} attends to keys {tuple(key.shape)} and values "
                f"{tuple(value.shape)}, and its prefix has {h} heads of {d} features: say "
                "num_heads= and head_dim="
            )
        prefix = self.prefix.to(key.dtype)
        if heads != h:  # each is shared by a group of queries
            prefix = prefix.repeat_interleave(heads // h, -3)
        if self.hidden is not None:
            prefix = [_for_each(p, len(key)) for p in prefix]
        return (
            torch.cat([p.expand(*x.shape[:-2], -1, -1), x], -2)
            for p, x in zip(prefix, (key, value), strict=True)
        )


def _for_each(x: Tensor, n: int) -> Tensor:
    """x (b, …) for n entries, as many for each of the b rows."""
    return x if len(x) == n else x.repeat_interleave(n // len(x), 0, output_size=n)


_KEY_HEADS = "num_key_value_heads num_kv_heads n_kv_heads n_kv_head kv_heads n_query_groups".split()
_HEADS = "num_heads num_attention_heads n_heads n_head nhead heads".split()
_WIDTHS = "head_dim attention_head_size head_size d_head dim_head key_value_proj_dim".split()


def key_heads(module: nn.Module) -> tuple[int | None, int | None]:
    """How many heads a module's keys have and how wide they are; None where it doesn't say."""

    holders = (module, getattr(module, "config", None))

    def number(names: Sequence[str], holders: Sequence[Any] = holders) -> int | None:
        found = (getattr(holder, name, None) for holder in holders for name in names)
        return next((n for n in found if isinstance(n, int)), None)

    heads, width = number(_HEADS), number(_WIDTHS)
    # what a module says of itself goes before what a config says of all
    shared = next((n for it in holders if (n := number(_KEY_HEADS + _HEADS, [it]))), None)
    if heads and shared and width is None:
        layers = [layer for _, m in walk(module) if maps.is_linear(m) and (layer := of_layer(m))]
        made = sum(layer.o for layer in layers)
        # all heads go into one map, and the others make just their queries, keys and values
        for layer in layers:
            if layer.i and (made - layer.o) * heads == layer.i * (heads + 2 * shared):
                width = layer.i // heads
    return shared, width


def is_attention(module: nn.Module) -> bool:
    """Whether a module's own code, going by the names in it, comes to an attention of torch's."""
    config = getattr(module, "config", None)
    return _attends(type(module), str(getattr(config, "_attn_implementation", None)))


@functools.cache
def _attends(owner: type, implementation: str) -> bool:
    todo, seen = [owner.forward], set()
    while todo:
        fn = inspect.unwrap(todo.pop())
        if not isinstance(fn, FunctionType) or fn in seen:
            continue
        seen.add(fn)
        names = set(_names(fn.__code__))
        used = {name: fn.__globals__[name] for name in names & fn.__globals__.keys()}
        modules = [vars(m) for m in used.values() if isinstance(m, ModuleType)]
        spaces = [used, *modules, *map(vars, owner.__mro__)]
        found = [space[name] for space in spaces for name in names & space.keys()]
        if "ALL_ATTENTION_FUNCTIONS" in used:  # of transformers
            found.append(used["ALL_ATTENTION_FUNCTIONS"].get(implementation))
        if names & {f.__name__ for f in ATTENTION} or any(f is SDPA or f is MHA for f in found):
            return True
        functions = (f for f in found if isinstance(f, FunctionType | staticmethod | classmethod))
        todo += (f for f in functions if not str(f.__module__).startswith("torch."))
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)

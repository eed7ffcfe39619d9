"""Virtual tokens: what a call with n more tokens in front makes of its arguments and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.errors import PeftliteError
from peftlite.methods.features import arguments, by_name
from peftlite.methods.keywords import MASK, POSITIONS, TOKENS, cache_in, of_tokens
from peftlite.table import short

# what virtual tokens have in the arguments that are per token; None where it is to be left
FILL = {"attention_mask": 1, "key_padding_mask": 0, "token_type_ids": 0, "labels": -100}
FILL |= dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask"))


class StackPatch(Patch):
    """At the call that takes the ids: puts the codes before them, and cuts them off the outputs."""

    n: int
    fill: dict[str, Any]
    cut: bool
    address: str
    names: tuple[str, ...]

    prompt: Any

    def __init__(self, prompt: Any, method: Any, site: Site, cut: bool):
        super().__init__()
        self.__dict__["prompt"] = prompt  # the embedding's patch has it as its own
        self.n, self.fill, self.cut = prompt.n, {**FILL, **method.fill}, cut
        self.embeds: bool = method.embeds
        self.address, self.names = site.address, arguments(site.module)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.run(self.prompt.before, self.lengthened, inner, *args, **kwargs)

    def run(
        self, before: Callable, beside: Callable, inner: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """The call with tokens as `before` makes them longer, and what goes `beside` them."""
        given = by_name(self.names, args, kwargs)
        name = self.tokens(given)
        tokens, past = given.pop(name), of_tokens(given, self.address)
        if self.embeds and name == "input_ids":
            name, tokens = "inputs_embeds", self.prompt.embedding.module(tokens)
            given.pop(name, None)
        rest = beside(given, tokens, past)
        if past:  # the prompt is in the cache
            return inner(**{name: tokens}, **rest)
        longer = before(tokens)
        output = inner(**{name: longer}, **rest)
        return cut(output, self.n, longer.shape[1]) if self.cut else output

    def tokens(self, given: Mapping[str, Any]) -> str:
        """The argument that holds the tokens, as embeddings or as ids."""
        for name in TOKENS:
            if given.get(name) is not None:
                return name
        for name, x in given.items():
            integer = isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32)
            if integer and x.dim() == 2 and name not in self.fill and name not in POSITIONS:
                return name
        raise PeftliteError(
            f"{self.address} is called without token ids of shape (b, t) for its prompt to go "
            "before: name the call that takes them with targets="
        )

    def lengthened(self, given: Mapping[str, Any], tokens: Tensor, past: int) -> dict[str, Any]:
        """The arguments beside the tokens, made n longer too."""
        return {name: self.lengthen(name, x, tokens, past) for name, x in given.items()}

    def lengthen(self, name: str, x: Any, tokens: Tensor, past: int) -> Any:
        """An argument, with what the virtual tokens have in it. Raises PeftliteError."""
        (b, t), value = tokens.shape[:2], self.fill.get(name, 0)
        if value is None or x is None or isinstance(x, bool | int | float | str):
            return x
        if cache_in({name: x}):  # whatever `fill` says: it is known by how much it holds
            return x
        if name in POSITIONS:
            front = torch.arange(0 if past else self.n, dtype=x.dtype, device=x.device)
            return torch.cat([front.expand(*x.shape[:-1], -1), x + self.n], -1)
        sized = isinstance(x, Tensor) and x.dim() > 1
        longer = sized and x.shape[0] in (1, b) and x.shape[1] == t
        fits = name in self.fill
        if name == MASK:
            fits, longer = sized and x.dim() == 2, longer or past
            if fits and past:
                check_room(x, self.n, past, t, self.address)
        elif fits:
            longer = longer and not past
        elif not longer:
            fits = isinstance(x, Tensor) and (x.is_floating_point() or not sized)
        if not fits:
            what = tuple(x.shape) if isinstance(x, Tensor) else short(x)
            raise PeftliteError(
                f"{self.address} is called with {name} {what}, which can't be made {self.n} tokens "
                f"longer: give it as (b, t, ...) and say fill={{{name!r}: 0}}, or whatever virtual "
                "tokens have there; or say None, for it to be left as it is"
            )
        return before(x, self.n, value) if longer else x


def check_room(mask: Tensor, n: int, past: int, t: int, address: str) -> None:
    """Raises PeftliteError if a mask made n longer is for more than is in a cache and goes on."""
    if mask.dim() != 2:
        raise PeftliteError(
            f"{address} is called with a mask {tuple(mask.shape)}, which can't be made {n} tokens "
            "longer: give it as (b, t)"
        )
    if mask.shape[1] + n > past + t:
        raise PeftliteError(
            f"{address} has {past} positions in its cache and {t} tokens to go on with, "
            f"{past + t - n} but for its prompt, and a mask of {mask.shape[1]}: a cache that holds "
            "a prompt can't be cropped, or given to another generate()"
        )


class AroundPatch(Patch):
    """At the call of an encoder and its decoder, which attends to the virtual tokens too."""

    n: int
    names: tuple[str, ...]

    def __init__(self, n: int, site: Site):
        super().__init__()
        self.n, self.names = n, arguments(site.module)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(self.names, args, kwargs)
        if isinstance(given.get("attention_mask"), Tensor):
            given["attention_mask"] = before(given["attention_mask"], self.n, 1)
        return cut_encoder(inner(**given), self.n)


def cut_encoder(output: Any, n: int) -> Any:
    """A model's output, what it says of its encoder without the first n tokens."""
    if isinstance(output, dict):
        for name in ("encoder_last_hidden_state", "encoder_hidden_states"):
            if output.get(name) is not None:
                output[name] = cut(output[name], n)
    return output


class LayersPatch(Patch):
    """At the call of a stack's layers, where the stack pools what they give."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return cut(inner(*args, **kwargs), self.n)


def before(x: Tensor, n: int, value: Any) -> Tensor:
    """x (b, t, ...) with n times `value` before each row."""
    return torch.cat([x.new_full((len(x), n, *x.shape[2:]), value), x], 1)


def cut(output: Any, n: int, t: int | None = None) -> Any:
    """An output without the first n positions of every (b, t, d) in it, caches left alone."""
    if isinstance(output, Tensor):
        has_prompt = output.dim() == 3 and t in (None, output.shape[1])
        return output[:, n:] if has_prompt else output
    if isinstance(output, tuple | list | dict):
        return pytree.tree_map(lambda x: cut(x, n, t), output, is_leaf=lambda x: x is not output)
    return output

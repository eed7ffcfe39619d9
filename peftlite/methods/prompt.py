"""Prompt tuning: n learned rows before the embeddings of the tokens, as if they were n more tokens.

    ids ─► [codes, ids] ─► the stack that takes them ─► outputs without their first n positions
                 └► its embedding: a row of the prompt for a code, for an id what it always gave

The codes are negative ids, each prompt's its own. So whatever a model makes of the shape of its ids
(positions, token types, masks) fits, and no state passes from the one call to the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftlite.errors import PeftliteError, TargetError
from peftlite.methods.features import is_called
from peftlite.patch import Method, Patch, check_choice, set_number, trainable
from peftlite.site import CALL, Site, raw
from peftlite.table import shown

Init = Literal["random", "vocabulary", "text"]

COMMON = 5000  # the most common tokens, which come first: the paper samples from them
POSITIONS = ("position_ids", "cache_position")
# what virtual tokens have in the arguments of a call that are per token; None: in those that aren't
FILL = {
    "attention_mask": 1,
    "key_padding_mask": 0,
    "token_type_ids": 0,
    "labels": -100,
    "past_key_values": None,
    "encoder_hidden_states": None,
    "encoder_attention_mask": None,
}


class Prompt(nn.Module):
    """The embeddings (n, d) of the virtual tokens, learned as they are."""

    def __init__(self, method: PromptMethod, embedding: Site):
        super().__init__()
        self.method, self.embedding = method, embedding
        d = raw(embedding.module, "weight").shape[1]
        self.rows = trainable(method.prompt_length, d, site=embedding, dtype=method.dtype)

    def forward(self) -> Tensor:
        return self.rows

    def reset(self) -> None:
        n, w = self.method.prompt_length, raw(self.embedding.module, "weight")
        if self.method.init == "random":
            nn.init.uniform_(self.rows, -0.5, 0.5)
        elif self.method.init == "vocabulary":
            self.rows.copy_(w[torch.randint(min(len(w), COMMON), (n,), device=w.device)])
        else:
            self.rows.copy_(w[list((self.method.init_ids * n)[:n])])

    def settle(self) -> None:
        """Makes the rows what is learned, where it was something that they come from."""


class PromptPatch(Patch):
    """The two that share a prompt. The codes of its n tokens are first, first - 1, …"""

    def __init__(self, prompt: Prompt, n: int, first: int):
        super().__init__()
        self.prompt, self.n, self.first = prompt, n, first

    def saved(self) -> dict[str, Tensor]:
        state = super().saved()
        return {"prompt.rows": state["prompt.rows"]}

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.prompt.settle()


class EmbeddingPatch(PromptPatch):
    """At the embedding's call: the rows of the prompt, where its codes are."""

    def reset(self, w: Tensor | None) -> None:
        self.prompt.reset()

    def call(self, inner: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        ids = next(iter((*args, *kwargs.values())))
        if ids.shape[-1] <= self.n:
            return inner(ids)  # no longer than the prompt alone: a step of decoding
        row = self.first - ids
        mine = (row >= 0) & (row < self.n)
        y = inner(ids.masked_fill(mine, 0))
        rows = F.embedding(row.clamp(0, self.n - 1), self.prompt().to(y.dtype))
        return torch.where(mine[..., None], rows, y)


class StackPatch(PromptPatch):
    """At the call that takes the ids: puts the codes before them, and cuts them off the outputs."""

    def __init__(self, prompt: Prompt, method: PromptMethod, site: Site, first: int, cut: bool):
        super().__init__(prompt, method.prompt_length, first)
        self.address, self.names, self.cut = site.address, parameters(site.module), cut
        self.fill: dict[str, float | None] = {**FILL, **method.fill}

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        name = self._tokens(given)
        tokens, past = given[name], cached(given.get("past_key_values"))
        for key, x in given.items():
            if key != name:
                given[key] = self._lengthen(key, x, tokens, past)
        if past:  # the prompt is in the cache
            return inner(**given)
        given[name] = self._prepend(tokens)
        output = inner(**given)
        return cut(output, self.n, given[name].shape[1]) if self.cut else output

    def _tokens(self, given: Mapping[str, Any]) -> str:
        """The argument that holds the tokens, as embeddings or as ids."""
        for name in ("inputs_embeds", "input_ids"):
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

    def _prepend(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():
            front = self.prompt().to(tokens.dtype)
        else:
            front = self.first - torch.arange(self.n, dtype=tokens.dtype, device=tokens.device)
        return torch.cat([front.expand(len(tokens), *front.shape), tokens], 1)

    def _lengthen(self, name: str, x: Any, tokens: Tensor, past: int) -> Any:
        """An argument, with what the virtual tokens have in it. Raises PeftliteError."""
        if x is None or isinstance(x, bool | int | float | str):
            return x
        if name in POSITIONS:
            front = torch.arange(0 if past else self.n, dtype=x.dtype, device=x.device)
            return torch.cat([front.expand(*x.shape[:-1], -1), x + self.n], -1)
        b, t = tokens.shape[:2]
        sized, value = isinstance(x, Tensor) and x.dim() > 1, self.fill.get(name)
        per_token = sized and x.shape[0] in (1, b) and x.shape[1] == t
        if name == "attention_mask" and value is not None:
            fits, longer = sized and x.dim() == 2, past or per_token
            if fits and past and x.shape[1] + self.n > past + t:
                raise PeftliteError(
                    f"{self.address} has {past} positions in its cache and {t} tokens to go on "
                    f"with, {past + t - self.n} but for its prompt, and a mask of {x.shape[1]}: a "
                    "cache that holds a prompt can't be cropped, or given to another generate()"
                )
        elif name in self.fill:
            fits, longer = True, per_token and not past and value is not None
        else:
            other = sized and not per_token and x.is_floating_point()
            fits, longer = other or (isinstance(x, Tensor) and not sized), False
        if not fits:
            what = tuple(x.shape) if isinstance(x, Tensor) else shown(x)
            raise PeftliteError(
                f"{self.address} is called with {name} {what}, which can't be made {self.n} tokens "
                f"longer: give it as (b, t, ...) and say fill={{{name!r}: 0}}, or whatever virtual "
                "tokens have there; or say None, for it to be left as it is"
            )
        return before(x, self.n, value) if longer else x


class AroundPatch(Patch):
    """At the call of an encoder and its decoder, which attends to the virtual tokens too."""

    def __init__(self, n: int, site: Site):
        super().__init__()
        self.n, self.names = n, parameters(site.module)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if isinstance(given.get("attention_mask"), Tensor):
            given["attention_mask"] = before(given["attention_mask"], self.n, 1)
        output = inner(**given)
        if isinstance(output, dict):
            for name in ("encoder_last_hidden_state", "encoder_hidden_states"):
                if output.get(name) is not None:
                    output[name] = cut(output[name], self.n)
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
        whole = output.dim() == 3 and t in (None, output.shape[1])
        return output[:, n:] if whole else output
    if isinstance(output, tuple | list | dict):
        return pytree.tree_map(lambda x: cut(x, n, t), output, is_leaf=lambda x: x is not output)
    return output


def cached(cache: Any) -> int:
    """How many positions a cache holds."""
    if cache is None or hasattr(cache, "get_seq_length"):
        return 0 if cache is None else cache.get_seq_length()
    return cache[0][0].shape[-2] if cache else 0


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that a module is called with."""
    return tuple(inspect.signature(module.forward).parameters)


def holds(site: Site, inner: Site) -> bool:
    """Whether a call's module has another's inside it."""
    return site is not inner and any(inner.module is m for m in site.module.modules())


@dataclass(frozen=True)
class PromptMethod(Method):
    """A method of virtual tokens: where they go in, and what becomes of the calls around them."""

    prompt_length: int = 20
    fill: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    cut: bool = True

    takes = "the one call of a module that looks up its token ids in an nn.Embedding inside it"

    def __post_init__(self) -> None:
        super().__post_init__()
        set_number(self, "prompt_length", int, lambda n: n >= 1, "a whole number from 1 up")

    def prompt(self, embedding: Site) -> Prompt:
        """What gives the virtual tokens their embeddings. Raises TargetError."""
        return Prompt(self, embedding)

    def default(self, site: Site) -> bool:
        return site.address == CALL  # or what `choose` finds in it

    def accepts(self, site: Site) -> bool:
        embeds = any(isinstance(m, nn.Embedding) for m in site.module.modules())
        return site.is_call and is_called(site.module) and embeds

    def choose(self, picked: Sequence[Site], everything: Sequence[Site]) -> Sequence[Site]:
        calls = [site for site in everything if site.is_call]
        embeddings = [s for s in picked if s.is_call and isinstance(s.module, nn.Embedding)]
        stacks = [site for site in picked if site not in embeddings]
        if self.targets is None or not stacks:
            stacks = [_stack(calls)]
        module = stacks[0].module
        embeddings = embeddings or [s for s in calls if s.module is _embedding(module)]
        one = len(stacks) == len(embeddings) == 1 and stacks[0].is_call
        if not one or not holds(stacks[0], embeddings[0]):
            raise self.refuse(picked[0])
        around = [s for s in calls if s.module is not module and _encoder(s.module) is module][:1]
        pools = self.cut and not around and getattr(module, "pooler", None) is not None
        layers = [s for s in calls if pools and s.module is getattr(module, "encoder", None)]
        return [*around, *stacks, *layers, *embeddings]

    def build_all(self, sites: Sequence[Site]) -> list[Patch]:
        *others, embedding = sites
        around = [site for site in others if holds(site, embedding)]
        if not around or not isinstance(embedding.module, nn.Embedding):
            raise self.refuse(sites[0])
        stack, n = around[-1], self.prompt_length
        limit = getattr(getattr(stack.module, "config", None), "max_position_embeddings", None)
        if limit is not None and n >= limit:
            raise TargetError(
                f"{stack.address} has {limit} positions, which a prompt of {n} leaves none of: "
                "say prompt_length= with less"
            )
        # below the codes of the prompts that are there
        there = [m for m in embedding.module.modules() if isinstance(m, EmbeddingPatch)]
        first = min((m.first - m.n for m in there), default=-1)
        prompt = self.prompt(embedding)
        patches: dict[Site, Patch] = {site: AroundPatch(n, site) for site in around}
        patches[stack] = StackPatch(prompt, self, stack, first, self.cut and len(around) == 1)
        patches[embedding] = EmbeddingPatch(prompt, n, first)
        return [patches.get(site) or LayersPatch(n) for site in sites]


def _stack(calls: Sequence[Site]) -> Site:
    """The innermost call that takes ids and their mask by the usual names, or the model's own."""
    takers = [s for s in calls if {"input_ids", "attention_mask"} <= {*parameters(s.module)}]
    return next((s for s in takers if not any(holds(s, other) for other in takers)), calls[0])


def _embedding(module: nn.Module) -> nn.Module | None:
    """The embedding of a module's tokens: what it says that is, or else the first there is."""
    try:
        said = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        said = None
    inside = (m for m in module.modules() if isinstance(m, nn.Embedding) and m is not module)
    return said if isinstance(said, nn.Embedding) else next(inside, None)


def _encoder(module: nn.Module) -> nn.Module | None:
    """The encoder of a module that calls one and a decoder, either or both."""
    both = "encoder_outputs" in parameters(module) and hasattr(module, "get_encoder")
    return module.get_encoder() if both else None


@dataclass(frozen=True)
class PromptTuning(PromptMethod):
    """X' = [P; X]: n learned rows P (n, d) go before the embeddings X (t, d) of a sequence.

    Lester et al., arXiv:2104.08691, §2. The model sees n more tokens, at positions 0 to n-1: the
    arguments of the call that are per token (masks, positions, token types, labels) are made n
    longer, and its outputs of shape (b, n + t, d) are cut to (b, t, d), so that logits and losses
    are those of the real tokens. What pools the first position, as BERT does, has the first real
    token, [CLS]. (peft keeps the n logits, counts the loss of the first token, and pools a virtual
    one.) With a KV cache, `past_key_values`, the prompt goes in where that is empty; a cache with a
    prompt in it is no start for another `generate`, and static ones have no room for it.

    By default it goes in at the innermost module whose call takes `input_ids` and `attention_mask`,
    of an encoder and a decoder at the encoder, or else at the model's own call; its embedding is
    `get_input_embeddings()`, or the first nn.Embedding inside. Others are named:
    `targets="decoder()"`, `targets=["()", "words()"]`. Deltas chosen together have their prompts
    one after the other; rows with different prompts, or none, mix in one batch.

    Args:
        prompt_length: n, the number of virtual tokens; the paper has 100, and gains little over 20.
        init: "random", uniform in ±0.5; "vocabulary", the embeddings of tokens sampled from the
            first 5,000; "text", those of `init_ids`.
        init_ids: the ids of a text, or of class labels, repeated or cut to n.
        fill: what virtual tokens have in arguments of shape (b, t, ...) that are known by other
            names than transformers' or torch's, such as {"targets": -1}; None for one to be left
            as it is.
        cut: whether outputs lose the virtual positions. An encoder of your own whose decoder
            attends to them has to keep them; transformers' are known.
    """

    init: Init = "random"
    init_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "init", get_args(Init))
        if self.init_ids is not None:
            object.__setattr__(self, "init_ids", tuple(map(int, self.init_ids)))
        if (self.init == "text") != bool(self.init_ids):
            raise PeftliteError(
                'init="text" takes init_ids=, the ids that a tokenizer gives for it, and no other '
                f"init does: not init={self.init!r} with init_ids={self.init_ids!r}"
            )

    def prompt(self, embedding: Site) -> Prompt:
        v = len(raw(embedding.module, "weight"))
        if not all(0 <= i < v for i in self.init_ids or ()):
            raise TargetError(
                f"init_ids {self.init_ids} has ids beyond {embedding.address}, which has {v}"
            )
        return super().prompt(embedding)

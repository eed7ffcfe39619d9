"""Prompt tuning: n learned rows before the embeddings of the tokens, as if they were n more tokens.

    ids ─► [codes, ids] ─► the stack that takes them ─► outputs without their first n positions
                 └► its embedding: a row of the prompt for a code, for an id what it always gave

The codes are negative ids, each prompt's its own. So whatever a model makes of the shape of its ids
(positions, token types, masks) fits, and no state passes from the one call to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import Method, Patch, trainable
from peftlite.core.site import CALL, Site
from peftlite.core.tensors import raw
from peftlite.errors import PeftliteError, TargetError
from peftlite.fields import integer, one_of
from peftlite.methods.features import arguments, is_called
from peftlite.methods.keywords import MASK
from peftlite.methods.virtual import AroundPatch, LayersPatch, StackPatch

Init = Literal["random", "vocabulary", "text"]

COMMON = 5000  # the most common tokens, which come first: the paper samples from them


class PromptPatch(Patch):
    """At the embedding's call: `rows` (n, d), learned, where the codes first, first − 1, … are."""

    method: Any
    embedding: Site
    n: int

    def __init__(self, method: Any, embedding: Site):
        super().__init__()
        self.method, self.embedding, self.n = method, embedding, method.prompt_length
        # below the codes of the prompts that are there
        there = [m for m in embedding.module.modules() if isinstance(m, PromptPatch)]
        self.first: int = min((other.first - other.n for other in there), default=-1)
        d = raw(embedding.module, "weight").shape[1]
        self.rows: nn.Parameter = trainable(self.n, d, site=embedding, dtype=method.dtype)

    def reset(self, w: Tensor | None) -> None:
        words, ids = raw(self.embedding.module, "weight"), self.method.init_ids
        if self.method.init == "random":
            nn.init.uniform_(self.rows, -0.5, 0.5)
            return
        if ids is None:
            ids = torch.randint(min(len(words), COMMON), (self.n,)).tolist()
        if not all(0 <= i < len(words) for i in ids):
            address = self.embedding.address
            raise TargetError(f"init_ids {ids} has ids beyond {address}, which has {len(words)}")
        self.rows.copy_(words[list((ids * self.n)[: self.n])])

    def prompt(self) -> Tensor:
        """The embeddings (n, d) of the virtual tokens."""
        return self.rows

    def before(self, tokens: Tensor) -> Tensor:
        """Ids (b, t) after the codes, or embeddings (b, t, d) after the prompt's."""
        if tokens.is_floating_point():
            front = self.prompt().to(tokens.dtype)
        else:
            front = self.first - torch.arange(self.n, dtype=tokens.dtype, device=tokens.device)
        return torch.cat([front.expand(len(tokens), *front.shape), tokens], 1)

    def call(self, inner: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        def embed(code: Tensor, dtype: torch.dtype) -> Tensor:
            return F.embedding(code.clamp(0, self.n - 1), self.prompt().to(dtype))

        return look_up(self.first, self.n, embed, inner, *args, **kwargs)


def look_up(
    first: int,
    n: int,
    embed: Callable[[Tensor, torch.dtype], Tensor],
    inner: Callable[..., Tensor],
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """An embedding's call, with what `embed` gives for codes, as numbers from 0 to n − 1."""
    ids = next(iter((*args, *kwargs.values())))
    if ids.shape[-1] <= n:
        return inner(ids)  # no longer than the prompt alone: a step of decoding
    code = first - ids
    mine = (code >= 0) & (code < n)
    y = inner(ids.masked_fill(mine, 0))
    return torch.where(mine[..., None], embed(code, y.dtype), y)


@dataclass(frozen=True)
class PromptMethod(Method, abstract=True):
    """A method of virtual tokens: where they go in, and what becomes of the calls around them."""

    prompt_length: int = integer(20)
    fill: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    cut: bool = True
    embeds: bool = False

    added: ClassVar[Mapping[str, Any]] = {"embeds": False}
    takes = "the one call of a module that looks up its token ids in an nn.Embedding inside it"
    patch: ClassVar[type[PromptPatch]] = PromptPatch

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
        if len(stacks) > 1 or len(embeddings) != 1 or not holds(stacks[0], embeddings[0]):
            raise self.refuse(picked[0])
        around = [s for s in calls if s.module is not module and encoder(s.module) is module][:1]
        pools = self.cut and not around and getattr(module, "pooler", None) is not None
        layers = [s for s in calls if pools and s.module is getattr(module, "encoder", None)]
        return [*stacks, *around, *layers, *embeddings]

    def build_all(self, sites: Sequence[Site]) -> list[Patch]:
        stack, embedding, n = sites[0], sites[-1], self.prompt_length
        if not holds(stack, embedding) or not isinstance(embedding.module, nn.Embedding):
            raise self.refuse(stack)
        limit = getattr(getattr(stack.module, "config", None), "max_position_embeddings", None)
        if limit is not None and n >= limit > 0:
            raise TargetError(
                f"{stack.address} has {limit} positions, which a prompt of {n} leaves none of: "
                "say prompt_length= with less"
            )
        prompt, others = self.patch(self, embedding), sites[1:-1]
        cut = self.cut and not any(holds(site, stack) for site in others)
        others = [AroundPatch(n, s) if holds(s, stack) else LayersPatch(n) for s in others]
        return [StackPatch(prompt, self, stack, cut), *others, prompt]


def innermost(sites: Sequence[Site]) -> list[Site]:
    """Those of calls that are around none of the others."""
    return [s for s in sites if not any(holds(s, other) for other in sites)]


def holds(site: Site, inner: Site) -> bool:
    """Whether a call's module has another's inside it."""
    outer = site.is_call and site.module is not inner.module
    return outer and any(inner.module is m for m in site.module.modules())


def takers(sites: Sequence[Site]) -> list[Site]:
    """The calls that take ids and their mask by the usual names, outer ones first."""
    calls = (site for site in sites if site.is_call)
    return [s for s in calls if {"input_ids", MASK} <= {*arguments(s.module)}]


def _stack(calls: Sequence[Site]) -> Site:
    """The innermost call that takes ids and their mask, or the model's own."""
    found = takers(calls)
    return next(iter(innermost(found)), calls[0])


def _embedding(module: Any) -> nn.Module | None:
    """The embedding of a module's tokens: what it says that is, or else the first there is."""
    try:
        said = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        said = None
    inside = (m for m in module.modules() if isinstance(m, nn.Embedding) and m is not module)
    return said if isinstance(said, nn.Embedding) else next(inside, None)


def encoder(module: Any) -> nn.Module | None:
    """The encoder of a module that calls one and a decoder, either or both."""
    both = "encoder_outputs" in arguments(module) and hasattr(module, "get_encoder")
    return module.get_encoder() if both else None


@dataclass(frozen=True)
class PromptTuning(PromptMethod):
    """X' = [P; X]: n learned rows P (n, d) go before the embeddings X (t, d) of a sequence.

    Lester et al., arXiv:2104.08691, §2. The model sees n more tokens, at positions 0 to n-1: the
    arguments of the call that are per token (masks, positions, token types, labels) are made n
    longer, and its outputs of shape (b, n + t, d) are cut to (b, t, d), so that logits and losses
    are those of the real tokens. What pools the first position, as BERT does, has the first real
    token, [CLS]. (peft keeps the n logits, counts the loss of the first token, and pools a virtual
    one.) With a KV cache the prompt goes in where that is empty; a cache with a
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
        embeds: whether the call that takes `input_ids` is given `inputs_embeds` in their place, as
            in peft. It then can't tell padding by its id, so that what classifies by the last
            token, as GPT-2 does, takes that of a padded row for one.

    Raises:
        PeftliteError: `init_ids` is missing, or there for another `init` than "text".
    """

    init: Init = one_of("random", Init)
    init_ids: Sequence[int] | None = None

    # 3e-2 for BLOOMZ-560M (×36): peft, examples/causal_language_modeling; the authors' 0.3 is for
    # Adafactor, whose steps are in proportion to the parameters
    rate: ClassVar[float] = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_ids is not None:
            object.__setattr__(self, "init_ids", tuple(map(int, self.init_ids)))
        if (self.init == "text") != bool(self.init_ids):
            raise PeftliteError(
                'init="text" takes init_ids=, the ids that a tokenizer gives for it, and no other '
                f"init does: not init={self.init!r} with init_ids={self.init_ids!r}"
            )

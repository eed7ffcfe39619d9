"""The errors of the methods, and of what they begin with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import StaticCache

import peftlite as pl
from peftlite.core.site import sites
from peftlite.methods.features import arguments
from peftlite.methods.keywords import cache_name
from tests.errors.attach import attaching
from tests.errors.case import ZOO, Case, attached, bare, on


def gated_prefix() -> nn.Module:
    model = ZOO["hf_llama"].model()
    pl.attach(model, pl.Gated(pl.PrefixTuning(prefix_length=2)), "sql")
    return model


def refusing(method: type[pl.Method], targets: str, what: str, **options: Any) -> Case:
    act = attaching(method(targets=targets, **options))
    says = f"{targets} is {what}; {method.__name__} takes {method.takes}"
    return Case(act, says, pl.TargetError, bare)


def narrow() -> nn.Module:
    model = nn.Sequential(nn.Identity(), nn.Linear(8, 3))
    pl.attach(model, pl.BottleneckAdapter(targets="0()", width=6))
    return model


METHODS = [
    refusing(pl.LoKr, "lm_head.weight", "a tensor of shape (29, 16)", factor=(5, 4)),
    *(refusing(method, "norm.weight", "a tensor of shape (16,)")
      for method in (pl.VBLoRA, pl.FourierFT, pl.LoHa, pl.LoKr, pl.VeRA, pl.OFT, pl.BOFT, pl.HRA,
                     pl.SHiRA)),
    *(refusing(method, "blocks.0.attn()", "a call")
      for method in (pl.IA3, pl.NormTuning, pl.SparseMask)),
    refusing(pl.AdaLoRA, "norm.weight", "a tensor of shape (16,)", total_steps=9),
    refusing(pl.LTSFT, "blocks.0.attn()", "a call", steps=1),
    Case(lambda *_: pl.attach(bare(), pl.AdaLoRA(total_steps=9)).step(), "AdaLoRA has no gradients "
         "to tell what is important by: call delta.step() after optimizer.step() and before "
         "zero_grad()"),
    refusing(pl.BOFT, "lm_head.weight", "a tensor of shape (29, 16)", m=6),
    refusing(pl.BottleneckAdapter, "norm.weight", "a tensor of shape (16,)"),
    Case(attaching(pl.BottleneckAdapter(targets="blocks.0.mlp.1()")), "how wide what "
         "blocks.0.mlp.1() takes and gives is can't be told from its layers: say width=, or name "
         "a call inside it", pl.TargetError),
    Case(lambda model, _: model(torch.ones(2, 8)), "0() has a tensor of shape (2, 8) where its "
         "adapter works on 6 features in dimension -1: say width=, or name a call inside it",
         model=narrow),
    Case(lambda *_: pl.LoReFT(positions="f"),
         "positions must be 'all' or such as 'f7+l7', 'f7' or 'l7', not 'f'"),
    Case(lambda model, _: model(torch.ones(3, 4)),
         "positions='f1+l1' need a tensor (b, t, d); () gives (3, 4)",
         model=attached(nn.Linear(4, 4), pl.LoReFT(rank=2, targets="()", positions="f1+l1"))),
    Case(lambda model, _: model(ids(3), use_cache=True), "model.layers.0.self_attn() is called "
         "with a cache, which would be filled twice, with and without the PrefixPatch behind its "
         "gate: pass use_cache=False", model=gated_prefix),
    refusing(pl.Compacter, "blocks.0()", "a call", phm_dim=5),
    refusing(pl.LoReFT, "blocks.0()", "a call", rank=99),
    refusing(pl.PrefixTuning, "embed()", "a call"),
    Case(lambda *_: pl.Gated("lora"), "Gated takes a method such as LoRA(), not 'lora'"),
    Case(lambda *_: pl.BottleneckAdapter(preset="x"),
         "preset must be one of 'houlsby', 'pfeiffer', 'parallel', not 'x'"),
    Case(lambda *_: pl.IA3(feedforward=["down"]),
         "feedforward must be one of True, False, not ['down']"),
    Case(attaching(pl.FullTuning(top_layers=2)), "top_layers goes by the numbers of layers in a "
         "list: there are none", pl.TargetError, lambda: nn.Linear(4, 4)),
    Case(lambda *_: pl.attach(bare(), pl.BitFit()).parameter_groups(1e-3, b_ratio=16),
         "b_ratio is for LoRA's factors B, and BitFit has none"),
    Case(lambda *_: pl.SparseMask(select="top"),
         "select must be one of 'magnitude', 'random', 'fish', 'given', not 'top'"),
    Case(attaching(pl.SparseMask(select="fish", targets="lm_head")), "select='fish' goes by "
         "scores['lm_head.weight'], a tensor of shape (29, 16), not None: give a score to every "
         "entry of every site, as scores=pl.fish_scores(model, loss, batches) does"),
    Case(lambda *_: pl.fish_scores(bare(), None, []), "fish_scores saw no gradient: give it "
         "batches, and a model whose parameters require gradients (pl.attach freezes them: score "
         "them before)"),
]  # fmt: skip


ONE_CALL = (
    "() is a call; PromptTuning takes the one call of a module that looks up its token ids in an "
    "nn.Embedding inside it"
)
CUT_CACHE = (
    "model() has 5 positions in its cache and 3 tokens to go on with, 6 but for its prompt, and a "
    "mask of 8: a cache that holds a prompt can't be cropped, or given to another generate()"
)


def prompted() -> nn.Module:
    model = ZOO["hf_llama"].model()
    pl.attach(model, pl.PromptTuning(prompt_length=2), "sql")
    return model


def ids(t: int) -> Tensor:
    return torch.zeros(1, t, dtype=torch.long)


def cut_cache(model: nn.Module, _: Path) -> None:
    name = cache_name(arguments(model))
    cache = {name: model(ids(3), use_cache=True)[name]}
    model(ids(3), attention_mask=torch.ones(1, 8), **cache)


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def given_ids(model: nn.Module, _: Path) -> None:
    model(torch.zeros(2, 4, dtype=torch.long))


def prefixed() -> nn.Module:
    model = ZOO["hf_llama"].model()
    pl.attach(model, pl.PrefixTuning(prefix_length=2, positions="shifted"), "sql")
    return model


def begun_without(model: nn.Module, _: Path) -> None:
    name = cache_name(arguments(model))
    with pl.using(model, None):
        cache = {name: model(ids(3), use_cache=True)[name]}
    model(ids(1), **cache)


def static(model: nn.Module, _: Path) -> None:
    cache = StaticCache(model.config, max_cache_len=8)
    model(ids(3), **{cache_name(arguments(model)): cache})


PREFIXES = [
    Case(attaching(pl.PrefixTuning(positions="shifted", targets="layers.0.self_attn")),
         "positions='shifted' takes the attention of every layer, and model.layers.1.self_attn() "
         "is left out: leave targets= and exclude= out", pl.TargetError, on("hf_llama")),
    Case(attaching(pl.Gated(pl.PrefixTuning(positions="shifted"))), "a gate makes a call with what "
         "it gates and without, and a prefix with positions='shifted' is in the cache of both: "
         "gate one with positions='kept'", model=on("hf_llama")),
    # a file could say so
    Case(lambda model, _: pl.PrefixTuning(positions="shifted").build_all(sites(model)[:1]),
         "() is a call; PrefixTuning takes calls of …", pl.TargetError, on("hf_llama")),
    Case(begun_without, "model() is called with a cache of 3 positions that was begun without the "
         "prefix, which counts as the first of them: begin it anew, with the delta chosen",
         model=prefixed),
    Case(static, "model() is called with a static cache, which has no room for a prefix: leave "
         "cache_implementation out", model=prefixed),
    Case(lambda model, _: model(ids(3), attention_mask=torch.ones(1, 1, 3, 3)), "model() is called "
         "with a mask (1, 1, 3, 3), which can't be made 2 tokens longer: give it as (b, t)",
         model=prefixed),
    Case(given_ids, "blocks.0.attn() attends to keys (2, 2, 4, 6) and values (2, 2, 4, 6), and its "
         "prefix has 3 heads of 5 features: say num_heads= and head_dim=",
         model=attached(bare(), pl.PrefixTuning(num_heads=3, head_dim=5))),
    Case(given_ids, "blocks.0.mlp() came to no F.scaled_dot_product_attention in this call, so its "
         "prefix had no effect: for transformers, type model.set_attn_implementation(\"sdpa\"), "
         "and ask for no output_attentions", model=attached(
             bare(), pl.PrefixTuning(targets="blocks.0.mlp()", num_heads=2, head_dim=6))),
    Case(attaching(pl.PrefixTuning()), "how many heads the keys of () have, and how wide they are, "
         "can't be told from its attributes: say num_heads= and head_dim=", pl.TargetError,
         model=Attends),
]  # fmt: skip

PROMPTS = [
    Case(attaching(pl.PromptTuning(targets="blocks.0()")), "blocks.0" + ONE_CALL, pl.TargetError,
         bare),
    # a file could say so
    Case(lambda model, _: pl.PromptTuning(prompt_length=2).build_all(sites(model)[:1]), ONE_CALL,
         pl.TargetError, bare),
    Case(attaching(pl.PromptTuning(prompt_length=10)), "model() has 10 positions, which a prompt "
         "of 10 leaves none of: say prompt_length= with less", pl.TargetError, on("hf_llama")),
    Case(attaching(pl.PromptTuning(init="text", init_ids=[29])),
         "init_ids (29,) has ids beyond embed(), which has 29", pl.TargetError, bare),
    Case(lambda *_: pl.PromptTuning(init_ids=[1]), "init=\"text\" takes init_ids=, the ids that a "
         "tokenizer gives for it, and no other init does: not init='random' with init_ids=(1,)"),
    Case(lambda model, _: model(torch.zeros(3, dtype=torch.long)), "() is called without token ids "
         "of shape (b, t) for its prompt to go before: name the call that takes them with "
         "targets=", model=attached(bare(), pl.PromptTuning(prompt_length=2))),
    Case(lambda model, _: model(ids(3), visual=torch.zeros(1, 3, 4)), "model() is called with "
         "visual (1, 3, 4), which can't be made 2 tokens longer: give it as (b, t, ...) and say "
         "fill={'visual': 0}, or whatever virtual tokens have there; or say None, for it to be "
         "left as it is", model=prompted),
    Case(cut_cache, CUT_CACHE, model=prompted),
    Case(lambda model, _: model(ids(3), cache_params=3.0), "model() is called with cache_params "
         "3.0, a cache that doesn't say how many positions it holds: pass use_cache=False",
         model=prompted),
]  # fmt: skip


def starting(init: str | None, *given: Any, **data: Any) -> Case:
    """A delta that begins from data: what it is given, then what the error says."""
    *batches, says = given

    def act(*_: Any) -> None:
        model = bare()
        method = pl.BitFit() if init is None else pl.LoRA(rank=2, init=init, targets="blocks.0.mlp")
        pl.initialize(model, pl.attach(model, method), *batches, **data)

    return Case(act, says)


def summed(factor: float) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, ids: model(ids).sum() * factor


IDS = torch.zeros(1, 3, dtype=torch.int64)
INITIALIZE = [
    Case(lambda model, _: pl.initialize(model, 3, []),
         "no delta is named 3 in this model; there are: 'sql', 'chat'"),
    starting(None, [], "'default' has nothing to initialize in this model: give a delta that is "
             "not merged, and of pl.LoRA(init=...) with one of 'eva', 'lora_ga', "
             "'corda', 'loftq'"),
    starting("eva", [], "the batches reached 0 of 2 sites, and not blocks.0.mlp.0.weight; "
             "blocks.0.mlp.2.weight: give batches that the model runs on, or leave those sites out "
             "with exclude="),
    starting("lora_ga", [IDS], "the data for blocks.0.mlp.0.weight has values that aren't finite",
             loss=summed(float("inf"))),
    starting("loftq", "init='loftq' goes by original['blocks.0.mlp.0.weight'], the tensor before "
             "it was quantised, of shape (20, 16): not None"),
    Case(attaching(pl.LoRA(init="eva", targets="embed")), "init='eva' goes by the inputs of linear "
         "maps, and embed.weight is no weight of one that is called: leave it out with exclude=",
         pl.TargetError),
    Case(attaching(pl.LoRA(init="lora_ga", targets="q_proj")), "blocks.0.attn.q_proj.weight has "
         "matrices of 12×16, whose rank is at most 12: init='lora_ga' has no 16 directions to take",
         pl.TargetError),
]  # fmt: skip

SPELLING = [
    Case(lambda model, path: pl.IA3(r=8), "IA3 takes no r=; it takes …"),
]

CASES = SPELLING + METHODS + PREFIXES + PROMPTS + INITIALIZE

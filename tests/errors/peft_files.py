"""The errors of PEFT's directories."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.io.peft import config
from peftlite.io.peft.regex import Regexes
from tests.errors.case import SMALL, Case, attached, bare, delta, linears, on
from tests.errors.load import bad_file
from tests.errors.merge import poisoned

P, A, B = "base_model.model.blocks.0.attn.q_proj", "lora_A.weight", "lora_B.weight"
LORA_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0.attn.q_proj"]}
AT, IN = "'…/adapter_config.json' ", "'…/adapter_model.safetensors' "


def factors(path: str = P, r: int = 2) -> dict[str, Tensor]:
    return {f"{path}.{A}": torch.ones(r, 16), f"{path}.{B}": torch.ones(12, r)}


def adapter(
    config: Any = None, tensors: dict[str, Tensor] | None = None, name: str = "model.safetensors"
) -> Callable[[Path], None]:
    """A folder with an adapter; `config` is what is otherwise in it than a LoRA's, or its text."""

    def write(path: Path) -> None:
        path.mkdir(parents=True)
        text = config if isinstance(config, str) else json.dumps({**LORA_CONFIG, **(config or {})})
        (path / "adapter_config.json").write_text(text)
        held = factors() if tensors is None else tensors
        safetensors.torch.save_file(held, path / f"adapter_{name}", {"format": "pt"})

    return write


def reading(
    says: str, config: Any = None, tensors: Any = None, model: Callable[[], Any] = bare
) -> Case:
    return bad_file(adapter(config, tensors), says, model=model)


def of(kind: str, says: str, tensors: dict[str, Tensor], **config: Any) -> Case:
    """Of another method, at q_proj."""
    held = {f"{P}.{name}": tensor for name, tensor in tensors.items()}
    return reading(says, {"peft_type": kind, "lora_alpha": None, **config}, held)


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv1d(16, 16, 3), nn.GELU(), nn.Conv1d(16, 16, 3))


def circular() -> nn.Module:
    return nn.Sequential(nn.Conv1d(16, 16, 3, padding=1, padding_mode="circular"))


class Thrice(nn.Module):
    """A weight of two modules, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 4)
        self.c.weight = self.a.weight


def biased() -> nn.Module:
    """An embedding tied to a head with a bias."""
    model = nn.ModuleDict({"embed": nn.Embedding(29, 16), "head": nn.Linear(16, 29)})
    model["embed"].weight = model["head"].weight
    return model


def aliased() -> nn.Module:
    layer = nn.Linear(4, 4, bias=False)
    return nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(4, 4)})


def experts() -> nn.Module:
    """Two experts in one parameter."""
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].down_proj = nn.Parameter(torch.ones(2, 4, 3))
    return model


def expert(n: int) -> dict[str, Tensor]:
    at = f"base_model.model.experts.{n}.w2"
    return {f"{at}.{A}": torch.ones(2, 3), f"{at}.{B}": torch.ones(4, 2)}


FOURTH_TOKEN = pl.SparseMask(
    select="given", fraction=1 / 29, targets="embed",
    scores={"embed.weight": torch.eye(29)[3][:, None].expand(29, 16)},
)  # fmt: skip


def exporting(method: Any, says: str, model: Callable[[], Any] = bare, **options: Any) -> Case:
    def act(model: nn.Module, path: Path) -> None:
        pl.export(delta(model), path, **options)

    return Case(act, says, model=lambda: attached(model(), method)())


def cannot(at: str, why: str) -> str:
    return (
        f"{at} can't go into a PEFT directory, since {why}: leave it out with exclude=, or keep "
        "the delta with pl.save"
    )


def in_the_way(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("")


def vera(**tensors: Tensor) -> dict[str, Tensor]:
    shared = {f"base_model.vera_{name}": tensor for name, tensor in tensors.items()}
    return {f"{P}.vera_lambda_b": torch.ones(12), f"{P}.vera_lambda_d": torch.ones(2), **shared}


def followed_for_a_moment(model: nn.Module, path: Path) -> None:
    with mock.patch.object(config, "Regexes", lambda: Regexes(5)):
        pl.load(model, path)


CASES = [
    # what is no adapter
    bad_file(adapter("{"), AT + "is no JSON: …"),
    bad_file(adapter(" " * 65 * 2**20), AT + "has 65.0 MiB, where 64.0 MiB is the most"),
    bad_file(adapter({"x" * 9000: True}), AT + "is a LORA with 'xxx…xxx … …xxx' as True, which may "
             "change the model in a way that peftlite doesn't have"),
    bad_file(adapter('{"peft_type": "LORA", "lora_alpha": NaN}'), AT + "is no JSON: NaN is no "
             "number"),
    *(bad_file(adapter(text), AT + f"has the peft_type {kind}, which can't be read; these can: …")
      for text, kind in (("[]", "None"), ("{}", "None"), ('{"peft_type": "XLORA"}', "'XLORA'"))),
    bad_file(adapter(name="model.bin"), "'…/adapter_model.bin' is a pickle, which may run code as "
             "it is read; convert it first: safetensors.torch.save_file(torch.load('…', "
             "weights_only=True), '…/adapter_model.safetensors')"),
    bad_file(adapter(name="modell.safetensors"), "there is no file '…/adapter_model.safetensors'"),
    bad_file(lambda path: adapter()(path / "chat"), "'…' has its adapters in folders of their own: "
             "chat; load one: '…/chat'"),
    # settings
    reading(AT + "has 'lora_alpha' as 1e+30, which no training has", {"lora_alpha": 1e30}),
    reading(AT + "has 'lora_alpha' as inf, which no training has",
            json.dumps(LORA_CONFIG).replace("4", "1e999")),
    reading(AT + "has 'lora_alpha' as '4'", {"lora_alpha": "4"}),
    reading(AT + "has 'use_dora' as 1", {"use_dora": 1}),
    reading(AT + "has 'modules_to_save' as [3]", {"modules_to_save": [3]}),
    reading(AT + "has an impossible setting: alpha must be finite and above 0, not 0",
            {"lora_alpha": 0}),
    *(reading(AT + f"has a regex in 'alpha_pattern' that can't be followed, {shown}, since {why}: "
              "write out the modules' paths", {"alpha_pattern": {key: 3}}) for key, shown, why in (
        (r"(q)\1*", r"'(.*\\.)?((q)\\1*)'", "groupref isn't followed here"),
        ("(?i:q*)", r"'(.*\\.)?((?i:q*))'", "a flag isn't followed here"),
        ("*q", r"'(.*\\.)?(*q)'", "nothing to repeat at position 8 in a regex"),
    )),
    Case(followed_for_a_moment, AT + "has a regex in 'alpha_pattern' that can't be followed, "
         r"'(.*\\.)?(((q*)*)*)', since its regexes take too long to follow: write out the modules' "
         "paths", pl.FileError, bare, adapter({"alpha_pattern": {"((q*)*)*": 3}})),
    reading(AT + "is a LORA with 'layer_replication' as [[0, 2]], which may change the model in a "
            "way that peftlite doesn't have", {"layer_replication": [[0, 2]]}),
    reading(AT + "has 'init_lora_weights' as 'loftq', whose base isn't the model's own: save it "
            "with path_initial_model_for_weight_conversion= in peft",
            {"init_lora_weights": "loftq"}),
    reading(AT + "comes to 3 rows of 16 numbers, by its num_virtual_tokens, "
            "num_transformer_submodules, token_dim and num_layers, and prompt_embeddings is (4, "
            "16): they aren't of one adapter, so save it again", {
                "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": 16,
            }, {"base_model.prompt_embeddings": torch.ones(4, 16)}),
    of("OFT", AT + "has 'num_cayley_neumann_terms' as 2: below 3",
       {"oft_R.weight": torch.ones(4, 6)}, num_cayley_neumann_terms=2),
    of("OFT", AT + "is of a peft before 0.18, whose 'use_cayley_neumann' was another series: train "
       "it anew", {"oft_R.weight": torch.ones(4, 6)}, peft_version="0.17.1"),
    *(reading(AT + f"has 'r' as {says} for blocks.0.attn.q_proj, and the tensors there have 2: "
              "they aren't of one adapter, so save it again", config) for says, config in (
        (3, {"r": 3}), (4, {"rank_pattern": {".*q_proj": 4}}),
    )),
    reading(AT + "has 'use_dora' as True, and blocks.0.attn.q_proj has no lora_magnitude_vector: "
            "they aren't of one adapter, so save it again", {"use_dora": True}),
    of("OFT", AT + "has 'r' as 2 and 'oft_block_size' as 32, of which peft takes one",
       {"oft_R.weight": torch.ones(4, 6)}, peft_version="0.21.2"),
    reading(IN + "lacks the rows of tokens that adapter_config.json has in "
            "'trainable_token_indices'", {"trainable_token_indices": [3]}),
    *(reading(IN + f"has {what}: DeepSpeed's ZeRO-3 and FSDP save so what wasn't gathered; save it "
              "within deepspeed.zero.GatheredParameters(parameters, modifier_rank=None), or "
              "FullyShardedDataParallel.summon_full_params(model)", {}, tensors)
      for what, tensors in (
        ("no tensors", {}),
        (f"empty tensors, such as {P}.{B}", {**factors(), f"{P}.{B}": torch.ones(0)}),
        (f"a flat tensor for {P}.{A}", {**factors(), f"{P}.{A}": torch.ones(32)}),
    )),
    bad_file(adapter({"target_parameters": ["0.weight"], "target_modules": None, "r": 1}, {
        f"base_model.model.0.{A}": torch.ones(16, 16), f"base_model.model.0.{B}": torch.ones(3, 16),
    }), IN + "has odd tensors: 0.weight is a kernel, which peft takes for a stack of matrices",
       model=conv),
    reading(AT + "has None for the tokens of embed", {}, {
        **factors(),
        "base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(1, 16),
    }),
    reading(AT + "has 'num_transformer_submodules' as 2 and 'task_type' as 'CAUSAL_LM', for which "
            "peft runs all copies of its prompt with a mask for one", {
                "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 1,
                "token_dim": 16, "num_transformer_submodules": 2,
            }, {"base_model.prompt_embeddings": torch.ones(2, 16)}),
    reading(IN + "replaces model.embed_tokens, and peft looks up the tokens behind a prompt in the "
            "base's own: leave it out of 'modules_to_save', and its tensors out of the file", {
                "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 1,
                "token_dim": 16, "modules_to_save": ["embed_tokens"],
            }, {
                "base_model.prompt_embeddings": torch.ones(1, 16),
                "base_model.model.embed_tokens.weight": torch.ones(29, 16),
            }, on("hf_llama")),
    # tensors
    reading(AT + "has both 'kasa_config' and 'init_lora_weights' as 'olora', which take of the "
            "base one after the other: what peft merges is another change, which pl.extract takes "
            "from the merged model", {"kasa_config": {"beta": 0.1}, "init_lora_weights": "olora"},
            {**factors(), f"{P}.lora_diag": torch.ones(2)}),
    reading(IN + f"has a module without its '{B}'", {}, {f"{P}.{A}": torch.ones(2, 16)}),
    reading(IN + "lacks the tensors of 1 modules that adapter_config.json names: "
            "blocks.1.attn.q_proj", {"target_modules": ["q_proj"]}),
    reading("'…' doesn't fit this model: it has blocks.0.attn.q_proj.weight:a as (2, 17), not "
            "(2, 16)", {}, {**factors(), f"{P}.{A}": torch.ones(2, 17)}),
    reading("'…' doesn't fit this model: it has blocks.0.attn.q_proj.weight:b with values that "
            "aren't finite", {}, {**factors(), f"{P}.{B}": torch.full((12, 2), torch.nan)}),
    *(reading(f"'…' doesn't fit this model: it has {key}, which nothing asks for", {},
              {**factors(), key: torch.ones(29, 16)}) for key in (
        f"{P}.lora_C.weight", "base_model.model.lm_head.weight", "../../etc/passwd", "base_model.",
        "base_model.model.", "lm_head.weight", "base_model.model.blocks.0.attn.q_proj.weight",
    )),
    reading("'…' is for a model with other sites: of 1, this one lacks 1: "
            "blocks.7.attn.q_proj.weight; nearest: …", {"target_modules": None},
            factors(P.replace("0", "7"))),
    bad_file(adapter({"target_modules": None}, {
        f"base_model.model.0.{A}": torch.ones(2, 16, 2),
        f"base_model.model.0.{B}": torch.ones(16, 2, 1),
    }), IN + "has odd tensors: one is (2, 16, 2), not (any, 16, 3)", model=conv),
    bad_file(adapter({"target_modules": None}, {
        f"base_model.model.0.{A}": torch.ones(2, 16, 3),
        f"base_model.model.0.{B}": torch.ones(16, 2, 1),
    }), IN + "changes 0, which peft's LORA runs without its padding_mode='circular', as no change "
        "of a weight does; what peft merges, if it can, is another change, which pl.extract takes "
        "from the merged model", model=circular),
    of("SHIRA", IN + "has odd tensors: its shira_indices are beyond the weight, or name an entry "
       "twice", {"shira_weight": torch.ones(56),
                   "shira_indices": torch.stack([torch.full((56,), 99), torch.arange(56)])}),
    reading(IN + "has odd tensors: its vera_A or vera_B isn't what its projection_prng_key gives "
            "for these modules", {"peft_type": "VERA"},
            vera(A=torch.ones(2, 16), B=torch.ones(12, 2))),
    reading(IN + "has odd tensors: base_model.model.lm_head.weight is torch.float32 (30, 16), and "
            "here torch.float32 (29, 16): give the model that shape first (for tokens: "
            "model.resize_token_embeddings)", {"modules_to_save": ["lm_head"]},
            {**factors(), "base_model.model.lm_head.weight": torch.ones(30, 16)}),
    *(reading(IN + f"has odd tensors: {what}", {"trainable_token_indices": {"embed": rows}}, {
        **factors(),
        "base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(2, 16),
    }) for rows, what in (
        ([1, 29], "the tokens of embed.weight are beyond its 29, or named twice"),
        ([1, 1], "the tokens of embed.weight are beyond its 29, or named twice"),
        ([1], "base_model.model.embed.token_adapter.trainable_tokens_delta is torch.float32 "
              "(2, 16), and here torch.float32 (1, 16): give the model that shape first (for "
              "tokens: model.resize_token_embeddings)"),
    )),
    reading(IN + f"holds {P}.base_layer.weight of a base that had other values there: give the "
            "model those, or list the module in 'modules_to_save' of its settings, for the delta "
            "to have them", {}, {**factors(), f"{P}.base_layer.weight": torch.ones(12, 16)}),
    *(reading(IN + "changes lm_head.weight apart from embed.weight, and this model ties them: "
              "untie them first, model.lm_head.weight = "
              "torch.nn.Parameter(model.lm_head.weight.detach().clone()), and in a model of "
              "transformers model.config.tie_word_embeddings = False (also in its text_config), or "
              "saving ties them again", {"target_modules": None, **config}, tensors,
              on("gpt_tied")) for config, tensors in (
        ({"modules_to_save": ["lm_head"]}, {"base_model.model.lm_head.weight": torch.ones(29, 16)}),
        ({}, {f"base_model.model.lm_head.{A}": torch.ones(2, 16),
              f"base_model.model.lm_head.{B}": torch.ones(29, 2)}),
    )),
    reading(IN + "changes a.weight apart from b.weight; c.weight, the same module under another "
            "name: give each its own first, model.b = copy.deepcopy(model.b)",
            {"target_modules": None}, {f"base_model.model.a.{A}": torch.ones(2, 4),
                                       f"base_model.model.a.{B}": torch.ones(4, 2)}, Thrice),
    reading(IN + "changes tokens of head.weight, a weight of a Linear with a bias, which peft "
            "leaves out of its outputs", {"trainable_token_indices": {"head": [1]}}, {
                **factors(), "base_model.model.head.token_adapter.trainable_tokens_delta":
                torch.ones(1, 16),
            }, lambda: nn.ModuleDict({"head": nn.Linear(16, 29)})),
    reading(IN + "has 2 tensors of experts for the 4 that this model has; it lacks experts.1.w2",
            {"target_modules": ["w2"]}, expert(0), experts),
    reading(IN + "has odd tensors: experts.0.w2 begins as a part of a weight that this model has "
            "whole", {"target_modules": ["w2"], "init_lora_weights": "olora"},
            {**expert(0), **expert(1)}, experts),
    # writing
    Case(lambda model, path: pl.export(model, path), "export takes a delta, such as "
         "pl.deltas(model)['sql'], or its name with model=model: not a GPT"),
    exporting(SMALL, "format must be one of …, not 'onnx'", format="onnx"),
    *(exporting(SMALL, f"settings must be a dict that JSON can hold, not {what}", settings=its)
      for its, what in (([3], "[3]"), ({"a": float("nan")}, "{'a': nan}"))),
    exporting(pl.PromptTuning(prompt_length=2), "peft puts a prompt where the task says: give "
              "settings={'task_type': 'CAUSAL_LM'}, or SEQ_CLS, SEQ_2_SEQ_LM, TOKEN_CLS, "
              "QUESTION_ANS, FEATURE_EXTRACTION"),
    exporting(pl.PromptTuning(prompt_length=2), cannot("bert()", "a classifier of peft's reads the "
              "first virtual token, and with this one the first real one (attach with "
              "targets='()' and cut=False for peft's)"), on("hf_bert"),
              settings={"task_type": "SEQ_CLS"}),
    exporting([SMALL, pl.IA3(targets="lm_head")], "peft has one method in an adapter, and this "
              "delta has LoRA, IA3: attach them as deltas of their own, or keep them together with "
              "pl.save"),
    exporting(pl.BottleneckAdapter(), cannot("blocks.0.attn()", "peft has no BottleneckAdapter "
              "there")),
    exporting(pl.LoRA(targets="lm_head.weight[0:4]"),
              cannot("lm_head.weight[0:4]", "peft takes whole weights")),
    exporting(pl.LoHa(targets="embed"), cannot("embed.weight", "peft's LOHA doesn't take a "
              "Embedding")),
    exporting(pl.LoRA(targets="lm_head"), cannot("embed.weight", "it is tied to lm_head.weight, "
              "and peft would untie it"), on("gpt_tied")),
    exporting([pl.PromptTuning(prompt_length=2), pl.FullTuning(targets="embed")],
              cannot("embed.weight", "peft looks up the tokens behind a prompt in the base's own "
              "embedding"), settings={"task_type": "CAUSAL_LM"}),
    exporting(pl.LoRA(targets="0"), cannot("0.weight", "peft's LORA runs it without its "
              "padding_mode='circular'"), circular),
    exporting(pl.IA3(targets="v_proj.weight"), cannot("blocks.0.attn.v_proj.weight", "peft scales "
              "its bias, too, which the delta leaves as it is")),
    exporting(pl.LoRA(targets="in_proj_weight"), cannot("0.layers.0.self_attn.in_proj_weight",
              "peft changes 0.layers.0.self_attn.out_proj.weight with it, which the delta leaves "
              "as it is"), on("mha_encoder")),
    exporting([pl.LoRA(rank=2, targets="in_proj_weight"), pl.LoRA(rank=3, targets="out_proj")],
              cannot("0.layers.0.self_attn.out_proj.weight", "peft has one setting for both maps "
              "of an attention"), on("mha_encoder")),
    exporting(pl.IA3(targets="v_proj.bias"), cannot("blocks.0.attn.v_proj.bias", "peft scales a "
              "bias with its weight alone")),
    exporting(pl.PrefixTuning(prefix_length=2), cannot("blocks.0.attn()", "peft counts a prefix in "
              "the tokens' positions, and this one takes none (attach with positions='shifted' for "
              "peft's)"), settings={"task_type": "CAUSAL_LM"}),
    exporting([pl.PrefixTuning(prefix_length=2, targets="blocks.0.attn"),
               pl.PrefixTuning(prefix_length=3, targets="blocks.1.attn")],
              cannot("blocks.0.attn()", "peft has one prompt in an adapter, or one shape of "
              "prefix"), settings={"task_type": "CAUSAL_LM"}),
    exporting([pl.IA3(targets="q_proj"), FOURTH_TOKEN], cannot("embed.weight", "peft has rows of "
              "embeddings beside LoRA, and not IA3")),
    exporting(pl.FullTuning(targets="embed.weight[3:5]"), cannot("embed.weight[3:5]", "peft leaves "
              "out the bias of what has the same weight"), biased),
    exporting(pl.BitFit(add_missing=True), cannot("0()", "peft's BEFT doesn't take a Conv1d"),
              lambda: nn.Sequential(nn.Conv1d(4, 4, 3, bias=False), nn.Linear(4, 4))),
    exporting([pl.DoRA(targets="0"), pl.BitFit(targets="0()", add_missing=True)],
              cannot("0()", "peft adds no bias to the DoRA at 0"),
              lambda: nn.Sequential(nn.Linear(4, 4, bias=False))),
    exporting(pl.BitFit(add_missing=True), cannot("a()", "it is b(), too, which peft would leave "
              "as it is"), aliased),
    exporting(pl.FullTuning(targets="scale_matrix"), cannot("scale_matrix", "peft takes a copy of "
              "all of the model"), on("raw")),
    exporting(pl.FullTuning(targets="2.bias"), cannot("2.bias", "2 is parametrized"),
              on("weight_norm")),
    exporting(pl.FullTuning(targets="a.weight"), cannot("a.weight", "its module has two names, and "
              "another module has its weight"), Thrice),
    exporting(pl.BOFT(m=1, outputs=True), "peft has no BOFT of a weight's outputs"),
    exporting(pl.OFT(neumann_terms=1),
              "peft has no OFT with neumann_terms=1, but from 2 up, and exact"),
    exporting([pl.OFT(targets="q_proj", block_size=4), pl.OFT(targets="v_proj", block_size=8)],
              "peft has one oft_block_size for all modules, and this delta has 4 and 8: attach "
              "what differs as another delta"),
    exporting([pl.HiRA(targets="q_proj", rank=2), pl.HiRA(targets="v_proj", rank=3)],
              "peft has one rank for all modules of a HiRA, whatever rank_pattern says, and this "
              "delta has 2, 3: attach what differs as another delta"),
    exporting([pl.VeRA(targets="q_proj", rank=2), pl.VeRA(targets="lm_head", rank=2)],
              "peft has one random A and B for all of a VeRA, and this delta has several of "
              "different sizes: attach it as one method"),
    exporting([pl.VBLoRA(targets=name, vector_length=4, num_vectors=5) for name in
               ("q_proj", "k_proj")], "peft has one bank for all of a VB-LoRA, and this delta has "
              "several: attach it as one method"),
    exporting([pl.AdaLoRA(targets="q_proj", total_steps=9),
               pl.AdaLoRA(targets="k_proj", total_steps=9, alpha=3)],
              "peft has one lora_alpha for all modules of an AdaLoRA"),
    exporting(pl.LoKr(factor=(2, 4), targets="0"), "peft has one factor for both dimensions of a "
              "weight, and none makes a w1 of (2, 4) at one of (4, 4): keep the delta with pl.save",
              linears),
    exporting(pl.LoKr(rank=9, targets="0"), "0 is a Conv1d, the taps of whose lokr_w2 peft mixes "
              "up, unless it's of a low rank: attach with a smaller rank", conv),
    Case(lambda model, path: pl.export(delta(model), path), f"{P}.{A} has values that aren't "
         "finite, so it could not be loaded", model=poisoned),
    exporting(SMALL, "blocks.0.attn.q_proj.weight is on the meta device: it has no values",
              lambda: bare().to("meta")),
    Case(lambda model, path: pl.export(delta(model), path), "can't write '…': it holds thesis.tex, "
         "and nothing but an adapter is replaced", pl.FileError, file=in_the_way),
    Case(lambda model, path: pl.export(delta(model), path / "no" / "where"), "can't write '…': "
         "there is no folder '…'", pl.FileError),
]  # fmt: skip

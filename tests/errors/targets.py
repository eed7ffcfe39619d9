"""The errors of targets."""

import re
from typing import Any

import torch
from torch import nn

import peftlite as pl
from tests.errors.attach import attaching, taking
from tests.errors.case import Case, bare, on


def target(targets: Any, says: str, exclude: Any = None, model: Any = bare) -> Case:
    return Case(taking(targets, exclude), says, pl.TargetError, model)


NO_TARGET = (
    " is no target: give an address such as 'embed.weight', a compiled regex, a predicate such as "
    "lambda site: isinstance(site.module, nn.Linear), or a list of these"
)
PREDICATE = "the predicate <lambda> "
OF_15 = (
    "is true for none of the 15 sites offered to it: embed.weight; position.weight; "
    "blocks.0.attn.q_proj.weight; blocks.0.attn.k_proj.weight; and 11 more"
)
A_SITE = "; it is given a site, with its .address, .module and .shape"
NEAR_Q = "nearest: 'q_proj', 'q_proj()', 'v_proj', 'o_proj'"
REGEX = "for a regex, pass re.compile(...)"
PARTS = "; give rows as [0:64], columns of a matrix as [:, 0:64], or [q], [k], [v]"
NO_PART = " is no part of lm_head.weight of shape (29, 16)" + PARTS
BEYOND = " is empty or beyond lm_head.weight of shape (29, 16): it is "
TWO_OR_MORE = "LoRA takes tensors of 2 or more dimensions"


class Integers(nn.Module):
    """A quantised tensor beside a plain layer."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        self.plain = nn.Linear(4, 4)


CASES = [
    # nothing of that name
    target("q_prj", f"'q_prj' matches nothing; {NEAR_Q}"),
    target(" q_proj", f"' q_proj' matches nothing; {NEAR_Q}"),
    target(".q_proj", f"'.q_proj' matches nothing; {NEAR_Q}"),
    target("Q_PROJ", f"'Q_PROJ' matches nothing; {NEAR_Q}"),
    target(["q_proj", "q_prj"], f"'q_prj' matches nothing; {NEAR_Q}"),
    target("*.q_prj", f"'*.q_prj' matches nothing; {NEAR_Q}"),
    target("proj", "'proj' matches nothing; nearest: 'v_proj', 'q_proj', 'o_proj', 'k_proj'"),
    target("q_proj,v_proj",
           "'q_proj,v_proj' matches nothing; nearest: 'v_proj', 'q_proj', 'v_proj()', 'q_proj()'"),
    target("blocks.9.attn", "'blocks.9.attn' matches nothing; nearest: 'blocks.1.attn', "
           "'blocks.0.attn', 'blocks.1.attn()', 'blocks.0.attn()'"),
    target("transformer.h.0", "'transformer.h.0' matches nothing; there are such as "
           "'embed.weight', 'position.weight', 'blocks.0.attn_norm.weight'"),
    target("all-linear", "'all-linear' matches nothing; leave targets out for the weights of all "
           "linear maps but the head's"),
    target(r".*\.(q|v)_proj", rf"'.*\\.(q|v)_proj' matches nothing; {REGEX}"),
    target("?_proj", f"'?_proj' matches nothing; {REGEX}"),
    target(re.compile("q_proj"), "'q_proj' matches nothing; a regex has to match a whole path, "
           "such as 'embed.weight', 'position.weight', 'blocks.0.attn_norm.weight'"),
    target("", "an empty string names nothing; leave targets out for the default"),
    target([], "targets is empty; leave it out for the method's own choice"),
    target(None, "LoRA takes none of this model's sites by default; name some with targets=, "
           "such as '0.weight'", model=lambda: nn.Sequential(nn.Embedding(4, 4))),
    target(None, "LoRA takes none of this model's sites by default; it takes tensors of 2 or more "
           "dimensions", model=lambda: nn.LayerNorm(4)),
    # nothing that can be a target
    target(3, "3" + NO_TARGET),
    target([None], "None" + NO_TARGET),
    target([["q_proj"]], "['q_proj']" + NO_TARGET),
    target({"q_proj": 8}, "{'q_proj': 8}" + NO_TARGET),
    target(b"q_proj", "b'q_proj'" + NO_TARGET),
    target(nn.Linear, "the class Linear" + NO_TARGET),
    target(nn.Linear(4, 4), "Linear(in_features=4, out_features=4, bias=True)" + NO_TARGET),
    target(torch.zeros(16, 16), "a Tensor" + NO_TARGET),
    target(iter(["q_proj"]), "a list_iterator" + NO_TARGET),
    target(lambda site: False, PREDICATE + OF_15),
    target(lambda name: "q_proj" in name,
           PREDICATE + "failed at embed.weight: TypeError(\"argument of type 'Site' is not …\")"
           + A_SITE),
    target(lambda name, module: True,
           PREDICATE + "failed at embed.weight: TypeError(\"<lambda>() missing 1 required "
           "positional argument: 'module'\")" + A_SITE),
    # nothing the method can take
    target("norm", f"'norm' matches norm(); norm.weight; norm.bias; but {TWO_OR_MORE}"),
    target("norm.bias", f"norm.bias is a tensor of shape (16,); {TWO_OR_MORE}"),
    target("blocks.0.attn()", f"blocks.0.attn() is a call; {TWO_OR_MORE}"),
    target("codes", "codes holds torch.int8: no gradient can flow through it", model=Integers),
    target(lambda site: site.slot == "codes", PREDICATE + "is true for none of the 1 sites offered "
           "to it: plain.weight", model=Integers),
    Case(attaching(pl.BitFit(targets="lm_head")), "'lm_head' matches lm_head(); lm_head.weight; "
         "but BitFit takes biases, which have 1 dimension", pl.TargetError),
    Case(attaching(pl.BitFit(targets="lm_head.weight")), "lm_head.weight is a tensor of shape "
         "(29, 16); BitFit takes biases, which have 1 dimension", pl.TargetError),
    Case(attaching(pl.FullTuning(targets="attn()")),
         "blocks.0.attn() is a call; FullTuning takes tensors", pl.TargetError),
    Case(attaching(pl.BitFit()), "BitFit takes none of this model's sites by default; it takes "
         "biases, which have 1 dimension", pl.TargetError, on("hf_llama")),
    # parts
    *(target(f"lm_head.weight[{part}]", f"[{part}]{NO_PART}")
      for part in ("3", "x", "-5:", "::2", "0:4, 0:4", "Q", "...")),
    target("norm.bias[:, 0:4]", "[:, 0:4] is no part of norm.bias of shape (16,)" + PARTS),
    target("w_in[:, 0:4]", "[:, 0:4] is no part of w_in of shape (3, 20, 16)" + PARTS,
           model=on("experts")),
    target("lm_head.weight[0:99]", "[0:99]" + BEYOND + "[0:29]"),
    target("lm_head.weight[5:5]", "[5:5]" + BEYOND + "[0:29]"),
    target("lm_head.weight[:, 16:]", "[:, 16:]" + BEYOND + "[:, 0:16]"),
    target("lm_head[q]", "lm_head.weight has 29 outputs, which is no three equal parts; give the "
           "rows: [0:64]"),
    target("blocks.0.attn()[0:4]", "'blocks.0.attn()[0:4]' matches nothing; nearest: "
           "'blocks.0.attn()', 'blocks.1.attn()', 'blocks.0.attn', 'blocks.1.attn'"),
    # what is left out
    target(None, f"in exclude: 'q_prj' matches nothing; {NEAR_Q}", exclude="q_prj"),
    target(None, "in exclude: 3 is no target: give an address such as '()', a compiled regex, a "
           "predicate such as lambda site: isinstance(site.module, nn.Linear), or a list of these",
           exclude=3),
    target(None, f"in exclude: {PREDICATE}is true for none of the 63 sites offered to it: (); "
           "embed(); embed.weight; position(); and 59 more", exclude=lambda site: False),
    target(None, "exclude='*' leaves LoRA no site to take", exclude="*"),
    target("q_proj", "exclude=['attn', 'mlp'] leaves LoRA no site to take",
           exclude=["attn", "mlp"]),
    target(None, "exclude names blocks.0.attn.q_proj.weight[0:4], a part of a tensor that is taken "
           "whole: name the parts to take with targets=", exclude="blocks.0.attn.q_proj[0:4]"),
    # several methods
    Case(attaching([pl.LoRA(targets="q_proj"), pl.FullTuning(targets="attn")]),
         "blocks.0.attn.q_proj.weight is taken by LoRA at blocks.0.attn.q_proj.weight and by "
         "FullTuning: name it once, or leave it out of one with exclude=", pl.TargetError, bare),
    Case(attaching([pl.LoRA(), pl.LoRA(rank=4)]),
         "blocks.0.attn.q_proj.weight is taken by LoRA at blocks.0.attn.q_proj.weight and by LoRA: "
         "name it once, or leave it out of one with exclude=", pl.TargetError, bare),
    target(["lm_head.weight[0:8]", "lm_head.weight[4:12]"],
           "lm_head.weight[4:12] is taken by LoRA at lm_head.weight[0:8] and by LoRA: name it "
           "once, or leave it out of one with exclude="),
]  # fmt: skip

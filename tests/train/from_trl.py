"""What trl 1.16 makes of shared numbers: `python -m tests.train.from_trl` writes the file of them.

It runs trl's own code, the methods of its trainers in which losses are, on models that give what
they are told to. It needs `pip install trl==1.16.0`; the tests need only the file.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = Path(__file__).parent / "trl_1.16.0.safetensors"

SMOOTH = {"label_smoothing": 0.1}
DPO: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in (
        "sigmoid hinge ipo nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
        "discopop sft sigmoid_norm").split()},
    **{f"{kind} smoothed": {"kind": kind, **SMOOTH}
       for kind in ("exo_pair", "robust", "aot", "aot_unpaired")},
    **{f"{kind} {way}": {"kind": kind, "divergence": way}
       for kind in ("sigmoid", "hinge", "ipo", "discopop", "sigmoid_norm")
       for way in ("forward_kl", "js_divergence", "alpha_divergence")},
    **{f"{kind} shorter": {"kind": kind, "ld_alpha": 0.4} for kind in ("sigmoid", "ipo", "aot")},
    "mixed": {"kind": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, "beta": 0.3},
}  # fmt: skip
KTO: dict[str, dict[str, Any]] = {
    "kto": {}, "apo_zero_unpaired": {"kind": "apo_zero_unpaired"},
    "kto weighted": {"beta": 0.3, "desirable": 1.5, "undesirable": 0.7},
}  # fmt: skip
CPO: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in ("sigmoid", "hinge", "ipo", "simpo")},
    "sigmoid smoothed": {"kind": "sigmoid", **SMOOTH},
    "simpo smoothed": {"kind": "simpo", "beta": 2.0, "gamma": 0.7, **SMOOTH},
    "alpha": {"kind": "simpo", "alpha": 0.3},
}
GRPO: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in "grpo bnpo dr_grpo dapo cispo sapo vespo".split()},
    **{f"{kind} sequence": {"kind": kind, "level": "sequence"}
       for kind in ("grpo", "dapo", "luspo", "sapo")},
    "clipped higher": {"kind": "dapo", "low": 0.1, "high": 0.28},
    "two-sided": {"kind": "grpo", "most": 1.1},
    "with a KL": {"kind": "grpo", "beta": 0.2},
    "with entropy": {"kind": "bnpo", "entropy": 0.3},
}  # fmt: skip


def shared() -> dict[str, Tensor]:
    """The numbers that both libraries are given, in fp32: 6 answers of up to 7 tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 3, 5, 4, 6, 2])
    mask = (torch.arange(7) < lengths[:, None]).float()

    def logps() -> Tensor:
        return -torch.rand(6, 7, generator=draw) * 3 * mask

    def near(x: Tensor) -> Tensor:
        return (x + 0.3 * torch.randn(6, 7, generator=draw)) * mask

    policy = logps()
    return {
        "mask": mask, "policy": policy, "reference": near(policy), "old": near(policy),
        "other": logps(), "other_reference": logps(), "entropy": torch.rand(6, 7, generator=draw),
        "advantages": torch.randn(6, generator=draw), "good": torch.tensor([1, 0, 1, 1, 0, 0]),
        "rewards": torch.randn(6, generator=draw), "margin": torch.rand(3, generator=draw),
    }  # fmt: skip


class Given(nn.Module):
    """A model whose outputs are given."""

    is_gradient_checkpointing = False

    def __init__(self, *outputs: Any):
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.outputs.pop(0)


def told(logps: Tensor) -> Any:
    """As trl's fused head has it."""
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trainer(**settings: Any) -> Any:
    """What a method of a trainer finds in `self`."""

    def same(x: Any, **_: Any) -> Any:
        return x

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same,
        num_processes=1, sync_gradients=True,
    )  # fmt: skip
    return SimpleNamespace(
        accelerator=accelerator, aux_loss_enabled=False, use_weighting=False, use_vllm=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        current_gradient_accumulation_steps=1, ref_model=None, precompute_ref_logps=False,
        _entropy_bonus_enabled=False, use_adaptive_entropy=False, off_policy_mask_threshold=None,
        top_entropy_quantile=1.0, is_encoder_decoder=False, **settings,
    )  # fmt: skip


def ids(mask: Tensor) -> dict[str, Tensor]:
    """Inputs whose answers are those of a mask, after a prompt of one token."""
    full = torch.cat([torch.zeros(len(mask), 1), mask], 1).long()
    return {"input_ids": full, "attention_mask": full, "completion_mask": full}


def dpo(x: dict[str, Tensor], kind: Any = "sigmoid", beta: float = 0.1, **given: Any) -> Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    kinds = {kind: 1.0} if isinstance(kind, str) else kind
    model = Given(told(x["policy"]))
    own = trainer(
        model=model, beta=beta, loss_types=list(kinds), loss_weights=list(kinds.values()),
        label_smoothing=given.get("label_smoothing", 0.0), ld_alpha=given.get("ld_alpha"),
        f_divergence_type=given.get("divergence", "reverse_kl"), f_alpha_divergence_coef=0.5,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    own.ref_model = Given(told(x["reference"]))
    return DPOTrainer._compute_loss(own, model, ids(x["mask"]), False)


def kto(x: dict[str, Tensor], kind: str = "kto", **given: Any) -> Tensor:
    from trl.trainer.kto_trainer import KTOTrainer

    inputs = ids(x["mask"])
    inputs |= {f"KL_{name}": value for name, value in inputs.items()} | {"label": x["good"]}
    model = Given(*map(told, [x["other"]] * (kind == "kto") + [x["policy"]]))
    own = trainer(
        model=model, beta=given.get("beta", 0.1), loss_type=kind, calculate_KL=kind == "kto",
        desirable_weight=given.get("desirable", 1.0),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        undesirable_weight=given.get("undesirable", 1.0),
    )  # fmt: skip
    own._compute_kl_logps = lambda *args: KTOTrainer._compute_kl_logps(own, *args)
    own.ref_model = Given(*map(told, [x["other_reference"]] * (kind == "kto") + [x["reference"]]))
    return KTOTrainer._compute_loss(own, model, inputs, False)


def cpo(x: dict[str, Tensor], kind: str, alpha: float = 0.0, **given: Any) -> Tensor:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    own = trainer(
        beta=given.get("beta", 0.1), loss_type=kind, alpha=alpha,
        simpo_gamma=given.get("gamma", 0.5),
        label_smoothing=given.get("label_smoothing", 0.0),
    )  # fmt: skip
    sums = x["policy"].sum(-1)
    means = sums / x["mask"].sum(-1)
    return CPOTrainer.cpo_loss(own, *(means if kind in ("ipo", "simpo") else sums).chunk(2))[0]


def orpo(x: dict[str, Tensor]) -> Tensor:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    means = x["policy"].sum(-1) / x["mask"].sum(-1)
    return -ORPOTrainer.odds_ratio_loss(trainer(beta=0.1), *means.chunk(2))[0]


def reward(x: dict[str, Tensor], margin: bool, centre: float | None) -> Tensor:
    from trl.trainer.reward_trainer import RewardTrainer

    own = trainer(model=Given(), args=SimpleNamespace(center_rewards_coefficient=centre))
    inputs = {"attention_mask": x["mask"]} | ({"margin": x["margin"]} if margin else {})
    model = Given(SimpleNamespace(logits=x["rewards"][:, None]))
    return RewardTrainer.compute_loss(own, model, inputs)


def grpo(x: dict[str, Tensor], kind: str, level: str = "token", **given: Any) -> Tensor:
    from trl.trainer.grpo_trainer import GRPOTrainer

    low = given.get("low", 0.2)
    args = SimpleNamespace(
        delta=given.get("most"), sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        use_bias_correction_kl=False, steps_per_generation=1,
    )  # fmt: skip
    own = trainer(
        model=Given(), loss_type=kind, importance_sampling_level=level, epsilon_low=low, args=args,
        epsilon_high=given.get("high", 5.0 if kind == "cispo" else low),
        beta=given.get("beta", 0.0),
        max_completion_length=9, get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (x["policy"], x["entropy"], None),
        entropy_coef=given.get("entropy", 0.0),
    )  # fmt: skip
    own._entropy_bonus_enabled = "entropy" in given
    n = x["mask"].long()
    return GRPOTrainer._compute_loss(own, Given(), {
        "prompt_ids": n[:, :1], "prompt_mask": n[:, :1], "completion_ids": n,
        "completion_mask": x["mask"], "advantages": x["advantages"],
        "old_per_token_logps": x["old"], "ref_per_token_logps": x["reference"],
        "num_items_in_batch": x["mask"].sum(),
    })  # fmt: skip


def rloo(x: dict[str, Tensor]) -> Tensor:
    from trl.trainer.rloo_trainer import RLOOTrainer

    own = trainer(
        model=Given(), epsilon_low=0.2, epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *_, **__: (x["policy"], x["entropy"], None),
    )  # fmt: skip
    n = x["mask"].long()
    return RLOOTrainer._compute_loss(own, Given(), {
        "prompt_ids": n[:, :1], "prompt_mask": n[:, :1], "completion_ids": n,
        "completion_mask": x["mask"], "advantages": x["advantages"],
        "old_logps": (x["old"] * x["mask"]).sum(-1),
    })  # fmt: skip


def main() -> None:
    given = shared()
    found = dict(given)

    def run(name: str, call: Any, *args: Any, **options: Any) -> None:
        x = {**given, "policy": given["policy"].clone().requires_grad_()}
        x["rewards"] = given["rewards"].clone().requires_grad_()
        loss = call(x, *args, **options)
        loss.mean().backward()
        found[f"{name}: loss"] = loss.detach()
        own = x["rewards" if call is reward else "policy"].grad
        found[f"{name}: gradient"] = own

    for table, call in ((DPO, dpo), (KTO, kto), (CPO, cpo), (GRPO, grpo)):
        for name, options in table.items():
            run(f"{call.__name__} {name}", call, **options)
    run("orpo", orpo)
    run("rloo", rloo)
    run("reward", reward, False, None)
    run("reward margin", reward, True, None)
    run("reward centred", reward, True, 0.3)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, FILE)


if __name__ == "__main__":
    main()

"""R15: files of peers, drawn at random: after `pl.load` the peer's outputs, or a reason."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peftlite as pl
from tests.trust.tally import Tally
from tests.zoo import Kind, seeded

TOLERANCE = 1e-5


def peft(every: int) -> Tally:
    """A case in so many of benchmarks/peers.py, read, written and merged."""
    from matrix.cases import cases
    from matrix.trial import WAYS, attempt
    from peers import quiet

    quiet()
    tally, void = Tally(), 0
    refused = dict.fromkeys(WAYS, 0)
    for case in cases()[every // 2 :: every]:
        outcome = attempt(case)
        void += bool(outcome.void)
        for way, word in outcome.words.items():
            refused[way] += word == "refused"
            tally.check(word in ("equal", "refused"), f"{way} {word}: {case}: {outcome.why}")
    tally.notes.append(f"refused {refused}, {void} that peft can't run".replace("'", ""))
    return tally


def lycoris(n: int) -> Tally:
    """Settings of LyCORIS in every combination, on linear maps and convolutions."""
    from lycoris import create_lycoris

    from tests.test_against_lycoris import KIND, PADDED

    kinds = [kind for kind in KIND.values() if kind.name not in PADDED]

    def make(rng: random.Random, kind: Kind, path: Path) -> tuple[str, Tensor]:
        how = _lycoris(rng)
        model = kind.model()
        network = create_lycoris(model, warn_on_unmatched=False, **how)
        network.apply_to()
        _disturb(network.eval().named_parameters(), rng)
        network.save_weights(path, None, {})
        return str(how), kind.run(model, kind.batch())

    return _borders(n, kinds, make)


def _lycoris(rng: random.Random) -> dict[str, Any]:
    how: dict[str, Any] = {
        "algo": rng.choice(["lora", "loha", "lokr", "full"]),
        "linear_dim": rng.randint(1, 6),
        "linear_alpha": rng.choice([1, 2.5, 4]),
        "conv_dim": rng.randint(1, 6),
        "conv_alpha": rng.choice([1, 3]),
    }
    if how["algo"] == "lokr":
        how["factor"] = rng.choice([-1, 2, 4])
    flags = ("dora_wd", "wd_on_output", "use_tucker", "use_scalar", "rs_lora", "train_norm",
             "decompose_both", "full_matrix", "unbalanced_factorization")  # fmt: skip
    return how | {flag: True for flag in flags if rng.random() < 0.3}


def adapterhub(n: int) -> Tally:
    """Settings of AdapterHub's configs on the models that it and transformers share."""
    from tests.test_adapterhub import ALL, KIND, saved

    def make(rng: random.Random, kind: Kind, path: Path) -> tuple[str, Tensor]:
        config = _adapterhub(rng)
        output, _ = saved(kind, config, path, safe=rng.random() < 0.5)
        return str(config), output

    return _borders(n, [KIND[name] for name in ALL], make)


def _adapterhub(rng: random.Random) -> Any:
    from adapters import BnConfig, IA3Config, LoRAConfig

    def flag() -> bool:
        return rng.random() < 0.5

    matrices = rng.sample(["q", "k", "v"], rng.randint(1, 3))
    alpha = rng.choice([1, 2, 5])
    if rng.random() < 0.2:
        return IA3Config(attn_matrices=matrices)
    if rng.random() < 0.4:
        return LoRAConfig(r=rng.randint(1, 4), alpha=alpha, attn_matrices=matrices,
                          intermediate_lora=flag(), output_lora=flag())  # fmt: skip
    mh = flag()
    return BnConfig(mh, flag() or not mh, rng.choice([1, 2, 4]), rng.choice(["relu", "gelu"]),
                    original_ln_before=flag(), residual_before_ln=flag(), ln_before=flag(),
                    ln_after=flag(), scaling=rng.choice([1.0, 2.0, "learned"]))  # fmt: skip


@torch.no_grad()
def _disturb(parameters: Any, rng: random.Random) -> None:
    with seeded(rng.randrange(1 << 30)):
        for _, parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def _borders(
    n: int, kinds: list[Kind], make: Callable[[random.Random, Kind, Path], tuple[str, Tensor]]
) -> Tally:
    """Files that a peer writes, and what its model gives, which `pl.load` alone has to give."""
    rng, tally, refused, void = random.Random(0), Tally(), 0, 0
    for _ in range(n):
        kind = rng.choice(kinds)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder, "theirs.safetensors")
            try:
                what, expected = make(rng, kind, path)
            except Exception:  # whatever the peer says of what it doesn't have
                void += 1
                continue
            ours = kind.model()
            try:
                pl.load(ours, path)
            except pl.PeftliteError:
                refused += 1
                tally.tried += 1
                continue
            output, base = kind.run(ours, kind.batch()), kind.run(kind.model(), kind.batch())
            apart, moved = (float((other - expected).abs().max()) for other in (output, base))
            scale = max(1.0, float(expected.abs().max()))
            right = apart <= TOLERANCE * scale < moved
            tally.check(right, f"{kind}: {what}: off by {apart:.2g}, the base by {moved:.2g}")
    tally.notes.append(f"{refused} refused, {void} that it can't run")
    return tally

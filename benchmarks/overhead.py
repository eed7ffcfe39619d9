"""The eager cost of a patched call beyond the base's own: a LoRA of rank 8 on an 8 x 8 linear.

So small a map does no work to speak of: what is left is Python and dispatch, peftlite's and peft's.
"""

from collections.abc import Callable
from functools import partial

import peft
import torch
from common import Figure, arguments, differences, interleave, ratios, report, timer
from torch import Tensor, nn

import peftlite as pl


def base() -> nn.Module:
    return nn.Linear(8, 8).requires_grad_(False)


def with_peftlite() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    pl.attach(model, pl.LoRA(rank=8, targets="0"))
    return model[0]


def with_peft() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["0"]))
    return model[0]


LAYERS = {"base": base, "peftlite": with_peftlite, "peft": with_peft}


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def forward_no_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    layer(x).backward(torch.ones_like(x))


def figures(mode: str, call: Callable, rounds: int, at_least: float | None) -> list[Figure]:
    # as inside a model, where the layer before wants its gradient too
    x = torch.randn(1, 8, requires_grad=call is not forward_no_grad)
    times = interleave(
        {
            name: timer(partial(call, build(), x), 0.002, best_of=5)
            for name, build in LAYERS.items()
        },
        rounds,
    )
    ours, theirs = (differences(times[name], times["base"]) for name in ("peftlite", "peft"))
    micro = {name: [value * 1e6 for value in times[name]] for name in times}
    return [
        *(Figure(f"{mode}, {name}", micro[name], "us") for name in LAYERS),
        Figure(f"{mode}, overhead, peft / peftlite", ratios(theirs, ours), at_least=at_least),
    ]


def main() -> None:
    quick = arguments(__doc__).quick
    rounds = 5 if quick else 101
    torch.set_num_threads(1)
    report(
        "overhead",
        [
            *figures("no grad", forward_no_grad, rounds, at_least=3),
            *figures("grad", forward, rounds, at_least=3),
            *figures("forward and backward", forward_backward, rounds, at_least=None),
        ],
        quick=quick,
        peft=peft.__version__,
    )


if __name__ == "__main__":
    main()

"""Whole training steps of a small Llama with AdamW, over the frozen base's, beside peft.

Eager and compiled, with and without checkpointing and dropout, in fp32 and bf16; all weights train
in `full`, and in the base nothing does: it has a gradient for its input alone, and no optimizer, so
peft's time over the base's is the most that any adapter can be ahead. Then how many graphs dynamo
makes of it. Compiled is each decoder layer, as `layer.compile()` does: eight of them are one graph.

`--device cuda` has a block of Llama 8B's shape, too. In bf16 adapters are fp32, and bf16 where it
says `half adapters`, in peft and here. `--own-time` counts this one thread's time and not the
clock's, for a machine that others use.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from time import perf_counter, thread_time

import peft
import torch
import transformers
from common import Figure, interleave, named, ratios, report, timer, until_told
from contenders import DTYPES, RANK
from lora_linear import once
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import peftlite as pl
from peftlite import kernels
from peftlite.verbs.fuse import fuse

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """Of a Llama with grouped keys, and of its batch."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    batch: int
    tokens: int

    def config(self) -> LlamaConfig:
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 4,
            num_hidden_layers=self.layers,
            vocab_size=1024,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        return config


BLOCK = {
    "quick": Shape(64, 224, 4, 1, 1, 512),
    "cuda": Shape(4096, 14336, 32, 1, 4, 2048),
}
LLAMA = {
    "quick": Shape(64, 224, 4, 2, 1, 512),
    "cpu": Shape(512, 1792, 8, 8, 2, 256),
    "cuda": Shape(2048, 7168, 32, 8, 4, 2048),
}


class Block(nn.Module):
    """LlamaDecoderLayer with its positions."""

    def __init__(self, shape: Shape):
        super().__init__()
        config = shape.config()
        self.layer = LlamaDecoderLayer(config, 0)
        angles = LlamaRotaryEmbedding(config)(torch.ones(1), torch.arange(shape.tokens)[None])
        for name, angle in zip(("cos", "sin"), angles, strict=True):
            self.register_buffer(name, angle)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, position_embeddings=(self.cos, self.sin))
        return y if isinstance(y, Tensor) else y[0]  # transformers 5, or 4


class Llama(nn.Module):
    """LlamaForCausalLM from its embeddings to its loss."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.model = LlamaForCausalLM(shape.config()).train()

    def forward(self, x: Tensor) -> Tensor:
        labels = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return self.model(inputs_embeds=x, labels=labels).loss


@dataclass
class Task:
    """What a step is of: a frozen base, its input, and the gradient of its output, if no loss."""

    name: str
    base: nn.Module
    x: Tensor
    dy: Tensor | None

    @classmethod
    def of(cls, kind: str, shape: Shape, device: str, dtype: torch.dtype) -> "Task":
        made = Block(shape) if kind == "block" else Llama(shape)
        checkpoint(made, "checkpointed" in kind)
        base = made.to(device, dtype).requires_grad_(False)
        size = (shape.batch, shape.tokens, shape.hidden)
        x, dy = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
        name = f"{str(dtype).removeprefix('torch.')} {kind}"
        return cls(name, base, x.requires_grad_(), dy if kind == "block" else None)

    @property
    def tokens(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    def stepper(self, model: nn.Module) -> Callable[[], None]:
        """What does one step of the model."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        learns = bool(parameters) and self.dy is None
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if learns else None

        def step() -> None:
            torch.autograd.backward(model(self.x), self.dy)
            if optimizer is not None:
                optimizer.step()
            for tensor in (self.x, *parameters):
                tensor.grad = None

        return step


def checkpoint(model: nn.Module, on: bool) -> nn.Module:
    """The model, whose layers are run again in the backward pass, or not."""
    for module in model.modules():
        if isinstance(module, LlamaForCausalLM):
            if on:
                module.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                module.gradient_checkpointing_disable()
    return model


def compiled(model: nn.Module) -> nn.Module:
    """A copy whose decoder layers are compiled."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, LlamaDecoderLayer):
            module.compile()
    return twin


def attached(base: nn.Module, dtype: torch.dtype | None = None, dropout: float = 0.0) -> nn.Module:
    model = copy.deepcopy(base)
    method = pl.LoRA(rank=RANK, targets=PROJECTIONS, dtype=dtype, dropout=dropout)
    delta = pl.attach(model, method)
    for name, parameter in delta.named_parameters():
        if name.endswith("b"):
            nn.init.normal_(parameter, std=0.02)
    return model


def fused(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    fuse(twin)
    return twin


def merged(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    pl.merge(twin, "default")
    return twin.requires_grad_(False)


def with_peft(base: nn.Module, like: nn.Module, widen: bool, dropout: float = 0.0) -> nn.Module:
    """peft's LoRA with the same factors."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, lora_dropout=dropout
    )
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=widen)
    patches = pl.deltas(like)["default"].placed
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            patch = patches[f"{name}.weight"].patch
            module.lora_A["default"].weight.data.copy_(patch.a)
            module.lora_B["default"].weight.data.copy_(patch.b)
    return model


def contenders(task: Task) -> dict[str, nn.Module]:
    """All that is compared on a GPU, by name; the base comes first."""
    base, ours = task.base, attached(task.base)
    found = {"base": base, "merged": merged(ours), "peft": with_peft(base, ours, True)}
    if task.x.dtype is not torch.float32:
        found["peft, half adapters"] = with_peft(base, ours, False)
        found["peftlite, half adapters"] = attached(base, task.x.dtype)
    found["peft compiled"] = torch.compile(with_peft(base, ours, True))
    found["peftlite compiled"] = torch.compile(copy.deepcopy(ours))
    return found | {"peftlite": ours, "peftlite fused": fused(ours)}


# -- right


def gradients(task: Task, model: nn.Module) -> list[Tensor]:
    """The output, and the gradients of the input, the A's and the B's."""
    y = model(task.x)
    leaves = [task.x, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, leaves, task.dy)]


def errors(task: Task, models: dict[str, nn.Module]) -> Iterator[Figure]:
    """How far ours are from fp64, of how far peft is."""
    wide = copy.deepcopy(models["peftlite"]).double()
    dy = None if task.dy is None else task.dy.double()
    exact = Task(task.name, wide, task.x.detach().double().requires_grad_(), dy)
    with kernels.backend("reference"):
        true = gradients(exact, wide)

    def error(model: nn.Module, of: slice) -> float:
        pairs = zip(gradients(task, model)[of], true[of], strict=True)
        parts = [(found.double() - value, value) for found, value in pairs]
        wrong, all_of_it = (sum(part[k].square().sum() for part in parts) for k in (0, 1))
        return float((wrong / all_of_it).sqrt())

    parts = {"delta's gradients": slice(2, None)}
    if task.dy is not None:  # a loss is rounded to fp32 by transformers
        parts["output"] = slice(0, 1)
    for what, of in parts.items():
        peers = error(models["peft"], of)
        yield constant(f"{task.name}, peft, error of the {what}", peers, "of it")
        for name in ("peftlite", "peftlite fused"):
            ours = error(models[name], of) / peers
            yield constant(f"{task.name}, {name}, error of the {what}", ours, "of peft's", 1.05)


# -- small


def kept(task: Task, model: nn.Module, with_inputs: bool = False) -> int:
    """The bytes that the forward pass keeps, with the inputs of the projections or as it is."""
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def see(_: nn.Module, args: tuple[Tensor]) -> None:
        keep(args[0])

    hooks = [
        module.register_forward_pre_hook(see)
        for name, module in model.named_modules()
        if with_inputs and name.rpartition(".")[2] in PROJECTIONS
    ]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(task.x)
    for hook in hooks:
        hook.remove()
    for tensor in (task.x, *model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def peak(step: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def constant(name: str, value: float, unit: str, at_most: float | None = None) -> Figure:
    return Figure(name, [value] * 2, unit, at_most=at_most)


# -- fast


def on_cuda(task: Task, rounds: int) -> Iterator[Figure]:
    models = contenders(task)
    yield from errors(task, models)
    steps = {name: task.stepper(model) for name, model in models.items()}
    times = interleave({name: timer(step, 0.02) for name, step in steps.items()}, rounds)
    yield Figure(f"{task.name}, base", [seconds * 1e3 for seconds in times["base"]], "ms")
    for name in list(models)[1:]:
        yield Figure(f"{task.name}, {name}", ratios(times[name], times["base"]))
    for name in [name for name in models if name.startswith("peftlite")]:
        peer = name.replace("peftlite", "peft").replace(" fused", "")
        faster = ratios(times[name], times[peer])
        yield Figure(f"{task.name}, {name} over {peer}", faster, at_most=1.0)
    for name, values in times.items():
        yield Figure(f"{task.name}, {name}", [task.tokens / s for s in values], "tokens/s")
    yield from sizes(task, models, steps)


def sizes(
    task: Task, models: dict[str, nn.Module], steps: dict[str, Callable[[], None]]
) -> Iterator[Figure]:
    """What is kept beyond the base and the projections' inputs: r numbers a token are enough."""
    again = "checkpointed" in task.name
    enough = kept(task, task.base, with_inputs=not again)
    numbers = 0 if again else len(pl.deltas(models["peftlite"])["default"].placed) * RANK
    for name, model in models.items():
        if "compiled" not in name and name not in ("base", "merged"):
            h = task.x.dtype if "half" in name else torch.float32
            at_most = numbers * task.tokens * h.itemsize if name.startswith("peftlite") else None
            more = kept(task, model) - enough
            yield constant(f"{task.name}, {name}, kept beyond the base", more, "B", at_most)
        if task.x.is_cuda:
            yield constant(f"{task.name}, {name}, peak", peak(steps[name]), "B")


# -- whole steps


def whole(
    dtype: torch.dtype, dropout: float, shape: Shape, rounds: int, clock: Callable[[], float]
) -> Iterator[Figure]:
    """Steps with and without checkpointing, eager and compiled, in one interleaved run each."""
    task = Task.of("Llama", shape, "cpu", dtype)
    ours, full = attached(task.base, dropout=dropout), copy.deepcopy(task.base).requires_grad_(True)
    models = {"base": task.base, "full": full, "peft": with_peft(task.base, ours, True, dropout)}
    models |= {"peftlite": ours, "peftlite fused": fused(ours)}
    if not dropout:
        yield from errors(task, models)
        yield from sizes(task, models, {})
    torch._dynamo.reset()
    models |= {f"{name} compiled": compiled(models[name]) for name in ("base", "peft", "peftlite")}
    steps = {name: task.stepper(model) for name, model in models.items()}
    for again in (False, True):
        for model in models.values():
            checkpoint(model, again)
        times = interleave({name: once(step, clock) for name, step in steps.items()}, rounds)
        cell = f"{task.name}{', dropout' * bool(dropout)}{', checkpointed' * again}"
        yield from compare(cell, times)


def compare(cell: str, times: dict[str, list[float]]) -> Iterator[Figure]:
    yield Figure(f"{cell}, base", [seconds * 1e3 for seconds in times["base"]], "ms")
    for name in list(times)[1:]:
        yield Figure(f"{cell}, {name}", ratios(times[name], times["base"]))
    for how in ("", " compiled"):
        theirs = times[f"peft{how}"]
        ahead = ratios(theirs, times[f"peftlite{how}"])
        yield Figure(f"{cell}, peft{how} over peftlite{how}", ahead, at_least=1.25)
        yield Figure(f"{cell}, peft{how} over base{how}", ratios(theirs, times[f"base{how}"]))


def graphs(dropout: float, again: bool, shape: Shape) -> Iterator[Figure]:
    """What dynamo makes of five steps of a whole model with its loss, the optimizer's between."""
    task = Task.of("Llama", replace(shape, layers=2), "cpu", torch.bfloat16)
    ours = attached(task.base, dropout=dropout)
    for name, model in (("peft", with_peft(task.base, ours, True, dropout)), ("peftlite", ours)):
        torch._dynamo.reset()
        counters.clear()
        step = task.stepper(torch.compile(checkpoint(model, again), backend="eager"))
        made = []
        for _ in range(5):
            step()
            made.append(counters["stats"]["unique_graphs"])
        cell = f"{name}{', dropout' * bool(dropout)}{', checkpointed' * again}"
        breaks = sum(counters["graph_break"].values())
        bound = 1 if name == "peftlite" else None
        yield constant(f"graphs, {cell}", made[0] + breaks, "", bound)
        yield constant(f"recompilations, {cell}", made[-1] - made[0], "", bound and 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, and no CSV file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="4, or 11 on a GPU")
    parser.add_argument("--label", help="for another machine: what the CSV file's name ends with")
    parser.add_argument("--own-time", action="store_true", help="one thread, and its own time")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.own_time else args.threads)
    torch.manual_seed(0)
    shape = LLAMA["quick" if args.quick else args.device]

    def on_cpu() -> Iterator[Figure]:
        rounds = 2 if args.quick else args.rounds or 4
        clock = thread_time if args.own_time else perf_counter
        for dropout, again in product((0.0, 0.1), (False, True)):
            yield from graphs(dropout, again, shape)
        for dtype, dropout in product(DTYPES["cpu"], (0.0, 0.1)):
            yield from whole(dtype, dropout, shape, rounds, clock)

    def on_gpu() -> Iterator[Figure]:
        for dtype, kind in product(DTYPES["cuda"], ("block", "Llama", "Llama, checkpointed")):
            of = shape if kind != "block" else BLOCK["quick" if args.quick else "cuda"]
            rounds = 3 if args.quick else args.rounds or 11
            yield from on_cuda(Task.of(kind, of, "cuda", dtype), rounds)

    report(
        named("block", args.device == "cuda" and "cuda", args.label),
        until_told(on_cpu() if args.device == "cpu" else on_gpu()),
        quick=args.quick,
        peft=peft.__version__,
        transformers=transformers.__version__,
        clock="own" if args.own_time else "wall",
    )


if __name__ == "__main__":
    main()

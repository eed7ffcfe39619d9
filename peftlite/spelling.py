"""Spelling: what other libraries call a thing, and what to type for it here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

from peftlite.errors import PeftliteError
from peftlite.table import short

T = TypeVar("T")

ARGUMENTS = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets",
    "target_parameters": "targets", "exclude_modules": "exclude", "init_lora_weights": "init",
    "num_virtual_tokens": "prompt_length prefix_length", "bottleneck_dim": "bottleneck_size",
    "learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "accumulate",
    "train_dataset": "train", "eval_dataset": "val", "output_dir": "folder",
    "lr_scheduler_type": "schedule", "warmup_ratio": "warmup", "max_grad_norm": "clip",
    "data_collator": "collate", "torch_compile": "compile", "optim": "optimizer",
    "save_total_limit": "keep", "save_steps": "save_every", "eval_steps": "valid_every",
    "early_stopping_patience": "patience", "loss_fn": "loss", "criterion": "loss",
    "loraplus_lr_ratio": "b_ratio", "scheduler": "schedule",
}  # fmt: skip
"""Arguments that have another name here, or one of several."""

ADVICE = {
    "use_rslora": "scaling='rslora'",
    "use_dora": "pl.DoRA(...) in place of pl.LoRA(...)",
    "modules_to_save": "a list, [pl.LoRA(...), pl.FullTuning(targets=...)]",
    "trainable_token_indices": "a list, [pl.LoRA(...), pl.SparseMask(...)]",
    "bias": "a list, [pl.LoRA(...), pl.BitFit()]",
    "rank_pattern": "a list of methods, each with its rank= and targets=",
    "alpha_pattern": "a list of methods, each with its alpha= and targets=",
    "layers_to_transform": "targets= with a path or a glob, such as 'layers.3.*'",
    "task_type": "nothing: any module is taken as it is",
    "inference_mode": "nothing: delta.parameters() are plain parameters",
    "bf16": "autocast='bf16'",
    "fp16": "autocast='fp16'",
    "report_to": "callbacks=[pl.WandB()] or [pl.TensorBoard(folder)]",
    "warmup_steps": "warmup=, the share of the steps",
    "resume_from_checkpoint": "trainer.fit(resume=...)",
    "args": "the settings one by one, such as lr=1e-4, epochs=3",
}
"""Arguments that are something else here."""

NAMES = {
    "get_peft_model": "pl.attach(model, pl.LoRA(rank=8))",
    "inject_adapter_in_model": "pl.attach(model, pl.LoRA(rank=8))",
    "add_adapter": "pl.attach(model, pl.LoRA(rank=8), name='sql')",
    "load_adapter": "pl.load(model, folder)",
    "from_pretrained": "pl.load(model, folder)",
    "PeftModel": "pl.load(model, folder)",
    "AutoPeftModelForCausalLM": "pl.load(model, folder)",
    "PeftConfig": "pl.inspect(folder)",
    "set_adapter": "pl.use(model, name)",
    "delete_adapter": "pl.detach(model, name)",
    "unload": "pl.detach(model, name)",
    "disable_adapter": "with pl.using(model, None)",
    "add_weighted_adapter": "pl.combine(...)",
    "merge_adapter": "pl.merge(model, name)",
    "unmerge_adapter": "pl.unmerge(model, name)",
    "merge_and_unload": "pl.merge(model, name)",
    "print_trainable_parameters": "print(delta), or delta.num_parameters",
    "get_nb_trainable_parameters": "delta.num_parameters",
    "save_pretrained": "pl.save(delta, path), or pl.export(delta, folder, format='peft')",
    "get_peft_model_state_dict": "dict(delta.named_tensors())",
    "prepare_model_for_kbit_training": "nothing: pl.attach freezes the base",
    "TaskType": "nothing: any module is taken as it is",
    "SFTTrainer": "pl.Trainer(model, pl.losses.causal_lm, train, val)",
    "TrainingArguments": "pl.Trainer(model, loss, train, val, lr=..., epochs=...)",
}
"""What is a name elsewhere: a function, a class, or a method of a model."""


def hint(name: str, there: Collection[str]) -> str:
    """What to type for a name that isn't there, as the end of a message; nothing if unknown."""
    plain = name.removesuffix("Config").lower()
    if name in NAMES:
        return f"; type {NAMES[name]}"
    alike = [own for own in there if own.lower() == plain] or difflib.get_close_matches(name, there)
    return f"; there is {alike[0]}" if alike else ""


def check_arguments(kind: type, given: Mapping[str, Any]) -> None:
    """Raises PeftliteError, with what to type, if a dataclass is given what it doesn't take."""
    taken = [field.name for field in fields(kind) if field.init]
    unknown = {name: given[name] for name in given if name not in taken}
    if unknown:  # what is taken and not kept is among no fields
        kept = inspect.signature(kind).parameters
        unknown = {name: given[name] for name in unknown if name not in kept}
    if not unknown:
        return
    here = {name: nearest(name, taken) for name in unknown}
    typed = ", ".join(f"{here[name]}={short(unknown[name])}" for name in unknown if here[name])
    raise PeftliteError(
        f"{kind.__name__} takes no {', '.join(f'{name}=' for name in unknown)}"
        + (f"; type {typed}" if typed else "")
        + "".join(f"; for {n}=, {ADVICE[n]}" for n in unknown if n in ADVICE and not here[n])
        + f"; it takes {', '.join(taken)}"
    )


def nearest(name: str, taken: Collection[str]) -> str | None:
    """The name that an argument has here, or may have been meant to have; None if none is near."""
    if name in ADVICE:
        return None
    meant = difflib.get_close_matches(name, [*taken, *ARGUMENTS], 1)
    own = [own for each in meant for own in ARGUMENTS.get(each, each).split() if own in taken]
    return next(iter(own or difflib.get_close_matches(name, taken, 1)), None)


class _Signature:
    """That of `__init__`: what a `__new__` before it takes is nobody's business."""

    def __get__(self, _: object, kind: type) -> inspect.Signature:
        of_self = inspect.signature(kind.__init__)
        return of_self.replace(parameters=[*of_self.parameters.values()][1:])


class Spelled:
    """A dataclass that answers an argument of another library's with its own."""

    __signature__: ClassVar[_Signature] = _Signature()

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        check_arguments(cls, kwargs)
        return object.__new__(cls)

"""The errors of training."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import peftlite as pl
from peftlite.io.files import locking
from peftlite.train import Trainer, checkpoints, given, losses
from peftlite.train.data import checks as data
from tests.errors.case import Case, attached, linears, two

IDS = torch.arange(8)
TEXTS = [{"input_ids": IDS, "labels": IDS} for _ in range(4)]
OTHERS = [{"input_ids": IDS + 1, "labels": IDS} for _ in range(4)]
NO_DATASET = "must be a dataset, with a length and examples by index, not "


def fitting(resume: Any = False, **options: Any) -> Callable[[Any, Path], Any]:
    """Training of a model, in the folder at the path where checkpoints matter."""

    def act(model: nn.Module, path: Path) -> Any:
        folder = path if path.exists() else None
        given = {"loss": losses.causal_lm, "train": TEXTS, "epochs": 1, "batch_size": 2, **options}
        return Trainer(model, **{"folder": folder, "lr": 1e-3, "progress": False, **given}).fit(
            str(path / resume) if isinstance(resume, str) else resume
        )

    return act


def run(path: Path, change: Callable[[Path], Any] = lambda newest: None, **options: Any) -> None:
    """A folder with checkpoints of a run; something happened to the newest."""
    path.mkdir()
    fitting(**options)(two(), path)
    change(sorted(path.glob("step-*"))[-1])


def losing(loss: Any) -> Callable[[Any, Path], Any]:
    return fitting(loss=loss)


def calling(loss: Any, *given: Any) -> Callable[[Any, Path], Any]:
    """A loss of a model that gives what it is given."""

    class Given(nn.Module):
        def forward(self, x: Any, *_: Any) -> Any:
            return x

    return lambda *_: loss(Given(), *given)


def raising(error: Exception) -> Callable[[Any, Any], Any]:
    def loss(*_: Any) -> Any:
        raise error

    return loss


def newer(newest: Path) -> None:
    """A checkpoint of a peftlite to come."""
    state = newest / f"{checkpoints.STATE}.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    (newest / checkpoints.MANIFEST).write_text(checkpoints._manifest(newest))


def flattened(newest: Path) -> None:
    """A checkpoint whose moments have another shape."""
    file = newest / f"{checkpoints.STATE}.safetensors"
    tensors = safetensors.torch.load_file(file)
    moments = {k: t.flatten() if "exp_avg" in k else t for k, t in tensors.items()}
    safetensors.torch.save_file(moments, file)
    (newest / checkpoints.MANIFEST).write_text(checkpoints._manifest(newest))


def other_method(method: pl.Method) -> nn.Module:
    model = two()
    pl.detach(model, "chat")
    pl.attach(model, method, "chat")
    return model


def other_base() -> nn.Module:
    model = two()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def frozen() -> nn.Module:
    model = two()
    pl.deltas(model)["chat"].requires_grad_(False)
    return model


def besides(model: nn.Module, path: Path) -> None:
    with locking(path) as ours:
        assert ours
        fitting()(model, path)


class Full:
    """A disk that is full once training begins."""

    def start(self, trainer: Any, history: Any) -> None:
        log: Any = sys._getframe(1).f_locals["self"]
        log._file.close()
        log._file = open("/dev/full", "a")

    def event(self, event: Any) -> None: ...

    def end(self, history: Any) -> None: ...


def merged() -> nn.Module:
    model = two()
    pl.merge(model, "sql")
    pl.use(model, None)
    return model


class Passes(IterableDataset[Any]):
    """A stream that gives something else at each pass, the last for good."""

    def __init__(self, *passes: Any) -> None:
        self.passes = [*passes]

    def __iter__(self) -> Any:
        return iter(self.passes.pop(0) if len(self.passes) > 1 else self.passes[0])


def streaming(*passes: Any) -> Callable[[Any, Path], Any]:
    return lambda *given: fitting(train=Passes(*passes), examples=4)(*given)


def patched(act: Callable[[Any, Path], Any]) -> Callable[[Any, Path], Any]:
    def few(model: Any, path: Path) -> Any:
        with mock.patch.object(given, "MOST", 3):
            return act(model, path)

    return few


def row(sound: int) -> dict[str, Any]:
    data.check_counts(sound=sound)
    return TEXTS[0]


X = torch.ones(2, 3)
CASES = [
    # the trainer's arguments
    Case(fitting(epochs=0), "epochs must be a whole number from 1 up, or 'auto', not 0"),
    Case(fitting(lr="high"), "lr must be finite and above 0, or 'auto', not 'high'"),
    Case(fitting(warmup=1.0), "warmup must be in [0, 1), not 1.0"),
    Case(fitting(schedule="step"), "schedule must be one of 'cosine', 'linear', 'constant', not "
         "'step'"),
    Case(fitting(loss=pl.losses.dpo), "loss must be a function, not the class dpo"),
    Case(fitting(loss="mse"), "loss must be a function, not 'mse'"),
    Case(fitting(loss=nn.CrossEntropyLoss()), "CrossEntropyLoss compares an output with labels, "
         "and a loss here is a function of (model, batch): give pl.losses.classification, or "
         "lambda model, batch: CrossEntropyLoss()(model(batch[0]), batch[1])"),
    Case(fitting(loss=nn.functional.l1_loss), "l1_loss compares an output with labels, and a loss "
         "here is a function of (model, batch): give lambda model, batch: l1_loss(model(batch[0]), "
         "batch[1])"),
    Case(fitting(probes={"old": 0.5}), "old must be a function, not 0.5"),
    Case(fitting(train=[]), "train has no examples"),
    Case(fitting(train=3), f"train {NO_DATASET}3"),
    Case(fitting(val=(X, X)), f"val {NO_DATASET}a tuple: torch.utils.data.TensorDataset(x, y) is "
         "one of tensors"),
    Case(fitting(train=DataLoader(TEXTS)), f"train {NO_DATASET}a DataLoader: give its dataset, its "
         "collate_fn as collate=, and num_workers="),
    Case(fitting(train={"train": TEXTS, "test": TEXTS}), f"train {NO_DATASET}a dict: give one of "
         "'train'; 'test'"),
    Case(fitting(train=[{"text": "a"}]), "train has rows of text, and no input_ids: pl.data.text "
         "reads these"),
    Case(fitting(val=[{"prompt": "a", "chosen": "b"}]), "val has rows of text, and no input_ids: "
         "to learn the chosen ones, pl.data.pairs([(r['prompt'], r['chosen']) for r in rows])"),
    Case(fitting(examples=4), "examples is for a stream: train has a length of its own"),
    # streams
    Case(fitting(train=iter(TEXTS)), "train is a list_iterator, which can be gone through only "
         "once: give a list of it, or an object whose __iter__ begins anew"),
    Case(fitting(train=Passes(TEXTS)), "train is a Passes without a length: say how many examples= "
         "make an epoch; the next one goes on from there"),
    Case(fitting(val=Passes([])), "val has no examples"),
    Case(streaming(TEXTS, TEXTS, OTHERS), "train begins otherwise each time that it is gone "
         "through, so nothing could go on from a checkpoint: have its __iter__ open what it reads "
         "and make its generators, or draw from the global ones, which follow from seed"),
    Case(streaming(TEXTS, TEXTS, TEXTS, []), "pass 1 through a Passes gave "
         "no rows: its __iter__ has to begin anew each time"),
    Case(patched(fitting(val=Passes(TEXTS))), "val is held while it lasts, and has more than 3 "
         "examples: give a part"),
    Case(fitting(train=pl.data.Stream(Passes([1, 0]), row), examples=2, num_workers=1), "row 1: …"),
    Case(fitting(patience=1), "patience goes by full_valid_loss: give val=, or another metric="),
    Case(fitting(metric="skill"), "no metric is called 'skill'; there are step; total_steps; …"),
    Case(fitting(), "to train one, it has to be chosen and trainable; chosen are 'chat' of 'sql'; "
         "'chat': pl.use(model, name), and pl.deltas(model)[name].requires_grad_()", model=frozen),
    Case(fitting(delta="sql"), "to train 'sql', it has to be chosen and trainable; chosen are none "
         "of 'sql'; 'chat': pl.unmerge(model, name), for 'sql' is merged; pl.use(model, name), and "
         "pl.deltas(model)[name].requires_grad_()", model=merged),
    Case(fitting(delta="sql"), "to train 'sql', it has to be chosen and trainable; chosen are "
         "'chat' of 'sql'; 'chat': …"),
    Case(fitting(probes={"old": lambda _: torch.ones(2)}),
         "probe 'old' is to give a number, not …"),
    Case(fitting(gradient_checkpointing=True), "gradient_checkpointing goes by the blocks of an "
         "nn.ModuleList, and this model has none: use torch.utils.checkpoint in its forward",
         model=attached(linears(), pl.LoRA(rank=1))),
    # losses
    Case(losing(lambda *_: 3.0), "a loss is a function of (model, batch) that gives a tensor of "
         "one number, or a dict with it as 'loss': not 3.0"),
    Case(losing(lambda model, batch: model(batch["input_ids"]).detach().mean()), "the loss doesn't "
         "go back to 'chat': see that nothing between is under torch.no_grad, detached, or of a "
         "model without it"),
    Case(calling(losses.regression, (X, X[0])), "regression compares outputs of shape (2, 3) with "
         "labels of shape (3,): make them alike"),
    Case(calling(losses.classification, (X, IDS)), "logits of shape (2, 3) are for labels of shape "
         "(2,), not (8,)"),
    Case(calling(partial(losses.distillation, teacher=nn.Linear(3, 4)), (X, X[:, 0].long())),
         "the model gives logits of shape (2, 3), and its teacher (2, 4): both need the same "
         "vocabulary"),
    Case(calling(losses.contrastive, X), "contrastive takes batches (queries, keys), not a Tensor"),
    Case(calling(losses.contrastive, (X[0], X[0])), "contrastive needs a vector for each example, "
         "not tensor([1., 1., 1.])"),
    Case(calling(losses.classification, {"input_ids": X}), "a batch is a mapping with 'labels', or "
         "a tuple that ends with them: not one with input_ids"),
    Case(calling(losses.classification, ({"x": X}, X)), "the model gives a dict, neither a tensor "
         "nor one with .logits: write the loss as a function of (model, batch)"),
    Case(fitting(train=[{**text, "id": 3} for text in TEXTS]), "the model takes no 'id', which the "
         "batch has as tensor([3, 3]): leave it out of the examples, or write the loss as a "
         "function of (model, batch)"),
    Case(lambda model, _: losses.causal_lm(model, {"input_ids": IDS + 999, "labels": IDS}),
         "the model has no embedding for some of the input_ids, which go up to …, or for some of "
         "… places: give data the model's own tokenizer, and a max_length"),
    # what goes wrong on the way
    Case(losing(lambda model, batch: model(batch["input_ids"]).mean() * float("nan")),
         "at step 1 the loss is nan and the norm of its gradients nan: 'chat' stays as after step "
         "0. Look at that batch, or lower lr_multiplier"),
    Case(losing(raising(torch.OutOfMemoryError("CUDA"))), "out of memory with 2 examples at a "
         "time: try accumulate=2, for the same result, or gradient_checkpointing=True, or "
         "autocast='bf16'"),
    Case(fitting(loss=raising(MemoryError()), accumulate=2, autocast="bf16",
                 gradient_checkpointing=True),
         "out of memory with 1 examples at a time: try shorter examples"),
    # checkpoints
    Case(besides, "another Trainer is at work in '…': wait for it, or give another folder",
         pl.FileError, file=Path.mkdir),
    Case(fitting(callbacks=[Full()]), "can't write '…events.jsonl': No space left on device",
         pl.FileError, file=Path.mkdir),
    Case(fitting(resume=True, train=OTHERS), "the checkpoint's run had another batch at step 2 "
         "than the data gives now: go on with the data it was begun with (what is drawn there has "
         "to come from the global generators, which follow from seed), or begin anew in another "
         "folder", pl.FileError, file=run),
    Case(fitting(resume=True), "resume goes by checkpoints: give the Trainer a folder"),
    Case(fitting(), "'…' has checkpoints already: fit(resume=True) goes on from them; to begin "
         "anew, give another folder", pl.FileError, file=run),
    Case(fitting(True, epochs=2), "checkpoint '…' is of a run with other settings, epochs=1, not "
         "2; steps=2, not 4: go on with those, or begin anew in another folder", pl.FileError,
         file=run),
    Case(fitting("step-00000002-epoch-1"), "checkpoint '…' is not whole: its files aren't what was "
         "written", pl.FileError,
         file=lambda path: run(path, lambda last: (last / "chat.safetensors").write_bytes(b""))),
    Case(fitting("step-7"), "checkpoint '…' is not whole: it has no manifest.json", pl.FileError,
         file=run),
    Case(fitting(True, optimizer=torch.optim.SGD), "the checkpoint is of a run with AdamW, and the "
         "optimizer here is SGD", pl.FileError, file=run),
    Case(fitting(True), "checkpoint '…' is of a run with other methods, alpha=None, not 4.0: go on "
         "with those, or begin anew in another folder", pl.FileError, file=run,
         model=lambda: other_method(pl.LoRA(rank=2, alpha=4, targets=["q_proj", "v_proj"]))),
    Case(fitting(True), "checkpoint '…' is of a run with other methods, LoRA, not VeRA: …",
         pl.FileError, file=run, model=lambda: other_method(pl.VeRA(targets="q_proj"))),
    Case(fitting(True), "checkpoint '…' is of a run with other methods, LoRA at other sites: …",
         pl.FileError, file=run, model=lambda: other_method(pl.LoRA(rank=2, targets="q_proj"))),
    Case(fitting(True, optimizer=partial(torch.optim.AdamW, fused=True, eps=1e-4)), "the "
         "checkpoint's optimizer has eps of group 0 1e-08, not 0.0001; …: go on with that",
         pl.FileError, file=run),
    Case(fitting(True), "the checkpoint's optimizer has state for 8 parameters, and here are 8; of "
         "another name or shape is chat:blocks.0.attn.q_proj.weight:a; …: train what …",
         pl.FileError, file=lambda path: run(path, flattened)),
    Case(fitting(True), "none of the checkpoints in '…' is whole: to begin anew, give another "
         "folder", pl.FileError,
         file=lambda path: run(path, lambda last: (last / checkpoints.MANIFEST).write_text(""))),
    Case(fitting(True), "checkpoint '…' is of a newer peftlite: upgrade peftlite", pl.FileError,
         file=lambda path: run(path, newer)),
    Case(fitting(True), "checkpoint '…' is of 'chat'; in training here is 'sql': attach what was "
         "attached then", pl.FileError, file=run,
         model=attached(linears(), pl.LoRA(rank=1))),
    Case(fitting(True), "checkpoint '…' was made on other base weights: go on with the model it "
         "was begun with", pl.BaseMismatchError, file=run, model=other_base),
]  # fmt: skip

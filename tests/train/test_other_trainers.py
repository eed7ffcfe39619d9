"""Other people's training loops need nothing special: each learns the very delta that ours does."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

import peftlite as pl
from tests.digest import assert_same, digest
from tests.train.chats import hf_tokenizer, llama, rows
from tests.train.tiny import values

RATE, BATCH, EPOCHS = 1e-2, 4, 4


@cache
def chats() -> pl.data.Data:
    """Real chats, of which the assistant's part is learned: in no two as many tokens."""
    return pl.data.chat(rows()[:20], hf_tokenizer(pl.data.CHATML), max_length=96)


def loader() -> DataLoader:
    return DataLoader(chats(), BATCH, collate_fn=pl.data.collate)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(pl.deltas(model)["sql"].parameters(), RATE, weight_decay=0.0)


def peftlites(model: nn.Module, folder: Path) -> None:
    pl.Trainer(
        model, pl.losses.causal_lm, chats(), epochs=EPOCHS, batch_size=BATCH, lr=RATE, warmup=0.0,
        weight_decay=0.0, schedule="constant", clip=1.0, shuffle=False, progress=False,
    ).fit()  # fmt: skip


def transformers(model: nn.Module, folder: Path, parts: int = 2, **options: Any) -> None:
    """In parts, whose losses it weighs by their tokens, as ours does."""
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> SequentialSampler:
            return SequentialSampler(chats())

    arguments = TrainingArguments(
        str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH // parts,
        gradient_accumulation_steps=parts, learning_rate=RATE, lr_scheduler_type="constant",
        max_grad_norm=1.0, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", save_strategy="epoch",
    )  # fmt: skip
    trainer = InOrder(model, arguments, train_dataset=chats(), data_collator=pl.data.collate)
    trainer.train(**options)


def accelerate(model: nn.Module, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(model, adamw(model), loader())
    for _ in range(EPOCHS):
        for batch in batches:
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def lightning(model: nn.Module, folder: Path) -> None:
    from pytorch_lightning import LightningModule, Trainer

    class Learner(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.model)

    trainer = Trainer(
        accelerator="cpu", max_epochs=EPOCHS, gradient_clip_val=1.0, default_root_dir=folder,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Learner(), loader())


def attached(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    pl.attach(model, [pl.LoRA(rank=4), pl.FullTuning(targets="lm_head")], "sql")
    return model.train()


@torch.no_grad()
def shown(model: nn.Module) -> Any:
    """What a model says of some of the chats: their loss, and logits."""
    return model.eval()(**pl.data.collate(chats()[:8]))


@cache
def ours() -> dict[str, Tensor]:
    model = attached(llama())
    peftlites(model, Path())
    return values(model)


def assert_ours(model: nn.Module) -> None:
    for key, value in values(model).items():
        torch.testing.assert_close(value, ours()[key], rtol=1e-4, atol=1e-5)


def base(model: nn.Module) -> dict[str, Any]:
    """All of it but the plain attributes, of which these libraries leave some."""
    return {key: value for key, value in digest(model).items() if not key.endswith(": attributes")}


@pytest.mark.heavy
@pytest.mark.parametrize("loop", [peftlites, transformers, accelerate, lightning])
# pytorch-lightning 2.6 on torch 2.13
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning")
def test_every_loop_learns_the_same_delta(loop: Callable[..., None], tmp_path: Path) -> None:
    model = llama()
    fresh, before = base(model), shown(model).loss
    loop(attached(model), tmp_path)
    assert_ours(model)
    tuned = shown(model)
    assert tuned.loss < before - 1
    pl.save(pl.deltas(model)["sql"], tmp_path / "sql.safetensors")
    pl.detach(model, "sql")
    assert_same(base(model), fresh)
    pl.load(model, tmp_path / "sql.safetensors")
    assert torch.equal(shown(model).logits, tuned.logits)


@pytest.mark.heavy
def test_transformers_trainer_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    transformers(attached(llama()), tmp_path)
    again = attached(llama())
    transformers(again, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert_ours(again)

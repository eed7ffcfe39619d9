"""Ready-made losses: functions of a model and a batch.

A loss gives a tensor, the mean over the batch's examples, or a dict of scalars:

    loss      the mean that is minimised, in nats if the loss is a cross-entropy
    count     what the mean is over (tokens, for one); the examples of the batch if left out
    correct   how many of these were predicted right, if the loss is a cross-entropy
    …         any other mean over the same, to be reported

Those below compute in fp32 where a model gives less.

The gradients of a step are those of its whole mean, Σ countₖ·lossₖ / Σ countₖ, however many
micro-batches it comes in. Options go by `functools.partial(pl.losses.contrastive, scale=10)`.

A batch is a mapping with `labels`, or a tuple that ends with the labels; the model is called with
the rest. Its output is a tensor, or has `.logits`, or is a tuple that begins with the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.tensors import wide
from peftlite.errors import PeftliteError
from peftlite.table import short
from peftlite.train.data.packing import IGNORED
from peftlite.train.modes import evaluating
from peftlite.train.outputs import logits_of, run_model, split_labels
from peftlite.train.preference.losses import cpo, dpo, grpo, kto, orpo, ppo, reward, rloo
from peftlite.train.preference.moving import moving
from peftlite.verbs.use import using

__all__ = [
    "causal_lm", "classification", "contrastive", "cpo", "distillation", "dpo", "grpo", "kto",
    "moving", "orpo", "ppo", "regression", "reward", "rloo",
]  # fmt: skip


def causal_lm(model: nn.Module, batch: Any, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    """−log p(token | the tokens before it), the mean over the labelled tokens.

    A model whose `forward` takes no `attention_mask` does without a mask of padding, (b, t): on the
    right, where no token looks at it.

    Args:
        model: from `input_ids` (b, t) to logits (b, t, o), of a vocabulary of o.
        batch: its `labels` (b, t) are aligned with `input_ids` and shifted here; −100 has no loss.
        label_smoothing: the share of the target that all tokens have alike.

    Raises:
        PeftliteError: the batch has no labels, the logits don't fit them, or the model has no
            embedding for some ids.

    Example:
        model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        ids = torch.tensor([[1, 2, 3, 4]])
        pl.losses.causal_lm(model, {"input_ids": ids, "labels": ids})["loss"].backward()
    """
    inputs, labels = split_labels(batch)
    logits = logits_of(model, inputs)
    return _cross_entropy(logits[:, :-1], labels[:, 1:], label_smoothing)


def classification(
    model: nn.Module, batch: Any, *, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """−log p(label), the mean over the labels that aren't −100.

    Args:
        model: gives logits (…, o), of o classes.
        batch: its labels are (…).
        weight: of each class (o), against imbalance; the mean is then a weighted one.
        label_smoothing: the share of the target that all classes have alike.

    Raises:
        PeftliteError: the batch has no labels, or the logits don't fit them.

    Example:
        x, labels = torch.randn(6, 4), torch.tensor([0, 0, 0, 0, 1, 2])
        weight = pl.data.class_weights(labels)
        pl.losses.classification(nn.Linear(4, 3), (x, labels), weight=weight)["loss"].backward()
    """
    inputs, labels = split_labels(batch)
    return _cross_entropy(logits_of(model, inputs), labels, label_smoothing, weight)


def regression(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """(output − labels)², the mean over examples and outputs.

    Args:
        model: gives outputs (…), of the labels' shape; (b, 1) serve labels (b), too.

    Raises:
        PeftliteError: the batch has no labels, or they have another shape.

    Example:
        batch = torch.randn(6, 4), torch.randn(6)
        pl.losses.regression(nn.Linear(4, 1), batch)["loss"].backward()
    """
    inputs, labels = split_labels(batch)
    output = logits_of(model, inputs)
    if output.dim() == labels.dim() + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    if output.shape != labels.shape:
        raise PeftliteError(
            f"regression compares outputs of shape {tuple(output.shape)} with labels of shape "
            f"{tuple(labels.shape)}: make them alike"
        )
    return {"loss": F.mse_loss(output.to(wide(output)), labels.to(wide(output)))}


def contrastive(model: nn.Module, batch: Any, *, scale: float = 20.0) -> dict[str, Tensor]:
    """−log softmaxⱼ(scale · cos(qᵢ, kⱼ)) at j = i: each query is to find its key in the batch.

    Other keys of the same micro-batch are the negatives, so here `accumulate` changes the loss. van
    den Oord et al., arXiv:1807.03748, eq. 4; the scale is of Sentence-BERT's implementation.

    Args:
        model: gives a vector for each example (b, o); outputs (b, t, o), or a `last_hidden_state`
            of that shape, are averaged over the tokens of the `attention_mask` (b, t).
        batch: a pair (queries, keys), each as the model takes it.
        scale: the inverse of the temperature.

    Raises:
        PeftliteError: the batch is no pair, or the outputs have other shapes.

    Example:
        queries, keys = torch.randn(6, 4), torch.randn(6, 4)
        pl.losses.contrastive(nn.Linear(4, 3), (queries, keys))["loss"].backward()
    """
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise PeftliteError(f"contrastive takes batches (queries, keys), not {short(batch)}")
    queries, keys = (F.normalize(_embedding(model, side), dim=-1) for side in batch)
    labels = torch.arange(len(queries), device=queries.device)
    return _cross_entropy(scale * queries @ keys.mT, labels)


def distillation(
    model: nn.Module,
    batch: Any,
    *,
    teacher: nn.Module | str | Sequence[str] | None,
    temperature: float = 2.0,
    share: float = 0.5,
    causal: bool = True,
) -> dict[str, Tensor]:
    """(1 − share) · cross-entropy + share · T² · KL(p_teacher ‖ p_model), both p at temperature T.

    Hinton et al., arXiv:1503.02531, §2.

    Args:
        model: gives logits (b, t, o), or (…, o) where they aren't `causal`.
        batch: its labels are (b, t), or (…); −100 has no loss.
        teacher: another model; or names of deltas of this very model, None for its base, which
            costs no memory for a second one. It runs in eval mode and gets no gradients.
        temperature: T, above 0.
        share: of the teacher; 1 leaves the labels out, but for which positions count.
        causal: whether logits predict the next token's label, or their own position's.

    Raises:
        PeftliteError: the batch has no labels, the logits don't fit them, or the teacher's logits
            have another shape.

    Example:
        model = nn.Linear(4, 3)
        pl.attach(model, pl.LoRA(rank=1, targets="weight"), name="small")
        batch = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        loss = pl.losses.distillation(model, batch, teacher=None, causal=False)
        print(loss["kl"])
    """
    inputs, labels = split_labels(batch)
    other = isinstance(teacher, nn.Module)
    choice: AbstractContextManager[Any] = nullcontext() if other else using(model, teacher)
    with torch.no_grad(), choice, evaluating(teacher if other else model) as teaching:
        targets = logits_of(teaching, inputs)
    logits = logits_of(model, inputs)
    if logits.shape != targets.shape:
        raise PeftliteError(
            f"the model gives logits of shape {tuple(logits.shape)}, and its teacher "
            f"{tuple(targets.shape)}: both need the same vocabulary"
        )
    if causal:
        logits, targets, labels = logits[:, :-1], targets[:, :-1], labels[:, 1:]
    result = _cross_entropy(logits, labels)
    log_p, log_q = (F.log_softmax(z.to(wide(z)) / temperature, -1) for z in (logits, targets))
    divergence = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    kl = (divergence * (labels != IGNORED)).sum() / result["count"].clamp(min=1)
    loss = (1 - share) * result["loss"] + share * temperature**2 * kl
    return {**result, "loss": loss, "kl": kl.detach()}


def _cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, weight: Tensor | None = None
) -> dict[str, Tensor]:
    if logits.shape[:-1] != labels.shape:
        raise PeftliteError(
            f"logits of shape {tuple(logits.shape)} are for labels of shape "
            f"{tuple(logits.shape[:-1])}, not {tuple(labels.shape)}"
        )
    logits = logits.to(wide(logits))
    weight = None if weight is None else weight.to(logits)
    total = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), weight,
        ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing,
    )  # fmt: skip
    with torch.no_grad():
        has_loss = labels != IGNORED
        target = labels.where(has_loss, 0)
        # the largest is quicker to find than where it is
        right = logits.gather(-1, target[..., None])[..., 0] >= logits.amax(-1)
        weights = has_loss if weight is None else weight[target] * has_loss
        count, correct = weights.sum(), (right * weights).sum()
    return {"loss": total / count.clamp(min=1e-12), "count": count, "correct": correct}


def _embedding(model: nn.Module, inputs: Any) -> Tensor:
    """One vector for each example (b, o)."""
    output = run_model(model, inputs)
    h = getattr(output, "last_hidden_state", output)
    if not isinstance(h, Tensor) or h.dim() not in (2, 3):
        raise PeftliteError(f"contrastive needs a vector for each example, not {short(output)}")
    h = h.to(wide(h))
    if h.dim() == 2:
        return h
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    kept = h.new_ones(h.shape[:2]) if mask is None else mask.to(h)
    return (h * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)

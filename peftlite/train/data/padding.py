"""Padding: examples of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from peftlite.errors import PeftliteError
from peftlite.fields import check_given
from peftlite.table import short
from peftlite.train.data.checks import check_counts
from peftlite.train.data.packing import IGNORED, block_mask
from peftlite.train.data.rated import SIDES

Side = Literal["right", "left"]


def collate(
    examples: Sequence[Any],
    *,
    pad: int = 0,
    side: Side = "right",
    multiple: int = 1,
    mask: bool = True,
) -> Any:
    """A batch (b, t) of examples (t), padded to the longest: all tensors as long as `input_ids`.

    An `attention_mask` (b, t) is added, 1 for a token and 0 for padding; for packed blocks, which
    have `position_ids`, that of `block_mask`. Of pairs of answers, as `preference` has them, it is
    a batch (2·b, t): all that were chosen, then those that were rejected. Without `input_ids`
    torch's `default_collate` serves.

    Args:
        pad: the id to fill up with; labels are filled up with −100, all else with 0. Some models go
            by their own id, as transformers' classifiers of sequences do to find the last token.
        side: which end is filled up.
        multiple: of tokens, to which the length is rounded up.
        mask: False leaves the mask of packed blocks out, for a model that goes by `position_ids`
            alone, as transformers' do under flash attention (with no cache: `use_cache=False`).

    Raises:
        PeftliteError: an argument isn't of these, or the examples don't fit together.

    Example:
        examples = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (3, 5)]
        assert pl.data.collate(examples)["attention_mask"].tolist()[0] == [1, 1, 1, 0, 0]
    """
    check_given("side", side, get_args(Side))
    check_counts(multiple=multiple)
    if isinstance(examples[0], Mapping) and {*SIDES} <= examples[0].keys():
        rows = [example[answer] for answer in SIDES for example in examples]
        batch = collate(rows, pad=pad, side=side, multiple=multiple, mask=mask)
        return {**batch, "margin": torch.stack([example["margin"] for example in examples])}
    if not isinstance(examples[0], Mapping) or "input_ids" not in examples[0]:
        return _as_they_are(examples)
    _check_fields(examples)
    packed = "position_ids" in examples[0]
    if not packed:
        examples = [{"attention_mask": [1] * len(e["input_ids"]), **e} for e in examples]
    longest = max(len(example["input_ids"]) for example in examples)
    length = -(-longest // multiple) * multiple
    fills = {"input_ids": pad, "labels": IGNORED}

    def padded(example: Mapping[str, Any], key: str) -> Tensor:
        x, missing = torch.as_tensor(example[key]), length - len(example["input_ids"])
        if x.shape[:1] != (length - missing,):
            return x
        ends = (missing, 0) if side == "left" else (0, missing)
        return F.pad(x, (*[0, 0] * (x.dim() - 1), *ends), value=fills.get(key, 0))

    batch = {key: _stacked(key, examples, padded) for key in examples[0]}
    if packed and mask:
        batch["attention_mask"] = block_mask(batch["position_ids"])
    return batch


def _stacked(
    key: str, examples: Sequence[Any], padded: Callable[[Mapping[str, Any], str], Tensor]
) -> Tensor:
    """A field of all examples. Raises PeftliteError where it isn't one of numbers."""
    try:
        return torch.stack([padded(example, key) for example in examples])
    except (RuntimeError, TypeError, ValueError) as error:
        raise PeftliteError(
            f"{key!r} is {short(examples[0][key])} in the first example of a batch, and such can't "
            "be put together as numbers of one shape: leave it out of the examples, or give a "
            "collate"
        ) from error


def _as_they_are(examples: Sequence[Any]) -> Any:
    """By torch's collate. Raises PeftliteError where that can't."""
    try:
        return default_collate(list(examples))
    except (RuntimeError, TypeError, KeyError) as error:
        raise PeftliteError(
            f"what has no input_ids is stacked as it is, and here {error}: give a collate"
        ) from error


def _check_fields(examples: Sequence[Any]) -> None:
    """Raises PeftliteError unless all have the same fields."""
    if odd := next((e for e in examples if e.keys() != examples[0].keys()), None):
        raise PeftliteError(
            f"the examples of a batch have the same fields, not {', '.join(examples[0])} and "
            f"{', '.join(odd)}"
        )

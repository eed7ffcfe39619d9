"""Given: a trainer's data, looked at before training; and digests, to know it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from peftlite.errors import PeftliteError
from peftlite.io.fingerprint import fingerprint
from peftlite.table import listed, short
from peftlite.train import data
from peftlite.train.data import rows
from peftlite.train.data.stream import check_restarts, is_indexed, is_stream
from peftlite.train.loader import Collate
from peftlite.train.state import seeded

MOST = 2**17  # examples of a stream to validate on: they are held


def check_dataset(name: str, dataset: Any, collate: Collate) -> None:
    """Raises PeftliteError unless it has examples by index or in an order, and they can be used."""
    columns = isinstance(dataset, tuple) and all(isinstance(column, Tensor) for column in dataset)
    if isinstance(dataset, Mapping) and not any(isinstance(x, Tensor) for x in dataset.values()):
        advice = f": give one of {listed(map(repr, dataset))}"
    elif isinstance(dataset, Mapping | str | Tensor) or columns:
        advice = ": torch.utils.data.TensorDataset(x, y) is one of tensors"
    elif isinstance(dataset, DataLoader):
        advice = ": give its dataset, its collate_fn as collate=, and num_workers="
    elif is_stream(dataset):
        _check_first(name, _first_of_stream(name, dataset), collate)
        return
    elif is_indexed(dataset):
        if not len(dataset):
            raise PeftliteError(f"{name} has no examples")
        with seeded(0):
            _check_first(name, dataset[0], collate)
        return
    else:
        advice = ""
    raise PeftliteError(
        f"{name} must be a dataset, with a length and examples by index, not "
        f"{short(dataset)}{advice}"
    )


def _first_of_stream(name: str, stream: Any) -> Any:
    """Its first example. Raises PeftliteError if it has none, or another one each time."""
    check_restarts(name, stream)
    firsts = []
    for _ in range(2):
        with seeded(0):
            firsts += islice(stream, 1)
    if not firsts:
        raise PeftliteError(f"{name} has no examples")
    if len(firsts) == 1 or digest(firsts[0]) != digest(firsts[1]):
        raise PeftliteError(
            f"{name} begins otherwise each time that it is gone through, so nothing could go on "
            "from a checkpoint: have its __iter__ open what it reads and make its generators, or "
            "draw from the global ones, which follow from seed"
        )
    return firsts[0]


def _check_first(name: str, example: Any, collate: Collate) -> None:
    """Raises PeftliteError for an example that `pl.data.collate` has no batches of."""
    if (collate.func if isinstance(collate, partial) else collate) is not data.collate:
        return
    if isinstance(example, Mapping) and not any(isinstance(x, Tensor) for x in example.values()):
        if "input_ids" not in example and (reads := rows.advice(example)):
            raise PeftliteError(f"{name} has rows of text, and no input_ids: {reads}")
    collate([example])


def check_length(dataset: Any, examples: int | None) -> int:
    """The examples of an epoch. Raises PeftliteError unless they are known in exactly one way."""
    has_length = hasattr(dataset, "__len__")
    if examples is None and not has_length:
        raise PeftliteError(
            f"train is {short(dataset)} without a length: say how many examples= make an epoch; "
            "the next one goes on from there"
        )
    if examples is not None and not is_stream(dataset):
        raise PeftliteError("examples is for a stream: train has a length of its own")
    return len(dataset) if examples is None else examples


def held(name: str, dataset: Any) -> Sequence[Any]:
    """Data by index: a stream's examples, read to its end. Raises PeftliteError for too many."""
    if not is_stream(dataset):
        return dataset
    with seeded(0):
        examples = [*islice(dataset, MOST + 1)]
    if len(examples) > MOST:
        raise PeftliteError(
            f"{name} is held while it lasts, and has more than {MOST:,} examples: give a part"
        )
    return examples


def digest(tree: Any) -> str:
    """What an example or a batch is, by its tensors, arrays, texts and numbers: 16 hex digits."""
    plain = pytree.tree_map(lambda leaf: dict(leaf) if isinstance(leaf, Mapping) else leaf, tree)
    said = blake2b(digest_size=8)
    for path, leaf in pytree.tree_flatten_with_path(plain)[0]:
        said.update(f"{pytree.keystr(path)} {_told(leaf)}\n".encode(errors="replace"))
    return said.hexdigest()


def _told(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return str(fingerprint(leaf, "sha256"))
    if isinstance(leaf, np.ndarray):
        return f"{leaf.dtype} {leaf.shape} {blake2b(leaf.tobytes(), digest_size=8).hexdigest()}"
    known = isinstance(leaf, str | bytes | int | float | None)
    return repr(leaf) if known else type(leaf).__name__

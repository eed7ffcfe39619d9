"""Ops: functions that compiled code calls as they are, and doesn't look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("peftlite", "FRAGMENT")


def op(schema: str, fake: Callable[..., Any]) -> Callable[[Callable], Callable]:
    """Makes a function `torch.ops.peftlite.<name>`; `fake` gives what it gives, without values.

    Such an op costs a third of one by `torch.library.custom_op`.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"peftlite::{name}", fake, lib=_library)
    return torch.library.impl(_library, name, "CompositeExplicitAutograd")

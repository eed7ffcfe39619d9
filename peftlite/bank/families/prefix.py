"""MixedPrefix: every row's own keys and values in front of an attention's, of any number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftlite.bank.arena import Field
from peftlite.bank.families.gather import per_row
from peftlite.bank.families.mixed import Contents, Mixed
from peftlite.bank.rows import Rows, Tables
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.methods.attention import Prepend
from peftlite.methods.prefix import PrefixPatch


class MixedPrefix(Mixed):
    """`prefix` (2, h, n, d), of which `used` virtual tokens are there; the others are masked."""

    learned: ClassVar[tuple[str, ...]] = ("prefix",)
    trained: ClassVar[tuple[type[Patch], ...]] = (PrefixPatch,)

    def __init__(self, site: Site, patch: Any, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.shape: tuple[Any, ...] = tuple(patch.prefix.shape)

    def fields(self) -> dict[str, Field]:
        return {"prefix": Field(self.shape, self.dtype, used=2), "used": Field((), torch.int64)}

    def encode(self, patches: Sequence[Any]) -> Contents:
        prefix = patches[0].current()
        room, (n, (_, h, most, d)) = prefix.shape, (prefix.shape[2], self.shape)
        if room != (2, h, n, d) or n > most:
            what = f"a prefix {tuple(room)} doesn't fit"
            raise self.too_large(what, self.shape, "prefix_length")
        return {"prefix": prefix, "used": n}

    def trains(self, patches: Sequence[Any]) -> bool:
        return super().trains(patches) and patches[0].trunk is None

    def used(self, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"prefix": contents["prefix"][:, :, : int(contents["used"])]}

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        prefix, used = per_row(tables["prefix"], rows), per_row(tables["used"], rows)
        hidden = torch.arange(self.shape[2], device=used.device) >= used[:, None]
        mode = Prepend(prefix.transpose(0, 1), self.address, hidden)
        return self.template.attend(mode, inner, *args, **kwargs)

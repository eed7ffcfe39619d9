"""P-tuning: virtual tokens whose embeddings a small network gives, rather than free ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from peftlite.core.site import Site
from peftlite.fields import integer, one_of
from peftlite.methods.prompt import PromptMethod, PromptPatch

Encoder = Literal["mlp", "lstm"]


class EncodedPromptPatch(PromptPatch):
    """The prompt is MLP(E) or MLP(LSTM(E)), of E (n, d) as `rows`; of a file's rows, those alone.

    `cells` are the LSTM's, for each layer that of either direction: torch's own can't be compiled.
    """

    cells: nn.ModuleList
    maps: nn.ModuleList

    def __init__(self, method: PTuning, embedding: Site):
        super().__init__(method, embedding)
        d, lstm = self.rows.shape[1], method.encoder == "lstm"
        h = method.hidden_size or (max(1, d // 2) if lstm else d)
        cells = [(d, h), (d, h), (2 * h, h), (2 * h, h)] if lstm else []
        maps = pairwise((2 * h, 2 * h, d) if lstm else (d, h, h, d))

        def new(kind: type[nn.Module], shape: tuple[int, int]) -> Any:
            return skip_init(kind, *shape, device=self.rows.device, dtype=self.rows.dtype)

        self.cells = nn.ModuleList(new(nn.LSTMCell, shape) for shape in cells)
        self.maps = nn.ModuleList(new(nn.Linear, shape) for shape in maps)

    def prompt(self) -> Tensor:
        x, cells = self.rows, list(self.cells)
        for there, back in zip(cells[::2], cells[1::2], strict=True):
            x = torch.cat([_read(there, x), _read(back, x.flip(0)).flip(0)], 1)
        for i, linear in enumerate(self.maps):
            x = linear(x.relu() if i else x)
        return x

    def reset(self, w: Tensor | None) -> None:
        self.rows.normal_()
        modules: Any = (*self.cells, *self.maps)
        for module in modules:
            module.reset_parameters()

    def saved(self) -> dict[str, Tensor]:
        return {"rows": self.prompt()}

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.cells, self.maps = nn.ModuleList(), nn.ModuleList()


def _read(cell: nn.LSTMCell, x: Tensor) -> Tensor:
    """The states (n, h) of an LSTM's cell over tokens x (n, d)."""
    state, states = None, []
    for token in x.unbind():
        state = cell(token, state)
        states.append(state[0])
    return torch.stack(states)


@dataclass(frozen=True)
class PTuning(PromptMethod):
    """X' = [P; X] with P = MLP(E) or MLP(LSTM(E)): as `PromptTuning`, the rows from a network.

    Liu et al., arXiv:2103.10385, §3.2: a small network over embeddings E (n, d) of its own makes
    the rows depend on one another. A file holds the rows alone, and a delta loaded from one goes
    on learning those.

    Args:
        prompt_length: n, the number of virtual tokens.
        encoder: "mlp", three linear maps with ReLU between them, as is common; "lstm", the paper's:
            two bidirectional layers, then two linear maps.
        hidden_size: h, of the maps, and of the LSTM in each direction. Default: d for "mlp", d/2
            for "lstm".
        fill, cut: as in `PromptTuning`.
    """

    encoder: Encoder = one_of("mlp", Encoder)
    hidden_size: int | None = integer(None)

    patch: ClassVar[type[EncodedPromptPatch]] = EncodedPromptPatch

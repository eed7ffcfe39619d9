"""P-tuning: virtual tokens whose embeddings a small network gives, rather than free ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.methods.prompt import Prompt, PromptMethod
from peftlite.patch import check_choice, set_number, trainable
from peftlite.site import Site

Encoder = Literal["mlp", "lstm"]


class PromptEncoder(nn.Module):
    """MLP(E), or MLP(LSTM(E)) with a bidirectional LSTM, of n embeddings E (n, d) of its own."""

    def __init__(self, method: PTuning, site: Site, n: int, d: int):
        super().__init__()

        def new(*shapes: tuple[int, ...]) -> nn.ParameterList:
            return nn.ParameterList(trainable(*s, site=site, dtype=method.dtype) for s in shapes)

        h = self.h = method.hidden_size or (d if method.encoder == "mlp" else max(1, d // 2))
        widths, gates = (d, h, h, d), []
        if method.encoder == "lstm":
            widths = (2 * h, 2 * h, d)
            for i in (d, d, 2 * h, 2 * h):  # a layer, and the same in the other direction
                gates += [(4 * h, i), (4 * h, h), (4 * h,), (4 * h,)]
        self.tokens = trainable(n, d, site=site, dtype=method.dtype)
        self.lstm = new(*gates)
        self.weights = new(*((o, i) for i, o in pairwise(widths)))
        self.biases = new(*((o,) for o in widths[1:]))

    def forward(self) -> Tensor:
        x, gates = self.tokens, list(self.lstm)
        for k in range(0, len(gates), 8):
            there, back = (
                self._read(x, gates[k : k + 4]),
                self._read(x.flip(0), gates[k + 4 : k + 8]),
            )
            x = torch.cat([there, back.flip(0)], 1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.linear(x.relu() if i else x, weight, bias)
        return x

    def _read(self, x: Tensor, gates: list[Tensor]) -> Tensor:
        """The states (n, h) of an LSTM. torch's own can't be compiled, and rounds by the mode."""
        state = x.new_zeros(1, self.h), x.new_zeros(1, self.h)
        states = []
        for token in x.split(1):
            state = torch.lstm_cell(token, state, *gates)
            states.append(state[0])
        return torch.cat(states)

    def reset(self) -> None:
        """As torch begins an nn.Embedding, an nn.LSTM and an nn.Linear."""
        nn.init.normal_(self.tokens)
        for gate in self.lstm:
            nn.init.uniform_(gate, -(self.h**-0.5), self.h**-0.5)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            for tensor in (weight, bias):
                nn.init.uniform_(tensor, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)


class EncodedPrompt(Prompt):
    """The embeddings (n, d) of the virtual tokens, as an encoder gives them."""

    def __init__(self, method: PTuning, embedding: Site):
        super().__init__(method, embedding)
        rows = self.rows.data
        del self.rows
        self.register_buffer("rows", rows)
        self.encoder: PromptEncoder | None = PromptEncoder(method, embedding, *rows.shape)

    def forward(self) -> Tensor:
        return self.rows if self.encoder is None else self.encoder()

    def reset(self) -> None:
        if self.encoder is not None:
            self.encoder.reset()

    def settle(self) -> None:
        # a file has the rows alone
        if self.encoder is not None:
            self.encoder = None
            self.rows = nn.Parameter(self.rows)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.encoder is not None:
            with torch.no_grad():
                self.rows.copy_(self.encoder())
        super()._save_to_state_dict(*args, **kwargs)


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

    encoder: Encoder = "mlp"
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size is not None:
            set_number(self, "hidden_size", int, lambda n: n >= 1, "a whole number from 1 up")
        check_choice(self, "encoder", get_args(Encoder))

    def prompt(self, embedding: Site) -> EncodedPrompt:
        return EncodedPrompt(self, embedding)

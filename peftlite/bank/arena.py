"""Arena: the fixed memory of a bank, in which a whole delta is one contiguous row.

    slot 0   | a, b, scale | a, b, scale | …     the base: values that change nothing
    slot 1   | a, b, scale | a, b, scale | …     a delta
              layers.0.q    layers.0.v

A site's tensors are views of all slots at once, so a delta comes in by one copy and nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGN = 64  # bytes: a cache line, and what the widest loads of any device ask for

Row = tuple[Tensor, ...]
"""One delta's bytes on the host, one tensor for each device that the model is on."""


@dataclass(frozen=True)
class Field:
    """A tensor that every slot has at a site; `neutral` is its value where it changes nothing.

    Of dimension `used` a smaller delta has the first entries alone. It is the outermost in memory,
    so that these are one stretch, as torch's fused optimizers take for granted.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    neutral: float = 0.0
    used: int = 0

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Arena:
    """Memory for `slots` deltas and the base, for sites that each have fields on a device."""

    fills: list[int]

    def __init__(self, sites: Iterable[tuple[torch.device, Mapping[str, Field]]], slots: int):
        self.devices: list[torch.device] = []
        ends: list[int] = []
        self._places: list[tuple[int, dict[str, tuple[int, Field]]]] = []
        for device, fields in sites:
            if device not in self.devices:
                self.devices.append(device)
                ends.append(0)
            part, places = self.devices.index(device), {}
            for name, field in fields.items():
                places[name] = (ends[part], field)
                ends[part] += -(-field.num_bytes // ALIGN) * ALIGN
            self._places.append((part, places))
        self.neutral: Row = tuple(torch.zeros(end, dtype=torch.uint8, device="cpu") for end in ends)
        for site in range(len(self._places)):
            for name, tensor in self.fields(self.neutral, site).items():
                tensor.fill_(self._places[site][1][name][1].neutral)
        self.fills = [0] * (slots + 1)
        """How often each slot was filled: what was read off it holds until the next time."""
        parts = zip(self.neutral, self.devices, strict=True)
        self._live_in([row.to(device).repeat(slots + 1, 1) for row, device in parts])

    def _live_in(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        self.devices = [buffer.device for buffer in buffers]
        self.fills = [count + 1 for count in self.fills]
        cuda = [device for device in self.devices if device.type == "cuda"]
        self._streams = {device: torch.cuda.Stream(device) for device in cuda}
        self._readers: list[dict[int, torch.cuda.Event]] = [{} for _ in self.fills]

    @property
    def row_bytes(self) -> int:
        """The bytes of one delta."""
        return sum(len(row) for row in self.neutral)

    def tables(self, site: int) -> dict[str, Tensor]:
        """A site's tensors, each (slots + 1, *shape)."""
        return self.fields(self.buffers, site)

    def fields(self, buffers: Sequence[Tensor], site: int) -> dict[str, Tensor]:
        """A site's tensors in one row, each (*shape), or in several."""
        part, places = self._places[site]
        lead = buffers[part].shape[:-1]

        def view(start: int, field: Field) -> Tensor:
            own = buffers[part][..., start : start + field.num_bytes].view(field.dtype)
            if not field.used:
                return own.view((*lead, *field.shape))
            size, rest = field.shape[field.used], [*field.shape]
            del rest[field.used]
            return own.view((*lead, size, *rest)).movedim(len(lead), len(lead) + field.used)

        return {name: view(*place) for name, place in places.items()}

    def blank(self) -> Row:
        """A row of neutral values, in memory that a device can copy from by itself."""
        return tuple(
            torch.empty_like(row, pin_memory=device.type == "cuda").copy_(row)
            for row, device in zip(self.neutral, self.devices, strict=True)
        )

    def fill(self, slot: int, row: Row) -> list[torch.cuda.Event]:
        """Copies a row into a slot that nothing uses; on CUDA it has arrived at these events."""
        arrived = []
        for buffer, part, device in zip(self.buffers, row, self.devices, strict=True):
            stream = self._streams.get(device)
            with torch.cuda.stream(stream):
                if stream is not None:
                    for event in self._readers[slot].values():
                        stream.wait_event(event)
                buffer[slot].copy_(part, non_blocking=True)
                if stream is not None:
                    arrived.append(stream.record_event())
        self._readers[slot] = {}
        self.fills[slot] += 1
        return arrived

    def read(self, slot: int) -> Row:
        """A copy of a slot's bytes on the host."""
        row = self.blank()
        for part, buffer in zip(row, self.buffers, strict=True):
            part.copy_(buffer[slot])
        return row

    def wait(self, arrived: Iterable[torch.cuda.Event]) -> None:
        """Has what this thread runs next on the devices wait until rows have arrived."""
        for event in arrived:
            for device in self._streams:
                torch.cuda.current_stream(device).wait_event(event)

    def leave(self, slots: Sequence[int]) -> None:
        """Notes that what this thread ran so far on the devices reads these slots."""
        for device in self._streams:
            stream = torch.cuda.current_stream(device)
            event = stream.record_event()
            for slot in slots:
                self._readers[slot][stream.cuda_stream] = event

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves all slots as `fn` moves a tensor, which then has other views."""
        self._live_in([fn(buffer) for buffer in self.buffers])

"""Levels of chunk summaries over a whole sequence, and arrays that are kept on devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distattn.kernels.uploads import upload
from distattn.spans import Bools, Ints


def packed(bits: Bools) -> NDArray[np.int32]:
    """Rows of bits as words, bit i % 32 of word i // 32."""
    words = np.zeros((len(bits), -(-bits.shape[1] // 32)), np.uint32)
    packed = np.packbits(bits, axis=-1, bitorder="little")
    words.view(np.uint8)[:, : packed.shape[1]] = packed
    return words.view(np.int32)


class OnDevices:
    """Arrays by name, each copied to a device once."""

    @cached_property
    def _copies(self) -> dict[tuple[torch.device, str], torch.Tensor]:
        return {}

    def on(self, device: torch.device, name: str) -> torch.Tensor:
        """The array that is the attribute ``name``."""
        if (device, name) not in self._copies:
            bring(device, [(self, name)])
        return self._copies[device, name]


def bring(
    device: torch.device, wanted: Sequence[tuple[OnDevices, str]], others: Sequence[NDArray[Any]] = ()
) -> list[torch.Tensor]:
    """Copies arrays to a device in one transfer: attributes by name, for :meth:`OnDevices.on`, and others, whose copies
    it returns."""
    copies = upload([*(np.asarray(getattr(owner, name)) for owner, name in wanted), *others], device)
    for (owner, name), copy in zip(wanted, copies, strict=False):
        owner._copies[device, name] = copy
    return copies[len(wanted) :]


@dataclass(frozen=True, eq=False)
class Level(OnDevices):
    """Summaries of one level over the whole sequence.

    chunk, stride: tokens. members: how many of the level below a whole one has.
    start, stop: int64 [count], the positions [start, stop) that a summary stands for.
    size: int64 [count]: n, how many of these it counts; 0: there is no such summary.
    first_row: of the summary buffer.
    """

    chunk: int
    stride: int
    members: int
    start: Ints
    stop: Ints
    size: Ints
    first_row: int

    @property
    def count(self) -> int:
        return len(self.start)

    @property
    def exists(self) -> Bools:
        return self.size > 0

    @property
    def centre(self) -> NDArray[np.float64]:
        """The mean of the first and the last position."""
        return np.asarray((self.start + self.stop - 1) / 2)

    @property
    def ring(self) -> Ints:
        """int64 [2 * members]: the places of a ring of so many, twice around."""
        return np.arange(2 * self.members) % self.members

    @property
    def log_size(self) -> NDArray[np.float64]:
        return np.log(np.maximum(self.size, 1))

"""The distinct masks of PARTIAL tiles, as short as they can be told.

In most patterns a query attends to one interval of each page: windows, causality, documents, chunks and what `&` makes
of them. Two small integers a row are then a quarter of a mask's bits, and planning is done when they are written.
Compiled kernels read bits, which are made on their device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distattn.kernels.uploads import upload
from distattn.spans import Bools, Ints, ranks, renumber


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of ``rows`` x ``columns``.

    Attributes:
        columns: of a mask.
        data: int16 [n, 2, rows]: row r allows columns [0, r] .. [1, r] - 1, and no column as 0 and 0; or, where a row
            may allow anything, uint32 [n, rows, ceil(columns / 32)]: column c is bit c % 32 of word c // 32.
    """

    columns: int
    data: NDArray[np.int16] | NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Ints) -> Masks:
        return Masks(self.columns, self.data[index])

    @property
    def are_intervals(self) -> bool:
        return self.data.dtype == np.int16

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @cached_property
    def allowed(self) -> Ints:
        """int64 [n, rows]: how many columns each row allows."""
        if self.are_intervals:
            counts: Ints = np.subtract(self.data[:, 1], self.data[:, 0], dtype=np.int64)
        else:
            counts = np.bitwise_count(self.data).sum(axis=2, dtype=np.int64)
        return counts

    def nothing(self) -> Bools:
        """bool [n]: whether a mask allows no column of any row."""
        found: Bools
        if self.are_intervals:
            found = self.data[:, 1].max(axis=1, initial=0) == 0
        else:
            found = self.allowed.max(axis=1, initial=0) == 0
        return found

    def everything(self) -> Bools:
        """bool [n]: whether a mask allows all columns of all rows."""
        found: Bools
        if self.are_intervals:
            starts, stops = self.data[:, 0], self.data[:, 1]
            found = (starts.max(axis=1, initial=0) == 0) & (stops.min(axis=1, initial=self.columns) == self.columns)
        else:
            found = self.allowed.min(axis=1, initial=self.columns) == self.columns
        return found

    @cached_property
    def allows(self) -> Tensor:
        """bool [n, rows, columns] on the CPU."""
        if self.are_intervals:
            column = np.arange(self.columns, dtype=np.int16)
            start, stop = self.data[:, 0, :, None], self.data[:, 1, :, None]
            return torch.from_numpy((column >= start) & (column < stop))
        bits = np.unpackbits(self.data.view(np.uint8), axis=-1, bitorder="little", count=self.columns)
        return torch.from_numpy(bits.view(np.bool_))

    @cached_property
    def _words(self) -> dict[torch.device, Tensor]:
        return {}

    def words_and_none(self, device: torch.device) -> Tensor:
        """As :meth:`words`, [n + 1, ..]: behind them one that allows nothing. Kept."""
        if device not in self._words:
            words = self.words(device)
            self._words[device] = torch.cat((words, words.new_zeros(1, *words.shape[1:])))
        return self._words[device]

    def words(self, device: torch.device) -> Tensor:
        """int32 [n, rows, ceil(columns / 32)] on a device: column c is bit c % 32 of word c // 32."""
        if not self.are_intervals:
            return upload([self.data.view(np.int32)], device)[0]
        ends = upload([self.data], device)[0].long().unsqueeze(-1)
        first = 32 * torch.arange(-(-self.columns // 32), device=device)
        # Of each word the bits below stop, less those below start.
        below = 1 << (ends - first).clamp(0, 32)
        return (below[:, 1] - below[:, 0]).to(torch.int32)

    def distinct(self) -> tuple[Masks, Ints]:
        """(each mask once, in the order of their first occurrence; int64 [n], which one each mask is)."""
        first, kind = _distinct(self.data.reshape(len(self), self.data.shape[1] * self.data.shape[2]))
        return (self if len(first) == len(self) else self[first]), kind

    def named(self, mask: Ints) -> tuple[Masks, Ints]:
        """(the masks that entries of ``mask`` name; the entries, renumbered)."""
        used, mask = renumber(mask)
        return (self if len(used) == len(self) else self[used]), mask

    @staticmethod
    def joined(parts: Sequence[Masks]) -> Masks:
        """One after the other; one part at least, all of one shape."""
        if len(parts) == 1:
            return parts[0]
        parts = [part for part in parts if len(part)] or parts[:1]
        if all(part.are_intervals for part in parts):
            return Masks(parts[0].columns, np.concatenate([part.data for part in parts]))
        return Masks(parts[0].columns, np.concatenate([part._as_words() for part in parts]))

    def _as_words(self) -> NDArray[np.uint32]:
        return self.words(torch.device("cpu")).numpy().view(np.uint32)


def _distinct(rows: NDArray[np.integer]) -> tuple[Ints, Ints]:
    """(the first row of each kind, the kind of every row), of integers [n, width]."""
    wide = rows.view(np.uint64) if rows.shape[1] * rows.itemsize % 8 == 0 else rows.astype(np.uint64)
    # A hash finds the candidates; only true equality merges them.
    weights = np.random.default_rng(0).integers(1, 1 << 63, wide.shape[1], dtype=np.uint64) | np.uint64(1)
    kind = ranks((np.einsum("nw,w->n", wide, weights) >> np.uint64(24)).astype(np.int64))
    first = np.empty(int(kind.max(initial=-1)) + 1, np.int64)
    first[kind[::-1]] = np.arange(len(rows))[::-1]  # of several, the last one written stays
    target = np.arange(len(rows))
    others = np.flatnonzero(first[kind] != target)
    twins = others[(wide[others] == wide[first[kind[others]]]).all(axis=1)]
    target[twins] = first[kind[twins]]
    kept = np.flatnonzero(target == np.arange(len(rows)))
    return kept, np.searchsorted(kept, target)

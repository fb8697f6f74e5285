"""Patterns that cut the sequence into segments: chunks of one size, and packed documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from distattn import tile_labels
from distattn.algebra import IntervalPattern, as_int, as_positions
from distattn.spans import Bools, Ints

# Rows to a segment, on average: with fewer, nothing is gained by looking at segments instead of rows.
_FEW_ROWS = 8


@dataclass(frozen=True)
class Chunked(IntervalPattern):
    """`q // size == k // size`: attention inside chunks of `size` positions.

    With `before` and `after`, also to that many whole chunks on either side:
    `q // size - before <= k // size <= q // size + after`. A negative `after` leaves out the own chunk and as many less
    one before it. Raises ValueError if size < 1, before < 0 or after < -before.
    """

    size: int
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", as_int("size", self.size, 1))
        object.__setattr__(self, "before", as_int("before", self.before, 0))
        object.__setattr__(self, "after", as_int("after", self.after, -self.before))

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        q, k = as_positions(q, k)
        back = q // self.size - k // self.size
        return np.asarray((back <= self.before) & (back >= -self.after))

    def row_interval(self, q: ArrayLike) -> tuple[Ints, Ints]:
        chunk = np.asarray(q, np.int64) // self.size
        return np.maximum(chunk - self.before, 0) * self.size, (chunk + self.after + 1) * self.size

    def row_breaks(self, start: int, stop: int) -> Ints | None:
        return np.arange((start // self.size + 1) * self.size, stop, self.size) if self.size >= _FEW_ROWS else None

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        size = self.size
        first = q0 // size
        steps = (q0 + block_q - 1) // size - first
        # The column in the tile where the interval of its first row begins and ends; each chunk adds `size`.
        low, high = (first - self.before) * size - k0, (first + self.after + 1) * size - k0
        last_low, last_high = low + steps * size, high + steps * size
        nothing = (low >= block_k) | (last_high <= 0)
        everything = (last_low <= 0) & (high >= block_k)
        if size >= block_q:
            # At most one chunk begins inside the tile: its row and the clipped ends say it all.
            row = np.where(steps > 0, size - q0 % size, 0)
            ends = (np.clip(end, 0, block_k) for end in (low, last_low, high, last_high))
            return tile_labels.coded(nothing, everything, row, *ends)
        low = np.where(last_low <= 0, -steps * size, np.minimum(low, block_k))
        high = np.where(high >= block_k, block_k, high)
        return tile_labels.coded(nothing, everything, q0 % size, low, high)


@dataclass(frozen=True)
class Documents(IntervalPattern):
    """Attention inside packed documents of these lengths; positions after the last one take no part.

    `lengths` are ints >= 0 (any iterable; else ValueError).
    """

    lengths: tuple[int, ...]

    def __init__(self, lengths: Iterable[int]) -> None:
        array = np.asarray(lengths if isinstance(lengths, np.ndarray) else list(lengths))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"lengths is {lengths!r}; expected a sequence of integers")
        if array.size and array.min() < 0:
            raise ValueError(f"lengths contains {array.min()}; expected integers >= 0")
        object.__setattr__(self, "lengths", tuple(array.tolist()))

    @cached_property
    def _bounds(self) -> Ints:
        """Where documents begin, and the end of the last, twice: what comes after it is an empty document."""
        bounds = np.zeros(len(self.lengths) + 2, np.int64)
        np.cumsum(np.asarray(self.lengths, np.int64), out=bounds[1:-1])
        bounds[-1] = bounds[-2]
        return bounds

    def _counts(self, x: Ints) -> Ints | None:
        """How many of many ascending positions each document has, and what follows the last; None if they are not."""
        if x.ndim != 1 or x.size <= len(self.lengths) or (x[1:] < x[:-1]).any():
            return None
        # Fewer look-ups: find each document's end among the positions.
        return np.diff(np.searchsorted(x, self._bounds[1:-1]), prepend=0, append=x.size)

    def _document(self, x: Ints) -> Ints:
        """The document of each position; `len(lengths)` after the last one."""
        count = self._counts(x)
        if count is not None:
            return np.repeat(np.arange(len(count), dtype=np.int64), count)
        return np.searchsorted(self._bounds[1:-1], x, side="right")

    def _document_of_pages(self, x: Ints, block: int) -> Ints:
        """:meth:`_document` of many positions that are few multiples of ``block``."""
        page = x // block
        pages = int(page.max(initial=-1)) + 1
        if pages > x.size or (page * block != x).any():
            return self._document(x)
        return self._document(np.arange(pages) * block)[page]

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        q, k = as_positions(q, k)
        document = self._document(q)
        return np.asarray((document == self._document(k)) & (document < len(self.lengths)))

    def row_interval(self, q: ArrayLike) -> tuple[Ints, Ints]:
        q = np.asarray(q, np.int64)
        count = self._counts(q)
        if count is not None:
            return np.repeat(self._bounds[:-1], count), np.repeat(self._bounds[1:], count)
        document = self._document(q)
        return self._bounds[document], self._bounds[document + 1]

    def row_breaks(self, start: int, stop: int) -> Ints | None:
        ends = self._bounds[1:-1]
        ends = ends[np.searchsorted(ends, start, side="right") : np.searchsorted(ends, stop)]
        return ends if _FEW_ROWS * len(ends) <= stop - start else None

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        bounds = self._bounds
        first = np.maximum(self._document(q0), self._document_of_pages(k0, block_k))
        # Rows r0:r1 and columns c0:c1 are the first document that the tile's rows and columns share.
        start, stop = bounds[first], bounds[first + 1]
        r0, c0 = np.maximum(start - q0, 0), np.maximum(start - k0, 0)
        r1, c1 = np.minimum(stop - q0, block_q), np.minimum(stop - k0, block_k)
        codes = np.zeros(q0.shape, np.int64)
        shares = (r1 > r0) & (c1 > c0)
        more = shares & (r1 < block_q) & (c1 < block_k) & (stop < bounds[-1])
        one = np.flatnonzero(shares & ~more)
        codes[one] = tile_labels.rectangle(r0[one], r1[one], c0[one], c1[one], block_q, block_k)
        # Tiles with several documents hardly ever repeat: each gets a code of its own.
        several = np.flatnonzero(more)
        codes[several] = np.arange(several.size) + ((block_q + 1) * (block_k + 1)) ** 2 + 2
        return codes

"""One side of the score matrix, cut into blocks: query tiles along one, pages along the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from distattn import spans as sp
from distattn.patterns import Pattern
from distattn.spans import Ints, Spans

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Axis:
    """Blocks of positions along one side of the score matrix: runs, or gathered positions.

    Attributes:
        length: of the whole sequence.
        block: positions of a block; the last one may hold fewer.
        first: int64 [blocks], where each block's run begins; None for gathered positions.
        gathered: int64 [n], ascending; block i holds entries ``i * block ...``; None for runs.
        skip: int64 [n], ascending: positions that this axis leaves out, as if they were not in their blocks.
    """

    length: int
    block: int
    first: Ints | None = None
    gathered: Ints | None = None
    skip: Ints = field(default_factory=lambda: _NONE)

    @staticmethod
    def grid(length: int, block: int, skip: Ints = _NONE) -> Axis:
        """All positions of the sequence, block by block."""
        return Axis(length, block, first=np.arange(0, length, block, dtype=np.int64), skip=skip)

    @property
    def blocks(self) -> int:
        if self.first is not None:
            return len(self.first)
        return -(-len(self._gathered) // self.block)

    @property
    def _gathered(self) -> Ints:
        assert self.gathered is not None
        return self.gathered

    def positions(self, blocks: Ints, clip: bool = True) -> Ints:
        """int64 [n, block]: the positions of blocks, -1 where there is none or where it is left out.

        ``clip=False`` lets a run go on beyond the sequence."""
        at = np.arange(self.block)
        if self.first is not None:
            out = self.first[blocks][:, None] + at
            if clip:
                out[out >= self.length] = -1
        else:
            index = blocks[:, None] * self.block + at
            inside = index < len(self._gathered)
            out = np.where(inside, self._gathered[np.where(inside, index, 0)], -1)
        if self.skip.size:
            out[_contains(self.skip, out)] = -1
        return out

    def starts(self, blocks: Ints) -> tuple[Ints, int]:
        """Where blocks begin, and where the axis ends: positions, or places among the gathered ones."""
        if self.first is not None:
            return self.first[blocks], self.length
        return blocks * self.block, len(self._gathered)

    def places(self, positions: Ints) -> Ints:
        """Of each position how many of the axis are before it: itself, up to the end, or of the gathered ones."""
        if self.first is not None:
            return np.minimum(positions, self.length)
        return np.searchsorted(self._gathered, positions)

    def irregular(self) -> NDArray[np.bool_]:
        """bool [blocks]: blocks that are not a whole run of ``block`` positions."""
        out = np.zeros(self.blocks, np.bool_)
        if self.first is not None:
            out |= self.first + self.block > self.length
            if self.skip.size and self.blocks:
                block_of = np.searchsorted(self.first, self.skip, side="right") - 1
                block_of = np.maximum(block_of, 0)
                inside = (self.skip >= self.first[block_of]) & (self.skip < self.first[block_of] + self.block)
                out[block_of[inside]] = True
        elif self.blocks:
            out[-1] = len(self._gathered) % self.block > 0
            if self.skip.size:
                out[np.flatnonzero(_contains(self.skip, self._gathered)) // self.block] = True
        return out

    def bounds(self, pattern: Pattern, grain: int) -> tuple[Spans, Spans]:
        """(support, full) of the blocks as query tiles: intervals of key positions."""
        if self.first is not None:
            return pattern.spans(self.first, np.minimum(self.first + self.block, self.length), self.length, grain)
        support, full = pattern.spans(self._gathered, self._gathered + 1, self.length, grain)
        block_of = np.arange(len(self._gathered)) // self.block
        absent = sp.complement(full, self.length)
        return (
            union_rows(support, block_of, self.blocks),
            sp.complement(union_rows(absent, block_of, self.blocks), self.length),
        )

    def pages(self, keys: Spans, whole: bool) -> Spans:
        """Intervals of positions as intervals of this axis's blocks: those inside them, or those that they touch."""
        start, stop = keys.start, keys.stop
        if self.first is None:
            start, stop = np.searchsorted(self._gathered, start), np.searchsorted(self._gathered, stop)
            touches_end = stop == len(self._gathered)
        if whole:
            start, stop = -(-start // self.block), stop // self.block
            if self.first is None:
                # A short last block is whole when all that it holds is.
                stop = np.where(touches_end, self.blocks, stop)
        else:
            start, stop = start // self.block, np.where(stop > start, -(-stop // self.block), start // self.block)
        return sp.from_sorted(keys.row_of(), start, stop, keys.rows)


def union_rows(spans: Spans, group: Ints, groups: int) -> Spans:
    """The union of the rows of each group. group int64 [rows] gives each row's group."""
    row = group[spans.row_of()]
    order = np.argsort(row * (int(spans.stop.max(initial=0)) + 1) + spans.start, kind="stable")
    return sp.from_sorted(row[order], spans.start[order], spans.stop[order], groups)


def _contains(values: Ints, x: Ints) -> NDArray[np.bool_]:
    """Whether each x is among the ascending values."""
    at = np.minimum(np.searchsorted(values, x), len(values) - 1)
    found: NDArray[np.bool_] = values[at] == x
    return found

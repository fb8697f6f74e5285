"""What new tokens visit of a cache: tiles of rows, and where the pages are that they visit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distattn import spans as sp
from distattn.levels import OnDevices
from distattn.spans import Bools, Ints
from distattn.tiles import Extents, Visits


@dataclass(frozen=True, eq=False)
class Tiles(OnDevices):
    """The new rows of a step as query tiles; no tile has rows of two sequences.

    Attributes:
        block: rows of a tile; rows before or behind a sequence's new ones are nobody's.
        sequence: int64 [tiles], which of the step's sequences. first: int64 [tiles], its first row's position.
        begin, count: int64 [sequences], which of the tiles' rows is the first new one of each, and how many follow.
    """

    block: int
    sequence: Ints
    first: Ints
    begin: Ints
    count: Ints

    @staticmethod
    def of(start: Ints, count: Ints, block: int, unit: int = 1) -> Tiles:
        """start, count: int64 [sequences], the new positions of each. unit: first rows are multiples of it."""
        begin = start // unit * unit
        tiles = -(-(start + count - begin) // block)
        number = tiles.cumsum() - tiles
        sequence = np.repeat(np.arange(len(start)), tiles)
        first = begin[sequence] + (np.arange(len(sequence)) - number[sequence]) * block
        return Tiles(block, sequence, first, number * block + start - begin, count)

    def __len__(self) -> int:
        return len(self.first)

    def divided(self, block: int, last: Ints) -> Tiles:
        """The same rows in smaller tiles.

        last: int64 [sequences], first positions of the last tiles that have new rows; those behind are made like these.
        """
        if block == self.block:
            return self
        pieces = self.block // block
        sequence = np.repeat(self.sequence, pieces)
        first = (self.first[:, None] + np.arange(pieces) * block).ravel()
        return Tiles(block, sequence, np.minimum(first, last[sequence]), self.begin, self.count)

    @cached_property
    def place(self) -> Ints:
        """int64 [rows], of each new row: ``tile * block + row``."""
        return sp.concat_ranges(self.begin, self.count)

    @property
    def are_rows(self) -> bool:
        """Whether the place of each new row is its number, so that rows as they are make up the tiles."""
        return bool((self.begin == self.count.cumsum() - self.count).all())

    @property
    def positions(self) -> NDArray[np.int32]:
        """int32 [tiles], of first rows."""
        return self.first.astype(np.int32)


class Line(NamedTuple):
    """The pages of a step's sequences, one sequence after the other.

    first: int64 [sequences + 1], where those of each begin. owner, block: int64 [pages], the rank and the page of its
    tensors; owner -1: no rank has it.
    """

    first: Ints
    owner: Ints
    block: Ints

    def moved(self, visits: Visits, tiles: Tiles) -> Visits:
        """Visits of pages of the tiles' sequences as visits of the line.

        Rows behind the new ones of a sequence may ask for pages that it does not have: these are left out.
        """
        return moved(visits, self.first[tiles.sequence], self.first[tiles.sequence + 1])

    def of_rank(self, rank: int) -> Extents:
        """Where a rank has pages of the line."""
        mine = np.flatnonzero(self.owner == rank)
        return Extents.of(mine, self.block[mine])

    def asked(self, visits: Visits, world_size: int) -> Bools:
        """bool [tiles, ranks]: which ranks have a page of the line that a tile visits."""
        found = np.zeros((visits.full.rows, world_size), np.bool_)
        row, (_, start, stop) = visits.full.row_of(), visits.full
        order = np.argsort(self.owner, kind="stable")
        edges = np.searchsorted(self.owner[order], np.arange(world_size + 1))
        for rank in range(world_size):
            pages = order[edges[rank] : edges[rank + 1]]
            found[row[np.searchsorted(pages, start) < np.searchsorted(pages, stop)], rank] = True
        owner = self.owner[visits.page]
        there = owner >= 0
        found[visits.row[there], owner[there]] = True
        return found


def moved(visits: Visits, by: Ints, until: Ints) -> Visits:
    """Page p of tile t as page ``by[t] + p``; those from ``until[t]`` on are left out. by, until: int64 [tiles]."""
    if not by.any() and visits.end <= until.min(initial=visits.end):
        return visits
    row = visits.full.row_of()
    start, stop = visits.full.start + by[row], np.minimum(visits.full.stop + by[row], until[row])
    page = visits.page + by[visits.row]
    kept = page < until[visits.row]
    full = sp.from_sorted(row, start, stop, visits.full.rows)
    return Visits(full, visits.row[kept], page[kept], visits.mask[kept], visits.masks)

"""What new tokens visit of a cache: tiles of rows, and tile tables in the pages of each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distattn import spans as sp
from distattn.kernels.masks import Masks
from distattn.kernels.table import TileTable
from distattn.levels import OnDevices
from distattn.spans import Bools, Ints
from distattn.tiles import Visits

Where = Callable[[Ints, Ints], tuple[Ints, Ints]]
"""where(tile, page) -> (owner, page of that rank's tensors) of pages of a tile's sequence; owner -1: it has no such."""


@dataclass(frozen=True, eq=False)
class Tiles(OnDevices):
    """The new rows of a step as query tiles; no tile has rows of two sequences.

    Attributes:
        block: rows of a tile; rows before or behind a sequence's new ones are nobody's.
        sequence: int64 [tiles], which of the step's sequences. first: int64 [tiles], its first row's position.
        place: int64 [rows], of each new row: ``tile * block + row``.
    """

    block: int
    sequence: Ints
    first: Ints
    place: Ints

    @staticmethod
    def of(start: Ints, count: Ints, block: int, unit: int = 1) -> Tiles:
        """start, count: int64 [sequences], the new positions of each. unit: first rows are multiples of it."""
        begin = start // unit * unit
        tiles = -(-(start + count - begin) // block)
        number = tiles.cumsum() - tiles
        sequence = np.repeat(np.arange(len(start)), tiles)
        first = begin[sequence] + (np.arange(len(sequence)) - number[sequence]) * block
        place = sp.concat_ranges(number * block + start - begin, count)
        return Tiles(block, sequence, first, place)

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
        return Tiles(block, sequence, np.minimum(first, last[sequence]), self.place)

    @property
    def positions(self) -> NDArray[np.int32]:
        """int32 [tiles], of first rows."""
        return self.first.astype(np.int32)


class Placed(NamedTuple):
    """Visits of all tiles, by the rank that has the page. FULL ones: tile, owner, page. PARTIAL ones have a mask."""

    full: tuple[Ints, Ints, Ints]
    partial: tuple[Ints, Ints, Ints, Ints]
    masks: Masks


def place(visits: Visits, where: Where) -> Placed:
    """Pages of sequences as pages of ranks; those that no rank has are left out."""
    count = visits.full.stop - visits.full.start
    tile, page = np.repeat(visits.full.row_of(), count), sp.concat_ranges(visits.full.start, count)
    owner, at = where(tile, page)
    there = owner >= 0
    part_owner, part_at = where(visits.row, visits.page)
    part_there = part_owner >= 0
    return Placed(
        (tile[there], owner[there], at[there]),
        (visits.row[part_there], part_owner[part_there], part_at[part_there], visits.mask[part_there]),
        visits.masks,
    )


def joined(parts: Sequence[Placed]) -> Placed:
    """Visits of different pages as one."""
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(len(part.masks) for part in parts)])
    masks = [part.partial[3] + n for part, n in zip(parts, before, strict=False)]
    full = tuple(np.concatenate(x) for x in zip(*(part.full for part in parts), strict=True))
    partial = tuple(np.concatenate(x) for x in zip(*(part.partial[:3] for part in parts), strict=True))
    return Placed(full, (*partial, np.concatenate(masks)), Masks.joined([part.masks for part in parts]))  # type: ignore[arg-type]


def wanted(placed: Sequence[Placed], tiles: int, world_size: int) -> Bools:
    """bool [tiles, ranks]: which ranks have a page that a tile visits."""
    found = np.zeros((tiles, world_size), np.bool_)
    for one in placed:
        found[one.full[0], one.full[1]] = True
        found[one.partial[0], one.partial[1]] = True
    return found


def table_of(
    placed: Sequence[Placed],
    rank: int,
    kept: Bools,
    head_table: tuple[int, ...],
    blocks: tuple[int, int],
    pages: int,
) -> TileTable:
    """The table of one rank.

    Args:
        placed: of each table.
        kept: bool [tiles]: those that the table is for, renumbered.
        blocks: rows of a tile and of a page. pages: of the rank's tensors.
    """
    tiles, number = int(kept.sum()), np.cumsum(kept) - 1
    full, part, masks, before = [], [], [], 0
    for index, one in enumerate(placed):
        tile, owner, page = one.full
        mine = (owner == rank) & kept[tile]
        full.append((number[tile[mine]] + index * tiles, page[mine]))
        tile, owner, page, mask = one.partial
        mine = (owner == rank) & kept[tile]
        part.append((number[tile[mine]] + index * tiles, page[mine], mask[mine] + before))
        masks.append(one.masks)
        before += len(one.masks)
    row, page = (np.concatenate(x) for x in zip(*full, strict=True))
    order = np.argsort(row * pages + page, kind="stable")
    rows = len(placed) * tiles
    runs = sp.from_sorted(row[order], page[order], page[order] + 1, rows)
    part_row, part_page, part_mask = (np.concatenate(x) for x in zip(*part, strict=True))
    order = np.argsort(part_row * pages + part_page, kind="stable")
    part_ptr = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(part_row, minlength=rows), out=part_ptr[1:])
    every, part_mask = Masks.joined(masks).named(part_mask[order])
    return TileTable(
        block_q=blocks[0],
        block_k=blocks[1],
        tiles=tiles,
        own_pages=pages,
        guest_pages=0,
        head_table=head_table,
        full_ptr=runs.ptr.astype(np.int32),
        full_first=runs.start.astype(np.int32),
        full_count=(runs.stop - runs.start).astype(np.int32),
        part_ptr=part_ptr.astype(np.int32),
        part_page=part_page[order].astype(np.int32),
        part_mask=part_mask.astype(np.int32),
        masks=every,
    )

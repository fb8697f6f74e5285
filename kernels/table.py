"""The tile table: which pages each query tile visits, in the form that kernels read.

A kernel needs no more than this. It never learns what a pattern, a plan or a rank is.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distattn import spans as sp
from distattn.kernels.launching import Bound, Recording
from distattn.kernels.masks import Masks
from distattn.spans import Ints, Spans

Int32 = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Tiling:
    """How the score matrix is cut into tiles, and which query heads share a table of them.

    Attributes:
        block_q: rows of a query tile; the last tile may be short.
        block_k: rows of a page.
        tiles: query tiles of a table.
        own_pages: pages ``0 .. own_pages - 1`` are rows ``page * block_k ...`` of the rank's own K and V.
        guest_pages: pages ``own_pages ..`` lie one after the other in the guest buffer.
        head_table: for each query head, the table that it reads.
    """

    block_q: int
    block_k: int
    tiles: int
    own_pages: int
    guest_pages: int
    head_table: tuple[int, ...]

    @property
    def pages(self) -> int:
        return self.own_pages + self.guest_pages

    @property
    def numbers(self) -> Hashable:
        """All that launches take of a table beside what is made of it for them."""
        blocks, pages = (self.block_q, self.block_k), (self.tiles, self.own_pages, self.guest_pages)
        return blocks, pages, self.head_table, self.names_pages, self.has_masks, self.mask_rows

    @property
    def names_pages(self) -> bool:
        """Whether FULL visits are listed page by page; else they are runs."""
        return False

    @property
    def has_masks(self) -> bool:
        """Whether any visit is PARTIAL; a table that names pages has either kind alone."""
        return True

    @property
    def mask_rows(self) -> int:
        """Rows of a mask: one for each row of a tile."""
        return self.block_q

    @cached_property
    def cache(self) -> dict[object, Any]:
        """What kernels have made of the table, such as its copy on a device."""
        return {}

    @cached_property
    def recordings(self) -> dict[Hashable, Recording | Bound]:
        """Launches of kernels over this table, by all else that they were made from."""
        return {}


@dataclass(frozen=True, eq=False)
class TileTable(Tiling):
    """Tiles of the score matrix, by query tile.

    A table row is a (table, query tile) pair, ``row = table * tiles + tile``. Row ``r`` visits the FULL pages

        for i in range(full_ptr[r], full_ptr[r + 1]):
            pages full_first[i], full_first[i] + 1, ..., full_first[i] + full_count[i] - 1

    without a mask, and the PARTIAL pages

        for i in range(part_ptr[r], part_ptr[r + 1]):
            page part_page[i], pair (a, b) allowed if masks.allows[part_mask[i], a, b]

    No page occurs twice in a row. A page that has fewer than ``block_k`` rows is always PARTIAL, and its mask
    clears the rows that do not exist.

    Attributes, beside those of a Tiling:
        full_ptr: int32 [tables * tiles + 1].
        full_first, full_count: int32 [runs].
        part_ptr: int32 [tables * tiles + 1].
        part_page, part_mask: int32 [partial tiles].
        masks: of block_q x block_k, each stored once.
    """

    full_ptr: Int32
    full_first: Int32
    full_count: Int32
    part_ptr: Int32
    part_page: Int32
    part_mask: Int32
    masks: Masks

    @property
    def numbers(self) -> Hashable:
        return super().numbers, len(self.part_page) > 0

    @property
    def tables(self) -> int:
        return (len(self.full_ptr) - 1) // max(self.tiles, 1)

    @property
    def nbytes(self) -> int:
        arrays = (self.full_ptr, self.full_first, self.full_count, self.part_ptr, self.part_page, self.part_mask)
        return sum(array.nbytes for array in arrays) + self.masks.nbytes

    @cached_property
    def full_cumulative(self) -> NDArray[np.int64]:
        """int64 [runs + 1]: FULL pages in all runs before run i."""
        out = np.zeros(len(self.full_count) + 1, np.int64)
        np.cumsum(self.full_count, out=out[1:])
        return out

    @cached_property
    def full_pages(self) -> NDArray[np.int64]:
        """int64 [tables * tiles]: FULL pages that each row visits."""
        return np.diff(self.full_cumulative[self.full_ptr])

    @cached_property
    def part_pages(self) -> NDArray[np.int64]:
        """int64 [tables * tiles]: PARTIAL pages that each row visits."""
        return np.diff(self.part_ptr).astype(np.int64)

    @cached_property
    def heads_by_table(self) -> NDArray[np.int64]:
        """int64 [tables]: how many query heads read each table."""
        return np.bincount(self.head_table, minlength=self.tables)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is visited."""
        return not (len(self.part_page) or len(self.full_first))

    @cached_property
    def has_empty_rows(self) -> bool:
        """Whether some row visits nothing."""
        return not (self.full_pages + self.part_pages).all()

    def empty_rows(self, device: torch.device) -> Tensor | None:
        """bool [tables, tiles] on a device: which rows visit nothing; None if all visit something. Kept."""
        if not self.has_empty_rows:
            return None
        key = ("empty", device)
        if key not in self.cache:
            empty = self.full_pages + self.part_pages == 0
            self.cache[key] = torch.from_numpy(empty.reshape(self.tables, self.tiles)).to(device)
        made: Tensor = self.cache[key]
        return made

    def visits_from(self, page: int) -> NDArray[np.bool_]:
        """bool [tiles]: whether some table of the tile visits a page of this number or a later one."""
        rows = self.tables * self.tiles
        run_row = np.repeat(np.arange(rows), np.diff(self.full_ptr))
        part_row = np.repeat(np.arange(rows), np.diff(self.part_ptr))
        out = np.zeros(rows, np.bool_)
        out[run_row[self.full_first + self.full_count > page]] = True
        out[part_row[self.part_page >= page]] = True
        return np.asarray(out.reshape(self.tables, self.tiles).any(axis=0))

    @cached_property
    def by_key(self) -> KeyTable:
        """The same tiles by key page."""
        return _transpose(self)

    def subset(self, tiles: NDArray[np.bool_]) -> TileTable:
        """The table in which other query tiles visit nothing. tiles: bool [tiles]."""
        if tiles.all():
            return self
        keep = np.tile(tiles, self.tables)
        full = np.repeat(keep, np.diff(self.full_ptr))
        part = np.repeat(keep, np.diff(self.part_ptr))
        return replace(
            self,
            full_ptr=_pointers(np.where(keep, np.diff(self.full_ptr), 0)),
            full_first=self.full_first[full],
            full_count=self.full_count[full],
            part_ptr=_pointers(np.where(keep, np.diff(self.part_ptr), 0)),
            part_page=self.part_page[part],
            part_mask=self.part_mask[part],
        )

    def expand(
        self, rows: NDArray[np.int64], first: int, partial: int, full: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pages ``first .. first + partial + full`` of each row's list, PARTIAL pages before FULL ones.

        Every row must have these ``partial + full`` entries, of these kinds.

        Returns:
            pages int64 [rows, partial + full] and masks int64 [rows, partial].
        """
        part_at = self.part_ptr[rows].astype(np.int64)[:, None] + first + np.arange(partial)
        rank = np.maximum(first - self.part_pages[rows], 0)[:, None] + np.arange(full)
        rank = rank + self.full_cumulative[self.full_ptr[rows]][:, None]
        run = np.searchsorted(self.full_cumulative, rank, side="right") - 1
        full_page = self.full_first[run] + (rank - self.full_cumulative[run]) if full else rank
        pages = np.concatenate((self.part_page[part_at].astype(np.int64), full_page), axis=1)
        return pages, self.part_mask[part_at].astype(np.int64)


@dataclass(frozen=True, eq=False)
class KeyTable:
    """The tiles of a :class:`TileTable` by key page: row ``table * pages + page`` holds query tiles.

    Attributes:
        table: the same tiles by query tile; its masks serve here as well.
        full_ptr: int32 [tables * pages + 1].
        full_first, full_count: int32 [runs], runs of query tiles to which the whole page is visible.
        part_ptr: int32 [tables * pages + 1].
        part_tile, part_mask: int32 [partial tiles].
    """

    table: TileTable
    full_ptr: Int32
    full_first: Int32
    full_count: Int32
    part_ptr: Int32
    part_tile: Int32
    part_mask: Int32


def _pointers(counts: NDArray[np.int64]) -> Int32:
    """int32 [n + 1]: where each of n rows begins, given how many entries each has."""
    out = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=out[1:])
    return out


def _transpose(table: TileTable) -> KeyTable:
    """The same tiles by key page, for the pass that makes dK and dV. Linear in what changes from tile to tile."""
    tiles, pages, rows = table.tiles, table.pages, table.tables * table.tiles
    run_row = np.repeat(np.arange(rows), np.diff(table.full_ptr))
    full = sp.from_sorted(
        run_row, table.full_first.astype(np.int64), (table.full_first + table.full_count).astype(np.int64), rows
    )
    # A run of query tiles at a page begins where the page is in a row and not in the row before, and ends likewise.
    first_rows = np.arange(0, rows, tiles) if tiles else np.zeros(0, np.int64)
    before = _shift(full, first_rows)
    enter = _entries(sp.difference(full, before, pages))
    leave = _entries(sp.difference(before, full, pages))
    last = _rows(full, first_rows + tiles - 1)
    enter_key = np.sort(((enter[0] // max(tiles, 1)) * pages + enter[1]) * (tiles + 1) + enter[0] % max(tiles, 1))
    leave_table = np.concatenate((leave[0] // max(tiles, 1), last[0] // max(tiles, 1)))
    leave_tile = np.concatenate((leave[0] % max(tiles, 1), np.full(len(last[0]), tiles)))
    leave_key = np.sort((leave_table * pages + np.concatenate((leave[1], last[1]))) * (tiles + 1) + leave_tile)
    key_rows = table.tables * pages
    first_tile = enter_key % (tiles + 1)
    part_row = np.repeat(np.arange(rows), np.diff(table.part_ptr))
    owner = part_row // max(tiles, 1) * pages + table.part_page
    order = np.argsort(owner * (tiles + 1) + part_row % max(tiles, 1), kind="stable")
    return KeyTable(
        table=table,
        full_ptr=_pointers(np.bincount(enter_key // (tiles + 1), minlength=key_rows)),
        full_first=first_tile.astype(np.int32),
        full_count=(leave_key % (tiles + 1) - first_tile).astype(np.int32),
        part_ptr=_pointers(np.bincount(owner, minlength=key_rows)),
        part_tile=(part_row % max(tiles, 1))[order].astype(np.int32),
        part_mask=table.part_mask[order],
    )


def _shift(spans: Spans, reset: Ints) -> Spans:
    """Row r gets the intervals of row r - 1; rows in ``reset`` get none."""
    count = np.diff(spans.ptr)
    shifted = np.concatenate((np.zeros(1, np.int64), count[:-1])) if len(count) else count
    keep = np.ones(spans.rows, np.bool_)
    keep[reset] = False
    # Intervals of the row before a reset row belong to nobody.
    kept = np.append(keep[1:], False)[spans.row_of()] if spans.rows else np.zeros(0, np.bool_)
    ptr = np.zeros(spans.rows + 1, np.int64)
    np.cumsum(np.where(keep, shifted, 0), out=ptr[1:])
    return Spans(ptr, spans.start[kept], spans.stop[kept])


def _entries(spans: Spans) -> tuple[Ints, Ints]:
    """(row, position) of every position in the intervals."""
    count = spans.stop - spans.start
    return np.repeat(spans.row_of(), count), sp.concat_ranges(spans.start, count)


def _rows(spans: Spans, rows: Ints) -> tuple[Ints, Ints]:
    """(row, position) of every position in the intervals of some rows."""
    chosen = np.zeros(spans.rows, np.bool_)
    chosen[rows] = True
    kept = chosen[spans.row_of()]
    count = (spans.stop - spans.start)[kept]
    return np.repeat(spans.row_of()[kept], count), sp.concat_ranges(spans.start[kept], count)

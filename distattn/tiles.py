"""From a pattern to tile tables.

Planning works with intervals of pages by query tile, so that its cost follows what is visited: dense attention over
a million tokens is one run a tile. A mask is made only where a tile is PARTIAL, and only once for all tiles that
the pattern gives the same label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from distattn import spans as sp
from distattn.axis import Axis
from distattn.kernels.masks import Masks
from distattn.kernels.table import TileTable
from distattn.masks import interval_labels, make_masks
from distattn.patterns import Pattern
from distattn.spans import Ints, Spans

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Visits:
    """What the query tiles of one axis visit of another: FULL pages as intervals, PARTIAL pages with masks.

    full: Spans of pages by tile. row, page, mask: int64 [partial tiles], by row and page.
    masks: distinct ones, of block_q x block_k.
    """

    full: Spans
    row: Ints
    page: Ints
    mask: Ints
    masks: Masks

    def rows(self, tiles: Ints) -> Visits:
        """The visits of some query tiles, ascending, renumbered from 0."""
        count = np.diff(self.full.ptr)[tiles]
        at = sp.concat_ranges(self.full.ptr[tiles], count)
        ptr = np.zeros(len(tiles) + 1, np.int64)
        np.cumsum(count, out=ptr[1:])
        number = np.full(self.full.rows, -1, np.int64)
        number[tiles] = np.arange(len(tiles))
        row = number[self.row]
        kept = row >= 0
        full = Spans(ptr, self.full.start[at], self.full.stop[at])
        return Visits(full, row[kept], self.page[kept], self.mask[kept], self.masks)

    def run(self, first: int, stop: int) -> Visits:
        """The visits of the query tiles ``first .. stop - 1``, renumbered from 0."""
        ptr = self.full.ptr[first : stop + 1]
        full = Spans(ptr - ptr[0], self.full.start[ptr[0] : ptr[-1]], self.full.stop[ptr[0] : ptr[-1]])
        part = slice(*np.searchsorted(self.row, [first, stop]))
        return Visits(full, self.row[part] - first, self.page[part], self.mask[part], self.masks)

    def shifted(self, pages: int) -> Visits:
        """Visits of pages that lie so many further on."""
        full = Spans(self.full.ptr, self.full.start + pages, self.full.stop + pages)
        return replace(self, full=full, page=self.page + pages)

    @property
    def end(self) -> int:
        """One more than the last page that is visited, or 0."""
        return max(int(self.full.stop.max(initial=0)), int(self.page.max(initial=-1)) + 1)

    @property
    def nbytes(self) -> int:
        """Without masks."""
        return sum(x.nbytes for x in (*self.full, self.row, self.page, self.mask))

    @property
    def tiles(self) -> Ints:
        """int64 [rows]: pages visited by each query tile."""
        full = np.bincount(self.full.row_of(), self.full.stop - self.full.start, self.full.rows).astype(np.int64)
        return full + np.bincount(self.row, minlength=self.full.rows)

    def pairs(self, queries: Axis, block_k: int) -> Ints:
        """int64 [rows]: allowed (query, key) pairs of each query tile."""
        full = np.bincount(self.full.row_of(), self.full.stop - self.full.start, self.full.rows).astype(np.int64)
        if queries.first is not None:
            rows = np.minimum(queries.block, queries.length - queries.first)
        else:
            rows = np.minimum(queries.block, len(queries.gathered) - queries.block * np.arange(queries.blocks))  # type: ignore[arg-type]
        by_line = self.masks.allowed.cumsum(axis=1)
        partial = by_line[self.mask, rows[self.row] - 1] if len(self.row) else _NONE
        return full * rows * block_k + np.bincount(self.row, partial, self.full.rows).astype(np.int64)


def visit(pattern: Pattern, queries: Axis, keys: Axis) -> Visits:
    """Sorts the tiles of queries x keys into EMPTY, PARTIAL and FULL, exactly."""
    support, full = queries.bounds(pattern, keys.block)
    candidates, covered = keys.pages(support, whole=False), keys.pages(full, whole=True)
    odd_row, odd_page = queries.irregular() & _skips(queries), keys.irregular()
    full = _without(covered, odd_row, odd_page)
    rest = sp.difference(candidates, full, keys.blocks)
    count = rest.stop - rest.start
    row, page = np.repeat(rest.row_of(), count), sp.concat_ranges(rest.start, count)

    if queries.first is not None and keys.first is not None:
        label = pattern.labels(queries.first[row], keys.first[page], queries.block, keys.block)
    else:
        # Among gathered positions a pattern has no labels. Tiles are told apart by what their rows attend to, or else
        # they are alike where all is allowed, and have masks of their own; so have short query tiles, since masks say
        # something of rows that do not exist.
        found = interval_labels(pattern, queries, keys, row, page)
        alike = _inside(covered, row, page) & ~queries.irregular()[row]
        own = np.where(alike, 1, np.arange(2, len(row) + 2))
        label = own if found is None else found
    kept = label != 0
    if not kept.all():
        row, page, label = row[kept], page[kept], label[kept]
    whole = label == 1
    odd = odd_row[row] | odd_page[page]
    if odd.any():
        whole &= ~odd
        # An irregular block's mask is its own: tell such tiles apart by their blocks.
        _, label = np.unique(label, return_inverse=True)
        which = np.where(odd_row[row], row, -1) * (keys.blocks + 1) + np.where(odd_page[page], page, -1)
        _, which = np.unique(which, return_inverse=True)
        _, label = np.unique(label * (int(which.max(initial=0)) + 1) + which, return_inverse=True)
    if whole.any():
        full = _add_pages(full, row[whole], page[whole])
        row, page, label = row[~whole], page[~whole], label[~whole]
    kinds, mask = sp.renumber(label)
    sample = np.empty(len(kinds), np.int64)
    sample[mask] = np.arange(len(mask))  # any tile of the kind
    masks, same = make_masks(pattern, queries, keys, row[sample], page[sample])
    mask = same[mask]
    nothing, everything = masks.nothing(), masks.everything()
    if nothing.any() or everything.any():
        promoted = everything[mask]
        full = _add_pages(full, row[promoted], page[promoted])
        kept = ~(nothing[mask] | promoted)
        row, page, mask = row[kept], page[kept], mask[kept]
        masks, mask = masks.named(mask)
    return Visits(full, row, page, mask, masks)


def sharing_masks(parts: Sequence[Visits]) -> list[Visits]:
    """The same visits, all with the masks of all, each of which is there once. One part at least."""
    if len(parts) == 1:
        return [*parts]
    every, kind = Masks.joined([part.masks for part in parts]).distinct()
    first = np.cumsum([0, *(len(part.masks) for part in parts)]).tolist()
    return [replace(part, mask=kind[part.mask + at], masks=every) for part, at in zip(parts, first, strict=False)]


def joined(parts: Sequence[Visits]) -> Visits:
    """Visits of different pages by the same query tiles as one. One part at least."""
    if len(parts) == 1:
        return parts[0]
    shared, full = sharing_masks(parts), parts[0].full
    for part in parts[1:]:
        full = sp.union(full, part.full)
    row, page, mask = (np.concatenate([getattr(part, name) for part in shared]) for name in ("row", "page", "mask"))
    order = np.argsort(row * (int(page.max(initial=0)) + 1) + page, kind="stable")
    return Visits(full, row[order], page[order], mask[order], shared[0].masks)


def _skips(axis: Axis) -> NDArray[np.bool_] | np.bool_:
    # A short query tile needs no mask of its own: rows that do not exist are never written.
    return np.bool_(axis.skip.size > 0)


def _without(full: Spans, odd_row: NDArray[np.bool_], odd_page: NDArray[np.bool_]) -> Spans:
    """FULL intervals less the rows and pages that need a mask."""
    row, start, stop = full.row_of(), full.start, full.stop
    if odd_row.any():
        kept = ~odd_row[row]
        row, start, stop = row[kept], start[kept], stop[kept]
    holes = np.flatnonzero(odd_page)
    if holes.size:
        first, last = np.searchsorted(holes, start), np.searchsorted(holes, stop)
        inside = last - first
        at = np.concatenate((_NONE, np.cumsum(inside + 1)))
        pieces = np.repeat(np.arange(len(row)), inside + 1)
        hole = holes[sp.concat_ranges(first, inside)]
        ends = np.ones(len(pieces), np.bool_)
        ends[at - 1] = False
        new_start, new_stop = start[pieces], stop[pieces]
        new_stop[ends] = hole
        new_start[1:][ends[:-1]] = hole + 1
        row, start, stop = row[pieces], new_start, new_stop
    return sp.from_sorted(row, start, stop, full.rows)


def _inside(spans: Spans, row: Ints, page: Ints) -> NDArray[np.bool_]:
    """Whether each page lies in an interval of its row."""
    if len(spans.start) == 0:
        return np.zeros(len(row), np.bool_)
    line = max(int(spans.stop.max()), int(page.max(initial=0))) + 1
    of = spans.row_of() * line
    at = np.searchsorted(of + spans.start, row * line + page, side="right") - 1
    found: NDArray[np.bool_] = (at >= 0) & (row * line + page < (of + spans.stop)[np.maximum(at, 0)])
    return found


def _add_pages(full: Spans, row: Ints, page: Ints) -> Spans:
    """FULL intervals and single pages together."""
    if len(row) == 0:
        return full
    # Sorted by row and page, as candidates are.
    return sp.union(full, sp.from_sorted(row, page, page + 1, full.rows))


@dataclass(frozen=True, eq=False)
class Extents:
    """Where pages lie in an arena: pages ``start[i] ... stop[i] - 1`` at arena pages ``to[i] ...``; by start."""

    start: Ints
    stop: Ints
    to: Ints

    @staticmethod
    def of(pages: Ints, to: int | Ints) -> Extents:
        """Ascending pages: one after the other from arena page ``to``, or each where ``to`` says."""
        to = to + np.arange(len(pages)) if isinstance(to, int) else to
        breaks = np.flatnonzero((np.diff(pages) != 1) | (np.diff(to) != 1)) + 1
        first = np.concatenate((np.zeros(1, np.int64), breaks)) if len(pages) else _NONE
        size = np.diff(np.append(first, len(pages)))
        start = pages[first]
        return Extents(start, start + size, to[first])

    def joined(self, other: Extents) -> Extents:
        parts = [np.concatenate(x) for x in zip(self.astuple(), other.astuple(), strict=True)]
        order = np.argsort(parts[0], kind="stable")
        return Extents(*(x[order] for x in parts))

    def astuple(self) -> tuple[Ints, Ints, Ints]:
        return self.start, self.stop, self.to

    def place(self, visits: Visits) -> tuple[tuple[Ints, Ints, Ints], tuple[Ints, Ints, Ints]]:
        """Visits in arena pages: runs (row, first, count) and partial tiles (row, page, mask); others are dropped."""
        full, row = visits.full, visits.full.row_of()
        if len(self.start) == 1 and self.start[0] == 0 and visits.end <= self.stop[0]:  # all that is visited is here
            runs = row, full.start + self.to[0], full.stop - full.start
            return runs, (visits.row, visits.page + self.to[0], visits.mask)
        first = np.searchsorted(self.stop, full.start, side="right")
        count = np.maximum(np.searchsorted(self.start, full.stop, side="left") - first, 0)
        run, extent = np.repeat(np.arange(len(row)), count), sp.concat_ranges(first, count)
        start = np.maximum(full.start[run], self.start[extent])
        size = np.minimum(full.stop[run], self.stop[extent]) - start
        runs = (row[run], self.to[extent] + start - self.start[extent], size)
        if len(self.start) == 0:
            return runs, (_NONE, _NONE, _NONE)
        at = np.maximum(np.searchsorted(self.start, visits.page, side="right") - 1, 0)
        here = (visits.page >= self.start[at]) & (visits.page < self.stop[at])
        at, page = at[here], visits.page[here]
        return runs, (visits.row[here], self.to[at] + page - self.start[at], visits.mask[here])


def assemble(
    parts: Sequence[Sequence[tuple[Visits, Extents]]],
    head_table: Sequence[int],
    tiles: int,
    blocks: tuple[int, int],
    own_pages: int,
    guest_pages: int,
    keep_masks: bool = False,
) -> TileTable:
    """One tile table of several: for each table, visits and where their pages lie in the arena.

    keep_masks: the visits all have the same masks, and so has the table, which may not need some; what is made of them
    on devices then serves other tables of them as well.
    """
    runs: list[tuple[Ints, Ints, Ints]] = []
    partial: list[tuple[Ints, Ints, Ints]] = []
    masks: list[Masks] = []
    offset: dict[int, int] = {}
    for index, table in enumerate(parts):
        for visits, extents in table:
            if id(visits.masks) not in offset:
                offset[id(visits.masks)] = sum(map(len, masks))
                masks.append(visits.masks)
            (row, first, count), (part_row, page, mask) = extents.place(visits)
            runs.append((row + index * tiles, first, count))
            partial.append((part_row + index * tiles, page, mask + offset[id(visits.masks)]))
    rows = len(parts) * tiles
    full_ptr, full_first, full_count = _by_row(runs, rows)
    part_ptr, part_page, part_mask = _by_row(partial, rows)
    every = Masks.joined(masks)
    if len(masks) != 1:
        every, kind = every.distinct()
        part_mask = kind[part_mask]
    if not keep_masks:
        every, part_mask = every.named(part_mask)
    return TileTable(
        block_q=blocks[0],
        block_k=blocks[1],
        tiles=tiles,
        own_pages=own_pages,
        guest_pages=guest_pages,
        head_table=tuple(head_table),
        full_ptr=full_ptr.astype(np.int32),
        full_first=full_first.astype(np.int32),
        full_count=full_count.astype(np.int32),
        part_ptr=part_ptr.astype(np.int32),
        part_page=part_page.astype(np.int32),
        part_mask=part_mask.astype(np.int32),
        masks=every,
    )


def _by_row(parts: list[tuple[Ints, Ints, Ints]], rows: int) -> tuple[Ints, Ints, Ints]:
    """(ptr, a, b) of entries (row, a, b), ordered by row and then by a."""
    if not parts:
        return np.zeros(rows + 1, np.int64), _NONE, _NONE
    row, a, b = parts[0] if len(parts) == 1 else (np.concatenate(x) for x in zip(*parts, strict=True))
    key = row * (int(a.max(initial=0)) + 1) + a
    if (key[1:] < key[:-1]).any():
        order = np.argsort(key, kind="stable")
        row, a, b = row[order], a[order], b[order]
    ptr = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=rows), out=ptr[1:])
    return ptr, a, b

"""What each rank computes and sends, stage by stage, for all ranks at once and without their tile tables.

Intervals of pages are counted where they begin and end, so that a plan for a thousand ranks takes no longer than its
outline. Where a ring has more ranks and segments than are worth telling apart, its stages are taken to be alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distattn import spans as sp
from distattn.axis import Axis
from distattn.layout import Layout
from distattn.outline import Outline, guest_pages, owned_pages
from distattn.spans import Ints, Spans

Floats = NDArray[np.float64]
# Numbers in a table of ranks by segments, above which a ring's stages are taken to be alike.
_MOST = 1 << 19


@dataclass(frozen=True)
class Tiles:
    """What launches visit, over all query heads; each float64 [ranks].

    visits: (head, tile) pairs. masked: those with a mask. rows: rows of tiles.
    """

    visits: Floats
    rows: Floats
    masked: Floats


@dataclass(frozen=True)
class Load:
    """One stage of all ranks.

    kind: of the transfer of pages, see ``messages.Transfer``. distance: from whom it comes in a ring, else None.
    sent, received: rows of one key/value head; float64 [ranks]. guest_rows: room for them, by key/value head.
    joins: whether heads have other guests than one another: then what travels is packed piece by piece, and joined.
    shared: rows of gathered keys that a rank has, and all of them: these come first. alone, guests: query tiles that
        visit no page of another rank, and the others. resumes: whether it goes on from what earlier stages made.
    """

    kind: str
    distance: int | None
    sent: Floats
    received: Floats
    guest_rows: Floats
    joins: bool
    shared: tuple[Floats, float]
    alone: Tiles
    guests: Tiles
    resumes: bool


def stage_loads(outline: Outline, layout: Layout, kv_heads: int, schedule: str, slices: int) -> list[Load]:
    """The stages of a schedule of ``plan.SCHEDULES``."""
    view = _View(outline, layout, kv_heads)
    if schedule == "ring" and layout.world_size > 1:
        return view.ring()
    return view.slices(slices)


class _View:
    """Counts over one layout."""

    def __init__(self, outline: Outline, layout: Layout, kv_heads: int) -> None:
        self.outline, self.layout, self.kv_heads = outline, layout, kv_heads
        self.world, self.block = layout.world_size, outline.grid_k.block
        self.tile_owner, self.page_owner = layout.owners(outline.grid_q.block), layout.owners(self.block)
        self.owned = owned_pages(layout, self.block)
        self.heads = np.bincount(outline.table_of, minlength=len(outline.main))
        self.groups = guest_pages(outline, layout, kv_heads)
        keys = outline.sharing.keys
        self.shared = np.bincount(layout.owner_of(keys), minlength=self.world).astype(np.float64)

    def slices(self, slices: int) -> list[Load]:
        """Each stage a slice of the key/value heads, or all of them."""
        visits, masked, reaches = self._tiles()

        def of(which: NDArray[np.bool_]) -> Tiles:
            """A slice of some query tiles, by their ranks."""
            counts = (visits, (which & (visits > 0)) * float(self.heads.sum()), masked)
            sums = [np.bincount(self.tile_owner, x * which, self.world) / slices for x in counts]
            return Tiles(*map(_floats, sums))

        received, room = np.zeros(self.world), np.zeros(self.world)
        sent = np.zeros(self.world)
        pages = len(self.page_owner)
        for heads, guests in self.groups:
            count = np.bincount(guests.row_of(), guests.stop - guests.start, self.world)
            received += len(heads) * self.block * count
            room = np.maximum(room, self.block * count)
            begin = np.bincount(guests.start, minlength=pages + 1) - np.bincount(guests.stop, minlength=pages + 1)
            sent += len(heads) * self.block * np.bincount(self.page_owner, np.cumsum(begin)[:-1], self.world)
        gathered = -(-len(self.outline.sharing.keys) // self.block) * self.block
        kind = "neighbours" if self._talks_to_few() else "all_to_all"
        return [
            Load(
                kind,
                None,
                sent / slices,
                received / slices,
                room + gathered,
                len(self.groups) > 1 and slices < self.kv_heads,
                (self.shared * self.kv_heads / slices, len(self.outline.sharing.keys) * self.kv_heads / slices),
                of(~reaches),
                of(reaches),
                resumes=False,
            )
        ] * slices

    def ring(self) -> list[Load]:
        """A stage for each distance between ranks; those but the first are one object where they are alike."""
        visits, masked = np.zeros((2, self.world, self.world)) if self._few else np.zeros((2, self.world, 2))
        for main, heads in zip(self.outline.main, self.heads, strict=True):
            owner = self.tile_owner[main.full.row_of()]
            visits += heads * self._by_distance(owner, main.full)
            away = (self.tile_owner[main.row] - self.page_owner[main.page]) % self.world
            away = away if self._few else np.minimum(away, 1)
            single = np.bincount(self.tile_owner[main.row] * visits.shape[1] + away, minlength=visits.size)
            masked += heads * single.reshape(visits.shape)
        pages = np.zeros_like(visits)
        for group, guests in self.groups:
            pages += len(group) * self._by_distance(guests.row_of(), guests)
        if not self._few:
            for found in (visits, masked, pages):
                found[:, 1] /= self.world - 1
        visits += masked
        tiles = np.bincount(self.tile_owner, minlength=self.world) * float(self.heads.sum())
        rows = np.minimum(tiles[:, None], visits)
        gathered, keys = self._gathered(), float(len(self.outline.sharing.keys))
        nothing = np.zeros(self.world)
        joins = len(self.groups) > 1
        empty = Tiles(nothing, nothing, nothing)
        here = Tiles(visits[:, 0] + gathered.visits, rows[:, 0], masked[:, 0] + gathered.masked)
        room = np.full(self.world, -(-keys // self.block) * self.block)
        shared = self.shared * self.kv_heads, keys * self.kv_heads
        loads = [Load("neighbours", 0, nothing, nothing, room, joins, shared, here, empty, resumes=False)]
        rank = np.arange(self.world)
        for distance in range(1, visits.shape[1]):
            received = self.block * pages[:, distance]
            sent = received[(rank + distance) % self.world]
            there = Tiles(visits[:, distance], rows[:, distance], masked[:, distance])
            step = received / self.kv_heads
            from_one = nothing, 0.0
            loads.append(
                Load("neighbours", distance, sent, received, step, joins, from_one, empty, there, resumes=True)
            )
        return loads if self._few else [loads[0], *[loads[1]] * (self.world - 1)]

    def _tiles(self) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Of each query tile: visits and masked visits over all heads, and whether some head's are of guests."""
        count = self.outline.grid_q.blocks
        visits, masked, reaches = np.zeros(count), np.zeros(count), np.zeros(count, np.bool_)
        for main, heads in zip(self.outline.main, self.heads, strict=True):
            row, full = main.full.row_of(), main.full
            size = full.stop - full.start
            owner = self.tile_owner[row]
            away = size - (self._owned_before(owner, full.stop) - self._owned_before(owner, full.start))
            single = np.bincount(main.row, minlength=count)
            visits += heads * (np.bincount(row, size, count) + single)
            masked += heads * single
            reaches[row[away > 0]] = True
            reaches[main.row[self.page_owner[main.page] != self.tile_owner[main.row]]] = True
        for part, heads in zip(self.outline.gathered, self.heads, strict=False):
            visits += heads * part.tiles
            masked += heads * np.bincount(part.row, minlength=count)
        return visits, masked, reaches

    def _gathered(self) -> Tiles:
        """What is visited of gathered pages."""
        visits, masked = np.zeros((2, self.world))
        for part, heads in zip(self.outline.gathered, self.heads, strict=False):
            visits += heads * np.bincount(self.tile_owner, part.tiles, self.world)
            masked += heads * np.bincount(self.tile_owner[part.row], minlength=self.world)
        return Tiles(visits, np.zeros(self.world), masked)

    def _owned_before(self, rank: Ints, page: Ints) -> Ints:
        """How many pages before a page a rank owns."""
        size = self.owned.stop - self.owned.start
        line = len(self.page_owner) + 1
        of = self.owned.row_of()
        at = np.searchsorted(of * line + self.owned.start, rank * line + page, side="right") - 1
        before = np.cumsum(size) - size
        before = before - before[self.owned.ptr[of]]
        inside = before[at] + np.minimum(page - self.owned.start[at], size[at])
        return np.where((at >= 0) & (of[at] == rank), inside, 0)

    @property
    def _few(self) -> bool:
        """Whether ranks and segments are few enough to tell a ring's stages apart."""
        return self.world * len(self.layout.start) <= _MOST

    def _by_distance(self, rank: Ints, spans: Spans) -> Floats:
        """Pages in the intervals of each rank: [ranks, ranks], those that the rank at each distance before it owns, or
        [ranks, 2], its own and the others. rank: int64 [intervals]."""
        if not self._few:
            own = self._owned_before(rank, spans.stop) - self._owned_before(rank, spans.start)
            total, mine = (np.bincount(rank, x, self.world) for x in (spans.stop - spans.start, own))
            return np.stack((mine, total - mine), axis=1)
        # Pages before x that a rank owns: those of whole segments before, and of the segment that x is in.
        start, stop = self.layout.start // self.block, -(-self.layout.stop // self.block)
        segments = len(start)
        ends, sign = np.concatenate((spans.start, spans.stop)), np.repeat((-1.0, 1.0), len(spans.start))
        ranks = np.concatenate((rank, rank))
        segment = np.searchsorted(start, ends, side="right") - 1
        by_segment = np.bincount(ranks * segments + segment, sign, self.world * segments).reshape(self.world, segments)
        inside = np.minimum(ends, stop[segment]) - start[segment]
        parts = np.bincount(ranks * self.world + self.layout.owner[segment], sign * inside, self.world**2)
        owned = np.zeros((segments, self.world))
        owned[np.arange(segments), self.layout.owner] = stop - start
        found = by_segment @ (np.cumsum(owned, axis=0) - owned) + parts.reshape(self.world, self.world)
        each = np.arange(self.world)
        return np.asarray(found[each[:, None], (each[:, None] - each) % self.world])

    def _talks_to_few(self) -> bool:
        """Whether nobody has guests of more than two others, nor gives to more."""
        start, stop = self.layout.start // self.block, -(-self.layout.stop // self.block)
        journeys = []
        for _, guests in self.groups:
            low = np.searchsorted(stop, guests.start, side="right")
            count = np.searchsorted(start, guests.stop, side="left") - low
            if count.sum() > _MOST:  # too many to look at
                return False
            giver = self.layout.owner[sp.concat_ranges(low, count)]
            journeys.append(np.unique(np.repeat(guests.row_of(), count) * self.world + giver))
        taker, giver = np.divmod(np.unique(np.concatenate(journeys)), self.world)
        return bool(max(np.bincount(x, minlength=1).max() for x in (taker, giver)) <= 2)


def _floats(x: NDArray[Any]) -> Floats:
    return np.asarray(x, np.float64)


def guest_query_tiles(outline: Outline, layout: Layout) -> Tiles:
    """What guest queries visit of each rank's pages."""
    share = layout.tokens() / layout.seq_len
    heads = np.bincount(outline.table_of, minlength=len(outline.main))
    visits = sum(float(n * v.tiles.sum()) for n, v in zip(heads, outline.whole, strict=False))
    masked = sum(float(n * len(v.row)) for n, v in zip(heads, outline.whole, strict=False))
    rows = float(heads.sum() * _tiles_of(outline.guest_q, outline))
    return Tiles(visits * share, np.full(layout.world_size, rows), masked * share)


def _tiles_of(axis: Axis, outline: Outline) -> int:
    return axis.blocks if len(outline.sharing.queries) else 0

"""One rank's arena, stage by stage: which pages come from whom, where they lie, and what its query tiles visit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distattn import spans as sp
from distattn.kernels.table import TileTable
from distattn.layout import Layout
from distattn.levels import OnDevices
from distattn.messages import Message, Transfer, join_runs, to_everyone
from distattn.outline import Outline, guest_pages
from distattn.spans import Bools, Ints, Spans
from distattn.tiles import Extents, assemble


@dataclass(frozen=True, eq=False)
class Stage:
    """One exchange and the tiles that it completes.

    shared, pages: what to bring into the guest buffer, of ``guest_rows`` rows: gathered keys, which nearly all tiles
        visit and which come first, as ``shared_pages`` pages; and pages of other ranks.
    table: what the rank's query tiles visit in this stage.
    kv_heads: the key/value heads that the stage is about; transfers and table count heads from the first of them.
    resumes: whether query tiles go on from what earlier stages made of them.
    """

    shared: Transfer | None
    pages: Transfer | None
    shared_pages: int
    guest_rows: int
    table: TileTable
    kv_heads: range
    resumes: bool

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """All of them, in the order in which they begin."""
        return tuple(transfer for transfer in (self.shared, self.pages) if transfer is not None)

    @cached_property
    def alone(self) -> TileTable:
        """The table of the query tiles that visit the rank's own pages and gathered keys only."""
        return self.table.subset(~self._visits_pages)

    @cached_property
    def with_guests(self) -> TileTable:
        """The table of the query tiles that visit pages of other ranks, with all that they visit."""
        return self.table.subset(self._visits_pages)

    @cached_property
    def _visits_pages(self) -> Bools:
        return self.table.visits_from(self.table.own_pages + self.shared_pages)


@dataclass(frozen=True, eq=False)
class GuestQueries(OnDevices):
    """Global query rows, which every rank attends with over the pages that it owns.

    positions: int64 [n], ascending: all of them.
    mine: int64 [m]: those that this rank owns, as rows of its own tokens.
    transfer: brings all rows' queries; its reverse takes partial results home.
    table: what the gathered rows visit among this rank's own pages.
    """

    positions: Ints
    mine: Ints
    transfer: Transfer
    table: TileTable


class ArenaBuilder:
    """Lays out one rank's arena, stage by stage."""

    def __init__(self, outline: Outline, layout: Layout, kv_heads: int, rank: int) -> None:
        self.outline, self.layout, self.kv_heads, self.rank = outline, layout, kv_heads, rank
        self.blocks = (outline.grid_q.block, outline.grid_k.block)
        self.world_size = layout.world_size
        groups = guest_pages(outline, layout, kv_heads)
        self.kv_groups = [heads for heads, _ in groups]
        self.guests = [guests for _, guests in groups]
        self.page_owner = layout.owners(self.blocks[1])
        self.my_tiles = np.flatnonzero(layout.owners(self.blocks[0]) == rank)
        self.my_pages = np.flatnonzero(self.page_owner == rank)
        self.own = Extents.of(self.my_pages, 0)
        self.heads = len(outline.table_of)
        self.gathered_pages = -(-len(outline.sharing.keys) // self.blocks[1])

    def stages(self, schedule: str, slices: int = 1) -> tuple[Stage, ...]:
        """By the schedules of plan.py; slices: of key/value heads, which they divide."""
        if schedule == "ring":
            # In stage s this rank receives from the one s before it, and sends to the one s after it.
            sources = [[], *([(self.rank - s) % self.world_size] for s in range(1, self.world_size))]
            return tuple(self._stage(source, range(self.kv_heads), s) for s, source in enumerate(sources))
        everyone = [r for r in range(self.world_size) if r != self.rank]
        size = self.kv_heads // slices
        return tuple(self._stage(everyone, range(at, at + size)) for at in range(0, self.kv_heads, size))

    def guest_queries(self) -> GuestQueries | None:
        positions = self.outline.sharing.queries
        if not len(positions):
            return None
        transfer = self._gather(positions, tuple(range(self.heads)))
        assert transfer is not None
        parts = [[(visits, self.own)] for visits in self.outline.whole]
        table = assemble(parts, self.outline.table_of, self.outline.guest_q.blocks, self.blocks, len(self.my_pages), 0)
        mine = self.layout.local_rows(positions[self.layout.owner_of(positions) == self.rank], self.rank)
        return GuestQueries(positions, mine, transfer, table)

    def _stage(self, sources: list[int], kv_heads: range, distance: int | None = None) -> Stage:
        """The stage in which this rank holds guest pages of ``sources``; in a ring, of the rank at ``distance``."""
        own = not distance  # a ring's first stage, or any other
        base = self.gathered_pages if own else 0
        sends: list[Message] = []
        receives: list[Message] = []
        extents: list[Extents] = []
        guest_pages = base
        targets = sources if distance is None else [(self.rank + distance) % self.world_size] if distance else []
        for group, guests in zip(self.kv_groups, self.guests, strict=True):
            pages = _row(guests, self.rank)
            pages = pages[np.isin(self.page_owner[pages], sources)]
            # By owner: what comes from one is in one piece.
            pages = pages[np.argsort(self.page_owner[pages], kind="stable")]
            guest = Extents.of(pages, len(self.my_pages) + base)
            extents.append(self.own.joined(guest) if own else guest)
            heads = tuple(head - kv_heads.start for head in group if head in kv_heads)
            if not heads:
                continue
            guest_pages = max(guest_pages, base + len(pages))
            for peer in sources:
                which = np.flatnonzero(self.page_owner[pages] == peer)
                if len(which):
                    receives.append(Message(peer, heads, self._page_rows(base + which, pages[which])))
            for peer in targets:
                wanted = _row(guests, peer)
                wanted = wanted[self.page_owner[wanted] == self.rank]
                if len(wanted):
                    sends.append(Message(peer, heads, self._page_rows(np.searchsorted(self.my_pages, wanted), wanted)))
        sends.sort(key=lambda m: m.peer)
        receives.sort(key=lambda m: m.peer)
        shared = self._gather(self.outline.sharing.keys, tuple(range(len(kv_heads)))) if own else None
        transfer = None
        if self.world_size > 1 and distance != 0:
            kind = self._direct_kind if distance is None else "neighbours"
            transfer = Transfer(kind, tuple(sends), tuple(receives), tuple(sends))
        table = self._table(extents, own, guest_pages, kv_heads)
        return Stage(shared, transfer, base, guest_pages * self.blocks[1], table, kv_heads, bool(distance))

    @cached_property
    def _direct_kind(self) -> str:
        """Pairs where every rank talks to few others, a collective otherwise; the same answer on all ranks."""
        talks = np.zeros((self.world_size, self.world_size), np.bool_) if self.world_size <= 4096 else None
        if talks is None:
            return "all_to_all"
        for guests in self.guests:
            row = guests.row_of()
            first = np.searchsorted(self.layout.stop, guests.start * self.blocks[1], side="right")
            last = np.searchsorted(self.layout.start, guests.stop * self.blocks[1], side="left")
            count = last - first
            talks[np.repeat(row, count), self.layout.owner[sp.concat_ranges(first, count)]] = True
        return "neighbours" if talks.sum(axis=1).max() <= 2 and talks.sum(axis=0).max() <= 2 else "all_to_all"

    def _table(self, extents: list[Extents], own: bool, guest_pages: int, kv_heads: range) -> TileTable:
        """Tables by (distinct pattern, group of key/value heads), since a group has its own guest pages."""
        share = self.heads // self.kv_heads
        group_of = {head: g for g, heads in enumerate(self.kv_groups) for head in heads}
        heads = range(kv_heads.start * share, kv_heads.stop * share)
        pairs = [(self.outline.table_of[h], group_of[h // share]) for h in heads]
        distinct = list(dict.fromkeys(pairs))
        mine = [visits.rows(self.my_tiles) for visits in self.outline.main]
        gathered = [visits.rows(self.my_tiles) for visits in self.outline.gathered] if own else []
        at_gathered = Extents.of(np.arange(self.gathered_pages), len(self.my_pages))
        parts = []
        for table, group in distinct:
            part = [(mine[table], extents[group])]
            if gathered:
                part.append((gathered[table], at_gathered))
            parts.append(part)
        return assemble(
            parts,
            [distinct.index(pair) for pair in pairs],
            len(self.my_tiles),
            self.blocks,
            len(self.my_pages),
            guest_pages,
        )

    def _page_rows(self, at: Ints, pages: Ints) -> Ints:
        """Runs of buffer rows of pages that lie at page slots ``at``; the sequence's last page may be short."""
        block = self.blocks[1]
        length = np.minimum(block, self.layout.seq_len - pages * block)
        return join_runs(at * block, at * block + length)

    def _gather(self, positions: Ints, heads: tuple[int, ...]) -> Transfer | None:
        """Brings rows of scattered positions to every rank, in order, to the front of a buffer."""
        if not len(positions):
            return None
        owner = self.layout.owner_of(positions)
        local = self.layout.local_rows(positions[owner == self.rank], self.rank)
        return to_everyone(owner, local, heads, self.rank, self.world_size)


def _row(spans: Spans, row: int) -> Ints:
    """Every position in the intervals of one row."""
    part = slice(spans.ptr[row], spans.ptr[row + 1])
    return sp.concat_ranges(spans.start[part], spans.stop[part] - spans.start[part])

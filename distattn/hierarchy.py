"""Where the levels of a spec lie: summaries of the whole sequence, and what one rank makes, brings and visits of them.

Every rank pools the level-1 chunks that it owns. These travel to all ranks, which make the higher levels of them,
alike. So each rank has all summaries in one buffer, level by level, each level padded to whole pages.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distattn.algebra import Dense, Pattern
from distattn.axis import Axis
from distattn.cost import Work
from distattn.kernels.chunks import Choosing, Ladder, Rung
from distattn.kernels.table import TileTable
from distattn.layout import Layout
from distattn.levels import Level, OnDevices, packed
from distattn.messages import Transfer, to_everyone
from distattn.patterns import Causal
from distattn.segment_patterns import Chunked
from distattn.spans import Bools, Ints
from distattn.spec import AttentionSpec
from distattn.tiles import Extents, assemble, visit

_NONE = np.zeros(0, np.int64)


class Hierarchy(OnDevices):
    """The levels and chunks of one spec on one rank. Raises ValueError if the sequence is shorter than a summary.

    Attributes:
        levels: of summaries.
        left_out: int64, ascending: global keys, which are not pooled.
        global_rows: int64: this rank's global queries, as rows of its own tokens.
        window: (chunk, reach) of level 0, where it is a chunk window; the own chunk with merge="gate".
    """

    def __init__(
        self, spec: AttentionSpec, layout: Layout, heads: int, kv_heads: int, blocks: tuple[int, int], rank: int
    ) -> None:
        self.spec, self.layout, self.rank, self.blocks = spec, layout, rank, blocks
        self.heads, self.kv_heads, self.length, self.causal = heads, kv_heads, layout.seq_len, spec.causal
        window = spec.window if spec.merge == "softmax" else None
        tokens, keys = (window.global_tokens, window.global_keys) if window else ((), ())
        globals_ = np.unique(np.asarray([*tokens, *keys], np.int64))
        self.left_out = globals_[globals_ < self.length]
        self.global_rows = self._local(np.asarray([n for n in tokens if n < self.length], np.int64))
        if window is not None:
            self.window = window.chunk, window.reach
        else:
            self.window = (spec.select.chunk, 1) if spec.select else (1, 1)
        self.levels = self._make_levels()

    @property
    def rows(self) -> int:
        """Of the summary buffer."""
        last = self.levels[-1]
        return last.first_row + self._padded(last.count)

    @property
    def page(self) -> int:
        """Rows of a page of the summary buffer where chunks are chosen: few, since what takes the place of a coarse
        summary are a few rows here and there."""
        return 32 if self.blocks[1] % 32 == 0 else self.blocks[1]

    def _padded(self, count: int) -> int:
        return -(-count // self.blocks[1]) * self.blocks[1]

    def _make_levels(self) -> tuple[Level, ...]:
        levels: list[Level] = []
        first_row = 0
        for number, summaries in enumerate(self.spec.summaries):
            if summaries.overlaps:  # whole chunks only
                if self.length < summaries.chunk:
                    raise ValueError(
                        f"seq_len is {self.length}; expected at least {summaries.chunk}, the chunk of summaries"
                    )
                start = np.arange(0, self.length - summaries.chunk + 1, summaries.step)
            else:
                start = np.arange(0, self.length, summaries.chunk)
            stop = np.minimum(start + summaries.chunk, self.length)
            size = stop - start - (np.searchsorted(self.left_out, stop) - np.searchsorted(self.left_out, start))
            below = 1 if number == 0 else levels[-1].chunk
            members = summaries.chunk // below
            levels.append(Level(summaries.chunk, summaries.step, members, start, stop, size, first_row))
            first_row += self._padded(len(start))
        return tuple(levels)

    def visible(self, number: int) -> Pattern:
        """Which queries attend to a summary of a level, as a pattern of its positions ``_places``."""
        level = self.levels[number]
        if self.spec.merge == "gate":
            return Causal() if self.causal else Dense()
        reach = self.window[1] if number == 0 else self.spec.summaries[number - 1].reach
        assert reach is not None
        # Causal ones are intervals, which is what makes planning quick.
        count = max(level.count, reach)
        pattern: Pattern = (
            Chunked(level.chunk, count, -reach) if self.causal else ~Chunked(level.chunk, *[reach - 1] * 2)
        )
        further = self.spec.summaries[number].reach
        if further is not None:
            coarser = self.levels[number + 1].chunk
            pattern = Chunked(coarser, further - 1, 0 if self.causal else further - 1) & pattern
        return pattern

    def _places(self, level: Level) -> Ints:
        """What stands for a summary in patterns: with gates its last position, so that causality is enough."""
        return level.stop - 1 if self.spec.merge == "gate" else level.start

    @cached_property
    def table(self) -> TileTable:
        """What this rank's query tiles visit of the summary buffer, where nothing is selected."""
        tiles = np.flatnonzero(self.layout.owners(self.blocks[0]) == self.rank)
        queries = Axis.grid(self.length, self.blocks[0])
        parts = []
        for number, level in enumerate(self.levels):
            places = self._places(level)
            keys = Axis(self.length, self.blocks[1], gathered=places, skip=places[level.size == 0])
            visits = visit(self.visible(number), queries, keys).rows(tiles)
            parts.append((visits, Extents.of(np.arange(keys.blocks), level.first_row // self.blocks[1])))
        return assemble([parts], [0] * self.heads, len(tiles), self.blocks, self.rows // self.blocks[1], 0)

    def transfers(self, what: str) -> tuple[Transfer, int]:
        """One of what travels to all ranks, by name, and how many rows that is."""
        if what == "summaries":
            return self.gather, self.levels[0].count
        if what == "chunks":
            return self.gather_chunks, self.chunks
        found = self.halo if what == "halo" else self.tile_before
        assert found is not None, what
        return found[0], len(found[1])

    @cached_property
    def gather(self) -> Transfer:
        """Brings every rank's level-1 summaries to all, in the order of the chunks."""
        level = self.levels[0]
        owner = self.layout.owner_of(level.start)
        heads = tuple(range(self.kv_heads))
        mine = np.arange(int((owner == self.rank).sum()))
        return to_everyone(owner, mine, heads, self.rank, self.layout.world_size)

    @cached_property
    def my_chunks(self) -> Ints:
        """int64: the level-1 summaries that this rank pools, in the order of its rows."""
        return np.flatnonzero(self.layout.owner_of(self.levels[0].start) == self.rank)

    @cached_property
    def halo(self) -> tuple[Transfer, Ints] | None:
        """Where summaries overlap: rows that follow segments, brought to all ranks, and their positions."""
        level = self.levels[0]
        more = level.chunk - level.stride
        if more == 0 or self.layout.world_size == 1:
            return None
        ends = self.layout.stop[self.layout.stop < self.length]
        positions = np.unique(np.minimum((ends[:, None] + np.arange(more)).ravel(), self.length - 1))
        return self._bring(positions, self.kv_heads), positions

    @property
    def overlap_rows(self) -> Ints:
        """int64 [summaries, chunk], where summaries overlap: the rows of each that this rank pools, of its own rows and
        those of the halo behind them."""
        level, positions = self.levels[0], self.positions
        if self.halo is not None:
            positions = np.concatenate((positions, self.halo[1]))
        wanted = level.start[self.my_chunks][:, None] + np.arange(level.chunk)
        order = np.argsort(positions, kind="stable")  # of a position that is here twice, its own row
        return order[np.searchsorted(positions[order], wanted)]

    @cached_property
    def positions(self) -> Ints:
        """int64 [tokens]: of this rank's rows."""
        return np.concatenate([np.arange(*segment) for segment in self.layout.segments(self.rank)] or [_NONE])

    @cached_property
    def left_out_rows(self) -> Bools:
        """bool [tokens]: which of this rank's rows are global keys."""
        return np.isin(self.positions, self.left_out)

    # What selection needs.

    @property
    def level_is_chunks(self) -> bool:
        """Whether the summaries of level 1 stand for the chunks that are chosen."""
        return bool(self.levels) and self.levels[0].chunk == self.levels[0].stride == self.chunk

    @property
    def chooses_by_tile_before(self) -> bool:
        select = self.spec.select
        return select is not None and select.per == "tile" and self.causal and not select.lookahead

    @property
    def chunk(self) -> int:
        assert self.spec.select is not None
        return self.spec.select.chunk

    @property
    def tile(self) -> int:
        """Queries that choose together."""
        return 1 if self.spec.select is not None and self.spec.select.per == "token" else self.chunk

    @property
    def head_table(self) -> tuple[int, ...]:
        """Of each query head, which choice is its."""
        assert self.spec.select is not None
        share = self.heads // self.kv_heads if self.spec.select.heads == "kv" else 1
        return tuple(head // share for head in range(self.heads))

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @cached_property
    def chunk_size(self) -> Ints:
        """int64 [chunks]: how many of a chunk's tokens are not global keys; 0: no candidate."""
        start = np.arange(self.chunks) * self.chunk
        stop = np.minimum(start + self.chunk, self.length)
        return stop - start - (np.searchsorted(self.left_out, stop) - np.searchsorted(self.left_out, start))

    @property
    def selectable(self) -> Bools:
        """bool [chunks]: which chunks are candidates, wherever they lie."""
        return self.chunk_size > 0

    @property
    def chunk_centre(self) -> NDArray[np.float64]:
        start = np.arange(self.chunks) * self.chunk
        return np.asarray((start + np.minimum(start + self.chunk, self.length) - 1) / 2)

    @property
    def chooses_whole_chunks(self) -> bool:
        """Whether no candidate is short of a token for a global key, and no chunk, candidate or not, at the end."""
        return self.length % self.chunk == 0 and bool((self.chunk_size[self.selectable] == self.chunk).all())

    @property
    def chunk_masks(self) -> NDArray[np.int32]:
        """int32 [chunks, words]: bits of a chunk's tokens that are there and not global keys."""
        allowed = np.zeros(self.chunks * self.chunk, np.bool_)
        allowed[: self.length] = True
        allowed[self.left_out] = False
        return packed(allowed.reshape(self.chunks, self.chunk))

    @cached_property
    def choosing(self) -> Choosing:
        """How chunks are chosen, for the kernels."""
        select = self.spec.select
        assert select is not None
        mass, level = select.score == "mass", self.levels[0] if self.levels else None
        return Choosing(
            self.chunks,
            select.k,
            self.window[1],
            self.causal,
            select.always,
            mass,
            self.chunk // level.stride if mass and level else 1,
            level.chunk // level.stride if mass and level else 1,
            self.heads // self.kv_heads if select.heads == "kv" else 1,
            self.chunk // self.tile,
        )

    @property
    def tile_chunk(self) -> NDArray[np.int32]:
        """int32 [tiles]: the chunk that each of this rank's query tiles is in."""
        return (self.tile_position // self.chunk).astype(np.int32)

    @property
    def tile_until(self) -> NDArray[np.int32]:
        """int32 [tiles]: how many columns of scores there are for a tile: chunks to choose from, or, where their mass
        decides, summaries that end by its first query."""
        position = self.tile_position
        if not self.choosing.mass:
            before = np.clip(position // self.chunk - self.window[1] + 1, 0, self.chunks)
            return (before if self.causal else np.full_like(position, self.chunks)).astype(np.int32)
        end = position + (self.tile == 1)
        visible = np.searchsorted(self.levels[0].stop, end, side="right")
        return (visible if self.causal else np.full_like(position, self.levels[0].count)).astype(np.int32)

    @cached_property
    def ladder(self) -> Ladder:
        """What is visited of the summary buffer beside chosen chunks, for the kernels."""
        rungs: list[Rung] = []
        for number, level in enumerate(self.levels):
            reach = self.window[1] if number == 0 else self.spec.summaries[number - 1].reach
            further, coarser = self.spec.summaries[number].reach, self.levels[number + 1 : number + 2]
            assert reach is not None
            members = coarser[0].members if coarser else 1
            rungs.append(Rung(level.chunk, level.count, level.first_row, reach, further or 0, members))
        return Ladder(rungs, self.causal, self.chunk, self.page, self.rows // self.page, self._most_pages())

    def _most_pages(self) -> int:
        """No tile visits more pages of the summary buffer than this."""
        total = 0
        for number, level in enumerate(self.levels):
            pages = here = -(-level.count // self.page)
            further = self.spec.summaries[number].reach
            if further is not None:
                members = self.levels[number + 1].members
                sides = 1 if self.causal else 2
                here = sides * (further * members // self.page + 2)
                here += self.choosing.most * (members // self.page + 2)
            total += min(pages, here)
        return total

    @property
    def row_bits(self) -> NDArray[np.int32]:
        """int32 [pages of the summary buffer, words]: bits of the rows that are summaries."""
        exists = np.zeros(self.rows, np.bool_)
        for level in self.levels:
            exists[level.first_row : level.first_row + level.count] = level.exists
        return packed(exists.reshape(-1, self.page))

    @property
    def own_page(self) -> Ints:
        """int64 [chunks]: where this rank has a chunk among its rows, or -1."""
        found = np.full(self.chunks, -1, np.int64)
        found[self.my_selectable] = np.arange(len(self.my_selectable))
        return found

    @property
    def tile_position(self) -> Ints:
        """int64 [tiles]: the first query of each of this rank's tiles."""
        return self.positions if self.tile == 1 else self.my_selectable * self.chunk

    @cached_property
    def my_selectable(self) -> Ints:
        """int64: the chunks that this rank owns, in the order of its rows."""
        return np.flatnonzero(self.chunk_owner == self.rank)

    @cached_property
    def chunk_owner(self) -> Ints:
        return self.layout.owners(self.chunk)

    @cached_property
    def pairs_by_owner(self) -> Ints:
        """int64 [kv_heads * chunks]: numbers (head * chunks + chunk), by the chunk's owner, head and chunk."""
        owner = np.tile(self.chunk_owner, self.kv_heads)
        return np.argsort(owner, kind="stable")

    @cached_property
    def pairs_of_owner(self) -> Ints:
        """int64 [world_size + 1]: where each owner's begin in ``pairs_by_owner``."""
        counts = np.bincount(self.chunk_owner, minlength=self.layout.world_size) * self.kv_heads
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))

    @cached_property
    def gather_chunks(self) -> Transfer:
        """Brings something of every rank's chunks to all, in the order of the chunks."""
        mine = np.arange(len(self.my_selectable))
        return to_everyone(self.chunk_owner, mine, tuple(range(self.kv_heads)), self.rank, self.layout.world_size)

    @cached_property
    def tile_before(self) -> tuple[Transfer, Ints] | None:
        """Of tiles of a chunk each: those before segments, brought to all ranks as rows of ``my_selectable``."""
        tiles = self.layout.start[self.layout.start > 0] // self.chunk - 1
        if len(tiles) == 0:
            return None
        owner = self.chunk_owner[tiles]
        mine = np.searchsorted(self.my_selectable, tiles[owner == self.rank])
        return to_everyone(owner, mine, tuple(range(self.heads)), self.rank, self.layout.world_size), tiles

    @property
    def rows_before(self) -> Ints:
        """int64 [tiles]: of each of this rank's tiles, where the one before it is among these and ``tile_before``."""
        known = self.my_selectable
        if self.tile_before is not None:
            known = np.concatenate((known, self.tile_before[1]))
        order = np.argsort(known, kind="stable")
        return order[np.searchsorted(known[order], np.maximum(self.my_selectable - 1, 0))]

    def _bring(self, positions: Ints, heads: int) -> Transfer:
        owner = self.layout.owner_of(positions)
        return to_everyone(owner, self._local(positions), tuple(range(heads)), self.rank, self.layout.world_size)

    def _local(self, positions: Ints) -> Ints:
        """Those of some positions that this rank owns, as rows of its own tokens."""
        return self.layout.local_rows(positions[self.layout.owner_of(positions) == self.rank], self.rank)

    def sent_bytes(self, itemsize: int, head_dim: int, value_dim: int) -> int:
        """Bytes that this rank sends in a forward pass of a batch of one, but for chosen pages."""
        wide, world, sent = max(itemsize, 4), self.layout.world_size, 0
        if self.levels:
            sent += self.gather.sent_bytes(wide * (head_dim + value_dim), self.rank, world)
            if self.halo is not None:
                sent += self.halo[0].sent_bytes(itemsize * (head_dim + value_dim), self.rank, world)
        if self.spec.select is not None:
            if not self.level_is_chunks and self.spec.select.score == "mean":
                sent += self.gather_chunks.sent_bytes(wide * head_dim, self.rank, world)
            if self.chooses_by_tile_before and self.tile_before is not None:
                sent += self.tile_before[0].sent_bytes(wide * head_dim, self.rank, world)
        return sent

    def sent_bytes_backward(self, itemsize: int, head_dim: int, value_dim: int) -> int:
        """The same of a backward pass. Choices have no gradient."""
        wide, sent = max(itemsize, 4), 0
        if self.levels:
            sent += self.gather.returned_bytes(wide * (head_dim + value_dim), self.rank)
            if self.halo is not None:
                sent += self.halo[0].returned_bytes(wide * (head_dim + value_dim), self.rank)
        return sent

    def work(self, itemsize: int, head_dim: int, value_dim: int) -> list[Work]:
        """What summaries and chosen chunks add to each rank's forward pass of a batch of one.

        Chosen pages that travel are not among the bytes: the data decide which do.
        """
        world, wide = self.layout.world_size, max(itemsize, 4)
        first, size, summaries, chosen = self.visited()
        owner = self.layout.owner_of(first)
        pairs = np.bincount(owner, (summaries + chosen) * size, world) * self.heads
        sent, received = np.zeros((2, world))
        if self.levels and world > 1:
            owned = np.bincount(self.layout.owner_of(self.levels[0].start), minlength=world).astype(np.float64)
            row = self.kv_heads * wide * (head_dim + value_dim)
            sent, received = owned * (world - 1) * row, (owned.sum() - owned) * row
        return [
            Work(
                tiles=0.0,
                pairs=float(pairs[r]),
                flops=float(pairs[r]) * 2 * (head_dim + value_dim),
                bytes_sent=float(sent[r]),
                bytes_received=float(received[r]),
                guest_rows=float(self.rows if self.levels else 0),
            )
            for r in range(world)
        ]

    def pairs(self, unit: int) -> Ints:
        """int64 [units]: (query, summary) and (query, chosen token) pairs of all heads, by unit of so many queries."""
        first, size, summaries, chosen = self.visited()
        by_unit = np.bincount(first // unit, (summaries + chosen) * size, -(-self.length // unit))
        return by_unit.astype(np.int64) * self.heads

    def visited(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Runs of queries that visit alike: (first, how many, summaries, tokens of chosen chunks), of each query."""
        chunk, reach = self.window
        first = np.arange(0, self.length, chunk)
        size = np.minimum(self.length - first, chunk)
        summaries = np.zeros_like(first)
        if self.spec.merge == "gate":
            first, size = np.arange(self.length), np.ones(self.length, np.int64)
            summaries = np.zeros_like(first)
            for level in self.levels:
                summaries += np.searchsorted(level.stop, first + 1, side="right") if self.causal else level.count
        else:
            begin, end = self._edges(first, chunk, reach)
            for level, (outer, outer_end) in zip(self.levels, self._outer_edges(first), strict=True):
                summaries += (begin - outer) // level.chunk
                if not self.causal:
                    summaries += -(-(outer_end - end) // level.chunk)
                begin, end = outer, outer_end
        chosen = np.zeros_like(first)
        select = self.spec.select
        if select is not None:
            own = first // self.chunk
            candidates = np.maximum(own - self.window[1] + 1, 0)
            if not self.causal:
                candidates += np.maximum(self.chunks - own - self.window[1], 0)
            candidates += "own" in select.always
            chosen = np.minimum(candidates, max(select.k, len(select.always))) * self.chunk
        return first, size, summaries, chosen

    def opened(self, first: Ints, chosen: Ints) -> NDArray[np.float64]:
        """How many chosen chunks lie in a summary, whose members are visited in its place, level by level; as if every
        candidate were chosen as often. first, chosen: as in :meth:`visited`.
        """
        found = np.zeros(len(first))
        if self.spec.merge == "gate" or self.spec.select is None:
            return found
        for begin, end in self._outer_edges(first)[:-1]:
            beyond, candidates = (begin, first) if self.causal else (begin + self.length - end, self.length)
            found += chosen / self.chunk * beyond / np.maximum(candidates, 1)
        return found

    def _edges(self, position: Ints, chunk: int, reach: int) -> tuple[Ints, Ints]:
        at = position // chunk
        return np.maximum((at - reach + 1) * chunk, 0), np.minimum((at + reach) * chunk, self.length)

    def _outer_edges(self, position: Ints) -> list[tuple[Ints, Ints]]:
        found = []
        for number, summaries in enumerate(self.spec.summaries):
            if summaries.reach is None:
                found.append((np.zeros_like(position), np.full_like(position, self.length)))
            else:
                found.append(self._edges(position, self.levels[number + 1].chunk, summaries.reach))
        return found

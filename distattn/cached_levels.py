"""Chunk summaries of the sequences of a cache, and chunks that their new queries choose.

Every rank has all summaries, as in a pass over a whole sequence, and makes them of all new tokens, alike. What is still
to be pooled lies in rings, with room for as many members of each level as a summary has. A sequence's summaries lie in
one buffer, level by level, of which rank r attends to the pages p with p % ranks == r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distattn import spans as sp
from distattn.algebra import Pattern
from distattn.axis import Axis
from distattn.errors import ConfigError
from distattn.extras import AttentionExtras
from distattn.hierarchy import Hierarchy
from distattn.kernels.attention import accumulator_dtype
from distattn.kernels.chosen_pages import Where, chosen_pages
from distattn.kernels.chunks import Choosers, choose_chunks, summary_pages
from distattn.kernels.rows import chunk_means, store_rows
from distattn.kernels.selected import SelectedTable
from distattn.kernels.table import TileTable
from distattn.layout import make_layout
from distattn.levels import Level, OnDevices, packed
from distattn.paged import Tiles, moved
from distattn.spans import Ints
from distattn.spec import AttentionSpec
from distattn.summaries import pool_members
from distattn.tiles import Extents, Visits, assemble, joined, visit

FEW = 16
"""Up to so many new tokens of a sequence are attended one by one; more are tiles."""


@dataclass(frozen=True)
class Sizes:
    """Of a cache: heads and dimensions, how long a sequence may be, how many there may be at a time.

    share: (rank, ranks): this one attends to the pages p of a buffer with p % ranks == rank.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    max_len: int
    sequences: int
    block_k: int
    dtype: torch.dtype
    device: torch.device
    share: tuple[int, int] = (0, 1)


@dataclass(frozen=True, eq=False)
class Asking(OnDevices):
    """The tiles of one sequence that choose, see :class:`Choosers`.

    query: int64 [tiles], which of the mean queries from the chunk before that of ``start`` on is each one's.
    """

    start: int
    number: Ints
    query: Ints
    own: NDArray[np.int32]
    until: NDArray[np.int32]

    @property
    def query_run(self) -> slice | None:
        """The mean queries as a slice, where they follow one another."""
        if not len(self.query) or (np.diff(self.query) != 1).any():
            return None
        return slice(int(self.query[0]), int(self.query[-1]) + 1)


class LevelPlan(OnDevices):
    """What layers of one spec share: its levels, for sequences of up to ``max_len`` tokens.

    Raises:
        ConfigError: it is not causal, or looks ahead: what is cached cannot depend on what comes.
    """

    def __init__(self, spec: AttentionSpec, sizes: Sizes) -> None:
        if not spec.causal:
            raise ConfigError(f"spec is {spec!r}; expected a causal one in a cache")
        if spec.select is not None and spec.select.lookahead:
            raise ConfigError("select.lookahead is True; expected False in a cache, whose rows do not see what follows")
        self.spec, self.sizes = spec, sizes
        step = spec.summaries[0].step if spec.summaries else 1
        chunk = spec.select.chunk if spec.select else 1
        layout = make_layout("contiguous", sizes.max_len, 1, math.lcm(step, chunk))
        blocks = sizes.block_k, sizes.block_k
        try:
            self.hierarchy = Hierarchy(spec, layout, sizes.heads, sizes.kv_heads, blocks, 0)
        except ValueError as error:
            raise ConfigError(f"max_len is {sizes.max_len}: {error}") from error

    @property
    def rows(self) -> int:
        """Of a sequence's buffer."""
        return self.hierarchy.rows if self.hierarchy.levels else 0

    @cached_property
    def pools(self) -> tuple[Level, ...]:
        """The levels, and last the chunks to choose from where no level has their mean keys."""
        levels, hierarchy = self.hierarchy.levels, self.hierarchy
        select = self.spec.select
        if select is None or select.score == "mass" or hierarchy.level_is_chunks:
            return levels
        start = np.arange(hierarchy.chunks) * select.chunk
        stop = np.minimum(start + select.chunk, hierarchy.length)
        return *levels, Level(select.chunk, select.chunk, select.chunk, start, stop, hierarchy.chunk_size, 0)

    @property
    def chooses_apart(self) -> bool:
        """Whether the last of ``pools`` is no level of summaries."""
        return len(self.pools) > len(self.hierarchy.levels)

    @cached_property
    def chooses_all_of_chunks(self) -> bool:
        """Whether all tokens of a chosen chunk are visited: it is none that a query is in, nor has it global keys."""
        select, hierarchy = self.spec.select, self.hierarchy
        size = hierarchy.chunk_size[:-1]  # the last one of the longest sequence no later query chooses
        return select is not None and "own" not in select.always and bool(((size == 0) | (size == select.chunk)).all())

    @cached_property
    def sub_page(self) -> int:
        """Rows of the pages as which chosen chunks are visited."""
        return math.gcd(self.hierarchy.chunk, self.sizes.block_k)

    @property
    def piece_bits(self) -> NDArray[np.int32]:
        """int32 [chunks * pieces, words]: bits of the tokens of pages of ``sub_page`` rows that are no global keys."""
        allowed = np.zeros(self.hierarchy.chunks * self.hierarchy.chunk, np.bool_)
        allowed[: self.hierarchy.length] = ~self.hierarchy.left_out_rows
        return packed(allowed.reshape(-1, self.sub_page))

    def tile(self, few: bool, block: int) -> tuple[int, int]:
        """(rows of a query tile, what its first position is a multiple of)."""
        if self.spec.select is None:
            return (1 if few else block), 1
        chunk = self.hierarchy.chunk
        if few or self.hierarchy.tile == 1:
            return 1, 1
        return (chunk if block % chunk else block), chunk

    def choice_tiles(self, tiles: Tiles, stop: Ints) -> Tiles:
        """The tiles that choose, of the same rows. stop: int64 [sequences], where the new positions of each end."""
        chunk = self.hierarchy.chunk
        return tiles if tiles.block == 1 else tiles.divided(chunk, (stop - 1) // chunk * chunk)

    def visited(self, tiles: Tiles) -> Visits:
        """What query tiles visit of the pages of their sequence's buffer, where nothing is chosen or choices have a
        softmax of their own."""
        queries, parts = Axis(self.sizes.max_len, tiles.block, first=tiles.first), []
        for level, (pattern, keys) in zip(self.hierarchy.levels, self._seen_of_levels, strict=True):
            parts.append(visit(pattern, queries, keys).shifted(level.first_row // self.sizes.block_k))
        return joined(parts)

    def visited_table(self, visits: Visits, tiles: Tiles, slot: Ints) -> TileTable:
        """A table of what :meth:`visited` has found. slot: int64 [sequences], whose buffer each has."""
        extents, pages = self._mine, self.rows // self.sizes.block_k
        there = moved(visits, slot[tiles.sequence] * pages, np.full(len(tiles), self.sizes.sequences * pages))
        blocks, heads = (tiles.block, self.sizes.block_k), (0,) * self.sizes.heads
        every = self.sizes.sequences * pages
        return assemble([[(there, extents)]], heads, len(tiles), blocks, every, 0, keep_masks=True)

    @cached_property
    def _seen_of_levels(self) -> list[tuple[Pattern, Axis]]:
        """Of each level who sees its summaries, and their pages."""
        found = []
        for number, level in enumerate(self.hierarchy.levels):
            places = level.stop - 1 if self.spec.merge == "gate" else level.start
            keys = Axis(self.sizes.max_len, self.sizes.block_k, gathered=places, skip=places[level.size == 0])
            found.append((self.hierarchy.visible(number), keys))
        return found

    @cached_property
    def _mine(self) -> Extents:
        """Which pages of the buffers are this rank's."""
        pages, (rank, ranks) = self.rows // self.sizes.block_k, self.sizes.share
        every = np.arange(self.sizes.sequences * pages)
        mine = every[every % pages % ranks == rank]
        return Extents.of(mine, mine)

    def asking(self, start: int, first: Ints) -> Asking:
        """What a sequence's tiles choose by. start: its first new position. first: int64 [tiles], of the tiles."""
        hierarchy, by = self.hierarchy, self.hierarchy.choosing
        chunk, position, number = hierarchy.chunk, first, first
        if hierarchy.chooses_by_tile_before:
            number = first // chunk
            position = number * chunk
        if by.mass:
            until = np.searchsorted(hierarchy.levels[0].stop, position + (hierarchy.tile == 1), side="right")
        else:
            until = np.clip(position // chunk - hierarchy.window[1] + 1, 0, hierarchy.chunks)
        own, ends = (x.astype(np.int32) for x in (position // chunk, until))
        return Asking(start, number, number - start // chunk, own, ends)

    def blind(self, tiles: Tiles) -> Ints:
        """int64: rows of the tiles that are global tokens, which attend to tokens alone."""
        window = self.spec.window if self.spec.merge == "softmax" else None
        positions = np.unique(np.asarray(window.global_tokens if window else (), np.int64))
        first, stop = (np.searchsorted(positions, at) for at in (tiles.first, tiles.first + tiles.block))
        tile, which = np.repeat(np.arange(len(tiles)), stop - first), sp.concat_ranges(first, stop - first)
        return tile * tiles.block + positions[which] - tiles.first[tile]

    def chosen_table(
        self, chosen: Tensor, tiles: Tiles, sub_pages: Tensor, first: Tensor, own_pages: int
    ) -> SelectedTable:
        """What tiles visit of tokens by their choice.

        Args:
            chosen: int32 [tables, tiles, n].
            sub_pages: int64, where pages of ``sub_page`` rows of all sequences are on this rank, or -1.
            first: int64 [sequences + 1]: those of each sequence among them. own_pages: of the rank.
        """
        hierarchy, rows, device = self.hierarchy, self.sub_page, chosen.device
        where = Where(sub_pages, first, self.on(device, "piece_bits"), hierarchy.chunk // rows, rows)
        pages, masks = chosen_pages(chosen, tiles.on(device, "sequence"), tiles.on(device, "first"), where)
        needed = None if self.chooses_all_of_chunks else masks
        return SelectedTable(tiles.block, rows, len(tiles), own_pages, 0, hierarchy.head_table, pages, needed)

    @property
    def row_bits(self) -> NDArray[np.int32]:
        """int32 [pages of a buffer, words]: bits of the rows that are summaries, in pages that are this rank's."""
        bits, (rank, ranks) = self.hierarchy.row_bits, self.sizes.share
        return np.where((np.arange(len(bits)) % ranks == rank)[:, None], bits, 0)

    def summary_table(self, chosen: Tensor, tiles: Tiles, first: Tensor) -> SelectedTable:
        """What tiles visit of the buffers beside chosen chunks, so that every token counts once.

        first: int32 [tiles], the page with which the buffer of each one's sequence begins.
        """
        hierarchy, device, ladder = self.hierarchy, chosen.device, self.hierarchy.ladder
        position, bits = tiles.on(device, "positions"), self.on(device, "row_bits")
        pages, masks = summary_pages(chosen.unsqueeze(0), position, bits, ladder, first)
        every = self.sizes.sequences * ladder.pages
        return SelectedTable(tiles.block, ladder.page, len(tiles), every, 0, hierarchy.head_table, pages[0], masks[0])


class CachedLevels:
    """One layer's summaries.

    Attributes:
        k, v: [sequences * rows, kv_heads, dim], the buffers; bias: [sequences * rows, kv_heads].
    """

    def __init__(self, plan: LevelPlan) -> None:
        self.plan = plan
        sizes, wide = plan.sizes, accumulator_dtype(plan.sizes.dtype)

        def zeros(*shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=sizes.device)

        slots, heads = sizes.sequences, sizes.kv_heads
        self.k = zeros(slots * plan.rows, heads, sizes.head_dim)
        self.v = zeros(slots * plan.rows, heads, sizes.value_dim)
        self.bias = zeros(slots * plan.rows, heads, dtype=wide)
        self._rings = [
            tuple(
                zeros(slots, level.members, heads, dim, dtype=sizes.dtype if level.members == level.chunk else wide)
                for dim in (sizes.head_dim, sizes.value_dim)
            )
            for level in plan.pools
        ]
        count = plan.pools[-1].count if plan.chooses_apart else 0
        self._means = zeros(slots, count, heads, sizes.head_dim, dtype=wide)
        tile = plan.hierarchy.tile if plan.hierarchy.chooses_by_tile_before else 0
        self._queries = zeros(slots, tile, sizes.heads, sizes.head_dim)
        self._before = zeros(slots, sizes.heads, sizes.head_dim, dtype=wide)
        # Of a slot: a chunk, and what its rows choose where the chunk before chooses for all of them.
        self._choice: dict[int, tuple[int, Tensor]] = {}

    def clear(self, slot: int) -> None:
        """Before a new sequence gets the slot."""
        self._choice.pop(slot, None)
        self.v.unflatten(0, (-1, max(self.plan.rows, 1)))[slot : slot + 1] = 0.0

    def copy(self, old: int, new: int) -> None:
        """What one slot holds, for a fork."""
        rows = max(self.plan.rows, 1)
        by_slot = [x.unflatten(0, (-1, rows)) for x in (self.k, self.v, self.bias) if self.plan.rows]
        for x in (*by_slot, self._means, self._queries, self._before, *(x for ring in self._rings for x in ring)):
            x[new] = x[old]
        self._choice.pop(new, None)

    def pool(self, slot: int, start: int, k: Tensor, v: Tensor, extras: AttentionExtras) -> None:
        """New tokens of a sequence. k: [n, kv_heads, head_dim], as they are pooled; v: [n, kv_heads, value_dim]."""
        if self.plan.hierarchy.levels:
            self._feed(0, slot, start, k, v, extras)
        if self.plan.chooses_apart:
            self._feed(len(self.plan.pools) - 1, slot, start, k, v, extras)

    def choose(self, slot: int, asking: Asking, q: Tensor, extras: AttentionExtras, scale: float) -> Tensor:
        """int32 [tables, tiles, n]: the chunks of each of a sequence's tiles, ascending, then -1.

        q: [n, heads, head_dim], all new queries of the sequence. Where the chunk before chooses for all rows of one, a
        single row takes over what the row before it was given.
        """
        hierarchy, by = self.plan.hierarchy, self.plan.hierarchy.choosing
        rows, alone = q, None
        if hierarchy.chooses_by_tile_before:
            rows = self._tile_queries(slot, asking.start, q)
            alone = int(asking.own[0]) if len(asking.own) == 1 else None
            before = self._choice.get(slot)
            if before is not None and before[0] == alone:
                return before[1]
            rows = rows[asking.on(q.device, "query") if asking.query_run is None else asking.query_run]
        count = hierarchy.levels[0].count if hierarchy.levels else 0
        at = slice(slot * self.plan.rows, slot * self.plan.rows + count)
        bias = None
        if by.mass:
            exists = self.bias.new_zeros(1).where(hierarchy.levels[0].on(q.device, "exists"), -torch.inf)
            bias = self.bias[at] + exists[:, None]
        keys = self._means[slot] if self.plan.chooses_apart else self.k[at]
        if self.plan.chooses_apart and extras.rotate is not None:
            centre = self.plan.pools[-1].on(q.device, "centre")
            keys = extras.rotate(keys.unsqueeze(0), centre)[0]
        choosers = Choosers(rows.unsqueeze(0), asking.number, *(asking.on(q.device, x) for x in ("own", "until")))
        few = len(asking.own) <= FEW
        selectable = hierarchy.on(q.device, "selectable")
        chosen = choose_chunks(by, choosers, keys.unsqueeze(0), bias, selectable, scale, few)[0]
        if alone is not None:
            self._choice[slot] = alone, chosen
        return chosen

    def _feed(self, number: int, slot: int, first: int, k: Tensor, v: Tensor, extras: AttentionExtras) -> None:
        """Members of a level that follow ``first`` others; whole summaries go on to the next level."""
        plan, level, rings = self.plan, self.plan.pools[number], self._rings[number]
        apart = plan.chooses_apart and number == len(plan.pools) - 1
        tokens = number == 0 or apart
        size, step = level.members, level.stride if tokens else level.members
        begin, stop = (max((n - size) // step + 1, 0) for n in (first, first + len(k)))
        if stop > begin:
            # Members from the first one of the first new summary on.
            rows = [_behind(ring[slot], first, first - begin * step, x) for ring, x in zip(rings, (k, v), strict=True)]
            pool = extras.pool[number] if number < len(extras.pool) and not apart else None
            among = slice(begin * step, (stop - 1) * step + size)
            if tokens and step == size and pool is None:
                left_out = None
                if len(plan.hierarchy.left_out):
                    left_out = plan.hierarchy.on(k.device, "left_out_rows")[among]
                some = [x[None, : (stop - begin) * size] for x in rows]
                pooled = [chunk_means(x, size, left_out)[0] for x in (some[:1] if apart else some)]
            else:
                dtype = accumulator_dtype(k.dtype)
                level_below, name = (plan.hierarchy, "left_out_rows") if tokens else (plan.pools[number - 1], "size")
                counts = level_below.on(k.device, name)[among].unfold(0, size, step)
                sizes = (~counts if tokens else counts).to(dtype).unsqueeze(0)
                wide = [x.unfold(0, size, step)[: stop - begin].movedim(-1, 1).to(dtype) for x in rows]
                there = (sizes > 0)[..., None, None]
                pooled = [*pool_members(wide[0] * there, wide[1] * there, sizes, pool)]
            if apart:
                self._means[slot, begin:stop] = pooled[0][0]
            else:
                self._write(number, slot, begin, stop, pooled[0], pooled[1], extras)
                if number + 1 < len(plan.hierarchy.levels):
                    self._feed(number + 1, slot, begin, pooled[0][0], pooled[1][0], extras)
        count = min(len(k), first + len(k) - stop * step)  # those of summaries that are not whole yet
        if count == 0:
            return
        at = (first + len(k) - count) % size
        places = level.on(k.device, "ring")[at : at + count]
        store_rows([ring[slot] for ring in rings], places, [x[len(x) - count :] for x in (k, v)])

    def _write(
        self, number: int, slot: int, begin: int, stop: int, keys: Tensor, values: Tensor, extras: AttentionExtras
    ) -> None:
        """Summaries ``begin`` .. ``stop - 1`` of a level into a sequence's buffer. keys: [1, n, kv_heads, dim]."""
        level = self.plan.pools[number]
        if extras.rotate is not None:
            keys = extras.rotate(keys, level.on(keys.device, "centre")[begin:stop])
        row = slot * self.plan.rows + level.first_row
        at = slice(row + begin, row + stop)
        self.k[at], self.v[at] = keys[0], values[0]
        kind = self.plan.spec.summaries[number].bias
        if kind == "learned":
            assert extras.key_bias is not None
            self.bias[at] = extras.key_bias[number]
        elif kind == "count":
            self.bias[at] = level.on(keys.device, "log_size")[begin:stop, None]

    def _tile_queries(self, slot: int, start: int, q: Tensor) -> Tensor:
        """[n, heads, head_dim]: the mean queries of the chunk before that of ``start``, and of those from there on."""
        chunk = self.plan.hierarchy.chunk
        kept = start % chunk
        if kept + len(q) < chunk:  # nobody asks for the mean of a chunk that is not whole
            self._queries[slot, kept : kept + len(q)] = q
            return self._before[slot].unsqueeze(0)
        rows = torch.cat((self._queries[slot, :kept], q)) if kept else q
        means, _ = chunk_means(rows.unsqueeze(0), chunk)
        found = torch.cat((self._before[slot].unsqueeze(0), means[0]))
        whole = len(rows) // chunk
        self._before[slot] = found[whole]
        if len(rows) > whole * chunk:
            self._queries[slot, : len(rows) - whole * chunk] = rows[whole * chunk :]
        return found


def _behind(ring: Tensor, first: int, count: int, x: Tensor) -> Tensor:
    """The ``count`` members before member ``first``, and then x. A ring has member n at n modulo its size."""
    if count == 0:
        return x
    at = (first - count) % len(ring)
    return torch.cat((ring[at : at + count], ring[: max(at + count - len(ring), 0)], x))

"""What a pattern visits over the whole sequence, and what any layout makes of that for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from distattn import spans as sp
from distattn.algebra import Pattern
from distattn.axis import Axis, union_rows
from distattn.cost import Work
from distattn.layout import Layout
from distattn.sharing import Sharing, find_sharing
from distattn.spans import Ints, Spans
from distattn.tiles import Visits, visit


@dataclass(frozen=True, eq=False)
class Outline:
    """What does not depend on the layout: the visits of the whole sequence, by distinct pattern.

    sharing: what was taken out. main: Visits of all query tiles and pages, by distinct main pattern.
    gathered: Visits of all query tiles and gathered pages, by distinct pattern. whole: Visits of guest queries.
    table_of: by head, its distinct pattern.
    """

    sharing: Sharing
    main: tuple[Visits, ...]
    gathered: tuple[Visits, ...]
    whole: tuple[Visits, ...]
    table_of: tuple[int, ...]
    grid_q: Axis
    grid_k: Axis
    guest_q: Axis
    tiles: Ints
    pairs: Ints
    guest_pairs: Ints


@lru_cache(maxsize=8)
def make_outline(patterns: tuple[Pattern, ...], length: int, blocks: tuple[int, int], world_size: int) -> Outline:
    """Sorts the tiles of the whole sequence, for every distinct pattern among the heads."""
    sharing = find_sharing(patterns, length, blocks, world_size)
    distinct = list(dict.fromkeys(patterns))
    sample = [patterns.index(pattern) for pattern in distinct]
    table_of = tuple(distinct.index(pattern) for pattern in patterns)
    grid_q, grid_k = Axis.grid(length, blocks[0], sharing.queries), Axis.grid(length, blocks[1], sharing.keys)
    gathered_k = Axis(length, blocks[1], gathered=sharing.keys)
    guest_q = Axis(length, blocks[0], gathered=sharing.queries)
    all_k = Axis.grid(length, blocks[1])
    main = tuple(visit(sharing.main[i], grid_q, grid_k) for i in sample)
    gathered = tuple(visit(sharing.gathered[i], grid_q, gathered_k) for i in sample) if len(sharing.keys) else ()
    whole = tuple(visit(sharing.whole[i], guest_q, all_k) for i in sample) if len(sharing.queries) else ()
    share = np.bincount(table_of, minlength=len(distinct))
    tiles = sum((n * v.tiles for part in (main, gathered) for n, v in zip(share, part, strict=False)), np.int64(0))
    pairs = sum(
        (n * v.pairs(grid_q, blocks[1]) for part in (main, gathered) for n, v in zip(share, part, strict=False)),
        np.int64(0),
    )
    guest_pairs = sum((n * v.pairs(guest_q, blocks[1]) for n, v in zip(share, whole, strict=False)), np.int64(0))
    return Outline(
        sharing,
        main,
        gathered,
        whole,
        table_of,
        grid_q,
        grid_k,
        guest_q,
        np.atleast_1d(tiles),
        np.atleast_1d(pairs),
        np.atleast_1d(guest_pairs),
    )


def rank_work(
    outline: Outline, layout: Layout, kv_heads: int, head_dim: int, value_dim: int, itemsize: int
) -> list[Work]:
    """What each rank computes, sends and receives in a forward pass of a batch of one."""
    world_size, heads = layout.world_size, len(outline.table_of)
    tile_owner, page_owner = layout.owners(outline.grid_q.block), layout.owners(outline.grid_k.block)
    share = layout.tokens() / layout.seq_len
    guest_tiles = sum(int(v.tiles.sum()) * outline.table_of.count(i) for i, v in enumerate(outline.whole))
    tiles = np.bincount(tile_owner, outline.tiles, world_size) + guest_tiles * share
    pairs = np.bincount(tile_owner, outline.pairs, world_size) + float(outline.guest_pairs.sum()) * share
    sent, received, guest_rows = np.zeros((3, world_size))
    row_bytes = itemsize * (head_dim + value_dim)
    for group, guests in guest_pages(outline, layout, kv_heads):
        page_bytes = len(group) * outline.grid_k.block * row_bytes
        received += count_rows(guests) * page_bytes
        guest_rows = np.maximum(guest_rows, count_rows(guests) * outline.grid_k.block)
        # How many ranks need each page, from the ends of the intervals: linear in intervals and pages.
        begin = np.bincount(guests.start, minlength=len(page_owner) + 1)
        needed = np.cumsum(begin - np.bincount(guests.stop, minlength=len(page_owner) + 1))[:-1]
        sent += np.bincount(page_owner, needed, world_size) * page_bytes
    if world_size > 1:
        keys, queries = outline.sharing.keys, outline.sharing.queries
        for positions, there, back in (
            (keys, kv_heads * row_bytes, 0),
            (queries, heads * itemsize * head_dim, heads * max(itemsize, 4) * (value_dim + 1)),
        ):
            owned = np.bincount(layout.owner_of(positions), minlength=world_size)
            others = len(positions) - owned
            sent += owned * (world_size - 1) * there + others * back
            received += others * there + owned * (world_size - 1) * back
    guest_rows += len(outline.sharing.keys)
    tile_flops = 2 * outline.grid_q.block * outline.grid_k.block * (head_dim + value_dim)
    return [
        Work(
            tiles=float(tiles[r]),
            pairs=float(pairs[r]),
            flops=float(tiles[r]) * tile_flops,
            bytes_sent=float(sent[r]),
            bytes_received=float(received[r]),
            guest_rows=float(guest_rows[r]),
        )
        for r in range(world_size)
    ]


def _kv_groups(table_of: Sequence[int], kv_heads: int) -> list[tuple[int, ...]]:
    """Key/value heads whose query heads have the same patterns: they need the same pages."""
    share = len(table_of) // kv_heads
    groups: dict[frozenset[int], list[int]] = {}
    for head in range(kv_heads):
        groups.setdefault(frozenset(table_of[head * share : (head + 1) * share]), []).append(head)
    return [tuple(heads) for heads in groups.values()]


def guest_pages(outline: Outline, layout: Layout, kv_heads: int) -> list[tuple[tuple[int, ...], Spans]]:
    """By group of key/value heads, the pages that each rank visits and does not own. A row for each rank."""
    share = len(outline.table_of) // kv_heads
    tile_owner = layout.owners(outline.grid_q.block)
    absent = sp.complement(owned_pages(layout, outline.grid_k.block), outline.grid_k.blocks)
    out = []
    for heads in _kv_groups(outline.table_of, kv_heads):
        need = sp.empty(layout.world_size)
        for table in sorted({outline.table_of[h * share + i] for h in heads for i in range(share)}):
            visits = outline.main[table]
            single = sp.from_sorted(visits.row, visits.page, visits.page + 1, visits.full.rows)
            for part in (visits.full, single):
                need = sp.union(need, union_rows(part, tile_owner, layout.world_size))
        out.append((heads, sp.intersect(need, absent)))
    return out


def owned_pages(layout: Layout, block: int) -> Spans:
    """Pages of each rank, a row for each."""
    order = np.lexsort((layout.start, layout.owner))
    return sp.from_sorted(
        layout.owner[order], layout.start[order] // block, -(-layout.stop[order] // block), layout.world_size
    )


def count_rows(spans: Spans) -> Ints:
    """int64 [rows]: positions in the intervals of each row."""
    return np.bincount(spans.row_of(), spans.stop - spans.start, spans.rows).astype(np.int64)

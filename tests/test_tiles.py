"""Tile tables against the definition of the patterns, pair by pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.axis import Axis
from distattn.kernels.table import KeyTable, TileTable
from distattn.patterns import (
    BlockSparse,
    Causal,
    Chunked,
    Dense,
    Dilated,
    DistanceBand,
    Documents,
    FixedStride,
    GlobalKeys,
    GlobalQueries,
    GlobalTokens,
    Pattern,
    RandomBlocks,
    SlidingWindow,
    Strided,
)
from distattn.sharing import find_sharing
from distattn.tiles import Extents, Visits, assemble, visit

LENGTH = 75
small = st.integers(0, 20)
positions = st.lists(st.integers(0, LENGTH + 5), max_size=6)
leaves = st.one_of(
    st.just(Dense()),
    st.just(Causal()),
    st.builds(SlidingWindow, small, small),
    st.builds(Dilated, small, small, st.integers(1, 5)),
    st.builds(Strided, st.integers(1, 30)),
    st.integers(1, 30).flatmap(lambda s: st.builds(FixedStride, st.just(s), st.integers(1, s))),
    st.builds(GlobalKeys, positions),
    st.builds(GlobalQueries, positions),
    st.builds(GlobalTokens, positions),
    st.builds(Chunked, st.integers(1, 40)),
    st.builds(Documents, st.lists(st.integers(1, 40), min_size=1, max_size=5)),
    st.builds(DistanceBand, small, st.integers(21, 60)),
    st.builds(RandomBlocks, st.integers(1, 3), st.integers(3, 20), st.integers(0, 5)),
    st.just(BlockSparse((0, 1, 3, 3), (2, 0, 1), 13)),
)
patterns = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        inner.map(lambda a: ~a),
    ),
    max_leaves=4,
)


def definition(pattern: Pattern, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.broadcast_to(pattern.allows(q[:, None], k[None, :]), (len(q), len(k)))


def table_of(visits: Visits, queries: Axis, keys: Axis) -> TileTable:
    extents = Extents.of(np.arange(keys.blocks), 0)
    return assemble([[(visits, extents)]], [0], queries.blocks, (queries.block, keys.block), keys.blocks, 0)


def unpack(table: TileTable) -> np.ndarray:
    """bool [tiles * block_q, pages * block_k]: the pairs that the table allows."""
    out = np.zeros((table.tiles, table.block_q, table.pages, table.block_k), np.bool_)
    for row in range(table.tiles):
        for i in range(table.full_ptr[row], table.full_ptr[row + 1]):
            first, count = table.full_first[i], table.full_count[i]
            assert not out[row, :, first : first + count].any(), "a page occurs twice"
            out[row, :, first : first + count] = True
        for i in range(table.part_ptr[row], table.part_ptr[row + 1]):
            assert not out[row, :, table.part_page[i]].any(), "a page occurs twice"
            out[row, :, table.part_page[i]] = table.masks.allows[table.part_mask[i]].numpy()
    return out.reshape(table.tiles * table.block_q, -1)


def unpack_by_key(keys: KeyTable) -> np.ndarray:
    table = keys.table
    out = np.zeros((table.tiles, table.block_q, table.pages, table.block_k), np.bool_)
    for page in range(table.pages):
        for i in range(keys.full_ptr[page], keys.full_ptr[page + 1]):
            out[keys.full_first[i] : keys.full_first[i] + keys.full_count[i], :, page] = True
        for i in range(keys.part_ptr[page], keys.part_ptr[page + 1]):
            out[keys.part_tile[i], :, page] = table.masks.allows[keys.part_mask[i]].numpy()
    return out.reshape(table.tiles * table.block_q, -1)


@given(patterns, st.sampled_from([(16, 16), (16, 8), (8, 32)]), st.integers(1, LENGTH))
def test_a_table_is_its_pattern_both_ways(pattern: Pattern, blocks: tuple[int, int], length: int) -> None:
    queries, keys = Axis.grid(length, blocks[0]), Axis.grid(length, blocks[1])
    visits = visit(pattern, queries, keys)
    table = table_of(visits, queries, keys)
    everything = np.arange(length)
    expected = definition(pattern, everything, everything)
    found = unpack(table)
    np.testing.assert_array_equal(found[:length, :length], expected)
    assert not found[:length, length:].any(), "rows beyond the sequence are visible"
    np.testing.assert_array_equal(unpack_by_key(table.by_key), found)
    assert len({mask.tobytes() for mask in table.masks.data}) == len(table.masks)
    np.testing.assert_array_equal(
        visits.pairs(queries, blocks[1]),
        [expected[i : i + blocks[0]].sum() for i in range(0, length, blocks[0])],
    )


@given(patterns, st.integers(20, LENGTH), st.integers(1, 5), st.data())
def test_gathered_keys_and_what_they_leave_out(pattern: Pattern, length: int, step: int, data: st.DataObject) -> None:
    places = np.arange(0, length, step)
    skip = np.asarray(sorted(data.draw(st.sets(st.sampled_from(places.tolist()), max_size=4))), np.int64)
    queries, keys = Axis.grid(length, 8), Axis(length, 8, gathered=places, skip=skip)
    found = unpack(table_of(visit(pattern, queries, keys), queries, keys))[:length, : len(places)]
    expected = definition(pattern, np.arange(length), places) & ~np.isin(places, skip)
    np.testing.assert_array_equal(found, expected)


def test_a_short_tile_of_gathered_keys_shares_no_mask() -> None:
    """Row 20 does not exist, and what is said of it must not be said of row 4, which has the same place in its tile."""
    pattern, places = ~GlobalQueries([20]), np.arange(20)
    queries, keys = Axis.grid(20, 8), Axis(20, 8, gathered=places)
    found = unpack(table_of(visit(pattern, queries, keys), queries, keys))[:20, :20]
    np.testing.assert_array_equal(found, definition(pattern, places, places))


@given(patterns, st.integers(20, LENGTH), st.integers(1, 4))
def test_what_is_shared_and_what_remains_are_the_pattern(pattern: Pattern, length: int, world_size: int) -> None:
    blocks = (8, 8)
    sharing = find_sharing([pattern], length, blocks, world_size)
    queries, keys = Axis.grid(length, 8, sharing.queries), Axis.grid(length, 8, sharing.keys)
    everything = np.arange(length)
    total = np.zeros((length, length), np.int64)
    total += unpack(table_of(visit(sharing.main[0], queries, keys), queries, keys))[:length, :length]
    if len(sharing.keys):
        gathered = Axis(length, 8, gathered=sharing.keys)
        found = unpack(table_of(visit(sharing.gathered[0], queries, gathered), queries, gathered))
        total[:, sharing.keys] += found[:length, : len(sharing.keys)]
    if len(sharing.queries):
        guests = Axis(length, 8, gathered=sharing.queries)
        grid = Axis.grid(length, 8)
        found = unpack(table_of(visit(sharing.whole[0], guests, grid), guests, grid))
        total[sharing.queries] += found[: len(sharing.queries), :length]
    np.testing.assert_array_equal(total, definition(pattern, everything, everything))


def test_scattered_globals_are_taken_out() -> None:
    spread = range(0, 1024, 64)
    sharing = find_sharing([SlidingWindow(20, 20) | GlobalTokens(spread)], 1024, (16, 16), 1)
    np.testing.assert_array_equal(sharing.keys, spread)
    np.testing.assert_array_equal(sharing.queries, spread)
    # A causal global query reaches no further than its neighbours do, if it stands at the beginning.
    near = find_sharing([Causal() & (SlidingWindow(20, 0) | GlobalTokens(range(4)))], 1024, (16, 16), 4)
    assert len(near.queries) == 0


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (Dense(), 200_000),
        (Causal(), 300_000),
        (Causal() & (SlidingWindow(4095, 0) | GlobalTokens(range(64))), 1_000_000),
    ],
)
def test_tables_of_a_million_tokens_are_small(pattern: Pattern, most: int) -> None:
    grid = Axis.grid(1 << 20, 128)
    table = table_of(visit(pattern, grid, grid), grid, grid)
    assert table.nbytes < most
    assert len(table.masks) <= 4

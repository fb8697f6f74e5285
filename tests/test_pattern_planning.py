"""What planning derives from a pattern, against its definition `allows`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_strategies import Masks, leaves, mask_of, trees

from distattn.patterns import (
    Causal,
    Chunked,
    Dense,
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
from distattn.spans import Ints, Spans


@st.composite
def runs(draw: st.DrawFn) -> tuple[Ints, Ints, int]:
    """(start, stop, length) of runs that cover `[0, length)`, of any sizes."""
    length = draw(st.integers(1, 48))
    if draw(st.booleans()):
        start = np.arange(0, length, draw(st.integers(1, 16)))
    else:
        start = np.array(sorted({0, *draw(st.lists(st.integers(0, length - 1), max_size=8))}))
    return start, np.append(start[1:], length), length


def to_masks(spans: Spans, length: int) -> Masks:
    """Rows of booleans; checks that intervals are sorted, disjoint, inside, not empty, and do not touch."""
    assert all(array.dtype == np.int64 for array in spans)
    assert spans.ptr[0] == 0 and spans.ptr[-1] == spans.start.size == spans.stop.size
    masks = np.zeros((spans.rows, length), np.bool_)
    for row in range(spans.rows):
        end = -1
        for i in range(spans.ptr[row], spans.ptr[row + 1]):
            assert end < spans.start[i] < spans.stop[i] <= length
            end = spans.stop[i]
            masks[row, spans.start[i] : end] = True
    return masks


def by_run(reduce: Callable[..., Masks], mask: Masks, start: Ints, stop: Ints) -> Masks:
    return np.stack([reduce(mask[a:b], axis=0) for a, b in zip(start, stop, strict=True)])


@settings(deadline=None, max_examples=70)
@given(trees, runs(), st.integers(1, 20))
def test_support_and_full_bound_the_mask(pattern: Pattern, where: tuple[Ints, Ints, int], grain: int) -> None:
    start, stop, length = where
    mask = mask_of(pattern, length)
    support, full = (to_masks(spans, length) for spans in pattern.spans(start, stop, length, grain))
    assert not (by_run(np.any, mask, start, stop) & ~support).any()
    assert not (full & ~by_run(np.all, mask, start, stop)).any()


@settings(deadline=None, max_examples=50)
@given(trees, st.integers(1, 48))
def test_single_queries_are_exact(pattern: Pattern, length: int) -> None:
    mask = mask_of(pattern, length)
    start = np.arange(length)
    for spans in pattern.spans(start, start + 1, length):
        np.testing.assert_array_equal(to_masks(spans, length), mask)


@settings(deadline=None, max_examples=70)
@given(leaves, runs(), st.integers(1, 20))
def test_leaves_are_as_tight_as_promised(leaf: Pattern, where: tuple[Ints, Ints, int], grain: int) -> None:
    start, stop, length = where
    some = by_run(np.any, mask_of(leaf, length), start, stop)
    every = by_run(np.all, mask_of(leaf, length), start, stop)
    support, full = (to_masks(spans, length) for spans in leaf.spans(start, stop, length))
    np.testing.assert_array_equal(support, some)
    np.testing.assert_array_equal(full, every)
    support, full = (to_masks(spans, length) for spans in leaf.spans(start, stop, length, grain))
    assert longest_run(support & ~some) < grain
    assert longest_run(every & ~full) < grain


def longest_run(masks: Masks) -> int:
    """The most neighbouring True values in any row."""
    edges = np.flatnonzero(np.diff(np.pad(masks, ((0, 0), (1, 1))).ravel().astype(np.int64)))
    return int(np.diff(edges)[::2].max(initial=0))


def test_longest_run() -> None:
    assert longest_run(np.array([[1, 1, 0, 1], [1, 1, 1, 0]], np.bool_)) == 3
    assert longest_run(np.zeros((2, 3), np.bool_)) == 0


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Ints, Ints, int, int]:
    """(q0, k0, block_q, block_k): every tile of a grid, or tiles anywhere."""
    block_q, block_k = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        q0, k0 = (x.ravel() for x in np.meshgrid(np.arange(0, 45, block_q), np.arange(0, 45, block_k)))
    else:
        pairs = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=30))
        q0, k0 = np.array(pairs, np.int64).reshape(-1, 2).T
    return q0, k0, block_q, block_k


def check_labels(pattern: Pattern, where: tuple[Ints, Ints, int, int]) -> tuple[Ints, Masks]:
    q0, k0, block_q, block_k = where
    labels = pattern.labels(q0, k0, block_q, block_k)
    assert labels.shape == q0.shape and labels.dtype == np.int64
    q = q0[:, None, None] + np.arange(block_q)[:, None]
    masks = pattern.allows(q, k0[:, None, None] + np.arange(block_k))
    assert not masks[labels == 0].any()
    assert masks[labels == 1].all()
    partial = np.unique(labels[labels >= 2])
    assert partial.tolist() == list(range(2, partial.size + 2))
    for label in partial:
        same = masks[labels == label]
        assert (same == same[0]).all()
    return labels, masks


@settings(deadline=None, max_examples=40)
@given(trees, tiles())
def test_equal_labels_mean_equal_masks(pattern: Pattern, where: tuple[Ints, Ints, int, int]) -> None:
    check_labels(pattern, where)


@settings(deadline=None, max_examples=40)
@given(leaves, tiles())
def test_labels_of_leaves_know_empty_and_full(leaf: Pattern, where: tuple[Ints, Ints, int, int]) -> None:
    labels, masks = check_labels(leaf, where)
    np.testing.assert_array_equal(labels == 0, ~masks.any((1, 2)))
    np.testing.assert_array_equal(labels == 1, masks.all((1, 2)))


@pytest.mark.parametrize(
    "pattern, most",
    [
        (Causal(), 1),
        (SlidingWindow(50, 3), 4),
        (Causal() & (SlidingWindow(63, 0) | GlobalTokens(range(5))), 6),
        (Chunked(64), 0),
        (Chunked(20), 40),
        (Strided(12), 6),
        (FixedStride(16, 3), 1),
        (Documents([64, 128] * 40), 0),
        (Documents([100] * 80), 76),
        (GlobalKeys([3, 8, 2000]), 2),
        (RandomBlocks(3, 16, seed=1), 0),
    ],
    ids=repr,
)
def test_masks_are_shared_along_a_sequence(pattern: Pattern, most: int) -> None:
    at = np.arange(0, 8000, 16)
    q0, k0 = np.repeat(at, at.size), np.tile(at, at.size)
    assert pattern.labels(q0, k0, 16, 16).max() <= 1 + most


@settings(deadline=None, max_examples=40)
@given(trees, st.integers(1, 48))
def test_row_interval(pattern: Pattern, length: int) -> None:
    for q in (np.arange(length), np.arange(length)[::-1], np.arange(length)[:: length // 2 + 1]):
        interval = pattern.row_interval(q)
        if interval is None:
            # Only bands, chunks, documents, and what & makes of them, promise an interval.
            intervals = Causal | Dense | SlidingWindow | DistanceBand | Chunked | Documents
            assert not isinstance(pattern, intervals)
            return
        low, high = interval
        keys = np.arange(length)
        assert (low >= 0).all()
        within = (keys >= low[:, None]) & (keys < high[:, None])
        np.testing.assert_array_equal(within, pattern.allows(q[:, None], keys))


@settings(deadline=None, max_examples=60)
@given(trees, st.integers(1, 48))
def test_row_breaks(pattern: Pattern, length: int) -> None:
    interval, breaks = pattern.row_interval(np.arange(length)), pattern.row_breaks(0, length)
    if breaks is not None:
        assert interval is not None and (np.diff(breaks) >= 0).all() and (breaks < length).all()
        changes = {int(row) for end in interval for row in np.flatnonzero(np.diff(end)) + 1}
        assert changes <= set(breaks.tolist())


def test_documents_and_wide_chunks_have_breaks() -> None:
    assert Documents([3, 0, 40, 9]).row_breaks(0, 45).tolist() == [3, 3, 43]  # type: ignore[union-attr]
    assert Documents([3, 0, 40, 9]).row_breaks(3, 43).tolist() == []  # type: ignore[union-attr]
    assert Chunked(12).row_breaks(12, 37).tolist() == [24, 36]  # type: ignore[union-attr]
    assert Documents([3, 4, 2]).row_breaks(0, 9) is None
    assert (Documents([3, 30]) & Chunked(12)).row_breaks(0, 30).tolist() == [3, 12, 24]  # type: ignore[union-attr]
    assert (Causal() & Documents([3])).row_breaks(0, 9) is None and Chunked(2).row_breaks(0, 9) is None


def test_and_of_intervals_is_an_interval() -> None:
    pattern = Causal() & Documents([3, 4]) & SlidingWindow(1, 0)
    interval = pattern.row_interval(np.arange(9))
    assert interval is not None
    low, high = interval
    assert [(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True) if b > a] == [
        (0, 1), (0, 2), (1, 3), (3, 4), (3, 5), (4, 6), (5, 7)
    ]  # fmt: skip
    assert (Causal() | Documents([3])).row_interval(np.arange(3)) is None


@settings(deadline=None, max_examples=40)
@given(trees, st.integers(1, 40))
def test_map_leaves(pattern: Pattern, length: int) -> None:
    np.testing.assert_array_equal(
        mask_of(pattern.map_leaves(lambda leaf, positive: leaf), length), mask_of(pattern, length)
    )
    # What grows at positive leaves and shrinks at others can only grow as a whole.
    grown = pattern.map_leaves(lambda leaf, positive: leaf | Strided(3) if positive else leaf & Strided(3))
    assert not (mask_of(pattern, length) & ~mask_of(grown, length)).any()
    constants = (Dense(), ~Dense())
    assert pattern.map_leaves(lambda leaf, positive: Dense()) in constants


def test_map_leaves_drops_what_becomes_constant() -> None:
    pattern = Causal() & (SlidingWindow(9, 0) | GlobalTokens(range(4))) & ~GlobalKeys([7])
    seen: list[tuple[Pattern, bool]] = []

    def without_keys(leaf: Pattern, positive: bool) -> Pattern:
        seen.append((leaf, positive))
        return leaf if leaf.key_columns(100) is None else ~Dense()

    assert pattern.map_leaves(without_keys) == Causal() & (SlidingWindow(9, 0) | GlobalQueries(range(4)))
    assert seen == [
        (Causal(), True),
        (SlidingWindow(9, 0), True),
        (GlobalKeys(range(4)), True),
        (GlobalQueries(range(4)), True),
        (GlobalKeys([7]), False),
    ]


@settings(deadline=None, max_examples=40)
@given(leaves, st.integers(1, 60))
def test_columns_and_rows_that_all_share(leaf: Pattern, length: int) -> None:
    mask = mask_of(leaf, length)
    columns, rows = leaf.key_columns(length), leaf.query_rows(length)
    assert (columns is not None) == isinstance(leaf, GlobalKeys | FixedStride)
    assert (rows is not None) == isinstance(leaf, GlobalQueries)
    at = np.arange(length)
    if columns is not None:
        np.testing.assert_array_equal(mask, np.broadcast_to(np.isin(at, columns), mask.shape))
    if rows is not None:
        np.testing.assert_array_equal(mask, np.broadcast_to(np.isin(at, rows)[:, None], mask.shape))


def test_strided_stays_linear_in_pages() -> None:
    start = np.arange(0, 2**16, 128)
    support, full = Strided(8).spans(start, start + 128, 2**16, 128)
    assert support.start.size == start.size and full.start.size == 0
    one = np.arange(64)
    support, full = Strided(100).spans(one, one + 1, 2**16, 128)
    assert support.start.size == 64 and full.start.size == 0
    support, full = Strided(1000).spans(start, start + 128, 2**16, 128)
    assert support.start.size <= start.size * 67
    support, full = FixedStride(16, 2).spans(start, start + 128, 2**16, 128)
    assert support.start.size == start.size and full.start.size == 0


def test_huge_positions_do_not_overflow() -> None:
    q = np.array([10**12, 10**12 + 1])
    support, full = (Causal() & SlidingWindow(3, 0) | Strided(10**11)).spans(q, q + 1, 2 * 10**12, 128)
    assert support.ptr.tolist() == [0, 20, 40] and full.start.min() == 0
    assert (Causal().labels(q, q, 128, 128) == 2).all()
    assert Chunked(10**11).labels(q - 64, q - 64, 128, 128).max() == 3

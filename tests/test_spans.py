"""Spans: the algebra of intervals by row, against the same operations on arrays of booleans."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from distattn import spans as sp
from distattn.spans import Spans

Masks = NDArray[np.bool_]


def from_masks(masks: Masks) -> Spans:
    """The intervals of True in each row, found without the functions under test."""
    ptr, start, stop = [0], [], []
    for row in masks:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int64), [0]])))
        start += edges[::2].tolist()
        stop += edges[1::2].tolist()
        ptr.append(len(start))
    return Spans(np.array(ptr, np.int64), np.array(start, np.int64), np.array(stop, np.int64))


def assert_equal(got: Spans, wanted: Spans) -> None:
    for name, a, b in zip(Spans._fields, got, wanted, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == np.int64, name


@st.composite
def pairs_of_masks(draw: st.DrawFn) -> tuple[Masks, Masks]:
    shape = draw(st.tuples(st.integers(0, 5), st.integers(1, 14)))
    kind = st.sampled_from(["any", "run", "none"])
    return _masks(draw, shape, draw(kind)), _masks(draw, shape, draw(kind))


def _masks(draw: st.DrawFn, shape: tuple[int, int], kind: str) -> Masks:
    if kind == "any":
        return draw(hnp.arrays(np.bool_, shape))
    if kind == "none":
        return np.zeros(shape, np.bool_)
    # At most one interval a row takes its own, faster path.
    ends = draw(hnp.arrays(np.int64, (shape[0], 2), elements=st.integers(0, shape[1])))
    at = np.arange(shape[1])
    return (at >= ends[:, :1]) & (at < ends[:, 1:])


@settings(deadline=None, max_examples=40)
@given(pairs_of_masks())
def test_set_operations(masks: tuple[Masks, Masks]) -> None:
    a, b = masks
    spans_a, spans_b = from_masks(a), from_masks(b)
    assert_equal(sp.union(spans_a, spans_b), from_masks(a | b))
    assert_equal(sp.intersect(spans_a, spans_b), from_masks(a & b))
    assert_equal(sp.complement(spans_a, a.shape[1]), from_masks(~a))


@settings(deadline=None, max_examples=40)
@given(pairs_of_masks(), st.integers(1, 6))
def test_close_gaps_and_drop_short(masks: tuple[Masks, Masks], grain: int) -> None:
    spans = from_masks(masks[0])
    closed, long = masks[0].copy(), masks[0].copy()
    for row in range(spans.rows):
        of_row = slice(spans.ptr[row], spans.ptr[row + 1])
        start, stop = spans.start[of_row], spans.stop[of_row]
        for gap_start, gap_stop in zip(stop[:-1], start[1:], strict=True):
            if gap_stop - gap_start < grain:
                closed[row, gap_start:gap_stop] = True
        for begin, end in zip(start, stop, strict=True):
            if end - begin < grain:
                long[row, begin:end] = False
    assert_equal(sp.close_gaps(spans, grain), from_masks(closed))
    assert_equal(sp.drop_short(spans, grain), from_masks(long))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 5))))
def test_from_sorted_joins_what_overlaps(intervals: list[tuple[int, int, int]]) -> None:
    intervals.sort()
    masks = np.zeros((4, 20), np.bool_)
    for row, start, size in intervals:
        masks[row, start : start + size] = True
    row, start, size = np.array(intervals, np.int64).reshape(-1, 3).T
    assert_equal(sp.from_sorted(row, start, start + size, 4), from_masks(masks))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 4))))
def test_concat_ranges(ranges: list[tuple[int, int]]) -> None:
    first, count = np.array(ranges, np.int64).reshape(-1, 2).T
    wanted = [x for begin, size in ranges for x in range(begin, begin + size)]
    assert sp.concat_ranges(first, count).tolist() == wanted


def test_small_constructors() -> None:
    one = sp.from_runs(np.array([0, 4, 9]), np.array([3, 4, 2]))
    assert [x.tolist() for x in one] == [[0, 1, 1, 1], [0], [3]]
    assert one.rows == 3
    assert sp.empty(2).ptr.tolist() == [0, 0, 0]
    both = sp.shared(np.array([1, 5]), np.array([2, 7]), 2)
    assert [x.tolist() for x in both] == [[0, 2, 4], [1, 5, 1, 5], [2, 7, 2, 7]]
    assert both.row_of().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("masks, wanted", [([[0, 1, 1], [0, 0, 0]], ([1, 0], [3, 0])), ([[1, 0, 1]], None)])
def test_single(masks: list[list[int]], wanted: tuple[list[int], list[int]] | None) -> None:
    got = sp.single(from_masks(np.array(masks, np.bool_)))
    assert (got and tuple(x.tolist() for x in got)) == wanted


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9) | st.integers(0, 1 << 40) | st.integers(0, (1 << 63) - 1), max_size=30))
def test_ranks_are_those_of_unique(values: list[int]) -> None:
    x = np.array(values, np.int64)
    np.testing.assert_array_equal(sp.ranks(x), np.unique(x, return_inverse=True)[1])

"""Sorted integer intervals by row, and their set algebra, vectorised over all rows.

Planning describes which keys a run of query rows may attend as a few half-open intervals. All functions here
take and return `Spans`, are linear (or a merge sort) in the number of intervals, and never allocate anything
of the size of the sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Spans(NamedTuple):
    """Half-open integer intervals by row, in compressed sparse row form.

    Row r has the intervals `[start[i], stop[i])` for `ptr[r] <= i < ptr[r + 1]`. Within a row they are
    sorted, disjoint, not empty and do not touch.

    ptr: int64 [rows + 1], start: int64 [n], stop: int64 [n].
    """

    ptr: Ints
    start: Ints
    stop: Ints

    @property
    def rows(self) -> int:
        return self.ptr.size - 1

    def row_of(self) -> Ints:
        """The row of every interval, int64 [n]."""
        return np.repeat(np.arange(self.rows, dtype=np.int64), self.ptr[1:] - self.ptr[:-1])


def renumber(x: Ints) -> tuple[Ints, Ints]:
    """(the distinct values, ascending; the place of each entry among them): np.unique of small integers, unsorted."""
    seen = np.zeros(int(x.max(initial=-1)) + 1, np.bool_)
    seen[x] = True
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[x]


def ranks(x: Ints) -> Ints:
    """The place of each entry, which is >= 0, among the distinct values: np.unique's inverse, several times faster."""
    bits = x.size.bit_length()
    if int(x.max(initial=0)) >> (63 - bits):
        return np.unique(x, return_inverse=True)[1].reshape(-1)
    # One sort of numbers that hold the value and, below it, the place; sorting places by values takes far longer.
    ordered = np.sort((x << bits) | np.arange(x.size))
    value, place = ordered >> bits, ordered & ((1 << bits) - 1)
    out = np.zeros(x.size, np.int64)
    out[place[1:]] = np.cumsum(value[1:] != value[:-1])
    return out


def concat_ranges(first: Ints, count: Ints) -> Ints:
    """The concatenation of `arange(first[i], first[i] + count[i])` over i; int64 [count.sum()]."""
    end = np.cumsum(count)
    total = int(end[-1]) if end.size else 0
    inside = np.repeat(first - (end - count), count)
    inside += np.arange(total, dtype=np.int64)
    return inside


def empty(rows: int) -> Spans:
    """No interval in any of `rows` rows."""
    none = np.zeros(0, np.int64)
    return Spans(np.zeros(rows + 1, np.int64), none, none)


def from_runs(start: Ints, stop: Ints) -> Spans:
    """One interval a row, `[start[r], stop[r])`, or none where `stop[r] <= start[r]`; int64 [rows] each."""
    kept = stop > start
    ptr = np.zeros(start.size + 1, np.int64)
    np.cumsum(kept, out=ptr[1:])
    if ptr[-1] == start.size:
        return Spans(ptr, start, stop)
    return Spans(ptr, start[kept], stop[kept])


def shared(start: Ints, stop: Ints, rows: int) -> Spans:
    """The same sorted, disjoint intervals, int64 [n] each, in every one of `rows` rows."""
    ptr = np.arange(rows + 1, dtype=np.int64) * start.size
    return Spans(ptr, np.tile(start, rows), np.tile(stop, rows))


def from_sorted(row: Ints, start: Ints, stop: Ints, rows: int, grain: int = 1) -> Spans:
    """Intervals ordered by row and then by start, int64 [n] each; those that overlap, touch, or lie less than
    `grain` apart become one. Empty ones are dropped."""
    kept = stop > start
    if not kept.all():
        row, start, stop = row[kept], start[kept], stop[kept]
    if start.size:
        # On one line, rows lie so far apart that intervals of different rows never meet.
        line = row * (int(stop.max()) + grain + 1)
        reach = np.maximum.accumulate(stop + line)
        first = np.ones(start.size, np.bool_)
        first[1:] = (start + line)[1:] - reach[:-1] >= grain
        if not first.all():
            last = np.append(first[1:], True)
            stop = (reach - line)[last]
            row, start = row[first], start[first]
    ptr = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=rows), out=ptr[1:])
    return Spans(ptr, start, stop)


def close_gaps(spans: Spans, grain: int) -> Spans:
    """Merges the intervals of a row that lie less than `grain` apart."""
    if grain <= 1 or spans.start.size == 0:
        return spans
    return from_sorted(spans.row_of(), spans.start, spans.stop, spans.rows, grain)


def drop_short(spans: Spans, grain: int) -> Spans:
    """Drops the intervals that are shorter than `grain`."""
    kept = spans.stop - spans.start >= grain
    ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])[spans.ptr]
    return Spans(ptr, spans.start[kept], spans.stop[kept])


def single(spans: Spans) -> tuple[Ints, Ints] | None:
    """(start, stop), int64 [rows], equal where a row is empty; None if some row has several intervals."""
    count = np.diff(spans.ptr)
    if spans.start.size == spans.rows and (count == 1).all():
        return spans.start, spans.stop
    if spans.start.size > spans.rows or (count > 1).any():
        return None
    start, stop = np.zeros(spans.rows, np.int64), np.zeros(spans.rows, np.int64)
    start[count == 1], stop[count == 1] = spans.start, spans.stop
    return start, stop


def union(a: Spans, b: Spans) -> Spans:
    """Row by row, the positions in `a` or in `b`, which have equally many rows."""
    if a.start.size == 0:
        return b
    if b.start.size == 0:
        return a
    one, two = single(a), single(b)
    if one is not None and two is not None:
        return _union_singles(one, two)
    if one is not None:
        return _union_single(b, *one)
    if two is not None:
        return _union_single(a, *two)
    row = np.concatenate([a.row_of(), b.row_of()])
    start = np.concatenate([a.start, b.start])
    stop = np.concatenate([a.stop, b.stop])
    # Both halves are sorted already, which the stable sort (a merge of runs) makes use of.
    order = np.argsort(row * (int(stop.max()) + 1) + start, kind="stable")
    return from_sorted(row[order], start[order], stop[order], a.rows)


def _union_singles(a: tuple[Ints, Ints], b: tuple[Ints, Ints]) -> Spans:
    (a0, a1), (b0, b1) = a, b
    meet = (np.maximum(a0, b0) <= np.minimum(a1, b1)) & (a1 > a0) & (b1 > b0)
    low, high = np.minimum(a0, b0), np.maximum(a1, b1)
    if meet.all():
        return from_runs(low, high)
    # Two columns a row: the joined interval and an empty one, or both in order; empty ones are dropped.
    swap = b0 < a0
    start = np.stack([np.where(meet, low, np.where(swap, b0, a0)), np.where(swap, a0, b0)], axis=1)
    stop = np.stack([np.where(meet, high, np.where(swap, b1, a1)), np.where(swap, a1, b1)], axis=1)
    kept = stop > start
    kept[:, 1] &= ~meet
    ptr = np.zeros(a0.size + 1, np.int64)
    np.cumsum(kept.sum(1), out=ptr[1:])
    return Spans(ptr, start[kept], stop[kept])


def _union_single(spans: Spans, low: Ints, high: Ints) -> Spans:
    """Adds `[low[r], high[r])` to row r, which costs little more than copying `spans`."""
    # Intervals first[r]:last[r] meet or touch the new one, which takes their place.
    some = high > low
    first = np.where(some, _bisect(spans.stop, spans.ptr, low), spans.ptr[1:])
    last = np.where(some, _bisect(spans.start, spans.ptr, high + 1), first)
    meets = last > first
    bound = spans.start.size - 1
    low = np.where(meets, np.minimum(low, spans.start[np.minimum(first, bound)]), low)
    high = np.where(meets, np.maximum(high, spans.stop[np.maximum(last - 1, 0)]), high)
    kept = np.ones(spans.start.size, np.bool_)
    kept[concat_ranges(first, last - first)] = False
    dropped = np.cumsum(last - first)
    where = (first - (dropped - (last - first)))[some]
    ptr = spans.ptr.copy()
    ptr[1:] += np.cumsum(some) - dropped
    start = np.insert(spans.start[kept], where, low[some])
    return Spans(ptr, start, np.insert(spans.stop[kept], where, high[some]))


def _bisect(values: Ints, ptr: Ints, bound: Ints) -> Ints:
    """Where the ascending `values[ptr[r]:ptr[r + 1]]` reach bound[r]; ptr[r + 1] if they never do."""
    low, high = ptr[:-1].copy(), ptr[1:].copy()
    while (active := low < high).any():
        middle = (low + high) // 2
        below = active & (values[np.minimum(middle, values.size - 1)] < bound)
        low = np.where(below, middle + 1, low)
        high = np.where(active & ~below, middle, high)
    return low


def intersect(a: Spans, b: Spans) -> Spans:
    """Row by row, the positions in both `a` and `b`, which have equally many rows."""
    if a.start.size == 0 or b.start.size == 0:
        return empty(a.rows)
    one, two = single(a), single(b)
    if one is not None and two is not None:
        return from_runs(np.maximum(one[0], two[0]), np.minimum(one[1], two[1]))
    if one is not None:
        return _clip(b, *one)
    if two is not None:
        return _clip(a, *two)
    row_a, row_b = a.row_of(), b.row_of()
    width = max(int(a.stop.max()), int(b.stop.max())) + 1
    first = np.searchsorted(row_b * width + b.stop, row_a * width + a.start, side="right")
    last = np.searchsorted(row_b * width + b.start, row_a * width + a.stop, side="left")
    count = np.maximum(last - first, 0)
    left = np.repeat(np.arange(a.start.size, dtype=np.int64), count)
    right = concat_ranges(first, count)
    start, stop = np.maximum(a.start[left], b.start[right]), np.minimum(a.stop[left], b.stop[right])
    ptr = np.zeros(a.rows + 1, np.int64)
    np.cumsum(np.bincount(row_a[left], minlength=a.rows), out=ptr[1:])
    return Spans(ptr, start, stop)


def _clip(spans: Spans, low: Ints, high: Ints) -> Spans:
    """Cuts row r to `[low[r], high[r])`."""
    first = _bisect(spans.stop, spans.ptr, low + 1)
    last = np.where(high > low, np.maximum(_bisect(spans.start, spans.ptr, high), first), first)
    ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(last - first)])
    kept = concat_ranges(first, last - first)
    start, stop = spans.start[kept], spans.stop[kept]
    # Only the outermost intervals of a row can be cut.
    some = last > first
    outer = ptr[:-1][some]
    start[outer] = np.maximum(start[outer], low[some])
    outer = ptr[1:][some] - 1
    stop[outer] = np.minimum(stop[outer], high[some])
    return Spans(ptr, start, stop)


def complement(spans: Spans, length: int) -> Spans:
    """Row by row, the positions of `[0, length)` that are not in `spans`, which must lie inside it."""
    row = spans.row_of()
    here = np.arange(spans.start.size, dtype=np.int64) + row
    # A row with n intervals has n + 1 gaps, some of which may be empty.
    start = np.zeros(spans.start.size + spans.rows, np.int64)
    stop = np.full(spans.start.size + spans.rows, length, np.int64)
    start[here + 1] = spans.stop
    stop[here] = spans.start
    kept = stop > start
    ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
    return Spans(ptr[spans.ptr + np.arange(spans.rows + 1)], start[kept], stop[kept])


def difference(a: Spans, b: Spans, length: int) -> Spans:
    """Row by row, the positions in ``a`` that are not in ``b``; both inside [0, length)."""
    return intersect(a, complement(b, length))

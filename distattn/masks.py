"""The masks of PARTIAL tiles, from the pattern."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distattn.axis import Axis
from distattn.kernels.masks import Masks
from distattn.patterns import Pattern
from distattn.spans import Ints, concat_ranges, renumber

# Masks are evaluated on about this many (query, key) pairs at a time.
_PAIRS_AT_ONCE = 1 << 20
# Masks of intervals are made this many at a time, which stays in the cache.
_MASKS_AT_ONCE = 256

Int32s = NDArray[np.int32]


def make_masks(pattern: Pattern, queries: Axis, keys: Axis, row: Ints, page: Ints) -> tuple[Masks, Ints]:
    """(the distinct masks of tiles (row[i], page[i]); int64 [n], the mask of each tile)."""
    intervals = None if keys.skip.size else _row_intervals(pattern, queries, keys, row, page)
    data = _bit_masks(pattern, queries, keys, row, page) if intervals is None else intervals
    return Masks(keys.block, data).distinct()


def interval_labels(pattern: Pattern, queries: Axis, keys: Axis, row: Ints, page: Ints) -> Ints | None:
    """Labels of tiles (row[i], page[i]) as those of ``Pattern.labels``, by the keys that their rows attend to.

    What the keys leave out is not looked at. None where a row may attend to anything but one interval."""
    intervals = _row_intervals(pattern, queries, keys, row, page)
    if intervals is None:
        return None
    masks, same = Masks(keys.block, intervals).distinct()
    label = np.arange(2, len(masks) + 2)
    label[masks.nothing()], label[masks.everything()] = 0, 1
    return label[same]


def _bit_masks(pattern: Pattern, queries: Axis, keys: Axis, row: Ints, page: Ints) -> NDArray[np.uint32]:
    """uint32 [n, block_q, ceil(block_k / 32)]: the masks of tiles, from the definition of the pattern."""
    words = -(-keys.block // 32)
    out = np.zeros((len(row), queries.block, words), np.uint32)
    step = max(1, _PAIRS_AT_ONCE // (queries.block * keys.block))
    for i in range(0, len(row), step):
        # Rows beyond the sequence are never written; keeping them lets a short tile share the masks of whole ones.
        q = queries.positions(row[i : i + step], clip=False)[:, :, None]
        k = keys.positions(page[i : i + step])[:, None, :]
        allowed = pattern.allows(np.maximum(q, 0), np.maximum(k, 0)) & (q >= 0) & (k >= 0)
        packed = np.packbits(allowed, axis=-1, bitorder="little")
        out[i : i + step].view(np.uint8)[..., : packed.shape[-1]] = packed
    return out


def _row_intervals(pattern: Pattern, queries: Axis, keys: Axis, row: Ints, page: Ints) -> NDArray[np.int16] | None:
    """int16 [n, 2, block_q]: the columns [start, stop) of each page that its tile's rows attend to.

    None where a row may attend to anything but one interval."""
    if queries.first is None or queries.skip.size:
        return None
    if keys.block >= 1 << 15 or keys.length >= 1 << 31:
        # Beyond the small integers that make this quick.
        return None
    # Many masks share a query tile: its rows are looked up once.
    tiles, tile = renumber(row)
    first = queries.first[tiles]
    begins, length = keys.starts(page)
    k0 = begins.astype(np.int32)
    width = np.minimum(keys.block, length - k0).astype(np.int32)
    last = int(first.max(initial=0)) + queries.block
    breaks = pattern.row_breaks(int(first.min(initial=last)), min(last, queries.length))
    if breaks is not None:
        return _by_runs(pattern, queries, keys, breaks, first, tile, k0, width)
    ends = _ends(pattern, (first[:, None] + np.arange(queries.block)).ravel(), keys)
    if ends is None:
        return None
    low, high = (end.reshape(len(tiles), queries.block) for end in ends)
    out = np.empty((len(row), 2, queries.block), np.int16)
    for i in range(0, len(row), _MASKS_AT_ONCE):
        some = slice(i, i + _MASKS_AT_ONCE)
        out[some, 0], out[some, 1] = _columns(low[tile[some]], high[tile[some]], k0[some, None], width[some, None])
    return out


def _by_runs(
    pattern: Pattern, queries: Axis, keys: Axis, breaks: Ints, first: Ints, tile: Ints, k0: Int32s, width: Int32s
) -> NDArray[np.int16]:
    """As :func:`_row_intervals`: rows between breaks attend to the same keys, and are handled together.

    first: by tile. tile, k0, width: by mask.
    """
    begin = np.searchsorted(breaks, first, side="right")
    count = np.searchsorted(breaks, first + queries.block) - begin
    ptr = np.concatenate(([0], np.cumsum(count + 1)))  # the runs of each tile
    at = np.empty(ptr[-1], np.int64)  # where they begin
    begins_tile = np.zeros(len(at), np.bool_)
    begins_tile[ptr[:-1]] = True
    at[begins_tile], at[~begins_tile] = first, breaks[concat_ranges(begin, count)]
    length = np.diff(at, append=0)
    length[ptr[1:] - 1] = first + queries.block - at[ptr[1:] - 1]
    ends = _ends(pattern, at, keys)
    assert ends is not None, "a pattern with row_breaks has row_interval"
    run, mask = concat_ranges(ptr[tile], count[tile] + 1), np.repeat(np.arange(len(tile)), count[tile] + 1)
    out = np.empty((len(tile), 2, queries.block), np.int16)
    for number, end in enumerate(_columns(ends[0][run], ends[1][run], k0[mask], width[mask])):
        out[:, number] = np.repeat(end.astype(np.int16), length[run]).reshape(-1, queries.block)
    return out


def _ends(pattern: Pattern, q: Ints, keys: Axis) -> tuple[Int32s, Int32s] | None:
    """Which places along an axis each query position attends to, if that is one interval."""
    ends = pattern.row_interval(q)
    if ends is None:
        return None
    low, high = (keys.places(end).astype(np.int32) for end in ends)
    return low, high


def _columns(low: Int32s, high: Int32s, k0: Int32s, width: Int32s) -> tuple[Int32s, Int32s]:
    """The keys [low, high) as columns of pages that begin at k0; overwrites low and high."""
    low -= k0
    high -= k0
    np.maximum(low, 0, out=low)
    np.minimum(high, width, out=high)
    # Every empty interval is written alike.
    inside = high > low
    low *= inside
    high *= inside
    return low, high

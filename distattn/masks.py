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
# Rows that share their keys are handled together where there are this many to a run.
_FEW_RUNS = 8

Int32s = NDArray[np.int32]


def make_masks(pattern: Pattern, queries: Axis, keys: Axis, row: Ints, page: Ints) -> tuple[Masks, Ints]:
    """(the distinct masks of tiles (row[i], page[i]); int64 [n], the mask of each tile)."""
    intervals = _row_intervals(pattern, queries, keys, row, page)
    data = _bit_masks(pattern, queries, keys, row, page) if intervals is None else intervals
    return Masks(keys.block, data).distinct()


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
    if queries.first is None or keys.first is None or queries.skip.size or keys.skip.size:
        return None
    if keys.block >= 1 << 15 or keys.length >= 1 << 31:
        # Beyond the small integers that make this quick.
        return None
    # Many masks share a query tile: its rows are looked up once.
    tiles, tile = renumber(row)
    ends = pattern.row_interval((queries.first[tiles][:, None] + np.arange(queries.block)).ravel())
    if ends is None:
        return None
    low, high = (np.minimum(x, queries.length).astype(np.int32) for x in ends)
    k0 = keys.first[page].astype(np.int32)
    width = np.minimum(keys.block, keys.length - k0).astype(np.int32)
    changes = np.ones(len(low), np.bool_)
    np.not_equal(low[1:], low[:-1], out=changes[1:])
    changes[1:] |= high[1:] != high[:-1]
    changes[:: queries.block] = True
    runs = np.flatnonzero(changes)
    if len(runs) * _FEW_RUNS < len(low):
        return _repeated(low[runs], high[runs], runs, len(tiles), tile, k0, width, queries.block)
    low, high = (x.reshape(len(tiles), queries.block) for x in (low, high))
    out = np.empty((len(row), 2, queries.block), np.int16)
    for i in range(0, len(row), _MASKS_AT_ONCE):
        some = slice(i, i + _MASKS_AT_ONCE)
        start, stop = _columns(low[tile[some]], high[tile[some]], k0[some, None], width[some, None])
        out[some, 0], out[some, 1] = start, stop
    return out


def _repeated(
    low: Int32s, high: Int32s, runs: Ints, tiles: int, tile: Ints, k0: Int32s, width: Int32s, block: int
) -> NDArray[np.int16]:
    """As :func:`_row_intervals`, from runs of rows that attend to the same keys, of which tiles have few (documents).

    low, high, runs: by run: the keys, and the first row. tile, k0, width: by mask.
    """
    first = np.searchsorted(runs, np.arange(tiles + 1) * block)  # run of each tile
    count = np.diff(first)[tile]
    mask, run = np.repeat(np.arange(len(tile)), count), concat_ranges(first[tile], count)
    rows = np.diff(runs, append=tiles * block)[run]
    out = np.empty((len(tile), 2, block), np.int16)
    for number, end in enumerate(_columns(low[run], high[run], k0[mask], width[mask])):
        out[:, number] = np.repeat(end.astype(np.int16), rows).reshape(-1, block)
    return out


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

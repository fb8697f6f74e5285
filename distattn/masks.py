"""The masks of PARTIAL tiles, from the pattern."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distattn.axis import Axis
from distattn.kernels.masks import Masks
from distattn.patterns import Pattern
from distattn.spans import Ints, renumber

# Masks are evaluated on about this many (query, key) pairs at a time.
_PAIRS_AT_ONCE = 1 << 20
# Masks of intervals are made this many at a time, which stays in the cache.
_MASKS_AT_ONCE = 256


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
    intervals = pattern.row_interval((queries.first[tiles][:, None] + np.arange(queries.block)).ravel())
    if intervals is None:
        return None
    low, high = (np.minimum(x, queries.length).astype(np.int32).reshape(len(tiles), queries.block) for x in intervals)
    k0 = keys.first[page].astype(np.int32)[:, None]
    width = np.minimum(keys.block, keys.length - k0).astype(np.int32)
    out = np.empty((len(row), 2, queries.block), np.int16)
    for i in range(0, len(row), _MASKS_AT_ONCE):
        some = slice(i, i + _MASKS_AT_ONCE)
        start, stop = low[tile[some]], high[tile[some]]
        start -= k0[some]
        stop -= k0[some]
        np.maximum(start, 0, out=start)
        np.minimum(stop, width[some], out=stop)
        # Every empty interval is written alike.
        inside = stop > start
        start *= inside
        stop *= inside
        out[some, 0], out[some, 1] = start, stop
    return out

"""The masks of PARTIAL tiles, as bits, each made once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distattn.axis import Axis
from distattn.patterns import Pattern
from distattn.spans import Ints

# Masks are evaluated on about this many (query, key) pairs at a time.
_PAIRS_AT_ONCE = 1 << 20
# Masks of intervals are made this many at a time, which stays in the cache.
_MASKS_AT_ONCE = 128


def make_masks(
    pattern: Pattern, queries: Axis, keys: Axis, row: Ints, page: Ints
) -> tuple[NDArray[np.uint32], Ints, Ints]:
    """The masks of tiles (row[i], page[i]).

    Returns:
        masks uint32 [distinct, block_q, ceil(block_k / 32)]; int64 [n], the mask of each tile; and int64 [distinct],
        the allowed pairs of each mask.
    """
    intervals = _row_intervals(pattern, queries, keys, row, page)
    if intervals is None:
        masks, mask = unique_masks(_bit_masks(pattern, queries, keys, row, page), np.arange(len(row)))
        return masks, mask, np.bitwise_count(masks).sum(axis=(1, 2), dtype=np.int64)
    # Equal masks are found while they are still intervals, and only the distinct ones are made.
    first, mask = _distinct(intervals.reshape(len(intervals), 2 * queries.block))
    intervals = intervals[first]
    return _interval_masks(intervals, keys.block), mask, (intervals[..., 1] - intervals[..., 0]).sum(1, dtype=np.int64)


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
    """int16 [n, block_q, 2]: the columns [start, stop) of each page that its tile's rows attend to.

    None where a row may attend to anything but one interval."""
    if queries.first is None or keys.first is None or queries.skip.size or keys.skip.size:
        return None
    if keys.block >= 1 << 15 or keys.length >= 1 << 31:
        # Beyond the small integers that make this quick.
        return None
    # Many masks share a query tile: its rows are looked up once.
    tiles, tile = np.unique(row, return_inverse=True)
    intervals = pattern.row_interval((queries.first[tiles][:, None] + np.arange(queries.block)).ravel())
    if intervals is None:
        return None
    low, high = (np.minimum(x, queries.length).astype(np.int32).reshape(len(tiles), queries.block) for x in intervals)
    k0 = keys.first[page].astype(np.int32)[:, None]
    width = np.minimum(keys.block, keys.length - k0).astype(np.int32)
    out = np.empty((len(row), queries.block, 2), np.int16)
    for i in range(0, len(row), _MASKS_AT_ONCE):
        some = slice(i, i + _MASKS_AT_ONCE)
        start, stop = np.maximum(low[tile[some]] - k0[some], 0), np.minimum(high[tile[some]] - k0[some], width[some])
        # Every empty interval is written alike.
        inside = stop > start
        np.multiply(start, inside, out=out[some, :, 0], casting="unsafe")
        np.multiply(stop, inside, out=out[some, :, 1], casting="unsafe")
    return out


def _interval_masks(intervals: NDArray[np.int16], block: int) -> NDArray[np.uint32]:
    """uint32 [n, rows, ceil(block / 32)]: the bits [start, stop) of each row."""
    # Row n of the lookup has its n lowest bits set; what lies between two of them is their difference.
    below = np.packbits(np.tri(block + 1, -(-block // 32) * 32, -1, np.bool_), axis=-1, bitorder="little")
    # complex128 is the quickest thing of 16 bytes to take.
    lookup = below.view(np.complex128 if below.shape[1] == 16 else np.dtype((np.void, below.shape[1]))).ravel()
    out = np.empty((*intervals.shape[:2], below.shape[1] // 4), np.uint32)
    for i in range(0, len(out), _MASKS_AT_ONCE):
        start, stop = (intervals[i : i + _MASKS_AT_ONCE, :, side].astype(np.int64) for side in (0, 1))
        first, last = (lookup.take(x).view(np.uint32).reshape(*x.shape, -1) for x in (start, stop))
        np.bitwise_xor(first, last, out=out[i : i + _MASKS_AT_ONCE])
    return out


def unique_masks(masks: NDArray[np.uint32], mask: Ints) -> tuple[NDArray[np.uint32], Ints]:
    """Stores equal masks once, and drops those that no entry of ``mask`` names."""
    first, same = _distinct(masks.reshape(len(masks), masks.shape[1] * masks.shape[2]))
    kept, mask = np.unique(same[mask], return_inverse=True)
    first = first[kept]
    return masks if len(first) == len(masks) and (first == np.arange(len(masks))).all() else masks[first], mask


def _distinct(rows: NDArray[np.integer]) -> tuple[Ints, Ints]:
    """(the first row of each kind, the kind of every row), of integers [n, width]."""
    wide = rows.view(np.uint64) if rows.shape[1] * rows.itemsize % 8 == 0 else rows.astype(np.uint64)
    # A hash finds the candidates; only true equality merges them.
    weights = np.random.default_rng(0).integers(1, 1 << 63, wide.shape[1], dtype=np.uint64) | np.uint64(1)
    code = np.einsum("nw,w->n", wide, weights)
    _, first, kind = np.unique(code, return_index=True, return_inverse=True)
    target = np.arange(len(rows))
    others = np.flatnonzero(first[kind] != target)
    twins = others[(wide[others] == wide[first[kind[others]]]).all(axis=1)]
    target[twins] = first[kind[twins]]
    kept = np.flatnonzero(target == np.arange(len(rows)))
    return kept, np.searchsorted(kept, target)

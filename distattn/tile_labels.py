"""Codes for tiles: how patterns tell, without looking at every pair, which tiles have equal masks.

A code is 0 for a tile in which nothing is allowed, 1 for one in which everything is, and otherwise a number
>= 2 such that tiles with equal codes have equal masks.
"""

from __future__ import annotations

import numpy as np

from distattn.spans import Bools, Ints, ranks


def dense_ids(codes: Ints) -> Ints:
    """Renumbers the codes >= 2 as 2, 3, ... without holes, in their order; 0 and 1 stay. Any shape."""
    top = int(codes.max(initial=0))
    if top <= 2:
        return codes
    if top <= 4 * codes.size + 4096:
        # A table is several times faster than sorting while codes are small numbers.
        seen = np.zeros(top + 1, np.bool_)
        seen[codes] = True
        seen[:2] = True
        return (np.cumsum(seen, dtype=np.int64) - 1)[codes]
    partial = codes >= 2
    ids = codes.copy()
    ids[partial] = ranks(codes[partial]) + 2
    return ids


def combine(*columns: Ints) -> Ints:
    """A number >= 0 for each tuple `(columns[0][i], columns[1][i], ...)`, equal just where the tuples are."""
    code = np.zeros(columns[0].shape, np.int64)
    if code.size == 0:
        return code
    for column in columns:
        column = column - column.min()
        width = int(column.max()) + 1
        if int(code.max()) >= 2**62 // width:
            code = np.unique(code, return_inverse=True)[1].reshape(code.shape).astype(np.int64)
            column = np.unique(column, return_inverse=True)[1].reshape(column.shape).astype(np.int64)
            width = int(column.max()) + 1
        code = code * width + column
    return code


def coded(nothing: Bools, everything: Bools, *columns: Ints) -> Ints:
    """Codes from two masks and, for the tiles in neither, from the tuple of `columns`."""
    codes = everything.astype(np.int64)
    partial = np.flatnonzero(~(nothing | everything))
    if partial.size:
        codes[nothing] = 0
        codes[partial] = combine(*(column[partial] for column in columns)) + 2
    return codes


def band(q0: Ints, k0: Ints, block_q: int, block_k: int, low: int, high: int) -> Ints:
    """Codes of `low <= q - k <= high`. They depend on `q0 - k0` alone, and only near an edge of the band."""
    shift = q0 - k0
    least, most = shift - (block_k - 1), shift + (block_q - 1)
    # Past a partial lower edge, shift - low tells the mask; else high - shift does.
    codes = np.where(least < low, shift + (block_q + 1 - low), (high - shift) + (block_q + 2 * block_k + 1))
    codes[(least >= low) & (most <= high)] = 1
    codes[(most < low) | (least > high)] = 0
    return codes


def positions(sorted_positions: Ints, x0: Ints, width: int) -> Ints:
    """Codes of `x in sorted_positions` for the columns (or rows) `x0 <= x < x0 + width`."""
    first = np.searchsorted(sorted_positions, x0)
    count = np.searchsorted(sorted_positions, x0 + width) - first
    partial = np.flatnonzero((count > 0) & (count < width))
    codes: Ints = (count == width).astype(np.int64)
    if partial.size:
        first, count = first[partial], count[partial]
        begin = sorted_positions[first] - x0[partial]
        end = sorted_positions[first + count - 1] - x0[partial]
        # A run of positions is told by its ends; anything else by x0, which `first` and `begin` give.
        is_run = end - begin == count - 1
        codes[partial] = 2 + np.where(is_run, begin * width + end, width * width + first * width + begin)
    return codes


def rectangle(r0: Ints, r1: Ints, c0: Ints, c1: Ints, block_q: int, block_k: int) -> Ints:
    """Codes of masks that are one rectangle, not empty: rows `[r0, r1)`, columns `[c0, c1)` of the tile."""
    codes: Ints = ((r0 * (block_q + 1) + r1) * (block_k + 1) + c0) * (block_k + 1) + c1 + 2
    codes[(r0 == 0) & (r1 == block_q) & (c0 == 0) & (c1 == block_k)] = 1
    return codes

"""Patterns that are tables of square blocks: a given table, and random blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distattn import spans as sp
from distattn import tile_labels
from distattn.algebra import Pattern, as_int, as_positions
from distattn.spans import Bools, Ints, Spans


class _BlockTable(Pattern):
    """Block row `q // block` attends to a set of block columns `k // block`."""

    block: int

    @abstractmethod
    def _columns(self, rows: Ints) -> tuple[Ints, Ints]:
        """(count, column): how many columns each of these block rows has; the columns, ascending by row."""

    def _lookup(self, rows: Ints) -> tuple[Ints, Ints, int]:
        """(index, keys, width): `rows[i]` has column j if `index[i] * width + j` is in the sorted keys."""
        unique, index = np.unique(rows, return_inverse=True)
        count, column = self._columns(unique)
        width = int(column.max(initial=0)) + 2
        keys = np.repeat(np.arange(unique.size, dtype=np.int64), count) * width + column
        return index.reshape(rows.shape).astype(np.int64), keys, width

    @staticmethod
    def _has(keys: Ints, width: int, index: Ints, column: Ints) -> Bools:
        # Columns past the table's last one are in no row.
        wanted = index * width + np.minimum(column, width - 1)
        if keys.size == 0:
            return np.zeros(wanted.shape, np.bool_)
        return np.asarray(keys[np.minimum(np.searchsorted(keys, wanted), keys.size - 1)] == wanted)

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        q, k = as_positions(q, k)
        index, keys, width = self._lookup(q // self.block)
        return self._has(keys, width, index, k // self.block)

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        first = start // self.block
        rows_of_run = (stop - 1) // self.block - first + 1
        unique, index = np.unique(sp.concat_ranges(first, rows_of_run), return_inverse=True)
        count, column = self._columns(unique)
        begin = (np.cumsum(count) - count)[index]
        run = np.repeat(np.arange(start.size, dtype=np.int64), rows_of_run)
        run, column = np.repeat(run, count[index]), column[sp.concat_ranges(begin, count[index])]
        width = int(column.max(initial=0)) + 1
        # A column is full for a run if all of the run's block rows have it.
        pairs, having = np.unique(run * width + column, return_counts=True)
        run, low = pairs // width, pairs % width * self.block
        high = np.minimum(low + self.block, length)
        support = sp.from_sorted(run, low, high, start.size, grain)
        all_rows = having == rows_of_run[run]
        return support, sp.from_sorted(run[all_rows], low[all_rows], high[all_rows], start.size)

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        block = self.block
        i0, j0 = q0 // block, k0 // block
        rows, columns = (q0 + block_q - 1) // block - i0 + 1, (k0 + block_k - 1) // block - j0 + 1
        if q0.size == 0:
            return np.zeros(0, np.int64)
        i, j = np.arange(int(rows.max())), np.arange(int(columns.max()))
        index, keys, width = self._lookup(i0[:, None] + i)
        bits = np.zeros((q0.size, (i.size * j.size + 7) // 8), np.uint8)
        nothing, everything = np.zeros(q0.size, np.bool_), np.zeros(q0.size, np.bool_)
        # By slices of tiles, so that small blocks in large tiles do not need much memory at once.
        step = max(1, 2**22 // (i.size * j.size))
        for at in range(0, q0.size, step):
            here = slice(at, at + step)
            inside = (i < rows[here, None])[:, :, None] & (j < columns[here, None])[:, None, :]
            has = self._has(keys, width, index[here, :, None], j0[here, None, None] + j) & inside
            nothing[here] = ~has.any((1, 2))
            everything[here] = (has == inside).all((1, 2))
            bits[here] = np.packbits(has.reshape(has.shape[0], -1), axis=1)
        partial = ~(nothing | everything)
        which = np.zeros(q0.size, np.int64)
        if partial.any():
            which[partial] = np.unique(bits[partial], axis=0, return_inverse=True)[1].reshape(-1)
        return tile_labels.coded(nothing, everything, which, q0 - i0 * block, k0 - j0 * block)


@dataclass(frozen=True)
class BlockSparse(_BlockTable):
    """A table of blocks: block row I attends to the block columns `col[row_ptr[I]:row_ptr[I + 1]]`.

    Query q attends to key k if column `k // block` is in row `q // block`. Block rows after the table attend
    to nothing. Columns of a row may come in any order and are kept sorted and unique. Raises ValueError if
    `row_ptr` does not ascend from 0 to `len(col)`, if a column is negative, or if block < 1.
    """

    row_ptr: tuple[int, ...]
    col: tuple[int, ...]
    block: int

    def __init__(self, row_ptr: Iterable[int], col: Iterable[int], block: int) -> None:
        ptr, column = _as_array("row_ptr", row_ptr), _as_array("col", col)
        if ptr.size == 0 or ptr[0] != 0 or ptr[-1] != column.size or (np.diff(ptr) < 0).any():
            raise ValueError(f"row_ptr is {_short(ptr)}; expected 0 up to len(col), {column.size}")
        if column.size and column.min() < 0:
            raise ValueError(f"col contains {column.min()}; expected integers >= 0")
        width = int(column.max(initial=0)) + 1
        pairs = np.unique(np.repeat(np.arange(ptr.size - 1), np.diff(ptr)) * width + column)
        ptr = np.searchsorted(pairs, np.arange(ptr.size) * width)
        object.__setattr__(self, "row_ptr", tuple(ptr.tolist()))
        object.__setattr__(self, "col", tuple((pairs % width).tolist()))
        object.__setattr__(self, "block", as_int("block", block, 1))

    @cached_property
    def _table(self) -> tuple[Ints, Ints]:
        return np.asarray(self.row_ptr, np.int64), np.asarray(self.col, np.int64)

    def _columns(self, rows: Ints) -> tuple[Ints, Ints]:
        ptr, column = self._table
        begin, end = (ptr[np.minimum(rows + more, ptr.size - 1)] for more in (0, 1))
        return end - begin, column[sp.concat_ranges(begin, end - begin)]


@dataclass(frozen=True)
class RandomBlocks(_BlockTable):
    """Block row I attends to `per_row` different random block columns, or to all where there are fewer.

    Query q attends to key k if `k // block` was drawn for `q // block`. Columns are drawn without replacement
    from all `ceil(length / block)` blocks if `length` is given, else from blocks 0..I, never ahead. This is
    the random attention of BigBird (Zaheer et al., 2020). The draw depends on (seed, I) alone: it is Floyd's
    sampling (Bentley and Floyd, 1987) over the counter hash splitmix64 (Steele et al., 2014).
    Raises ValueError if per_row, block or length is < 1 or seed < 0.
    """

    per_row: int
    block: int
    seed: int
    length: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_row", as_int("per_row", self.per_row, 1))
        object.__setattr__(self, "block", as_int("block", self.block, 1))
        object.__setattr__(self, "seed", as_int("seed", self.seed, 0))
        if self.length is not None:
            object.__setattr__(self, "length", as_int("length", self.length, 1))

    def _columns(self, rows: Ints) -> tuple[Ints, Ints]:
        if self.length is None:
            choices = rows + 1
        else:
            choices = np.full_like(rows, -(-self.length // self.block))
        count = np.minimum(choices, self.per_row)
        # Draw i picks from 0..last; a value picked before is replaced by `last`, which cannot have been.
        picked = np.full((rows.size, self.per_row), -1, np.int64)
        for i in range(self.per_row):
            last = choices - count + i
            value = (_hash(self.seed, rows, i) % np.maximum(last + 1, 1).astype(np.uint64)).astype(np.int64)
            value = np.where((picked[:, :i] == value[:, None]).any(1), last, value)
            picked[:, i] = np.where(i < count, value, -1)
        picked.sort(axis=1)
        return count, picked[picked >= 0]


def _hash(seed: int, rows: Ints, draw: int) -> NDArray[np.uint64]:
    """Uniform 64-bit numbers, one for each (seed, row, draw)."""
    state = _splitmix64(np.full(rows.shape, seed % 2**64, np.uint64))
    return _splitmix64(_splitmix64(state ^ rows.astype(np.uint64)) ^ np.uint64(draw))


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64 (Steele, Lea and Flood, 2014) from state x; multiplications wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _as_array(name: str, values: Iterable[int]) -> Ints:
    array = np.asarray(values if isinstance(values, np.ndarray) else list(values))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} is {_short(array)}; expected integers")
    return array.astype(np.int64)


def _short(array: NDArray[np.generic]) -> str:
    return np.array2string(array, threshold=8)

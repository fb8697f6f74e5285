"""The attention patterns: frozen values, each defined by positions in its `allows`.

This is the module to import patterns from. `Pattern` and what `&`, `|`, `~` build is in `distattn.algebra`,
those that cut the sequence into segments in `distattn.segment_patterns`, and those that are tables of blocks in
`distattn.block_patterns`; all are exported here as well.
numpy only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from distattn import spans as sp
from distattn import tile_labels
from distattn.algebra import (
    UNBOUNDED,
    And,
    Dense,
    IntervalPattern,
    Not,
    Or,
    Pattern,
    PerHead,
    as_int,
    as_positions,
)
from distattn.block_patterns import BlockSparse, RandomBlocks
from distattn.segment_patterns import Chunked, Documents
from distattn.spans import Bools, Ints, Spans

__all__ = [
    "And",
    "BlockSparse",
    "Causal",
    "Chunked",
    "Dense",
    "Dilated",
    "DistanceBand",
    "Documents",
    "FixedStride",
    "GlobalKeys",
    "GlobalQueries",
    "GlobalTokens",
    "Not",
    "Or",
    "Pattern",
    "PerHead",
    "RandomBlocks",
    "SlidingWindow",
    "Strided",
]


class _Band(IntervalPattern):
    """`low <= q - k <= high`."""

    @property
    @abstractmethod
    def _band(self) -> tuple[int, int]: ...

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        q, k = as_positions(q, k)
        low, high = self._band
        return np.asarray((q - k >= low) & (q - k <= high))

    def row_interval(self, q: ArrayLike) -> tuple[Ints, Ints]:
        q = np.asarray(q, np.int64)
        low, high = self._band
        return np.maximum(q - high, 0), q - low + 1

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        return tile_labels.band(q0, k0, block_q, block_k, *self._band)


@dataclass(frozen=True)
class Causal(_Band):
    """`k <= q`: a query attends to itself and to what comes before it."""

    @property
    def _band(self) -> tuple[int, int]:
        return 0, UNBOUNDED


@dataclass(frozen=True)
class SlidingWindow(_Band):
    """`q - before <= k <= q + after`. Raises ValueError if either is negative."""

    before: int
    after: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", as_int("before", self.before, 0))
        object.__setattr__(self, "after", as_int("after", self.after, 0))

    @property
    def _band(self) -> tuple[int, int]:
        return -self.after, self.before


@dataclass(frozen=True)
class DistanceBand(_Band):
    """`near <= q - k < far`; negative distances look ahead. Raises ValueError unless near < far."""

    near: int
    far: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "near", as_int("near", self.near))
        object.__setattr__(self, "far", as_int("far", self.far))
        if self.far <= self.near:
            raise ValueError(f"far is {self.far}; expected more than near, which is {self.near}")

    @property
    def _band(self) -> tuple[int, int]:
        return self.near, self.far - 1


def _as_positions_value(name: str, positions: Iterable[int]) -> range | tuple[int, ...]:
    """Sorted, unique positions: a range if they are evenly spaced (at least two), else a tuple."""
    if isinstance(positions, range):
        array = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
    else:
        array = np.asarray(positions if isinstance(positions, np.ndarray) else list(positions))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} is {positions!r}; expected integers")
    array = np.unique(array.astype(np.int64))
    if array.size and array[0] < 0:
        raise ValueError(f"{name} contains {array[0]}; expected integers >= 0")
    if array.size >= 2:
        step = int(array[1] - array[0])
        if (np.diff(array) == step).all():
            return range(int(array[0]), int(array[-1]) + 1, step)
    return tuple(array.tolist())


@dataclass(frozen=True)
class _Positions(Pattern):
    """What patterns over a set of positions share: any iterable of ints >= 0, kept sorted and unique."""

    positions: range | tuple[int, ...]

    def __init__(self, positions: Iterable[int]) -> None:
        object.__setattr__(self, "positions", _as_positions_value("positions", positions))

    @cached_property
    def _array(self) -> Ints:
        if isinstance(self.positions, range):
            return np.arange(self.positions.start, self.positions.stop, self.positions.step, dtype=np.int64)
        return np.asarray(self.positions, np.int64)

    def _contains(self, x: Ints) -> Bools:
        if not self.positions:
            return np.zeros(x.shape, np.bool_)
        nearest = np.minimum(np.searchsorted(self._array, x), self._array.size - 1)
        return np.asarray(self._array[nearest] == x)

    def _below(self, length: int) -> Ints:
        return self._array[: np.searchsorted(self._array, length)]


@dataclass(frozen=True, init=False)
class GlobalKeys(_Positions):
    """`k in positions`: keys that every query attends to."""

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        q, k = as_positions(q, k)
        return np.broadcast_to(self._contains(k), np.broadcast_shapes(q.shape, k.shape)).copy()

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        keys = self._below(length)
        return _same_for_all(keys, keys + 1, start.size, grain)

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        return tile_labels.positions(self._array, k0, block_k)

    def key_columns(self, length: int) -> Ints:
        return self._below(length)


@dataclass(frozen=True, init=False)
class GlobalQueries(_Positions):
    """`q in positions`: queries that attend to every key."""

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        q, k = as_positions(q, k)
        return np.broadcast_to(self._contains(q), np.broadcast_shapes(q.shape, k.shape)).copy()

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        count = np.searchsorted(self._array, stop) - np.searchsorted(self._array, start)
        zero = np.zeros_like(start)
        support = sp.from_runs(zero, np.where(count > 0, length, 0))
        return support, sp.from_runs(zero, np.where(count == stop - start, length, 0))

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        return tile_labels.positions(self._array, q0, block_q)

    def query_rows(self, length: int) -> Ints:
        return self._below(length)


@dataclass(frozen=True, init=False)
class GlobalTokens(_Positions):
    """`q in positions or k in positions`: tokens that attend to every key and that every query attends to."""

    @cached_property
    def _parts(self) -> Or:
        return Or(GlobalKeys(self.positions), GlobalQueries(self.positions))

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        return self._parts.allows(q, k)

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        return self._parts._spans(start, stop, length, grain)

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        return self._parts._codes(q0, k0, block_q, block_k)

    def _map(self, fn: Callable[[Pattern, bool], Pattern], positive: bool) -> Pattern:
        return self._parts._map(fn, positive)


def _same_for_all(start: Ints, stop: Ints, runs: int, grain: int) -> tuple[Spans, Spans]:
    """(support, full) where every query attends to the same sorted intervals."""
    row = np.zeros(start.size, np.int64)
    full = sp.from_sorted(row, start, stop, 1)
    support = sp.close_gaps(full, grain)
    if full.start.size > support.start.size:
        full = sp.drop_short(full, grain)
    return sp.shared(support.start, support.stop, runs), sp.shared(full.start, full.stop, runs)


@dataclass(frozen=True)
class FixedStride(Pattern):
    """`k % stride >= stride - summary`: the last `summary` keys of every `stride` keys, for every query.

    The second factor of the fixed attention of Sparse Transformers (Child et al., 2019, section 4.3).
    Raises ValueError unless `1 <= summary <= stride`.
    """

    stride: int
    summary: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", as_int("stride", self.stride, 1))
        object.__setattr__(self, "summary", as_int("summary", self.summary, 1))
        if self.summary > self.stride:
            raise ValueError(f"summary is {self.summary}; expected at most stride, which is {self.stride}")

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        q, k = as_positions(q, k)
        return np.broadcast_to(self._contains(k), np.broadcast_shapes(q.shape, k.shape)).copy()

    def _contains(self, k: Ints) -> Bools:
        return np.asarray(k % self.stride >= self.stride - self.summary)

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        first = np.arange(self.stride - self.summary, length, self.stride, dtype=np.int64)
        return _same_for_all(first, np.minimum(first + self.summary, length), start.size, grain)

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        count = self._count_below(k0 + block_k) - self._count_below(k0)
        return tile_labels.coded(count == 0, count == block_k, k0 % self.stride)

    def _count_below(self, k: Ints) -> Ints:
        return k // self.stride * self.summary + np.maximum(k % self.stride - (self.stride - self.summary), 0)

    def key_columns(self, length: int) -> Ints:
        keys = np.arange(length, dtype=np.int64)
        return keys[self._contains(keys)]


@dataclass(frozen=True)
class Dilated(Pattern):
    """`q - before <= k <= q + after` and `(q - k) % step == 0`: a sliding window with holes.

    Dilated attention of Longformer (Beltagy et al., 2020, section 3.1); `before` and `after` are distances,
    holes included. Raises ValueError if either is negative or step < 1.
    """

    before: int
    after: int
    step: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", as_int("before", self.before, 0))
        object.__setattr__(self, "after", as_int("after", self.after, 0))
        object.__setattr__(self, "step", as_int("step", self.step, 1))

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        q, k = as_positions(q, k)
        back = q - k
        return np.asarray((back <= self.before) & (back >= -self.after) & (back % self.step == 0))

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        if self.step == 1:
            return SlidingWindow(self.before, self.after)._spans(start, stop, length, grain)
        nearest = np.full_like(start, -(self.after // self.step))
        furthest = np.full_like(start, self.before // self.step)
        return _comb(start, stop, length, grain, self.step, nearest, furthest)

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        least, most = q0 - k0 - (block_k - 1), q0 - k0 + (block_q - 1)
        low, high = np.maximum(least, -self.after), np.minimum(most, self.before)
        nothing = (high < low) | (high // self.step == (low - 1) // self.step)
        inside = (least >= -self.after) & (most <= self.before)
        everything = inside & ~nothing & ((self.step == 1) | (least == most))
        edges = tile_labels.band(q0, k0, block_q, block_k, -self.after, self.before)
        return tile_labels.coded(nothing, everything, edges, (q0 - k0) % self.step)


@dataclass(frozen=True)
class Strided(Pattern):
    """`(q - k) % stride == 0`, before and after the query.

    The second factor of the strided attention of Sparse Transformers (Child et al., 2019, section 4.3).
    Raises ValueError if stride < 1.
    """

    stride: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", as_int("stride", self.stride, 1))

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        q, k = as_positions(q, k)
        return np.asarray((q - k) % self.stride == 0)

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        if self.stride == 1:
            return Dense()._spans(start, stop, length, grain)
        nearest = np.full_like(start, -UNBOUNDED)
        return _comb(start, stop, length, grain, self.stride, nearest, -nearest)

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        least, most = q0 - k0 - (block_k - 1), q0 - k0 + (block_q - 1)
        nothing = most // self.stride == (least - 1) // self.stride
        everything = ~nothing & ((self.stride == 1) | (least == most))
        return tile_labels.coded(nothing, everything, (q0 - k0) % self.stride)


def _comb(
    start: Ints, stop: Ints, length: int, grain: int, step: int, nearest: Ints, furthest: Ints
) -> tuple[Spans, Spans]:
    """(support, full) of `q - k == m * step` for `nearest <= m <= furthest` (int64 [runs]); step >= 2.

    The support of a run is itself, shifted by each `m * step`.
    """
    # Only the shifts that meet [0, length).
    furthest = np.minimum(furthest, (stop - 1) // step)
    nearest = np.maximum(nearest, (start - length) // step + 1)
    count = np.maximum(furthest - nearest + 1, 0)
    # Where gaps are closed, one tooth reaches from the first shift to the last.
    solid = step - (stop - start) < grain
    teeth = np.where(solid, np.minimum(count, 1), count)
    width = np.where(solid, (count - 1) * step, 0) + stop - start
    ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(teeth)])
    low = np.arange(0, step * int(ptr[-1]), step, dtype=np.int64)
    low += np.repeat(start - furthest * step - ptr[:-1] * step, teeth)
    high = low + np.repeat(width, teeth)
    support = Spans(ptr, np.maximum(low, 0, out=low), np.minimum(high, length, out=high))
    # Two neighbouring queries share no key, so only runs of one query have full intervals.
    alone = (stop - start == 1) & ~solid
    if alone.all():
        return support, support
    in_full = np.repeat(alone, teeth)
    full_ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.where(alone, teeth, 0))])
    return support, Spans(full_ptr, low[in_full], high[in_full])

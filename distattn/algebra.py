"""Pattern, a set of attended (query position, key position) pairs, and its algebra: `&`, `|`, `~`, PerHead.

The patterns themselves are in `distattn.patterns`, which is also where to import everything here from.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import ArrayLike

from distattn import spans as sp
from distattn import tile_labels
from distattn.spans import Bools, Ints, Spans

UNBOUNDED = 2**62
"""An interval end or a distance that no position reaches."""


def as_int(name: str, value: object, at_least: int | None = None) -> int:
    """`value` as an int. Raises ValueError if it is not an integer or is smaller than `at_least`."""
    expected = "an integer" if at_least is None else f"an integer >= {at_least}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} is {value!r}; expected {expected}") from None
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} is {number}; expected {expected}")
    return number


def as_positions(q: ArrayLike, k: ArrayLike) -> tuple[Ints, Ints]:
    """Both as int64 arrays."""
    return np.asarray(q, np.int64), np.asarray(k, np.int64)


class Pattern(ABC):
    """Who attends to whom: a set of pairs (query position, key position), both >= 0.

    A pattern is an immutable, hashable value; `repr` is Python that builds an equal one. `a & b` are the
    pairs in both, `a | b` those in either, `~a` all others. `allows` is the definition; `spans`, `labels` and
    `row_interval` are derived from it for planning, which never looks at every pair.
    """

    @abstractmethod
    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        """Whether query position q attends to key position k; int64, broadcast against each other."""

    def spans(self, start: ArrayLike, stop: ArrayLike, length: int, grain: int = 1) -> tuple[Spans, Spans]:
        """The keys of runs of queries: `(support, full)`, intervals of `[0, length)`, a row for each run.

        Run i holds the query positions `start[i] <= q < stop[i]` (int64 [runs], not empty). `support`
        contains every key that some query of the run may attend. `full` contains only keys that all of them
        attend. With runs of one query and `grain=1` both are exact, and so equal. With a larger `grain`, gaps
        shorter than it may be closed in the support, and intervals shorter than it may be missing from
        `full`: planning works on pages of `grain` keys, and this keeps strided patterns linear in the pages
        visited.

        Raises ValueError for an empty run, a negative length, or a grain below 1.
        """
        start, stop = np.asarray(start, np.int64), np.asarray(stop, np.int64)
        if start.ndim != 1 or start.shape != stop.shape:
            raise ValueError(f"start has shape {start.shape}, stop {stop.shape}; expected one shape [runs]")
        if (stop <= start).any():
            raise ValueError("stop is not after start in every run; expected runs of at least one query")
        as_int("length", length, 0)
        as_int("grain", grain, 1)
        return self._spans(start, stop, length, grain)

    @abstractmethod
    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]: ...

    def labels(self, q0: ArrayLike, k0: ArrayLike, block_q: int, block_k: int) -> Ints:
        """Labels of the tiles `[q0[i], q0[i] + block_q) x [k0[i], k0[i] + block_k)`; int64 [tiles].

        0 means that nothing in the tile is allowed, 1 that everything is. Tiles with equal labels >= 2 have
        equal masks; these labels are 2, 3, ... without holes and mean nothing beyond this call. They
        saturate: an edge far away from a tile gives 0 or 1. For patterns built by `&` and `|` a tile labelled
        >= 2 may turn out to allow nothing or everything, as its mask then shows.
        """
        q0, k0 = as_positions(q0, k0)
        return tile_labels.dense_ids(self._codes(q0, k0, block_q, block_k))

    @abstractmethod
    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        """As `labels`, but the labels >= 2 may have holes."""

    def row_interval(self, q: ArrayLike) -> tuple[Ints, Ints] | None:
        """The keys `[low, high)` that each query position attends, int64 like q, or None.

        Not None only for patterns in which every query attends to one interval of keys, whose two ends never
        decrease from one position to the next. `high` may lie beyond any sequence; a row with `high <= low`
        attends to nothing; `low` is >= 0. Fastest where q ascends.
        """
        return None

    def row_breaks(self, start: int, stop: int) -> Ints | None:
        """The ascending positions start < i < stop where `row_interval` may change, if these are few, else None."""
        return None

    def key_columns(self, length: int) -> Ints | None:
        """The ascending key positions < length that all queries attend, if that is all the pattern says."""
        return None

    def query_rows(self, length: int) -> Ints | None:
        """The ascending query positions < length that attend to all keys, if that is all the pattern says."""
        return None

    @property
    def heads(self) -> int | None:
        """How many heads it was made for, if there is a `PerHead` in it; None if it serves any number."""
        return None

    def by_head(self, heads: int) -> tuple[Pattern, ...]:
        """The pattern of each head. Raises ValueError if it was made for another number of heads."""
        return (self,) * as_int("heads", heads, 1)

    def map_leaves(self, fn: Callable[[Pattern, bool], Pattern]) -> Pattern:
        """Rebuilds the tree of `&`, `|`, `~` with `fn(leaf, positive)` instead of each leaf.

        `positive` is False under an odd number of `~`. `Dense()` or `~Dense()` make the tree smaller:
        `x & Dense()` is x. A `GlobalTokens(p)` is mapped as `GlobalKeys(p) | GlobalQueries(p)`.
        """
        return self._map(fn, True)

    def _map(self, fn: Callable[[Pattern, bool], Pattern], positive: bool) -> Pattern:
        return fn(self, positive)

    def picture(self, length: int = 64, size: int = 32) -> str:
        """A text drawing of the first `length` positions: `size` rows of queries by `size` columns of keys.

        See `distattn.pictures.draw_text`.
        """
        from distattn.pictures import draw_text

        return draw_text(self, length, size)

    def __and__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        if is_everything(other) or is_nothing(self):
            return self
        if is_everything(self) or is_nothing(other):
            return other
        return And(self, other)

    def __or__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        if is_nothing(other) or is_everything(self):
            return self
        if is_nothing(self) or is_everything(other):
            return other
        return Or(self, other)

    def __invert__(self) -> Pattern:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a pattern is neither true nor false: combine patterns with & | ~ (not with and, or, not), "
            "and compare them with =="
        )


def is_everything(pattern: Pattern) -> bool:
    """Whether it is `Dense()`."""
    return isinstance(pattern, Dense)


def is_nothing(pattern: Pattern) -> bool:
    """Whether it is `~Dense()`, which is how the pattern that allows nothing is written."""
    return isinstance(pattern, Not) and isinstance(pattern.inner, Dense)


class IntervalPattern(Pattern):
    """A pattern whose queries attend to one interval of keys each, with ends that never decrease."""

    @abstractmethod
    def row_interval(self, q: ArrayLike) -> tuple[Ints, Ints]: ...

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        # Both ends only grow, so the first and the last query of a run bound its union and its intersection.
        first_low, first_high = self.row_interval(start)
        last_low, last_high = self.row_interval(stop - 1)
        support = sp.from_runs(first_low, np.minimum(last_high, length))
        full = sp.from_runs(last_low, np.minimum(first_high, length))
        return support, full


@dataclass(frozen=True)
class Dense(IntervalPattern):
    """Every query attends to every key."""

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        q, k = as_positions(q, k)
        return np.ones(np.broadcast_shapes(q.shape, k.shape), np.bool_)

    def row_interval(self, q: ArrayLike) -> tuple[Ints, Ints]:
        q = np.asarray(q, np.int64)
        return np.zeros_like(q), np.full_like(q, UNBOUNDED)

    def row_breaks(self, start: int, stop: int) -> Ints:
        return np.zeros(0, np.int64)

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        return np.ones(q0.shape, np.int64)


@dataclass(frozen=True)
class And(Pattern):
    """The pairs in both patterns. Built by `&`."""

    left: Pattern
    right: Pattern

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        return self.left.allows(q, k) & self.right.allows(q, k)

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        support, full = self.left._spans(start, stop, length, grain)
        other_support, other_full = self.right._spans(start, stop, length, grain)
        return sp.intersect(support, other_support), sp.intersect(full, other_full)

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        a, b = self.left.labels(q0, k0, block_q, block_k), self.right.labels(q0, k0, block_q, block_k)
        if a.max(initial=0) <= 1 or b.max(initial=0) <= 1:
            return a * b
        codes = tile_labels.combine(a, b) + 2
        codes[(a == 0) | (b == 0)] = 0
        codes[(a == 1) & (b == 1)] = 1
        return codes

    def row_interval(self, q: ArrayLike) -> tuple[Ints, Ints] | None:
        a, b = self.left.row_interval(q), self.right.row_interval(q)
        if a is None or b is None:
            return None
        return np.maximum(a[0], b[0]), np.minimum(a[1], b[1])

    def row_breaks(self, start: int, stop: int) -> Ints | None:
        a, b = self.left.row_breaks(start, stop), self.right.row_breaks(start, stop)
        return None if a is None or b is None else np.union1d(a, b)

    @property
    def heads(self) -> int | None:
        return self.left.heads or self.right.heads

    def by_head(self, heads: int) -> tuple[Pattern, ...]:
        pairs = zip(self.left.by_head(heads), self.right.by_head(heads), strict=True)
        return tuple(self if a is self.left and b is self.right else a & b for a, b in pairs)

    def _map(self, fn: Callable[[Pattern, bool], Pattern], positive: bool) -> Pattern:
        return self.left._map(fn, positive) & self.right._map(fn, positive)

    def __repr__(self) -> str:
        left = f"({self.left!r})" if isinstance(self.left, Or) else repr(self.left)
        right = f"({self.right!r})" if isinstance(self.right, And | Or) else repr(self.right)
        return f"{left} & {right}"


@dataclass(frozen=True)
class Or(Pattern):
    """The pairs in either pattern. Built by `|`."""

    left: Pattern
    right: Pattern

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        return self.left.allows(q, k) | self.right.allows(q, k)

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        support, full = self.left._spans(start, stop, length, grain)
        other_support, other_full = self.right._spans(start, stop, length, grain)
        return sp.union(support, other_support), sp.union(full, other_full)

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        a, b = self.left.labels(q0, k0, block_q, block_k), self.right.labels(q0, k0, block_q, block_k)
        if a.max(initial=0) <= 1:
            return np.where(a == 1, 1, b)
        if b.max(initial=0) <= 1:
            return np.where(b == 1, 1, a)
        codes = tile_labels.combine(a, b) + 2
        codes[(a == 0) & (b == 0)] = 0
        codes[(a == 1) | (b == 1)] = 1
        return codes

    @property
    def heads(self) -> int | None:
        return self.left.heads or self.right.heads

    def by_head(self, heads: int) -> tuple[Pattern, ...]:
        pairs = zip(self.left.by_head(heads), self.right.by_head(heads), strict=True)
        return tuple(self if a is self.left and b is self.right else a | b for a, b in pairs)

    def _map(self, fn: Callable[[Pattern, bool], Pattern], positive: bool) -> Pattern:
        return self.left._map(fn, positive) | self.right._map(fn, positive)

    def __repr__(self) -> str:
        right = f"({self.right!r})" if isinstance(self.right, Or) else repr(self.right)
        return f"{self.left!r} | {right}"


@dataclass(frozen=True)
class Not(Pattern):
    """The pairs that are not in a pattern. Built by `~`."""

    inner: Pattern

    def allows(self, q: ArrayLike, k: ArrayLike) -> Bools:
        return ~self.inner.allows(q, k)

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> tuple[Spans, Spans]:
        support, full = self.inner._spans(start, stop, length, grain)
        return sp.complement(full, length), sp.complement(support, length)

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> Ints:
        codes = self.inner.labels(q0, k0, block_q, block_k)
        return np.where(codes <= 1, 1 - codes, codes)

    @property
    def heads(self) -> int | None:
        return self.inner.heads

    def by_head(self, heads: int) -> tuple[Pattern, ...]:
        return tuple(self if a is self.inner else ~a for a in self.inner.by_head(heads))

    def _map(self, fn: Callable[[Pattern, bool], Pattern], positive: bool) -> Pattern:
        return ~self.inner._map(fn, not positive)

    def __invert__(self) -> Pattern:
        return self.inner

    def __repr__(self) -> str:
        return f"~({self.inner!r})" if isinstance(self.inner, And | Or) else f"~{self.inner!r}"


@dataclass(frozen=True)
class PerHead(Pattern):
    """Another pattern for each head; `&`, `|` and `~` go to every head.

    It has no pairs of its own: `allows`, `spans` and `labels` raise ValueError. Ask `by_head(heads)` first.
    Raises ValueError for no patterns at all, or for one that is itself made of a PerHead.
    """

    patterns: tuple[Pattern, ...]

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        object.__setattr__(self, "patterns", tuple(patterns))
        if not self.patterns:
            raise ValueError("patterns is empty; expected one pattern for each head")
        for pattern in self.patterns:
            if not isinstance(pattern, Pattern):
                raise ValueError(f"patterns contains {pattern!r}; expected patterns")
            if pattern.heads is not None:
                raise ValueError(f"patterns contains {pattern!r}, which is itself made of a PerHead")

    def allows(self, q: ArrayLike, k: ArrayLike) -> NoReturn:
        self._refuse("allows")

    def _spans(self, start: Ints, stop: Ints, length: int, grain: int) -> NoReturn:
        self._refuse("spans")

    def _codes(self, q0: Ints, k0: Ints, block_q: int, block_k: int) -> NoReturn:
        self._refuse("labels")

    def _refuse(self, method: str) -> NoReturn:
        raise ValueError(f"a PerHead of {self.heads} patterns has no {method} of its own: pick a head with by_head")

    @property
    def heads(self) -> int:
        return len(self.patterns)

    def by_head(self, heads: int) -> tuple[Pattern, ...]:
        if as_int("heads", heads, 1) != self.heads:
            raise ValueError(f"heads is {heads}; expected {self.heads}, one for each pattern of the PerHead")
        return self.patterns

    def _map(self, fn: Callable[[Pattern, bool], Pattern], positive: bool) -> Pattern:
        return PerHead(pattern._map(fn, positive) for pattern in self.patterns)

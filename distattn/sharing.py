"""Keys that nearly every query visits, and queries that visit nearly every key.

Left among the others, a global key costs every query tile a whole page, and a global query makes its rank fetch the
whole sequence. So planning takes both out of the pattern: global keys are gathered into pages of their own, and
global queries travel to the keys ("guest queries"). What remains is a pattern over the other keys and queries. The
result does not depend on what is taken out, since the parts are disjoint and together are the pattern: this is a
matter of cost alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distattn.patterns import Dense, GlobalQueries, Pattern

Ints = NDArray[np.int64]
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Sharing:
    """What is taken out of the patterns of all heads.

    keys: int64 [n], ascending: positions gathered into pages of their own.
    queries: int64 [n], ascending: positions computed as guest queries.
    main: by head, the pattern for all other queries and keys.
    gathered: by head, the pattern for all other queries and the gathered keys.
    whole: by head, the pattern itself, for the guest queries and all keys.
    """

    keys: Ints
    queries: Ints
    main: tuple[Pattern, ...]
    gathered: tuple[Pattern, ...]
    whole: tuple[Pattern, ...]


def find_sharing(patterns: Sequence[Pattern], length: int, blocks: tuple[int, int], world_size: int) -> Sharing:
    """Chooses the global keys and queries of the heads' patterns."""
    distinct = tuple(dict.fromkeys(patterns))
    keys = _union(
        columns
        for pattern in distinct
        for leaf in _leaves(pattern)
        if (columns := leaf.key_columns(length)) is not None and _worth(columns, length, blocks[1], world_size)
    )
    candidates = _union(
        rows for pattern in distinct for leaf in _leaves(pattern) if (rows := leaf.query_rows(length)) is not None
    )
    queries = _far_rows(distinct, candidates, length, blocks, world_size)
    key_set, query_set = frozenset(keys.tolist()), frozenset(queries.tolist())

    def without(leaf: Pattern, positive: bool) -> Pattern:
        if not positive:
            return leaf
        columns, rows = leaf.key_columns(length), leaf.query_rows(length)
        if columns is not None and key_set and key_set.issuperset(columns.tolist()):
            return ~Dense()
        if rows is not None and query_set:
            left = [row for row in rows.tolist() if row not in query_set]
            return GlobalQueries(left) if left else ~Dense()
        return leaf

    def on_gathered(leaf: Pattern, positive: bool) -> Pattern:
        columns = leaf.key_columns(length)
        if columns is not None and len(columns) >= len(keys) and np.isin(keys, columns).all():
            return Dense()
        return without(leaf, positive) if columns is None else leaf

    main = {pattern: pattern.map_leaves(without) for pattern in distinct}
    gathered = {pattern: pattern.map_leaves(on_gathered) for pattern in distinct}
    return Sharing(
        keys,
        queries,
        tuple(main[pattern] for pattern in patterns),
        tuple(gathered[pattern] for pattern in patterns),
        tuple(patterns),
    )


def _leaves(pattern: Pattern) -> list[Pattern]:
    """The leaves under an even number of negations."""
    found: list[Pattern] = []

    def note(leaf: Pattern, positive: bool) -> Pattern:
        if positive:
            found.append(leaf)
        return leaf

    pattern.map_leaves(note)
    return found


def _union(parts: Iterable[Ints]) -> Ints:
    every = [np.asarray(part, np.int64) for part in parts]
    return np.unique(np.concatenate(every)) if every else _NONE


def _worth(columns: Ints, length: int, block: int, world_size: int) -> bool:
    """Whether gathering spares at least half of the pages that hold the columns, or lets other ranks wait for few rows
    only, which come first, where nearly every tile needs them."""
    if len(columns) == 0:
        return False
    pages, packed = len(np.unique(columns // block)), -(-len(columns) // block)
    few = len(columns) * 4 * world_size <= length
    return pages >= 2 * packed or (world_size > 1 and few)


def _far_rows(patterns: Sequence[Pattern], rows: Ints, length: int, blocks: tuple[int, int], world_size: int) -> Ints:
    """The rows that reach pages which their neighbours, without the GlobalQueries leaf, would not."""
    if len(rows) == 0:
        return rows
    far = np.zeros(len(rows), np.bool_)
    for pattern in patterns:
        local = pattern.map_leaves(
            lambda leaf, positive: ~Dense() if positive and leaf.query_rows(length) is not None else leaf
        )
        far |= _reach(pattern, rows, length, blocks[1]) > _reach(local, rows, length, blocks[1]) + blocks[1]
    far_rows = rows[far]
    spread = len(np.unique(far_rows // blocks[0])) >= 2 * -(-len(far_rows) // blocks[0])
    return far_rows if world_size > 1 or spread else _NONE


def _reach(pattern: Pattern, rows: Ints, length: int, grain: int) -> Ints:
    """int64 [rows]: how many keys each row's support covers."""
    support, _ = pattern.spans(rows, rows + 1, length, grain)
    return np.bincount(support.row_of(), support.stop - support.start, support.rows).astype(np.int64)

"""Who has which pages of a cache: tables of pages by sequence, free lists and reference counts of every rank.

Nothing here holds a key or a value. It is a pure function of the calls so far, and every rank makes the same calls, so
that all know the whole cache without talking.

The pages of all key/value heads for the same ``rows`` positions live and die together: a *block*. Page h of block b
is rows ``b * rows ..`` of head h in the tensors of its rank. Page p of a sequence holds its positions ``p * rows ..``.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distattn.errors import CacheFull, ConfigError
from distattn.spans import Bools, Ints

Int32 = NDArray[np.int32]


class Stretch(NamedTuple):
    """Rows that were appended to one sequence.

    owner, block: int64 [pages], of the pages that they are in. before: rows of the first page that were there already.
    size: how many.
    """

    owner: Ints
    block: Ints
    before: int
    size: int


@dataclass(frozen=True, eq=False)
class Written:
    """Where rows go that were appended, in the order of the sequences and of their positions.

    rows: of a page. parts: by sequence.
    copies: (rank, block, new block): what must be copied first, since another sequence still reads the old block.
    """

    rows: int
    parts: tuple[Stretch, ...]
    copies: tuple[tuple[int, int, int], ...]

    @cached_property
    def owner(self) -> Ints:
        """int64 [n], a rank each."""
        return self._of_rows([part.owner[:, None] + np.zeros(self.rows, np.int64) for part in self.parts])

    @cached_property
    def slot(self) -> Ints:
        """int64 [n], rows of that rank's tensors."""
        return self._of_rows([part.block[:, None] * self.rows + np.arange(self.rows) for part in self.parts])

    @property
    def run(self) -> slice | None:
        """The rows of a rank's tensors as a slice, where there is one sequence and they follow one another there."""
        if len(self.parts) != 1 or not self.parts[0].size:
            return None
        owner, block, before, size = self.parts[0]
        if (owner != owner[0]).any() or (block - block[0] != np.arange(len(block))).any():
            return None
        first = int(block[0]) * self.rows + before
        return slice(first, first + size)

    def _of_rows(self, pages: list[Ints]) -> Ints:
        """What the rows of pages have, [pages, rows] by sequence, as that of the rows that were appended."""
        ends = [(part.before, part.before + part.size) for part in self.parts]
        rows = [x.ravel()[first:stop] for x, (first, stop) in zip(pages, ends, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *rows])


class _Sequence:
    """length: positions so far. owner, block: int32 [pages], -1 where a page was evicted."""

    def __init__(self, length: int, owner: Int32, block: Int32) -> None:
        self.length, self.owner, self.block = length, owner, block


class PageTables:
    """Tables of pages over the blocks of all ranks.

    Args:
        world_size: ranks.
        blocks: of each rank.
        rows: positions of a block.

    Attributes:
        references: int32 [world_size, blocks]: how many sequences read each block; 0: it is free.
    """

    def __init__(self, world_size: int, blocks: int, rows: int) -> None:
        for name, value in (("world_size", world_size), ("blocks", blocks), ("rows", rows)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        self.world_size, self.blocks, self.rows = world_size, blocks, rows
        self.references: Int32 = np.zeros((world_size, blocks), np.int32)
        self._left = np.full(world_size, blocks)  # free blocks of each rank
        self._sequences: dict[int, _Sequence] = {}
        self._added = 0

    @property
    def sequences(self) -> tuple[int, ...]:
        """Those that were added or forked, and not freed."""
        return tuple(self._sequences)

    def free_blocks(self, rank: int) -> int:
        return int(self._left[rank])

    def length(self, sequence: int) -> int:
        """Positions that were appended, evicted ones included."""
        return self._of(sequence).length

    def pages(self, sequence: int) -> tuple[Int32, Int32]:
        """(owner, block), int32 [pages] each: the rank and the block of each page; -1 where it was evicted."""
        found = self._of(sequence)
        return found.owner, found.block

    def add(self) -> int:
        """A new, empty sequence. Numbers are never used twice."""
        return self._insert(_Sequence(0, np.zeros(0, np.int32), np.zeros(0, np.int32)))

    def fork(self, sequence: int) -> int:
        """A new sequence that begins with all positions of another, and shares their blocks."""
        old = self._of(sequence)
        self._refer(old.owner, old.block, 1)
        return self._insert(_Sequence(old.length, old.owner.copy(), old.block.copy()))

    def free(self, sequence: int) -> None:
        """Ends a sequence; blocks that no other reads are free."""
        old = self._of(sequence)
        del self._sequences[sequence]
        self._release(old.owner, old.block)

    def evict(self, sequence: int, pages: Iterable[int]) -> None:
        """Takes pages from a sequence, for good. Their positions still count.

        Raises:
            ConfigError: a page is not there, or was evicted before; or it is the last one, which is still being filled.
        """
        found, which = self._of(sequence), np.unique(np.fromiter(pages, np.int64))
        whole = found.length // self.rows
        if len(which) and not 0 <= which[0] <= which[-1] < whole:
            raise ConfigError(
                f"pages are {which.tolist()}; expected whole pages of sequence {sequence}, 0 to {whole - 1}"
            )
        if (found.owner[which] < 0).any():
            gone = which[found.owner[which] < 0].tolist()
            raise ConfigError(f"pages are {which.tolist()}; expected some that are there, and {gone} were evicted")
        self._release(found.owner[which], found.block[which])
        found.owner[which] = found.block[which] = -1

    def append(self, counts: Mapping[int, int]) -> Written:
        """Makes room for new positions at the ends of sequences.

        New blocks go to the ranks with the most free ones, and are their lowest, so that what follows one another in a
        sequence mostly does so in memory.

        Args:
            counts: how many positions, by sequence.

        Raises:
            ConfigError: there is no such sequence, or a count is below 0.
            CacheFull: there is no room for all of them; nothing has changed.
        """
        for sequence, count in counts.items():
            self._of(sequence)
            if count < 0:
                raise ConfigError(f"counts has {count} for sequence {sequence}; expected at least 0")
        copied, more = self._wanted(counts)
        left = self._left
        if (copied > left).any() or more + copied.sum() > left.sum():
            total = sum(counts.values())
            raise CacheFull(
                f"there is no room for {total:,} tokens of {len(counts)} sequences: {more + copied.sum():,} blocks of "
                f"{self.rows} are needed, {copied.tolist()} of them on the ranks that hold what they copy, and "
                f"{left.tolist()} are free by rank, of {self.blocks:,} each"
            )
        copies = []
        for sequence, count in counts.items():
            if (copy := self._own_last(self._of(sequence), count)) is not None:
                copies.append(copy)
        parts = [self._extend(self._of(sequence), count) for sequence, count in counts.items()]
        return Written(self.rows, tuple(parts), tuple(copies))

    def _wanted(self, counts: Mapping[int, int]) -> tuple[Ints, int]:
        """(blocks to copy on each rank, new blocks anywhere)."""
        copied, more = np.zeros(self.world_size, np.int64), 0
        readers: dict[tuple[int, int], int] = {}
        for sequence, count in counts.items():
            found = self._of(sequence)
            more += -(-(found.length + count) // self.rows) - len(found.owner)
            if count and found.length % self.rows:
                last = int(found.owner[-1]), int(found.block[-1])
                left = readers.setdefault(last, int(self.references[last]))
                if left > 1:
                    readers[last] -= 1
                    copied[last[0]] += 1
        return copied, more

    def _own_last(self, found: _Sequence, count: int) -> tuple[int, int, int] | None:
        """Sees to it that no other sequence reads the page that is filled further."""
        if not count or found.length % self.rows == 0:
            return None
        rank, block = int(found.owner[-1]), int(found.block[-1])
        if self.references[rank, block] == 1:
            return None
        (new,) = self._take(rank, 1).tolist()
        self.references[rank, block] -= 1
        found.block[-1] = new
        return rank, block, new

    def _extend(self, found: _Sequence, count: int) -> Stretch:
        first, stop = found.length, found.length + count
        new = -(-stop // self.rows) - len(found.owner)
        owner, block = self._next_owners(new), np.zeros(new, np.int32)
        for rank, taken in enumerate(np.bincount(owner).tolist()):
            if taken:
                block[owner == rank] = self._take(rank, taken)
        found.owner, found.block = np.append(found.owner, owner), np.append(found.block, block)
        found.length = stop
        pages = slice(first // self.rows, -(-stop // self.rows) if count else first // self.rows)
        owners, blocks = (x[pages].astype(np.int64) for x in (found.owner, found.block))
        return Stretch(owners, blocks, first % self.rows, count)

    def _next_owners(self, count: int) -> Int32:
        """int32 [count]: each time the rank with the most free blocks, the lowest of equals."""
        owner = np.zeros(count, np.int32)
        if self.world_size == 1 or count == 0:
            return owner
        ranks = [(-left, rank) for rank, left in enumerate(self._left.tolist())]
        heapq.heapify(ranks)
        for i in range(count):
            left, owner[i] = ranks[0]
            heapq.heapreplace(ranks, (left + 1, int(owner[i])))
        return owner

    def _take(self, rank: int, count: int) -> Ints:
        """int64 [count]: the lowest free blocks of a rank, which are free no more."""
        blocks = np.flatnonzero(self.references[rank] == 0)[:count]
        self.references[rank, blocks] = 1
        self._left[rank] -= count
        return blocks

    def _refer(self, owner: Int32, block: Int32, by: int) -> Bools:
        """Changes the counts of blocks that are there; bool [pages]: which these are."""
        there = owner >= 0
        np.add.at(self.references, (owner[there], block[there]), by)
        return there

    def _release(self, owner: Int32, block: Int32) -> None:
        there = self._refer(owner, block, -1)
        freed = owner[there][self.references[owner[there], block[there]] == 0]
        self._left += np.bincount(freed, minlength=self.world_size)

    def _insert(self, sequence: _Sequence) -> int:
        self._added += 1
        self._sequences[self._added - 1] = sequence
        return self._added - 1

    def _of(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise ConfigError(f"sequence is {sequence}; expected one of {list(self._sequences)}")
        return self._sequences[sequence]

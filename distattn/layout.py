"""Who owns which tokens.

A layout cuts the sequence into segments at multiples of ``unit`` (whole query tiles and whole pages, so that neither
ever crosses ranks) and gives each segment to a rank. Every rank gets equally many tokens, to within one unit. A rank
keeps its segments in the order of their positions. The end of the sequence needs no padding: its last tile is short.

For four ranks:

    contiguous  0000111122223333      neighbours hold what a window needs
    zigzag      0011223333221100      equal work for dense causal attention, with two segments a rank
    striped     0123012301230123      equal work for anything that changes slowly along the sequence
    balanced    by measured work      equal work for anything; keeps neighbours together where it can
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distattn.errors import ConfigError

Ints = NDArray[np.int64]

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
# Segments a rank gets at the most: more would not balance better than tiles already do, and costs planning time.
MAX_SEGMENTS = 64
# A rank's work may exceed the mean by this much before `balanced` cuts the sequence finer.
TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class Layout:
    """Segments ``start[i] .. stop[i] - 1`` with their owners, by position.

    start, stop: int64 [segments]; owner: int64 [segments], a rank. Neighbouring segments have different owners.
    """

    name: str
    seq_len: int
    world_size: int
    unit: int
    start: Ints
    stop: Ints
    owner: Ints

    def segments(self, rank: int) -> tuple[tuple[int, int], ...]:
        mine = self.owner == rank
        return tuple(zip(self.start[mine].tolist(), self.stop[mine].tolist(), strict=True))

    def tokens(self) -> Ints:
        """int64 [world_size]: tokens of each rank."""
        return np.bincount(self.owner, self.stop - self.start, self.world_size).astype(np.int64)

    def owners(self, block: int) -> Ints:
        """int64 [blocks]: the owner of each block of ``block`` tokens, where ``block`` divides the unit."""
        count = -(-self.stop // block) - self.start // block
        return np.repeat(self.owner, count)

    def owner_of(self, positions: Ints) -> Ints:
        """int64 [n]: the owner of each position."""
        return self.owner[np.searchsorted(self.start, positions, side="right") - 1]

    def local_rows(self, positions: Ints, rank: int) -> Ints:
        """Positions that a rank owns, as rows of its own tokens."""
        mine = self.owner == rank
        start, size = self.start[mine], (self.stop - self.start)[mine]
        if len(positions) == 0:
            return np.zeros(0, np.int64)
        segment = np.searchsorted(start, positions, side="right") - 1
        return np.asarray((np.cumsum(size) - size)[segment] + positions - start[segment])

    def divided(self, parts: int) -> Layout:
        """Each rank's rows cut into equal runs, to within one unit: those of rank r for ranks r * parts and following.

        For 2 ranks, zigzag and 2 parts: 0000111111110000 becomes 0000222233331111.
        """
        owner = self.owners(self.unit)
        count = np.bincount(owner, minlength=self.world_size)
        order = np.argsort(owner, kind="stable")
        nth = np.empty_like(owner)  # of its owner's units
        nth[order] = np.arange(len(owner)) - (np.cumsum(count) - count)[owner[order]]
        part = nth * parts // count[owner]
        return _of_units(self.name, self.seq_len, self.world_size * parts, self.unit, owner * parts + part)

    def joined(self, parts: int) -> Layout:
        """The layout of which :meth:`divided` made this one.

        Raises:
            ConfigError: there is none.
        """
        whole = None
        if self.world_size % parts == 0:
            owner = self.owners(self.unit) // parts
            whole = _of_units(self.name, self.seq_len, self.world_size // parts, self.unit, owner)
        if whole is None or not np.array_equal(whole.divided(parts).owners(self.unit), self.owners(self.unit)):
            raise ConfigError(
                f"layout is {self.name!r} for {self.world_size} ranks, not one whose shards are divided among {parts} "
                "each; expected that of a plan on such a mesh, or a name"
            )
        return whole


def make_layout(name: str, seq_len: int, world_size: int, unit: int, work: Ints | None = None) -> Layout:
    """The layout of a name.

    Args:
        name: one of LAYOUTS.
        seq_len: tokens of the sequence.
        world_size: ranks.
        unit: segments begin at multiples of it.
        work: int64 [ceil(seq_len / unit)], the work of each unit (tiles, say); ``balanced`` needs it.

    Raises:
        ConfigError: the name is unknown, or ``work`` is missing.
    """
    units = -(-seq_len // unit)
    if name == "contiguous":
        owner = _even(units, world_size)
    elif name == "zigzag":
        size = np.bincount(_even(units, world_size), minlength=world_size)
        piece = np.repeat(np.arange(2 * world_size), np.concatenate((size - size // 2, (size // 2)[::-1])))
        owner = np.minimum(piece, 2 * world_size - 1 - piece)
    elif name == "striped":
        stripes = world_size * _stripes(units, world_size)
        # The longer stripes come first, so that they go round all ranks.
        size = units // stripes + (np.arange(stripes) < units % stripes)
        owner = np.repeat(np.arange(stripes) % world_size, size)
    elif name == "balanced":
        if work is None:
            raise ConfigError("layout 'balanced' needs the work of each unit of the sequence, got none")
        owner = _balanced(work, world_size)
    else:
        raise ConfigError(f"layout must be one of {', '.join(LAYOUTS)} or auto, got {name!r}")
    return _of_units(name, seq_len, world_size, unit, owner)


def _of_units(name: str, seq_len: int, world_size: int, unit: int, owner: Ints) -> Layout:
    """The layout in which each unit of the sequence has this owner."""
    edges = np.flatnonzero(np.diff(owner)) + 1
    first = np.concatenate((np.zeros(1, np.int64), edges))
    last = np.append(edges, len(owner))
    return Layout(
        name, seq_len, world_size, unit, first * unit, np.minimum(last * unit, seq_len), owner[first].astype(np.int64)
    )


def _even(units: int, pieces: int) -> Ints:
    """int64 [units]: which of ``pieces`` runs of nearly equal length each unit is in."""
    bounds = np.arange(pieces + 1) * units // pieces
    return np.repeat(np.arange(pieces), np.diff(bounds))


def _stripes(units: int, world_size: int) -> int:
    return max(1, min(MAX_SEGMENTS, units // world_size))


def imbalance(work: Ints, owner: Ints, world_size: int) -> float:
    """The largest rank's work over the mean, less one."""
    load = np.bincount(owner, work, world_size)
    return float(load.max() / max(load.mean(), 1e-30) - 1)


def _balanced(work: Ints, world_size: int) -> Ints:
    """Starts with whole runs, and cuts them finer until the work is even."""
    best = _even(len(work), world_size)
    lowest = imbalance(work, best, world_size)
    pieces = 2
    while lowest > TOLERANCE and pieces <= _stripes(len(work), world_size):
        owner = _assign(work, world_size, pieces)
        here = imbalance(work, owner, world_size)
        if here < lowest:
            best, lowest = owner, here
        pieces *= 2
    return best


def _assign(work: Ints, world_size: int, pieces: int) -> Ints:
    """Gives each rank ``pieces`` runs of units, heaviest run first to the rank with the least work so far.

    Among ranks that are nearly equally loaded it prefers one that owns a neighbouring run, since what neighbours visit
    then need not travel. Runs differ by at most one unit; the longer ones are dealt first and evenly, so that tokens
    stay equal to within one unit.
    """
    piece = _even(len(work), world_size * pieces)
    load = np.bincount(piece, work, world_size * pieces)
    size = np.bincount(piece, minlength=world_size * pieces)
    longer = size > size.min()
    owner = np.full(world_size * pieces, -1, np.int64)
    done, runs = np.zeros(world_size), np.zeros(world_size, np.int64)
    slack = TOLERANCE / 4 * load.sum() / world_size
    for kind in (longer, ~longer):
        todo = np.flatnonzero(kind)
        # Longer runs go round evenly; the others fill every rank up to its number of runs.
        limit = -(-len(todo) // world_size) if kind is longer else pieces
        for run in todo[np.argsort(-load[todo], kind="stable")]:
            free = runs < limit
            rank = int(np.argmin(np.where(free, done, np.inf)))
            for beside in (run - 1, run + 1):
                near = owner[beside] if 0 <= beside < len(owner) else -1
                if near >= 0 and free[near] and done[near] <= done[rank] + slack:
                    rank = int(near)
                    break
            owner[run] = rank
            done[rank] += load[run]
            runs[rank] += 1
    return owner[piece]

"""What the steps of a cache visit, for layers of one spec: planned ahead while steps go on alike.

Planning many query tiles takes hardly longer than planning few. So where a step goes on from those that were planned
last, and is like them, as slices of a prompt and single tokens are, twice as many steps are planned as before, at once.

That changes nothing: what a whole tile visits under a causal pattern follows from its positions alone, and not from
how many tokens come after it, or are there already. Steps with tiles that are not whole are planned one by one.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from distattn.algebra import Pattern
from distattn.axis import Axis
from distattn.cached_levels import LevelPlan, Sizes
from distattn.paged import Tiles
from distattn.patterns import Causal
from distattn.spans import Ints
from distattn.spec import AttentionSpec
from distattn.tiles import Visits, sharing_masks, visit

_BLOCK_Q = 128
# Not more steps and tiles are planned at once, nor more than what so many bytes tell of: a token that waits for a plan
# should not wait for long.
_STEPS, _TILES = 64, 4096
_BYTES = 1 << 22
# So much of what was planned is kept, and so many bytes: it serves other sequences that are read alike.
_KEPT, _KEPT_BYTES = 8, 1 << 24


class Seen(NamedTuple):
    """What query tiles visit, in pages of their own sequence; all with the same masks.

    tokens: by distinct pattern. summaries: in pages of a sequence's buffer; empty, or one, where these follow from
    positions alone.
    """

    tokens: tuple[Visits, ...]
    summaries: tuple[Visits, ...]

    def run(self, first: int, stop: int) -> Seen:
        """Those of the tiles ``first .. stop - 1``."""
        return Seen(*(tuple(visits.run(first, stop) for visits in some) for some in self))

    @property
    def nbytes(self) -> int:
        every = (*self.tokens, *self.summaries)
        return sum(visits.nbytes for visits in every) + every[0].masks.nbytes


class _Planned(NamedTuple):
    """Steps that were planned at once.

    start, size: int64 [sequences], new positions of the first one. steps: how many. seen: what the tiles of all visit.
    """

    start: Ints
    size: Ints
    steps: int
    seen: Seen

    def number(self, start: Ints, count: Ints) -> int:
        """Which of the steps that begin with the first one a step is, or -1."""
        if not np.array_equal(count, self.size):
            return -1
        number = int(start[0] - self.start[0]) // int(count[0])
        return number if number >= 0 and np.array_equal(self.start + number * count, start) else -1


class Outlook:
    """What layers of one spec share over all steps with few new tokens of each sequence, or with many.

    Args:
        spec: of the layers.
        plan: of what they visit beside tokens; None: of nothing.
        tile: (rows of a query tile, what its first position is a multiple of).
        sizes: of the cache.
        everywhere: whether all new rows go to all ranks.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        plan: LevelPlan | None,
        tile: tuple[int, int],
        sizes: Sizes,
        everywhere: bool,
    ) -> None:
        self.spec, self.plan, self.everywhere, self._tile, self._sizes = spec, plan, everywhere, tile, sizes
        self._planned: list[_Planned] = []  # the one that was used last is the last

    @cached_property
    def _by_head(self) -> tuple[Pattern, ...]:
        tokens = self.spec.tokens if self.plan is None else self.plan.spec.tokens
        return tuple(causal(pattern) for pattern in tokens.by_head(self._sizes.heads))

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """The distinct ones of the heads, as they are in a cache."""
        return tuple(dict.fromkeys(self._by_head))

    @cached_property
    def head_table(self) -> tuple[int, ...]:
        """Of each head, the number of its pattern."""
        return tuple(self.patterns.index(pattern) for pattern in self._by_head)

    @property
    def sees_all_summaries(self) -> bool:
        """Whether positions alone decide which summaries are visited."""
        if self.plan is None or not self.plan.spec.summaries:
            return False
        return self.plan.spec.select is None or self.plan.spec.merge == "gate"

    def tiles(self, start: Ints, count: Ints) -> Tiles:
        """Of a step. start, count: int64 [sequences], the new positions of each."""
        return Tiles.of(start, count, *self._tile)

    def seen(self, start: Ints, count: Ints, tiles: Tiles) -> Seen:
        """What the tiles of a step visit."""
        for place, planned in reversed([*enumerate(self._planned)]):
            number = planned.number(start, count)
            if 0 <= number < planned.steps:
                self._planned.append(self._planned.pop(place))
                return planned.seen.run(number * len(tiles), (number + 1) * len(tiles))
        steps = self._steps(start, count, tiles)
        more = start + count * np.arange(steps)[:, None]
        every = tiles if steps == 1 else self.tiles(more.ravel(), np.tile(count, steps))
        seen = self._plan(every, int((more[-1] + count).max()))
        self._planned = [*self._planned[1 - _KEPT :], _Planned(start, count, steps, seen)]
        while len(self._planned) > 1 and sum(planned.seen.nbytes for planned in self._planned) > _KEPT_BYTES:
            self._planned.pop(0)
        return seen.run(0, len(tiles))

    def _steps(self, start: Ints, count: Ints, tiles: Tiles) -> int:
        """How many steps to plan at once."""
        rows, unit = self._tile
        if not self._planned or (count % rows).any() or (start % unit).any():
            return 1
        last = self._planned[-1]
        if last.number(start, count) != last.steps or last.seen.nbytes > _BYTES:
            return 1
        until_end = int(((self._sizes.max_len - start) // count).min())
        return max(min(2 * last.steps, until_end, _STEPS, _TILES // len(tiles)), 1)

    def _plan(self, tiles: Tiles, length: int) -> Seen:
        axes = Axis(length, tiles.block, first=tiles.first), Axis.grid(length, self._sizes.block_k)
        visits = [visit(pattern, *axes) for pattern in self.patterns]
        if self.sees_all_summaries:
            assert self.plan is not None
            visits.append(self.plan.visited(tiles))
        shared, number = tuple(sharing_masks(visits)), len(self.patterns)
        return Seen(shared[:number], shared[number:])


def outlook_of(
    spec: AttentionSpec, plan: LevelPlan | None, retrieval: LevelPlan | None, sizes: Sizes, few: bool
) -> Outlook:
    """plan: of what layers of the spec visit beside tokens; retrieval: of the pages that they retrieve where new tokens
    are few."""
    everywhere = plan is not None or retrieval is not None  # bounds of pages are made of all keys
    plan = retrieval if few and retrieval is not None else plan
    tile = (1 if few else _BLOCK_Q, 1) if plan is None else plan.tile(few, _BLOCK_Q)
    return Outlook(spec, plan, tile, sizes, everywhere)


def causal(pattern: Pattern) -> Pattern:
    """What the pattern allows of the positions up to the query's."""
    return pattern if isinstance(pattern, Causal) else Causal() & pattern

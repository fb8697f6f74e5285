"""Attention of one layer on all ranks, as a plan does it: the sizes of what is computed, held and sent, by rank.

What the cost model and the account of memory have in common. Of chunks that the data choose it is estimated how many
travel, as if every candidate were as good as any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distattn.hierarchy import Hierarchy
from distattn.layout import Layout
from distattn.loads import Floats, Load, stage_loads
from distattn.outline import Outline

if TYPE_CHECKING:
    from distattn.plan import Plan

# Positions are taken together in so many groups where it is estimated who chooses whose chunks.
_GROUPS = 256
# Of what other ranks have: where more is wanted, it comes in rounds; see chosen.py.
_MUCH = 0.5


class Round(NamedTuple):
    """Chosen chunks that come together, of each key/value head; float64 [ranks].

    distance: from which rank they come, None: from all. take, give: chunks. share: of what tiles chose.
    """

    distance: int | None
    take: Floats
    give: Floats
    share: Floats


@dataclass(frozen=True, eq=False)
class Task:
    """The fields are those of a Plan; itemsize: bytes of an element of q, k and v. The batch is one."""

    outline: Outline
    layout: Layout
    hierarchy: Hierarchy | None
    schedule: str
    slices: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int

    @staticmethod
    def of(plan: Plan, itemsize: int) -> Task:
        names = ("outline", "layout", "hierarchy", "schedule", "slices", "kv_heads", "head_dim", "value_dim")
        return Task(**{name: getattr(plan, name) for name in names}, itemsize=itemsize)

    @property
    def heads(self) -> int:
        return len(self.outline.table_of)

    @property
    def world(self) -> int:
        return self.layout.world_size

    @property
    def blocks(self) -> tuple[int, int]:
        return self.outline.grid_q.block, self.outline.grid_k.block

    @property
    def dim(self) -> int:
        """Elements of a row of K and V of one head."""
        return self.head_dim + self.value_dim

    @property
    def wide(self) -> int:
        """Bytes of an element of what is summed up."""
        return max(self.itemsize, 4)

    @cached_property
    def tokens(self) -> Floats:
        return self.layout.tokens().astype(np.float64)

    @cached_property
    def rows(self) -> Floats:
        """Query rows of all heads."""
        return self.tokens * self.heads

    @property
    def outputs(self) -> Floats:
        """Elements of a rank's result."""
        return self.rows * self.value_dim

    @property
    def keys(self) -> Floats:
        """Elements of a rank's K and V."""
        return self.tokens * self.kv_heads * self.dim

    @property
    def queries(self) -> int:
        """Rows of guest queries, of all heads."""
        return len(self.outline.sharing.queries) * self.heads

    @cached_property
    def loads(self) -> list[Load]:
        return stage_loads(self.outline, self.layout, self.kv_heads, self.schedule, self.slices)

    @property
    def resumes(self) -> bool:
        """Whether a stage goes on from what earlier ones made."""
        return any(load.resumes for load in self.loads)

    @property
    def gate(self) -> bool:
        """Whether there are several softmaxes."""
        return self.hierarchy is not None and self.hierarchy.spec.merge == "gate"

    def room(self, parity: int) -> Floats:
        """Elements of a guest buffer, that of even or of odd stages."""
        sizes = [load.guest_rows for load in {id(x): x for x in self.loads[parity::2]}.values()]
        heads = self.kv_heads / self.slices
        return np.asarray(np.max(np.stack([np.zeros(self.world), *sizes]), axis=0) * (heads * self.dim), np.float64)

    @cached_property
    def summaries(self) -> Floats:
        """Elements of the level-1 summaries that each rank pools."""
        assert self.hierarchy is not None
        owner = self.layout.owner_of(self.hierarchy.levels[0].start)
        return np.asarray(np.bincount(owner, minlength=self.world) * (self.kv_heads * self.dim), np.float64)

    @cached_property
    def visited(self) -> tuple[Floats, Floats, Floats]:
        """Summaries, tokens of chosen chunks, and summaries that these open (``Hierarchy.opened``), as a query visits:
        the mean over each rank's."""
        assert self.hierarchy is not None
        first, size, summaries, chosen = self.hierarchy.visited()
        owner, tokens = self.layout.owner_of(first), np.maximum(self.tokens, 1)
        visited = summaries, chosen, self.hierarchy.opened(first, chosen)
        means = (np.bincount(owner, x * size, self.world) / tokens for x in visited)
        return next(means), next(means), next(means)

    @cached_property
    def positions(self) -> Floats:
        """The mean position of each rank's tokens, as a share of the sequence."""
        weight = (self.layout.stop - self.layout.start) * (self.layout.start + self.layout.stop) / 2
        total = np.bincount(self.layout.owner, weight, self.world) / np.maximum(self.tokens, 1)
        return np.asarray(total / self.layout.seq_len, np.float64)

    @cached_property
    def own_share(self) -> Floats:
        """Of what tiles chose, the share that is their own rank's."""
        _, visited = self._wanted
        return np.diagonal(visited).copy()

    @cached_property
    def rounds(self) -> list[Round]:
        """In which chosen chunks come from other ranks; [] on one rank."""
        assert self.hierarchy is not None
        if self.world == 1:
            return []
        wanted, visited = self._wanted
        away = wanted - np.diag(np.diagonal(wanted))
        if away.sum(axis=1).max() <= _MUCH * self.hierarchy.chunks * (self.world - 1) / self.world:
            return [Round(None, away.sum(axis=1), away.sum(axis=0), 1 - self.own_share)]
        rank = np.arange(self.world)
        return [
            Round(s, away[rank, (rank - s) % self.world], away[(rank + s) % self.world, rank], visited[rank, rank - s])
            for s in range(1, self.world)
        ]

    @cached_property
    def _wanted(self) -> tuple[Floats, Floats]:
        """[ranks, ranks]: chunks of each rank that a rank's tiles want, of each key/value head; and of what its tiles
        visit the share that lies there."""
        hierarchy = self.hierarchy
        assert hierarchy is not None and hierarchy.spec.select is not None
        groups, k = min(_GROUPS, hierarchy.chunks), hierarchy.spec.select.k
        inside = self._tokens_by_group(groups)
        tiles, chunks = inside / hierarchy.tile, inside / hierarchy.chunk
        centre = (np.arange(groups) + 0.5) / groups * hierarchy.chunks
        candidates = np.maximum(centre if hierarchy.causal else np.full(groups, float(hierarchy.chunks)), k)
        draws = tiles * k / candidates
        if hierarchy.causal:
            # A tile chooses among chunks before it: of a chunk these are draws of later tiles, and half its group's.
            draws = np.cumsum(draws[:, ::-1], axis=1)[:, ::-1] - draws / 2
        else:
            draws = np.repeat(draws.sum(axis=1, keepdims=True), groups, axis=1)
        visited = draws @ chunks.T
        return -np.expm1(-draws) @ chunks.T, visited / np.maximum(visited.sum(axis=1, keepdims=True), 1e-30)

    def _tokens_by_group(self, groups: int) -> Floats:
        """[ranks, groups]: tokens of each rank in equal groups of positions."""
        layout = self.layout
        edges = np.linspace(0, layout.seq_len, groups + 1)
        inside = np.zeros((self.world, groups))
        first = np.minimum(edges.searchsorted(layout.start, side="right") - 1, groups - 1)
        last = np.clip(edges.searchsorted(layout.stop, side="left") - 1, first, groups - 1)
        for at in range(int((last - first).max(initial=0)) + 1):
            here = np.minimum(first + at, last)
            size = np.minimum(layout.stop, edges[here + 1]) - np.maximum(layout.start, edges[here])
            np.add.at(inside, (layout.owner, here), np.where(first + at <= last, np.maximum(size, 0), 0))
        return inside

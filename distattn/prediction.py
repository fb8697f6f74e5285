"""How long a plan's passes take on a machine: passes.py and attend.py, gone through on paper for all ranks at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distattn.cost import Prediction, Timeline
from distattn.hierarchy import Hierarchy
from distattn.layout import Layout
from distattn.loads import Floats, Load, Tiles, guest_query_tiles, stage_loads
from distattn.machine import Machine
from distattn.outline import Outline

if TYPE_CHECKING:
    from distattn.plan import Plan

# Positions are taken together in so many groups where it is estimated who chooses whose chunks.
_GROUPS = 256
# Stages of a ring that are gone through where all are alike.
_ALIKE = 6
# Of what other ranks have: see chosen.py.
_MUCH = 0.5

ASSUMPTIONS = (
    "Chunks are chosen as if every candidate were as good as any other; chunks that the data favour travel less.",
    "Ranks begin together, and nothing else runs on their devices; what a batch has is one sequence.",
    "Between nodes every rank has its own link; messages of pairs go abroad, of collectives the share that has to.",
)


@dataclass(frozen=True, eq=False)
class Task:
    """Attention of one layer on all ranks, as a plan would do it; the fields are those of a Plan.

    itemsize: bytes of an element of q, k and v. gate: whether there are several softmaxes.
    """

    outline: Outline
    layout: Layout
    hierarchy: Hierarchy | None
    schedule: str
    slices: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int

    @property
    def heads(self) -> int:
        return len(self.outline.table_of)


def predict(plan: Plan, machine: Machine, itemsize: int = 2, *, backward: bool = False) -> Prediction:
    """Seconds of a forward pass, or of a backward pass, of one layer and a batch of one.

    Args:
        itemsize: bytes of an element of q, k and v.
        backward: the backward pass alone.
    """
    names = ("outline", "layout", "hierarchy", "schedule", "slices", "kv_heads", "head_dim", "value_dim")
    task = Task(**{name: getattr(plan, name) for name in names}, itemsize=itemsize)
    found = predict_task(task, machine, backward=backward)
    if plan.correction is None:
        return found
    # Dense rows, and what they add to the others: three results are read and one is written, in float32 between.
    moved = plan.layout.tokens() * float(plan.heads * plan.value_dim) * (4 * itemsize + 4 * max(itemsize, 4))
    more = Timeline(machine, plan.world_size)
    more.copy(moved * (2 if backward else 1), launches=8)
    return found.plus(predict(plan.correction, machine, itemsize, backward=backward)).plus(more.end(0.0))


def predict_task(task: Task, machine: Machine, *, backward: bool = False) -> Prediction:
    """The same of a task."""
    run = _Run(task, machine)
    return run.backward() if backward else run.forward()


class _Run:
    """One pass of a task."""

    def __init__(self, task: Task, machine: Machine) -> None:
        self.task, self.machine = task, machine
        self.world = task.layout.world_size
        self.time = Timeline(machine, self.world)
        self.blocks = task.outline.grid_q.block, task.outline.grid_k.block
        self.dim = task.head_dim + task.value_dim
        self.size, self.wide = task.itemsize, max(task.itemsize, 4)
        self.tokens = task.layout.tokens().astype(np.float64)
        self.outputs = self.tokens * task.heads * task.value_dim
        self.keys = self.tokens * task.kv_heads * self.dim
        self.loads = stage_loads(task.outline, task.layout, task.kv_heads, task.schedule, task.slices)
        # Of a rank's bytes to all others, those that leave the node.
        self.abroad = max(1.0 - (machine.gpus_per_node - 1) / max(self.world - 1, 1), 0.0)
        self.hierarchy = task.hierarchy
        self.gate = self.hierarchy is not None and self.hierarchy.spec.merge == "gate"

    # Both ways.

    def run(self, kind: str, way: str, tiles: Tiles, blocks: tuple[int, int] | None = None, slices: int = 1) -> None:
        blocks = blocks or self.blocks
        speed = self.machine.kernel(kind, way, self.size, blocks)
        seconds = speed.seconds(tiles.visits, tiles.rows, tiles.masked, blocks, self.dim, self.size)
        self.time.compute(seconds, speed.host)

    def start(self, load: Load, row_bytes: float) -> tuple[Floats, Floats]:
        """Packs and starts a stage's transfers; when they are done, and the bytes that came."""
        if self.world == 1:
            return np.zeros(1), np.zeros(1)
        shared, all_shared = load.shared
        done = np.zeros(self.world)
        if all_shared:
            self.time.copy(4 * shared * row_bytes, pack=True, launches=3)
            done = self.time.start("all_gather", (all_shared - shared) * row_bytes, abroad=self.abroad)
        if load.distance != 0:
            # A collective sends one tensor, which is put together of one for each peer.
            self.time.copy((2 if load.kind == "neighbours" else 4) * load.sent * row_bytes, pack=True, launches=2)
            most = np.maximum(load.sent, load.received) * row_bytes
            abroad = self.abroad if load.kind == "all_to_all" else 1.0
            done = np.maximum(done, self.time.start(load.kind, most, load.distance, abroad))
        return done, (load.received + all_shared) * row_bytes

    def arrive(self, started: tuple[Floats, Floats]) -> None:
        done, nbytes = started
        self.time.wait(done)
        self.time.copy(2 * nbytes, pack=True, launches=2)

    def room(self, parity: int) -> Floats:
        """Elements of a guest buffer."""
        sizes = [load.guest_rows for load in self.loads[parity::2]]
        heads = self.task.kv_heads / self.task.slices
        return np.max(sizes, axis=0) * heads * self.dim if sizes else np.zeros(self.world)

    def _each_stage(self) -> Iterator[tuple[int, Load]]:
        """The stages by number; of many that are alike, a few, after which the others take as long as the last."""
        loads = self.loads
        alike = len(loads) - 2 if len(loads) > 2 * _ALIKE and loads[1] is loads[-1] else 0
        for number in range(len(loads)):
            if alike and _ALIKE < number < alike:
                continue
            mark = self.time.mark() if alike and number == _ALIKE else None
            yield number, loads[number]
            if mark is not None:
                self.time.go_on(mark, alike - _ALIKE - 1)

    # Forward.

    def forward(self) -> Prediction:
        hierarchy = self.hierarchy
        summaries = (np.zeros(self.world), np.zeros(self.world))
        if hierarchy is not None and hierarchy.levels:
            self.time.copy(self.keys * self.size + 2 * self._summaries() * self.wide, launches=2)
            summaries = self._gather(self._summaries())
        self._pattern(more=hierarchy is not None and not self.gate)
        if hierarchy is not None:
            self._far(hierarchy, summaries)
        calls = 1 if hierarchy is None else 3
        return self.time.end(calls * self.machine.host["forward"])

    def _pattern(self, more: bool) -> None:
        """``Pass.begin`` and, where nothing follows, ``Pass.finish``."""
        several = more or any(load.resumes for load in self.loads)
        self.time.copy((self.room(0) + self.room(1)) * self.size)
        pending = self.start(self.loads[0], self.dim * self.size)
        queries = self._bring_queries(self.task.head_dim * self.size)
        if several:  # results are written in float32
            self.time.copy(self.outputs * (self.wide - self.size), launches=0)
        for number, load in self._each_stage():
            arrived = pending
            if number + 1 < len(self.loads):
                pending = self.start(self.loads[number + 1], self.dim * self.size)
            way = "resume" if load.resumes else "forward"
            self.run("pattern", way, load.alone)
            self.arrive(arrived)
            self.run("pattern", way, load.guests)
        if not more:
            self._attend_queries(queries)
            if several:
                self.time.copy(self.outputs * (self.wide + self.size))

    def _bring_queries(self, row_bytes: float) -> Floats:
        """Rows of guest queries of all ranks and heads; when they are there."""
        rows = len(self.task.outline.sharing.queries) * self.task.heads
        if not rows or self.world == 1:
            return np.zeros(self.world)
        self.time.copy(2 * rows * row_bytes, pack=True, launches=2)
        return self.time.start("all_gather", self._of_others(rows) * row_bytes, abroad=self.abroad)

    def _of_others(self, rows: float) -> Floats:
        """Rows that come to each rank, if every rank has as many."""
        return np.full(self.world, rows * (self.world - 1) / self.world)

    def _take_queries_home(self, row_bytes: float) -> Floats:
        """Partial results go to their owners."""
        rows = len(self.task.outline.sharing.queries) * self.task.heads
        self.time.copy(4 * rows * row_bytes, pack=True, launches=2)
        if self.world == 1:
            return self.time.now
        return self.time.start("all_to_all", self._of_others(rows) * row_bytes, abroad=self.abroad)

    def _attend_queries(self, here: Floats) -> None:
        queries = len(self.task.outline.sharing.queries)
        if not queries:
            return
        self.time.wait(here)
        self.run("pattern", "forward", guest_query_tiles(self.task.outline, self.task.layout))
        width = self.task.value_dim + 1
        done = self._take_queries_home(width * self.wide)
        self.time.wait(done)
        # One by one, what came from each rank is merged into what is there.
        self.time.copy(5 * queries * self.task.heads * width * self.wide, launches=3 * self.world)

    # What lies beside the pattern.

    def _summaries(self) -> Floats:
        """Elements of each rank's level-1 summaries."""
        assert self.hierarchy is not None
        owner = self.task.layout.owner_of(self.hierarchy.levels[0].start)
        return np.bincount(owner, minlength=self.world) * float(self.task.kv_heads * self.dim)

    def _gather(self, mine: Floats) -> tuple[Floats, Floats]:
        """Starts to bring numbers of all ranks to each; when they are there, and the bytes."""
        if self.world == 1:
            return np.zeros(1), mine * self.wide
        self.time.copy(4 * mine * self.wide, pack=True, launches=3)
        nbytes = np.full(self.world, mine.max() * (self.world - 1) * self.wide)
        return self.time.start("all_gather", nbytes, abroad=self.abroad), np.full(self.world, mine.sum() * self.wide)

    def _far(self, hierarchy: Hierarchy, summaries: tuple[Floats, Floats]) -> None:
        """Levels, choice, and ``Pass.finish`` of what is visited."""
        select = hierarchy.spec.select
        if hierarchy.levels:
            self.arrive(summaries)
            # Made, cast, padded and put together.
            rows = hierarchy.rows * self.task.kv_heads * float(self.dim)
            self.time.copy(rows * (3 * self.wide + 3 * self.size), launches=12 * len(hierarchy.levels))
        if select is not None:
            self._choose(hierarchy)
        parts = [bool(hierarchy.levels), select is not None]
        if self.gate:  # each by itself: zeros, a result in float32, a cast
            self.time.copy(sum(parts) * self.outputs * (2 * self.wide + self.size), launches=3)
            self._attend_queries(np.zeros(self.world))
        if select is not None:
            self._travel(hierarchy, backward=False)
        else:
            self._attend_summaries(hierarchy, "resume")
        if self.gate:
            self.time.copy(self.outputs * self.size * (2 + sum(parts)))
        else:
            self._attend_queries(np.zeros(self.world))
            self.time.copy(self.outputs * (self.wide + self.size))

    def _choose(self, hierarchy: Hierarchy) -> None:
        select = hierarchy.spec.select
        assert select is not None
        speed = self.machine.choice(select.per, select.score)
        by = hierarchy.choosing
        tables = self.task.heads if by.mass or select.heads == "q" else self.task.kv_heads
        share = self.tokens / hierarchy.tile
        # Columns of a row: on average half of all, where those that follow are none of its.
        columns = hierarchy.levels[0].count if by.mass else hierarchy.chunks
        scores = self._positions(hierarchy) * 2 * columns if hierarchy.causal else np.full(self.world, float(columns))
        if hierarchy.causal:
            scores = np.minimum(scores, columns)
        if not hierarchy.level_is_chunks and not by.mass:
            self.arrive(self._gather(share * self.task.kv_heads * self.task.head_dim))
        if hierarchy.chooses_by_tile_before and self.world > 1:
            edges = float(len(self.task.layout.start) * self.task.heads * self.task.head_dim)
            self.arrive(self._gather(np.full(self.world, edges / self.world)))
        seconds = tables * share * (speed.row + speed.column * scores / (2 if hierarchy.causal else 1))
        self.time.compute(seconds, 10 * self.machine.host["launch"])

    def _positions(self, hierarchy: Hierarchy) -> Floats:
        """The mean position of each rank's tokens, as a share of the sequence."""
        layout = self.task.layout
        weight = (layout.stop - layout.start) * (layout.start + layout.stop) / 2
        return np.bincount(layout.owner, weight, self.world) / np.maximum(self.tokens, 1) / layout.seq_len

    def _visited(self, hierarchy: Hierarchy) -> tuple[Floats, Floats]:
        """[ranks]: summaries, and tokens of chosen chunks, that a query visits on average."""
        first, size, summaries, chosen = hierarchy.visited()
        owner = self.task.layout.owner_of(first)
        return tuple(  # type: ignore[return-value]
            np.bincount(owner, x * size, self.world) / np.maximum(self.tokens, 1) for x in (summaries, chosen)
        )

    def _attend_summaries(self, hierarchy: Hierarchy, way: str) -> None:
        if not hierarchy.levels:
            return
        summaries, chosen = self._visited(hierarchy)
        kind = "pattern" if all(level.bias == "none" for level in hierarchy.spec.summaries) else "biased"
        blocks, heads = self.blocks, self.task.heads
        if hierarchy.spec.select is not None and not self.gate:
            kind, blocks = "summaries", (hierarchy.tile, hierarchy.page)
        rows = self.tokens * heads / blocks[0]
        # Each level's summaries begin and end within a page; a chosen chunk takes the place of part of a coarse summary,
        # whose other members are visited then.
        pages = summaries / blocks[1] + len(hierarchy.levels) + chosen / hierarchy.window[0] / 2 * (kind == "summaries")
        self.run(kind, way, Tiles(rows * pages, rows, np.zeros(self.world)), blocks)

    def _travel(self, hierarchy: Hierarchy, backward: bool) -> None:
        """Chosen chunks, round by round, each while the one before is attended; summaries meanwhile."""
        way = "backward" if backward else "resume"
        select = hierarchy.spec.select
        assert select is not None
        _, tokens = self._visited(hierarchy)
        blocks = hierarchy.tile, hierarchy.chunk
        rows = self.tokens * self.task.heads / blocks[0]
        visits = rows * tokens / blocks[1]
        none = np.zeros(self.world)
        if self.world == 1:
            self._attend_summaries(hierarchy, way)
            self.run("chosen", way, Tiles(visits, rows, none), blocks)
            return
        if not backward:  # what is wanted of whom is told, for which the host waits for the device
            for nbytes in (8.0 * self.world, 16.0 * hierarchy.chunks):
                self.time.wait(self.time.start("all_to_all", np.full(self.world, nbytes), abroad=self.abroad))
            self.time.rest(3 * self.machine.host["exchange"])
        wanted, visited = self._wanted(hierarchy, select.k)
        away = wanted.copy()
        np.fill_diagonal(away, 0.0)
        page = self.task.kv_heads * hierarchy.chunk * self.dim
        rank = np.arange(self.world)
        if away.sum(axis=1).max() <= _MUCH * hierarchy.chunks * (self.world - 1) / self.world:
            rounds = [(None, away.sum(axis=1), away.sum(axis=0), visited.sum(axis=1) - visited[rank, rank])]
        else:
            rounds = []
            for distance in range(1, self.world):
                source, target = (rank - distance) % self.world, (rank + distance) % self.world
                rounds.append((distance, away[rank, source], away[target, rank], visited[rank, source]))  # type: ignore[arg-type]

        def bring(number: int) -> tuple[Floats, Floats]:
            if number >= len(rounds):
                return none, none
            distance, take, give, _ = rounds[number]
            kind = "all_to_all" if distance is None else "neighbours"
            self.time.copy(8 * give * page * self.size, launches=4)
            most = np.maximum(take, give) * page * self.size
            abroad = self.abroad if distance is None else 1.0
            return self.time.start(kind, most, distance, abroad), take * page * self.size

        pending = bring(0) if not backward or len(rounds) > 1 else (none, none)
        if not backward:
            self._attend_summaries(hierarchy, way)
            self.run("chosen", way, Tiles(visits * visited[rank, rank], rows, none), blocks)
        for number, (distance, take, give, share) in enumerate(rounds):
            arrived = pending
            if not backward or len(rounds) > 1:
                pending = bring(number + 1)
            done, nbytes = arrived
            self.time.wait(done)
            self.time.copy(4 * nbytes, launches=4)
            self.run("chosen", way, Tiles(visits * share, rows * (share > 0), none), blocks)
            if backward:  # float32 gradients of what came: zeros, packed, sent home, added
                self.time.copy((1 + 4 + 4) * take * page * self.wide, launches=8)
                most = np.maximum(take, give) * page * self.wide
                kind = "all_to_all" if distance is None else "neighbours"
                self.time.start(kind, most, distance, self.abroad if distance is None else 1.0)
        if backward:
            self.run("chosen", way, Tiles(visits * visited[rank, rank], rows, none), blocks)
            self._attend_summaries(hierarchy, way)
            self.time.wait(self.time.line)

    def _wanted(self, hierarchy: Hierarchy, k: int) -> tuple[Floats, Floats]:
        """[ranks, ranks]: chunks of each other rank that a rank's tiles want, by key/value head, and of what each of
        them visits the share that lies there; see ASSUMPTIONS."""
        layout, chunk = self.task.layout, hierarchy.chunk
        groups = min(_GROUPS, hierarchy.chunks)
        edges = np.linspace(0, layout.seq_len, groups + 1)
        # Tokens of each rank in each group of positions, by where its segments begin and end.
        inside = np.zeros((self.world, groups))
        group = np.minimum((edges.searchsorted(layout.start, side="right") - 1), groups - 1)
        last = np.minimum(edges.searchsorted(layout.stop, side="left") - 1, groups - 1)
        for at in range(int((last - group).max(initial=0)) + 1):
            here = np.minimum(group + at, last)
            size = np.minimum(layout.stop, edges[here + 1]) - np.maximum(layout.start, edges[here])
            np.add.at(inside, (layout.owner, here), np.where(group + at <= last, np.maximum(size, 0), 0))
        tiles, chunks = inside / hierarchy.tile, inside / chunk
        centre = (np.arange(groups) + 0.5) / groups * hierarchy.chunks
        candidates = np.maximum(centre if hierarchy.causal else np.full(groups, float(hierarchy.chunks)), k)
        draws = tiles * k / candidates
        # A tile chooses among chunks before it: draws of a chunk are those of later tiles, and half of its own group's.
        later = np.cumsum(draws[:, ::-1], axis=1)[:, ::-1] - draws / 2 if hierarchy.causal else None
        if later is None:
            later = np.repeat(draws.sum(axis=1, keepdims=True), groups, axis=1)
        wanted = -np.expm1(-later) @ chunks.T
        visited = later @ chunks.T
        return wanted, visited / np.maximum(visited.sum(axis=1, keepdims=True), 1e-30)

    # Backward.

    def backward(self) -> Prediction:
        hierarchy = self.hierarchy
        several = len(self.loads) > 1
        if self.gate:
            self.time.copy(self.outputs * self.size * 6, launches=2)
        far = hierarchy is not None and not self.gate
        ring = any(load.resumes for load in self.loads)
        queries = len(self.task.outline.sharing.queries)
        once = not (ring or queries or far)
        alone = once and (several or self.world == 1)
        self.time.copy(self.outputs * self.size * 2, launches=2)  # delta
        rows = self.tokens * self.task.heads * self.task.head_dim
        self.time.copy(rows * (self.size if once else self.wide) + self.keys * (self.size if alone else self.wide))
        self._stages_backward(queries, several)
        if hierarchy is not None:
            if hierarchy.spec.select is not None:
                self._travel(hierarchy, backward=True)
            else:
                self._attend_summaries(hierarchy, "backward")
            if hierarchy.levels:
                self._summaries_backward(hierarchy)
        if not once:
            self.time.copy(rows * (self.wide + self.size))
        if not alone:
            self.time.copy(self.keys * (self.wide + self.size), launches=2)
        return self.time.end((1 if hierarchy is None else 3) * self.machine.host["backward"])

    def _stages_backward(self, queries: int, several: bool) -> None:
        sliced = self.task.slices > 1
        none = np.zeros(self.world)
        pending = (none, none)
        if several:
            self.time.copy((self.room(0) + self.room(1)) * self.size)
            pending = self.start(self.loads[0], self.dim * self.size)
        homeward: list[tuple[Floats, Floats]] = []
        if queries:
            self.time.wait(self._bring_queries(self.task.value_dim * self.size + 2 * self.wide))
            self.run("pattern", "backward", guest_query_tiles(self.task.outline, self.task.layout))
            homeward.append((self._take_queries_home(self.task.head_dim * self.wide), none))
        heads = self.task.kv_heads / self.task.slices
        for number, load in self._each_stage():
            self.time.copy(load.guest_rows * heads * self.dim * self.wide, launches=2)
            first = several and number == 0
            if first:
                self.run("pattern", "backward", load.alone)
            if several:
                self.arrive(pending)
                if number + 1 < len(self.loads):
                    pending = self.start(self.loads[number + 1], self.dim * self.size)
            self.run("pattern", "backward", load.guests)
            going = self._send_home(load)
            if not first:
                self.run("pattern", "backward", load.alone)
            self._added(homeward)
            homeward = [going]
            if sliced:
                self.time.copy(self.keys / self.task.slices * (3 * self.wide + 2 * self.size), launches=2)
        self._added(homeward)

    def _send_home(self, load: Load) -> tuple[Floats, Floats]:
        """Gradients of guests, in float32; when they are there, and the bytes that come back."""
        if self.world == 1:
            return np.zeros(1), np.zeros(1)
        row = self.dim * self.wide
        shared, every = load.shared
        done, back = np.zeros(self.world), load.sent + shared * (self.world - 1)
        if every:
            self.time.copy(4 * every * row, pack=True, launches=2)
            done = self.time.start("all_to_all", np.maximum(every - shared, shared * (self.world - 1)) * row)
        if load.distance != 0:
            self.time.copy((2 if load.kind == "neighbours" else 4) * load.received * row, pack=True, launches=2)
            most = np.maximum(load.sent, load.received) * row
            abroad = self.abroad if load.kind == "all_to_all" else 1.0
            done = np.maximum(done, self.time.start(load.kind, most, load.distance, abroad))
        return done, back * row

    def _added(self, homeward: list[tuple[Floats, Floats]]) -> None:
        for done, nbytes in homeward:
            self.time.wait(done)
            self.time.copy(3 * nbytes, pack=True, launches=2)

    def _summaries_backward(self, hierarchy: Hierarchy) -> None:
        """From gradients of the summary buffer to those of keys and values, which are added to the others."""
        rows = hierarchy.rows * self.task.kv_heads * float(self.dim)
        self.time.copy(rows * (6 * self.wide + 2 * self.size), launches=12 * len(hierarchy.levels))
        mine = self._summaries()
        if self.world > 1:
            self.time.copy(4 * mine.sum() * self.wide, pack=True, launches=2)
            most = np.maximum(mine.sum() - mine, mine * (self.world - 1)) * self.wide
            self.time.wait(self.time.start("all_to_all", most, abroad=self.abroad))
            self.time.copy(3 * mine * (self.world - 1) * self.wide, pack=True, launches=2 * self.world)
        self.time.copy(self.keys * self.size * 4, launches=4)


def assumptions(machine: Machine, world_size: int) -> list[str]:
    """What a prediction takes for granted, in sentences."""
    conditions = ", ".join(f"{what} {which}" for what, which in machine.conditions)
    lines = [f"Speeds: {machine.name}; measured under: {conditions}.", *ASSUMPTIONS]
    lines += [f"{field}: {source}." for field, source in machine.assumed]
    if world_size > machine.ranks:
        lines.append(
            f"Exchanges were measured between {machine.ranks} ranks; they take as long between {world_size:,}, byte for "
            f"byte, and nodes of {machine.gpus_per_node} have {machine.between_nodes / 1e9:g} GB/s a rank between them "
            f"and {machine.between_latency * 1e6:g} us an exchange."
        )
    return lines

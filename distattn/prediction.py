"""How long a plan's passes take on a machine: passes.py and attend.py, gone through on paper for all ranks at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distattn.cost import Prediction, Timeline
from distattn.hierarchy import Hierarchy
from distattn.loads import Floats, Load, Tiles, guest_query_tiles
from distattn.machine import Machine
from distattn.task import Task

# Stages of a ring that are gone through where all are alike.
_ALIKE = 6

ASSUMPTIONS = (
    "Chunks are chosen as if every candidate were as good as any other; chunks that the data favour travel less.",
    "Ranks begin together, and nothing else runs on their devices; what a batch has is one sequence.",
    "Between nodes every rank has its own link; messages of pairs go abroad, of collectives the share that has to.",
)


def predict_task(task: Task, machine: Machine, *, backward: bool = False) -> Prediction:
    """Seconds of a forward pass, or of a backward pass alone, of one layer and a batch of one."""
    run = _Run(task, machine, backward)
    return run.backward() if backward else run.forward()


class _Run:
    """One pass of a task."""

    def __init__(self, task: Task, machine: Machine, backward: bool) -> None:
        self.task, self.machine = task, machine
        self.world, self.dim, self.size, self.wide = task.world, task.dim, task.itemsize, task.wide
        self.time = Timeline(machine, self.world, machine.host["backward" if backward else "forward"])
        # Of a rank's bytes to all others, those that leave the node.
        self.abroad = max(1.0 - (machine.gpus_per_node - 1) / max(self.world - 1, 1), 0.0)

    # Both ways.

    def run(self, kind: str, way: str, tiles: Tiles, blocks: tuple[int, int] | None = None, slices: int = 1) -> None:
        blocks = blocks or self.task.blocks
        speed = self.machine.kernel(kind, way, self.size, blocks)
        seconds = speed.seconds(tiles.visits, tiles.rows, tiles.masked, blocks, self.dim, self.size)
        self.time.compute(seconds, speed.host, way == "backward")

    def start(self, load: Load, row_bytes: float) -> list[tuple[Floats, Floats]]:
        """Packs and starts a stage's transfers, of gathered keys and of pages; when each is done, and the bytes that
        are copied then."""
        none = np.zeros(self.world)
        if self.world == 1:
            return [(none, none), (none, none)]
        shared, all_shared = load.shared
        first = none
        if all_shared:
            self.time.copy(4 * shared * row_bytes, pack=True, launches=3)
            others = (all_shared - shared) * row_bytes
            first = self.time.start("all_gather", others, abroad=self.abroad)
        done = none
        if load.distance != 0:
            out = load.sent * row_bytes
            self.time.copy(2 * out, pack=True)
            self.time.copy(2 * load.joins * out)
            done = self._travel_pages(load, row_bytes)
        return [(first, none + all_shared * row_bytes), (done, load.received * row_bytes)]

    def _travel_pages(self, load: Load, row_bytes: float) -> Floats:
        most = np.maximum(load.sent, load.received) * row_bytes
        abroad = self.abroad if load.kind == "all_to_all" else 1.0
        return self.time.start(load.kind, most, load.distance, abroad)

    def arrive(self, started: tuple[Floats, Floats]) -> None:
        done, nbytes = started
        self.time.wait(done)
        self.time.copy(2 * nbytes, pack=True, launches=2)

    def _each_stage(self) -> Iterator[tuple[int, Load]]:
        """The stages by number; of many that are alike, a few, after which the others take as long as the last."""
        loads = self.task.loads
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
        hierarchy = self.task.hierarchy
        if hierarchy is None:
            self._pattern(False, self._start())
        else:
            self._far(hierarchy)
        # Those of further parts, which the device does not wait for.
        return self.time.end(2 * self.machine.host["forward"] * (hierarchy is not None))

    def _start(self) -> tuple[list[tuple[Floats, Floats]], Floats]:
        """``Pass.start``: the first stage as of :meth:`start`, and when guest queries are there."""
        self.time.copy((self.task.room(0) + self.task.room(1)) * self.size)
        return self.start(self.task.loads[0], self.dim * self.size), self._bring_queries(self.task.head_dim * self.size)

    def _pattern(self, more: bool, started: tuple[list[tuple[Floats, Floats]], Floats]) -> None:
        """``Pass.begin`` and, where nothing follows, ``Pass.finish``."""
        several = more or self.task.resumes
        pending, queries = started
        if several:  # results are written in float32
            self.time.copy(self.task.outputs * (self.wide - self.size), launches=0)
        for number, load in self._each_stage():
            arrived = pending
            if number + 1 < len(self.task.loads):
                pending = self.start(self.task.loads[number + 1], self.dim * self.size)
            way = "resume" if load.resumes else "forward"
            self.arrive(arrived[0])
            self.run("pattern", way, load.alone)
            self.arrive(arrived[1])
            self.run("pattern", way, load.guests)
        if more:
            return
        self._attend_queries(queries)
        if several:
            self.time.copy(self.task.outputs * (self.wide + self.size))

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

    def _gather(self, mine: Floats, ready: Floats | None = None) -> tuple[Floats, Floats]:
        """Starts to bring numbers of all ranks to each; when they are there, and the bytes. ready: see ``start``."""
        if self.world == 1:
            return np.zeros(1), mine * self.wide
        self.time.copy(4 * mine * self.wide, pack=True, launches=3)
        nbytes = np.full(self.world, mine.max() * (self.world - 1) * self.wide)
        done = self.time.start("all_gather", nbytes, abroad=self.abroad, ready=ready)
        return done, np.full(self.world, mine.sum() * self.wide)

    def _far(self, hierarchy: Hierarchy) -> None:
        """The pattern, levels and chosen chunks.

        What chooses takes its time after the pattern, but what it sends is ready as if it were done beside it.
        """
        select, more = hierarchy.spec.select, not self.task.gate
        if hierarchy.levels:
            self.time.copy(self.task.keys * self.size + 2 * self.task.summaries * self.wide, launches=2)
        started = self._start()
        ready = self.time.now
        summaries = self._gather(self.task.summaries) if hierarchy.levels and select is None else None
        self._pattern(more, started)
        told = np.zeros(self.world)
        if hierarchy.levels:
            summaries = summaries or self._gather(self.task.summaries, ready)
            ready = np.maximum(ready, summaries[0])
            self.arrive(summaries)
        if select is not None:
            if hierarchy.chooses_by_tile_before and self.world > 1:
                edges = float(len(self.task.layout.start) * self.task.heads * self.task.head_dim)
                arrived = self._gather(np.full(self.world, edges / self.world), ready)
                ready = np.maximum(ready, arrived[0])
                self.arrive(arrived)
            ready = ready + self._choose(hierarchy)
            if self.world > 1:  # what is wanted of whom
                wanted = np.full(self.world, float(self.task.kv_heads * hierarchy.chunks))
                told = self.time.start("all_to_all", wanted, abroad=self.abroad, ready=ready)
        if hierarchy.levels:  # made, cast, padded and put together
            rows = hierarchy.rows * self.task.kv_heads * float(self.dim)
            self.time.copy(rows * (3 * self.wide + 3 * self.size), launches=12 * len(hierarchy.levels))
        parts = [bool(hierarchy.levels), select is not None]
        if self.task.gate:  # each by itself: zeros, which are gone on from
            self.time.copy(sum(parts) * self.task.outputs * (self.wide + self.size), launches=2)
        if select is not None:
            self.time.wait(told)
            self._travel(hierarchy, backward=False)
        else:
            self._attend_summaries(hierarchy, "resume")
        if self.task.gate:
            self.time.copy(self.task.outputs * self.size * (2 + sum(parts)))
        else:
            self._attend_queries(np.zeros(self.world))

    def _choose(self, hierarchy: Hierarchy) -> Floats:
        """How long it takes to choose."""
        select = hierarchy.spec.select
        assert select is not None
        speed = self.machine.choice(select.per, select.score)
        by = hierarchy.choosing
        tables = self.task.heads if by.mass or select.heads == "q" else self.task.kv_heads
        share = self.task.tokens / hierarchy.tile
        # Columns of a row: on average half of all, where those that follow are none of its.
        columns = hierarchy.levels[0].count if by.mass else hierarchy.chunks
        scores = self.task.positions * 2 * columns if hierarchy.causal else np.full(self.world, float(columns))
        if hierarchy.causal:
            scores = np.minimum(scores, columns)
        if not hierarchy.level_is_chunks and not by.mass:
            self.arrive(self._gather(share * self.task.kv_heads * self.task.head_dim))
        seconds = tables * share * (speed.row + speed.column * scores / (2 if hierarchy.causal else 1))
        self.time.compute(seconds, 10 * self.machine.host["launch"])
        return np.asarray(seconds, np.float64)

    def _attend_summaries(self, hierarchy: Hierarchy, way: str) -> None:
        if not hierarchy.levels:
            return
        summaries, _, opened = self.task.visited
        kind = "pattern" if all(level.bias == "none" for level in hierarchy.spec.summaries) else "biased"
        blocks, heads = self.task.blocks, self.task.heads
        if hierarchy.spec.select is not None and not self.task.gate:
            kind, blocks = "summaries", (hierarchy.tile, hierarchy.page)
        rows = self.task.tokens * heads / blocks[0]
        # Each level's summaries begin and end within a page, and the members of a summary that is opened are in one.
        pages = summaries / blocks[1] + len(hierarchy.levels) / 2 + opened
        self.run(kind, way, Tiles(rows * pages, rows, np.zeros(self.world)), blocks)

    def _travel(self, hierarchy: Hierarchy, backward: bool) -> None:
        """Chosen chunks, round by round, each while the one before is attended; summaries meanwhile."""
        way = "backward" if backward else "resume"
        select = hierarchy.spec.select
        assert select is not None
        _, tokens, _ = self.task.visited
        blocks = hierarchy.tile, hierarchy.chunk
        rows = self.task.tokens * self.task.heads / blocks[0]
        visits = rows * tokens / blocks[1]
        none = np.zeros(self.world)
        if self.world == 1:
            self._attend_summaries(hierarchy, way)
            self.run("chosen", way, Tiles(visits, rows, none), blocks)
            return
        page = self.task.kv_heads * hierarchy.chunk * self.dim
        rounds = self.task.rounds

        def bring(number: int) -> Floats:
            if number >= len(rounds):
                return none
            some = rounds[number]
            distance, take, give = some.distance, some.take, some.give
            kind = "all_to_all" if distance is None else "neighbours"
            self.time.copy(2 * give * page * self.size, launches=4)
            most = np.maximum(take, give) * page * self.size
            abroad = self.abroad if distance is None else 1.0
            return self.time.start(kind, most, distance, abroad)

        pending = bring(0) if not backward or len(rounds) > 1 else none
        if not backward:
            self._attend_summaries(hierarchy, way)
        homeward, back = none, none
        for number, some in enumerate(rounds):
            distance, take, give, part = some
            arrived = pending
            if not backward or len(rounds) > 1:
                pending = bring(number + 1)
            self.time.wait(arrived)
            if number == 0:  # with a rank's own chunks
                part = part + self.task.own_share
            self.run("chosen", way, Tiles(visits * part, rows * (part > 0), none), blocks)
            if backward:  # float32 gradients of what came: zeros, packed, sent home, added
                self.time.wait(homeward)
                self.time.copy(3 * back, launches=4)
                self.time.copy(take * page * self.wide, launches=4)
                most, back = np.maximum(take, give) * page * self.wide, give * page * self.wide
                kind = "all_to_all" if distance is None else "neighbours"
                abroad = self.abroad if distance is None else 1.0
                homeward = self.time.start(kind, most, distance, abroad)
        if backward:
            self._attend_summaries(hierarchy, way)
            self.time.wait(homeward)
            self.time.copy(3 * back, launches=4)

    # Backward.

    def backward(self) -> Prediction:
        hierarchy = self.task.hierarchy
        several = len(self.task.loads) > 1
        if self.task.gate:
            self.time.copy(self.task.outputs * self.size * 6, launches=2)
        far = hierarchy is not None and not self.task.gate
        ring = self.task.resumes
        queries = len(self.task.outline.sharing.queries)
        once = not (ring or queries or far)
        alone = once and (several or self.world == 1)
        self.time.copy(self.task.outputs * self.size * 2, launches=2)  # delta
        rows = self.task.tokens * self.task.heads * self.task.head_dim
        self.time.copy(rows * (self.size if once else self.wide) + self.task.keys * (self.size if alone else self.wide))
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
            self.time.copy(self.task.keys * (self.wide + self.size), launches=2)
        return self.time.end(2 * self.machine.host["backward"] * (hierarchy is not None))

    def _stages_backward(self, queries: int, several: bool) -> None:
        sliced = self.task.slices > 1
        none = np.zeros(self.world)
        pending = [(none, none), (none, none)]
        if several:
            self.time.copy((self.task.room(0) + self.task.room(1)) * self.size)
            pending = self.start(self.task.loads[0], self.dim * self.size)
        homeward: list[tuple[Floats, Floats]] = []
        if queries:
            self.time.wait(self._bring_queries(self.task.value_dim * self.size + 2 * self.wide))
            self.run("pattern", "backward", guest_query_tiles(self.task.outline, self.task.layout))
            homeward.append((self._take_queries_home(self.task.head_dim * self.wide), none))
        heads = self.task.kv_heads / self.task.slices
        for number, load in self._each_stage():
            self.time.copy(load.guest_rows * heads * self.dim * self.wide, launches=2)
            first = several and number == 0
            if several:
                self.arrive(pending[0])
            if first:
                self.run("pattern", "backward", load.alone)
            if several:
                self.arrive(pending[1])
                if number + 1 < len(self.task.loads):
                    pending = self.start(self.task.loads[number + 1], self.dim * self.size)
            self.run("pattern", "backward", load.guests)
            going = [self._send_pages_home(load)]
            if not first:
                self.run("pattern", "backward", load.alone)
            going.append(self._send_shared_home(load))
            self._added(homeward)
            homeward = going
            if sliced:
                self.time.copy(self.task.keys / self.task.slices * (3 * self.wide + 2 * self.size), launches=2)
        self._added(homeward)

    def _send_pages_home(self, load: Load) -> tuple[Floats, Floats]:
        """Gradients of other ranks' pages, in float32; when they are there, and the bytes that come back."""
        if self.world == 1 or load.distance == 0:
            return np.zeros(self.world), np.zeros(self.world)
        row = self.dim * self.wide
        self.time.copy(2 * load.received * row, pack=True)
        self.time.copy(2 * load.joins * load.received * row)
        return self._travel_pages(load, row), load.sent * row

    def _send_shared_home(self, load: Load) -> tuple[Floats, Floats]:
        """The same of gathered keys."""
        shared, every = load.shared
        if self.world == 1 or not every:
            return np.zeros(self.world), np.zeros(self.world)
        row = self.dim * self.wide
        self.time.copy(4 * every * row, pack=True, launches=2)
        most = np.maximum(every - shared, shared * (self.world - 1)) * row
        done = self.time.start("all_to_all", most, abroad=self.abroad)
        return done, shared * (self.world - 1) * row

    def _added(self, homeward: list[tuple[Floats, Floats]]) -> None:
        for done, nbytes in homeward:
            self.time.wait(done)
            self.time.copy(3 * nbytes, pack=True, launches=2)

    def _summaries_backward(self, hierarchy: Hierarchy) -> None:
        """From gradients of the summary buffer to those of keys and values, which are added to the others."""
        rows = hierarchy.rows * self.task.kv_heads * float(self.dim)
        self.time.copy(rows * (6 * self.wide + 2 * self.size), launches=12 * len(hierarchy.levels))
        mine = self.task.summaries
        if self.world > 1:
            self.time.copy(4 * mine.sum() * self.wide, pack=True, launches=2)
            most = np.maximum(mine.sum() - mine, mine * (self.world - 1)) * self.wide
            self.time.wait(self.time.start("all_to_all", most, abroad=self.abroad))
            self.time.copy(3 * mine * (self.world - 1) * self.wide, pack=True, launches=2 * self.world)
        self.time.copy(self.task.keys * self.size * 4, launches=4)


def assumptions(machine: Machine, world_size: int) -> list[str]:
    """What a prediction takes for granted, in sentences."""
    conditions = ", ".join(f"{what} {which}" for what, which in machine.conditions)
    lines = [f"Speeds: {machine.name}; measured under: {conditions}.", *ASSUMPTIONS]
    lines += [f"{field}: {source}." for field, source in machine.assumed]
    if world_size > machine.ranks:
        lines.append(
            f"Exchanges were measured between {machine.ranks} ranks; they take as long between {world_size:,}, "
            f"byte for byte, and nodes of {machine.gpus_per_node} have {machine.between_nodes / 1e9:g} GB/s a rank "
            f"between them and {machine.between_latency * 1e6:g} us an exchange."
        )
    return lines

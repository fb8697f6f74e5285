"""How much memory a plan's passes hold at their peak: the tensors of passes.py, exchange.py and attend.py, written down
in the order in which they come and go, for all ranks at once. Nothing is run.

Counted are inputs, results and what autograd keeps, as an allocator of a GPU counts them. Not counted are the tables of
what is visited (a few megabytes), partial results of rows of these that kernels cut (see kernels/work.py), and rounding
up.
"""

from __future__ import annotations

import numpy as np

from distattn.hierarchy import Hierarchy
from distattn.kernels.work import longest_piece
from distattn.loads import Floats, Load
from distattn.task import Task

# Elements of scores that are in memory while chunks are chosen; see kernels/chunks_triton.py.
_SCORES = 1 << 27
# Multiprocessors of the GPU, an H100.
_PROGRAMS = 132
# Bytes for each entry of a table that is made on the device, while its items are made; see kernels/selected.py.
_ENTRY = 56


class Ledger:
    """Bytes that are held, by name, and the most that were: float64 [ranks]."""

    def __init__(self, ranks: int) -> None:
        self._held: dict[str, Floats] = {}
        self.most = np.zeros(ranks)

    def hold(self, **nbytes: Floats | float) -> None:
        """Notes tensors. What had the same name becomes them, and is not held beside."""
        self._held |= {name: np.broadcast_to(x, self.most.shape) for name, x in nbytes.items()}
        self.most = np.maximum(self.most, sum(self._held.values(), np.zeros(1)))

    def drop(self, *names: str) -> None:
        for name in names:
            self._held.pop(name, None)

    def keep(self, *names: str) -> None:
        """All others go."""
        self._held = {name: x for name, x in self._held.items() if name in names}


def peak_bytes(task: Task, *, backward: bool = False, on_gpu: bool = True) -> Floats:
    """float64 [ranks]: bytes that each rank holds at most in a forward pass, inputs and results included, of a batch of
    one; or in a forward and a backward pass with gradients of q, k and v, that of the result included.

    on_gpu: whether ranks exchange in collectives; else pair by pair, as they do on CPUs.
    """
    held = _Held(task, on_gpu)
    held.forward()
    if backward:
        held.backward()
    return held.ledger.most


class _Held:
    """Both passes of a task, as what they hold."""

    def __init__(self, task: Task, on_gpu: bool) -> None:
        self.task, self.on_gpu = task, on_gpu
        self.world, self.dim, self.size, self.wide = task.world, task.dim, task.itemsize, task.wide
        self.rows, self.queries, self.outputs, self.keys = task.rows, task.queries, task.outputs, task.keys
        self.loads, self.several, self.hierarchy = task.loads, len(task.loads) > 1, task.hierarchy
        self.far = task.hierarchy is not None and not task.gate
        self.ledger = Ledger(self.world)
        self.ledger.hold(inputs=(self.rows * task.head_dim + self.keys) * self.size)

    def travel(self, name: str, load: Load, row: float, home: bool = False) -> None:
        """Rows that go and come, packed, from the start of an exchange until their arrival."""
        if self.world == 1:
            return
        shared, every = load.shared
        if every and not home:
            self.gather(f"{name} shared", shared * row)
        elif every:
            self.exchange(f"{name} shared", (every - shared) * row, shared * (self.world - 1) * row)
        if load.distance != 0:
            sent, come = (load.received, load.sent) if home else (load.sent, load.received)
            self.exchange(name, sent * row, come * row, load.joins)

    def exchange(self, name: str, packed: Floats | float, received: Floats | float, joins: bool = False) -> None:
        """What was packed, and room for what comes. joins: it was packed piece by piece, and put together."""
        self.ledger.hold(**{name: (1 + joins) * packed + received})
        self.ledger.hold(**{name: packed + received})

    def gather(self, name: str, mine: Floats | float) -> None:
        """The same of rows that go to all; they are padded to as many as the largest rank has."""
        padded = np.full(self.world, np.max(mine))
        self.ledger.hold(**{name: mine + padded * (1 + self.world)})
        self.ledger.hold(**{name: padded * (1 + self.world)})

    def arrived(self, name: str) -> None:
        self.ledger.drop(name, f"{name} shared")

    # Forward.

    def forward(self) -> None:
        ledger, hierarchy = self.ledger, self.hierarchy
        if hierarchy is None:
            self._start()
            self._pattern(more=False)
            self._finish(more=False)
        else:
            if hierarchy.levels:
                self._pooled(hierarchy)
            self._start()
            self._pattern(more=self.far)
            if hierarchy.spec.select is not None:
                self._scorers(hierarchy)
                self._choice(hierarchy)
            self._summarized(hierarchy)
            ledger.drop("levels", "pooled")
            self._beside(hierarchy)
        ledger.keep("inputs", "out", "lse", "kept", "kept queries", "summaries", "chosen", "table", "parts", "here")

    def _pooled(self, hierarchy: Hierarchy) -> None:
        mine = self.task.summaries * self.wide
        self.ledger.hold(pooled=mine)
        if self.world > 1:
            self.ledger.hold(here=mine.sum())
            self.gather("packed", mine)

    def _start(self) -> None:
        task, ledger = self.task, self.ledger
        self.ledger.hold(**{f"slot {parity}": self.task.room(parity) * self.size for parity in range(2)})
        self.travel("stage 0", self.loads[0], self.dim * self.size)
        if self.queries:
            row = task.head_dim * self.size
            ledger.hold(**{"kept queries": self.queries * row})
            if self.world > 1:
                self.gather("queries", self.queries * row / self.world)

    def _pattern(self, more: bool) -> None:
        ledger = self.ledger
        item = self.wide if more or self.task.resumes else self.size
        ledger.hold(out=self.outputs * item, lse=self.rows * self.wide)
        for number in range(len(self.loads)):
            if number + 1 < len(self.loads):
                self.travel(f"stage {number + 1}", self.loads[number + 1], self.dim * self.size)
            self.arrived(f"stage {number}")
        ledger.drop("slot 0", "slot 1")
        if not self.several:
            ledger.hold(kept=self.task.room(0) * self.size)

    def _finish(self, more: bool) -> None:
        """Guest queries, and the result in its dtype."""
        ledger = self.ledger
        ledger.drop("queries")
        if self.queries:
            part = self.queries * (self.task.value_dim + 1) * self.wide
            mine = part / self.world
            ledger.hold(part=part, total=mine)
            if self.world > 1:
                self.exchange("home", part - mine, part - mine)
            # The rank's own rows, packed, and what merging makes of them.
            ledger.hold(mine=2 * mine)
            ledger.drop("part", "total", "home", "mine")
        if self.task.resumes and not more and self.size != self.wide:
            ledger.hold(result=self.outputs * self.size)
            ledger.drop("result")
            ledger.hold(out=self.outputs * self.size)

    def _summarized(self, hierarchy: Hierarchy) -> None:
        ledger = self.ledger
        if hierarchy.levels:
            ledger.drop("packed")
            buffer = hierarchy.rows * self.task.kv_heads * float(self.dim)
            levels = sum(level.count for level in hierarchy.levels[1:]) * self.task.kv_heads * float(self.dim)
            bias = hierarchy.rows * self.task.kv_heads * self.wide
            ledger.hold(here=self.task.summaries.sum() * self.wide, levels=levels * self.wide)
            ledger.hold(summaries=2 * buffer * self.size + 2 * bias)
            ledger.hold(summaries=buffer * self.size + bias)

    def _beside(self, hierarchy: Hierarchy) -> None:
        ledger, select = self.ledger, hierarchy.spec.select
        if self.task.gate:
            self._finish(more=False)
            for number in range(int(bool(hierarchy.levels)) + (select is not None)):
                ledger.hold(more=self.outputs * self.wide, **{"more lse": self.rows * self.wide})
                ledger.hold(**{f"part {number}": self.outputs * self.size * (self.size != self.wide)})
                if number or not hierarchy.levels:
                    self._chosen(hierarchy, backward=False)
                ledger.drop("more", "more lse")
                ledger.hold(**{f"part {number}": self.outputs * self.size})
                ledger.hold(**{f"part {number} lse": self.rows * self.wide})
            ledger.hold(gated=self.outputs * self.size)
            kept = [name for name in ledger._held if name.startswith("part ")] + ["gated"]
            total = sum((ledger._held[name] for name in kept), np.zeros(1))
            ledger.drop(*kept)
            ledger.hold(parts=total)
            return
        globals_ = float(len(hierarchy.spec.window.global_tokens) if hierarchy.spec.window else 0)
        ledger.hold(before=globals_ * self.task.heads * self.task.value_dim * self.wide / self.world)
        ledger.hold(result=self.outputs * self.size * (self.size != self.wide))
        if select is not None:
            self._chosen(hierarchy, backward=False)
        ledger.drop("before", "result")
        ledger.hold(out=self.outputs * self.size)
        self._finish(more=True)

    def _scorers(self, hierarchy: Hierarchy) -> None:
        """Rows that score: queries, or their means, and these once more where each is the one before."""
        if hierarchy.tile > 1:
            means = self.task.tokens / hierarchy.tile * self.task.heads * self.task.head_dim * self.wide
            self.ledger.hold(scorers=(1 + hierarchy.chooses_by_tile_before) * means)
            self.ledger.hold(scorers=means)

    def _choice(self, hierarchy: Hierarchy) -> None:
        """Scores, what is chosen, and the table of summaries beside it."""
        by, select = hierarchy.choosing, hierarchy.spec.select
        assert select is not None
        tiles = self.task.tokens / hierarchy.tile
        tables = self.task.heads if select.heads == "q" else self.task.kv_heads
        summed = tiles * self.task.kv_heads * self.task.head_dim * self.wide
        columns = hierarchy.levels[0].count if by.mass else hierarchy.chunks
        scorers = self.task.heads if by.mass else tables
        scores = np.minimum(float(_SCORES), scorers * tiles * columns) * 4
        self.ledger.hold(choosing=summed + scores)
        self.ledger.hold(chosen=tables * tiles * by.most * 4)
        self.ledger.drop("choosing", "scorers")
        if hierarchy.levels and not self.task.gate:
            ladder = hierarchy.ladder
            self.ledger.hold(table=tables * tiles * ladder.most * 4 * (1 + ladder.words))

    def _chosen(self, hierarchy: Hierarchy, backward: bool) -> None:
        ledger, select = self.ledger, hierarchy.spec.select
        assert select is not None
        by = hierarchy.choosing
        tables = self.task.heads if select.heads == "q" else self.task.kv_heads
        entries = tables * self.task.tokens / hierarchy.tile * by.most
        ladder = hierarchy.ladder.most if hierarchy.levels and not self.task.gate else 0
        work = tables * self.task.tokens / hierarchy.tile * max(ladder, by.most) * _ENTRY
        ledger.hold(named=entries * 12, work=work)
        ledger.drop("work")
        if backward and self.on_gpu:
            ledger.hold(parts=self._parts(tables, hierarchy.tile, by.most, hierarchy.chunk))
            if ladder:
                ledger.hold(parts=self._parts(tables, hierarchy.tile, ladder, hierarchy.page))
            ledger.drop("parts")
        if self.world == 1:
            ledger.drop("named")
            return
        page = self.task.kv_heads * hierarchy.chunk * self.dim
        row = page * (self.wide if backward else self.size)
        rounds = self.task.rounds
        again = len(rounds) > 1
        room = [
            np.max([some.take for some in rounds[parity::2]], axis=0) if rounds[parity::2] else np.zeros(self.world)
            for parity in range(2)
        ]
        if not backward or again:
            ledger.hold(slots=sum(room) * page * self.size)
        for number, (_, take, give, _) in enumerate(rounds):
            if not backward or again:
                taken = give * page * self.size
                self.exchange(f"round {number}", taken, 0.0)
                if number:
                    ledger.drop(f"round {number - 1}")
            if backward:
                ledger.hold(**{f"d_guests {number}": take * row})
                ledger.drop(f"d_guests {number - 2}", f"home {number - 1}")
                self.exchange(f"home {number}", 0.0, give * row)
        ledger.drop("named", "slots", *(f"round {number}" for number in range(len(rounds))))
        if not backward and not again:
            ledger.hold(**{"kept chosen": rounds[0].take * page * self.size})
        ledger.drop(*(f"{what} {n}" for n in range(len(rounds)) for what in ("d_guests", "home")))

    def _parts(self, tables: int, tile: int, most: int, page: int) -> Floats:
        """Partial gradients of pages that so many tiles chose that they are cut; see kernels/selected.py."""
        tiles = self.task.tokens / tile
        entries = tiles * most
        even = entries * self.task.heads / _PROGRAMS / (self.task.heads / self.task.kv_heads)
        longest = np.maximum([longest_piece(float(x)) for x in even], tables * entries // _PROGRAMS)
        cuts = np.where(tiles > longest, entries // np.maximum(longest, 1), 0.0)
        return np.asarray(2 * tables * cuts * self.task.kv_heads * page * self.dim * 4, np.float64)

    # Backward.

    def backward(self) -> None:
        task, ledger = self.task, self.ledger
        ring = self.task.resumes
        once = not (ring or self.queries or self.far)
        alone = once and (self.several or self.world == 1)
        queries = self.rows * task.head_dim
        # The gradient of the result; that of the log-sum-exp is made of zeros.
        ledger.hold(grad_out=self.outputs * self.size, grad_lse=self.rows * self.wide, delta=self.rows * self.wide)
        if self.task.gate:
            ledger.hold(gates=3 * self.outputs * self.size)
        if self.far and self.hierarchy is not None and self.hierarchy.levels:
            buffer = self.hierarchy.rows * task.kv_heads * float(self.dim + 1)
            ledger.hold(sums=buffer * self.wide)
        ledger.hold(dq=queries * (self.size if once else self.wide))
        ledger.hold(d_own=self.keys * (self.size if alone else self.wide))
        if self.size == 2:  # numbers of rows, as kernels read them
            ledger.hold(lines=2 * self.rows * 4)
            ledger.drop("lines")
        if self.several:
            ledger.hold(**{f"slot {parity}": self.task.room(parity) * self.size for parity in range(2)})
            self.travel("stage 0", self.loads[0], self.dim * self.size)
        self._queries_backward()
        before = ["d_guests", "home"]
        for number, load in enumerate(self.loads):
            before = self._stage_backward(number, load, before, self.size if alone and not self.several else self.wide)
        ledger.drop(*before)
        if self.far and self.hierarchy is not None and self.hierarchy.spec.select is not None:
            self._chosen(self.hierarchy, backward=True)
        if not once and self.size != self.wide:
            ledger.hold(given=queries * self.size)
        if not alone and self.size != self.wide:
            ledger.hold(**{"given keys": self.keys * self.size})

    def _queries_backward(self) -> None:
        if not self.queries:
            return
        row = self.task.value_dim * self.size + 2 * self.wide
        home = self.queries * self.task.head_dim * self.wide
        self.ledger.hold(rows=2 * self.rows * self.wide, gradients=self.queries * row)
        if self.world > 1:
            self.gather("arriving", self.queries * row / self.world)
        self.ledger.drop("arriving")
        self.ledger.hold(**{"d_guests": home})
        self.ledger.drop("gradients", "rows")
        if self.world > 1:
            away = home * (1 - 1 / self.world)
            self.exchange("home", away, away)
        else:
            self.ledger.hold(home=2 * home)

    def _stage_backward(self, number: int, load: Load, before: list[str], item: float) -> list[str]:
        """The stage's tensors; the names of those that go when the next one is done."""
        ledger, sliced = self.ledger, self.task.slices > 1
        heads = self.task.kv_heads / self.task.slices
        names = [f"{what} {number}" for what in ("d_guests", "home", "home shared", "d_mine")]
        if sliced:
            ledger.hold(**{names[3]: self.keys / self.task.slices * self.wide})
        ledger.hold(**{names[0]: load.guest_rows * heads * self.dim * item})
        if self.several:
            self.arrived(f"stage {number}")
            if number + 1 < len(self.loads):
                self.travel(f"stage {number + 1}", self.loads[number + 1], self.dim * self.size)
        self.travel(f"home {number}", load, self.dim * self.wide, home=True)
        ledger.drop(*before)
        # The last ones stay until all is returned.
        return [name for name in (*names, f"home {number} shared") if number + 1 < len(self.loads) or "home" in name]

"""How long a plan's passes take and how much they hold, with what corrects the result and what exchanging heads adds.

A batch of one. What attends is gone through in prediction.py and memory.py, and the exchange of heads here, as
operators.py and exchange.py do it. All arrays are float64 [ranks].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple

import numpy as np

from distattn.cost import Prediction, Timeline
from distattn.heads import HeadsPlan
from distattn.machine import Floats, Machine
from distattn.memory import Ledger, peak_bytes
from distattn.plan import Plan
from distattn.prediction import predict_task
from distattn.task import Task


def predict(plan: Plan, machine: Machine, itemsize: int = 2, *, backward: bool = False) -> Prediction:
    """Seconds of a forward pass, or of a backward pass alone, of one layer.

    Args:
        itemsize: bytes of an element of q, k and v.
    """
    if isinstance(plan, HeadsPlan):
        return _Heads(plan, itemsize).seconds(machine, backward)
    found = predict_task(Task.of(plan, itemsize), machine, backward=backward)
    if plan.correction is None:
        return found
    # Dense rows, and what they add to the others: three results are read and one is written, in float32 between.
    moved = Task.of(plan, itemsize).outputs * (4 * itemsize + 4 * max(itemsize, 4))
    more = Timeline(machine, plan.world_size)
    more.copy(moved * (2 if backward else 1), launches=8)
    return found.plus(predict(plan.correction, machine, itemsize, backward=backward)).plus(more.end(0.0))


def plan_peak_bytes(plan: Plan, itemsize: int, *, backward: bool) -> Floats:
    """Bytes that each rank holds at most, as :func:`peak_bytes` counts them on GPUs."""
    if isinstance(plan, HeadsPlan):
        return _Heads(plan, itemsize).peak_bytes(backward)
    most = peak_bytes(Task.of(plan, itemsize), backward=backward)
    if plan.correction is None:
        return most
    # The result waits while dense rows are attended; then there are both, what was added, and their sum.
    result = plan.layout.tokens() * float(plan.heads * plan.value_dim)
    dense = peak_bytes(Task.of(plan.correction, itemsize), backward=backward) + result * itemsize
    return np.maximum(most, np.maximum(dense, most + result * (itemsize + 4 * max(itemsize, 4))))


class _Heads:
    """Passes of ranks that exchange heads.

    Attributes:
        q, k, v, out: elements of a row of one rank's share of the heads.
        mine, others: rows of each rank, and of the others of its group.
    """

    def __init__(self, plan: HeadsPlan, itemsize: int) -> None:
        self.plan, self.size, self.wide, self.ranks = plan, itemsize, max(itemsize, 4), len(plan.plans)
        heads, kv_heads = plan.inner.heads, plan.inner.kv_heads
        self.q, self.k, self.v = heads * plan.head_dim, kv_heads * plan.head_dim, kv_heads * plan.value_dim
        self.out = heads * plan.value_dim
        self.mine = plan.layout.tokens().astype(np.float64)
        self.others = plan.inner.layout.tokens().repeat(self.ranks) - self.mine
        # A collective sends one tensor, joined of those for each peer, which have other heads. What comes by rows lies
        # where it belongs, and goes back from there, unless a rank's own rows are in the middle.
        self.joins = self.ranks > 2
        place = np.arange(plan.world_size) % self.ranks
        self.moves = (0 < place) & (place < self.ranks - 1)
        # Elements of a rank's own rows, with all heads.
        self.queries, self.results = self.mine * plan.heads * plan.head_dim, self.mine * plan.heads * plan.value_dim
        self.keys = self.mine * plan.kv_heads * (plan.head_dim + plan.value_dim)

    def by_rank(self, find: Callable[[Plan], Sequence[Floats]]) -> list[Floats]:
        """Arrays of the plans, each of the ranks that have the same heads, as arrays of all ranks."""
        found = {key: find(plan) for key, plan in {plan.key: plan for plan in self.plan.plans}.items()}
        return [np.stack(x, axis=1).ravel() for x in zip(*(found[plan.key] for plan in self.plan.plans), strict=True)]

    # Time.

    def seconds(self, machine: Machine, backward: bool) -> Prediction:
        # Of a node, those that have the same heads.
        near = machine.with_nodes(max(machine.gpus_per_node // self.ranks, 1))
        inner = self.by_rank(lambda plan: astuple(predict(plan, near, self.size, backward=backward)))
        time = Timeline(machine, self.plan.world_size, group=self.ranks)
        self._bring(time, [self.out] if backward else [self.q, self.k, self.v])
        time.within(Prediction(*inner))
        self._take_home(time, [self.q] if backward else [self.out], [self.k, self.v] if backward else [])
        return time.end(0.0)

    def _bring(self, time: Timeline, widths: list[int]) -> None:
        pending = []
        for width in widths:
            row = width * self.size
            time.copy(2 * (self.ranks + 1) * self.mine * row, pack=True, launches=self.ranks + 1)
            sent = (self.ranks - 1) * self.mine * row
            time.copy(2 * self.joins * sent)
            pending.append((self._start(time, sent, self.others * row), row))
        for done, row in pending:
            time.wait(done)
            time.copy(2 * self.moves * self.others * row, pack=True)

    def _take_home(self, time: Timeline, widths: list[int], keys: list[int]) -> None:
        """keys: of what is summed up, since several ranks may have the same key/value head."""
        pending = []
        for width in widths + keys:
            row = width * self.size
            time.copy(2 * self.moves * self.others * row, pack=True)
            pending.append(self._start(time, self.others * row, (self.ranks - 1) * self.mine * row))
        for done in pending:
            time.wait(done)
        come = self.ranks * self.mine
        time.copy(2 * come * sum(widths) * self.size, launches=self.ranks * len(widths))
        if keys:  # zeros, sums, casts
            time.copy(come * sum(keys) * (self.size + 2 * self.wide), launches=self.ranks * len(keys))
            time.copy(self.keys * self.wide, launches=len(keys))
            time.copy(self.keys * (self.wide + self.size) * (self.wide != self.size), launches=len(keys))

    def _start(self, time: Timeline, sent: Floats, received: Floats) -> Floats:
        near = time.machine.gpus_per_node
        abroad = max(1.0 - (near - 1) / (self.ranks - 1), 0.0)
        return time.start("all_to_all", np.maximum(sent, received), abroad=abroad)

    # Memory.

    def peak_bytes(self, backward: bool) -> Floats:
        ledger, shard = Ledger(self.plan.world_size), self.mine + self.others
        came = shard * (self.q + self.k + self.v) * self.size
        made = shard * (self.out * self.size + self.plan.inner.heads * self.wide)  # with the log-sum-exp
        ledger.hold(inputs=(self.queries + self.keys) * self.size, inner=came)
        self._hold_coming(ledger, self.q + self.k + self.v)
        (most,) = self.by_rank(lambda plan: [plan_peak_bytes(plan, self.size, backward=False)])
        ledger.hold(inner=most)
        ledger.hold(inner=came + made, out=self.results * self.size)
        self._hold_going(ledger, self.out)
        if backward:
            ledger.hold(grad_out=self.results * self.size, inner=came + made + shard * self.out * self.size)
            self._hold_coming(ledger, self.out)
            (most,) = self.by_rank(lambda plan: [plan_peak_bytes(plan, self.size, backward=True)])
            ledger.hold(inner=most)
            ledger.hold(inner=came, dq=self.queries * self.size, sums=self.keys * self.wide)  # inner: gradients
            self._hold_going(ledger, self.q + self.k + self.v)
            ledger.hold(given=self.keys * self.size * (self.wide != self.size))
        return ledger.most

    def _hold_coming(self, ledger: Ledger, width: int) -> None:
        sent, received = (self.ranks - 1) * self.mine * width * self.size, self.others * width * self.size
        ledger.hold(packed=(1 + self.joins) * sent + self.moves * received)
        ledger.drop("packed")

    def _hold_going(self, ledger: Ledger, width: int) -> None:
        sent, received = self.others * width * self.size, (self.ranks - 1) * self.mine * width * self.size
        ledger.hold(going=self.moves * sent + received)
        ledger.drop("going")

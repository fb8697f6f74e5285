"""One forward or backward pass of a rank: the stage loop, and what else is attended under the same softmax.

For each stage: fill the arena, run the tile kernel, merge by log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.arena import Stage
from distattn.aside import after_aside, aside
from distattn.chosen import Asked, Asks, ChosenChunks
from distattn.exchange import Counter, Exchange, Pending
from distattn.guest_queries import attend_guest_queries, guest_queries_backward
from distattn.kernels.attention import (
    Biases,
    Pages,
    accumulator_dtype,
    attention_backward,
    attention_forward,
    prepare,
    row_deltas,
)
from distattn.kernels.rows import add_rows
from distattn.kernels.selected import AnyTable
from distattn.messages import Message, Transfer
from distattn.plan import Plan
from distattn.rounds import Rounds


class Source(NamedTuple):
    """Pages that are attended beside the plan's pattern, with a table for each of the batch.

    d_own, d_guests, d_bias: where gradients are added, in backward passes only.
    """

    own: Pages
    guests: Pages
    tables: Sequence[AnyTable]
    bias: Biases | None = None
    d_own: Pages | None = None
    d_guests: Pages | None = None
    d_bias: Biases | None = None


class Kept(NamedTuple):
    """What a forward pass keeps for the backward pass, beside its results.

    guests, guest_q: of the pattern; where stages are several, guests are brought again. chosen: guests of chosen
        chunks, unless they came in several rounds. asked, given: see ``Asked``.
    """

    guests: Tensor
    guest_q: Tensor
    chosen: Tensor
    asked: Tensor
    given: Tensor


class Started(NamedTuple):
    """A forward pass whose first exchanges are on their way, and nothing else.

    slots: guest buffers. stage_here: gathered keys and pages of the first stage. guest_q: guest queries, which are
    there after ``queries_here.wait()``.
    """

    slots: list[_Slot]
    stage_here: tuple[Pending, Pending]
    guest_q: Tensor
    queries_here: Pending


class Begun(NamedTuple):
    """A forward pass in which the plan's pattern has been attended, and nothing else yet.

    out, lse: so far. kept: the guests. guest_q, queries_here: as before.
    """

    out: Tensor
    lse: Tensor
    kept: Tensor
    guest_q: Tensor
    queries_here: Pending


class Pass:
    """One forward or backward pass over a plan.

    tokens: whether the plan's pattern is attended; else only ``sources`` are.
    sources: what is attended beside it, under the same softmax. chosen: int32 [batch, tables, tiles, n]: chunks that
    are attended, too. asks: for these, where ranks have begun to ask before.

    A forward pass with chosen chunks attends them last, in one launch: these are asked for and travel beside what comes
    before. What is launched last writes the result.
    """

    def __init__(
        self,
        plan: Plan,
        counter: Counter,
        tokens: bool = True,
        sources: Sequence[Source] = (),
        chosen: Tensor | None = None,
        asks: Asks | None = None,
    ) -> None:
        self.plan = plan
        self.exchange = Exchange(plan.group_name, plan.rank, counter, plan.key)
        self.stages = plan.stages if tokens else ()
        self.queries = plan.guest_queries if tokens else None
        self.sources, self.chosen, self.asks = sources, chosen, asks

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, started: Started | None = None
    ) -> tuple[Tensor, Tensor, Kept]:
        """(out, lse, what the backward pass reads again). started: with the same tensors, if it was."""
        if self.chosen is not None and self.asks is None:
            self.asks = Asks(self.plan, self.exchange, self.chosen)
        more = bool(self.sources) or self.chosen is not None
        started = started or self.start(q, k, v)
        return self.finish(self.begin(started, q, k, v, scale, more), q, k, v, scale)

    def start(self, q: Tensor, k: Tensor, v: Tensor) -> Started:
        """Starts the exchanges that the plan's pattern begins with."""
        stages, queries, slots = self.stages, self.queries, self._slots(k, v)
        stage_here = self._bring(stages[0], Pages(k, v), slots[0]) if stages else (Pending(), Pending())
        guest_q = q.new_empty((q.shape[0], len(queries.positions) if queries else 0, *q.shape[2:]))
        queries_here = self.exchange.bring("queries", queries.transfer, [q], [guest_q]) if queries else Pending()
        return Started(slots, stage_here, guest_q, queries_here)

    def begin(self, started: Started, q: Tensor, k: Tensor, v: Tensor, scale: float, more: bool) -> Begun:
        """The plan's pattern. more: sources follow, which need not be known yet."""
        dtype, stages, own = accumulator_dtype(q.dtype), self.stages, Pages(k, v)
        several = not stages or any(stage.resumes for stage in stages) or more
        slots, pending, guest_q, queries_here = started
        out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=dtype if several else q.dtype)
        lse = q.new_empty(q.shape[:3], dtype=dtype)
        # Tiles that visit nothing are left alone.
        if not stages or any(stage.table.has_empty_rows and not stage.resumes for stage in stages):
            out.zero_()
            lse.fill_(-torch.inf)
        for number, stage in enumerate(stages):
            mine, guests = _of_heads(own, stage.kv_heads), slots[number % 2].of_stage(stage)
            some_q, some_out, some_lse = self._query_heads(stage, q, out, lse)
            run = partial(
                attention_forward,
                some_q,
                mine,
                guests,
                out=some_out,
                lse=some_lse,
                scale=scale,
                before=some_out if stage.resumes else None,
            )
            shared_here, pages_here = pending
            if number + 1 < len(stages):
                # The other slot is free, since its stage is done.
                pending = self._bring(stages[number + 1], own, slots[(number + 1) % 2])
            shared_here.wait()
            run(table=stage.alone)
            pages_here.wait()
            run(table=stage.with_guests)
        kept = slots[0].flat if len(stages) == 1 else q.new_empty(0)
        return Begun(out, lse, kept, guest_q, queries_here)

    def finish(self, begun: Begun, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Kept]:
        """What :meth:`forward` returns, from what was begun with the same tensors."""
        out, lse, guests, guest_q, queries_here = begun
        kept = Kept(guests, guest_q, q.new_empty(0), *Asked.nothing(q.device))
        if self.sources or self.chosen is not None:
            rows = self._global_rows(q.device)
            global_out, global_lse = out[:, rows], lse[:, rows]
            out, more = self._attend_more(q, Pages(k, v), out, lse, scale)
            kept = kept._replace(**more)
            out[:, rows], lse[:, rows] = global_out.to(out.dtype), global_lse  # these queries have seen everything
        if self.queries is not None:
            queries_here.wait()
            attend_guest_queries(self.exchange, self.queries, guest_q, Pages(k, v), out, lse, scale)
        return out.to(q.dtype), lse, kept

    def _attend_more(
        self, q: Tensor, own: Pages, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Goes on with sources and chosen chunks: the result, in the dtype of q, and what of ``Kept`` they add."""
        result = out if out.dtype == q.dtype else q.new_empty(out.shape)

        def run(source: Source, last: bool) -> None:
            for b in range(q.shape[0]):
                so_far = out[b : b + 1]
                attention_forward(
                    q[b : b + 1],
                    _pages_of(source.own, b),
                    _pages_of(source.guests, b),
                    source.tables[b],
                    result[b : b + 1] if last and result is not out else so_far,
                    lse[b : b + 1],
                    scale=scale,
                    before=so_far,
                    bias=_bias_of(source.bias, b),
                )

        if self.chosen is None:
            for number, source in enumerate(self.sources):
                run(source, last=number + 1 == len(self.sources))
            return result, {}
        assert self.asks is not None
        for source in self.sources:
            run(source, last=False)
        with aside(q.device, self.asks.asked):  # chunks set out while all that is attended
            chunks = ChosenChunks(self.plan, self.chosen, self.asks.wait(), self.asks.wanted)
            rounds = Rounds(chunks, self.exchange, own)
        after_aside(q.device, *rounds.made)
        for table in rounds.tables:  # while they travel
            prepare(q, table)
        for number, guests, tables in rounds:
            run(Source(own, guests, tables), last=number + 1 == len(chunks.rounds))
        kept = {"asked": chunks.asked.counts, "given": chunks.asked.given}
        return result, kept if rounds.kept is None else kept | {"chosen": rounds.kept}

    def _global_rows(self, device: torch.device) -> Tensor:
        assert self.plan.hierarchy is not None
        return self.plan.hierarchy.on(device, "global_rows")

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        kept: Kept,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv); gradients of sources are added to theirs."""
        dtype, stages, own = accumulator_dtype(q.dtype), self.stages, Pages(k, v)
        several = len(stages) > 1
        delta = row_deltas(out, grad_out, grad_lse)
        # What one launch makes is written as it is returned; what several add to is summed up in the wider dtype.
        only = self.queries is None and not self.sources and self.chosen is None
        once = only and bool(stages) and not any(stage.resumes for stage in stages)
        dq = q.new_zeros(q.shape, dtype=q.dtype if once else dtype)
        # Slices are summed up one by one, in the wider dtype, and put together afterwards.
        alone = once and (several or not stages[0].transfers)
        d_own = Pages(*(x.new_zeros(x.shape, dtype=x.dtype if alone else dtype) for x in (k, v)))
        # A direct plan kept its guests; others bring them again.
        slots = self._slots(k, v) if several else [_Slot(kept.guests, k, v)] * 2
        pending = self._bring(stages[0], own, slots[0], " again") if several else (Pending(), Pending())
        homeward: list[Pending] = []
        if self.queries is not None:
            some = self.exchange, self.queries, kept.guest_q
            homeward.append(guest_queries_backward(*some, own, grad_out, lse, delta, dq, d_own, scale))
        for number, stage in enumerate(stages):
            mine, guests = _of_heads(own, stage.kv_heads), slots[number % 2].of_stage(stage)
            sliced = len(stage.kv_heads) < k.shape[2]
            d_mine = Pages(*(x.new_zeros(x.shape, dtype=dtype) for x in mine)) if sliced else d_own
            d_guests = Pages(*(x.new_zeros(x.shape, dtype=d_mine.k.dtype) for x in guests))
            some_q, some_grad, *some_lines, some_dq = self._query_heads(stage, q, grad_out, lse, delta, dq)
            run = partial(
                attention_backward,
                some_q,
                mine,
                guests,
                grad_out=some_grad,
                lse=some_lines[0],
                delta=some_lines[1],
                dq=some_dq,
                d_own=d_mine,
                d_guests=d_guests,
                scale=scale,
            )
            pending[0].wait()
            if first := several and number == 0:  # what is there is computed while the first guests travel
                run(table=stage.alone)
            pending[1].wait()
            if number + 1 < len(stages):
                pending = self._bring(stages[number + 1], own, slots[(number + 1) % 2], " again")
            # Guests' gradients before the others: they go home while the other tiles are computed.
            run(table=stage.with_guests)
            going = [self._take_home("keys and values", stage.pages, d_guests, d_mine)]
            if not first:
                run(table=stage.alone)
            going.append(self._take_home("global keys and values", stage.shared, d_guests, d_mine))
            for part in homeward:  # those of the stage before have come meanwhile
                part.wait()
            homeward = [*going, *([Pending(partial(_add, d_own, d_mine, stage.kv_heads))] if sliced else [])]
        if self.sources or self.chosen is not None:
            homeward += self._more_backward(q, own, grad_out, lse, delta, dq, d_own, kept, scale)
        for part in homeward:
            part.wait()
        return dq.to(q.dtype), d_own.k.to(k.dtype), d_own.v.to(v.dtype)

    def _more_backward(
        self,
        q: Tensor,
        own: Pages,
        grad_out: Tensor,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
        d_own: Pages,
        kept: Kept,
        scale: float,
    ) -> list[Pending]:
        """Gradients of sources and chosen chunks; what is on its way home."""
        if len(rows := self._global_rows(q.device)):
            lse = lse.index_fill(1, rows, torch.inf)  # exp(s - inf) = 0: they have no part in this

        def run(source: Source) -> None:
            assert source.d_own is not None and source.d_guests is not None
            for b in range(q.shape[0]):
                attention_backward(
                    q[b : b + 1],
                    _pages_of(source.own, b),
                    _pages_of(source.guests, b),
                    source.tables[b],
                    grad_out[b : b + 1],
                    lse[b : b + 1],
                    delta[b : b + 1],
                    dq[b : b + 1],
                    _pages_of(source.d_own, b),
                    _pages_of(source.d_guests, b),
                    scale=scale,
                    bias=_bias_of(source.bias, b),
                    d_bias=_bias_of(source.d_bias, b),
                )

        homeward: list[Pending] = []
        if self.chosen is not None:
            chunks = ChosenChunks(self.plan, self.chosen, Asked(kept.asked, kept.given))
            rounds = Rounds(chunks, self.exchange, own, kept.chosen)
            for number, guests, tables in rounds:
                flat, d_guests = rounds.gradients(number, d_own.k.dtype)
                run(Source(own, guests, tables, None, d_own, d_guests))
                for part in homeward:  # those of the round before have come meanwhile
                    part.wait()
                homeward = [rounds.take_home(number, flat, d_own)]
        for source in self.sources:
            run(source)
        return homeward

    def _slots(self, k: Tensor, v: Tensor) -> list[_Slot]:
        """Two guest buffers, of which a single stage needs but one."""
        width = k.shape[0] * (k.shape[3] + v.shape[3])
        sizes = [stage.guest_rows * len(stage.kv_heads) * width for stage in self.stages]
        # Zeros, since a page that is short leaves rows that nobody writes, and 0 times anything finite is 0.
        return [_Slot(k.new_zeros(max(sizes[parity::2])), k, v) for parity in range(min(2, len(sizes)))]

    def _query_heads(self, stage: Stage, *tensors: Tensor) -> list[Tensor]:
        """Those that read the stage's key/value heads, of tensors [batch, tokens, heads, ...]."""
        share, heads = self.plan.heads // self.plan.kv_heads, stage.kv_heads
        if len(heads) == self.plan.kv_heads:  # a view takes as long as all else that is done to a tensor here
            return [*tensors]
        return [x[:, :, heads.start * share : heads.stop * share] for x in tensors]

    def _bring(self, stage: Stage, own: Pages, slot: _Slot, again: str = "") -> tuple[Pending, Pending]:
        """Gathered keys, and pages of other ranks."""
        mine, guests = _of_heads(own, stage.kv_heads), slot.of_stage(stage)

        def start(what: str, transfer: Transfer | None) -> Pending:
            # Keys and values as one message: a second one would wait for multiprocessors behind the tiles, and its
            # peer, which may have started, with it.
            return self.exchange.bring(f"{what}{again}", transfer, mine, guests) if transfer else Pending()

        return start("global keys and values", stage.shared), start("keys and values", stage.pages)

    def _take_home(self, what: str, transfer: Transfer | None, d_guests: Pages, d_own: Pages) -> Pending:
        def receive(message: Message, rows: list[Tensor]) -> None:
            for total, returned in zip(d_own, rows, strict=True):
                add_rows(total, message.places, returned)

        return self.exchange.take_home(f"gradients of {what}", transfer, d_guests, receive) if transfer else Pending()


class _Slot:
    """A guest buffer: one flat tensor that holds rows of K and rows of V, of keys and values like k and v."""

    def __init__(self, flat: Tensor, k: Tensor, v: Tensor) -> None:
        self.flat, self._batch, self._dims = flat, k.shape[0], (k.shape[3], v.shape[3])
        self._pages: dict[tuple[int, int], Pages] = {}

    def of_stage(self, stage: Stage) -> Pages:
        return self.pages(stage.guest_rows, len(stage.kv_heads))

    def pages(self, rows: int, heads: int) -> Pages:
        """Room for so many rows of so many key/value heads."""
        if (rows, heads) not in self._pages:
            shapes = [(self._batch, rows, heads, dim) for dim in self._dims]
            k_size, v_size = (math.prod(shape) for shape in shapes)
            parts = self.flat[:k_size], self.flat[k_size : k_size + v_size]
            self._pages[rows, heads] = Pages(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))
        return self._pages[rows, heads]


def _of_heads(pages: Pages, kv_heads: range) -> Pages:
    """Some heads."""
    if len(kv_heads) == pages.k.shape[2]:
        return pages
    return Pages(*(x[:, :, kv_heads.start : kv_heads.stop] for x in pages))


def _add(total: Pages, part: Pages, kv_heads: range) -> None:
    """Adds what was summed up of some heads to their place."""
    for x, y in zip(_of_heads(total, kv_heads), part, strict=True):
        x.add_(y)


def _pages_of(pages: Pages, b: int) -> Pages:
    """One of the batch."""
    return Pages(pages.k[b : b + 1], pages.v[b : b + 1])


def _bias_of(bias: Biases | None, b: int) -> Biases | None:
    return None if bias is None else Biases(bias.own[b : b + 1], bias.guests[b : b + 1])

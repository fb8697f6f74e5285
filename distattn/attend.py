"""Attention on this rank's shard: the stage loop, its backward pass, and their registration as torch operators.

For each stage: fill the arena, run the tile kernel, merge by log-sum-exp.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from distattn.arena import GuestQueries, Stage
from distattn.errors import ConfigError
from distattn.exchange import Agreement, Counter, Exchange, Pending
from distattn.kernels.attention import Pages, accumulator_dtype, attention_backward, attention_forward, row_deltas
from distattn.kernels.rows import add_rows, merge
from distattn.kernels.table import TileTable
from distattn.messages import Message, Transfer
from distattn.plan import Plan, plans

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Seconds that ranks wait for each other before the first exchange of a plan.
AGREEMENT_DEADLINE = 300.0

_agreement = Agreement()
sent = Counter()
"""Bytes that this process has sent, over all calls."""


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = ..., return_lse: Literal[False] = ...
) -> Tensor: ...


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = ..., return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries to the keys that the plan's spec allows, on all ranks. Differentiable.

    Query head h reads key/value head ``h // (heads // kv_heads)``. All ranks of the plan call this together.

    Args:
        q: [batch, plan.tokens, heads, head_dim], this rank's rows; float32, bfloat16, float16 or float64.
        k: [batch, plan.tokens, kv_heads, head_dim].
        v: [batch, plan.tokens, kv_heads, value_dim].
        plan: made by :func:`make_plan` for this rank.
        scale: factor of the scores; default ``head_dim ** -0.5``.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out [batch, plan.tokens, heads, value_dim] in the dtype of q; and if asked for, lse [batch, plan.tokens, heads],
        natural logarithm, float32 (float64 for float64 inputs). A query that may attend to nothing has out 0, lse -inf.

    Raises:
        ConfigError: (a ValueError) a shape, dtype or device is not what the plan says.
        PlanMismatch: ranks disagree on the plan, the shapes or the dtypes. Nothing has been sent.
        PeerLost: a rank did not answer.
    """
    refusal = _refusal(q, k, v, plan)
    if refusal:
        if plan.group_name is not None and not torch.compiler.is_compiling():
            _agreement.refuse(plan.group_name, refusal)
        raise ConfigError(refusal)
    out, lse, _, _ = torch.ops.distattn.attend(q, k, v, plan.name, plan.head_dim**-0.5 if scale is None else scale)
    return (out, lse) if return_lse else out


def _refusal(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> str | None:
    """Why these tensors cannot be attended with this plan; None if they can."""
    if plan.world_size > 1 and plan.group_name is None:
        return f"plan is for {plan.world_size} ranks on paper; expected one that was made with a mesh"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions; expected [batch, tokens, heads, dim]"
    batch = q.shape[0]
    for name, x, heads, dim in (
        ("q", q, plan.heads, plan.head_dim),
        ("k", k, plan.kv_heads, plan.head_dim),
        ("v", v, plan.kv_heads, plan.value_dim),
    ):
        expected = (batch, plan.tokens, heads, dim)
        if tuple(x.shape) != expected:
            return f"{name} has shape {tuple(x.shape)}; expected {expected} on rank {plan.rank}"
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            return f"{name} is {x.dtype}; expected q, k and v in one of float32, bfloat16, float16, float64"
        if x.device != q.device:
            return f"{name} is on {x.device} and q on {q.device}; expected one device"
    return None


# Defined piece by piece: torch.library.custom_op would import the compiler, which takes seconds, at the first call.
torch.library.define(
    "distattn::attend",
    "(Tensor q, Tensor k, Tensor v, str plan, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "distattn::attend_backward",
    "(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor guests, "
    "Tensor guest_q, str plan, float scale) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("distattn::attend", "default")
def _attend(q: Tensor, k: Tensor, v: Tensor, plan: str, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, guests, guest queries): the last two are what a direct plan's backward pass reads again."""
    return _Pass(plans[plan]).forward(q, k, v, scale)


@torch.library.register_fake("distattn::attend")
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, plan: str, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = plans[plan]
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    kept = p.stages[0].guest_rows if len(p.stages) == 1 else 0
    guests = q.new_empty(q.shape[0] * kept * p.kv_heads * (p.head_dim + p.value_dim))
    rows = 0 if p.guest_queries is None else len(p.guest_queries.positions)
    return out, lse, guests, q.new_empty((q.shape[0], rows, p.heads, p.head_dim))


@torch.library.impl("distattn::attend_backward", "default")
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    guests: Tensor,
    guest_q: Tensor,
    plan: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _Pass(plans[plan]).backward(grad_out, grad_lse, q, k, v, out, lse, guests, guest_q, scale)


@torch.library.register_fake("distattn::attend_backward")
def _attend_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    guests: Tensor,
    guest_q: Tensor,
    plan: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, plan, scale = inputs
    out, lse, guests, guest_q = output
    ctx.save_for_backward(q, k, v, out, lse, guests, guest_q)
    # Holding the plan keeps it in the registry until the backward pass.
    ctx.plan, ctx.plan_name, ctx.scale = plans[plan], plan, scale
    ctx.mark_non_differentiable(guests, guest_q)
    ctx.set_materialize_grads(True)


def _differentiate(ctx, grad_out, grad_lse, _guests, _guest_q):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, guests, guest_q = ctx.saved_tensors
    grads = torch.ops.distattn.attend_backward(
        grad_out, grad_lse, q, k, v, out, lse, guests, guest_q, ctx.plan_name, ctx.scale
    )
    return *grads, None, None


torch.library.register_autograd("distattn::attend", _differentiate, setup_context=_save)


class _Pass:
    """One forward or backward pass over a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.exchange = Exchange(plan.group_name, plan.rank, sent)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        plan, dtype = self.plan, accumulator_dtype(q.dtype)
        if plan.group_name is not None:
            what = f"plan {plan.key}, batch {q.shape[0]}, {q.dtype}"
            _agreement.seek(plan.group_name, what, AGREEMENT_DEADLINE)
        stages, own = plan.stages, Pages(k, v)
        several = len(stages) > 1
        slots = self._slots(k, v)
        pending = self._bring(stages[0], own, slots[0])
        queries = plan.guest_queries
        guest_q = q.new_empty((q.shape[0], len(queries.positions) if queries else 0, *q.shape[2:]))
        queries_here = self.exchange.bring(queries.transfer, [q], [guest_q]) if queries else Pending()

        out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=dtype if several else q.dtype)
        lse = q.new_empty(q.shape[:3], dtype=dtype)
        if several or stages[0].table.has_empty_rows:  # tiles that visit nothing are left alone
            out.zero_()
            lse.fill_(-torch.inf)
        for number, stage in enumerate(stages):
            guests = _rows(slots[number % 2], stage)

            def run(table: TileTable, guests: Pages = guests, later: bool = number > 0) -> None:
                attention_forward(q, own, guests, table, out, lse, scale=scale, resume=later)

            arrived = pending
            if number + 1 < len(stages):
                # The other slot is free, since its stage is done.
                pending = self._bring(stages[number + 1], own, slots[(number + 1) % 2])
            run(stage.alone)
            arrived.wait()
            run(stage.with_guests)
        if queries is not None:
            queries_here.wait()
            self._attend_guest_queries(queries, guest_q, own, out, lse, scale)
        return out.to(q.dtype), lse, q.new_empty(0) if several else slots[0].flat, guest_q

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        kept: Tensor,
        guest_q: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan, dtype = self.plan, accumulator_dtype(q.dtype)
        stages, own = plan.stages, Pages(k, v)
        several = len(stages) > 1
        delta = row_deltas(out, grad_out, grad_lse)
        # What one launch makes is written as it is returned; what several add to is summed up in the wider dtype.
        once = not several and plan.guest_queries is None
        dq = q.new_zeros(q.shape, dtype=q.dtype if once else dtype)
        alone = once and not stages[0].transfers
        d_own = Pages(*(x.new_zeros(x.shape, dtype=x.dtype if alone else dtype) for x in (k, v)))
        # A direct plan kept its guests; a ring brings them again.
        slots = self._slots(k, v) if several else [_Slot(kept, k, v)] * 2
        pending = self._bring(stages[0], own, slots[0]) if several else Pending()
        homeward: list[Pending] = []
        if plan.guest_queries is not None:
            homeward.append(
                self._guest_queries_backward(plan.guest_queries, guest_q, own, grad_out, lse, delta, dq, d_own, scale)
            )
        for number, stage in enumerate(stages):
            guests = _rows(slots[number % 2], stage)
            d_guests = Pages(*(x.new_zeros(x.shape, dtype=d_own.k.dtype) for x in guests))

            def run(table: TileTable, guests: Pages = guests, d_guests: Pages = d_guests) -> None:
                attention_backward(q, own, guests, table, grad_out, lse, delta, dq, d_own, d_guests, scale=scale)

            pending.wait()
            if number + 1 < len(stages):
                pending = self._bring(stages[number + 1], own, slots[(number + 1) % 2])
            # Guests' gradients first: they go home while the other tiles are computed.
            run(stage.with_guests)
            homeward += [self._take_home(transfer, d_guests, d_own) for transfer in stage.transfers]
            run(stage.alone)
        for part in homeward:
            part.wait()
        return dq.to(q.dtype), d_own.k.to(k.dtype), d_own.v.to(v.dtype)

    def _slots(self, k: Tensor, v: Tensor) -> list[_Slot]:
        """Two guest buffers, of which a single stage needs but one."""
        rows = [stage.guest_rows for stage in self.plan.stages]
        width = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3])
        # Zeros, since a page that is short leaves rows that nobody writes, and 0 times anything finite is 0.
        first = _Slot(k.new_zeros(max(rows[::2]) * width), k, v)
        return [first, _Slot(k.new_zeros(max(rows[1::2], default=0) * width), k, v)]

    def _bring(self, stage: Stage, own: Pages, slot: _Slot) -> Pending:
        pending = [self.exchange.bring(transfer, own, slot.pages) for transfer in stage.transfers]

        def wait() -> None:
            for part in pending:
                part.wait()

        return Pending(wait)

    def _take_home(self, transfer: Transfer, d_guests: Pages, d_own: Pages) -> Pending:
        def receive(message: Message, rows: list[Tensor]) -> None:
            for mine, returned in zip(d_own, rows, strict=True):
                add_rows(mine, message.places, returned)

        return self.exchange.take_home(transfer, d_guests, receive)

    def _attend_guest_queries(
        self, queries: GuestQueries, guest_q: Tensor, own: Pages, out: Tensor, lse: Tensor, scale: float
    ) -> None:
        """Attends with all ranks' global queries over this rank's pages; partial results go home and are merged."""
        dtype = lse.dtype
        part = guest_q.new_zeros((*guest_q.shape[:3], out.shape[3]), dtype=dtype)
        part_lse = guest_q.new_full(guest_q.shape[:3], -torch.inf, dtype=dtype)
        nobody = Pages(own.k[:, :0], own.v[:, :0])
        attention_forward(guest_q, own, nobody, queries.table, part, part_lse, scale=scale)
        mine = torch.from_numpy(queries.mine).to(out.device)
        total = out.new_zeros((out.shape[0], len(mine), *out.shape[2:]), dtype=dtype)
        total_lse = lse.new_full((lse.shape[0], len(mine), lse.shape[2]), -torch.inf)

        def receive(message: Message, rows: list[Tensor]) -> None:
            merged = merge(total, total_lse, rows[0], rows[1].squeeze(-1))
            total.copy_(merged[0])
            total_lse.copy_(merged[1])

        self.exchange.take_home(queries.transfer, [part, part_lse.unsqueeze(-1)], receive).wait()
        out[:, mine] = total.to(out.dtype)
        lse[:, mine] = total_lse

    def _guest_queries_backward(
        self,
        queries: GuestQueries,
        guest_q: Tensor,
        own: Pages,
        grad_out: Tensor,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
        d_own: Pages,
        scale: float,
    ) -> Pending:
        shape, rows = guest_q.shape[:3], torch.stack((lse, delta), dim=-1)
        guest_grad = grad_out.new_empty((*shape, grad_out.shape[3]))
        guest_rows = rows.new_empty((*shape, 2))
        arriving = [
            self.exchange.bring(queries.transfer, [grad_out], [guest_grad]),
            self.exchange.bring(queries.transfer, [rows], [guest_rows]),
        ]
        for part in arriving:
            part.wait()
        guest_dq = dq.new_zeros(guest_q.shape)
        nobody, d_nobody = Pages(own.k[:, :0], own.v[:, :0]), Pages(d_own.k[:, :0], d_own.v[:, :0])
        attention_backward(
            guest_q,
            own,
            nobody,
            queries.table,
            guest_grad,
            guest_rows[..., 0],
            guest_rows[..., 1],
            guest_dq,
            d_own,
            d_nobody,
            scale=scale,
        )
        return self.exchange.take_home(
            queries.transfer,
            [guest_dq],
            lambda message, returned: add_rows(dq, message.places, returned[0]),
        )


class _Slot:
    """A guest buffer: one flat tensor that holds rows of K and rows of V."""

    def __init__(self, flat: Tensor, k: Tensor, v: Tensor) -> None:
        self.flat = flat
        batch, heads = k.shape[0], k.shape[2]
        rows = flat.numel() // max(batch * heads * (k.shape[3] + v.shape[3]), 1)
        k_size = batch * rows * heads * k.shape[3]
        self.pages = Pages(
            flat[:k_size].view(batch, rows, heads, k.shape[3]), flat[k_size:].view(batch, rows, heads, v.shape[3])
        )


def _rows(slot: _Slot, stage: Stage) -> Pages:
    """The part of a guest buffer that a stage uses."""
    return Pages(slot.pages.k[:, : stage.guest_rows], slot.pages.v[:, : stage.guest_rows])

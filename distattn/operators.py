"""What ranks do together, as torch operators: they can be differentiated, compiled, and found by their plan's name.

``attend`` runs a pass over a plan. ``gather_rows`` brings a rank's rows to all ranks, ``fetch_pages`` brings the pages
that were chosen by the data to the rank that chose them; their gradients go home, and are summed up there in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distattn.exchange import Agreement, Counter, Exchange, Pending, fetch, give_back
from distattn.kernels.attention import Biases, Pages, accumulator_dtype
from distattn.kernels.rows import add_rows, gate, gate_backward
from distattn.kernels.selected import AnyTable, SelectedTable
from distattn.messages import Transfer
from distattn.passes import Pass, Source
from distattn.plan import Plan, plans

# Seconds that ranks wait for each other before the first exchange of a plan.
AGREEMENT_DEADLINE = 300.0

_agreement = Agreement()
sent = Counter()
"""Bytes that this process has sent, over all calls."""


def agree(plan: Plan, batch: int, dtype: torch.dtype) -> None:
    """Returns when all ranks are about to run this plan on such tensors; see :class:`Agreement`."""
    if plan.group_name is not None:
        _agreement.seek(plan.group_name, f"plan {plan.key}, batch {batch}, {dtype}", AGREEMENT_DEADLINE)


def refuse(plan: Plan, why: str) -> None:
    """Tells the other ranks that this one is about to raise."""
    if plan.group_name is not None and not torch.compiler.is_compiling():
        _agreement.refuse(plan.group_name, why)


# What was begun before its operator is called, by plan, by what it is, and by the place of its tensors.
_begun: dict[tuple[str, str, tuple[int, ...]], Any] = {}


def _names(plan: Plan, what: str, x: list[Tensor]) -> tuple[str, str, tuple[int, ...]]:
    return plan.name, what, tuple(y.data_ptr() for y in x)


@contextmanager
def begun(
    plan: Plan, pooled: list[Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, more: bool
) -> Iterator[None]:
    """Sends summaries on their way and attends the plan's pattern meanwhile, before either operator is called.

    Inside, ``gather_rows`` of ``pooled`` waits for what is on its way, and ``attend`` of q, k and v goes on from there;
    ``more``: with sources beside the pattern.
    """
    if torch.compiler.is_compiling():
        yield
        return
    names = []
    with torch.no_grad():
        if pooled and plan.world_size > 1:
            names.append(_names(plan, "summaries", pooled))
            _begun[names[-1]] = _bring(pooled, plan.name, "summaries")
        names.append(_names(plan, "tokens", [q, k, v]))
        _begun[names[-1]] = Pass(plan, sent).begin(q, k, v, scale, more)
    try:
        yield
    finally:
        for name in names:  # of those whose operator was not called
            _begun.pop(name, None)


# Defined piece by piece: torch.library.custom_op would import the compiler, which takes seconds, at the first call.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? summary_k, Tensor? summary_v, Tensor? summary_bias, Tensor? guest_k, "
    "Tensor? guest_v, Tensor? summary_pages, Tensor? summary_masks, Tensor? chosen_pages, Tensor? chosen_masks"
)
_TAG = torch.Tag.pt2_compliant_tag
torch.library.define(
    "distattn::attend",
    f"({_INPUTS}, bool tokens, str plan, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAG,
)
torch.library.define(
    "distattn::attend_backward",
    f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor guests, Tensor guest_q, {_INPUTS}, "
    "bool tokens, str plan, float scale) -> Tensor[]",
    tags=_TAG,
)
_DIFFERENTIABLE = 8  # the first of _INPUTS


@torch.library.impl("distattn::attend", "default")
def _attend(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, guests, guest queries); see :class:`Pass`."""
    *inputs, tokens, name, scale = arguments
    plan, (q, k, v) = plans[name], inputs[:3]
    begun = _begun.pop(_names(plan, "tokens", [q, k, v]), None) if tokens else None
    run = Pass(plan, sent, tokens, _sources(plan, inputs, None))
    if begun is not None:
        return run.finish(begun, q, k, v, scale)
    agree(plan, q.shape[0], q.dtype)
    return run.forward(q, k, v, scale)


@torch.library.register_fake("distattn::attend")
def _attend_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, v, (tokens, name) = arguments[0], arguments[2], arguments[-3:-1]
    p = plans[name]
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    kept = p.stages[0].guest_rows if tokens and len(p.stages) == 1 else 0
    guests = q.new_empty(q.shape[0] * kept * p.kv_heads * (p.head_dim + p.value_dim))
    rows = 0 if p.guest_queries is None or not tokens else len(p.guest_queries.positions)
    return out, lse, guests, q.new_empty((q.shape[0], rows, p.heads, p.head_dim))


@torch.library.impl("distattn::attend_backward", "default")
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    guests: Tensor,
    guest_q: Tensor,
    *arguments: Any,
) -> list[Tensor]:
    *inputs, tokens, name, scale = arguments
    plan, (q, k, v) = plans[name], inputs[:3]
    sums = [None if x is None else x.new_zeros(x.shape, dtype=lse.dtype) for x in inputs[3:_DIFFERENTIABLE]]
    sources = _sources(plan, inputs, sums)
    grads = Pass(plan, sent, tokens, sources).backward(grad_out, grad_lse, q, k, v, out, lse, guests, guest_q, scale)
    more = [x.to(of.dtype) for x, of in zip(sums, inputs[3:], strict=False) if x is not None]
    return [*grads, *more]


@torch.library.register_fake("distattn::attend_backward")
def _attend_backward_fake(*arguments: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in arguments[6 : 6 + _DIFFERENTIABLE] if x is not None]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, tokens, plan, scale = inputs
    out, lse, guests, guest_q = output
    ctx.save_for_backward(out, lse, guests, guest_q, *tensors)
    # Holding the plan keeps it in the registry until the backward pass.
    ctx.plan, ctx.rest = plans[plan], (tokens, plan, scale)
    ctx.mark_non_differentiable(guests, guest_q)
    ctx.set_materialize_grads(True)


def _differentiate(ctx, grad_out, grad_lse, _guests, _guest_q):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    grads = iter(torch.ops.distattn.attend_backward(grad_out, grad_lse, *saved, *ctx.rest))
    inputs = saved[4:]
    given = [None if x is None else next(grads) for x in inputs[:_DIFFERENTIABLE]]
    return *given, *[None] * (len(inputs) - _DIFFERENTIABLE + 3)


torch.library.register_autograd("distattn::attend", _differentiate, setup_context=_save)


def _sources(plan: Plan, inputs: list[Any], sums: list[Tensor | None] | None) -> list[Source]:
    """The summaries and the chosen chunks, as far as there are any; sums: where their gradients are added."""
    _, k, v, sk, sv, bias, gk, gv, summary_pages, summary_masks, chosen_pages, chosen_masks = inputs
    hierarchy, found = plan.hierarchy, []
    if sk is not None:
        assert hierarchy is not None
        own, nobody = Pages(sk, sv), Pages(sk[:, :0], sv[:, :0])
        tables: list[AnyTable] = [hierarchy.table] * sk.shape[0]
        if summary_pages is not None:
            pages = hierarchy.rows // hierarchy.page
            tables = _tables(plan, summary_pages, summary_masks, hierarchy.page, pages, 0)
        biases = None if bias is None else Biases(bias, bias[:, :0])
        if sums is None:
            found.append(Source(own, nobody, tables, biases))
        else:
            dk, dv, db = sums[:3]
            assert dk is not None and dv is not None
            d_nobody, d_bias = Pages(dk[:, :0], dv[:, :0]), None if db is None else Biases(db, db[:, :0])
            found.append(Source(own, nobody, tables, biases, Pages(dk, dv), d_nobody, d_bias))
    if gk is not None:
        assert hierarchy is not None
        chunk = hierarchy.chunk
        tables = _tables(plan, chosen_pages, chosen_masks, chunk, -(-plan.tokens // chunk), gk.shape[1] // chunk)
        if sums is None:
            found.append(Source(Pages(k, v), Pages(gk, gv), tables))
        else:
            assert sums[3] is not None and sums[4] is not None
            found.append(Source(Pages(k, v), Pages(gk, gv), tables, d_guests=Pages(sums[3], sums[4])))
    return found


def _tables(
    plan: Plan, pages: Tensor, masks: Tensor | None, block: int, own_pages: int, guest_pages: int
) -> list[AnyTable]:
    """pages: int32 [batch, tables, tiles, n]; masks: of each, or None."""
    assert plan.hierarchy is not None
    tile, head_table = plan.hierarchy.tile, plan.hierarchy.head_table
    return [
        SelectedTable(
            tile,
            block,
            pages.shape[2],
            own_pages,
            guest_pages,
            head_table,
            pages[b],
            None if masks is None else masks[b],
        )
        for b in range(pages.shape[0])
    ]


torch.library.define("distattn::gate", "(Tensor[] parts, Tensor gates) -> Tensor", tags=_TAG)
torch.library.define(
    "distattn::gate_backward", "(Tensor grad, Tensor[] parts, Tensor gates) -> (Tensor[], Tensor)", tags=_TAG
)


@torch.library.impl("distattn::gate", "default")
def _gate(parts: list[Tensor], gates: Tensor) -> Tensor:
    """Results of several softmaxes, added with the sigmoids of gates; see rows.gate."""
    return gate(parts, gates)


@torch.library.register_fake("distattn::gate")
def _gate_fake(parts: list[Tensor], gates: Tensor) -> Tensor:
    return parts[0].new_empty(parts[0].shape)


@torch.library.impl("distattn::gate_backward", "default")
def _gate_backward(grad: Tensor, parts: list[Tensor], gates: Tensor) -> tuple[list[Tensor], Tensor]:
    return gate_backward(grad, parts, gates)


@torch.library.register_fake("distattn::gate_backward")
def _gate_backward_fake(grad: Tensor, parts: list[Tensor], gates: Tensor) -> tuple[list[Tensor], Tensor]:
    return [x.new_empty(x.shape) for x in parts], gates.new_empty(gates.shape)


def _save_gate(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    parts, gates = inputs
    ctx.save_for_backward(*parts, gates)


def _differentiate_gate(ctx, grad):  # type: ignore[no-untyped-def]
    *parts, gates = ctx.saved_tensors
    return torch.ops.distattn.gate_backward(grad, parts, gates)


torch.library.register_autograd("distattn::gate", _differentiate_gate, setup_context=_save_gate)

torch.library.define("distattn::gather_rows", "(Tensor[] x, str plan, str what) -> Tensor[]", tags=_TAG)
torch.library.define(
    "distattn::gather_rows_backward", "(Tensor[] grads, int[] rows, str plan, str what) -> Tensor[]", tags=_TAG
)


def _transfer(plan: str, what: str) -> tuple[Plan, Transfer, int]:
    """The plan, one of its transfers to everyone, and how many rows that brings."""
    p = plans[plan]
    assert p.hierarchy is not None
    transfer, rows = p.hierarchy.transfers(what)
    return p, transfer, rows


@torch.library.impl("distattn::gather_rows", "default")
def _gather_rows(x: list[Tensor], plan: str, what: str) -> list[Tensor]:
    """Tensors [batch, rows of this rank, heads, dim] of one dtype, of all ranks: [batch, rows, heads, dim]."""
    found, pending = _begun.pop(_names(plans[plan], what, x), None) or _bring(x, plan, what)
    pending.wait()
    return found


def _bring(x: list[Tensor], plan: str, what: str) -> tuple[list[Tensor], Pending]:
    p, transfer, rows = _transfer(plan, what)
    found = [y.new_empty((y.shape[0], rows, *y.shape[2:])) for y in x]
    return found, Exchange(p.group_name, p.rank, sent).bring(transfer, x, found)


@torch.library.register_fake("distattn::gather_rows")
def _gather_rows_fake(x: list[Tensor], plan: str, what: str) -> list[Tensor]:
    rows = _transfer(plan, what)[2]
    return [y.new_empty((y.shape[0], rows, *y.shape[2:])) for y in x]


@torch.library.impl("distattn::gather_rows_backward", "default")
def _gather_rows_backward(grads: list[Tensor], rows: list[int], plan: str, what: str) -> list[Tensor]:
    p, transfer, _ = _transfer(plan, what)
    wide = [x.to(accumulator_dtype(x.dtype)).contiguous() for x in grads]
    sums = [x.new_zeros((x.shape[0], n, *x.shape[2:])) for x, n in zip(wide, rows, strict=True)]

    def receive(message, returned) -> None:  # type: ignore[no-untyped-def]
        for mine, theirs in zip(sums, returned, strict=True):
            add_rows(mine, message.places, theirs)

    Exchange(p.group_name, p.rank, sent).take_home(transfer, wide, receive).wait()
    return [x.to(g.dtype) for x, g in zip(sums, grads, strict=True)]


@torch.library.register_fake("distattn::gather_rows_backward")
def _gather_rows_backward_fake(grads: list[Tensor], rows: list[int], plan: str, what: str) -> list[Tensor]:
    return [x.new_empty((x.shape[0], n, *x.shape[2:])) for x, n in zip(grads, rows, strict=True)]


def _save_gather(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, plan, what = inputs
    ctx.plan, ctx.rest, ctx.rows = plans[plan], (plan, what), [y.shape[1] for y in x]
    ctx.shapes = [(y.shape, y.dtype, y.device) for y in output]


def _differentiate_gather(ctx, grads):  # type: ignore[no-untyped-def]
    given = [
        torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        for g, (shape, dtype, device) in zip(grads, ctx.shapes, strict=True)
    ]
    return torch.ops.distattn.gather_rows_backward(given, ctx.rows, *ctx.rest), None, None


torch.library.register_autograd("distattn::gather_rows", _differentiate_gather, setup_context=_save_gather)

torch.library.define(
    "distattn::fetch_pages",
    "(Tensor k, Tensor v, Tensor wanted, str plan) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAG,
)
torch.library.define(
    "distattn::fetch_pages_backward",
    "(Tensor grad_k, Tensor grad_v, Tensor wanted, Tensor given, int rows, str plan) -> (Tensor, Tensor)",
    tags=_TAG,
)


@torch.library.impl("distattn::fetch_pages", "default")
def _fetch_pages(k: Tensor, v: Tensor, wanted: Tensor, plan: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Brings chunks that other ranks own.

    wanted: bool [kv_heads, chunks]. Returns guests k and v [batch, pages * chunk, kv_heads, dim], and where they lie:
    int32 [kv_heads, chunks], a guest page or -1; and what this rank sent, int64 [n, 3]: (rank, head, chunk), for the
    way back.
    """
    p = plans[plan]
    assert p.hierarchy is not None
    return fetch(p.group_name, p.hierarchy.ownership, sent, k, v, wanted)


@torch.library.register_fake("distattn::fetch_pages")
def _fetch_pages_fake(k: Tensor, v: Tensor, wanted: Tensor, plan: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = plans[plan]
    assert p.hierarchy is not None
    rows: Any = 0
    given: Any = 0
    if p.world_size > 1:
        context = torch.library.get_ctx()
        rows, given = context.new_dynamic_size() * p.hierarchy.chunk, context.new_dynamic_size()
    return (
        k.new_empty((k.shape[0], rows, *k.shape[2:])),
        v.new_empty((v.shape[0], rows, *v.shape[2:])),
        wanted.new_empty(wanted.shape, dtype=torch.int32),
        wanted.new_empty((given, 3), dtype=torch.int64),
    )


@torch.library.impl("distattn::fetch_pages_backward", "default")
def _fetch_pages_backward(
    grad_k: Tensor, grad_v: Tensor, wanted: Tensor, given: Tensor, rows: int, plan: str
) -> tuple[Tensor, Tensor]:
    p = plans[plan]
    assert p.hierarchy is not None
    return give_back(p.group_name, p.hierarchy.ownership, sent, grad_k, grad_v, wanted, given, rows)


@torch.library.register_fake("distattn::fetch_pages_backward")
def _fetch_pages_backward_fake(
    grad_k: Tensor, grad_v: Tensor, wanted: Tensor, given: Tensor, rows: int, plan: str
) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty((x.shape[0], rows, *x.shape[2:])) for x in (grad_k, grad_v))  # type: ignore[return-value]


def _save_fetch(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    k, _, wanted, plan = inputs
    _, _, slots, given = output
    ctx.save_for_backward(wanted, given)
    ctx.plan, ctx.rest = plans[plan], (k.shape[1], plan)
    ctx.mark_non_differentiable(slots, given)
    ctx.set_materialize_grads(True)


def _differentiate_fetch(ctx, grad_k, grad_v, _slots, _given):  # type: ignore[no-untyped-def]
    return *torch.ops.distattn.fetch_pages_backward(grad_k, grad_v, *ctx.saved_tensors, *ctx.rest), None, None


torch.library.register_autograd("distattn::fetch_pages", _differentiate_fetch, setup_context=_save_fetch)

"""What ranks do together, as torch operators: they can be differentiated, compiled, and found by their plan's name.

``attend`` runs a pass over a plan. ``gather_rows`` brings a rank's rows to all ranks; their gradients go home, and are
summed up there in float32. ``exchange_heads`` and ``return_heads`` are each other's backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distattn.agreement import Agreement
from distattn.chosen import Asks
from distattn.errors import DistattnError
from distattn.exchange import Counter, Exchange, Pending
from distattn.heads import HeadsPlan
from distattn.kernels.attention import Biases, Pages, accumulator_dtype
from distattn.kernels.rows import add_rows, gate, gate_backward
from distattn.kernels.selected import AnyTable, SelectedTable
from distattn.messages import Message, Transfer
from distattn.passes import Kept, Pass, Source
from distattn.plan import Plan, plans

_agreement = Agreement()
sent = Counter()
"""Bytes that this process has sent, over all calls."""


def agree(plan: Plan, batch: int, dtype: torch.dtype) -> None:
    """Returns when all ranks are about to run this plan on such tensors; see :class:`Agreement`."""
    shape = f"{plan.seq_len} tokens, {plan.heads}/{plan.kv_heads} heads of {plan.head_dim}/{plan.value_dim}"
    for name in plan.group_names:
        try:
            _agreement.seek(name, f"plan {plan.key} ({shape}), batch {batch}, {dtype}")
        except DistattnError as error:
            for other in plan.group_names:
                if other != name:  # who is not in this group would wait in vain
                    _agreement.refuse(other, str(error))
            raise


def agree_on(group_name: str, what: str) -> None:
    """Returns when all ranks of a group have said the same; see :class:`Agreement`."""
    _agreement.seek(group_name, what)


def refuse_in(group_name: str, why: str) -> None:
    """Tells the other ranks of a group that this one is about to raise."""
    _agreement.refuse(group_name, why)


def refuse(plan: Plan, why: str) -> None:
    """Tells the other ranks that this one is about to raise."""
    if not torch.compiler.is_compiling():
        for name in plan.group_names:
            _agreement.refuse(name, why)


# What was begun before its operator is called, by plan, by what it is, and by the place of its tensors.
_begun: dict[tuple[str, str, tuple[int, ...]], Any] = {}


def _names(plan: Plan, what: str, x: list[Tensor]) -> tuple[str, str, tuple[int, ...]]:
    return plan.name, what, tuple(y.data_ptr() for y in x)


class Begun:
    """What is begun before the operators are called that go on with it, for as long as it is entered.

    Compiled code begins nothing: each operator does by itself what is left.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._names: list[tuple[str, str, tuple[int, ...]]] = []

    def __enter__(self) -> Begun:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:  # of those whose operator was not called
            _begun.pop(name, None)

    def bring(self, pooled: list[Tensor]) -> None:
        """Sends summaries on their way."""
        if pooled:
            self._begin("summaries", pooled, lambda: _bring(pooled, self._plan.name, "summaries"))

    def arrive(self, pooled: list[Tensor]) -> None:
        """Lets the current stream wait for summaries that were brought; then ``gather_rows`` of these has them."""
        if pooled and not torch.compiler.is_compiling():
            _begun[_names(self._plan, "summaries", pooled)][1].wait()

    def start(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Starts what the plan's pattern needs of other ranks: ``attend`` of these goes on from there."""
        self._begin("exchanges", [q, k, v], lambda: Pass(self._plan, sent).start(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, more: bool) -> None:
        """Attends the plan's pattern, once it is started: ``attend`` of these goes on from there.

        more: with sources beside the pattern.
        """

        def run() -> Any:
            started = _begun.pop(_names(self._plan, "exchanges", [q, k, v]))
            return Pass(self._plan, sent).begin(started, q, k, v, scale, more)

        self._begin("tokens", [q, k, v], run)

    def ask(self, chosen: Tensor) -> None:
        """Asks other ranks for chunks: ``attend`` with these goes on from there."""
        plan = self._plan
        self._begin("asks", [chosen], lambda: Asks(plan, Exchange(plan.group_name, plan.rank, sent, plan.key), chosen))

    def _begin(self, what: str, x: list[Tensor], start: Callable[[], Any]) -> None:
        if torch.compiler.is_compiling():
            return
        name = _names(self._plan, what, x)
        self._names.append(name)
        with torch.no_grad():
            _begun[name] = start()


# Defined piece by piece: torch.library.custom_op would import the compiler, which takes seconds, at the first call.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? summary_k, Tensor? summary_v, Tensor? summary_bias, Tensor? summary_pages, "
    "Tensor? summary_masks, Tensor? chosen"
)
_TAG = torch.Tag.pt2_compliant_tag
torch.library.define(
    "distattn::attend",
    f"({_INPUTS}, bool tokens, str plan, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAG,
)
torch.library.define(
    "distattn::attend_backward",
    "(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor guests, Tensor guest_q, Tensor chosen_guests, "
    f"Tensor asked, Tensor given, {_INPUTS}, bool tokens, str plan, float scale) -> Tensor[]",
    tags=_TAG,
)
_DIFFERENTIABLE = 6  # the first of _INPUTS


@torch.library.impl("distattn::attend", "default")
def _attend(*arguments: Any) -> tuple[Tensor, ...]:
    """(out, lse, then what is in ``Kept``); see :class:`Pass`."""
    *inputs, tokens, name, scale = arguments
    plan, (q, k, v) = plans[name], inputs[:3]
    chosen: Tensor | None = inputs[-1]
    begun = _begun.pop(_names(plan, "tokens", [q, k, v]), None) if tokens else None
    asks = None if chosen is None else _begun.pop(_names(plan, "asks", [chosen]), None)
    run = Pass(plan, sent, tokens, _sources(plan, inputs, None), chosen, asks)
    if begun is not None:
        out, lse, kept = run.finish(begun, q, k, v, scale)
    else:
        agree(plan, q.shape[0], q.dtype)
        started = _begun.pop(_names(plan, "exchanges", [q, k, v]), None) if tokens else None
        out, lse, kept = run.forward(q, k, v, scale, started)
    return out, lse, *kept


@torch.library.register_fake("distattn::attend")
def _attend_fake(*arguments: Any) -> tuple[Tensor, ...]:
    q, v, (chosen, tokens, name) = arguments[0], arguments[2], arguments[-4:-1]
    p = plans[name]
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    kept = p.stages[0].guest_rows if tokens and len(p.stages) == 1 else 0
    guests = q.new_empty(q.shape[0] * kept * p.kv_heads * (p.head_dim + p.value_dim))
    rows = 0 if p.guest_queries is None or not tokens else len(p.guest_queries.positions)
    came: Any = 0
    others, own = 0, 0
    if chosen is not None and p.world_size > 1:
        assert p.hierarchy is not None
        came = torch.library.get_ctx().new_dynamic_size()
        others, own = p.world_size - 1, len(p.hierarchy.my_selectable) * p.kv_heads
    return (
        out,
        lse,
        guests,
        q.new_empty((q.shape[0], rows, p.heads, p.head_dim)),
        q.new_empty(came),
        torch.empty(2 * others + 3, dtype=torch.int64, device="cpu"),
        q.new_empty((others, own), dtype=torch.uint8),
    )


@torch.library.impl("distattn::attend_backward", "default")
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    guests: Tensor,
    guest_q: Tensor,
    chosen_guests: Tensor,
    asked: Tensor,
    given: Tensor,
    *arguments: Any,
) -> list[Tensor]:
    *inputs, tokens, name, scale = arguments
    plan, (q, k, v) = plans[name], inputs[:3]
    sums = [None if x is None else x.new_zeros(x.shape, dtype=lse.dtype) for x in inputs[3:_DIFFERENTIABLE]]
    sources = _sources(plan, inputs, sums)
    kept = Kept(guests, guest_q, chosen_guests, asked, given)
    run = Pass(plan, sent, tokens, sources, inputs[-1])
    with torch.autocast(q.device.type, enabled=False):  # as in attend
        grads = run.backward(grad_out, grad_lse, q, k, v, out, lse, kept, scale)
    more = [x.to(of.dtype) for x, of in zip(sums, inputs[3:], strict=False) if x is not None]
    return [*grads, *more]


@torch.library.register_fake("distattn::attend_backward")
def _attend_backward_fake(*arguments: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in arguments[9 : 9 + _DIFFERENTIABLE] if x is not None]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, tokens, plan, scale = inputs
    ctx.save_for_backward(*output, *tensors)
    # Holding the plan keeps it in the registry until the backward pass.
    ctx.plan, ctx.rest = plans[plan], (tokens, plan, scale)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse, *_):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    # Made here: autograd would make such zeros of what a pass keeps, too.
    grad_out, grad_lse = (
        saved[i].new_zeros(saved[i].shape) if g is None else g for i, g in enumerate((grad_out, grad_lse))
    )
    grads = iter(torch.ops.distattn.attend_backward(grad_out, grad_lse, *saved, *ctx.rest))
    inputs = saved[7:]
    given = [None if x is None else next(grads) for x in inputs[:_DIFFERENTIABLE]]
    return *given, *[None] * (len(inputs) - _DIFFERENTIABLE + 3)


torch.library.register_autograd("distattn::attend", _differentiate, setup_context=_save)


def _sources(plan: Plan, inputs: list[Any], sums: list[Tensor | None] | None) -> list[Source]:
    """The summaries, if there are any; sums: where their gradients are added."""
    sk, sv, bias, pages, masks = inputs[3:8]
    if sk is None:
        return []
    hierarchy = plan.hierarchy
    assert hierarchy is not None
    own, nobody = Pages(sk, sv), Pages(sk[:, :0], sv[:, :0])
    tables: list[AnyTable] = [hierarchy.table] * sk.shape[0]
    if pages is not None:
        at = hierarchy.tile, hierarchy.page, pages.shape[2], hierarchy.rows // hierarchy.page, 0, hierarchy.head_table
        tables = [SelectedTable(*at, pages[b], masks[b]) for b in range(len(pages))]
    biases = None if bias is None else Biases(bias, bias[:, :0])
    if sums is None:
        return [Source(own, nobody, tables, biases)]
    dk, dv, db = sums
    assert dk is not None and dv is not None
    d_nobody, d_bias = Pages(dk[:, :0], dv[:, :0]), None if db is None else Biases(db, db[:, :0])
    return [Source(own, nobody, tables, biases, Pages(dk, dv), d_nobody, d_bias)]


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
    return found, Exchange(p.group_name, p.rank, sent, p.key).bring(what, transfer, x, found)


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

    Exchange(p.group_name, p.rank, sent, p.key).take_home(f"gradients of {what}", transfer, wide, receive).wait()
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
    "distattn::exchange_heads", "(Tensor[] queries, Tensor[] keys, str plan) -> (Tensor[], Tensor[])", tags=_TAG
)
torch.library.define(
    "distattn::return_heads", "(Tensor[] queries, Tensor[] keys, str plan) -> (Tensor[], Tensor[])", tags=_TAG
)


def _heads_plan(name: str) -> HeadsPlan:
    plan = plans[name]
    assert isinstance(plan, HeadsPlan)
    return plan


def _transfers(plan: HeadsPlan, queries: int, keys: int, gradients: bool) -> list[tuple[str, Transfer]]:
    """What each tensor is, and how it travels: q, k and v, or without keys out and perhaps lse; or their gradients."""
    names = ("queries", "keys", "values") if keys else ("results", "log-sum-exps")
    transfers = [plan.queries] * queries + [plan.keys] * keys
    of = "gradients of " if gradients else ""
    return [(f"{of}{name} of heads", transfer) for name, transfer in zip(names, transfers, strict=False)]


def _empty_heads(queries: list[Tensor], keys: list[Tensor], plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
    """Room for the rows and heads of a plan."""

    def room(tensors: list[Tensor], heads: int) -> list[Tensor]:
        return [x.new_empty((x.shape[0], plan.tokens, heads, x.shape[3])) for x in tensors]

    return room(queries, plan.heads), room(keys, plan.kv_heads)


@torch.library.impl("distattn::exchange_heads", "default")
def _exchange_heads(queries: list[Tensor], keys: list[Tensor], name: str) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's heads of all rows of its shard, [batch, plan.inner.tokens, heads of the inner plan, dim].

    queries: [batch, plan.tokens, plan.heads, dim], and keys with plan.kv_heads: q, and k and v; or the gradients of out
    and perhaps of lse, and none. They travel one by one, so that each can be received where it belongs.
    """
    plan = _heads_plan(name)
    agree(plan, queries[0].shape[0], queries[0].dtype)
    exchange = Exchange(plan.group_name, plan.head_rank, sent, plan.key)
    found = _empty_heads(queries, keys, plan.inner)
    how = _transfers(plan, len(queries), len(keys), gradients=not keys)
    parts = zip(how, (*queries, *keys), (*found[0], *found[1]), strict=True)
    Pending.all([exchange.bring(what, transfer, [x], [y]) for (what, transfer), x, y in parts]).wait()
    return found


@torch.library.register_fake("distattn::exchange_heads")
def _exchange_heads_fake(queries: list[Tensor], keys: list[Tensor], name: str) -> tuple[list[Tensor], list[Tensor]]:
    return _empty_heads(queries, keys, _heads_plan(name).inner)


@torch.library.impl("distattn::return_heads", "default")
def _return_heads(queries: list[Tensor], keys: list[Tensor], name: str) -> tuple[list[Tensor], list[Tensor]]:
    """The reverse of ``exchange_heads``: all heads of this rank's own rows.

    queries: out, and perhaps lse; or, with keys, the gradients of q, and of k and v. Where several ranks had a
    key/value head, what they return is summed up in the accumulator's dtype.
    """
    plan = _heads_plan(name)
    exchange = Exchange(plan.group_name, plan.head_rank, sent, plan.key)
    found, like = _empty_heads(queries, keys, plan)
    sums = [torch.zeros_like(x, dtype=accumulator_dtype(x.dtype)) for x in like]

    def place(x: Tensor, message: Message, rows: list[Tensor]) -> None:
        x[:, :, message.kv_heads[0] : message.kv_heads[-1] + 1] = rows[0]

    def add(x: Tensor, message: Message, rows: list[Tensor]) -> None:
        x[:, :, message.kv_heads[0] : message.kv_heads[-1] + 1] += rows[0]

    receive = [*(partial(place, x) for x in found), *(partial(add, x) for x in sums)]
    how = _transfers(plan, len(queries), len(keys), gradients=bool(keys))
    parts = zip(how, (*queries, *keys), receive, strict=True)
    Pending.all([exchange.take_home(what, transfer, [x], to) for (what, transfer), x, to in parts]).wait()
    return found, [x.to(of.dtype) for x, of in zip(sums, like, strict=True)]


@torch.library.register_fake("distattn::return_heads")
def _return_heads_fake(queries: list[Tensor], keys: list[Tensor], name: str) -> tuple[list[Tensor], list[Tensor]]:
    return _empty_heads(queries, keys, _heads_plan(name))


def _save_heads(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.plan = plans[inputs[2]]
    ctx.shapes = [[(x.shape, x.dtype, x.device) for x in some] for some in output]


def _differentiate_heads(reverse, ctx, *grads):  # type: ignore[no-untyped-def]
    given = [
        [
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(some or [None] * len(shapes), shapes, strict=True)
        ]
        for some, shapes in zip(grads, ctx.shapes, strict=True)
    ]
    return *reverse(*given, ctx.plan.name), None


for _name, _reverse in (("exchange_heads", "return_heads"), ("return_heads", "exchange_heads")):
    torch.library.register_autograd(
        f"distattn::{_name}",
        partial(_differentiate_heads, getattr(torch.ops.distattn, _reverse)),
        setup_context=_save_heads,
    )

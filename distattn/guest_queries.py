"""Global queries, which every rank attends with over the pages that it owns: partial results go home and are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from distattn.arena import GuestQueries
from distattn.exchange import Exchange, Pending
from distattn.kernels.attention import Pages, attention_backward, attention_forward
from distattn.kernels.rows import add_rows, merge
from distattn.messages import Message


def attend_guest_queries(
    exchange: Exchange,
    queries: GuestQueries,
    guest_q: Tensor,
    own: Pages,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    """Attends with all ranks' global queries over this rank's pages, and writes what comes of its own ones.

    guest_q: [batch, all of them, heads, head_dim]. out, lse: of this rank's rows.
    """
    dtype = lse.dtype
    part = guest_q.new_zeros((*guest_q.shape[:3], out.shape[3]), dtype=dtype)
    part_lse = guest_q.new_full(guest_q.shape[:3], -torch.inf, dtype=dtype)
    attention_forward(guest_q, own, _nothing(own), queries.table, part, part_lse, scale=scale)
    mine = queries.on(out.device, "mine")
    total = out.new_zeros((out.shape[0], len(mine), *out.shape[2:]), dtype=dtype)
    total_lse = lse.new_full((lse.shape[0], len(mine), lse.shape[2]), -torch.inf)

    def receive(message: Message, rows: list[Tensor]) -> None:
        merged = merge(total, total_lse, rows[0], rows[1].squeeze(-1))
        total.copy_(merged[0])
        total_lse.copy_(merged[1])

    exchange.take_home("results", queries.transfer, [part, part_lse.unsqueeze(-1)], receive).wait()
    out[:, mine] = total.to(out.dtype)
    lse[:, mine] = total_lse


def guest_queries_backward(
    exchange: Exchange,
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
    """Adds gradients of what guest queries visit to ``d_own``; theirs are on the way to their owners' ``dq``.

    Arguments as in ``Pass.backward``.
    """
    shape, rows = guest_q.shape[:3], torch.stack((lse, delta), dim=-1)
    guest_grad = grad_out.new_empty((*shape, grad_out.shape[3]))
    guest_rows = rows.new_empty((*shape, 2))
    arriving = [
        exchange.bring("gradients of results", queries.transfer, [grad_out], [guest_grad]),
        exchange.bring("sums of rows", queries.transfer, [rows], [guest_rows]),
    ]
    for part in arriving:
        part.wait()
    guest_dq = dq.new_zeros(guest_q.shape)
    attention_backward(
        guest_q,
        own,
        _nothing(own),
        queries.table,
        guest_grad,
        guest_rows[..., 0],
        guest_rows[..., 1],
        guest_dq,
        d_own,
        _nothing(d_own),
        scale=scale,
    )
    return exchange.take_home(
        "gradients of queries",
        queries.transfer,
        [guest_dq],
        lambda message, returned: add_rows(dq, message.places, returned[0]),
    )


def _nothing(pages: Pages) -> Pages:
    """No rows, of the same heads."""
    return Pages(pages.k[:, :0], pages.v[:, :0])

"""The backward pass on Hopper GPUs: one kernel makes dK and dV, the other dQ, both in Triton's Gluon dialect.

They are in attention_hopper_keys.py and attention_hopper_queries.py. Formulas are in attention.py. As in
attention_triton_backward.py both compute the weights again, a program owns what it adds to, and pieces of long rows are
added up in order, so that the result does not depend on timing. One warp fetches (see walk_hopper.py), two groups of
four warps multiply 64 keys, or 64 queries, each.

With c = scale log2(e), weights are exp2(c (q.k - lse / scale)), and what they are multiplied with is g.v - delta. Both
products start from accumulators that hold -lse / scale and -delta instead of zeros, which saves two subtractions an
element and the registers that they need. Rows that attend to nothing hold -1e30: their weights are zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distattn.kernels.attention_hopper_keys import grad_keys
from distattn.kernels.attention_hopper_queries import grad_queries
from distattn.kernels.attention_triton import programs_at_once
from distattn.kernels.launching import Recording
from distattn.kernels.slots_triton import add_key_slots, add_query_slots
from distattn.kernels.table import TileTable
from distattn.kernels.walk_hopper import lines_of, rows_of
from distattn.kernels.walk_triton import LOG2_E
from distattn.kernels.work import key_units, key_work, query_units, query_work, waves_of


@triton.jit(do_not_specialize=["tokens", "padded"])
def _start_values(
    lse, delta, start_lse, start_delta, tokens, padded, scale, lse_n, lse_h, delta_n, delta_h, ROWS: tl.constexpr
):
    """-lse / scale and -delta by head; rows that do not exist have no weight."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    row_lse = tl.load(lse + row * lse_n + head * lse_h, mask=row < tokens, other=float("-inf"))
    row_delta = tl.load(delta + row * delta_n + head * delta_h, mask=row < tokens, other=0.0)
    at = head.to(tl.int64) * padded + row
    tl.store(start_lse + at, tl.where(row_lse == float("-inf"), -1e30, -row_lse / scale), mask=row < padded)
    tl.store(start_delta + at, -row_delta, mask=row < padded)


def backward(recording: Recording, table: TileTable, scale: float) -> None:
    """As attention.attention_backward says.

    The recording is given q, own, guests, grad_out, lse, delta, dq, d_own and d_guests.
    """
    q, k, v, guest_k, guest_v, grad_out, lse, delta, dq, dk, dv, guest_dk, guest_dv = recording.given
    device, (tokens, heads, dim), (kv_heads, v_dim) = q.device, q.shape[1:], v.shape[2:]
    programs = programs_at_once(device)
    units, _, side_by_side = query_units(table.head_table, kv_heads, 1, device)
    by_query = query_work(table, device, programs)
    if by_query.most == 0:
        return
    by_key = key_work(table, device, programs, heads // kv_heads)
    if not guest_k.shape[1]:  # a descriptor of nothing is not to be had
        guest_k, guest_v, guest_dk, guest_dv = k, v, dk, dv
    inputs, grads = (q, grad_out, k, v, guest_k, guest_v), (dk, dv, guest_dk, guest_dv)
    assert all(x.tensor.is_contiguous() for x in grads), "the pass by key takes no strides, for want of shared memory"
    padded = table.tiles * table.block_q
    start_lse, start_delta = (recording.temporary(heads, padded) for _ in range(2))
    lines = [lines_of(x, 64) for x in (start_lse, start_delta)]
    slots = recording.temporary(by_query.slots, heads, table.block_q, dim)
    slot_dk = recording.temporary(by_key.slots, kv_heads, table.block_k, dim)
    slot_dv = recording.temporary(by_key.slots, kv_heads, table.block_k, v_dim)
    numbers = len(units) * by_query.most
    add_queries, add_keys = (x.dtype == torch.float32 for x in (dq, dk))
    heads_apart = [x.strides[2] for x in inputs]
    rounds = key_units(table.head_table, kv_heads, device)
    for b in range(q.shape[0]):
        recording.launch(
            _start_values, (-(-padded // 1024), heads),
            lse.at(b), delta.at(b), start_lse, start_delta, tokens, padded, scale, *lse.strides[1:],
            *delta.strides[1:], ROWS=1024,
        )  # fmt: skip
        rows = [rows_of(x, b, 64) for x in inputs]
        recording.launch(
            grad_queries, (waves_of(by_query, numbers, programs),),
            *rows, start_lse, start_delta, dq.at(b) if add_queries else rows_of(dq, b, 64), slots,
            by_query.items, by_query.item_ptr, units, *by_query.visits,
            tokens, table.own_pages, table.tiles, by_query.most, numbers, padded, scale * LOG2_E.value, *heads_apart,
            *dq.strides[1:3], SIDE_BY_SIDE=side_by_side, ONE_TABLE=by_query.one_table, ALL_HEADS=heads,
            ADD=add_queries, num_warps=4,
        )  # fmt: skip
        add_query_slots(recording, dq, b, slots, table, by_query, units, 1)
        for kv_units in rounds:
            recording.launch(
                grad_keys, (len(kv_units) * by_key.most,), *rows, *lines, *(x.at(b) for x in grads),
                slot_dk, slot_dv, by_key.items, by_key.item_ptr, kv_units, *by_key.visits,
                k.shape[1], table.own_pages, table.pages, by_key.most, padded, scale * LOG2_E.value, *heads_apart,
                ONE_TABLE=by_key.one_table, KV_HEADS=kv_heads, ADD=add_keys, num_warps=4,
            )  # fmt: skip
            add_key_slots(recording, dk, guest_dk, b, slot_dk, table, by_key, kv_units)
            add_key_slots(recording, dv, guest_dv, b, slot_dv, table, by_key, kv_units)

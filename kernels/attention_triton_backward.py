"""The backward tile kernels in Triton, for GPUs: one makes dQ by query tile, the other dK and dV by key page.

Both compute the weights again from the LSE (Dao, "FlashAttention-2", 2023, section 3; formulas in attention.py). A
program owns what it adds to and long rows are added up slot by slot, so there are no atomics and the result does not
depend on timing. Products of the second kernel are transposed, [keys, queries], so that its weights are the left
operand of the next product where they lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.attention_triton import heads_together, precision, programs_at_once
from distattn.kernels.configurations import Sizes, configuration, taken_together
from distattn.kernels.launching import Recording, strides_of
from distattn.kernels.slots_triton import add_key_slots, add_query_slots
from distattn.kernels.walk_triton import (
    LOG2_E,
    find_item,
    first_full,
    key_biases,
    mask_bits,
    mask_bits_transposed,
    next_full,
    page_length,
    page_rows,
    partial_range,
    slot_of,
    tile_rows,
)
from distattn.kernels.work import key_units, key_work, query_units, query_work

if TYPE_CHECKING:
    from distattn.kernels.selected import AnyTable


@triton.jit(do_not_specialize=["rows"])
def _row_deltas(
    out, grad_out, grad_lse, delta, rows, heads, out_n, out_h, grad_n, grad_h, lse_n, lse_h, DIM: tl.constexpr,
    DIM_2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows are (token, head) pairs, heads side by side."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    d = tl.arange(0, DIM_2)
    mask = (row < rows)[:, None] & (d < DIM)
    x = tl.load(out + (token * out_n + head * out_h)[:, None] + d, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_out + (token * grad_n + head * grad_h)[:, None] + d, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(grad_lse + token * lse_n + head * lse_h, mask=row < rows, other=0.0)
    tl.store(delta + row, tl.sum(x * g, 1) - h, mask=row < rows)


def row_deltas(out: Tensor, grad_out: Tensor, grad_lse: Tensor) -> Tensor:
    batch, tokens, heads, dim = out.shape
    delta = grad_lse.new_empty((batch, tokens, heads))
    rows = max(1, 4096 // triton.next_power_of_2(dim))
    for b in range(batch if tokens else 0):
        _row_deltas[(triton.cdiv(tokens * heads, rows),)](
            out[b], grad_out[b], grad_lse[b], delta[b], tokens * heads, heads, *out.stride()[1:3],
            *grad_out.stride()[1:3], *grad_lse.stride()[1:3], DIM=dim, DIM_2=triton.next_power_of_2(dim), ROWS=rows,
        )  # fmt: skip
    return delta


@triton.jit
def _row_values(lse, delta, lse_at, delta_at, is_row):
    """LSE in base 2 and delta of some rows. exp2(s - inf) = 0: rows that attend to nothing give no gradient."""
    row_lse = tl.load(lse + lse_at, mask=is_row, other=float("inf")) * LOG2_E
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    return row_lse, tl.load(delta + delta_at, mask=is_row, other=0.0)


@triton.jit
def _query_step(queries, grads, row_lse, row_delta, keys, values, biases, allowed, acc, scale, MASKED: tl.constexpr,
                BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    if BIAS:
        scores += biases[None, :]
    if MASKED:
        scores = tl.where(allowed, scores, float("-inf"))
    weights = tl.exp2(scores - row_lse[:, None])
    d_scores = weights * (tl.dot(grads, tl.trans(values), input_precision=PRECISION) - row_delta[:, None])
    return tl.dot(d_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "own_rows", "own_pages", "tiles", "most"])
def _grad_queries(
    q, grad_out, lse, delta, dq, k, v, guest_k, guest_v, bias, guest_bias, slots,
    items, item_ptr, units, full_first, full_count, part_page, part_mask, masks,
    tokens, own_rows, own_pages, tiles, most, scale,
    q_n, q_h, grad_n, grad_h, lse_n, lse_h, delta_n, delta_h, dq_n, dq_h,
    k_n, k_h, v_n, v_h, guest_k_n, guest_k_h, guest_v_n, guest_v_h, bias_n, bias_h, guest_bias_n, guest_bias_h,
    MASK_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr,
    HEADS_2: tl.constexpr, ALL_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, V_DIM: tl.constexpr,
    V_DIM_2: tl.constexpr, SIDE_BY_SIDE: tl.constexpr, ONE_TABLE: tl.constexpr, BIAS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item, unit, table, exists = find_item(tl.program_id(0), items, item_ptr, units, most, SIDE_BY_SIDE, ONE_TABLE)
    if not exists:
        return
    head0 = tl.load(unit + 1)
    kv_head = tl.load(unit + 2).to(tl.int64)
    tile = tl.load(item) - table * tiles
    slot = slot_of(item)
    token, row, head, is_row = tile_rows(tile, 0, tokens, ROWS, ROWS, BLOCK_Q, HEADS, HEADS_2)
    head = (head0 + head).to(tl.int64)
    d = tl.arange(0, DIM_2)
    dv = tl.arange(0, V_DIM_2)
    column = tl.arange(0, COLUMNS)
    SUBS: tl.constexpr = (BLOCK_K + COLUMNS - 1) // COLUMNS
    SHORT: tl.constexpr = SUBS * COLUMNS != BLOCK_K  # a page is less than SUBS * COLUMNS rows
    EVEN: tl.constexpr = (not SHORT) and (DIM == DIM_2) and (V_DIM == V_DIM_2)
    q_mask = is_row[:, None] & (d < DIM)
    queries = tl.load(q + (row * q_n + head * q_h)[:, None] + d, mask=q_mask, other=0.0)
    grads = tl.load(
        grad_out + (row * grad_n + head * grad_h)[:, None] + dv, mask=is_row[:, None] & (dv < V_DIM), other=0.0
    )
    row_lse, row_delta = _row_values(lse, delta, row * lse_n + head * lse_h, row * delta_n + head * delta_h, is_row)
    scale2 = scale * LOG2_E
    k += kv_head * k_h
    v += kv_head * v_h
    guest_k += kv_head * guest_k_h
    guest_v += kv_head * guest_v_h
    bias += kv_head * bias_h
    guest_bias += kv_head * guest_bias_h
    biases = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([ROWS, DIM_2], tl.float32)

    begin, end, full = partial_range(item)
    for i in range(begin * SUBS, end * SUBS):
        page = tl.load(part_page + i // SUBS)
        sub = i % SUBS * COLUMNS
        k_page, k_row = page_rows(k, guest_k, k_n, guest_k_n, page, own_pages, sub, BLOCK_K)
        v_page, v_row = page_rows(v, guest_v, v_n, guest_v_n, page, own_pages, sub, BLOCK_K)
        there = column < page_length(page, own_pages, own_rows, sub, BLOCK_K)
        keys = tl.load(k_page + column[:, None] * k_row + d, mask=there[:, None] & (d < DIM), other=0.0)
        values = tl.load(v_page + column[:, None] * v_row + dv, mask=there[:, None] & (dv < V_DIM), other=0.0)
        if BIAS:
            biases = key_biases(bias, guest_bias, bias_n, guest_bias_n, page, own_pages, sub, there, BLOCK_K, COLUMNS)
        allowed = mask_bits(masks, tl.load(part_mask + i // SUBS), token, sub, MASK_ROWS, BLOCK_Q, BLOCK_K, COLUMNS)
        acc = _query_step(
            queries, grads, row_lse, row_delta, keys, values, biases, allowed, acc, scale2, True, BIAS, PRECISION
        )

    run, page, left = first_full(item, full_first, full_count)
    for i in tl.range(0, full * SUBS, num_stages=STAGES):
        sub = i % SUBS * COLUMNS
        k_page, k_row = page_rows(k, guest_k, k_n, guest_k_n, page, own_pages, sub, BLOCK_K)
        v_page, v_row = page_rows(v, guest_v, v_n, guest_v_n, page, own_pages, sub, BLOCK_K)
        k_at = k_page + column[:, None] * k_row + d
        v_at = v_page + column[:, None] * v_row + dv
        there = column < BLOCK_K - sub
        if EVEN:
            keys = tl.load(k_at)
            values = tl.load(v_at)
        else:
            keys = tl.load(k_at, mask=there[:, None] & (d < DIM), other=0.0)
            values = tl.load(v_at, mask=there[:, None] & (dv < V_DIM), other=0.0)
        if BIAS:
            biases = key_biases(bias, guest_bias, bias_n, guest_bias_n, page, own_pages, sub, there, BLOCK_K, COLUMNS)
        acc = _query_step(
            queries, grads, row_lse, row_delta, keys, values, biases, there[None, :], acc, scale2, SHORT, BIAS,
            PRECISION,
        )  # fmt: skip
        run, page, left = next_full(full_first, full_count, run, page, left, (i % SUBS + 1) // SUBS)

    acc *= scale
    if slot < 0:
        dq_at = dq + (row * dq_n + head * dq_h)[:, None] + d
        tl.store(dq_at, tl.load(dq_at, mask=q_mask, other=0.0) + acc, mask=q_mask)
    else:
        at = (slot.to(tl.int64) * ALL_HEADS + head) * BLOCK_Q + token
        tl.store(slots + at[:, None] * DIM + d, acc, mask=q_mask)


@triton.jit
def _key_step(keys, values, biases, queries, grads, row_lse, row_delta, allowed, dk, dv, db, scale,
              MASKED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
    if BIAS:
        scores += biases[:, None]
    if MASKED:
        scores = tl.where(allowed, scores, float("-inf"))
    weights = tl.exp2(scores - row_lse[None, :])
    dv = tl.dot(weights.to(grads.dtype), grads, dv, input_precision=PRECISION)
    d_scores = weights * (tl.dot(values, tl.trans(grads), input_precision=PRECISION) - row_delta[None, :])
    if BIAS:
        db += tl.sum(d_scores, 1)
    return tl.dot(d_scores.to(queries.dtype), queries, dk, input_precision=PRECISION), dv, db


@triton.jit
def _load_rows(
    q, grad_out, lse, delta, tile, sub, head0, tokens, q_n, q_h, grad_n, grad_h, lse_n, lse_h, delta_n, delta_h,
    BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, HEADS: tl.constexpr, HEADS_2: tl.constexpr,
    DIM: tl.constexpr, DIM_2: tl.constexpr, V_DIM: tl.constexpr, V_DIM_2: tl.constexpr,
):  # fmt: skip
    """Queries, their output's gradients, LSE and delta of rows of a query tile, and the rows' tokens in the tile."""
    token, row, head, is_row = tile_rows(tile, sub, tokens, ROWS, TILE_ROWS, BLOCK_Q, HEADS, HEADS_2)
    head = (head0 + head).to(tl.int64)
    d = tl.arange(0, DIM_2)
    dv = tl.arange(0, V_DIM_2)
    queries = tl.load(q + (row * q_n + head * q_h)[:, None] + d, mask=is_row[:, None] & (d < DIM), other=0.0)
    grads = tl.load(
        grad_out + (row * grad_n + head * grad_h)[:, None] + dv, mask=is_row[:, None] & (dv < V_DIM), other=0.0
    )
    row_lse, row_delta = _row_values(lse, delta, row * lse_n + head * lse_h, row * delta_n + head * delta_h, is_row)
    return queries, grads, row_lse, row_delta, token


@triton.jit(do_not_specialize=["tokens", "own_rows", "own_pages", "pages", "most"])
def _grad_keys(
    q, grad_out, lse, delta, k, v, guest_k, guest_v, bias, guest_bias, dk, dv, guest_dk, guest_dv, db, guest_db,
    slot_dk, slot_dv, slot_db,
    items, item_ptr, units, full_first, full_count, part_tile, part_mask, masks,
    tokens, own_rows, own_pages, pages, most, scale,
    q_n, q_h, grad_n, grad_h, lse_n, lse_h, delta_n, delta_h,
    k_n, k_h, v_n, v_h, guest_k_n, guest_k_h, guest_v_n, guest_v_h, bias_n, bias_h, guest_bias_n, guest_bias_h,
    dk_n, dk_h, dv_n, dv_h, guest_dk_n, guest_dk_h, guest_dv_n, guest_dv_h, db_n, db_h, guest_db_n, guest_db_h,
    MASK_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
    SUBS: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, HEADS: tl.constexpr, HEADS_2: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ONE_TABLE: tl.constexpr, DIM: tl.constexpr,
    DIM_2: tl.constexpr, V_DIM: tl.constexpr, V_DIM_2: tl.constexpr, BIAS: tl.constexpr, MASKS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # SUBS programs beside each other share a page, COLUMNS rows each.
    item, unit, table, exists = find_item(tl.program_id(0) // SUBS, items, item_ptr, units, most, 1, ONE_TABLE)
    if not exists:
        return
    sub = tl.program_id(0) % SUBS * COLUMNS
    head0 = tl.load(unit + 1)
    kv_head = tl.load(unit + 2).to(tl.int64)
    rounds = tl.load(unit + 3) // HEADS
    page = tl.load(item) - table * pages
    slot = slot_of(item)
    d = tl.arange(0, DIM_2)
    e = tl.arange(0, V_DIM_2)
    column = tl.arange(0, COLUMNS)
    there = column < page_length(page, own_pages, own_rows, sub, BLOCK_K)
    k_mask = there[:, None] & (d < DIM)
    v_mask = there[:, None] & (e < V_DIM)
    k_page, k_row = page_rows(
        k + kv_head * k_h, guest_k + kv_head * guest_k_h, k_n, guest_k_n, page, own_pages, sub, BLOCK_K
    )
    v_page, v_row = page_rows(
        v + kv_head * v_h, guest_v + kv_head * guest_v_h, v_n, guest_v_n, page, own_pages, sub, BLOCK_K
    )
    keys = tl.load(k_page + column[:, None] * k_row + d, mask=k_mask, other=0.0)
    values = tl.load(v_page + column[:, None] * v_row + e, mask=v_mask, other=0.0)
    scale2 = scale * LOG2_E
    acc_k = tl.zeros([COLUMNS, DIM_2], tl.float32)
    acc_v = tl.zeros([COLUMNS, V_DIM_2], tl.float32)
    acc_b = tl.zeros([COLUMNS], tl.float32)
    biases = tl.zeros([COLUMNS], tl.float32)
    if BIAS:
        biases = key_biases(
            bias + kv_head * bias_h, guest_bias + kv_head * guest_bias_h, bias_n, guest_bias_n, page, own_pages, sub,
            there, BLOCK_K, COLUMNS,
        )  # fmt: skip
    PARTS: tl.constexpr = TILE_ROWS // ROWS  # of a query tile's rows
    TOGETHER: tl.constexpr = ROWS // TILE_ROWS  # query tiles

    begin, end, full = partial_range(item)
    if TOGETHER > 1:  # and they are listed one by one
        if not MASKS:
            begin = tl.load(item + 4)
            end = begin + full
        which = part_tile if MASKS else full_first
        mask_of = part_mask if MASKS else full_first
        for number in range(rounds):
            for first in tl.range(begin, end, TOGETHER, num_stages=STAGES):
                visit = first + tl.arange(0, ROWS) // TILE_ROWS
                # Behind the last one: a tile that has no token.
                tile = tl.load(which + visit, mask=visit < end, other=0)
                tile = tl.where(visit < end, tile, (tokens + BLOCK_Q - 1) // BLOCK_Q)
                queries, grads, row_lse, row_delta, token = _load_rows(
                    q, grad_out, lse, delta, tile, 0, head0 + number * HEADS, tokens, q_n, q_h, grad_n, grad_h, lse_n,
                    lse_h, delta_n, delta_h, BLOCK_Q, ROWS, TILE_ROWS, HEADS, HEADS_2, DIM, DIM_2, V_DIM, V_DIM_2,
                )  # fmt: skip
                allowed = None
                if MASKS:
                    mask = tl.load(mask_of + visit, mask=visit < end, other=0)
                    allowed = mask_bits_transposed(masks, mask, token, sub, MASK_ROWS, BLOCK_Q, BLOCK_K, COLUMNS)
                acc_k, acc_v, acc_b = _key_step(
                    keys, values, biases, queries, grads, row_lse, row_delta, allowed, acc_k, acc_v, acc_b, scale2,
                    MASKS, BIAS, PRECISION,
                )  # fmt: skip
    else:
        for number in range(rounds):
            head = head0 + number * HEADS
            for i in range(begin * PARTS, end * PARTS):
                tile = tl.load(part_tile + i // PARTS)
                queries, grads, row_lse, row_delta, token = _load_rows(
                    q, grad_out, lse, delta, tile, i % PARTS * ROWS, head, tokens, q_n, q_h, grad_n, grad_h, lse_n,
                    lse_h, delta_n, delta_h, BLOCK_Q, ROWS, TILE_ROWS, HEADS, HEADS_2, DIM, DIM_2, V_DIM, V_DIM_2,
                )  # fmt: skip
                mask = tl.load(part_mask + i // PARTS)
                allowed = mask_bits_transposed(masks, mask, token, sub, MASK_ROWS, BLOCK_Q, BLOCK_K, COLUMNS)
                acc_k, acc_v, acc_b = _key_step(
                    keys, values, biases, queries, grads, row_lse, row_delta, allowed, acc_k, acc_v, acc_b, scale2,
                    True, BIAS, PRECISION,
                )  # fmt: skip
            run, tile, left = first_full(item, full_first, full_count)
            for i in tl.range(0, full * PARTS, num_stages=STAGES):
                queries, grads, row_lse, row_delta, token = _load_rows(
                    q, grad_out, lse, delta, tile, i % PARTS * ROWS, head, tokens, q_n, q_h, grad_n, grad_h, lse_n,
                    lse_h, delta_n, delta_h, BLOCK_Q, ROWS, TILE_ROWS, HEADS, HEADS_2, DIM, DIM_2, V_DIM, V_DIM_2,
                )  # fmt: skip
                acc_k, acc_v, acc_b = _key_step(
                    keys, values, biases, queries, grads, row_lse, row_delta, None, acc_k, acc_v, acc_b, scale2, False,
                    BIAS, PRECISION,
                )  # fmt: skip
                moves = (i % PARTS + 1) // PARTS
                run, tile, left = next_full(full_first, full_count, run, tile, left, moves)

    acc_k *= scale
    if slot < 0:
        dk_page, dk_row = page_rows(
            dk + kv_head * dk_h, guest_dk + kv_head * guest_dk_h, dk_n, guest_dk_n, page, own_pages, sub, BLOCK_K
        )
        dv_page, dv_row = page_rows(
            dv + kv_head * dv_h, guest_dv + kv_head * guest_dv_h, dv_n, guest_dv_n, page, own_pages, sub, BLOCK_K
        )
        k_at = dk_page + column[:, None] * dk_row + d
        v_at = dv_page + column[:, None] * dv_row + e
        tl.store(k_at, tl.load(k_at, mask=k_mask, other=0.0) + acc_k, mask=k_mask)
        tl.store(v_at, tl.load(v_at, mask=v_mask, other=0.0) + acc_v, mask=v_mask)
        if BIAS:
            db_page, db_row = page_rows(
                db + kv_head * db_h, guest_db + kv_head * guest_db_h, db_n, guest_db_n, page, own_pages, sub, BLOCK_K
            )
            b_at = db_page + column * db_row
            tl.store(b_at, tl.load(b_at, mask=there, other=0.0) + acc_b, mask=there)
    else:
        at = (slot.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_K + sub + column
        tl.store(slot_dk + at[:, None] * DIM + d, acc_k, mask=k_mask)
        tl.store(slot_dv + at[:, None] * V_DIM + e, acc_v, mask=v_mask)
        if BIAS:
            tl.store(slot_db + at, acc_b, mask=there)


def backward(recording: Recording, table: AnyTable, scale: float, has_bias: bool) -> None:
    """As attention.attention_backward says.

    The recording is given q, own, guests, grad_out, lse, delta, dq, d_own, d_guests and, with ``has_bias``, bias and
    d_bias.
    """
    q, k, v, guest_k, guest_v, grad_out, lse, delta, dq, dk, dv, guest_dk, guest_dv, *more = recording.given
    device, dtype, (_, tokens, heads, dim), (kv_heads, v_dim) = q.device, q.dtype, q.shape, v.shape[2:]
    share = heads // kv_heads
    programs = programs_at_once(device)
    units, size, side_by_side = query_units(table.head_table, kv_heads, heads_together(table.block_q, dtype), device)
    by_query = query_work(table, device, programs)
    if by_query.most == 0:
        return
    by_key = key_work(table, device, programs, share)
    size_2 = triton.next_power_of_2(size)
    tile_rows = max(16, triton.next_power_of_2(table.block_q) * size_2)
    page_rows = max(16, triton.next_power_of_2(table.block_k))
    dim_2, v_dim_2 = (max(16, triton.next_power_of_2(n)) for n in (dim, v_dim))
    sizes = Sizes(tile_rows, page_rows, max(dim_2, v_dim_2))
    for_queries = configuration("queries", device, dtype, sizes)
    key_sizes = taken_together("keys", sizes) if table.names_pages else sizes
    for_keys = configuration("keys", device, dtype, key_sizes)
    shared = dict(
        MASK_ROWS=table.mask_rows, BLOCK_Q=table.block_q, BLOCK_K=table.block_k, HEADS=size, HEADS_2=size_2,
        BIAS=has_bias, PRECISION=precision(dtype), DIM=dim, DIM_2=dim_2, V_DIM=v_dim, V_DIM_2=v_dim_2,
    )  # fmt: skip
    slots = recording.temporary(by_query.slots, heads, table.block_q, dim)
    slot_dk = recording.temporary(by_key.slots, kv_heads, table.block_k, dim)
    slot_dv = recording.temporary(by_key.slots, kv_heads, table.block_k, v_dim)
    slot_db = recording.temporary(by_key.slots, kv_heads, table.block_k)
    # Any pointer will do where none is read.
    bias, guest_bias, db, guest_db = more or (lse,) * 4
    pages = (k, v, guest_k, guest_v, bias, guest_bias)
    of_queries = (q, grad_out, lse, delta, dq, *pages)
    of_keys = (q, grad_out, lse, delta, *pages, dk, dv, guest_dk, guest_dv, db, guest_db)
    for b in range(q.shape[0]):
        recording.launch(
            _grad_queries, (len(units) * by_query.most,), *(x.at(b) for x in of_queries), slots,
            by_query.items, by_query.item_ptr, units, *by_query.visits,
            tokens, k.shape[1], table.own_pages, table.tiles, by_query.most, scale,
            *strides_of(*of_queries), COLUMNS=for_queries.columns,
            ROWS=tile_rows, STAGES=for_queries.stages, num_warps=for_queries.warps,
            ALL_HEADS=heads, SIDE_BY_SIDE=side_by_side, ONE_TABLE=by_query.one_table, **shared,
        )  # fmt: skip
        add_query_slots(recording, dq, b, slots, table, by_query, units, size)
        for kv_units in key_units(table.head_table, kv_heads, device):
            subs = -(-table.block_k // for_keys.columns)
            recording.launch(
                _grad_keys, (len(kv_units) * by_key.most * subs,), *(x.at(b) for x in of_keys),
                slot_dk, slot_dv, slot_db,
                by_key.items, by_key.item_ptr, kv_units, *by_key.visits,
                tokens, k.shape[1], table.own_pages, table.pages, by_key.most, scale,
                *strides_of(*of_keys), COLUMNS=for_keys.columns,
                SUBS=subs, ROWS=for_keys.rows, TILE_ROWS=tile_rows, MASKS=table.has_masks, KV_HEADS=kv_heads,
                STAGES=for_keys.stages, num_warps=for_keys.warps, ONE_TABLE=by_key.one_table, **shared,
            )  # fmt: skip
            add_key_slots(recording, dk, guest_dk, b, slot_dk, table, by_key, kv_units)
            add_key_slots(recording, dv, guest_dv, b, slot_dv, table, by_key, kv_units)
            if has_bias:
                add_key_slots(recording, db, guest_db, b, slot_db, table, by_key, kv_units)

"""The backward tile kernels for Hopper GPUs, in Triton's Gluon dialect: one makes dK and dV, the other dQ.

Formulas are in attention.py. As in attention_triton_backward.py both compute the weights again, a program owns what it
adds to, and pieces of long rows are added up in order, so that the result does not depend on timing. One warp fetches
(see walk_hopper.py), two groups of four warps multiply 64 keys, or 64 queries, each.

With c = scale log2(e), weights are exp2(c (q.k - lse / scale)), and what they are multiplied with is g.v - delta. Both
products start from accumulators that hold -lse / scale and -delta instead of zeros, which saves two subtractions an
element and the registers that they need. Rows that attend to nothing hold -1e30: their weights are zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distattn.kernels.attention_triton import programs_at_once
from distattn.kernels.attention_triton_backward import add_key_slots, add_query_slots
from distattn.kernels.table import TileTable
from distattn.kernels.walk_hopper import (
    GROUP_ROWS,
    TILE,
    allowed_by,
    allowed_by_transposed,
    fetch_of_page,
    line_descriptor,
    mask_words,
    mask_words_transposed,
    product_layout,
    rows_descriptor,
)
from distattn.kernels.walk_triton import (
    find_item,
    first_full,
    item_of_round,
    next_full,
    page_length,
    page_rows,
    partial_range,
    slot_of,
)
from distattn.kernels.work import key_units, key_work, query_units, query_work

if TYPE_CHECKING:
    from distattn.kernels.attention import Pages

_LOG2_E = 1.4426950408889634
_LN_2 = gl.constexpr(0.6931471805599453)
_STEP = gl.constexpr(64)  # rows, or keys, that are fetched and multiplied at a time: half a tile
_ROW_STAGES = gl.constexpr(5)  # such steps on their way in the pass by key,
_KEY_STAGES = gl.constexpr(5)  # and in the pass by query


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


# The pass by key: dK and dV.


@gluon.jit
def _fetch_rows(q, grad, start_lse, start_delta, head, row, padded, q_h, grad_h, step, rows):
    q_buffers, grad_buffers, lse_buffers, delta_buffers, full, empty = rows
    stage = step % _ROW_STAGES
    mbarrier.wait(empty.index(stage), ((step // _ROW_STAGES) & 1) ^ 1)
    barrier = full.index(stage)
    mbarrier.expect(barrier, q.block_type.nbytes + grad.block_type.nbytes + 8 * _STEP)
    tma.async_copy_global_to_shared(q, [row, head * q_h], barrier, q_buffers.index(stage))
    tma.async_copy_global_to_shared(grad, [row, head * grad_h], barrier, grad_buffers.index(stage))
    tma.async_copy_global_to_shared(start_lse, [head * padded + row], barrier, lse_buffers.index(stage))
    tma.async_copy_global_to_shared(start_delta, [head * padded + row], barrier, delta_buffers.index(stage))


@gluon.jit
def _fetch_for_keys(
    q, grad, k, v, guest_k, guest_v, start_lse, start_delta,
    items, item_ptr, units, full_first, full_count, part_tile,
    own_pages, pages, most, padded, q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h, k_buffers, v_buffers, page_full, rows,
    ONE_TABLE: gl.constexpr,
):  # fmt: skip
    """The warp that fetches a page and the rows that visit it."""
    item, unit, table, exists = find_item(gl.program_id(0), items, item_ptr, units, most, 1, ONE_TABLE)
    if exists:
        head0 = gl.load(unit + 1)
        kv_head = gl.load(unit + 2)
        page = gl.load(item) - table * pages
        barrier = page_full.index(0)
        mbarrier.expect(barrier, 2 * (k.block_type.nbytes + v.block_type.nbytes))
        for group in gl.static_range(2):
            row = group * GROUP_ROWS
            fetch_of_page(k, guest_k, k_h, guest_k_h, page, own_pages, kv_head, row, barrier, k_buffers.index(group))
            fetch_of_page(v, guest_v, v_h, guest_v_h, page, own_pages, kv_head, row, barrier, v_buffers.index(group))
        begin, end, full = partial_range(item)
        step = 0
        for number in range(gl.load(unit + 3)):
            head = head0 + number
            tile = gl.load(part_tile + begin)  # there is one entry more than needed
            for i in range(begin, end):
                row = tile * TILE
                tile = gl.load(part_tile + i + 1)
                _fetch_rows(q, grad, start_lse, start_delta, head, row, padded, q_h, grad_h, step, rows)
                _fetch_rows(q, grad, start_lse, start_delta, head, row + _STEP, padded, q_h, grad_h, step + 1, rows)
                step += 2
            run, full_tile, left = first_full(item, full_first, full_count)
            for _ in range(full):
                row = full_tile * TILE
                run, full_tile, left = next_full(full_first, full_count, run, full_tile, left, 1)
                _fetch_rows(q, grad, start_lse, start_delta, head, row, padded, q_h, grad_h, step, rows)
                _fetch_rows(q, grad, start_lse, start_delta, head, row + _STEP, padded, q_h, grad_h, step + 1, rows)
                step += 2


@gluon.jit
def _key_step(
    key, value, rows, dk, dv, d_scores, step, scale, masks, mask, half, GROUP: gl.constexpr, MASKED: gl.constexpr,
    ACC: gl.constexpr,
):  # fmt: skip
    """Adds 64 rows: dV of these, dK of the rows before them, so that the matrix unit has work during exponentials."""
    q_buffers, grad_buffers, lse_buffers, delta_buffers, full, empty = rows
    SCORES: gl.constexpr = product_layout(_STEP)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    stage = step % _ROW_STAGES
    zero = gl.zeros([GROUP_ROWS, _STEP], gl.float32, SCORES)
    mbarrier.wait(full.index(stage), (step // _ROW_STAGES) & 1)
    start, _ = gl.broadcast(gl.expand_dims(lse_buffers.index(stage).load(BY_COLUMN), 0), zero)
    scores = warpgroup_mma(key, q_buffers.index(stage).permute((1, 0)), start, is_async=True)
    # The first step adds zeros here.
    dk = warpgroup_mma(d_scores, q_buffers.index(gl.maximum(step - 1, 0) % _ROW_STAGES), dk, is_async=True)
    start, _ = gl.broadcast(gl.expand_dims(delta_buffers.index(stage).load(BY_COLUMN), 0), zero)
    products = warpgroup_mma(value, grad_buffers.index(stage).permute((1, 0)), start, is_async=True)
    words = 0
    if MASKED:
        words = mask_words_transposed(masks, mask, half * _STEP, 2 * GROUP, _STEP)
    scores = warpgroup_mma_wait(2, deps=[scores])
    weights = gl.exp2(scores * scale)
    if MASKED:
        weights = gl.where(allowed_by_transposed(words, _STEP), weights, 0.0)
    operand = gl.convert_layout(weights.to(key.dtype), WEIGHTS)
    dk = warpgroup_mma_wait(1, deps=[dk])
    mbarrier.arrive(empty.index((step + _ROW_STAGES - 1) % _ROW_STAGES), count=1, pred=step > 0)
    dv = warpgroup_mma(operand, grad_buffers.index(stage), dv, is_async=True)
    products = warpgroup_mma_wait(1, deps=[products])
    d_scores = gl.convert_layout((weights * products).to(key.dtype), WEIGHTS)
    dv = warpgroup_mma_wait(0, deps=[dv])
    return dk, dv, d_scores


@gluon.jit
def _store(at, stride, rows, values, DIM: gl.constexpr, GROUP: gl.constexpr, ADD: gl.constexpr):
    """Writes values [64, DIM] to rows GROUP * 64 .. of what begins at ``at`` and has ``rows`` rows, or adds them."""
    ACC: gl.constexpr = product_layout(DIM)
    row = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, ACC))
    column = gl.arange(0, DIM, gl.SliceLayout(0, ACC))
    there = at + row.to(gl.int64)[:, None] * stride + column[None, :]
    exists = (row[:, None] < rows) & (column[None, :] < DIM)
    if ADD:
        values += gl.load(there, mask=exists, other=0.0)
    gl.store(there, values.to(at.dtype.element_ty), mask=exists)


@gluon.jit
def _put(at, values, DIM: gl.constexpr, GROUP: gl.constexpr):
    """Writes values [64, DIM] to rows GROUP * 64 .. of a slot."""
    ACC: gl.constexpr = product_layout(DIM)
    row = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, ACC))
    column = gl.arange(0, DIM, gl.SliceLayout(0, ACC))
    gl.store(at + row[:, None] * DIM + column[None, :], values)


@gluon.jit
def _multiply_for_keys(
    dk_pages, dv_pages, guest_dk, guest_dv, slot_dk, slot_dv, items, item_ptr, units, part_mask, masks,
    own_rows, own_pages, pages, most, scale_log2, k_buffers, v_buffers, page_full, rows,
    GROUP: gl.constexpr, ONE_TABLE: gl.constexpr, KV_HEADS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """A group of warps: keys GROUP * 64 .. of the page."""
    q_buffers, grad_buffers, lse_buffers, delta_buffers, row_full, row_empty = rows
    DIM: gl.constexpr = k_buffers.shape[2]
    V_DIM: gl.constexpr = v_buffers.shape[2]
    ACC: gl.constexpr = product_layout(DIM)
    V_ACC: gl.constexpr = product_layout(V_DIM)
    item, unit, table, exists = find_item(gl.program_id(0), items, item_ptr, units, most, 1, ONE_TABLE)
    if exists:
        kv_head = gl.load(unit + 2)
        page = gl.load(item) - table * pages
        slot = slot_of(item)
        begin, end, full = partial_range(item)
        key = k_buffers.index(GROUP)
        value = v_buffers.index(GROUP)
        dk = gl.zeros([GROUP_ROWS, DIM], gl.float32, ACC)
        dv = gl.zeros([GROUP_ROWS, V_DIM], gl.float32, V_ACC)
        d_scores = gl.zeros([GROUP_ROWS, _STEP], k_buffers.dtype, gl.DotOperandLayout(0, ACC, 2))
        mbarrier.wait(page_full.index(0), 0)
        step = 0
        for _ in range(gl.load(unit + 3)):
            for i in range(2 * begin, 2 * end):
                mask = gl.load(part_mask + i // 2)
                dk, dv, d_scores = _key_step(
                    key, value, rows, dk, dv, d_scores, step, scale_log2, masks, mask, i % 2, GROUP, True, ACC
                )
                step += 1
            for _i in range(2 * full):
                dk, dv, d_scores = _key_step(
                    key, value, rows, dk, dv, d_scores, step, scale_log2, masks, 0, 0, GROUP, False, ACC
                )
                step += 1
        dk = warpgroup_mma(d_scores, q_buffers.index((step - 1) % _ROW_STAGES), dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=[dk]) * (scale_log2 * _LN_2)
        if slot < 0:
            length = page_length(page, own_pages, own_rows, 0, TILE)
            at, _ = page_rows(dk_pages, guest_dk, KV_HEADS * DIM, KV_HEADS * DIM, page, own_pages, 0, TILE)
            _store(at + kv_head * DIM, KV_HEADS * DIM, length, dk, DIM, GROUP, ADD)
            at, _ = page_rows(dv_pages, guest_dv, KV_HEADS * V_DIM, KV_HEADS * V_DIM, page, own_pages, 0, TILE)
            _store(at + kv_head * V_DIM, KV_HEADS * V_DIM, length, dv, V_DIM, GROUP, ADD)
        else:
            first = (slot.to(gl.int64) * KV_HEADS + kv_head) * TILE
            _put(slot_dk + first * DIM, dk, DIM, GROUP)
            _put(slot_dv + first * V_DIM, dv, V_DIM, GROUP)


@gluon.jit(do_not_specialize=["own_rows", "own_pages", "pages", "most", "padded"])
def _grad_keys(
    q, grad, k, v, guest_k, guest_v, start_lse, start_delta, dk, dv, guest_dk, guest_dv, slot_dk, slot_dv,
    items, item_ptr, units, full_first, full_count, part_tile, part_mask, masks,
    own_rows, own_pages, pages, most, padded, scale_log2, q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h,
    ONE_TABLE: gl.constexpr, KV_HEADS: gl.constexpr, ADD: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    DIM: gl.constexpr = k.block_type.shape[1]
    V_DIM: gl.constexpr = v.block_type.shape[1]
    k_buffers = gl.allocate_shared_memory(k.dtype, [2, GROUP_ROWS, DIM], k.layout)
    v_buffers = gl.allocate_shared_memory(v.dtype, [2, GROUP_ROWS, V_DIM], v.layout)
    q_buffers = gl.allocate_shared_memory(q.dtype, [_ROW_STAGES, _STEP, DIM], q.layout)
    grad_buffers = gl.allocate_shared_memory(grad.dtype, [_ROW_STAGES, _STEP, V_DIM], grad.layout)
    lse_buffers = gl.allocate_shared_memory(gl.float32, [_ROW_STAGES, _STEP], start_lse.layout)
    delta_buffers = gl.allocate_shared_memory(gl.float32, [_ROW_STAGES, _STEP], start_delta.layout)
    page_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [_ROW_STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [_ROW_STAGES, 1], BARRIER)
    mbarrier.init(page_full.index(0), count=1)
    for i in gl.static_range(_ROW_STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    rows = (q_buffers, grad_buffers, lse_buffers, delta_buffers, full, empty)
    # The dialect wants these written in place.
    gl.warp_specialize(
        [
            (_multiply_for_keys, (
                dk, dv, guest_dk, guest_dv, slot_dk, slot_dv, items, item_ptr, units, part_mask, masks,
                own_rows, own_pages, pages, most, scale_log2, k_buffers, v_buffers, page_full, rows, 0, ONE_TABLE,
                KV_HEADS, ADD,
            )),
            (_multiply_for_keys, (
                dk, dv, guest_dk, guest_dv, slot_dk, slot_dv, items, item_ptr, units, part_mask, masks,
                own_rows, own_pages, pages, most, scale_log2, k_buffers, v_buffers, page_full, rows, 1, ONE_TABLE,
                KV_HEADS, ADD,
            )),
            (_fetch_for_keys, (
                q, grad, k, v, guest_k, guest_v, start_lse, start_delta, items, item_ptr, units, full_first, full_count,
                part_tile, own_pages, pages, most, padded, q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h,
                k_buffers, v_buffers, page_full, rows, ONE_TABLE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# The pass by query: dQ.


@gluon.jit
def _fetch_keys(k, v, guest_k, guest_v, page, own_pages, kv_head, k_h, v_h, guest_k_h, guest_v_h, step, keys):
    """Both halves of a page."""
    k_buffers, v_buffers, k_full, k_empty, v_full, v_empty = keys
    for half in gl.static_range(2):
        stage = (step + half) % _KEY_STAGES
        phase = (((step + half) // _KEY_STAGES) & 1) ^ 1
        barrier = k_full.index(stage)
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(barrier, k.block_type.nbytes)
        row = half * _STEP
        fetch_of_page(k, guest_k, k_h, guest_k_h, page, own_pages, kv_head, row, barrier, k_buffers.index(stage))
        barrier = v_full.index(stage)
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(barrier, v.block_type.nbytes)
        fetch_of_page(v, guest_v, v_h, guest_v_h, page, own_pages, kv_head, row, barrier, v_buffers.index(stage))


@gluon.jit
def _fetch_for_queries(
    q, grad, k, v, guest_k, guest_v, items, item_ptr, units, full_first, full_count, part_page,
    own_pages, tiles, most, numbers, q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h, queries, keys,
    SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr,
):  # fmt: skip
    """The warp that fetches query tiles, their output's gradients, and the pages that they visit."""
    q_buffers, grad_buffers, q_full, q_empty = queries
    step = 0
    turn = 0
    for first in range(0, numbers, gl.num_programs(0)):
        item, unit, table, exists = item_of_round(first, numbers, items, item_ptr, units, most, SIDE_BY_SIDE, ONE_TABLE)
        if exists:
            head = gl.load(unit + 1)
            kv_head = gl.load(unit + 2)
            row = (gl.load(item) - table * tiles) * TILE
            begin, end, full = partial_range(item)
            run, full_page, left = first_full(item, full_first, full_count)
            page = gl.load(part_page + begin)  # there is one entry more than needed
            barrier = q_full.index(0)
            mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
            mbarrier.expect(barrier, 2 * (q.block_type.nbytes + grad.block_type.nbytes))
            for group in gl.static_range(2):
                at = row + group * GROUP_ROWS
                tma.async_copy_global_to_shared(q, [at, head * q_h], barrier, q_buffers.index(group))
                tma.async_copy_global_to_shared(grad, [at, head * grad_h], barrier, grad_buffers.index(group))
            for i in range(begin, end):
                at = page
                page = gl.load(part_page + i + 1)
                _fetch_keys(k, v, guest_k, guest_v, at, own_pages, kv_head, k_h, v_h, guest_k_h, guest_v_h, step, keys)
                step += 2
            for _ in range(full):
                at = full_page
                run, full_page, left = next_full(full_first, full_count, run, full_page, left, 1)
                _fetch_keys(k, v, guest_k, guest_v, at, own_pages, kv_head, k_h, v_h, guest_k_h, guest_v_h, step, keys)
                step += 2
            turn += 1


@gluon.jit
def _query_step(
    query, grad, keys, dq, d_scores, start_lse, start_delta, step, scale, fresh, masks, mask, half,
    GROUP: gl.constexpr, MASKED: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Makes dS of 64 keys, while dQ takes in that of the keys before them, unless this is a tile's first step."""
    k_buffers, v_buffers, k_full, k_empty, v_full, v_empty = keys
    SCORES: gl.constexpr = product_layout(_STEP)
    stage = step % _KEY_STAGES
    before = gl.maximum(step - 1, 0) % _KEY_STAGES
    zero = gl.zeros([GROUP_ROWS, _STEP], gl.float32, SCORES)
    mbarrier.wait(k_full.index(stage), (step // _KEY_STAGES) & 1)
    start, _ = gl.broadcast(gl.expand_dims(start_lse, 1), zero)
    scores = warpgroup_mma(query, k_buffers.index(stage).permute((1, 0)), start, is_async=True)
    # A tile's first step adds zeros here.
    dq = warpgroup_mma(d_scores, k_buffers.index(gl.where(fresh != 0, stage, before)), dq, is_async=True)
    mbarrier.wait(v_full.index(stage), (step // _KEY_STAGES) & 1)
    start, _ = gl.broadcast(gl.expand_dims(start_delta, 1), zero)
    products = warpgroup_mma(grad, v_buffers.index(stage).permute((1, 0)), start, is_async=True)
    words = 0
    if MASKED:
        words = mask_words(masks, mask, GROUP * GROUP_ROWS, 2 * half, _STEP)
    scores = warpgroup_mma_wait(2, deps=[scores])
    weights = gl.exp2(scores * scale)
    if MASKED:
        weights = gl.where(allowed_by(words, _STEP), weights, 0.0)
    dq = warpgroup_mma_wait(1, deps=[dq])
    mbarrier.arrive(k_empty.index(before), count=1, pred=fresh == 0)
    products = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(v_empty.index(stage), count=1)
    d_scores = gl.convert_layout((weights * products).to(query.dtype), gl.DotOperandLayout(0, ACC, 2))
    return dq, d_scores


@gluon.jit
def _multiply_for_queries(
    dq_rows, slots, start_lse, start_delta, items, item_ptr, units, part_mask, masks,
    tokens, tiles, most, numbers, padded, scale_log2, dq_n, dq_h, queries, keys,
    GROUP: gl.constexpr, SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr, ALL_HEADS: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    """A group of warps: rows GROUP * 64 .. of each query tile."""
    q_buffers, grad_buffers, q_full, q_empty = queries
    k_buffers, v_buffers, k_full, k_empty, v_full, v_empty = keys
    DIM: gl.constexpr = k_buffers.shape[2]
    ACC: gl.constexpr = product_layout(DIM)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, product_layout(_STEP))
    query = q_buffers.index(GROUP)
    grad = grad_buffers.index(GROUP)
    step = 0
    turn = 0
    for first in range(0, numbers, gl.num_programs(0)):
        item, unit, table, exists = item_of_round(first, numbers, items, item_ptr, units, most, SIDE_BY_SIDE, ONE_TABLE)
        if exists:
            head = gl.load(unit + 1)
            tile = gl.load(item) - table * tiles
            slot = slot_of(item)
            begin, end, full = partial_range(item)
            row = tile * TILE + GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, BY_ROW)
            lines = head.to(gl.int64) * padded
            lse = gl.load(start_lse + lines + row)
            delta = gl.load(start_delta + lines + row)
            dq = gl.zeros([GROUP_ROWS, DIM], gl.float32, ACC)
            d_scores = gl.zeros([GROUP_ROWS, _STEP], q_buffers.dtype, gl.DotOperandLayout(0, ACC, 2))
            mbarrier.wait(q_full.index(0), turn & 1)
            fresh = 1
            for i in range(2 * begin, 2 * end):
                mask = gl.load(part_mask + i // 2)
                dq, d_scores = _query_step(
                    query, grad, keys, dq, d_scores, lse, delta, step, scale_log2, fresh, masks, mask, i % 2, GROUP,
                    True, ACC,
                )  # fmt: skip
                step += 1
                fresh = 0
            for _ in range(2 * full):
                dq, d_scores = _query_step(
                    query, grad, keys, dq, d_scores, lse, delta, step, scale_log2, fresh, masks, 0, 0, GROUP, False, ACC
                )
                step += 1
                fresh = 0
            last = (step - 1) % _KEY_STAGES
            dq = warpgroup_mma(d_scores, k_buffers.index(last), dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=[dq]) * (scale_log2 * _LN_2)
            mbarrier.arrive(k_empty.index(last), count=1)
            if slot >= 0:
                _put(slots + (slot.to(gl.int64) * ALL_HEADS + head) * TILE * DIM, dq, DIM, GROUP)
            elif ADD:
                at = dq_rows + (tile * TILE).to(gl.int64) * dq_n + head * dq_h
                _store(at, dq_n, tokens - tile * TILE, dq, DIM, GROUP, True)
            else:
                query.store(dq.to(q_buffers.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(dq_rows, [tile * TILE + GROUP * GROUP_ROWS, head * dq_h], query)
                tma.store_wait(0)
            mbarrier.arrive(q_empty.index(0), count=1)
            turn += 1


@gluon.jit(do_not_specialize=["tokens", "own_pages", "tiles", "most", "numbers", "padded"])
def _grad_queries(
    q, grad, k, v, guest_k, guest_v, start_lse, start_delta, dq, slots,
    items, item_ptr, units, full_first, full_count, part_page, part_mask, masks,
    tokens, own_pages, tiles, most, numbers, padded, scale_log2,
    q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h, dq_n, dq_h,
    SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr, ALL_HEADS: gl.constexpr, ADD: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """ADD: dq is a pointer to float32 that is added to, and not a descriptor."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    DIM: gl.constexpr = k.block_type.shape[1]
    V_DIM: gl.constexpr = v.block_type.shape[1]
    q_buffers = gl.allocate_shared_memory(q.dtype, [2, GROUP_ROWS, DIM], q.layout)
    grad_buffers = gl.allocate_shared_memory(grad.dtype, [2, GROUP_ROWS, V_DIM], grad.layout)
    k_buffers = gl.allocate_shared_memory(k.dtype, [_KEY_STAGES, _STEP, DIM], k.layout)
    v_buffers = gl.allocate_shared_memory(v.dtype, [_KEY_STAGES, _STEP, V_DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [_KEY_STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [_KEY_STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [_KEY_STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [_KEY_STAGES, 1], BARRIER)
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_empty.index(0), count=2)
    for i in gl.static_range(_KEY_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    queries = (q_buffers, grad_buffers, q_full, q_empty)
    keys = (k_buffers, v_buffers, k_full, k_empty, v_full, v_empty)
    # The dialect wants these written in place.
    gl.warp_specialize(
        [
            (_multiply_for_queries, (
                dq, slots, start_lse, start_delta, items, item_ptr, units, part_mask, masks, tokens, tiles,
                most, numbers, padded, scale_log2, dq_n, dq_h, queries, keys, 0, SIDE_BY_SIDE, ONE_TABLE, ALL_HEADS,
                ADD,
            )),
            (_multiply_for_queries, (
                dq, slots, start_lse, start_delta, items, item_ptr, units, part_mask, masks, tokens, tiles,
                most, numbers, padded, scale_log2, dq_n, dq_h, queries, keys, 1, SIDE_BY_SIDE, ONE_TABLE, ALL_HEADS,
                ADD,
            )),
            (_fetch_for_queries, (
                q, grad, k, v, guest_k, guest_v, items, item_ptr, units, full_first, full_count, part_page,
                own_pages, tiles, most, numbers, q_h, grad_h, k_h, v_h, guest_k_h, guest_v_h, queries, keys,
                SIDE_BY_SIDE, ONE_TABLE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def backward(
    q: Tensor,
    own: Pages,
    guests: Pages,
    table: TileTable,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    d_own: Pages,
    d_guests: Pages,
    scale: float,
) -> None:
    device, (tokens, heads, dim) = q.device, q.shape[1:]
    kv_heads, v_dim = own.v.shape[2:]
    programs = programs_at_once(device)
    units, _, side_by_side = query_units(table, kv_heads, pack=False, device=device)
    by_query = query_work(table, device, programs)
    if by_query.most == 0:
        return
    by_key = key_work(table, device, programs, heads // kv_heads)
    if not guests.k.shape[1]:  # a descriptor of nothing is not to be had
        guests, d_guests = own, d_own
    padded = table.tiles * table.block_q
    start_lse, start_delta = q.new_empty((2, heads, padded), dtype=torch.float32)
    lines = [line_descriptor(x, 64) for x in (start_lse, start_delta)]
    slots = q.new_empty((by_query.slots, heads, table.block_q, dim), dtype=torch.float32)
    slot_dk = q.new_empty((by_key.slots, kv_heads, table.block_k, dim), dtype=torch.float32)
    slot_dv = q.new_empty((by_key.slots, kv_heads, table.block_k, v_dim), dtype=torch.float32)
    numbers = len(units) * by_query.most
    add_queries, add_keys = dq.dtype == torch.float32, d_own.k.dtype == torch.float32
    rounds = key_units(table, kv_heads, device)
    for b in range(q.shape[0]):
        _start_values[(-(-padded // 1024), heads)](
            lse[b], delta[b], start_lse, start_delta, tokens, padded, scale, *lse.stride()[1:], *delta.stride()[1:],
            ROWS=1024,
        )  # fmt: skip
        inputs = (q, grad_out, *own, *guests)
        heads_apart = [x.stride(2) for x in inputs]
        rows = [rows_descriptor(x[b], 64) for x in inputs]
        _grad_queries[(min(numbers, programs),)](
            *rows, start_lse, start_delta, dq[b] if add_queries else rows_descriptor(dq[b], 64), slots,
            by_query.items, by_query.item_ptr, units, *by_query.visits,
            tokens, table.own_pages, table.tiles, by_query.most, numbers, padded, scale * _LOG2_E, *heads_apart,
            *dq.stride()[1:3], SIDE_BY_SIDE=side_by_side, ONE_TABLE=table.tables == 1, ALL_HEADS=heads,
            ADD=add_queries, num_warps=4,
        )  # fmt: skip
        add_query_slots(dq[b], slots, table, by_query, units, 1)
        grads = [x[b] for x in (*d_own, *d_guests)]
        assert all(x.is_contiguous() for x in grads), "the pass by key takes no strides, for want of shared memory"
        for kv_units in rounds:
            _grad_keys[(len(kv_units) * by_key.most,)](
                *rows, *lines, *grads, slot_dk, slot_dv, by_key.items, by_key.item_ptr, kv_units, *by_key.visits,
                own.k.shape[1], table.own_pages, table.pages, by_key.most, padded, scale * _LOG2_E, *heads_apart,
                ONE_TABLE=table.tables == 1, KV_HEADS=kv_heads, ADD=add_keys, num_warps=4,
            )  # fmt: skip
            add_key_slots(d_own, d_guests, b, slot_dk, slot_dv, table, by_key, kv_units)

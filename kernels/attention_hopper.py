"""The forward tile kernel for Hopper GPUs, in Triton's Gluon dialect.

The same online softmax as in attention_triton.py, on a few programs for each multiprocessor, each of which goes
through items of work. One warp fetches (see walk_hopper.py); two groups of four warps multiply 64 query rows each, so
that one computes exponentials while the other has the matrix unit (Shah et al., "FlashAttention-3", 2024, section 3.1).
They take no turns: held to an order by barriers they were 1 to 3 % slower. Within a group, the product with V of one
page is issued after the product with K of the next (section 3.2).
"""

from __future__ import annotations

import torch
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
from distattn.kernels.launching import Recording
from distattn.kernels.slots_triton import merge_slots
from distattn.kernels.table import TileTable
from distattn.kernels.walk_hopper import (
    GROUP_ROWS,
    TILE,
    fetch_of_page,
    mask_words,
    masked_by,
    packed,
    product_layout,
    rows_of,
    unpacked,
)
from distattn.kernels.walk_triton import (
    LN_2,
    LOG2_E,
    LOWEST,
    first_full,
    item_of_round,
    next_full,
    partial_range,
    slot_of,
)
from distattn.kernels.work import query_units, query_work, waves_of

STAGES = gl.constexpr(2)  # pages of K, and of V, on their way
QUERY_BUFFERS = gl.constexpr(2)  # query tiles


@gluon.jit
def _fetch_page(k, v, guest_k, guest_v, page, own_pages, kv_head, k_h, v_h, guest_k_h, guest_v_h, visit, keys, values):
    k_buffers, k_full, k_empty = keys
    v_buffers, v_full, v_empty = values
    stage = visit % STAGES
    phase = ((visit // STAGES) & 1) ^ 1
    barrier = k_full.index(stage)
    mbarrier.wait(k_empty.index(stage), phase)
    mbarrier.expect(barrier, k.block_type.nbytes)
    fetch_of_page(k, guest_k, k_h, guest_k_h, page, own_pages, kv_head, 0, barrier, k_buffers.index(stage))
    barrier = v_full.index(stage)
    mbarrier.wait(v_empty.index(stage), phase)
    mbarrier.expect(barrier, v.block_type.nbytes)
    fetch_of_page(v, guest_v, v_h, guest_v_h, page, own_pages, kv_head, 0, barrier, v_buffers.index(stage))


@gluon.jit
def _fetch(
    q, k, v, guest_k, guest_v, items, item_ptr, units, full_first, full_count, part_page,
    own_pages, tiles, most, numbers, q_h, k_h, v_h, guest_k_h, guest_v_h, queries, keys, values,
    SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr,
):  # fmt: skip
    """The warp that fetches query tiles and the pages that they visit."""
    q_buffers, q_full, q_empty = queries
    visit = 0
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
            buffer = turn % QUERY_BUFFERS
            barrier = q_full.index(buffer)
            mbarrier.wait(q_empty.index(buffer), ((turn // QUERY_BUFFERS) & 1) ^ 1)
            mbarrier.expect(barrier, 2 * q.block_type.nbytes)
            for group in gl.static_range(2):
                at = row + group * GROUP_ROWS
                tma.async_copy_global_to_shared(q, [at, head * q_h], barrier, q_buffers.index(buffer * 2 + group))
            for i in range(begin, end):
                at = page
                page = gl.load(part_page + i + 1)
                _fetch_page(
                    k, v, guest_k, guest_v, at, own_pages, kv_head, k_h, v_h, guest_k_h, guest_v_h, visit, keys, values
                )  # fmt: skip
                visit += 1
            for _ in range(full):
                at = full_page
                run, full_page, left = next_full(full_first, full_count, run, full_page, left, 1)
                _fetch_page(
                    k, v, guest_k, guest_v, at, own_pages, kv_head, k_h, v_h, guest_k_h, guest_v_h, visit, keys, values
                )  # fmt: skip
                visit += 1
            turn += 1


@gluon.jit
def multiply_keys(query, keys, visit, COLUMNS: gl.constexpr):
    """Issues query x keys of a visit once its page is there."""
    k_buffers, k_full, k_empty = keys
    stage = visit % k_full.shape[0]
    zero = gl.zeros([GROUP_ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
    mbarrier.wait(k_full.index(stage), (visit // k_full.shape[0]) & 1)
    return warpgroup_mma(query, k_buffers.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def weights_of(scores, words, line, high, scale, MASKED: gl.constexpr, LINED: gl.constexpr, COLUMNS: gl.constexpr):
    """exp2(scale scores + line - new maximum), and the new maximum; line [columns] is 0 unless LINED."""
    if MASKED:
        scores = masked_by(words, scores, "0xff800000", COLUMNS)
    if LINED:
        scores = scores * scale + line[None, :]
        new_high = gl.maximum(high, gl.max(scores, 1))
        weights = gl.exp2(scores - new_high[:, None])
    else:
        new_high = gl.maximum(high, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - new_high[:, None])
    return weights, new_high


@gluon.jit
def sums_of(weights):
    """[64, 4]: the sum of each row, left as the sums of the four threads that share it; added up once an item."""
    by_thread = gl.reshape(weights, [weights.shape[0], weights.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(by_thread, 3), 1)


@gluon.jit
def step(
    query, keys, values, lines, weights, high, total, acc, visit, masks, mask, scale,
    GROUP: gl.constexpr, MASKED: gl.constexpr, LINED: gl.constexpr, COLUMNS: gl.constexpr, V_DIM: gl.constexpr,
):  # fmt: skip
    """Adds a visit: its scores, while the one before it is multiplied with its weights.

    MASKED: by a mask of a row for each query. LINED: with what the visit's line has for each column.
    """
    k_buffers, k_full, k_empty = keys
    v_buffers, v_full, v_empty = values
    ACC: gl.constexpr = product_layout(V_DIM)
    before = (visit - 1) % v_full.shape[0]
    stage = visit % k_full.shape[0]
    operand = unpacked(weights, v_buffers.dtype, ACC)
    scores = multiply_keys(query, keys, visit, COLUMNS)
    mbarrier.wait(v_full.index(before), ((visit - 1) // v_full.shape[0]) & 1)
    acc = warpgroup_mma(operand, v_buffers.index(before), acc, is_async=True)
    words = 0
    if MASKED:  # loaded here, it delays no product
        words = mask_words(masks, mask, GROUP * GROUP_ROWS, 0, COLUMNS)
    line = 0
    if LINED:
        line = lines.index(stage).load(gl.SliceLayout(0, product_layout(COLUMNS)))
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    new_weights, new_high = weights_of(scores, words, line, high, scale, MASKED, LINED, COLUMNS)
    fade = gl.exp2(high - new_high)
    sums = sums_of(new_weights)
    total = total * gl.convert_layout(fade, gl.SliceLayout(1, sums.type.layout))[:, None] + sums
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    weights = packed(new_weights, v_buffers.dtype)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, ACC))[:, None]
    return weights, new_high, total, acc


@gluon.jit
def store_part(slot_out, slot_lse, at, acc, factor, row_lse):
    """A part of a row that was cut, to rows ``at`` .. of the slots; row_lse in base 2."""
    SCORES: gl.constexpr = row_lse.type.layout
    ACC: gl.constexpr = acc.type.layout
    V_DIM: gl.constexpr = acc.shape[1]
    gl.store(slot_lse + at + gl.arange(0, GROUP_ROWS, SCORES), row_lse * LN_2)
    row = at + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, ACC)).to(gl.int64)
    column = gl.arange(0, V_DIM, gl.SliceLayout(0, ACC))
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, ACC))[:, None]
    gl.store(slot_out + row[:, None] * V_DIM + column[None, :], acc)


@gluon.jit
def rows_before(
    before, lse, first_row, tokens, before_n, lse_n, V_DIM: gl.constexpr, SCORES: gl.constexpr, ACC: gl.constexpr
):  # fmt: skip
    """lse [64], in base 2, and before [64, V_DIM] of one head's rows, as earlier launches have left them.

    It is apart from :func:`store_rows_continued` so that these loads can be issued early.
    """
    row = first_row + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, SCORES))
    acc_row = (first_row + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, ACC))).to(gl.int64)
    column = gl.arange(0, V_DIM, gl.SliceLayout(0, ACC))
    old_lse = gl.load(lse + row.to(gl.int64) * lse_n, mask=row < tokens, other=float("-inf")) * LOG2_E
    there = (acc_row < tokens)[:, None] & (column < V_DIM)[None, :]
    return old_lse, gl.load(before + acc_row[:, None] * before_n + column[None, :], mask=there, other=0.0)


@gluon.jit
def store_rows_continued(
    out, lse, first_row, tokens, out_n, lse_n, acc, factor, row_lse, old_lse, old, RESUME: gl.constexpr
):  # fmt: skip
    """64 rows of one head: earlier launches have a part in them (RESUME), or later ones will."""
    SCORES: gl.constexpr = row_lse.type.layout
    BY_ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    row = first_row + gl.arange(0, GROUP_ROWS, SCORES)
    acc_row = (first_row + gl.arange(0, GROUP_ROWS, BY_ROW)).to(gl.int64)
    column = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    if RESUME:
        both = gl.maximum(gl.maximum(row_lse, old_lse), LOWEST)
        share = gl.exp2(old_lse - both)
        whole = share + gl.exp2(row_lse - both)
        factor *= gl.exp2(row_lse - both) / gl.where(whole == 0.0, 1.0, whole)
        share = share / gl.where(whole == 0.0, 1.0, whole)
        row_lse = both + gl.log2(whole)
        acc = acc * gl.convert_layout(factor, BY_ROW)[:, None]
        acc += old * gl.convert_layout(share, BY_ROW)[:, None]
    else:
        acc = acc * gl.convert_layout(factor, BY_ROW)[:, None]
    there = (acc_row < tokens)[:, None] & (column < acc.shape[1])[None, :]
    gl.store(out + acc_row[:, None] * out_n + column[None, :], acc.to(out.dtype.element_ty), mask=there)
    gl.store(lse + row.to(gl.int64) * lse_n, row_lse * LN_2, mask=row < tokens)


@gluon.jit
def _multiply(
    out, lse, before, slot_out, slot_lse, items, item_ptr, units, part_mask, masks,
    tokens, tiles, most, numbers, scale, out_n, out_h, lse_n, lse_h, before_n, before_h, queries, keys, values,
    GROUP: gl.constexpr, SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr, ALL_HEADS: gl.constexpr,
    MASKS: gl.constexpr, CONTINUED: gl.constexpr, RESUME: gl.constexpr,
):  # fmt: skip
    """A group of warps: rows GROUP * 64 .. of each query tile."""
    q_buffers, q_full, q_empty = queries
    k_buffers, k_full, k_empty = keys
    v_buffers, v_full, v_empty = values
    dtype: gl.constexpr = q_buffers.dtype
    COLUMNS: gl.constexpr = k_buffers.shape[1]
    V_DIM: gl.constexpr = v_buffers.shape[2]
    SCORES: gl.constexpr = product_layout(COLUMNS)
    ACC: gl.constexpr = product_layout(V_DIM)
    visit = 0
    turn = 0
    for first in range(0, numbers, gl.num_programs(0)):
        item, unit, table, exists = item_of_round(first, numbers, items, item_ptr, units, most, SIDE_BY_SIDE, ONE_TABLE)
        if exists:
            head = gl.load(unit + 1)
            tile = gl.load(item) - table * tiles
            slot = slot_of(item)
            begin, end, full = partial_range(item)
            # The first page: nothing is multiplied beside it.
            if MASKS:  # fetched early, and whether this item needs it or not
                first_mask = gl.load(part_mask + begin)
                mask = gl.load(part_mask + begin + 1)
            buffer = turn % QUERY_BUFFERS
            query = q_buffers.index(buffer * 2 + GROUP)
            mbarrier.wait(q_full.index(buffer), (turn // QUERY_BUFFERS) & 1)
            scores = multiply_keys(query, keys, visit, COLUMNS)
            if MASKS:
                words = mask_words(masks, first_mask, GROUP * GROUP_ROWS, 0, COLUMNS)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(visit % STAGES), count=1)
            if MASKS:
                if begin < end:
                    scores = masked_by(words, scores, "0xff800000", COLUMNS)
            lowest = gl.full([GROUP_ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
            fresh, high = weights_of(scores, 0, 0, lowest, scale, False, False, COLUMNS)
            total = sums_of(fresh)
            weights = packed(fresh, dtype)
            acc = gl.zeros([GROUP_ROWS, V_DIM], gl.float32, ACC)
            visit += 1
            full -= (begin >= end).to(gl.int32)
            if MASKS:
                for i in range(begin + 1, end):
                    this_mask = mask
                    mask = gl.load(part_mask + i + 1)
                    weights, high, total, acc = step(
                        query, keys, values, 0, weights, high, total, acc, visit, masks, this_mask, scale,
                        GROUP, True, False, COLUMNS, V_DIM,
                    )  # fmt: skip
                    visit += 1
            for _ in range(full):
                weights, high, total, acc = step(
                    query, keys, values, 0, weights, high, total, acc, visit, masks, 0, scale,
                    GROUP, False, False, COLUMNS, V_DIM,
                )  # fmt: skip
                visit += 1
            last = (visit - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((visit - 1) // STAGES) & 1)
            acc = warpgroup_mma(unpacked(weights, dtype, ACC), v_buffers.index(last), acc, is_async=True)
            row_total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SCORES))
            row_lse = high + gl.log2(row_total)
            factor = gl.where(row_total == 0.0, 0.0, 1.0 / row_total)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(last), count=1)
            if slot >= 0:
                at = (slot.to(gl.int64) * ALL_HEADS + head) * TILE + GROUP * GROUP_ROWS
                store_part(slot_out, slot_lse, at, acc, factor, row_lse)
            elif CONTINUED:
                out_rows = out + head * out_h
                lse_rows = lse + head * lse_h
                row = tile * TILE + GROUP * GROUP_ROWS
                old_lse = 0.0
                old = 0.0
                if RESUME:
                    old_rows = before + head * before_h
                    old_lse, old = rows_before(old_rows, lse_rows, row, tokens, before_n, lse_n, V_DIM, SCORES, ACC)
                store_rows_continued(
                    out_rows, lse_rows, row, tokens, out_n, lse_n, acc, factor, row_lse, old_lse, old, RESUME
                )  # fmt: skip
            else:
                row = tile * TILE + GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, SCORES))
                acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, ACC))[:, None]
                query.store(acc.to(dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(out, [tile * TILE + GROUP * GROUP_ROWS, head * out_h], query)
                tma.store_wait(0)
                gl.store(lse + row.to(gl.int64) * lse_n + head * lse_h, row_lse * LN_2, mask=row < tokens)
            mbarrier.arrive(q_empty.index(buffer), count=1)
            turn += 1


@gluon.jit(do_not_specialize=["tokens", "own_pages", "tiles", "most", "numbers"])
def _forward(
    q, k, v, guest_k, guest_v, out, lse, before, slot_out, slot_lse,
    items, item_ptr, units, full_first, full_count, part_page, part_mask, masks,
    tokens, own_pages, tiles, most, numbers, scale,
    q_h, k_h, v_h, guest_k_h, guest_v_h, out_n, out_h, lse_n, lse_h, before_n, before_h,
    SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr, ALL_HEADS: gl.constexpr, MASKS: gl.constexpr,
    CONTINUED: gl.constexpr, RESUME: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """MASKS: some page is PARTIAL. CONTINUED: other launches have a part in out, which is a pointer and not a
    descriptor."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    DIM: gl.constexpr = q.block_type.shape[1]
    V_DIM: gl.constexpr = v.block_type.shape[1]
    q_buffers = gl.allocate_shared_memory(q.dtype, [2 * QUERY_BUFFERS, GROUP_ROWS, DIM], q.layout)
    k_buffers = gl.allocate_shared_memory(k.dtype, [STAGES, TILE, DIM], k.layout)
    v_buffers = gl.allocate_shared_memory(v.dtype, [STAGES, TILE, V_DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [QUERY_BUFFERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERY_BUFFERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(QUERY_BUFFERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    queries = (q_buffers, q_full, q_empty)
    keys = (k_buffers, k_full, k_empty)
    values = (v_buffers, v_full, v_empty)
    # The dialect wants these written in place.
    gl.warp_specialize(
        [
            (_multiply, (
                out, lse, before, slot_out, slot_lse, items, item_ptr, units, part_mask, masks, tokens, tiles, most,
                numbers, scale, out_n, out_h, lse_n, lse_h, before_n, before_h, queries, keys, values, 0, SIDE_BY_SIDE,
                ONE_TABLE, ALL_HEADS, MASKS, CONTINUED, RESUME,
            )),
            (_multiply, (
                out, lse, before, slot_out, slot_lse, items, item_ptr, units, part_mask, masks, tokens, tiles, most,
                numbers, scale, out_n, out_h, lse_n, lse_h, before_n, before_h, queries, keys, values, 1, SIDE_BY_SIDE,
                ONE_TABLE, ALL_HEADS, MASKS, CONTINUED, RESUME,
            )),
            (_fetch, (
                q, k, v, guest_k, guest_v, items, item_ptr, units, full_first, full_count, part_page,
                own_pages, tiles, most, numbers, q_h, k_h, v_h, guest_k_h, guest_v_h, queries, keys, values,
                SIDE_BY_SIDE, ONE_TABLE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def forward(recording: Recording, table: TileTable, scale: float, resume: bool) -> None:
    """As attention.attention_forward says; the recording is given q, own, guests, out, lse, before (or out)."""
    q, *pages, out, lse, before = recording.given
    device, (tokens, heads), (kv_heads, v_dim) = q.device, q.shape[1:3], pages[1].shape[2:]
    programs = programs_at_once(device)
    work = query_work(table, device, programs)
    if work.most == 0:
        return
    units, _, side_by_side = query_units(table.head_table, kv_heads, 1, device)
    slot_out = recording.temporary(work.slots, heads, table.block_q, v_dim)
    slot_lse = recording.temporary(work.slots, heads, table.block_q)
    numbers = len(units) * work.most
    continued = resume or out.dtype == torch.float32
    if not pages[2].shape[1]:
        pages[2:] = pages[:2]  # a descriptor of nothing is not to be had
    heads_apart = [x.strides[2] for x in (q, *pages)]
    visits = work.visits
    for b in range(q.shape[0]):
        recording.launch(
            _forward, (waves_of(work, numbers, programs),),
            rows_of(q, b, 64), *(rows_of(x, b, 128) for x in pages),
            out.at(b) if continued else rows_of(out, b, 64), lse.at(b), before.at(b), slot_out, slot_lse,
            work.items, work.item_ptr, units, visits.full_first, visits.full_count, visits.part_other,
            visits.part_mask, visits.masks, tokens, table.own_pages, table.tiles, work.most, numbers,
            scale * LOG2_E.value, *heads_apart, *out.strides[1:3], *lse.strides[1:], *before.strides[1:3],
            SIDE_BY_SIDE=side_by_side, ONE_TABLE=work.one_table, ALL_HEADS=heads, MASKS=len(table.part_page) > 0,
            CONTINUED=continued, RESUME=resume, num_warps=4,
        )  # fmt: skip
        merge_slots(recording, out, lse, before if resume else None, b, slot_out, slot_lse, table, work, units, 1)

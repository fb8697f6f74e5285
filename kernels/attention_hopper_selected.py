"""The forward tile kernel for Hopper GPUs where tiles were chosen on the device, in Triton's Gluon dialect.

It is built like attention_hopper.py, whose arithmetic it shares, with two differences. A query tile has 64 tokens, so
that each of the two groups of warps that multiply has a head of its own, of two that read the same keys. And pages are
short: those of a visit fill 128 columns side by side. In shared memory columns 0 .. 63 of all rows come before columns
64 .. 127 (128 bytes of a row are what the swizzle of the matrix unit's operands covers), so a page is fetched in
panels of 64 columns, each to where its rows are in the whole.

Beside a visit's keys goes a line of 128 numbers that are added to the scores: the bias of each key, or -inf for one
that the mask, which has one row for all of a tile, leaves out, and for what is beyond the last page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from distattn.kernels.attention_hopper import (
    QUERY_BUFFERS,
    STAGES,
    multiply_keys,
    step,
    store_part,
    store_rows_continued,
    sums_of,
    weights_of,
)
from distattn.kernels.attention_triton import programs_at_once
from distattn.kernels.launching import Recording
from distattn.kernels.slots_triton import merge_slots
from distattn.kernels.walk_hopper import (
    GROUP_ROWS,
    TILE,
    packed,
    product_layout,
    rows_of,
    shared_layout,
    unpacked,
)
from distattn.kernels.walk_triton import LOG2_E, LOWEST, item_of_round, page_length, page_rows, partial_range, slot_of
from distattn.kernels.work import grid_size, query_units, query_work

if TYPE_CHECKING:
    from distattn.kernels.selected import SelectedTable

_PANEL = gl.constexpr(64)
"""Columns of 16 bits that a row has in 128 bytes."""
HEADS = 2
"""Heads of a query tile."""


@gluon.constexpr_function
def _line_layout():
    """Of what one warp makes for 128 columns."""
    return gl.BlockedLayout([4], [32], [1], [0])


@gluon.jit
def _visits(item, MASKS: gl.constexpr):
    """Where an item's pages begin and end."""
    begin, end, full = partial_range(item)
    if not MASKS:
        begin = gl.load(item + 4)
        end = begin + full
    return begin, end


@gluon.jit
def _fetch_pages(own, guests, pages, first, end, own_pages, own_at, guest_at, stage, barrier, buffers):
    """Fetches the pages of a visit, panel by panel; beyond the last page the last one again, which the line masks."""
    PAGE: gl.constexpr = own.block_type.shape[0]
    PAGES: gl.constexpr = TILE // PAGE
    PANELS: gl.constexpr = buffers.shape[0] // STAGES // PAGES
    mbarrier.expect(barrier, PANELS * PAGES * own.block_type.nbytes)
    for j in gl.static_range(PAGES):
        page = gl.load(pages + gl.minimum(first + j, end - 1))
        for panel in gl.static_range(PANELS):
            buffer = buffers.index((stage * PANELS + panel) * PAGES + j)
            if page < own_pages:
                tma.async_copy_global_to_shared(own, [page * PAGE, own_at + panel * _PANEL], barrier, buffer)
            else:
                row = (page - own_pages) * PAGE
                tma.async_copy_global_to_shared(guests, [row, guest_at + panel * _PANEL], barrier, buffer)


@gluon.jit
def _line(
    pages, mask_of, masks, bias, guest_bias, first, end, own_pages, own_rows, bias_n, guest_bias_n,
    PAGE: gl.constexpr, MASKS: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """float32 [128], in base 2: what is added to the scores of a visit's columns."""
    column = gl.arange(0, TILE, _line_layout())
    visit = first + column // PAGE
    sub = column % PAGE
    there = visit < end
    page = gl.load(pages + visit, mask=there, other=0)
    line = gl.zeros([TILE], gl.float32, _line_layout())
    if BIAS:
        exists = there & (sub < page_length(page, own_pages, own_rows, 0, PAGE))
        at, _ = page_rows(bias, guest_bias, bias_n, guest_bias_n, page, own_pages, sub, PAGE)
        line += gl.load(at, mask=exists, other=0.0) * LOG2_E
    if MASKS:
        mask = gl.load(mask_of + visit, mask=there, other=0).to(gl.int64)
        words = gl.load(masks + mask * (PAGE // 32) + sub // 32, mask=there, other=0)
        there = there & (((words >> (sub % 32)) & 1) != 0)
    return gl.where(there, line, float("-inf"))


@gluon.jit
def _fetch(
    q, k, v, guest_k, guest_v, bias, guest_bias, items, item_ptr, units, pages, mask_of, masks, own_rows, own_pages,
    tiles, most, numbers, q_h, k_h, v_h, guest_k_h, guest_v_h, bias_n, bias_h, guest_bias_n, guest_bias_h,
    queries, keys, values, lines,
    SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr, MASKS: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """The warp that fetches query tiles and what they visit."""
    q_buffers, q_full, q_empty = queries
    k_pages, k_full, k_empty = keys
    v_pages, v_full, v_empty = values
    PAGE: gl.constexpr = k.block_type.shape[0]
    visit = 0
    turn = 0
    for first in range(0, numbers, gl.num_programs(0)):
        item, unit, table, exists = item_of_round(first, numbers, items, item_ptr, units, most, SIDE_BY_SIDE, ONE_TABLE)
        if exists:
            head = gl.load(unit + 1)
            kv_head = gl.load(unit + 2)
            row = (gl.load(item) - table * tiles) * GROUP_ROWS
            begin, end = _visits(item, MASKS)
            buffer = turn % QUERY_BUFFERS
            barrier = q_full.index(buffer)
            mbarrier.wait(q_empty.index(buffer), ((turn // QUERY_BUFFERS) & 1) ^ 1)
            mbarrier.expect(barrier, 2 * q.block_type.nbytes)
            for group in gl.static_range(2):
                at = (head + group) * q_h
                tma.async_copy_global_to_shared(q, [row, at], barrier, q_buffers.index(buffer * 2 + group))
            for i in range(begin, end, TILE // PAGE):
                stage = visit % STAGES
                phase = ((visit // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                _fetch_pages(
                    k, guest_k, pages, i, end, own_pages, kv_head * k_h, kv_head * guest_k_h, stage,
                    k_full.index(stage), k_pages,
                )  # fmt: skip
                line = _line(
                    pages, mask_of, masks, bias + kv_head * bias_h, guest_bias + kv_head * guest_bias_h, i, end,
                    own_pages, own_rows, bias_n, guest_bias_n, PAGE, MASKS, BIAS,
                )  # fmt: skip
                lines.index(stage).store(line)
                mbarrier.arrive(k_full.index(stage), count=1)
                mbarrier.wait(v_empty.index(stage), phase)
                _fetch_pages(
                    v, guest_v, pages, i, end, own_pages, kv_head * v_h, kv_head * guest_v_h, stage,
                    v_full.index(stage), v_pages,
                )  # fmt: skip
                visit += 1
            turn += 1


@gluon.jit
def _multiply(
    out, lse, slot_out, slot_lse, items, item_ptr, units, tokens, tiles, most, numbers, scale,
    out_n, out_h, lse_n, lse_h, queries, keys, values, lines,
    GROUP: gl.constexpr, SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr, ALL_HEADS: gl.constexpr,
    PAGE: gl.constexpr, MASKS: gl.constexpr, RESUME: gl.constexpr,
):  # fmt: skip
    """A group of warps: head GROUP of each query tile's two."""
    q_buffers, q_full, q_empty = queries
    k_buffers, k_full, k_empty = keys
    v_buffers, v_full, v_empty = values
    dtype: gl.constexpr = q_buffers.dtype
    V_DIM: gl.constexpr = v_buffers.shape[2]
    SCORES: gl.constexpr = product_layout(TILE)
    ACC: gl.constexpr = product_layout(V_DIM)
    visit = 0
    turn = 0
    for first in range(0, numbers, gl.num_programs(0)):
        item, unit, table, exists = item_of_round(first, numbers, items, item_ptr, units, most, SIDE_BY_SIDE, ONE_TABLE)
        if exists:
            head = gl.load(unit + 1) + GROUP
            tile = gl.load(item) - table * tiles
            slot = slot_of(item)
            begin, end = _visits(item, MASKS)
            # The first visit: nothing is multiplied beside it.
            buffer = turn % QUERY_BUFFERS
            query = q_buffers.index(buffer * 2 + GROUP)
            mbarrier.wait(q_full.index(buffer), (turn // QUERY_BUFFERS) & 1)
            scores = multiply_keys(query, keys, visit, TILE)
            line = lines.index(visit % STAGES).load(gl.SliceLayout(0, SCORES))
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(visit % STAGES), count=1)
            lowest = gl.full([GROUP_ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
            fresh, high = weights_of(scores, 0, line, lowest, scale, False, True, TILE)
            total = sums_of(fresh)
            weights = packed(fresh, dtype)
            acc = gl.zeros([GROUP_ROWS, V_DIM], gl.float32, ACC)
            visit += 1
            for _ in range(begin + TILE // PAGE, end, TILE // PAGE):
                weights, high, total, acc = step(
                    query, keys, values, lines, weights, high, total, acc, visit, 0, 0, scale,
                    GROUP, False, True, TILE, V_DIM,
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
                at = (slot.to(gl.int64) * ALL_HEADS + head) * GROUP_ROWS
                store_part(slot_out, slot_lse, at, acc, factor, row_lse)
            else:
                store_rows_continued(
                    out + head * out_h, lse + head * lse_h, tile * GROUP_ROWS, tokens, out_n, lse_n, acc, factor,
                    row_lse, RESUME,
                )  # fmt: skip
            mbarrier.arrive(q_empty.index(buffer), count=1)
            turn += 1


@gluon.jit(do_not_specialize=["tokens", "own_rows", "own_pages", "tiles", "most", "numbers"])
def _forward(
    q, k, v, guest_k, guest_v, bias, guest_bias, out, lse, slot_out, slot_lse, items, item_ptr, units, pages, mask_of,
    masks, tokens, own_rows, own_pages, tiles, most, numbers, scale, q_h, k_h, v_h, guest_k_h, guest_v_h,
    bias_n, bias_h, guest_bias_n, guest_bias_h, out_n, out_h, lse_n, lse_h,
    K_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr, V_DIM: gl.constexpr, SIDE_BY_SIDE: gl.constexpr,
    ONE_TABLE: gl.constexpr, ALL_HEADS: gl.constexpr, MASKS: gl.constexpr, BIAS: gl.constexpr, RESUME: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """The layouts are those of a whole visit's keys and values, of which descriptors fetch panels."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DIM: gl.constexpr = q.block_type.shape[1]
    PAGE: gl.constexpr = k.block_type.shape[0]
    PAGES: gl.constexpr = TILE // PAGE
    q_buffers = gl.allocate_shared_memory(q.dtype, [2 * QUERY_BUFFERS, GROUP_ROWS, DIM], q.layout)
    k_pages = gl.allocate_shared_memory(k.dtype, [STAGES * (DIM // _PANEL) * PAGES, PAGE, _PANEL], k.layout)
    v_pages = gl.allocate_shared_memory(v.dtype, [STAGES * (V_DIM // _PANEL) * PAGES, PAGE, _PANEL], v.layout)
    lines = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], LINE)
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
        mbarrier.init(k_full.index(i), count=2)  # the bytes, and the line beside them
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    queries = (q_buffers, q_full, q_empty)
    keys = (k_pages._reinterpret(k.dtype, [STAGES, TILE, DIM], K_LAYOUT), k_full, k_empty)
    values = (v_pages._reinterpret(v.dtype, [STAGES, TILE, V_DIM], V_LAYOUT), v_full, v_empty)
    # The dialect wants these written in place.
    gl.warp_specialize(
        [
            (_multiply, (
                out, lse, slot_out, slot_lse, items, item_ptr, units, tokens, tiles, most, numbers, scale,
                out_n, out_h, lse_n, lse_h, queries, keys, values, lines, 0, SIDE_BY_SIDE, ONE_TABLE, ALL_HEADS,
                PAGE, MASKS, RESUME,
            )),
            (_multiply, (
                out, lse, slot_out, slot_lse, items, item_ptr, units, tokens, tiles, most, numbers, scale,
                out_n, out_h, lse_n, lse_h, queries, keys, values, lines, 1, SIDE_BY_SIDE, ONE_TABLE, ALL_HEADS,
                PAGE, MASKS, RESUME,
            )),
            (_fetch, (
                q, k, v, guest_k, guest_v, bias, guest_bias, items, item_ptr, units, pages, mask_of, masks, own_rows,
                own_pages, tiles, most, numbers, q_h, k_h, v_h, guest_k_h, guest_v_h, bias_n, bias_h, guest_bias_n,
                guest_bias_h, queries, (k_pages, k_full, k_empty), (v_pages, v_full, v_empty), lines,
                SIDE_BY_SIDE, ONE_TABLE, MASKS, BIAS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def forward(recording: Recording, table: SelectedTable, scale: float, resume: bool, has_bias: bool) -> None:
    """As attention.attention_forward says; ``choose`` there says of what.

    The recording is given q, own, guests, out, lse and, with ``has_bias``, bias.
    """
    q, k, v, guest_k, guest_v, out, lse, *bias = recording.given
    device, (tokens, heads), (kv_heads, v_dim) = q.device, q.shape[1:3], v.shape[2:]
    programs = programs_at_once(device)
    work = query_work(table, device, programs)
    if work.most == 0:
        return
    units, size, side_by_side = query_units(table.head_table, kv_heads, HEADS, device)
    assert size == HEADS and table.block_q == 64
    slot_out = recording.temporary(work.slots, heads, table.block_q, v_dim)
    slot_lse = recording.temporary(work.slots, heads, table.block_q)
    numbers = len(units) * work.most
    # A descriptor of nothing is not to be had.
    there = [k, v, guest_k, guest_v] if guest_k.shape[1] else [k, v, k, v]
    biases = bias or (lse, lse)  # any pointer will do where none is read
    dim = q.shape[3]
    visits, rows = work.visits, table.block_k
    pages = visits.part_other if table.has_masks else visits.full_first
    for b in range(q.shape[0]):
        recording.launch(
            _forward, (grid_size(numbers, programs),),
            rows_of(q, b, 64), *(rows_of(x, b, rows, 64) for x in there), *(x.at(b) for x in biases),
            out.at(b), lse.at(b), slot_out, slot_lse, work.items, work.item_ptr, units, pages, visits.part_mask,
            visits.masks, tokens, k.shape[1], table.own_pages, table.tiles, work.most, numbers,
            scale * LOG2_E.value, *(x.strides[2] for x in (q, *there)),
            *(n for x in (*biases, out, lse) for n in x.strides[1:3]),
            K_LAYOUT=shared_layout((128, dim), q.dtype), V_LAYOUT=shared_layout((128, v_dim), q.dtype),
            V_DIM=v_dim, SIDE_BY_SIDE=side_by_side, ONE_TABLE=work.one_table, ALL_HEADS=heads,
            MASKS=table.has_masks, BIAS=has_bias, RESUME=resume, num_warps=4,
        )  # fmt: skip
        merge_slots(recording, out, lse, b, slot_out, slot_lse, table, work, units, size, resume)

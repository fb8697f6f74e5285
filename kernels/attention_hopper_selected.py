"""The forward tile kernel for Hopper GPUs where tiles were chosen on the device, in Triton's Gluon dialect.

It is built like attention_hopper.py, whose arithmetic it shares, with these differences. A query tile has 64 tokens, so
that each of the two groups of warps that multiply has a head of its own, of two that read the same keys. And pages are
short: those of a visit fill 128 columns side by side. In shared memory columns 0 .. 63 of all rows come before columns
64 .. 127 (128 bytes of a row are what the swizzle of the matrix unit's operands covers), so a page is fetched in
panels of 64 columns, each to where its rows are in the whole.

Beside a visit's keys goes a line of 128 numbers that are added to the scores: the bias of each key, or -inf for one
that the mask, which has one row for all of a tile, leaves out, and for what is before the first page. Without masks and
a bias only the first visit of an item has columns to leave out, and there are no lines.

Where a page is and what its mask and its bias are, chains of loads tell, as well as what an item is. So three warps
fetch: one keys, one values, one what lines are made of, and each loads ahead. The first of them also reads what the
items are, and notes it beside the query tile for all others.
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
    rows_before,
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
from distattn.kernels.work import query_units, query_work, waves_of

if TYPE_CHECKING:
    from distattn.kernels.selected import SelectedTable

_PANEL = gl.constexpr(64)
"""Columns of 16 bits that a row has in 128 bytes."""
_VALUE_STAGES = gl.constexpr(3)
"""Visits whose values are on their way: they are waited for later than keys, and kept longer."""
_NOTE = gl.constexpr(6)
"""Numbers that tell of an item: query tile, first head, key/value head, slot or -1, where pages begin and end."""
HEADS = 2
"""Heads of a query tile."""


@gluon.constexpr_function
def _line_layout():
    """Of what one warp makes for 128 columns, seen as four words of 32 bits: a lane has bits of one word."""
    return gl.BlockedLayout([1, 4], [4, 8], [1, 1], [1, 0])


@gluon.constexpr_function
def _note_layout(warps):
    """Of one number that all threads have."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def _write_note(notes, buffer, numbers):
    """Notes an item, for :func:`_noted` by others once they have waited for its query tile."""
    for n in gl.static_range(_NOTE):
        notes.index(buffer * _NOTE + n).store(gl.full([1], numbers[n], gl.int32, _note_layout(1)))


@gluon.jit
def _noted(notes, buffer, N: gl.constexpr, WARPS: gl.constexpr):
    """Number N of what is noted, see _NOTE."""
    return gl.max(notes.index(buffer * _NOTE + N).load(_note_layout(WARPS)), 0)


@gluon.jit
def _note_of_turn(queries, notes, turn):
    """What one of the warps that fetch needs of an item: key/value head, where pages begin and end."""
    q_buffers, q_full, q_empty = queries
    buffer = turn % QUERY_BUFFERS
    mbarrier.wait(q_full.index(buffer), (turn // QUERY_BUFFERS) & 1)
    kv_head = _noted(notes, buffer, 2, 1)
    begin = _noted(notes, buffer, 4, 1)
    end = _noted(notes, buffer, 5, 1)
    mbarrier.arrive(q_empty.index(buffer), count=1)
    return kv_head, begin, end


@gluon.jit
def _first_visit(begin, end, PAGES: gl.constexpr):
    """Where the pages of an item's first visit begin: before ``begin``, if they do not fill all visits.

    The first and not the last, since it is multiplied by itself: no other visit has to leave out pages.
    """
    return end - (end - begin + PAGES - 1) // PAGES * PAGES


@gluon.jit
def _page_numbers(pages, first, begin, end, PAGES: gl.constexpr):
    """Four numbers, of which the first PAGES are the pages of a visit, and in range whatever ``first`` is."""
    last = end - 1
    page0 = gl.load(pages + gl.maximum(gl.minimum(first, last), begin))
    page1 = page0
    page2 = page0
    page3 = page0
    if PAGES > 1:
        page1 = gl.load(pages + gl.maximum(gl.minimum(first + 1, last), begin))
    if PAGES > 2:
        page2 = gl.load(pages + gl.maximum(gl.minimum(first + 2, last), begin))
        page3 = gl.load(pages + gl.maximum(gl.minimum(first + 3, last), begin))
    return page0, page1, page2, page3


@gluon.jit
def _fetch_visits(own, guests, pages, begin, end, own_pages, own_at, guest_at, visit, buffers, full, empty):
    """Fetches the pages of an item, visit by visit and panel by panel; returns the number of the next visit.

    Numbers of pages are loaded a visit ahead. For pages before the first one that is fetched again, and masked.
    """
    PAGE: gl.constexpr = own.block_type.shape[0]
    PAGES: gl.constexpr = TILE // PAGE
    DEPTH: gl.constexpr = full.shape[0]
    PANELS: gl.constexpr = buffers.shape[0] // DEPTH // PAGES
    start = _first_visit(begin, end, PAGES)
    page0, page1, page2, page3 = _page_numbers(pages, start, begin, end, PAGES)
    for i in range(start, end, PAGES):
        stage = visit % DEPTH
        barrier = full.index(stage)
        mbarrier.wait(empty.index(stage), ((visit // DEPTH) & 1) ^ 1)
        mbarrier.expect(barrier, PANELS * PAGES * own.block_type.nbytes)
        for j in gl.static_range(PAGES):
            page = (page0, page1, page2, page3)[j]
            for panel in gl.static_range(PANELS):
                buffer = buffers.index((stage * PANELS + panel) * PAGES + j)
                if page < own_pages:
                    tma.async_copy_global_to_shared(own, [page * PAGE, own_at + panel * _PANEL], barrier, buffer)
                else:
                    row = (page - own_pages) * PAGE
                    tma.async_copy_global_to_shared(guests, [row, guest_at + panel * _PANEL], barrier, buffer)
        # Behind the fetches: the wait for these numbers goes by while the next buffer is not free anyway.
        page0, page1, page2, page3 = _page_numbers(pages, i + PAGES, begin, end, PAGES)
        visit += 1
    return visit


@gluon.jit
def _fetch_keys(
    q, k, guest_k, items, item_ptr, units, pages, own_pages, tiles, most, numbers, q_h, k_h, guest_k_h,
    queries, notes, keys, SIDE_BY_SIDE: gl.constexpr, ONE_TABLE: gl.constexpr, MASKS: gl.constexpr,
):  # fmt: skip
    """The warp that fetches query tiles and keys, and notes for the others what the items are."""
    q_buffers, q_full, q_empty = queries
    k_pages, k_full, k_empty = keys
    visit = 0
    turn = 0
    for first in range(0, numbers, gl.num_programs(0)):
        item, unit, table, exists = item_of_round(first, numbers, items, item_ptr, units, most, SIDE_BY_SIDE, ONE_TABLE)
        head = gl.load(unit + 1)
        kv_head = gl.load(unit + 2)
        tile = gl.load(item) - table * tiles
        slot = slot_of(item)
        begin, end, full = partial_range(item)
        if not MASKS:
            begin = gl.load(item + 4)
            end = begin + full
        # One that does not exist has no visits, and its query tile is whatever there is.
        begin = gl.where(exists, begin, 0)
        end = gl.where(exists, end, 0)
        buffer = turn % QUERY_BUFFERS
        barrier = q_full.index(buffer)
        mbarrier.wait(q_empty.index(buffer), ((turn // QUERY_BUFFERS) & 1) ^ 1)
        mbarrier.expect(barrier, 2 * q.block_type.nbytes)
        for group in gl.static_range(2):
            at = [tile * GROUP_ROWS, (head + group) * q_h]
            tma.async_copy_global_to_shared(q, at, barrier, q_buffers.index(buffer * 2 + group))
        _write_note(notes, buffer, (tile, head, kv_head, slot, begin, end))
        mbarrier.arrive(barrier, count=1)
        visit = _fetch_visits(
            k, guest_k, pages, begin, end, own_pages, kv_head * k_h, kv_head * guest_k_h, visit, k_pages, k_full,
            k_empty,
        )  # fmt: skip
        turn += 1


@gluon.jit
def _fetch_values(v, guest_v, pages, own_pages, numbers, v_h, guest_v_h, queries, notes, values):
    """The warp that fetches values. It is another than that of keys, so that neither waits for the other's buffers."""
    v_pages, v_full, v_empty = values
    visit = 0
    turn = 0
    for _ in range(0, numbers, gl.num_programs(0)):
        kv_head, begin, end = _note_of_turn(queries, notes, turn)
        visit = _fetch_visits(
            v, guest_v, pages, begin, end, own_pages, kv_head * v_h, kv_head * guest_v_h, visit, v_pages, v_full,
            v_empty,
        )  # fmt: skip
        turn += 1


@gluon.jit
def _named(pages, mask_of, first, begin, end, PAGE: gl.constexpr, MASKS: gl.constexpr):
    """int32 [4] twice: the page and the mask of each word of a visit."""
    entry = first + gl.arange(0, TILE // 32, gl.SliceLayout(1, _line_layout())) // (PAGE // 32)
    there = (entry >= begin) & (entry < end)
    page = gl.load(pages + entry, mask=there, other=0)
    mask = page
    if MASKS:
        mask = gl.load(mask_of + entry, mask=there, other=0)
    return page, mask


@gluon.jit
def _told(
    page, mask, masks, bias, guest_bias, first, begin, end, own_pages, own_rows, bias_n, guest_bias_n,
    PAGE: gl.constexpr, MASKS: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """int32 [4] and float32 [4, 32]: the words of a visit, none of whose bits are set where no page is, and biases."""
    LAYOUT: gl.constexpr = _line_layout()
    word = gl.arange(0, TILE // 32, gl.SliceLayout(1, LAYOUT))
    entry = first + word // (PAGE // 32)
    there = (entry >= begin) & (entry < end)
    if MASKS:
        at = masks + mask.to(gl.int64) * (PAGE // 32) + word % (PAGE // 32)
        words = gl.load(at, mask=there, other=0)
    else:
        words = gl.where(there, -1, 0)
    if BIAS:
        sub = (word % (PAGE // 32) * 32)[:, None] + gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))[None, :]
        here = gl.expand_dims(page, 1)
        at, _ = page_rows(bias, guest_bias, bias_n, guest_bias_n, here, own_pages, sub, PAGE)
        exists = there[:, None] & (sub < page_length(here, own_pages, own_rows, 0, PAGE))
        biases = gl.load(at, mask=exists, other=0.0)
    else:
        biases = gl.zeros([TILE // 32, 32], gl.float32, LAYOUT)
    return words, biases


@gluon.jit
def _make_lines(
    bias, guest_bias, pages, mask_of, masks, own_rows, own_pages, numbers, bias_n, bias_h, guest_bias_n, guest_bias_h,
    queries, notes, keys, lines, PAGE: gl.constexpr, MASKS: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """The warp that makes lines. It loads pages and masks two visits ahead, and what these tell one visit."""
    PAGES: gl.constexpr = TILE // PAGE
    DEPTH: gl.constexpr = lines.shape[0]
    k_pages, k_full, k_empty = keys
    if MASKS or BIAS:
        bit = gl.arange(0, 32, gl.SliceLayout(0, _line_layout()))
        visit = 0
        turn = 0
        for _ in range(0, numbers, gl.num_programs(0)):
            kv_head, begin, end = _note_of_turn(queries, notes, turn)
            own_bias = bias + kv_head * bias_h
            other_bias = guest_bias + kv_head * guest_bias_h
            start = _first_visit(begin, end, PAGES)
            page, mask = _named(pages, mask_of, start, begin, end, PAGE, MASKS)
            next_page, next_mask = _named(pages, mask_of, start + PAGES, begin, end, PAGE, MASKS)
            words, biases = _told(
                page, mask, masks, own_bias, other_bias, start, begin, end, own_pages, own_rows, bias_n, guest_bias_n,
                PAGE, MASKS, BIAS,
            )  # fmt: skip
            for i in range(start, end, PAGES):
                stage = visit % DEPTH
                mbarrier.wait(k_empty.index(stage), ((visit // DEPTH) & 1) ^ 1)
                there = ((words[:, None] >> bit[None, :]) & 1) != 0
                line = gl.where(there, biases * LOG2_E, float("-inf"))
                lines.index(stage).store(gl.reshape(line, [TILE]))
                mbarrier.arrive(k_full.index(stage), count=1)
                words, biases = _told(
                    next_page, next_mask, masks, own_bias, other_bias, i + PAGES, begin, end, own_pages, own_rows,
                    bias_n, guest_bias_n, PAGE, MASKS, BIAS,
                )  # fmt: skip
                next_page, next_mask = _named(pages, mask_of, i + 2 * PAGES, begin, end, PAGE, MASKS)
                visit += 1
            turn += 1


@gluon.jit
def _multiply(
    out, lse, before, slot_out, slot_lse, tokens, numbers, scale, out_n, out_h, lse_n, lse_h, before_n, before_h,
    queries, notes, keys, values, lines,
    GROUP: gl.constexpr, ALL_HEADS: gl.constexpr, PAGE: gl.constexpr, LINED: gl.constexpr, RESUME: gl.constexpr,
):  # fmt: skip
    """A group of warps: head GROUP of each query tile's two."""
    q_buffers, q_full, q_empty = queries
    k_buffers, k_full, k_empty = keys
    v_buffers, v_full, v_empty = values
    dtype: gl.constexpr = q_buffers.dtype
    V_DIM: gl.constexpr = v_buffers.shape[2]
    SCORES: gl.constexpr = product_layout(TILE)
    ACC: gl.constexpr = product_layout(V_DIM)
    PAGES: gl.constexpr = TILE // PAGE
    visit = 0
    turn = 0
    for _ in range(0, numbers, gl.num_programs(0)):
        buffer = turn % QUERY_BUFFERS
        mbarrier.wait(q_full.index(buffer), (turn // QUERY_BUFFERS) & 1)
        begin = _noted(notes, buffer, 4, 4)
        end = _noted(notes, buffer, 5, 4)
        if begin < end:
            tile = _noted(notes, buffer, 0, 4)
            head = _noted(notes, buffer, 1, 4) + GROUP
            slot = _noted(notes, buffer, 3, 4)
            start = _first_visit(begin, end, PAGES)
            # The first visit: nothing is multiplied beside it.
            query = q_buffers.index(buffer * 2 + GROUP)
            scores = multiply_keys(query, keys, visit, TILE)
            if LINED:
                line = lines.index(visit % lines.shape[0]).load(gl.SliceLayout(0, SCORES))
            else:
                column = gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
                line = gl.where(column < (begin - start) * PAGE, float("-inf"), 0.0)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(visit % k_empty.shape[0]), count=1)
            lowest = gl.full([GROUP_ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
            fresh, high = weights_of(scores, 0, line, lowest, scale, False, True, TILE)
            total = sums_of(fresh)
            weights = packed(fresh, dtype)
            acc = gl.zeros([GROUP_ROWS, V_DIM], gl.float32, ACC)
            visit += 1
            for _ in range(start + PAGES, end, PAGES):
                weights, high, total, acc = step(
                    query, keys, values, lines, weights, high, total, acc, visit, 0, 0, scale,
                    GROUP, False, LINED, TILE, V_DIM,
                )  # fmt: skip
                visit += 1
            last = (visit - 1) % v_full.shape[0]
            mbarrier.wait(v_full.index(last), ((visit - 1) // v_full.shape[0]) & 1)
            acc = warpgroup_mma(unpacked(weights, dtype, ACC), v_buffers.index(last), acc, is_async=True)
            out_rows = out + head * out_h
            lse_rows = lse + head * lse_h
            old_lse = 0.0
            old = 0.0
            if RESUME:  # loaded beside the last product
                rows = gl.where(slot < 0, tokens, 0)
                old_lse, old = rows_before(
                    before + head * before_h, lse_rows, tile * GROUP_ROWS, rows, before_n, lse_n, V_DIM, SCORES, ACC
                )  # fmt: skip
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
                    out_rows, lse_rows, tile * GROUP_ROWS, tokens, out_n, lse_n, acc, factor, row_lse, old_lse, old,
                    RESUME,
                )  # fmt: skip
        mbarrier.arrive(q_empty.index(buffer), count=1)
        turn += 1


@gluon.jit(do_not_specialize=["tokens", "own_rows", "own_pages", "tiles", "most", "numbers"])
def _forward(
    q, k, v, guest_k, guest_v, bias, guest_bias, out, lse, before, slot_out, slot_lse, items, item_ptr, units, pages,
    mask_of, masks, tokens, own_rows, own_pages, tiles, most, numbers, scale, q_h, k_h, v_h, guest_k_h, guest_v_h,
    bias_n, bias_h, guest_bias_n, guest_bias_h, out_n, out_h, lse_n, lse_h, before_n, before_h,
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
    LINED: gl.constexpr = MASKS or BIAS
    q_buffers = gl.allocate_shared_memory(q.dtype, [2 * QUERY_BUFFERS, GROUP_ROWS, DIM], q.layout)
    k_pages = gl.allocate_shared_memory(k.dtype, [STAGES * (DIM // _PANEL) * PAGES, PAGE, _PANEL], k.layout)
    v_pages = gl.allocate_shared_memory(v.dtype, [_VALUE_STAGES * (V_DIM // _PANEL) * PAGES, PAGE, _PANEL], v.layout)
    lines = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], LINE)
    notes = gl.allocate_shared_memory(gl.int32, [QUERY_BUFFERS * _NOTE, 1], LINE)
    q_full = gl.allocate_shared_memory(gl.int64, [QUERY_BUFFERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERY_BUFFERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [_VALUE_STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [_VALUE_STAGES, 1], BARRIER)
    for i in gl.static_range(QUERY_BUFFERS):
        mbarrier.init(q_full.index(i), count=2)  # the bytes, and the note beside them
        mbarrier.init(q_empty.index(i), count=4 if LINED else 3)  # all but the warp that fetches keys read the note
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=2 if LINED else 1)  # the bytes, and the line beside them
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(_VALUE_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    queries = (q_buffers, q_full, q_empty)
    keys = (k_pages._reinterpret(k.dtype, [STAGES, TILE, DIM], K_LAYOUT), k_full, k_empty)
    values = (v_pages._reinterpret(v.dtype, [_VALUE_STAGES, TILE, V_DIM], V_LAYOUT), v_full, v_empty)
    # The dialect wants these written in place.
    gl.warp_specialize(
        [
            (_multiply, (
                out, lse, before, slot_out, slot_lse, tokens, numbers, scale, out_n, out_h, lse_n, lse_h, before_n,
                before_h, queries, notes, keys, values, lines, 0, ALL_HEADS, PAGE, LINED, RESUME,
            )),
            (_multiply, (
                out, lse, before, slot_out, slot_lse, tokens, numbers, scale, out_n, out_h, lse_n, lse_h, before_n,
                before_h, queries, notes, keys, values, lines, 1, ALL_HEADS, PAGE, LINED, RESUME,
            )),
            (_fetch_keys, (
                q, k, guest_k, items, item_ptr, units, pages, own_pages, tiles, most, numbers, q_h, k_h, guest_k_h,
                queries, notes, (k_pages, k_full, k_empty), SIDE_BY_SIDE, ONE_TABLE, MASKS,
            )),
            (_fetch_values, (
                v, guest_v, pages, own_pages, numbers, v_h, guest_v_h, queries, notes, (v_pages, v_full, v_empty),
            )),
            (_make_lines, (
                bias, guest_bias, pages, mask_of, masks, own_rows, own_pages, numbers, bias_n, bias_h, guest_bias_n,
                guest_bias_h, queries, notes, keys, lines, PAGE, MASKS, BIAS,
            )),
        ],
        [4, 1, 1, 1],
        [232, 40, 40, 40],
    )  # fmt: skip


def forward(recording: Recording, table: SelectedTable, scale: float, resume: bool, has_bias: bool) -> None:
    """As attention.attention_forward says; ``choose`` there says of what.

    The recording is given q, own, guests, out, lse, before (or out) and, with ``has_bias``, bias.
    """
    q, k, v, guest_k, guest_v, out, lse, before, *bias = recording.given
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
            _forward, (waves_of(work, numbers, programs),),
            rows_of(q, b, 64), *(rows_of(x, b, rows, 64) for x in there), *(x.at(b) for x in biases),
            out.at(b), lse.at(b), before.at(b), slot_out, slot_lse, work.items, work.item_ptr, units, pages,
            visits.part_mask, visits.masks, tokens, k.shape[1], table.own_pages, table.tiles, work.most, numbers,
            scale * LOG2_E.value, *(x.strides[2] for x in (q, *there)),
            *(n for x in (*biases, out, lse, before) for n in x.strides[1:3]),
            K_LAYOUT=shared_layout((128, dim), q.dtype), V_LAYOUT=shared_layout((128, v_dim), q.dtype),
            V_DIM=v_dim, SIDE_BY_SIDE=side_by_side, ONE_TABLE=work.one_table, ALL_HEADS=heads,
            MASKS=table.has_masks, BIAS=has_bias, RESUME=resume, num_warps=4,
        )  # fmt: skip
        merge_slots(recording, out, lse, before if resume else None, b, slot_out, slot_lse, table, work, units, size)

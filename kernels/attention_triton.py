"""The forward tile kernel in Triton, for GPUs.

A program walks over the pages of one query tile with the online softmax (Milakov and Gimelshein, 2018; Dao,
"FlashAttention-2", 2023): PARTIAL pages with their masks in one loop, FULL pages in another that has no mask code.
Exponents are of base 2. Pieces of long rows leave (out, lse) in slots, which a second kernel merges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from distattn.kernels.configurations import Sizes, configuration, taken_together
from distattn.kernels.launching import Recording, strides_of
from distattn.kernels.slots_triton import merge_slots
from distattn.kernels.walk_triton import (
    LN_2,
    LOG2_E,
    LOWEST,
    find_item,
    first_full,
    key_biases,
    listed_mask_bits,
    mask_bits,
    next_full,
    page_length,
    page_rows,
    partial_range,
    slot_of,
    tile_rows,
)
from distattn.kernels.work import query_units, query_work

if TYPE_CHECKING:
    from distattn.kernels.selected import AnyTable


@triton.jit
def _softmax_step(scores, v_at, v_mask, high, total, acc, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds a page to the running (high, total, acc); scores in base 2."""
    new_high = tl.maximum(high, tl.max(scores, 1))
    weights = tl.exp2(scores - new_high[:, None])
    fade = tl.exp2(high - new_high)
    total = total * fade + tl.sum(weights, 1)
    v = tl.load(v_at, mask=v_mask, other=0.0) if MASKED else tl.load(v_at)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return new_high, total, acc


@triton.jit
def _visit_listed(
    queries, k, v, guest_k, guest_v, bias, guest_bias, pages, mask_of, masks, token, begin, end,
    own_pages, own_rows, k_n, v_n, guest_k_n, guest_v_n, bias_n, guest_bias_n, high, total, acc, scale,
    MASK_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    DIM_2: tl.constexpr, V_DIM: tl.constexpr, V_DIM_2: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Goes on with the pages ``pages[begin] .. pages[end - 1]``, each of BLOCK_K rows, COLUMNS rows at a time."""
    column = tl.arange(0, COLUMNS)
    d = tl.arange(0, DIM_2)
    dv = tl.arange(0, V_DIM_2)
    for first in tl.range(begin, end, COLUMNS // BLOCK_K, num_stages=STAGES):
        visit = first + column // BLOCK_K
        page = tl.load(pages + visit, mask=visit < end, other=0)
        sub = column % BLOCK_K
        there = (visit < end) & (sub < page_length(page, own_pages, own_rows, 0, BLOCK_K))
        k_at, _ = page_rows(k, guest_k, k_n, guest_k_n, page, own_pages, sub, BLOCK_K)
        v_at, _ = page_rows(v, guest_v, v_n, guest_v_n, page, own_pages, sub, BLOCK_K)
        keys = tl.load(k_at[:, None] + d, mask=there[:, None] & (d < DIM), other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if BIAS:
            bias_at, _ = page_rows(bias, guest_bias, bias_n, guest_bias_n, page, own_pages, sub, BLOCK_K)
            scores += (tl.load(bias_at, mask=there, other=0.0) * LOG2_E)[None, :]
        if MASKED:
            allowed = listed_mask_bits(masks, mask_of, first, end, token, MASK_ROWS, BLOCK_Q, BLOCK_K, COLUMNS)
            scores = tl.where(allowed, scores, float("-inf"))
        else:
            scores = tl.where(there[None, :], scores, float("-inf"))
        high, total, acc = _softmax_step(
            scores, v_at[:, None] + dv, there[:, None] & (dv < V_DIM), high, total, acc, True, PRECISION
        )
    return high, total, acc


@triton.jit(do_not_specialize=["tokens", "own_rows", "own_pages", "tiles", "most"])
def _forward(
    q, out, lse, before, k, v, guest_k, guest_v, bias, guest_bias, slot_out, slot_lse,
    items, item_ptr, units, full_first, full_count, part_page, part_mask, masks,
    tokens, own_rows, own_pages, tiles, most, scale,
    q_n, q_h, out_n, out_h, lse_n, lse_h, before_n, before_h, k_n, k_h, v_n, v_h, guest_k_n, guest_k_h,
    guest_v_n, guest_v_h, bias_n, bias_h, guest_bias_n, guest_bias_h,
    MASK_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, HEADS_2: tl.constexpr, ALL_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
    V_DIM: tl.constexpr, V_DIM_2: tl.constexpr, SIDE_BY_SIDE: tl.constexpr, ONE_TABLE: tl.constexpr,
    RESUME: tl.constexpr, BIAS: tl.constexpr, LISTED: tl.constexpr, MASKS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
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
    EVEN: tl.constexpr = (SUBS * COLUMNS == BLOCK_K) and (DIM == DIM_2) and (V_DIM == V_DIM_2)
    queries = tl.load(q + (row * q_n + head * q_h)[:, None] + d, mask=is_row[:, None] & (d < DIM), other=0.0)
    scale = scale * LOG2_E
    k += kv_head * k_h
    v += kv_head * v_h
    guest_k += kv_head * guest_k_h
    guest_v += kv_head * guest_v_h
    bias += kv_head * bias_h
    guest_bias += kv_head * guest_bias_h

    high = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_DIM_2], tl.float32)
    out_at = out + (row * out_n + head * out_h)[:, None] + dv
    out_mask = is_row[:, None] & (dv < V_DIM)
    lse_at = lse + row * lse_n + head * lse_h
    if RESUME:
        if slot < 0:
            old_lse = tl.load(lse_at, mask=is_row, other=float("-inf")) * LOG2_E
            high = tl.maximum(old_lse, LOWEST)
            total = tl.exp2(old_lse - high)
            before_at = before + (row * before_n + head * before_h)[:, None] + dv
            acc = tl.load(before_at, mask=out_mask, other=0.0) * total[:, None]

    begin, end, full = partial_range(item)
    if LISTED:  # several pages at a time
        if not MASKS:
            begin = tl.load(item + 4)
            end = begin + full
        pages = part_page if MASKS else full_first
        high, total, acc = _visit_listed(
            queries, k, v, guest_k, guest_v, bias, guest_bias, pages, part_mask, masks, token, begin, end,
            own_pages, own_rows, k_n, v_n, guest_k_n, guest_v_n, bias_n, guest_bias_n, high, total, acc, scale,
            MASK_ROWS, BLOCK_Q, BLOCK_K, COLUMNS, DIM, DIM_2, V_DIM, V_DIM_2, MASKS, BIAS, STAGES, PRECISION,
        )  # fmt: skip
    else:
        for i in range(begin * SUBS, end * SUBS):
            page = tl.load(part_page + i // SUBS)
            sub = i % SUBS * COLUMNS
            k_page, k_row = page_rows(k, guest_k, k_n, guest_k_n, page, own_pages, sub, BLOCK_K)
            v_page, v_row = page_rows(v, guest_v, v_n, guest_v_n, page, own_pages, sub, BLOCK_K)
            there = column < page_length(page, own_pages, own_rows, sub, BLOCK_K)
            keys = tl.load(k_page + column[:, None] * k_row + d, mask=there[:, None] & (d < DIM), other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            if BIAS:
                scores += key_biases(
                    bias, guest_bias, bias_n, guest_bias_n, page, own_pages, sub, there, BLOCK_K, COLUMNS
                )[None, :]  # fmt: skip
            allowed = mask_bits(masks, tl.load(part_mask + i // SUBS), token, sub, MASK_ROWS, BLOCK_Q, BLOCK_K, COLUMNS)
            scores = tl.where(allowed, scores, float("-inf"))
            v_at = v_page + column[:, None] * v_row + dv
            high, total, acc = _softmax_step(
                scores, v_at, there[:, None] & (dv < V_DIM), high, total, acc, True, PRECISION
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
            else:
                keys = tl.load(k_at, mask=there[:, None] & (d < DIM), other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            if BIAS:
                scores += key_biases(
                    bias, guest_bias, bias_n, guest_bias_n, page, own_pages, sub, there, BLOCK_K, COLUMNS
                )[None, :]  # fmt: skip
            if SUBS * COLUMNS != BLOCK_K:
                scores = tl.where(there[None, :], scores, float("-inf"))
            high, total, acc = _softmax_step(
                scores, v_at, there[:, None] & (dv < V_DIM), high, total, acc, not EVEN, PRECISION
            )
            run, page, left = next_full(full_first, full_count, run, page, left, (i % SUBS + 1) // SUBS)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row_lse = (high + tl.log2(total)) * LN_2
    if slot < 0:
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=out_mask)
        tl.store(lse_at, row_lse, mask=is_row)
    else:
        at = (slot.to(tl.int64) * ALL_HEADS + head) * BLOCK_Q + token
        tl.store(slot_out + at[:, None] * V_DIM + dv, acc, mask=out_mask)
        tl.store(slot_lse + at, row_lse, mask=is_row)


def programs_at_once(device: torch.device) -> int:
    """How many programs of a kernel run at a time: about one a multiprocessor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # the interpreter runs one; a few make it cut long rows as a GPU would


def precision(dtype: torch.dtype) -> str:
    """Of matrix products: float32 is never rounded to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def heads_together(block_q: int, dtype: torch.dtype) -> int:
    """How many heads of those that share a key/value head may make up the rows of a tile, where its tokens are few."""
    rows: int = triton.next_power_of_2(block_q)
    return (64 if dtype == torch.float32 else 128) // rows


def forward(recording: Recording, table: AnyTable, scale: float, resume: bool, has_bias: bool) -> None:
    """As attention.attention_forward says.

    The recording is given q, own, guests, out, lse, before (or out) and, with ``has_bias``, bias.
    """
    q, k, v, guest_k, guest_v, out, lse, before, *bias = recording.given
    device, dtype, (_, tokens, heads, dim), (kv_heads, v_dim) = q.device, q.dtype, q.shape, v.shape[2:]
    work = query_work(table, device, programs_at_once(device))
    if work.most == 0:
        return
    units, size, side_by_side = query_units(table.head_table, kv_heads, heads_together(table.block_q, dtype), device)
    size_2 = triton.next_power_of_2(size)
    rows = max(16, triton.next_power_of_2(table.block_q) * size_2)
    dim_2, v_dim_2 = (max(16, triton.next_power_of_2(n)) for n in (dim, v_dim))
    page_rows = max(16, triton.next_power_of_2(table.block_k))
    sizes = Sizes(rows, page_rows, max(dim_2, v_dim_2))
    whole = table.names_pages and page_rows == table.block_k  # whole words of masks
    chosen = configuration("forward", device, dtype, taken_together("forward", sizes) if whole else sizes)
    slot_out = recording.temporary(work.slots, heads, table.block_q, v_dim)
    slot_lse = recording.temporary(work.slots, heads, table.block_q)
    # Any pointer will do where none is read.
    tensors = (q, out, lse, before, k, v, guest_k, guest_v, *(bias or (lse, lse)))
    for b in range(q.shape[0]):
        recording.launch(
            _forward, (len(units) * work.most,), *(x.at(b) for x in tensors), slot_out, slot_lse,
            work.items, work.item_ptr, units, *work.visits,
            tokens, k.shape[1], table.own_pages, table.tiles, work.most, scale, *strides_of(*tensors),
            MASK_ROWS=table.mask_rows, BLOCK_Q=table.block_q, BLOCK_K=table.block_k, COLUMNS=chosen.columns,
            ROWS=rows, HEADS=size, HEADS_2=size_2, ALL_HEADS=heads, DIM=dim, DIM_2=dim_2, V_DIM=v_dim, V_DIM_2=v_dim_2,
            SIDE_BY_SIDE=side_by_side,
            ONE_TABLE=work.one_table, RESUME=resume, BIAS=has_bias,
            LISTED=whole and chosen.columns > page_rows, MASKS=table.has_masks, STAGES=chosen.stages,
            PRECISION=precision(dtype), num_warps=chosen.warps,
        )  # fmt: skip
        merge_slots(recording, out, lse, before if resume else None, b, slot_out, slot_lse, table, work, units, size)

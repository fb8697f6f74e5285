"""Partial results of rows that were cut into items: kernels in Triton that add them up, in order.

Forward, the pieces of a query tile leave (out, lse); backward, pieces of query tiles leave dQ and those of key pages dK
and dV. Each piece has a slot; work.py says which.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.launching import Given, Part, Recording
from distattn.kernels.walk_triton import LN_2, LOG2_E, LOWEST, UNIT_SIZE, page_length, page_rows, tile_rows
from distattn.kernels.work import Work

if TYPE_CHECKING:
    from distattn.kernels.selected import AnyTable


@triton.jit(do_not_specialize=["tokens", "tiles", "most"])
def _merge_slots(
    out, lse, before, slot_out, slot_lse, split, split_ptr, units, tokens, tiles, most, out_n, out_h, lse_n, lse_h,
    before_n, before_h,
    BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HEADS_2: tl.constexpr, ALL_HEADS: tl.constexpr,
    V_DIM: tl.constexpr, V_DIM_2: tl.constexpr, RESUME: tl.constexpr,
):  # fmt: skip
    """Merges the partial results of a row that was cut, in order."""
    unit = units + tl.program_id(0) // most * UNIT_SIZE
    table = tl.load(unit)
    index = tl.load(split_ptr + table) + tl.program_id(0) % most
    if index >= tl.load(split_ptr + table + 1):
        return
    tile = tl.load(split + index * 3) - table * tiles
    slot0 = tl.load(split + index * 3 + 1)
    token, row, head, is_row = tile_rows(tile, 0, tokens, ROWS, ROWS, BLOCK_Q, HEADS, HEADS_2)
    head = (tl.load(unit + 1) + head).to(tl.int64)
    dv = tl.arange(0, V_DIM_2)
    out_at = out + (row * out_n + head * out_h)[:, None] + dv
    out_mask = is_row[:, None] & (dv < V_DIM)
    lse_at = lse + row * lse_n + head * lse_h
    high = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_DIM_2], tl.float32)
    if RESUME:
        old_lse = tl.load(lse_at, mask=is_row, other=float("-inf")) * LOG2_E
        high = tl.maximum(old_lse, LOWEST)
        total = tl.exp2(old_lse - high)
        before_at = before + (row * before_n + head * before_h)[:, None] + dv
        acc = tl.load(before_at, mask=out_mask, other=0.0) * total[:, None]
    for number in range(tl.load(split + index * 3 + 2)):
        at = ((slot0 + number).to(tl.int64) * ALL_HEADS + head) * BLOCK_Q + token
        part = tl.load(slot_lse + at, mask=is_row, other=float("-inf")) * LOG2_E
        new_high = tl.maximum(high, part)
        fade = tl.exp2(high - new_high)
        weight = tl.exp2(part - new_high)
        part_out = tl.load(slot_out + at[:, None] * V_DIM + dv, mask=out_mask, other=0.0)
        total = total * fade + weight
        acc = acc * fade[:, None] + part_out * weight[:, None]
        high = new_high
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=out_mask)
    tl.store(lse_at, (high + tl.log2(total)) * LN_2, mask=is_row)


def merge_slots(
    recording: Recording,
    out: Given,
    lse: Given,
    before: Given | None,
    b: int,
    slot_out: Part | Tensor,
    slot_lse: Part | Tensor,
    table: AnyTable,
    work: Work,
    units: Tensor,
    size: int,
) -> None:
    """Merges the partial results of rows that were cut into sequence b of out and lse.

    before: what is merged with them, with the lse that is there; None: nothing is there yet.
    slot_out: float32 [slots, heads, block_q, value_dim], slot_lse: float32 [slots, heads, block_q]; units of ``size``
    heads.
    """
    if not work.slots:
        return
    size_2 = triton.next_power_of_2(size)
    old = out if before is None else before
    _, tokens, heads, v_dim = out.shape
    recording.launch(
        _merge_slots, (len(units) * work.most_split,), out.at(b), lse.at(b), old.at(b), slot_out, slot_lse,
        work.split, work.split_ptr, units, tokens, table.tiles, work.most_split,
        *out.strides[1:3], *lse.strides[1:], *old.strides[1:3], BLOCK_Q=table.block_q,
        ROWS=max(16, triton.next_power_of_2(table.block_q) * size_2), HEADS=size, HEADS_2=size_2, ALL_HEADS=heads,
        V_DIM=v_dim, V_DIM_2=max(16, triton.next_power_of_2(v_dim)), RESUME=before is not None, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["own_rows", "own_blocks", "rows_of_table", "most"])
def _add_slots(
    own, guests, slots, split, split_ptr, units, own_rows, own_blocks, rows_of_table, most,
    own_n, own_h, guest_n, guest_h,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr, ALL_HEADS: tl.constexpr,
    DIM: tl.constexpr, DIM_2: tl.constexpr,
):  # fmt: skip
    """Adds the partial results of a row that was cut to its block of a buffer, in order; HEADS heads a unit.

    HEAD is the column of a unit that has its first head.
    """
    pid = tl.program_id(0)
    unit = units + pid // (most * HEADS) * UNIT_SIZE
    table = tl.load(unit)
    index = tl.load(split_ptr + table) + pid // HEADS % most
    if index >= tl.load(split_ptr + table + 1):
        return
    head = (tl.load(unit + HEAD) + pid % HEADS).to(tl.int64)
    block = tl.load(split + index * 3) - table * rows_of_table
    slot0 = tl.load(split + index * 3 + 1)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, DIM_2)
    mask = (row < page_length(block, own_blocks, own_rows, 0, BLOCK))[:, None] & (d < DIM)
    acc = tl.zeros([ROWS, DIM_2], tl.float32)
    for number in range(tl.load(split + index * 3 + 2)):
        at = ((slot0 + number).to(tl.int64) * ALL_HEADS + head) * BLOCK + row
        acc += tl.load(slots + at[:, None] * DIM + d, mask=mask, other=0.0)
    base, stride = page_rows(own + head * own_h, guests + head * guest_h, own_n, guest_n, block, own_blocks, 0, BLOCK)
    sum_at = base + row[:, None] * stride + d
    if own.dtype.element_ty == tl.float32:  # what has 16 bits is written, see attention_backward
        acc += tl.load(sum_at, mask=mask, other=0.0)
    tl.store(sum_at, acc.to(own.dtype.element_ty), mask=mask)


def add_query_slots(
    recording: Recording,
    dq: Given,
    b: int,
    slots: Part | Tensor,
    table: AnyTable,
    work: Work,
    units: Tensor,
    size: int,
) -> None:
    """Adds the partial results of query tiles that were cut to sequence b of dq.

    slots: float32 [slots, heads, block_q, head_dim]; units of ``size`` heads.
    """
    if not work.slots:
        return
    _, tokens, heads, dim = dq.shape
    recording.launch(
        _add_slots, (len(units) * work.most_split * size,), dq.at(b), dq.at(b), slots,
        work.split, work.split_ptr, units, tokens, table.tiles, table.tiles, work.most_split,
        *dq.strides[1:3], *dq.strides[1:3], BLOCK=table.block_q, ROWS=triton.next_power_of_2(table.block_q), HEAD=1,
        HEADS=size, ALL_HEADS=heads, DIM=dim, DIM_2=max(16, triton.next_power_of_2(dim)), num_warps=8,
    )  # fmt: skip


def add_key_slots(
    recording: Recording,
    own: Given,
    guests: Given,
    b: int,
    slots: Part | Tensor,
    table: AnyTable,
    work: Work,
    kv_units: Tensor,
) -> None:
    """Adds the partial results of pages that were cut to sequence b of gradients [batch, rows, kv_heads, dim].

    Those of biases have no dim. slots: float32 [slots, kv_heads, block_k, dim].
    """
    if not work.slots:
        return
    _, rows, kv_heads, *dims = own.shape
    dim = prod(dims)
    recording.launch(
        _add_slots, (len(kv_units) * work.most_split,), own.at(b), guests.at(b), slots,
        work.split, work.split_ptr, kv_units, rows, table.own_pages, table.pages, work.most_split,
        *own.strides[1:3], *guests.strides[1:3], BLOCK=table.block_k,
        ROWS=max(16, triton.next_power_of_2(table.block_k)), HEAD=2, HEADS=1, ALL_HEADS=kv_heads, DIM=dim,
        DIM_2=max(16, triton.next_power_of_2(dim)), num_warps=8,
    )  # fmt: skip

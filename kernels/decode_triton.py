"""Single queries over pages of a cache, in Triton, for GPUs: the pages of a row are split among programs.

At every step all keys and values that are visited are read once, and little is computed, so that what counts is how
many bytes are on their way: enough programs, each with several pages in flight, and page numbers that are known before
they are needed. The heads that share a key/value head are the rows of one product, filled up to the 16 that the matrix
unit takes. Programs beside each other read the heads of one page, which lie beside each other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from distattn.kernels.attention_triton import precision
from distattn.kernels.selected import AnyTable, SelectedTable
from distattn.kernels.uploads import upload
from distattn.kernels.walk_triton import LN_2, LOG2_E, LOWEST
from distattn.kernels.work import query_units
from distattn.spans import Ints, concat_ranges

PROGRAM = 8
"""Columns of a program: row, first query head, key/value head, slot or -1, and where its PARTIAL and then its FULL
visits begin and end."""
CUT = 4
"""Columns of a row that was cut: row, first query head, its first slot, how many it has."""
PROGRAM_SIZE = tl.constexpr(PROGRAM)
CUT_SIZE = tl.constexpr(CUT)
# Fewer pages than this a program are not worth a partial result.
_SHORTEST = 2


@triton.jit
def _step(
    queries, k_at, v_at, bias_at, allowed, d, dv, high, total, acc, scale, DIM: tl.constexpr, V_DIM: tl.constexpr,
    MASKED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys to the running (high, total, acc) of base-2 scores; what is not ``allowed`` [keys] is not read."""
    if MASKED:
        keys = tl.load(k_at, mask=allowed[:, None] & (d < DIM), other=0.0)
    else:
        keys = tl.load(k_at)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    if BIAS:
        scores += (tl.load(bias_at, mask=allowed, other=0.0) * LOG2_E)[None, :]
    if MASKED:
        scores = tl.where(allowed[None, :], scores, float("-inf"))
    new_high = tl.maximum(high, tl.max(scores, 1))
    weights = tl.exp2(scores - new_high[:, None])
    fade = tl.exp2(high - new_high)
    total = total * fade + tl.sum(weights, 1)
    if MASKED:
        values = tl.load(v_at, mask=allowed[:, None] & (dv < V_DIM), other=0.0)
    else:
        values = tl.load(v_at)
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return new_high, total, acc


@triton.jit
def _decode(
    q, k, v, bias, out, lse, slot_out, slot_lse, programs, full_page, part_page, part_mask, words, scale,
    q_n, q_h, k_n, k_h, v_n, v_h, bias_n, bias_h, out_n, out_h, lse_n, lse_h,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_2: tl.constexpr, V_DIM: tl.constexpr, V_DIM_2: tl.constexpr, WORDS: tl.constexpr, BIAS: tl.constexpr,
    HOLES: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = programs + tl.program_id(0) * PROGRAM_SIZE
    row = tl.load(program).to(tl.int64)
    head = tl.load(program + 1) + tl.arange(0, ROWS)
    kv_head = tl.load(program + 2).to(tl.int64)
    slot = tl.load(program + 3)
    is_row = tl.arange(0, ROWS) < HEADS
    d = tl.arange(0, DIM_2)
    dv = tl.arange(0, V_DIM_2)
    column = tl.arange(0, COLUMNS)
    SUBS: tl.constexpr = (BLOCK_K + COLUMNS - 1) // COLUMNS
    ODD: tl.constexpr = HOLES or (SUBS * COLUMNS != BLOCK_K) or (DIM != DIM_2) or (V_DIM != V_DIM_2)
    queries = tl.load(q + row * q_n + (head * q_h)[:, None] + d, mask=is_row[:, None] & (d < DIM), other=0.0)
    scale = scale * LOG2_E
    k_at = k + kv_head * k_h + column[:, None] * k_n + d
    v_at = v + kv_head * v_h + column[:, None] * v_n + dv
    bias_at = bias + kv_head * bias_h + column * bias_n

    high = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_DIM_2], tl.float32)

    begin = tl.load(program + 4)
    end = tl.load(program + 5)
    for i in tl.range(begin * SUBS, end * SUBS, num_stages=STAGES):
        page = tl.load(part_page + i // SUBS)
        sub = i % SUBS * COLUMNS
        inside = sub + column
        mask = tl.load(part_mask + i // SUBS).to(tl.int64)
        bits = tl.load(words + mask * WORDS + inside // 32, mask=inside < BLOCK_K, other=0)
        allowed = (((bits >> (inside % 32)) & 1) == 1) & (page >= 0)
        first = tl.maximum(page, 0).to(tl.int64) * BLOCK_K + sub
        high, total, acc = _step(
            queries, k_at + first * k_n, v_at + first * v_n, bias_at + first * bias_n, allowed, d, dv,
            high, total, acc, scale, DIM, V_DIM, True, BIAS, PRECISION,
        )  # fmt: skip

    begin = tl.load(program + 6)
    end = tl.load(program + 7)
    page = tl.load(full_page + begin)
    for i in tl.range(begin * SUBS, end * SUBS, num_stages=STAGES):
        sub = i % SUBS * COLUMNS
        allowed = (sub + column < BLOCK_K) & (page >= 0)
        first = tl.maximum(page, 0).to(tl.int64) * BLOCK_K + sub
        high, total, acc = _step(
            queries, k_at + first * k_n, v_at + first * v_n, bias_at + first * bias_n, allowed, d, dv,
            high, total, acc, scale, DIM, V_DIM, ODD, BIAS, PRECISION,
        )  # fmt: skip
        # Of the next turn, so that its addresses are known in time; there is one entry more than there are pages.
        page = tl.load(full_page + (i + 1) // SUBS)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row_lse = (high + tl.log2(total)) * LN_2
    out_mask = is_row[:, None] & (dv < V_DIM)
    if slot < 0:
        tl.store(out + row * out_n + (head * out_h)[:, None] + dv, acc, mask=out_mask)
        tl.store(lse + row * lse_n + head * lse_h, row_lse, mask=is_row)
    else:
        at = slot.to(tl.int64) * HEADS + tl.arange(0, ROWS)
        tl.store(slot_out + at[:, None] * V_DIM + dv, acc, mask=out_mask)
        tl.store(slot_lse + at, row_lse, mask=is_row)


@triton.jit
def _merge(
    out, lse, slot_out, slot_lse, cuts, out_n, out_h, lse_n, lse_h,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, V_DIM_2: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Merges the partial results of one head of a row, TOGETHER of them at a time, in order."""
    cut = cuts + tl.program_id(0) * CUT_SIZE
    row = tl.load(cut).to(tl.int64)
    head = (tl.load(cut + 1) + tl.program_id(1)).to(tl.int64)
    slot0 = tl.load(cut + 2)
    count = tl.load(cut + 3)
    dv = tl.arange(0, V_DIM_2)
    high = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([V_DIM_2], tl.float32)
    for first in range(0, count, TOGETHER):
        number = first + tl.arange(0, TOGETHER)
        there = number < count
        at = (slot0 + number).to(tl.int64) * HEADS + tl.program_id(1)
        part = tl.load(slot_lse + at, mask=there, other=float("-inf")) * LOG2_E
        parts = tl.load(slot_out + at[:, None] * V_DIM + dv, mask=there[:, None] & (dv < V_DIM), other=0.0)
        new_high = tl.maximum(high, tl.max(part, 0))
        weights = tl.exp2(part - new_high)
        fade = tl.exp2(high - new_high)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(parts * weights[:, None], 0)
        high = new_high
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * out_n + head * out_h + dv, acc, mask=dv < V_DIM)
    tl.store(lse + row * lse_n + head * lse_h + tl.arange(0, 1), (high + tl.log2(total)) * LN_2)


class Split(NamedTuple):
    """The programs of a launch. All arrays are int32, and have an entry more than is needed.

    programs: [n, PROGRAM]. cuts: [m, CUT]. full_page: FULL visits. part_page, part_mask: PARTIAL ones. words: masks.
    launched, cut: how many programs and cut rows there are. slots: partial results. heads: of a program.
    """

    programs: Tensor
    cuts: Tensor
    full_page: Tensor
    part_page: Tensor
    part_mask: Tensor
    words: Tensor
    launched: int
    cut: int
    slots: int
    heads: int


def split(table: AnyTable, kv_heads: int, device: torch.device, at_once: int) -> Split:
    """Who reads which pages, with about ``at_once`` programs. Waits for nothing on the device.

    Of a SelectedTable all but the pages follows from shapes, and is kept: what chooses can be captured in a graph.
    """
    if isinstance(table, SelectedTable):
        shape = table.tables, table.tiles, table.selected.shape[2]
        some, others, entry, numbers = _selected(table.head_table, kv_heads, shape, table.has_masks, device, at_once)
        more = table.selected.new_zeros(1)
        pages = torch.cat((table.selected.flatten(), more))
        masks = more if table.masks is None else table.masks.flatten()
        return Split(some, others, pages, pages, entry, masks, *numbers)
    first = table.part_ptr[:-1].astype(np.int64), table.full_cumulative[table.full_ptr[:-1]]
    units = query_units(table.head_table, kv_heads, 16, torch.device("cpu"))
    programs, cuts, numbers = _programs(units, table.tiles, (table.part_pages, table.full_pages), first, at_once)
    run_page = concat_ranges(table.full_first.astype(np.int64), table.full_count.astype(np.int64))
    arrays = upload([_longer(x) for x in (programs, cuts, run_page, table.part_page, table.part_mask)], device)
    words = table.masks.words(device).flatten() if len(table.masks) else arrays[0]  # any will do where none is read
    return Split(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], words, *numbers)


@lru_cache(maxsize=64)
def _selected(
    head_table: tuple[int, ...],
    kv_heads: int,
    shape: tuple[int, int, int],
    masked: bool,
    device: torch.device,
    at_once: int,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int, int]]:
    """(programs, cuts, place of each entry, numbers) of tables of a shape: every entry may be a page."""
    rows, number = shape[0] * shape[1], shape[2]
    none, every, first = np.zeros(rows, np.int64), np.full(rows, number), np.arange(rows) * number
    counts = (every, none) if masked else (none, every)
    units = query_units(head_table, kv_heads, 16, torch.device("cpu"))
    programs, cuts, numbers = _programs(units, shape[1], counts, (first, first), at_once)
    some, others = upload([_longer(programs), _longer(cuts)], device)
    return some, others, torch.arange(rows * number + 1, dtype=torch.int32, device=device), numbers


def _programs(
    units: tuple[Tensor, int, int], tiles: int, counts: tuple[Ints, Ints], first: tuple[Ints, Ints], at_once: int
) -> tuple[Ints, Ints, tuple[int, int, int, int]]:
    """(programs, cuts, (how many of each, slots, heads of a program)).

    counts: PARTIAL and FULL visits of each row of the table. first: where these begin.
    """
    unit, heads = units[0].numpy().astype(np.int64), units[1]
    # A row of what follows is a (query, unit) pair, the units of a query beside each other.
    row = (unit[:, 0] * tiles + np.arange(tiles)[:, None]).ravel()
    part, visits = counts[0][row], (counts[0] + counts[1])[row]
    longest = max(-(-int(visits.sum()) // at_once), _SHORTEST)
    pieces = -(-visits // longest)
    slots = np.where(pieces > 1, pieces, 0)
    slot = slots.cumsum() - slots
    owner = np.repeat(np.arange(len(row)), pieces)
    piece = concat_ranges(np.zeros_like(pieces), pieces)
    order = np.lexsort((owner, piece, owner // len(unit)))
    owner, piece = owner[order], piece[order]
    edges = [n * visits[owner] // pieces[owner] for n in (piece, piece + 1)]
    columns = [owner // len(unit), unit[owner % len(unit), 1], unit[owner % len(unit), 2]]
    columns.append(np.where(pieces[owner] > 1, slot[owner] + piece, -1))
    columns += [first[0][row][owner] + np.minimum(edge, part[owner]) for edge in edges]
    columns += [first[1][row][owner] + np.maximum(edge - part[owner], 0) for edge in edges]
    cut = np.flatnonzero(pieces > 1)
    cuts = np.stack((cut // len(unit), unit[cut % len(unit), 1], slot[cut], pieces[cut]), axis=1)
    return np.stack(columns, axis=1), cuts, (len(owner), len(cut), int(slots.sum()), heads)


def _longer(array: NDArray[np.integer]) -> NDArray[np.int32]:
    """Flat, with an entry more."""
    return np.append(array.ravel(), 0).astype(np.int32)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    table: AnyTable,
    out: Tensor,
    lse: Tensor,
    scale: float,
    columns: int = 64,
    stages: int = 4,
    warps: int = 4,
    programs: int = 4,
) -> None:
    """Writes out and lse, in float32, of rows that visit something.

    columns: keys that are multiplied at a time. stages: how many of these are on their way. warps: of a program.
    programs: of a multiprocessor, one after the other or at a time, all rows together.
    """
    device, v_dim = q.device, v.shape[2]
    name = "decode", device, k.shape[1], programs
    if name not in table.cache:
        chips = torch.cuda.get_device_properties(device).multi_processor_count if q.is_cuda else 2
        table.cache[name] = split(table, k.shape[1], device, programs * chips)
    work: Split = table.cache[name]
    if work.launched == 0:
        return
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    dim_2, v_dim_2 = (max(16, triton.next_power_of_2(n)) for n in (q.shape[2], v_dim))
    slot_out = out.new_empty((work.slots, work.heads, v_dim))
    slot_lse = out.new_empty((work.slots, work.heads))
    biases = lse if bias is None else bias  # any pointer will do where none is read
    strides = [n for x in (q, k, v, biases, out, lse) for n in x.stride()[:2]]
    if q.dtype == torch.float32:
        columns, stages = min(columns, 32), min(stages, 2)
    _decode[(work.launched,)](
        q, k, v, biases, out, lse, slot_out, slot_lse,
        work.programs, work.full_page, work.part_page, work.part_mask, work.words, scale, *strides,
        BLOCK_K=table.block_k, COLUMNS=min(columns, max(16, triton.next_power_of_2(table.block_k))), ROWS=16,
        HEADS=work.heads, DIM=q.shape[2], DIM_2=dim_2, V_DIM=v_dim, V_DIM_2=v_dim_2, WORDS=-(-table.block_k // 32),
        BIAS=bias is not None, HOLES=isinstance(table, SelectedTable), STAGES=stages, PRECISION=precision(q.dtype),
        num_warps=warps,
    )  # fmt: skip
    if work.cut:
        _merge[(work.cut, work.heads)](
            out, lse, slot_out, slot_lse, work.cuts, *out.stride()[:2], *lse.stride()[:2],
            HEADS=work.heads, V_DIM=v_dim, V_DIM_2=v_dim_2, TOGETHER=32, num_warps=4,
        )  # fmt: skip

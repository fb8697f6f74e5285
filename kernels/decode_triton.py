"""Single queries over pages of a cache, in Triton, for GPUs: the pages of a row are split among programs.

One launch leaves partial results of the programs of all sources, and another merges these.

At every step all keys and values that are visited are read once, and little is computed, so that what counts is how
many bytes are on their way: enough programs, each with several pages in flight, and page numbers that are known before
they are needed. The heads that share a key/value head are the rows of one product, filled up to the 16 that the matrix
unit takes. Programs beside each other read the heads of one page, which lie beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from distattn.kernels.attention_triton import precision
from distattn.kernels.launching import Launches, Recording, multiprocessors
from distattn.kernels.selected import AnyTable, SelectedTable
from distattn.kernels.uploads import upload
from distattn.kernels.walk_triton import LN_2, LOG2_E, LOWEST
from distattn.kernels.work import query_units
from distattn.spans import Ints, concat_ranges

if TYPE_CHECKING:
    from distattn.kernels.decode import Source

PROGRAM = 8
"""Columns of a program: row, first query head, key/value head, number of its partial result, and where its PARTIAL and
then its FULL visits begin and end."""
PROGRAM_SIZE = tl.constexpr(PROGRAM)
# Fewer pages than this a program are not worth a partial result.
_SHORTEST = 2
# Partial results that are merged at a time.
_TOGETHER = 128
_LAUNCHES = Launches()


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
def _attend(
    number, q, slot_out, slot_lse, scale, q_n, q_h, k, v, bias, programs, full_page, part_page, part_mask, words, base,
    k_n, k_h, v_n, v_h, bias_n, bias_h,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr, HEADS: tl.constexpr, BIAS: tl.constexpr,
    NAMED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, V_DIM: tl.constexpr,
    V_DIM_2: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program of one source. NAMED: what is visited was chosen on the device: a page may be -1, and the mask of entry
    i is mask i."""
    program = programs + number * PROGRAM_SIZE
    row = tl.load(program).to(tl.int64)
    head = tl.load(program + 1) + tl.arange(0, ROWS)
    kv_head = tl.load(program + 2).to(tl.int64)
    slot = tl.load(program + 3)
    is_row = tl.arange(0, ROWS) < HEADS
    d = tl.arange(0, DIM_2)
    dv = tl.arange(0, V_DIM_2)
    column = tl.arange(0, COLUMNS)
    SUBS: tl.constexpr = (BLOCK_K + COLUMNS - 1) // COLUMNS
    ODD: tl.constexpr = NAMED or (SUBS * COLUMNS != BLOCK_K) or (DIM != DIM_2) or (V_DIM != V_DIM_2)
    queries = tl.load(q + row * q_n + (head * q_h)[:, None] + d, mask=is_row[:, None] & (d < DIM), other=0.0)
    scale = scale * LOG2_E
    k_at = k + kv_head * k_h + column[:, None] * k_n + d
    v_at = v + kv_head * v_h + column[:, None] * v_n + dv
    bias_at = bias + kv_head * bias_h + column * bias_n

    high = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_DIM_2], tl.float32)

    # Pages, and numbers of masks, are those of the next turn, so that addresses are known in time.
    begin = tl.load(program + 4) * SUBS
    end = tl.load(program + 5) * SUBS
    page = tl.load(part_page + begin // SUBS, mask=begin < end, other=-1)
    mask = begin // SUBS
    if not NAMED:
        mask = tl.load(part_mask + begin // SUBS, mask=begin < end, other=0)
    for i in tl.range(begin, end, num_stages=STAGES):
        sub = i % SUBS * COLUMNS
        inside = sub + column
        bits = tl.load(words + mask.to(tl.int64) * WORDS + inside // 32, mask=inside < BLOCK_K, other=0)
        allowed = (((bits >> (inside % 32)) & 1) == 1) & (page >= 0)
        first = tl.maximum(page, 0).to(tl.int64) * BLOCK_K + sub
        high, total, acc = _step(
            queries, k_at + first * k_n, v_at + first * v_n, bias_at + first * bias_n, allowed, d, dv,
            high, total, acc, scale, DIM, V_DIM, True, BIAS, PRECISION,
        )  # fmt: skip
        page = tl.load(part_page + (i + 1) // SUBS, mask=i + 1 < end, other=-1)
        mask = (i + 1) // SUBS
        if not NAMED:
            mask = tl.load(part_mask + (i + 1) // SUBS, mask=i + 1 < end, other=0)

    begin = tl.load(program + 6) * SUBS
    end = tl.load(program + 7) * SUBS
    page = tl.load(full_page + begin // SUBS, mask=begin < end, other=-1)
    for i in tl.range(begin, end, num_stages=STAGES):
        sub = i % SUBS * COLUMNS
        allowed = (sub + column < BLOCK_K) & (page >= 0)
        first = tl.maximum(page, 0).to(tl.int64) * BLOCK_K + sub
        high, total, acc = _step(
            queries, k_at + first * k_n, v_at + first * v_n, bias_at + first * bias_n, allowed, d, dv,
            high, total, acc, scale, DIM, V_DIM, ODD, BIAS, PRECISION,
        )  # fmt: skip
        page = tl.load(full_page + (i + 1) // SUBS, mask=i + 1 < end, other=-1)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = base + slot.to(tl.int64) * HEADS + tl.arange(0, ROWS)
    tl.store(slot_out + at[:, None] * V_DIM + dv, acc, mask=is_row[:, None] & (dv < V_DIM))
    tl.store(slot_lse + at, (high + tl.log2(total)) * LN_2, mask=is_row)


@triton.jit(do_not_specialize=["first_1", "first_2", "base_0", "base_1", "base_2"])
def _decode(
    q, slot_out, slot_lse, first_1, first_2, scale, q_n, q_h,
    k_0, v_0, bias_0, programs_0, full_0, part_0, mask_0, words_0, base_0,
    k_n_0, k_h_0, v_n_0, v_h_0, bias_n_0, bias_h_0,
    k_1, v_1, bias_1, programs_1, full_1, part_1, mask_1, words_1, base_1,
    k_n_1, k_h_1, v_n_1, v_h_1, bias_n_1, bias_h_1,
    k_2, v_2, bias_2, programs_2, full_2, part_2, mask_2, words_2, base_2,
    k_n_2, k_h_2, v_n_2, v_h_2, bias_n_2, bias_h_2,
    SOURCES: tl.constexpr,
    BLOCK_0: tl.constexpr, COLUMNS_0: tl.constexpr, WORDS_0: tl.constexpr, HEADS_0: tl.constexpr,
    BIAS_0: tl.constexpr, NAMED_0: tl.constexpr,
    BLOCK_1: tl.constexpr, COLUMNS_1: tl.constexpr, WORDS_1: tl.constexpr, HEADS_1: tl.constexpr,
    BIAS_1: tl.constexpr, NAMED_1: tl.constexpr,
    BLOCK_2: tl.constexpr, COLUMNS_2: tl.constexpr, WORDS_2: tl.constexpr, HEADS_2: tl.constexpr,
    BIAS_2: tl.constexpr, NAMED_2: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, V_DIM: tl.constexpr, V_DIM_2: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The programs of all sources, one source after the other: those of source i begin with number first_i."""
    number = tl.program_id(0)
    if number < first_1:
        _attend(
            number, q, slot_out, slot_lse, scale, q_n, q_h,
            k_0, v_0, bias_0, programs_0, full_0, part_0, mask_0, words_0, base_0,
            k_n_0, k_h_0, v_n_0, v_h_0, bias_n_0, bias_h_0,
            BLOCK_0, COLUMNS_0, WORDS_0, HEADS_0, BIAS_0, NAMED_0,
            ROWS, DIM, DIM_2, V_DIM, V_DIM_2, STAGES, PRECISION,
        )  # fmt: skip
    if SOURCES > 1:
        if (number >= first_1) & (number < first_2):
            _attend(
                number - first_1, q, slot_out, slot_lse, scale, q_n, q_h,
                k_1, v_1, bias_1, programs_1, full_1, part_1, mask_1, words_1, base_1,
                k_n_1, k_h_1, v_n_1, v_h_1, bias_n_1, bias_h_1,
                BLOCK_1, COLUMNS_1, WORDS_1, HEADS_1, BIAS_1, NAMED_1,
                ROWS, DIM, DIM_2, V_DIM, V_DIM_2, STAGES, PRECISION,
            )  # fmt: skip
    if SOURCES > 2:
        if number >= first_2:
            _attend(
                number - first_2, q, slot_out, slot_lse, scale, q_n, q_h,
                k_2, v_2, bias_2, programs_2, full_2, part_2, mask_2, words_2, base_2,
                k_n_2, k_h_2, v_n_2, v_h_2, bias_n_2, bias_h_2,
                BLOCK_2, COLUMNS_2, WORDS_2, HEADS_2, BIAS_2, NAMED_2,
                ROWS, DIM, DIM_2, V_DIM, V_DIM_2, STAGES, PRECISION,
            )  # fmt: skip


@triton.jit
def _merge_source(
    slot_out, slot_lse, places, base, number, high, total, acc, dv,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Adds the partial results of a source to (high, total, acc) of a head of a row, TOGETHER at a time, in order."""
    slot0 = tl.load(places + number * 2)
    count = tl.load(places + number * 2 + 1)
    for first in range(0, count, TOGETHER):
        which = first + tl.arange(0, TOGETHER)
        there = which < count
        at = base + slot0 + which.to(tl.int64) * HEADS
        part = tl.load(slot_lse + at, mask=there, other=float("-inf")) * LOG2_E
        parts = tl.load(slot_out + at[:, None] * V_DIM + dv, mask=there[:, None] & (dv < V_DIM), other=0.0)
        new_high = tl.maximum(high, tl.max(part, 0))
        weights = tl.exp2(part - new_high)
        fade = tl.exp2(high - new_high)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(parts * weights[:, None], 0)
        high = new_high
    return high, total, acc


@triton.jit(do_not_specialize=["base_1", "base_2"])
def _merge(
    out, lse, slot_out, slot_lse, places_0, places_1, places_2, base_1, base_2, out_n, out_h, lse_n, lse_h,
    SOURCES: tl.constexpr, HEADS_0: tl.constexpr, HEADS_1: tl.constexpr, HEADS_2: tl.constexpr, V_DIM: tl.constexpr,
    V_DIM_2: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Program (row, head): its partial results of all sources."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number = row * tl.num_programs(1) + head
    dv = tl.arange(0, V_DIM_2)
    high = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([V_DIM_2], tl.float32)
    high, total, acc = _merge_source(
        slot_out, slot_lse, places_0, 0, number, high, total, acc, dv, HEADS_0, V_DIM, TOGETHER
    )  # fmt: skip
    if SOURCES > 1:
        high, total, acc = _merge_source(
            slot_out, slot_lse, places_1, base_1, number, high, total, acc, dv, HEADS_1, V_DIM, TOGETHER
        )  # fmt: skip
    if SOURCES > 2:
        high, total, acc = _merge_source(
            slot_out, slot_lse, places_2, base_2, number, high, total, acc, dv, HEADS_2, V_DIM, TOGETHER
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * out_n + head * out_h + dv, acc, mask=dv < V_DIM)
    tl.store(lse + row * lse_n + head * lse_h + tl.arange(0, 1), (high + tl.log2(total)) * LN_2)


class Split(NamedTuple):
    """The programs of a launch. All arrays are int32.

    programs: [n, PROGRAM], flat. places: [rows, heads, 2], flat: of each head of a row the first of its partial
    results, which are ``heads`` apart, and how many they are. full_page: FULL visits. part_page, part_mask: PARTIAL
    ones. words: masks. launched: programs. results: partial results, of one head each. most: no head has more. heads:
    of a program.
    """

    programs: Tensor
    places: Tensor
    full_page: Tensor
    part_page: Tensor
    part_mask: Tensor
    words: Tensor
    launched: int
    results: int
    most: int
    heads: int


def split(table: AnyTable, kv_heads: int, device: torch.device, at_once: int) -> Split:
    """Who reads which pages, with about ``at_once`` programs. Waits for nothing on the device.

    Of a SelectedTable all but the pages follows from shapes, and is kept: what chooses can be captured in a graph.
    """
    if isinstance(table, SelectedTable):
        shape = table.tables, table.tiles, table.selected.shape[2]
        some, here, numbers = _selected(table.head_table, kv_heads, shape, table.has_masks, device, at_once)
        pages = table.selected.contiguous()
        return Split(some, here, pages, pages, pages, pages if table.masks is None else table.masks, *numbers)
    name = "decode", device, kv_heads, at_once
    if name not in table.cache:
        first = table.part_ptr[:-1].astype(np.int64), table.full_cumulative[table.full_ptr[:-1]]
        units = query_units(table.head_table, kv_heads, 16, torch.device("cpu"))
        programs, places, numbers = _programs(units, table.tiles, (table.part_pages, table.full_pages), first, at_once)
        run_page = concat_ranges(table.full_first.astype(np.int64), table.full_count.astype(np.int64))
        arrays = upload([_padded(x) for x in (programs, places, run_page, table.part_page, table.part_mask)], device)
        words = table.masks.words_and_none(device)
        table.cache[name] = Split(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], words, *numbers)
    found: Split = table.cache[name]
    return found


@lru_cache(maxsize=64)
def _selected(
    head_table: tuple[int, ...],
    kv_heads: int,
    shape: tuple[int, int, int],
    masked: bool,
    device: torch.device,
    at_once: int,
) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
    """(programs, places, numbers) of tables of a shape: every entry may be a page."""
    rows, number = shape[0] * shape[1], shape[2]
    none, every, first = np.zeros(rows, np.int64), np.full(rows, number), np.arange(rows) * number
    counts = (every, none) if masked else (none, every)
    units = query_units(head_table, kv_heads, 16, torch.device("cpu"))
    programs, places, numbers = _programs(units, shape[1], counts, (first, first), at_once)
    some, others = upload([_padded(programs), _padded(places)], device)
    return some, others, numbers


def _programs(
    units: tuple[Tensor, int, int], tiles: int, counts: tuple[Ints, Ints], first: tuple[Ints, Ints], at_once: int
) -> tuple[Ints, Ints, tuple[int, int, int, int]]:
    """(programs, places, numbers), see :class:`Split`.

    counts: PARTIAL and FULL visits of each row of the table. first: where these begin.
    """
    unit, heads = units[0].numpy().astype(np.int64), units[1]
    # A row of what follows is a (query, unit) pair, the units of a query beside each other.
    row = (unit[:, 0] * tiles + np.arange(tiles)[:, None]).ravel()
    part, visits = counts[0][row], (counts[0] + counts[1])[row]
    longest = max(-(-int(visits.sum()) // at_once), _SHORTEST)
    pieces = -(-visits // longest)
    slot = pieces.cumsum() - pieces
    owner = np.repeat(np.arange(len(row)), pieces)
    piece = concat_ranges(np.zeros_like(pieces), pieces)
    order = np.lexsort((owner, piece, owner // len(unit)))
    owner, piece = owner[order], piece[order]
    edges = [n * visits[owner] // pieces[owner] for n in (piece, piece + 1)]
    columns = [owner // len(unit), unit[owner % len(unit), 1], unit[owner % len(unit), 2], slot[owner] + piece]
    columns += [first[0][row][owner] + np.minimum(edge, part[owner]) for edge in edges]
    columns += [first[1][row][owner] + np.maximum(edge - part[owner], 0) for edge in edges]
    begins = slot[:, None] * heads + np.arange(heads)
    places = np.stack((begins, np.broadcast_to(pieces[:, None], begins.shape)), axis=2)
    numbers = len(owner), int(pieces.sum()) * heads, int(pieces.max(initial=0)), heads
    return np.stack(columns, axis=1), places, numbers


def _padded(array: NDArray[np.integer]) -> NDArray[np.int32]:
    """Flat, with an entry more at least, and a multiple of 4: so that there are fewer kinds of calls."""
    flat = np.zeros((array.size // 4 + 1) * 4, np.int32)
    flat[: array.size] = array.ravel()
    return flat


class How(NamedTuple):
    """How the kernel is launched.

    columns: keys that are multiplied at a time. stages: how many of these are on their way. warps: of a program.
    programs: of a multiprocessor, one after the other or at a time, all rows together.
    """

    columns: int = 64
    stages: int = 4
    warps: int = 4
    programs: int = 4


def decode(
    q: Tensor, sources: Sequence[Source], out: Tensor, lse: Tensor, scale: float, how: How | None = None
) -> None:
    """Writes out, in its dtype, and lse, in float32, of all rows."""
    how = how or How()
    at_once = how.programs * multiprocessors(q.device)
    sources = [source for source in sources if not source.table.is_empty]
    splits = [split(source.table, source.k.shape[1], q.device, at_once) for source in sources]
    if not sources:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    if q.stride(-1) != 1:
        q = q.contiguous()
    given = [q, out, lse]
    for source, work in zip(sources, splits, strict=True):
        assert source.k.stride(-1) == source.v.stride(-1) == 1
        bias = lse if source.bias is None else source.bias  # any pointer will do where none is read
        given += [source.k, source.v, bias, *work[:6]]
    tables = [(x.table.block_k, isinstance(x.table, SelectedTable), x.bias is None) for x in sources]
    key = scale, how, tuple(tables), *(work[6:] for work in splits)
    _LAUNCHES.run(given, key, lambda recording: _record(recording, sources, splits, scale, how))


def _record(recording: Recording, sources: Sequence[Source], splits: Sequence[Split], scale: float, how: How) -> None:
    """The launches, with the tensors of :func:`decode`."""
    q, out, lse, *rest = recording.parts
    v_dim = out.now.shape[2]
    dim_2, v_dim_2 = (max(16, triton.next_power_of_2(n)) for n in (q.now.shape[2], v_dim))
    columns, stages = how.columns, how.stages
    if q.now.dtype == torch.float32:
        columns, stages = min(columns, 32), min(stages, 2)
    slot_out = recording.temporary(sum(work.results for work in splits), v_dim)
    slot_lse = recording.temporary(sum(work.results for work in splits))
    bases, firsts, places = [0], [0], []
    arguments: list[Any] = []
    constants: dict[str, Any] = {}
    for number in range(3):
        i = min(number, len(sources) - 1)  # what is not there is never looked at
        source, work = sources[i], splits[i]
        k, v, bias, programs, here, *pages = rest[i * 9 : i * 9 + 9]
        strides = [n for x in (k, v, bias) for n in x.now.stride()[:2]]
        arguments += [k, v, bias, programs, *pages, bases[min(number, i)], *strides]
        block = source.table.block_k
        named = isinstance(source.table, SelectedTable)
        at_a_time = min(columns, max(16, triton.next_power_of_2(block)))
        values = block, at_a_time, -(-block // 32), work.heads, source.bias is not None, named
        names = "BLOCK", "COLUMNS", "WORDS", "HEADS", "BIAS", "NAMED"
        constants |= {f"{name}_{number}": value for name, value in zip(names, values, strict=True)}
        places.append(here)
        if number == i:
            bases.append(bases[-1] + work.results)
            firsts.append(firsts[-1] + work.launched)
    recording.launch(
        _decode, (firsts[-1],), q, slot_out, slot_lse, firsts[1], firsts[min(2, len(sources))], scale,
        *q.now.stride()[:2], *arguments, SOURCES=len(sources), **constants, ROWS=16, DIM=q.now.shape[2],
        DIM_2=dim_2, V_DIM=v_dim, V_DIM_2=v_dim_2, STAGES=stages, PRECISION=precision(q.now.dtype),
        num_warps=how.warps,
    )  # fmt: skip
    together = min(_TOGETHER, triton.next_power_of_2(max(work.most for work in splits)))
    heads = {name: value for name, value in constants.items() if name.startswith("HEADS")}
    recording.launch(
        _merge, tuple(lse.now.shape), out, lse, slot_out, slot_lse, *places, bases[1], bases[min(2, len(sources))],
        *out.now.stride()[:2], *lse.now.stride()[:2], SOURCES=len(sources), **heads, V_DIM=v_dim, V_DIM_2=v_dim_2,
        TOGETHER=together, num_warps=min(max(together // 16, 1), 8),
    )  # fmt: skip

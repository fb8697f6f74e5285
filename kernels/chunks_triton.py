"""Choosing chunks in Triton. What it means is said in chunks.py.

Scores are made in one kernel and the best are found in another, slice by slice of the rows, so that no more than a
slice of the scores is ever in memory. Where columns are chunks, the first one also notes the highest score of each
group of them, so that the other one needs to look at as many groups only as chunks are chosen. A row's weights need the
sum over its columns first: that kernel goes over them twice, since a sum that another kernel made may depend on how
that one cut its work, and with it on the number of ranks.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.chunks import added_up
from distattn.kernels.launching import Launches, Part, Recording, multiprocessors
from distattn.kernels.walk_triton import LOG2_E, LOWEST

if TYPE_CHECKING:
    from distattn.kernels.chunks import Choosers, Choosing

_LAUNCHES = Launches()
# Programs of a multiprocessor, where few rows are shared by all.
_EACH = 8
# Elements of the largest scratch tensor.
_SCRATCH = 1 << 27
# Columns at a time, with 64 rows of float32, and with 128 rows of 16 bits where products or masses are wanted.
_COLUMNS_WIDE, _COLUMNS, _COLUMNS_OF_MASS, _WARPS = 32, 64, 128, 4
# With a single row, which one program reads at once.
_COLUMNS_OF_ONE = 64
# Chunks of a group, whose highest score is looked at first.
_GROUP = 32
# Chunks that a program holds in registers; of more it reads the scores again and again.
_WIDEST = 1 << 15
_LOWEST_BITS = tl.constexpr(-(1 << 31))


@triton.jit
def _products(
    x, keys, bias, first, columns, scale, keys_n, bias_n, d, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    BIAS: tl.constexpr, INSIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of rows x and columns first ..; INSIDE: all of these exist."""
    c = first + tl.arange(0, COLUMNS)
    mask = d[None, :] < DIM
    if not INSIDE:
        mask = mask & (c < columns)[:, None]
    y = tl.load(keys + c.to(tl.int64)[:, None] * keys_n + d, mask=mask, other=0.0).to(x.dtype)
    s = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale
    if BIAS:
        s += tl.load(bias + c * bias_n, mask=c < columns, other=0.0)[None, :] * LOG2_E
    return s


@triton.jit
def _is_candidate(c, own, selectable, chunks, reach, CAUSAL: tl.constexpr):
    found = c < own - reach + 1
    if not CAUSAL:
        found |= c >= own + reach
    found &= c < chunks
    return found & (tl.load(selectable + c, mask=found, other=0) != 0)


@triton.jit
def _is_always(
    c, own, selectable, chunks, reach,
    CAUSAL: tl.constexpr, FIRST: tl.constexpr, OWN: tl.constexpr, PREVIOUS: tl.constexpr,
):  # fmt: skip
    """What is chosen in any case."""
    found = c < 0
    if FIRST:
        found |= (c == 0) & _is_candidate(c, own, selectable, chunks, reach, CAUSAL)
    if OWN:
        found |= c == own
    if PREVIOUS:
        found |= (c == own - 1) & (c >= 0)
    return found


@triton.jit
def _ordered(score, candidate):
    """uint32: scores as numbers of the same order, all above 0, and 0 for what is no candidate."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    bits = tl.where(bits < 0, ~bits, bits ^ _LOWEST_BITS).to(tl.uint32, bitcast=True)
    return tl.where(candidate, tl.maximum(bits, 1), 0)


@triton.jit(do_not_specialize=["n", "columns", "splits", "chunks", "reach"])
def _scores(
    rows, keys, bias, until, own, selectable, scores, highest, n, columns, splits, chunks, reach, scale, rows_n, rows_h,
    keys_n, keys_h, bias_n, bias_h, scores_t, scores_n, highest_t, highest_n,
    SHARE: tl.constexpr, SHARE_2: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr, DIM_2: tl.constexpr, MASS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr, FIRST: tl.constexpr, OWN: tl.constexpr, PREVIOUS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program (rows and a part of the columns, table); scores [tables, n, columns], those up to ``until``.

    If not MASS, also highest [tables, n, groups of columns]: of what may be chosen and is not chosen in any case.
    """
    block, table = tl.program_id(0) // splits, tl.program_id(1).to(tl.int64)
    r = tl.arange(0, TOKENS * SHARE_2)
    token = block * TOKENS + r // SHARE_2
    head = table * SHARE + r % SHARE_2
    there = (token < n) & (r % SHARE_2 < SHARE)
    d = tl.arange(0, DIM_2)
    at = rows + token.to(tl.int64)[:, None] * rows_n + head[:, None] * rows_h + d
    x = tl.load(at, mask=there[:, None] & (d < DIM), other=0.0)
    stop = tl.load(until + token, mask=there, other=0)
    kv_head = table * SHARE // GROUP
    keys += kv_head * keys_h
    bias += kv_head * bias_h
    out = block * TOKENS + tl.arange(0, TOKENS)
    scores += table * scores_t + out.to(tl.int64)[:, None] * scores_n
    column = tl.arange(0, COLUMNS)
    last = tl.max(stop, 0)
    if not MASS:
        group = tl.arange(0, COLUMNS // SIZE)
        highest += table * highest_t + out.to(tl.int64)[:, None] * highest_n
        mine = tl.load(own + out, mask=out < n, other=0)[:, None]
        for first in range(tl.program_id(0) % splits * COLUMNS, last, splits * COLUMNS):
            s = _products(
                x, keys, bias, first, columns, scale, keys_n, bias_n, d, COLUMNS, DIM, False, False, PRECISION
            )  # fmt: skip
            c = (first + column)[None, :]
            tl.store(scores + c, s, mask=(out < n)[:, None] & (c < columns))
            candidate = _is_candidate(c, mine, selectable, chunks, reach, CAUSAL)
            candidate &= _is_always(c, mine, selectable, chunks, reach, CAUSAL, FIRST, OWN, PREVIOUS) == 0
            best = tl.max(tl.reshape(_ordered(s, candidate), [TOKENS, COLUMNS // SIZE, SIZE]), 2)
            g = (first // SIZE + group)[None, :]
            tl.store(highest + g, best.to(tl.int32, bitcast=True), mask=(out < n)[:, None] & (g * SIZE < columns))
    else:
        scale = scale * LOG2_E
        # Up to here all rows have all columns: no column of these is masked.
        whole = tl.min(tl.where(there, stop, 1 << 30), 0) // COLUMNS * COLUMNS
        high = tl.full([TOKENS * SHARE_2], LOWEST, tl.float32)
        total = tl.zeros([TOKENS * SHARE_2], tl.float32)
        for first in range(0, whole, COLUMNS):
            s = _products(x, keys, bias, first, columns, scale, keys_n, bias_n, d, COLUMNS, DIM, BIAS, True, PRECISION)
            new_high = tl.maximum(high, tl.max(s, 1))
            total = total * tl.exp2(high - new_high) + tl.sum(tl.exp2(s - new_high[:, None]), 1)
            high = new_high
        for first in range(whole, last, COLUMNS):
            s = _products(x, keys, bias, first, columns, scale, keys_n, bias_n, d, COLUMNS, DIM, BIAS, False, PRECISION)
            s = tl.where((first + column)[None, :] < stop[:, None], s, float("-inf"))
            new_high = tl.maximum(high, tl.max(s, 1))
            total = total * tl.exp2(high - new_high) + tl.sum(tl.exp2(s - new_high[:, None]), 1)
            high = new_high
        lse = high + tl.log2(tl.where(total == 0.0, 1.0, total))
        lse = tl.where(there, lse, float("inf"))  # what does not exist weighs nothing
        for first in range(0, whole, COLUMNS):
            s = _products(x, keys, bias, first, columns, scale, keys_n, bias_n, d, COLUMNS, DIM, BIAS, True, PRECISION)
            s = tl.sum(tl.reshape(tl.exp2(s - lse[:, None]), [TOKENS, SHARE_2, COLUMNS]), 1)
            tl.store(scores + first + column, s, mask=(out < n)[:, None])
        for first in range(whole, last, COLUMNS):
            s = _products(x, keys, bias, first, columns, scale, keys_n, bias_n, d, COLUMNS, DIM, BIAS, False, PRECISION)
            c = first + column
            s = tl.where(c[None, :] < stop[:, None], s, float("-inf"))
            s = tl.sum(tl.reshape(tl.exp2(s - lse[:, None]), [TOKENS, SHARE_2, COLUMNS]), 1)
            tl.store(scores + c, s, mask=(out < n)[:, None] & (c < columns)[None, :])


@triton.jit(do_not_specialize=["chunks", "reach"])
def _scores_of_one(
    row, keys, own, selectable, scores, highest, columns, chunks, reach, scale, row_h, keys_n, keys_h, scores_t,
    highest_t,
    SHARE: tl.constexpr, SHARE_2: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    DIM_2: tl.constexpr, CAUSAL: tl.constexpr, FIRST: tl.constexpr, OWN: tl.constexpr, PREVIOUS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """As :func:`_scores` without MASS, for a single row, whose heads that choose together it adds up itself.

    Program (columns, table): all keys are read at once, and products are no matrix products, which would be filled with
    fifteen rows of nothing.
    """
    table = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, SHARE_2)
    d = tl.arange(0, DIM_2)
    at = row + (table * SHARE + head)[:, None] * row_h + d
    x = tl.sum(tl.load(at, mask=(head < SHARE)[:, None] & (d < DIM), other=0.0).to(tl.float32), 0)
    first = tl.program_id(0) * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    mine = tl.load(own)
    y_at = keys + (table * SHARE // GROUP) * keys_h + c.to(tl.int64)[:, None] * keys_n + d
    candidate = _is_candidate(c, mine, selectable, chunks, reach, CAUSAL)
    s = tl.sum(tl.load(y_at, mask=candidate[:, None] & (d < DIM), other=0.0).to(tl.float32) * x[None, :], 1) * scale
    tl.store(scores + table * scores_t + c, s, mask=candidate)
    candidate &= _is_always(c, mine, selectable, chunks, reach, CAUSAL, FIRST, OWN, PREVIOUS) == 0
    best = tl.max(tl.reshape(_ordered(s, candidate), [COLUMNS // SIZE, SIZE]), 1)
    g = first // SIZE + tl.arange(0, COLUMNS // SIZE)
    tl.store(highest + table * highest_t + g, best.to(tl.int32, bitcast=True), mask=g * SIZE < columns)


@triton.jit
def _sortable(
    scores, c, always, stop, own, selectable, chunks, reach,
    CAUSAL: tl.constexpr, PIECES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """uint32 of the shape of c, as :func:`_ordered`: of chunks that may be chosen and are not in any case."""
    candidate = _is_candidate(c, own, selectable, chunks, reach, CAUSAL) & (always == 0)
    total = tl.zeros(c.shape, tl.float32)
    for piece in tl.static_range(PIECES):
        for before in tl.static_range(OVERLAP):
            column = c * PIECES + (piece - before)
            total += tl.load(scores + column, mask=candidate & (column >= 0) & (column < stop), other=0.0)
    return _ordered(total, candidate)


@triton.jit
def _how_many(chosen):
    return tl.sum(chosen.to(tl.int32))  # over both axes at once: threads add up what is theirs first


@triton.jit(do_not_specialize=["chunks", "k", "reach"])
def _best(
    scores, own, until, selectable, found, chunks, k, reach, scores_t, scores_n, found_t, found_n,
    CAUSAL: tl.constexpr, FIRST: tl.constexpr, OWN: tl.constexpr, PREVIOUS: tl.constexpr, PIECES: tl.constexpr,
    OVERLAP: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, MOST: tl.constexpr,
    MOST_2: tl.constexpr,
):  # fmt: skip
    """Program (row, table). Halves the range of what the last number can be, until just as many are chosen.

    The range begins at a number that as many groups reach as chunks are wanted: few chunks are above it.
    """
    row = tl.program_id(0).to(tl.int64)
    table = tl.program_id(1).to(tl.int64)
    scores += table * scores_t + row * scores_n
    found += table * found_t + row * found_n
    mine = tl.load(own + row)
    stop = tl.load(until + row)
    WIDTH: tl.constexpr = GROUPS * SIZE
    here = tl.arange(0, GROUPS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    always = _is_always(here, mine, selectable, chunks, reach, CAUSAL, FIRST, OWN, PREVIOUS)
    bits = _sortable(scores, here, always, stop, mine, selectable, chunks, reach, CAUSAL, PIECES, OVERLAP)
    highest = tl.max(bits, 1)
    top = tl.max(highest, 0)
    left = k - _how_many(always)
    for part in range(1, PARTS):
        c = here + part * WIDTH
        always = _is_always(c, mine, selectable, chunks, reach, CAUSAL, FIRST, OWN, PREVIOUS)
        left -= _how_many(always)
        more = _sortable(scores, c, always, stop, mine, selectable, chunks, reach, CAUSAL, PIECES, OVERLAP)
        top = tl.maximum(top, tl.max(tl.max(more, 1), 0))
    left = tl.maximum(left, 0)
    # At least ``left`` are low or more, fewer are high or more.
    low = top * 0
    high = top + 1
    groups = left * 0 + GROUPS  # that reach ``low``
    while (groups > 2 * left) & (high - low > 1):
        middle = low + (high - low) // 2
        some = tl.sum((highest >= middle).to(tl.int32), 0)
        low = tl.where(some >= left, middle, low)
        high = tl.where(some >= left, high, middle)
        groups = tl.where(some >= left, some, groups)
    low = tl.where(left > 0, low, top + 1)
    high = top + 1
    count = left + 1
    while (count != left) & (high - low > 1):
        middle = low + (high - low) // 2
        count = _how_many(bits >= middle)
        for part in range(1, PARTS):
            c = here + part * WIDTH
            always = _is_always(c, mine, selectable, chunks, reach, CAUSAL, FIRST, OWN, PREVIOUS)
            more = _sortable(scores, c, always, stop, mine, selectable, chunks, reach, CAUSAL, PIECES, OVERLAP)
            count += _how_many(more >= middle)
        low = tl.where(count >= left, middle, low)
        high = tl.where(count >= left, high, middle)
    # All above the last number, and of those that equal it the lowest; 0 is none.
    spare = left - _how_many(bits > low)
    for part in range(1, PARTS):
        c = here + part * WIDTH
        always = _is_always(c, mine, selectable, chunks, reach, CAUSAL, FIRST, OWN, PREVIOUS)
        more = _sortable(scores, c, always, stop, mine, selectable, chunks, reach, CAUSAL, PIECES, OVERLAP)
        spare -= _how_many(more > low)
    place = 0
    for part in range(PARTS):
        c = here + part * WIDTH
        always = _is_always(c, mine, selectable, chunks, reach, CAUSAL, FIRST, OWN, PREVIOUS)
        if part > 0:
            bits = _sortable(scores, c, always, stop, mine, selectable, chunks, reach, CAUSAL, PIECES, OVERLAP)
        taken = bits > low
        if spare > 0:
            equal = (bits == low) & (bits > 0)
            taken |= equal & (_numbered(equal) <= spare)
            spare -= _how_many(equal)
        taken |= always
        at = place + _numbered(taken) - 1
        tl.store(found + at, c, mask=taken & (at < MOST))
        place += _how_many(taken)
    rest = tl.arange(0, MOST_2)
    tl.store(found + rest, tl.full([MOST_2], -1, tl.int32), mask=(rest >= place) & (rest < MOST))


@triton.jit
def _last_of_best(bits, left, top):
    """The highest number that at least ``left`` of bits, of which ``top`` is the highest, reach."""
    low = top * 0
    high = top + 1
    low = tl.where(left > 0, low, high)
    count = left + 1
    while (count != left) & (high - low > 1):
        middle = low + (high - low) // 2
        count = _how_many(bits >= middle)
        low = tl.where(count >= left, middle, low)
        high = tl.where(count >= left, high, middle)
    return low


@triton.jit(do_not_specialize=["chunks", "k", "reach"])
def _best_of_groups(
    scores, highest, own, until, selectable, found, chunks, k, reach, scores_t, scores_n, highest_t, highest_n,
    found_t, found_n,
    CAUSAL: tl.constexpr, FIRST: tl.constexpr, OWN: tl.constexpr, PREVIOUS: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, MOST: tl.constexpr, MOST_2: tl.constexpr,
):  # fmt: skip
    """Program (row, table); as :func:`_best`, from the highest of groups.

    The best are in as many groups as there are of them, those with the best highest score, the lower group if equal.
    """
    row = tl.program_id(0).to(tl.int64)
    table = tl.program_id(1).to(tl.int64)
    scores += table * scores_t + row * scores_n
    highest += table * highest_t + row * highest_n
    found += table * found_t + row * found_n
    mine = tl.load(own + row)
    stop = tl.load(until + row)
    group = tl.arange(0, GROUPS)
    tops = tl.load(highest + group, mask=group * SIZE < stop, other=0).to(tl.uint32, bitcast=True)
    ends = tl.arange(0, 2) * tl.maximum(mine - 1, 0)  # where a chunk can be that is chosen in any case, but for its own
    always = _is_always(ends, mine, selectable, chunks, reach, CAUSAL, FIRST, False, PREVIOUS)
    always &= (tl.arange(0, 2) == 0) | (ends > 0)
    left = k - _how_many(always)
    if OWN:
        left -= 1
    left = tl.maximum(left, 0)
    last = _last_of_best(tops, left, tl.max(tops, 0))
    equal = (tops == last) & (tops > 0)
    spare = left - _how_many(tops > last)
    wanted = (tops > last) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    if FIRST:
        wanted |= (group == 0) & _is_candidate(0, mine, selectable, chunks, reach, CAUSAL)
    if OWN:
        wanted |= group == mine // SIZE
    if PREVIOUS:
        wanted |= (group == (mine - 1) // SIZE) & (mine > 0)
    slot = tl.arange(0, MOST_2)
    number = tl.full([MOST_2], GROUPS, tl.int32)
    before = mine * 0 - 1
    for i in range(_how_many(wanted)):
        before = tl.min(tl.where(wanted & (group > before), group, GROUPS), 0)
        number = tl.where(slot == i, before, number)
    c = number[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    always = _is_always(c, mine, selectable, chunks, reach, CAUSAL, FIRST, OWN, PREVIOUS)
    bits = _sortable(scores, c, always, stop, mine, selectable, chunks, reach, CAUSAL, 1, 1)
    last = _last_of_best(bits, left, tl.max(tl.max(bits, 1), 0))
    equal = (bits == last) & (bits > 0)
    taken = (bits > last) | (equal & (_numbered(equal) <= left - _how_many(bits > last))) | always
    at = _numbered(taken) - 1
    tl.store(found + at, c, mask=taken & (at < MOST))
    tl.store(found + slot, tl.full([MOST_2], -1, tl.int32), mask=(slot >= _how_many(taken)) & (slot < MOST))


@triton.jit
def _numbered(chosen):
    """int32 [GROUPS, SIZE]: how many are chosen up to each, itself included."""
    by_group = tl.cumsum(chosen.to(tl.int32), 1)
    size = tl.sum(chosen.to(tl.int32), 1)
    return by_group + (tl.cumsum(size, 0) - size)[:, None]


def choose_chunks(
    by: Choosing, choosers: Choosers, keys: Tensor, bias: Tensor | None, selectable: Tensor, scale: float, few: bool
) -> Tensor:
    batch, count, *_ = choosers.rows.shape
    one = few and count == 1 and not by.mass
    if not one:
        by, choosers = added_up(by, choosers)
    rows, number, own, until = choosers
    heads, dim = rows.shape[2:]
    columns = keys.shape[1]
    tables = heads // by.share
    found = torch.empty((batch, tables, count, by.most), dtype=torch.int32, device=rows.device)
    if found.numel() == 0:
        return found
    rows, keys = (x if x.stride(3) == 1 else x.contiguous() for x in (rows, keys))
    allowed = selectable.view(torch.int8)
    how = _how(by, rows.dtype, few, one)
    step = max(how.tokens, min(_SCRATCH // max(tables * columns, 1), count) // how.tokens * how.tokens)
    scores = torch.empty((tables, step, columns), dtype=torch.float32, device=rows.device)
    groups = 0 if by.mass else triton.cdiv(columns, _GROUP)
    highest = torch.empty((tables, step, groups), dtype=torch.int32, device=rows.device)
    there = scores if bias is None else bias.float()  # any pointer will do where none is read
    for b in range(batch):
        for first in range(0, count, step):
            size = min(step, count - first)
            chunks = by.chunks_until(int(number[first + size - 1]))
            part = slice(first, first + size)
            given = rows[b, part], keys[b], there, until[part], own[part], allowed, scores, highest, found[b, :, part]
            _LAUNCHES.run(
                given,
                (by, chunks, scale, how, bias is not None),
                partial(_record, by, chunks, scale, how, bias is not None),
            )
    return found


class _How(NamedTuple):
    """tokens: of a program. columns: at a time. few: programs share the columns of the same rows, as many as there are
    multiprocessors to take them. one: there is a single row."""

    tokens: int
    columns: int
    few: bool
    one: bool


def _how(by: Choosing, dtype: torch.dtype, few: bool, one: bool) -> _How:
    if one:
        return _How(1, max(_COLUMNS_OF_ONE, _GROUP), few, one)
    wide = dtype == torch.float32
    rows = 16 if few else 64 if wide else 128
    columns = _COLUMNS_WIDE if wide else _COLUMNS_OF_MASS if by.mass and not wide else _COLUMNS
    return _How(max(1, rows // triton.next_power_of_2(by.share)), columns, few, one)


def _record(by: Choosing, chunks: int, scale: float, how: _How, biased: bool, recording: Recording) -> None:
    """The launches for a slice of the rows, with the tensors of :func:`choose_chunks`."""
    rows, keys, bias, until, own, allowed, scores, highest, found = recording.parts
    (size, heads, dim), (columns, kv_heads) = rows.now.shape, keys.now.shape[:2]
    tables = heads // by.share
    choice = _what_counts(by)
    group, wide_dim = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    if how.one:
        recording.launch(
            _scores_of_one, (triton.cdiv(chunks, how.columns), tables),
            rows, keys, own, allowed, scores, highest, columns, by.chunks, by.reach, scale, rows.now.stride(1),
            *keys.now.stride()[:2], scores.now.stride(0), highest.now.stride(0), SHARE=by.share,
            SHARE_2=triton.next_power_of_2(by.share), GROUP=group, COLUMNS=how.columns, DIM=dim, DIM_2=wide_dim,
            **choice, SIZE=_GROUP, num_warps=_WARPS,
        )  # fmt: skip
        _record_best_of_groups(recording, by, chunks, scores, highest, own, until, allowed, found)
        return
    programs = triton.cdiv(size, how.tokens) * tables
    splits = 1
    if not by.mass:
        blocks = triton.cdiv(chunks * by.pieces, how.columns)
        splits = max(1, min(blocks, triton.cdiv(_EACH * multiprocessors(own.now.device), programs)))
        if not how.few:
            splits = max(1, min(blocks // 4, 16))
    # Products and sums stay apart, so that a row's numbers are the same in loops with and without masks: which one it
    # is in depends on the rows beside it.
    recording.launch(
        _scores, (triton.cdiv(size, how.tokens) * splits, tables),
        rows, keys, bias, until, own, allowed, scores, highest, size, columns,
        splits, by.chunks, by.reach, scale, *rows.now.stride()[:2], *keys.now.stride()[:2], *bias.now.stride()[:2],
        *scores.now.stride()[:2], *highest.now.stride()[:2],
        SHARE=by.share, SHARE_2=triton.next_power_of_2(by.share), GROUP=group, TOKENS=how.tokens,
        COLUMNS=how.columns, DIM=dim, DIM_2=wide_dim, MASS=by.mass, BIAS=biased,
        PRECISION="tf32x3", **choice, SIZE=_GROUP, num_warps=_WARPS, num_stages=3 if how.few else 2,
        enable_fp_fusion=False,
    )  # fmt: skip
    if by.mass:
        record_best(recording, by, chunks, scores, own, until, allowed, found)
    else:
        _record_best_of_groups(recording, by, chunks, scores, highest, own, until, allowed, found)


def _record_best_of_groups(
    recording: Recording, by: Choosing, chunks: int, scores: Part, highest: Part, own: Part, until: Part,
    allowed: Part, found: Part,
) -> None:  # fmt: skip
    tables, size = found.now.shape[:2]
    groups = max(triton.next_power_of_2(triton.cdiv(chunks, _GROUP)), 2)
    recording.launch(
        _best_of_groups, (size, tables),
        scores, highest, own, until, allowed, found, chunks, by.k, by.reach,
        *scores.now.stride()[:2], *highest.now.stride()[:2], *found.now.stride()[:2], GROUPS=groups, SIZE=_GROUP,
        **_what_counts(by), MOST=by.most, MOST_2=triton.next_power_of_2(by.most),
        num_warps=min(max(groups // 512, 1), 8),
    )  # fmt: skip


def _what_counts(by: Choosing) -> dict[str, bool]:
    return {"CAUSAL": by.causal} | {name.upper(): name in by.always for name in ("first", "own", "previous")}


def record_best(
    recording: Recording, by: Choosing, chunks: int, scores: Part, own: Part, until: Part, allowed: Part, found: Part
) -> None:
    """Launches what finds the best of scores, as chunks.best. scores: [tables, rows or more, columns]."""
    tables, size = found.now.shape[:2]
    width = max(min(triton.next_power_of_2(chunks), _WIDEST), _GROUP)
    # A program alone on a multiprocessor is quicker with more threads.
    each = 2048 if size * tables > multiprocessors(own.now.device) else 512
    recording.launch(
        _best, (size, tables), scores, own, until, allowed, found, chunks, by.k, by.reach,
        *scores.now.stride()[:2], *found.now.stride()[:2],
        PIECES=by.pieces, OVERLAP=by.overlap, GROUPS=width // _GROUP, SIZE=_GROUP,
        PARTS=triton.cdiv(chunks, width), **_what_counts(by), MOST=by.most, MOST_2=triton.next_power_of_2(by.most),
        num_warps=min(max(width // each, 1), 16),
    )  # fmt: skip

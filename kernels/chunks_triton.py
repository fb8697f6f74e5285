"""Choosing chunks, and the summaries beside them, in Triton. What each means is said in chunks.py.

Scores are made in one kernel and the best are found in another, slice by slice of the rows, so that no more than a
slice of the scores is ever in memory. A row's weights need the sum over its columns first: that kernel goes over them
twice, since a sum that another kernel made may depend on how that one cut its work, and with it on the number of ranks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.walk_triton import LOG2_E, LOWEST

if TYPE_CHECKING:
    from distattn.kernels.chunks import Choosers, Choosing, Ladder

# Elements of the largest scratch tensor.
_SCRATCH = 1 << 27
# Columns at a time and warps, with 64 rows of float32 or 128 rows of 16 bits.
_COLUMNS_WIDE, _WARPS_WIDE, _COLUMNS, _WARPS = 32, 4, 128, 4
# Chunks whose best score is looked at first.
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
    y = tl.load(keys + c.to(tl.int64)[:, None] * keys_n + d, mask=mask, other=0.0)
    s = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale
    if BIAS:
        s += tl.load(bias + c * bias_n, mask=c < columns, other=0.0)[None, :] * LOG2_E
    return s


@triton.jit(do_not_specialize=["n", "columns", "splits"])
def _scores(
    rows, keys, bias, until, scores, n, columns, splits, scale, rows_n, rows_h, keys_n, keys_h, bias_n, bias_h,
    scores_t, scores_n,
    SHARE: tl.constexpr, SHARE_2: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr, DIM_2: tl.constexpr, MASS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (rows and a part of the columns, table); scores [tables, n, columns], those up to ``until``."""
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
        for first in range(tl.program_id(0) % splits * COLUMNS, last, splits * COLUMNS):
            s = _products(
                x, keys, bias, first, columns, scale, keys_n, bias_n, d, COLUMNS, DIM, False, False, PRECISION
            )  # fmt: skip
            c = first + column
            tl.store(scores + c, s, mask=(out < n)[:, None] & (c < columns)[None, :])
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
        found |= (c == 0) & _is_candidate(0, own, selectable, chunks, reach, CAUSAL)
    if OWN:
        found |= c == own
    if PREVIOUS:
        found |= (c == own - 1) & (c >= 0)
    return found


@triton.jit
def _sortable(
    scores, c, always, stop, own, selectable, chunks, reach,
    CAUSAL: tl.constexpr, PIECES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """uint32 of the shape of c: scores of chunks as numbers of the same order, all above 0, and 0 for what cannot be
    chosen, or need not be."""
    candidate = _is_candidate(c, own, selectable, chunks, reach, CAUSAL) & (always == 0)
    total = tl.zeros(c.shape, tl.float32)
    for piece in tl.static_range(PIECES):
        for before in tl.static_range(OVERLAP):
            column = c * PIECES + (piece - before)
            total += tl.load(scores + column, mask=candidate & (column >= 0) & (column < stop), other=0.0)
    bits = tl.where(total == 0.0, 0.0, total).to(tl.int32, bitcast=True)  # -0 equals 0
    bits = tl.where(bits < 0, ~bits, bits ^ _LOWEST_BITS).to(tl.uint32, bitcast=True)
    return tl.where(candidate, tl.maximum(bits, 1), 0)


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
def _numbered(chosen):
    """int32 [GROUPS, SIZE]: how many are chosen up to each, itself included."""
    by_group = tl.cumsum(chosen.to(tl.int32), 1)
    size = tl.sum(chosen.to(tl.int32), 1)
    return by_group + (tl.cumsum(size, 0) - size)[:, None]


def choose_chunks(
    by: Choosing, choosers: Choosers, keys: Tensor, bias: Tensor | None, selectable: Tensor, scale: float
) -> Tensor:
    rows, number, own, until = choosers
    batch, count, heads, dim = rows.shape
    columns, kv_heads = keys.shape[1:3]
    tables = heads // by.share
    found = torch.empty((batch, tables, count, by.most), dtype=torch.int32, device=rows.device)
    if found.numel() == 0:
        return found
    rows, keys = (x if x.stride(3) == 1 else x.contiguous() for x in (rows, keys))
    allowed = selectable.to(torch.int8)
    wide = rows.dtype == torch.float32
    dim_2, share_2 = max(16, triton.next_power_of_2(dim)), triton.next_power_of_2(by.share)
    tokens = max(1, (64 if wide else 128) // share_2)
    block, warps = (_COLUMNS_WIDE, _WARPS_WIDE) if wide else (_COLUMNS, _WARPS)
    step = max(tokens, min(_SCRATCH // max(tables * columns, 1), count) // tokens * tokens)
    scores = torch.empty((tables, step, columns), dtype=torch.float32, device=rows.device)
    there = scores if bias is None else bias.float()  # any pointer will do where none is read
    for b in range(batch):
        for first in range(0, count, step):
            size = min(step, count - first)
            chunks = by.chunks_until(int(number[first + size - 1]))
            splits = 1 if by.mass else max(1, min(chunks * by.pieces // (4 * block), 16))
            # Products and sums stay apart, so that a row's numbers are the same in loops with and without masks: which
            # one it is in depends on the rows beside it.
            _scores[(triton.cdiv(size, tokens) * splits, tables)](
                rows[b, first:], keys[b], there, until[first:], scores, size, columns, splits, scale,
                *rows.stride()[1:3], *keys.stride()[1:3], *there.stride()[:2], *scores.stride()[:2],
                SHARE=by.share, SHARE_2=share_2, GROUP=heads // kv_heads, TOKENS=tokens, COLUMNS=block, DIM=dim,
                DIM_2=dim_2, MASS=by.mass, BIAS=bias is not None, PRECISION="tf32x3", num_warps=warps,
                num_stages=2, enable_fp_fusion=False,
            )  # fmt: skip
            width = max(min(triton.next_power_of_2(chunks), _WIDEST), _GROUP)
            _best[(size, tables)](
                scores, own[first:], until[first:], allowed, found[b, :, first:], chunks, by.k, by.reach,
                *scores.stride()[:2], *found.stride()[1:3],
                CAUSAL=by.causal, FIRST="first" in by.always, OWN="own" in by.always, PREVIOUS="previous" in by.always,
                PIECES=by.pieces, OVERLAP=by.overlap, GROUPS=width // _GROUP, SIZE=_GROUP,
                PARTS=triton.cdiv(chunks, width), MOST=by.most, MOST_2=triton.next_power_of_2(by.most),
                num_warps=min(max(width // 2048, 1), 16),
            )  # fmt: skip
    return found


@triton.jit
def _bits_between(low, high, first, bits):
    """int32: of rows first .. first + bits - 1, bit by bit, which are at least ``low`` and less than ``high``."""
    one = (first * 0 + 1).to(tl.int64)
    below = (one << tl.minimum(tl.maximum(high - first, 0), bits).to(tl.int64)) - 1
    return (below & ~((one << tl.minimum(tl.maximum(low - first, 0), 32).to(tl.int64)) - 1)).to(tl.int32)


@triton.jit
def _pages_of_level(
    chosen, at, exists, sizes, pages_out, masks_out, n, most, count,
    RUNGS: tl.constexpr, LEVEL: tl.constexpr, LEVELS: tl.constexpr, CAUSAL: tl.constexpr,
    CHUNK: tl.constexpr, PAGE: tl.constexpr, WORDS: tl.constexpr, WORDS_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the pages of one level behind the ``count`` that are there; how many there are then."""
    word = tl.arange(0, WORDS_2)[None, :]
    bits = tl.minimum(PAGE - word * 32, 32)  # rows of a word
    chunk: tl.constexpr = RUNGS[LEVEL][0]
    length = tl.load(sizes + LEVEL * 2)
    row0 = tl.load(sizes + LEVEL * 2 + 1)
    members: tl.constexpr = RUNGS[LEVEL][3]
    low, end, begin, high = _seen(at, sizes, RUNGS, LEVEL, CAUSAL)
    stop = tl.load(sizes + LEVEL * 2 + 3) // PAGE
    for start in range(row0 // PAGE, stop, BLOCK):
        page = start + tl.arange(0, BLOCK)[:, None]
        row = page * PAGE + word * 32 - row0  # of the level
        visited = _bits_between(low, end, row, bits)
        if not CAUSAL:
            visited |= _bits_between(begin, high, row, bits)
        left_out = tl.zeros([BLOCK, WORDS_2], tl.int32)
        for j in range(n):
            token = tl.load(chosen + j) * CHUNK
            some = token >= 0
            mine = tl.where(some, token // chunk, -1)
            left_out |= _bits_between(mine, mine + 1, row, bits)
            if LEVEL + 1 < LEVELS:
                opened = some & (token < 0)
                for coarser in tl.static_range(LEVEL + 1, LEVELS):
                    low2, end2, begin2, high2 = _seen(at, sizes, RUNGS, coarser, CAUSAL)
                    index = token // RUNGS[coarser][0]
                    opened |= some & (index >= low2) & (index < end2)
                    if not CAUSAL:
                        opened |= some & (index >= begin2) & (index < high2)
                family = tl.where(opened, token // (chunk * members) * members, -members)
                visited |= _bits_between(family, tl.minimum(family + members, length), row, bits)
        inside = (page < stop) & (word < WORDS)
        there = tl.load(exists + page * WORDS + word, mask=inside, other=0)
        visited = tl.where(inside, visited & ~left_out & there, 0)
        some_page = tl.sum((visited != 0).to(tl.int32), 1) > 0
        place = count + tl.cumsum(some_page.to(tl.int32), 0) - 1
        some_page &= place < most
        tl.store(pages_out + place, start + tl.arange(0, BLOCK), mask=some_page)
        tl.store(masks_out + place[:, None] * WORDS + word, visited, mask=some_page[:, None] & inside)
        count += tl.sum(some_page.to(tl.int32), 0)
    return count


@triton.jit(do_not_specialize=["n", "most"])
def _summary_pages(
    chosen, position, exists, sizes, pages_out, masks_out, n, most,
    RUNGS: tl.constexpr, LEVELS: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
    PAGE: tl.constexpr, WORDS: tl.constexpr, WORDS_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tile, table): pages from the first to the last, some at a time.

    Of a chosen chunk the summary at each level is left out. If it would have been visited, or takes the place of one
    that would have been, its level's summaries in the coarser one take the place of that.
    """
    number = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    at = tl.load(position + tl.program_id(0)).to(tl.int32)
    chosen += number * n
    pages_out += number * most
    masks_out += number * most * WORDS
    word = tl.arange(0, WORDS_2)[None, :]
    count = 0
    for level in tl.static_range(LEVELS):
        count = _pages_of_level(
            chosen, at, exists, sizes, pages_out, masks_out, n, most, count, RUNGS, level, LEVELS, CAUSAL, CHUNK, PAGE,
            WORDS, WORDS_2, BLOCK,
        )  # fmt: skip
    for start in range(0, most, BLOCK):
        rest = start + tl.arange(0, BLOCK)
        none = (rest >= count) & (rest < most)
        tl.store(pages_out + rest, tl.full([BLOCK], -1, tl.int32), mask=none)
        empty = tl.zeros([BLOCK, WORDS_2], tl.int32)
        tl.store(masks_out + rest[:, None] * WORDS + word, empty, mask=none[:, None] & (word < WORDS))


@triton.jit
def _seen(at, sizes, RUNGS: tl.constexpr, LEVEL: tl.constexpr, CAUSAL: tl.constexpr):
    """The summaries of a level that a tile at a position visits if nothing is chosen: those from ``low`` to ``end`` - 1
    and, if not CAUSAL, from ``begin`` to ``high`` - 1."""
    chunk: tl.constexpr = RUNGS[LEVEL][0]
    length = tl.load(sizes + LEVEL * 2)
    reach: tl.constexpr = RUNGS[LEVEL][1]
    further: tl.constexpr = RUNGS[LEVEL][2]
    members: tl.constexpr = RUNGS[LEVEL][3]
    here = at // chunk
    low = here * 0
    high = low + length
    if further > 0:
        there = at // (chunk * members)
        low = tl.maximum((there - further + 1) * members, 0)
        high = tl.minimum((there + further) * members, length)
    return low, tl.minimum(here - reach + 1, length), tl.maximum(here + reach, low), high


@lru_cache(maxsize=64)
def _sizes(levels: tuple[tuple[int, int], ...], rows: int, device: torch.device) -> Tensor:
    """int32 [levels + 1, 2]: summaries of each level and where they begin in the buffer; and where it ends. Kept, so
    that only the first call waits until they are on the device."""
    return torch.tensor([*levels, (0, rows)], dtype=torch.int32, device=device)


def summary_pages(chosen: Tensor, position: Tensor, exists: Tensor, ladder: Ladder) -> tuple[Tensor, Tensor]:
    batch, tables, count, n = chosen.shape
    pages = torch.empty((batch, tables, count, ladder.most), dtype=torch.int32, device=chosen.device)
    masks = torch.empty((*pages.shape, 1, ladder.words), dtype=torch.int32, device=chosen.device)
    sizes = _sizes(tuple((x.summaries, x.first_row) for x in ladder.rungs), ladder.pages * ladder.page, chosen.device)
    if pages.numel():
        _summary_pages[(count, batch * tables)](
            chosen.contiguous(), position, exists, sizes, pages, masks, n, ladder.most,
            RUNGS=tuple((x.chunk, x.reach, x.further, x.members) for x in ladder.rungs), LEVELS=len(ladder.rungs),
            CAUSAL=ladder.causal, CHUNK=ladder.chunk, PAGE=ladder.page, WORDS=ladder.words,
            WORDS_2=triton.next_power_of_2(ladder.words),
            BLOCK=min(256, triton.next_power_of_2(max(ladder.pages, ladder.most))), num_warps=1,
        )  # fmt: skip
    return pages, masks

"""The summaries that are visited beside chosen chunks, in Triton. What that means is said in chunks.py."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.launching import Launches, Recording, multiprocessors

if TYPE_CHECKING:
    from distattn.kernels.chunks import Ladder

_LAUNCHES = Launches()


@triton.jit
def _bits_between(low, high, first, bits):
    """int32: of rows first .. first + bits - 1, bit by bit, which are at least ``low`` and less than ``high``."""
    one = (first * 0 + 1).to(tl.int64)
    below = (one << tl.minimum(tl.maximum(high - first, 0), bits).to(tl.int64)) - 1
    return (below & ~((one << tl.minimum(tl.maximum(low - first, 0), 32).to(tl.int64)) - 1)).to(tl.int32)


@triton.jit
def _pages_of_level(
    chosen, at, exists, sizes, page0, pages_out, masks_out, n, most, count,
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
        tl.store(pages_out + place, page0 + start + tl.arange(0, BLOCK), mask=some_page)
        tl.store(masks_out + place[:, None] * WORDS + word, visited, mask=some_page[:, None] & inside)
        count += tl.sum(some_page.to(tl.int32), 0)
    return count


@triton.jit(do_not_specialize=["n", "most"])
def _summary_pages(
    chosen, position, first, exists, sizes, pages_out, masks_out, n, most,
    RUNGS: tl.constexpr, LEVELS: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr, FIRST: tl.constexpr,
    PAGE: tl.constexpr, WORDS: tl.constexpr, WORDS_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tile, table): pages from the first to the last, some at a time.

    Of a chosen chunk the summary at each level is left out. If it would have been visited, or takes the place of one
    that would have been, its level's summaries in the coarser one take the place of that.
    """
    number = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    at = tl.load(position + tl.program_id(0)).to(tl.int32)
    page0 = 0
    if FIRST:
        page0 = tl.load(first + tl.program_id(0))
    chosen += number * n
    pages_out += number * most
    masks_out += number * most * WORDS
    word = tl.arange(0, WORDS_2)[None, :]
    count = 0
    for level in tl.static_range(LEVELS):
        count = _pages_of_level(
            chosen, at, exists, sizes, page0, pages_out, masks_out, n, most, count, RUNGS, level, LEVELS, CAUSAL, CHUNK,
            PAGE, WORDS, WORDS_2, BLOCK,
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


def summary_pages(
    chosen: Tensor, position: Tensor, exists: Tensor, ladder: Ladder, first_page: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    pages = torch.empty((*chosen.shape[:3], ladder.most), dtype=torch.int32, device=chosen.device)
    masks = torch.empty((*pages.shape, 1, ladder.words), dtype=torch.int32, device=chosen.device)
    sizes = _sizes(tuple((x.summaries, x.first_row) for x in ladder.rungs), ladder.pages * ladder.page, chosen.device)
    if pages.numel():
        begins = position if first_page is None else first_page  # any pointer will do where none is read
        given = chosen.contiguous(), position, begins, exists, sizes, pages, masks
        numbers = first_page is not None, tuple(ladder.rungs), ladder[1:]
        _LAUNCHES.run(given, numbers, partial(_record, ladder, first_page is not None))
    return pages, masks


def _record(ladder: Ladder, first: bool, recording: Recording) -> None:
    chosen, *rest = recording.parts
    batch, tables, count, n = chosen.now.shape
    block = min(512, triton.next_power_of_2(max(ladder.pages, ladder.most)))
    # A program alone on a multiprocessor is quicker with more threads.
    alone = count * batch * tables <= multiprocessors(chosen.now.device)
    recording.launch(
        _summary_pages, (count, batch * tables), chosen, *rest, n, ladder.most,
        RUNGS=tuple((x.chunk, x.reach, x.further, x.members) for x in ladder.rungs), LEVELS=len(ladder.rungs),
        CAUSAL=ladder.causal, CHUNK=ladder.chunk, FIRST=first, PAGE=ladder.page, WORDS=ladder.words,
        WORDS_2=triton.next_power_of_2(ladder.words),
        BLOCK=block if alone else min(block, 256), num_warps=max(block // 32, 1) if alone else 1,
    )  # fmt: skip

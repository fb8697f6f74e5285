"""Chunks that query tiles choose by their scores, and the summaries that are visited beside what was chosen.

On GPUs these are kernels in Triton (chunks_triton.py, summary_pages_triton.py), elsewhere PyTorch operations. Both keep
to one definition, in which neither the number of ranks nor other rows have a part: what a row chooses depends on its
own numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distattn.kernels.attention import accumulator_dtype
from distattn.spans import Ints

# Elements of the largest scratch tensor on a CPU.
_SCRATCH = 1 << 22


class Choosing(NamedTuple):
    """How chunks are chosen.

    chunks: of the sequence. k: how many a row chooses, those of ``always`` included. reach: chunks of the window; a
        row whose own chunk is c chooses among those before c - reach + 1 and, if not ``causal``, from c + reach on.
    always: what is chosen in any case: "first" (if it is among these), "own", "previous".
    mass: columns are summaries, and a chunk's score is their weight in a softmax; else columns are chunks, and their
        scores are products.
    pieces: columns from one chunk to the next. overlap: in how many pieces a column counts.
    share: query heads that choose together; their weights are added up, or else their products. rows: that choose, in
        a chunk.
    """

    chunks: int
    k: int
    reach: int
    causal: bool
    always: tuple[str, ...]
    mass: bool
    pieces: int
    overlap: int
    share: int
    rows: int

    @property
    def most(self) -> int:
        """No row chooses more."""
        return min(max(self.k, len(set(self.always))), self.chunks)

    def chunks_until(self, last: int) -> int:
        """Chunks that rows up to number ``last`` may look at."""
        return min(last // self.rows + 1, self.chunks) if self.causal else self.chunks


class Choosers(NamedTuple):
    """The rows that choose.

    rows: [batch, n, heads, dim]. number: int64 [n], on the host, ascending: their places in the sequence. own: int32
    [n], the chunk that a row is in. until: int32 [n], how many columns there are for a row, the others follow them.
    """

    rows: Tensor
    number: Ints
    own: Tensor
    until: Tensor


def choose_chunks(
    by: Choosing,
    choosers: Choosers,
    keys: Tensor,
    bias: Tensor | None,
    selectable: Tensor,
    scale: float,
    few: bool = False,
) -> Tensor:
    """int32 [batch, heads / share, n, most]: the chunks of each row, ascending, then -1. Ties go to the lower chunk.

    Args:
        by, choosers: see there.
        keys: [batch, columns, kv_heads, dim], rounded to the dtype of the rows, or of their sums; query head h reads
            h // (heads // kv_heads).
        bias: [columns, kv_heads], added to the scores of a column, -inf for one that is not there; with ``mass`` only.
        selectable: bool [chunks]: which may be chosen at all.
        scale: factor of the scores.
        few: the rows are few, and the same on all ranks; on GPUs programs then share them.
    """
    if choosers.rows.is_cuda and choosers.rows.dtype != torch.float64:
        from distattn.kernels import chunks_triton

        return chunks_triton.choose_chunks(by, choosers, keys, bias, selectable, scale, few)
    by, (rows, number, own, until) = added_up(by, choosers)
    batch, count, heads, _ = rows.shape
    kv_heads = keys.shape[2]
    dtype = accumulator_dtype(rows.dtype)
    turned = keys.to(rows.dtype).to(dtype).permute(0, 2, 3, 1).contiguous()  # [batch, kv_heads, dim, columns]
    # A row has the same place in a slice of the same shape on every rank: products of others are rounded otherwise.
    step = min(max(_SCRATCH // max(heads * keys.shape[1], 1), 16), by.chunks * by.rows)
    step = 2 ** math.ceil(math.log2(step))
    found = torch.empty((batch, heads // by.share, count, by.most), dtype=torch.int32, device=rows.device)
    edges = [0, *(np.flatnonzero(np.diff(number // step)) + 1).tolist(), count] if count else []
    for first, stop in pairwise(edges):
        before = int(number[first]) // step * step
        inside = torch.from_numpy(number[first:stop] - before).to(rows.device)
        some = rows.new_zeros((batch, step, *rows.shape[2:]), dtype=dtype)
        some[:, inside] = rows[:, first:stop].to(dtype)
        grouped = some.unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        chunks = by.chunks_until(before + step - 1)
        scores = torch.matmul(grouped, turned[..., : chunks * by.pieces]).mul_(scale).unflatten(2, (-1, step))
        scores = scores.flatten(1, 2)[:, :, inside]  # [batch, heads, rows, columns]
        if by.mass:
            scores = _masses(scores, by, chunks, until[first:stop], bias)
        found[:, :, first:stop] = best(scores, by, own[first:stop], selectable)
    return found


def added_up(by: Choosing, choosers: Choosers) -> tuple[Choosing, Choosers]:
    """Rows for heads that choose together by products, one for all of these: the sum of products with one key is the
    product with the sum, which is in the accumulator's dtype."""
    if by.mass or by.share == 1:
        return by, choosers
    rows = choosers.rows
    summed = rows.unflatten(2, (-1, by.share)).sum(3, dtype=accumulator_dtype(rows.dtype))
    return by._replace(share=1), choosers._replace(rows=summed)


def _masses(scores: Tensor, by: Choosing, chunks: int, until: Tensor, bias: Tensor | None) -> Tensor:
    """Weights of a softmax over columns, as those of chunks: [batch, heads, rows, columns] to [.., heads / share, ..,
    chunks]. Overwrites the scores."""
    heads, columns = scores.shape[1], scores.shape[3]
    if bias is not None:
        scores += bias[:columns].T.repeat_interleave(heads // bias.shape[1], 0).unsqueeze(1)
    there = torch.arange(columns, device=scores.device) < until[:, None]
    scores.masked_fill_(~there, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    weights = weights.unflatten(1, (-1, by.share)).sum(2)  # first, since what follows is linear
    if by.overlap > 1:
        weights = F.pad(weights, (by.overlap - 1, by.overlap - 1)).unfold(-1, by.overlap, 1).sum(-1)
    wanted = chunks * by.pieces
    weights = F.pad(weights, (0, max(wanted - weights.shape[-1], 0)))[..., :wanted]
    found: Tensor = weights.unflatten(-1, (chunks, by.pieces)).sum(-1)
    return found


def best(scores: Tensor, by: Choosing, own: Tensor, selectable: Tensor) -> Tensor:
    """The chosen chunks, ascending, then -1: int32 [batch, tables, rows, most].

    scores: [batch, tables, rows, chunks up to some]. own, selectable: as in :func:`choose_chunks`.
    """
    chunks = scores.shape[-1]
    candidates, always = _candidates(by, own, selectable[:chunks])
    left = (by.k - always.sum(1, keepdim=True)).clamp_min(0)
    scores = scores.masked_fill(~(candidates & ~always), -math.inf)
    # All above the last one that is chosen, and of those that equal it the lowest.
    last = scores.topk(min(by.k, chunks), dim=-1).values
    last = last.gather(-1, (left - 1).clamp(0, last.shape[-1] - 1).expand(*last.shape[:-1], 1))
    above, equal = scores > last, (scores == last) & (scores > -math.inf)
    taken = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left - above.sum(-1, keepdim=True)))
    taken = (taken & (left > 0)) | always
    number = torch.arange(chunks, device=scores.device, dtype=torch.int32)
    lowest = torch.where(taken, chunks - number, 0).topk(min(by.most, chunks), dim=-1).values
    found = torch.where(lowest > 0, chunks - lowest, -1).int()
    return F.pad(found, (0, by.most - found.shape[-1]), value=-1)


def _candidates(by: Choosing, own: Tensor, selectable: Tensor) -> tuple[Tensor, Tensor]:
    """bool [rows, chunks]: which chunks there are to choose from, and which are chosen in any case."""
    number, own = torch.arange(len(selectable), device=own.device), own[:, None]
    found = number < own - by.reach + 1
    if not by.causal:
        found = found | (number >= own + by.reach)
    found = found & selectable
    always = torch.zeros_like(found)
    if "first" in by.always:
        always |= found & (number == 0)
    if "own" in by.always:
        always |= number == own
    if "previous" in by.always:
        always |= number == own - 1
    return found, always


class Rung(NamedTuple):
    """A level of summaries in the summary buffer.

    chunk: tokens of a summary. summaries: how many. first_row: of the buffer. reach: of the level below, in chunks of
    this one. further: its own, in chunks of the next level; 0 for the last. members: its summaries in one of the next.
    """

    chunk: int
    summaries: int
    first_row: int
    reach: int
    further: int
    members: int


class Ladder(NamedTuple):
    """All levels from the lowest on, and the pages of their buffer.

    chunk: tokens of what is chosen. page: rows. pages: of the buffer. most: no tile visits more of them.
    """

    rungs: Sequence[Rung]
    causal: bool
    chunk: int
    page: int
    pages: int
    most: int

    @property
    def words(self) -> int:
        """Of a page's mask, 32 rows each."""
        return -(-self.page // 32)


def summary_pages(
    chosen: Tensor, position: Tensor, exists: Tensor, ladder: Ladder, first_page: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What is visited of the summary buffer beside the chosen chunks, so that every token counts once.

    Under its level's reach a summary is visited unless a chosen chunk lies in it; then its members are instead, as far
    as no chosen chunk lies in them, and so on.

    Args:
        chosen: int32 [batch, tables, tiles, n], chunks or -1.
        position: int32 [tiles], of a tile's first query; all its queries see the same levels.
        exists: int32 [pages, words], bits of the rows of the buffer that are summaries.
        first_page: int32 [tiles], the page with which each one's buffer begins; 0 if None.

    Returns:
        pages int32 [batch, tables, tiles, most], ascending, then -1, and masks int32 [.., most, 1, words] of them.
    """
    if chosen.is_cuda:
        from distattn.kernels import summary_pages_triton

        return summary_pages_triton.summary_pages(chosen, position, exists, ladder, first_page)
    batch, tables, count, _ = chosen.shape
    pages = torch.full((batch, tables, count, ladder.most), -1, dtype=torch.int32)
    masks = torch.zeros((batch, tables, count, ladder.most, 1, ladder.words), dtype=torch.int32)
    step = max(1, _SCRATCH // (ladder.pages * ladder.page * tables))
    number = torch.arange(ladder.pages, dtype=torch.int32)
    most = min(ladder.most, ladder.pages)
    for b in range(batch):
        for first in range(0, count, step):
            some = slice(first, first + step)
            bits = _visited_rows(chosen[b, :, some], position[some], ladder).unflatten(-1, (-1, ladder.page))
            packed = packed_bits(bits, ladder.words) & exists
            order = torch.where((packed != 0).any(-1), ladder.pages - number, 0).topk(most, dim=-1).values
            page = torch.where(order > 0, ladder.pages - order, 0)
            begins = 0 if first_page is None else first_page[some, None]
            pages[b, :, some, :most] = torch.where(order > 0, page + begins, -1).int()
            index = page.long().unsqueeze(-1).expand(*page.shape, ladder.words)
            masks[b, :, some, :most, 0] = packed.gather(-2, index)
    return pages, masks


def packed_bits(bits: Tensor, words: int) -> Tensor:
    """bool [..., n] as int32 [..., words], bit i % 32 of word i // 32."""
    bits = F.pad(bits, (0, words * 32 - bits.shape[-1])).unflatten(-1, (words, 32))
    return (bits * (1 << torch.arange(32))).sum(-1).to(torch.int32)


def _visited_rows(chosen: Tensor, position: Tensor, ladder: Ladder) -> Tensor:
    """bool [tables, tiles, rows of the buffer], from the chunks [tables, tiles, n] that tiles chose."""
    rows = torch.zeros((*chosen.shape[:2], ladder.pages * ladder.page), dtype=torch.bool)
    opened: Tensor | None = None  # of the coarser level: summaries whose place their members take
    for rung in reversed(ladder.rungs):
        seen = _seen(rung, position, ladder.causal).expand(len(chosen), -1, -1)
        if opened is not None:
            seen = seen | opened.repeat_interleave(rung.members, dim=-1)[..., : rung.summaries]
        holds = torch.zeros((*chosen.shape[:2], rung.summaries + 1), dtype=torch.bool)
        parent = torch.where(chosen < 0, rung.summaries, chosen.long() * ladder.chunk // rung.chunk)
        holds = holds.scatter_(-1, parent, True)[..., :-1]
        rows[..., rung.first_row : rung.first_row + rung.summaries] = seen & ~holds
        opened = seen & holds
    return rows


def _seen(rung: Rung, position: Tensor, causal: bool) -> Tensor:
    """bool [tiles, count]: the summaries of a level that tiles visit if nothing is chosen."""
    index = torch.arange(rung.summaries)
    at = (position // rung.chunk)[:, None]
    found = index < at - rung.reach + 1
    if not causal:
        found = found | (index >= at + rung.reach)
    if rung.further:
        at = (position // (rung.chunk * rung.members))[:, None]
        found = found & (index // rung.members >= at - rung.further + 1)
        if not causal:
            found = found & (index // rung.members < at + rung.further)
    return found

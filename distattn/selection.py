"""Chunks chosen by the data, and the tables of what is then visited.

Scores are float32 (float64 for float64 inputs) and made in slices of the same shape and place wherever rows lie, so
that choices do not depend on the number of ranks. Nothing here has a gradient.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distattn.extras import AttentionExtras
from distattn.hierarchy import Hierarchy, Level
from distattn.kernels.attention import accumulator_dtype
from distattn.kernels.rows import chunk_means
from distattn.plan import Plan
from distattn.spans import Ints
from distattn.summaries import Pooled, mean_keys

# Elements of the largest scratch tensor while scores and tables are made.
_SCRATCH = {"cpu": 1 << 22, "cuda": 1 << 26}


class Tables(NamedTuple):
    """pages: int32 [batch, tables, tiles, n], -1: none. masks: int32 [batch, tables, tiles, n, 1, words] or None."""

    pages: Tensor
    masks: Tensor | None


@torch.no_grad()
def choose(q: Tensor, k: Tensor, levels: list[Pooled], plan: Plan, extras: AttentionExtras, scale: float) -> Tensor:
    """int32 [batch, tables, tiles, most]: the chunks that this rank's query tiles choose, ascending, then -1.

    tables: key/value heads, or query heads (``TopChunks.heads``); tiles: tokens, or chunks of them (``per``).
    """
    hierarchy, select = plan.hierarchy, plan.spec.select
    assert hierarchy is not None and select is not None
    if select.score == "mass" or hierarchy.level_is_chunks:
        keys = levels[0].keys
    else:
        keys = mean_keys(k, plan, extras)
    rows, numbers = _scoring_rows(q, plan)
    share = plan.heads // hierarchy.kv_heads
    if select.score == "mean" and select.heads == "kv" and share > 1:
        # The sum of products with one key is the product with the sum.
        rows = rows.unflatten(2, (hierarchy.kv_heads, share)).sum(3, dtype=accumulator_dtype(q.dtype))
        share = 1
    keys = keys.to(rows.dtype).permute(0, 2, 3, 1).contiguous()  # [batch, kv_heads, head_dim, summaries]
    batch, count, heads, _ = rows.shape
    slice_rows = _slice_rows(_SCRATCH[q.device.type], heads * keys.shape[3], hierarchy)
    most = min(max(select.k, len(set(select.always))), hierarchy.chunks)
    found = torch.empty((batch, max(hierarchy.head_table) + 1, count, most), dtype=torch.int32, device=q.device)
    edges = [0, *(np.flatnonzero(np.diff(numbers // slice_rows)) + 1).tolist(), count] if count else []
    for first, stop in pairwise(edges):
        number = int(numbers[first]) // slice_rows
        # A slice has the same place for a row on every rank; those of other ranks stay zeros.
        inside = torch.from_numpy(numbers[first:stop] - number * slice_rows).to(q.device)
        some = rows.new_zeros((batch, slice_rows, *rows.shape[2:]))
        some[:, inside] = rows[:, first:stop]
        grouped = some.unflatten(2, (hierarchy.kv_heads, share)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        tile = torch.arange(slice_rows, device=q.device) + number * slice_rows
        # Of a causal spec no more chunks than come before the last tile of the slice.
        until = hierarchy.chunks
        if hierarchy.causal:
            last = (number + 1) * slice_rows - 1
            until = min(until, (last // hierarchy.chunk if hierarchy.tile == 1 else last) + 1)
        seen = until if select.score == "mean" else keys.shape[3]
        scores = _product(grouped, keys[..., :seen]).mul_(scale).unflatten(2, (slice_rows, share))
        if select.score == "mass":
            if plan.spec.summaries[0].bias != "none":
                scores += levels[0].bias.T[None, :, None, None]
            scores = _masses(scores, tile, plan)[..., :until]
        if hierarchy.chooses_by_tile_before and number == 0:
            scores[:, :, 0] = 0.0  # there is no tile before the first
        scores = scores.sum(3) if select.heads == "kv" else scores.transpose(2, 3).flatten(1, 2)
        found[:, :, first:stop] = _best(scores, tile, most, hierarchy)[:, :, inside]
    return found


def _slice_rows(scratch: int, width: int, hierarchy: Hierarchy) -> int:
    """Tiles that are scored together, ``width`` scores each; the same on all ranks."""
    tiles = hierarchy.length if hierarchy.tile == 1 else hierarchy.chunks
    rows = min(max(scratch // width, 16), tiles)
    return int(2 ** math.ceil(math.log2(rows)))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [batch, heads, rows, dim] times b [batch, heads, dim, n] in the accumulator's dtype."""
    if a.dtype == accumulator_dtype(a.dtype):
        whole: Tensor = torch.matmul(a, b)
        return whole
    if a.is_cuda:  # 16-bit factors, and sums that are not rounded
        flat: Tensor = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return flat.view(*a.shape[:3], b.shape[3])
    return torch.matmul(a.float(), b.float())


def _scoring_rows(q: Tensor, plan: Plan) -> tuple[Tensor, Ints]:
    """([batch, n, heads, head_dim], int64 [n]): what scores for each of this rank's tiles, and the tiles' numbers.

    Queries as they are, or their means in the accumulator's dtype.
    """
    hierarchy = plan.hierarchy
    assert hierarchy is not None
    if hierarchy.tile == 1:
        return q, hierarchy.positions
    numbers = hierarchy.my_selectable
    means, _ = chunk_means(q, hierarchy.chunk)
    if not hierarchy.chooses_by_tile_before:
        return means, numbers
    known, rows = numbers, means
    if hierarchy.tile_before is not None:
        (others,) = torch.ops.distattn.gather_rows([means], plan.name, "tiles")
        known, rows = np.concatenate((numbers, hierarchy.tile_before[1])), torch.cat((means, others), dim=1)
    if len(numbers) == 0:
        return means, numbers
    order = np.argsort(known, kind="stable")
    index = order[np.searchsorted(known[order], np.maximum(numbers - 1, 0))]
    return rows[:, torch.from_numpy(index).to(q.device)], numbers


def _masses(scores: Tensor, tile: Tensor, plan: Plan) -> Tensor:
    """Weights of a softmax over summaries, as those of chunks; overwrites the scores.

    [batch, kv_heads, tiles, share, summaries] to [batch, kv_heads, tiles, share, chunks]; with one choice for the heads
    that share a key/value head the sum of theirs, share 1.
    """
    hierarchy = plan.hierarchy
    assert hierarchy is not None
    level, chunk = hierarchy.levels[0], hierarchy.chunk
    visible = level.on(scores.device, "exists").expand(len(tile), -1)
    if hierarchy.causal:
        end = tile + 1 if hierarchy.tile == 1 else tile * chunk
        visible = visible & (level.on(scores.device, "stop") <= end[:, None])
    visible = visible[:, None]
    weights = torch.softmax(scores.masked_fill_(~visible, -1e30), dim=-1)
    if plan.spec.select is not None and plan.spec.select.heads == "kv":
        weights = weights.sum(3, keepdim=True)  # first, since what follows is linear
    weights = weights * visible.any(-1, keepdim=True)
    overlap = level.chunk // level.stride
    if overlap > 1:
        weights = F.pad(weights, (overlap - 1, overlap - 1)).unfold(-1, overlap, 1).sum(-1)
    pieces = chunk // level.stride
    weights = F.pad(weights, (0, max(hierarchy.chunks * pieces - weights.shape[-1], 0)))
    found: Tensor = weights[..., : hierarchy.chunks * pieces].unflatten(-1, (hierarchy.chunks, pieces)).sum(-1)
    return found


def _best(scores: Tensor, tile: Tensor, most: int, hierarchy: Hierarchy) -> Tensor:
    """The chosen chunks of scores [batch, tables, tiles, chunks]: [batch, tables, tiles, most]."""
    select = hierarchy.spec.select
    assert select is not None
    candidates, always = (x[:, : scores.shape[-1]] for x in _candidates(tile, hierarchy))
    left = (select.k - always.sum(1, keepdim=True)).clamp_min(0)
    scores = scores.masked_fill(~(candidates & ~always), -math.inf)
    # All above the last one that is chosen, and of those that equal it the lowest.
    last = scores.topk(min(select.k, scores.shape[-1]), dim=-1).values
    last = last.gather(-1, (left - 1).clamp(0, last.shape[-1] - 1).expand(*last.shape[:-1], 1))
    above, equal = scores > last, (scores == last) & (scores > -math.inf)
    taken = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left - above.sum(-1, keepdim=True)))
    taken = (taken & (left > 0)) | always
    number = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.int32)
    chunks = scores.shape[-1]
    lowest = torch.where(taken, chunks - number, 0).topk(min(most, chunks), dim=-1).values
    return F.pad(torch.where(lowest > 0, chunks - lowest, -1).int(), (0, most - lowest.shape[-1]), value=-1)


def _candidates(tile: Tensor, hierarchy: Hierarchy) -> tuple[Tensor, Tensor]:
    """bool [tiles, chunks]: which chunks there are to choose from, and which are chosen in any case."""
    select = hierarchy.spec.select
    assert select is not None
    number = torch.arange(hierarchy.chunks, device=tile.device)
    own = (tile // hierarchy.chunk if hierarchy.tile == 1 else tile)[:, None]
    reach = hierarchy.window[1]
    found = number < own - reach + 1
    if not hierarchy.causal:
        found = found | (number >= own + reach)
    found = found & hierarchy.on(tile.device, "selectable")
    always = torch.zeros_like(found)
    if "first" in select.always:
        always |= found & (number == 0)
    if "own" in select.always:
        always |= number == own
    if "previous" in select.always:
        always |= number == own - 1
    return found, always


def wanted_chunks(chosen: Tensor, hierarchy: Hierarchy) -> Tensor:
    """bool [kv_heads, chunks]: what is chosen by some tile of this rank."""
    batch, tables = chosen.shape[:2]
    found = torch.zeros((tables, hierarchy.chunks + 1), dtype=torch.bool, device=chosen.device)
    index = torch.where(chosen < 0, hierarchy.chunks, chosen).long().transpose(0, 1).flatten(1)
    found.scatter_(1, index, True)
    by_head: Tensor = found[:, :-1].unflatten(0, (hierarchy.kv_heads, -1)).any(1)
    return by_head


def chosen_table(chosen: Tensor, slots: Tensor, plan: Plan) -> Tables:
    """Where the chosen chunks lie: among the rank's own pages, or its guests (``slots`` of fetch_pages)."""
    hierarchy = plan.hierarchy
    assert hierarchy is not None
    chunk = hierarchy.chunk
    own_pages = -(-plan.tokens // chunk)
    own = hierarchy.on(chosen.device, "own_page")
    place = torch.where(own >= 0, own, slots.long() + own_pages)  # [kv_heads, chunks]
    head = torch.arange(chosen.shape[1], device=chosen.device) // (chosen.shape[1] // hierarchy.kv_heads)
    at = chosen.clamp_min(0).long()
    pages = place[head[None, :, None, None], at]
    pages = torch.where(chosen < 0, -1, pages).int()
    return Tables(pages, _chosen_masks(chosen, plan))


def _chosen_masks(chosen: Tensor, plan: Plan) -> Tensor | None:
    """Leaves out global keys, what is beyond the end, and of a token's own chunk what follows the token."""
    hierarchy, select = plan.hierarchy, plan.spec.select
    assert hierarchy is not None and select is not None
    chunk, chunks = hierarchy.chunk, hierarchy.chunks
    own = hierarchy.causal and "own" in select.always
    whole = plan.seq_len % chunk == 0 and not len(hierarchy.left_out)
    if whole and not own:
        return None
    allowed = np.zeros(chunks * chunk, np.bool_)
    allowed[: plan.seq_len] = True
    allowed[hierarchy.left_out] = False
    words = -(-chunk // 32)
    packed = np.zeros((chunks, words), np.uint32)
    bits = np.packbits(allowed.reshape(chunks, chunk), axis=-1, bitorder="little")
    packed.view(np.uint8)[:, : bits.shape[1]] = bits
    masks = torch.from_numpy(packed.view(np.int32)).to(chosen.device)[chosen.clamp_min(0).long()]
    if own:
        position = hierarchy.on(chosen.device, "positions")
        first = 32 * torch.arange(words, device=chosen.device)
        until = (position % chunk + 1)[:, None] - first
        causal = ((1 << until.clamp(0, 32)) - 1).to(torch.int32)  # [tokens, words]
        is_own = chosen == (position // chunk)[:, None]
        masks = torch.where(is_own.unsqueeze(-1), masks & causal[:, None], masks)
    return masks.unsqueeze(-2).contiguous()


def summary_table(chosen: Tensor, plan: Plan) -> Tables:
    """What is visited of the summary buffer beside the chosen chunks, so that every token counts once."""
    hierarchy = plan.hierarchy
    assert hierarchy is not None
    tiles = hierarchy.on(chosen.device, "tile_position")
    block, rows = hierarchy.page, hierarchy.rows
    most = _most_pages(hierarchy, block)
    batch, tables, count, _ = chosen.shape
    words = -(-block // 32)
    pages = torch.full((batch, tables, count, most), -1, dtype=torch.int32, device=chosen.device)
    masks = torch.zeros((batch, tables, count, most, 1, words), dtype=torch.int32, device=chosen.device)
    step = max(1, _SCRATCH[chosen.device.type] // (rows * tables))
    number = torch.arange(rows // block, device=chosen.device, dtype=torch.int32)
    for b in range(batch):
        for first in range(0, count, step):
            some = slice(first, first + step)
            bits = _allowed_rows(chosen[b, :, some], tiles[some], hierarchy).unflatten(-1, (-1, block))
            packed = _packed(bits, words)
            order = torch.where(bits.any(-1), len(number) - number, 0).topk(min(most, len(number)), dim=-1).values
            page = torch.where(order > 0, len(number) - order, 0)
            pages[b, :, some, : order.shape[-1]] = torch.where(order > 0, page, -1).int()
            index = page.long().unsqueeze(-1).expand(*page.shape, words)
            masks[b, :, some, : order.shape[-1], 0] = packed.gather(-2, index)
    return Tables(pages, masks)


def _packed(bits: Tensor, words: int) -> Tensor:
    """bool [..., n] as int32 [..., words], bit i % 32 of word i // 32."""
    bits = F.pad(bits, (0, words * 32 - bits.shape[-1])).unflatten(-1, (words, 32))
    weights = 1 << torch.arange(32, device=bits.device)
    return (bits * weights).sum(-1).to(torch.int32)


def _allowed_rows(chosen: Tensor, position: Tensor, hierarchy: Hierarchy) -> Tensor:
    """bool [tables, tiles, rows of the summary buffer], from the chunks [tables, tiles, n] that tiles chose.

    position: int64 [tiles], of a tile's first query; all its queries see the same levels.
    """
    levels = hierarchy.levels
    rows = torch.zeros((*chosen.shape[:2], hierarchy.rows), dtype=torch.bool, device=chosen.device)
    opened: Tensor | None = None  # of the coarser level: summaries whose place their members take
    for number in reversed(range(len(levels))):
        level = levels[number]
        seen = _seen(level, number, position, hierarchy).expand(len(chosen), -1, -1)
        if opened is not None:
            members = levels[number + 1].members
            seen = seen | opened.repeat_interleave(members, dim=-1)[..., : level.count]
        holds = torch.zeros((*chosen.shape[:2], level.count + 1), dtype=torch.bool, device=chosen.device)
        parent = torch.where(chosen < 0, level.count, chosen.long() * hierarchy.chunk // level.chunk)
        holds = holds.scatter_(-1, parent, True)[..., :-1]
        exists = level.on(chosen.device, "exists")
        rows[..., level.first_row : level.first_row + level.count] = seen & ~holds & exists
        opened = seen & holds
    return rows


def _seen(level: Level, number: int, position: Tensor, hierarchy: Hierarchy) -> Tensor:
    """bool [tiles, count]: the summaries of a level that tiles visit if nothing is chosen."""
    index = torch.arange(level.count, device=position.device)
    spec = hierarchy.spec
    reach = hierarchy.window[1] if number == 0 else spec.summaries[number - 1].reach
    assert reach is not None
    at = (position // level.chunk)[:, None]
    found = index < at - reach + 1
    if not hierarchy.causal:
        found = found | (index >= at + reach)
    further = spec.summaries[number].reach
    if further is not None:
        members = hierarchy.levels[number + 1].members
        at = (position // (level.chunk * members))[:, None]
        found = found & (index // members >= at - further + 1)
        if not hierarchy.causal:
            found = found & (index // members < at + further)
    return found


def _most_pages(hierarchy: Hierarchy, block: int) -> int:
    """No tile visits more pages of the summary buffer than this."""
    spec, total = hierarchy.spec, 0
    assert spec.select is not None
    most = max(spec.select.k, len(spec.select.always))
    for number, level in enumerate(hierarchy.levels):
        pages = -(-level.count // block)
        here = pages
        further = spec.summaries[number].reach
        if further is not None:
            members = hierarchy.levels[number + 1].members
            sides = 1 if hierarchy.causal else 2
            here = sides * (further * members // block + 2) + most * (members // block + 2)
        total += min(pages, here)
    return total

"""Chunks chosen by the data, and the tables of what is then visited. Nothing here has a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distattn.extras import AttentionExtras
from distattn.kernels.chunks import Choosers, choose_chunks, summary_pages
from distattn.kernels.rows import chunk_means
from distattn.plan import Plan
from distattn.spans import Ints
from distattn.summaries import finest_level, mean_keys


class Scorers(NamedTuple):
    """What scores for each of this rank's query tiles.

    rows: [batch, n, heads, head_dim], queries as they are, or their means in the accumulator's dtype.
    numbers: int64 [n]: the tiles' numbers.
    """

    rows: Tensor
    numbers: Ints


@torch.no_grad()
def choose(
    scorers: Scorers, k: Tensor, gathered: list[Tensor], plan: Plan, extras: AttentionExtras, scale: float
) -> Tensor:
    """int32 [batch, tables, tiles, most]: the chunks that this rank's query tiles choose, ascending, then -1.

    tables: key/value heads, or query heads (``TopChunks.heads``); tiles: tokens, or chunks of them (``per``).
    scorers: made by :func:`scorers_of`. gathered: by ``gather_summaries``.
    """
    hierarchy = plan.hierarchy
    assert hierarchy is not None
    by = hierarchy.choosing
    bias = None
    if by.mass or hierarchy.level_is_chunks:
        finest = finest_level(gathered, plan, extras)
        keys = finest.keys
        if by.mass:
            exists = finest.bias.new_zeros(1).where(hierarchy.levels[0].on(k.device, "exists"), -torch.inf)
            bias = finest.bias + exists[:, None]
    else:
        keys = mean_keys(k, plan, extras)
    rows, numbers = scorers
    choosers = Choosers(rows, numbers, *(hierarchy.on(k.device, name) for name in ("tile_chunk", "tile_until")))
    return choose_chunks(by, choosers, keys, bias, hierarchy.on(k.device, "selectable"), scale)


@torch.no_grad()
def scorers_of(q: Tensor, plan: Plan) -> Scorers:
    """What chooses for this rank's queries."""
    hierarchy = plan.hierarchy
    assert hierarchy is not None
    if hierarchy.tile == 1:
        return Scorers(q, hierarchy.positions)
    numbers = hierarchy.my_selectable
    means, _ = chunk_means(q, hierarchy.chunk)
    if not hierarchy.chooses_by_tile_before:
        return Scorers(means, numbers)
    rows = means
    if hierarchy.tile_before is not None:
        (others,) = torch.ops.distattn.gather_rows([means], plan.name, "tiles")
        rows = torch.cat((means, others), dim=1)
    return Scorers(rows[:, hierarchy.on(q.device, "rows_before")] if len(numbers) else means, numbers)


def summary_table(chosen: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """What is visited of the summary buffer beside the chosen chunks, so that every token counts once.

    Returns:
        pages int32 [batch, tables, tiles, n], -1: none, and masks int32 [batch, tables, tiles, n, 1, words] of them.
    """
    hierarchy = plan.hierarchy
    assert hierarchy is not None
    position, exists = (hierarchy.on(chosen.device, name) for name in ("tile_position", "row_bits"))
    return summary_pages(chosen, position, exists, hierarchy.ladder)

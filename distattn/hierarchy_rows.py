"""The oracle for sampled rows of a long, sharded sequence: one softmax and mean pools, in float64.

What a row attends to comes from the definitions in hierarchy_reference.py; every rank takes part with its own keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.extras import AttentionExtras
from distattn.hierarchy_reference import NO_EXTRAS, edges, softmax, without
from distattn.spec import AttentionSpec

_AT_ONCE = 16_384  # rows that are treated in float64 at a time


class Seen(NamedTuple):
    """What one query attends to under one softmax: token positions, and the ranges of positions of its summaries."""

    tokens: set[int]
    summaries: set[tuple[int, int]]


def seen_by(i: int, length: int, spec: AttentionSpec, chosen: tuple[int, ...] = ()) -> Seen:
    """What query i attends to once it has chosen chunks; summaries without a member among them."""
    window = spec.window
    assert window is not None and spec.merge == "softmax"
    last = i if window.causal else length - 1
    if i in window.global_tokens:
        return Seen(set(range(last + 1)), set())
    begin, end = edges(i, length, window.chunk, window.reach)
    tokens = {t for t in range(begin, end) if t <= last}
    tokens |= {g for g in (*window.global_tokens, *window.global_keys) if g <= last}
    for c in chosen:
        tokens |= set(range(c * window.chunk, min((c + 1) * window.chunk, length)))
    seen: set[tuple[int, int]] = set()
    for level, (begin, end, outer_begin, outer_end) in enumerate(_ranges(i, length, spec)):
        size = spec.summaries[level].chunk
        starts = [*range(outer_begin, begin, size), *(() if window.causal else range(end, outer_end, size))]
        for start in starts:
            for number, j in without((level, start // size), chosen, spec):
                chunk = spec.summaries[number].chunk
                seen.add((j * chunk, min((j + 1) * chunk, length)))
    return Seen(tokens, {(start, stop) for start, stop in seen if start < stop})


def _ranges(i: int, length: int, spec: AttentionSpec) -> list[tuple[int, int, int, int]]:
    """Of each level (b and e of the level below, its own b and e)."""
    assert spec.window is not None
    found = []
    begin, end = edges(i, length, spec.window.chunk, spec.window.reach)
    for number, level in enumerate(spec.summaries):
        outer = 0, length
        if level.reach is not None:
            outer = edges(i, length, spec.summaries[number + 1].chunk, level.reach)
        found.append((begin, end, *outer))
        begin, end = outer
    return found


def attention_rows(
    q: Tensor,
    positions: list[int],
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    length: int,
    *,
    key_positions: Tensor,
    chosen: Tensor | None = None,
    extras: AttentionExtras = NO_EXTRAS,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Chosen query rows under one softmax, over the keys that one rank owns, in float64; all pools are means.

    Args:
        q: [batch, R, heads, dim], of rows at ``positions``, the same on all ranks.
        k, v: [batch, n, kv_heads, ..], and extras.pool_keys: of the rank's keys, at ``key_positions``, int64 [n].
        chosen: int [R, tables, c]: chunks that the rows chose, -1 for none, by key/value head or query head.
        total: the sum over ranks of a tensor.

    Returns:
        (out, lse) over the rank's tokens, and (out, lse) over all summaries, which is the same on all ranks; all
        float64, to be merged.
    """
    batch, rows, heads, dim = q.shape
    scale, group = dim**-0.5, heads // k.shape[2]
    seen: list[list[Seen]] = []
    for row, i in enumerate(positions):
        picks = [()] * heads
        if chosen is not None:
            share = heads // chosen.shape[1]
            picks = [tuple(c for c in chosen[row, h // share].tolist() if c >= 0) for h in range(heads)]
        known = {pick: seen_by(i, length, spec, pick) for pick in set(picks)}
        seen.append([known[pick] for pick in picks])

    order = torch.argsort(key_positions)
    ascending = key_positions[order]
    used = torch.tensor(sorted(set().union(*(one.tokens for row in seen for one in row))), dtype=torch.int64)
    at = torch.searchsorted(ascending, used).clamp_max(max(len(ascending) - 1, 0))
    used = used[ascending[at] == used] if len(ascending) else used[:0]
    index = order[torch.searchsorted(ascending, used)].to(k.device)
    allowed = _membership([[one.tokens for one in row] for row in seen], used.tolist())
    part = _rows_part(q, k[:, index].double(), v[:, index].double(), allowed, None, scale, group)

    ranges = sorted(set().union(*(one.summaries for row in seen for one in row)))
    if not ranges:
        nothing = torch.zeros(*part[0].shape).double().to(q.device), torch.full_like(part[1], -math.inf)
        return part, nothing
    assert spec.window is not None
    finest = spec.summaries[0].chunk
    pooled = k if extras.pool_keys is None else extras.pool_keys
    left_out = torch.tensor([*spec.window.global_tokens, *spec.window.global_keys], dtype=torch.int64)
    counts = (~torch.isin(key_positions, left_out)).double().to(k.device)
    chunk = (key_positions // finest).to(k.device)
    chunks = -(-length // finest)

    def sums(x: Tensor) -> Tensor:
        """[chunks + 1, ...]: the sums over all tokens before each chunk of level 1, of those that count."""
        mine = torch.zeros(chunks, *x.shape[1:], dtype=torch.float64, device=x.device)
        for some, rows, weights in zip(chunk.split(_AT_ONCE), x.split(_AT_ONCE), counts.split(_AT_ONCE), strict=True):
            mine.index_add_(0, some, rows.double() * weights.view(-1, *[1] * (x.ndim - 1)))
        every = total(mine)
        return torch.cat([torch.zeros_like(every[:1]), every.cumsum(0)])

    starts = torch.tensor([start // finest for start, _ in ranges], device=k.device)
    stops = torch.tensor([-(-stop // finest) for _, stop in ranges], device=k.device)
    n = sums(counts)
    n = n[stops] - n[starts]
    means = []
    for x in (pooled, v):
        before = sums(x.transpose(0, 1))
        means.append(((before[stops] - before[starts]) / n.clamp_min(1)[:, None, None, None]).transpose(0, 1))
    keys, values = means
    if extras.rotate is not None:
        centres = torch.tensor([(start + stop - 1) / 2 for start, stop in ranges], dtype=torch.float64)
        keys = extras.rotate(keys, centres.to(k.device)).double()
    allowed = _membership([[one.summaries for one in row] for row in seen], ranges) & (n > 0).cpu()
    assert all((level.pool, level.bias) == ("mean", "count") for level in spec.summaries)
    bias = n.clamp_min(1).log()
    return part, _rows_part(q, keys, values, allowed, bias, scale, group)


def _membership(sets: list[list[set[Any]]], columns: list[Any]) -> Tensor:
    """bool [heads, rows, columns]: whether a column is in the set of a row and head."""
    place = {column: at for at, column in enumerate(columns)}
    found = torch.zeros(len(sets[0]), len(sets), len(columns), dtype=torch.bool)
    for row, by_head in enumerate(sets):
        for head, one in enumerate(by_head):
            found[head, row, [place[x] for x in one if x in place]] = True
    return found


def _rows_part(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None, scale: float, group: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) of rows over keys, head by head. allowed: [heads, rows, keys]; bias: [keys]."""
    outs, lses = [], []
    for h in range(q.shape[2]):
        scores = scale * (q[:, :, h].double() @ k[:, :, h // group].mT)
        weights, lse = softmax(scores if bias is None else scores + bias, allowed[h].to(q.device))
        outs.append(weights @ v[:, :, h // group])
        lses.append(lse.expand(q.shape[0], q.shape[1]))
    return torch.stack(outs, dim=2), torch.stack(lses, dim=2)

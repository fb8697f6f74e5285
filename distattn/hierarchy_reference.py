"""Hierarchical attention in float64, written from the definitions in spec.py and extras.py alone.

Everything is as naive as it can be: sets of positions, one loop over the queries, dense matrices of what is visible.
It shares no code with what is checked against it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.extras import AttentionExtras, AttentionPool, Mlp, MlpPool
from distattn.spec import AttentionSpec, Summaries, TopChunks

Choices = list[list[list[tuple[int, ...]]]]
NO_EXTRAS = AttentionExtras()


class Answer(NamedTuple):
    """out: float64 [batch, N, heads, value_dim]. lse: float64 [batch, N, heads], None with gates or a correction.

    chosen: chosen[b][h][i] are the chunks that query head h chose at position i, in order; () if it chose none.
    counted: [batch, heads, N], for how many tokens the keys stand that a query visits; zeros with gates.
    """

    out: Tensor
    lse: Tensor | None
    chosen: Choices
    counted: Tensor


class Level(NamedTuple):
    """The summaries of one level. Where ``sizes`` is 0 there is none, and its key and value are zeros.

    plain_keys: [batch, n, kv_heads, head_dim], before rotation. keys: after. values: [batch, n, kv_heads, value_dim].
    sizes: the tokens that each stands for. starts, ends: where it begins and ends. bias: [kv_heads, n].
    """

    plain_keys: Tensor
    keys: Tensor
    values: Tensor
    sizes: list[int]
    starts: list[int]
    ends: list[int]
    bias: Tensor


def hierarchical(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras = NO_EXTRAS,
    scale: float | None = None,
) -> Answer:
    """What ``spec`` means for the whole sequence. q: [batch, N, heads, dim]; k, v: [batch, N, kv_heads, ..]."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pool_keys = k if extras.pool_keys is None else extras.pool_keys.double()
    length = q.shape[1]

    # Under one softmax global keys are left out of the summaries; with gates nothing is special about them.
    window = spec.window if spec.merge == "softmax" and not spec.is_static else None
    left_out = {g for g in (*window.global_tokens, *window.global_keys) if g < length} if window else set()
    levels = _levels(pool_keys, v, spec, extras, left_out)
    chosen = _choose(q, pool_keys, spec, extras, levels, left_out, scale)

    if spec.merge == "gate":
        out, lse, counted = _gated(q, k, v, spec, extras, levels, chosen, scale)
    elif spec.is_static:
        seen = _pattern(spec, q)
        out, lse = _attend(q, k, v, seen, scale)
        counted = seen.double().sum(-1)
    else:
        out, lse, counted = _onesoftmax(q, k, v, spec, levels, chosen, left_out, scale)

    if spec.correction is not None:
        every = spec.correction.every
        dense, _ = _attend(q, k, v, _everything(spec, q), scale)
        rows = []
        for t in range(length):
            r = every * (t // every)
            rows.append(dense[:, t] if t >= length - every else out[:, t] + dense[:, r] - out[:, r])
        out, lse = torch.stack(rows, dim=1), None
    return Answer(out, lse, chosen, counted)


# Softmaxes over what is visible


def _by_query_head(x: Tensor, heads: int) -> Tensor:
    """[batch, n, kv_heads, dim] to [batch, n, heads, dim]: query head h reads head h // (heads // kv_heads)."""
    group = heads // x.shape[2]
    return torch.stack([x[:, :, h // group] for h in range(heads)], dim=2)


def _scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[batch, heads, queries, keys]"""
    return scale * torch.einsum("bqhd,bkhd->bhqk", q, _by_query_head(keys, q.shape[2]))


def softmax(scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, zeros in a row that sees nothing, and the log of their normalizer, there minus infinity."""
    scores = scores.masked_fill(~seen, -math.inf)
    some = seen.any(-1, keepdim=True)
    top = torch.where(some, scores.amax(-1, keepdim=True), 0.0).detach() if seen.shape[-1] else torch.zeros(())
    parts = torch.exp(scores - top)
    total = torch.where(some, parts.sum(-1, keepdim=True), 1.0)
    lse = torch.where(some, top + torch.log(total), -math.inf)
    return parts / total, lse.squeeze(-1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [batch, queries, heads, dim] and LSE [batch, queries, heads]. seen: [batch, heads, queries, keys]."""
    scores = _scores(q, k, scale)
    if bias is not None:
        scores = scores + bias
    weights, lse = softmax(scores, seen)
    return torch.einsum("bhqk,bkhd->bqhd", weights, _by_query_head(v, q.shape[2])), lse.transpose(1, 2)


def _pattern(spec: AttentionSpec, q: Tensor) -> Tensor:
    """Which tokens the pattern lets each query see: [batch, heads, N, N]."""
    batch, length, heads, _ = q.shape
    at = np.arange(length)
    by_head = [
        np.broadcast_to(p.allows(at[:, None], at[None, :]), (length, length)) for p in spec.tokens.by_head(heads)
    ]
    return torch.from_numpy(np.stack(by_head)).expand(batch, -1, -1, -1)


def _everything(spec: AttentionSpec, q: Tensor) -> Tensor:
    batch, length, heads, _ = q.shape
    seen = torch.ones(length, length, dtype=torch.bool)
    return (seen.tril() if spec.causal else seen).expand(batch, heads, -1, -1)


# Summaries


def _levels(
    keys: Tensor, values: Tensor, spec: AttentionSpec, extras: AttentionExtras, left_out: set[int]
) -> list[Level]:
    """All levels, each pooled from the plain keys of the one below; level 0 is the tokens."""
    batch, length, kv_heads, _ = keys.shape
    sizes = [0 if i in left_out else 1 for i in range(length)]
    below = 1
    levels: list[Level] = []
    for number, level in enumerate(spec.summaries):
        if level.overlaps:
            starts = [j for j in range(0, length, level.step) if j + level.chunk <= length]
        else:
            starts = list(range(0, length, level.chunk))
        ends = [min(start + level.chunk, length) for start in starts]
        params = extras.pool[number] if number < len(extras.pool) else None
        pooled_keys, pooled_values, counts = [], [], []
        for start in starts:
            places = range(start // below, (start + level.chunk) // below)
            key, value, count = _pool(level.pool, places, keys, values, sizes, params)
            pooled_keys.append(key)
            pooled_values.append(value)
            counts.append(count)
        keys = torch.stack(pooled_keys, dim=1) if starts else keys[:, :0]
        values = torch.stack(pooled_values, dim=1) if starts else values[:, :0]
        sizes, below = counts, level.chunk
        turned = _rotated(keys, starts, ends, extras)
        levels.append(Level(keys, turned, values, sizes, starts, ends, _bias(level, number, sizes, kv_heads, extras)))
    return levels


def _pool(
    pool: str,
    places: range,
    keys: Tensor,
    values: Tensor,
    sizes: list[int],
    params: AttentionPool | MlpPool | None,
) -> tuple[Tensor, Tensor, int]:
    """Key and value [batch, kv_heads, dim] of one chunk and for how many tokens they stand.

    places: the members of a whole chunk, by their numbers in ``sizes``; those beyond the end or of size 0 are absent.
    """
    members = [j for j in places if j < len(sizes) and sizes[j] > 0]
    count = sum(sizes[j] for j in members)
    if not members:
        return torch.zeros_like(keys[:, 0]), torch.zeros_like(values[:, 0]), 0
    if pool == "mlp":
        assert isinstance(params, MlpPool)
        key = _mlp(params.keys, [keys[:, j] if j in members else None for j in places])
        return key, _mlp(params.values, [values[:, j] if j in members else None for j in places]), count
    own = torch.tensor([float(sizes[j]) for j in members], dtype=torch.float64)
    if pool == "attention":
        assert isinstance(params, AttentionPool)
        scores = torch.einsum("bjhd,hd->bhj", keys[:, members], params.query.double()) + own.log()
        weights = torch.softmax(scores, dim=-1)
    else:
        weights = (own / own.sum()).expand(keys.shape[0], keys.shape[2], -1)
    key = torch.einsum("bhj,bjhd->bhd", weights, keys[:, members])
    return key, torch.einsum("bhj,bjhd->bhd", weights, values[:, members]), count


def _mlp(mlp: Mlp, members: list[Tensor | None]) -> Tensor:
    """W2 silu(W1 [x_j + p_j for all j] + b1); a member that is None is zeros without its p."""
    some = next(x for x in members if x is not None)
    placed = [
        torch.zeros_like(some) if x is None else x + mlp.positions[number].double() for number, x in enumerate(members)
    ]
    hidden = torch.cat(placed, dim=-1) @ mlp.w1.double().T + mlp.b1.double()
    return (hidden * torch.sigmoid(hidden)) @ mlp.w2.double().T


def _rotated(keys: Tensor, starts: list[int], ends: list[int], extras: AttentionExtras) -> Tensor:
    """Keys of chunks turned to the centres of the chunks."""
    if extras.rotate is None or not starts:
        return keys
    centres = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    return extras.rotate(keys, torch.tensor(centres, dtype=torch.float64)).double()


def _bias(level: Summaries, number: int, sizes: list[int], kv_heads: int, extras: AttentionExtras) -> Tensor:
    if level.bias == "learned":
        assert extras.key_bias is not None
        return extras.key_bias[number].double()[:, None].expand(kv_heads, len(sizes))
    if level.bias == "none":
        return torch.zeros(kv_heads, len(sizes), dtype=torch.float64)
    return torch.tensor([math.log(max(n, 1)) for n in sizes], dtype=torch.float64).expand(kv_heads, -1)


def _head_bias(level: Level, heads: int) -> Tensor:
    """[heads, 1, n], to be added to scores."""
    group = heads // level.bias.shape[0]
    return torch.stack([level.bias[h // group] for h in range(heads)])[:, None]


def _complete(level: Level, before: int | None) -> list[bool]:
    """Which summaries end at ``before`` or earlier; all that exist if it is None."""
    return [n > 0 and (before is None or end <= before) for n, end in zip(level.sizes, level.ends, strict=True)]


# One softmax


def edges(i: int, length: int, chunk: int, reach: int) -> tuple[int, int]:
    """b and e: the first token of the chunks that reach back, and the end of those that reach on."""
    return max(0, (i // chunk - reach + 1) * chunk), min(length, (i // chunk + reach) * chunk)


def _visible(i: int, length: int, spec: AttentionSpec, levels: list[Level]) -> set[tuple[int, int]]:
    """The summaries (level from 0, number) that query i visits before anything is chosen."""
    assert spec.window is not None
    begin, end = edges(i, length, spec.window.chunk, spec.window.reach)
    seen = set()
    for number, level in enumerate(levels):
        if number + 1 < len(levels):
            reach = spec.summaries[number].reach
            assert reach is not None
            outer_begin, outer_end = edges(i, length, spec.summaries[number + 1].chunk, reach)
        else:
            outer_begin, outer_end = 0, length
        for j, (start, stop) in enumerate(zip(level.starts, level.ends, strict=True)):
            before = outer_begin <= start and stop <= begin
            after = not spec.window.causal and end <= start and stop <= outer_end
            if before or after:
                seen.add((number, j))
        begin, end = outer_begin, outer_end
    return seen


def without(one: tuple[int, int], chosen: tuple[int, ...], spec: AttentionSpec) -> set[tuple[int, int]]:
    """What stands for a summary once some chunks of level 1 are chosen: itself, nothing, or summaries below it."""
    number, j = one
    chunk, finest = spec.summaries[number].chunk, spec.summaries[0].chunk
    covered = {c for c in chosen if j * chunk <= c * finest < (j + 1) * chunk}
    if not covered:
        return {one}
    if number == 0:
        return set()
    below = spec.summaries[number - 1].chunk
    return set().union(
        *(without((number - 1, child), chosen, spec) for child in range(j * chunk // below, (j + 1) * chunk // below))
    )


def _onesoftmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    levels: list[Level],
    chosen: Choices,
    left_out: set[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    window = spec.window
    assert window is not None
    tokens_seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    levels_seen = [torch.zeros(batch, heads, length, len(level.starts), dtype=torch.bool) for level in levels]
    for i in range(length):
        last = i if window.causal else length - 1
        if i in window.global_tokens:
            tokens_seen[:, :, i, : last + 1] = True
            continue
        begin, end = edges(i, length, window.chunk, window.reach)
        exact = {t for t in range(begin, end) if t <= last} | {g for g in left_out if g <= last}
        summaries = _visible(i, length, spec, levels)
        for b in range(batch):
            for h in range(heads):
                picked = chosen[b][h][i]
                tokens = set(exact)
                for c in picked:
                    tokens |= set(range(c * window.chunk, min((c + 1) * window.chunk, length)))
                tokens_seen[b, h, i, sorted(tokens)] = True
                for one in summaries:
                    for number, j in without(one, picked, spec):
                        if j < len(levels[number].sizes) and levels[number].sizes[j] > 0:
                            levels_seen[number][b, h, i, j] = True

    keys = torch.cat([k, *(level.keys for level in levels)], dim=1)
    values = torch.cat([v, *(level.values for level in levels)], dim=1)
    seen = torch.cat([tokens_seen, *levels_seen], dim=-1)
    bias = torch.cat([torch.zeros(heads, 1, length).double(), *(_head_bias(level, heads) for level in levels)], dim=-1)
    sizes = torch.tensor([1.0] * length + [float(n) for level in levels for n in level.sizes], dtype=torch.float64)
    out, lse = _attend(q, keys, values, seen, scale, bias)
    return out, lse, (seen.double() * sizes).sum(-1)


# Gates


def _gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
    levels: list[Level],
    chosen: Choices,
    scale: float,
) -> tuple[Tensor, None, Tensor]:
    batch, length, heads, _ = q.shape
    assert extras.gates is not None
    sources = [_attend(q, k, v, _pattern(spec, q), scale)[0]]
    if spec.summaries:
        (level,) = levels
        seen = torch.tensor([_complete(level, i + 1 if spec.causal else None) for i in range(length)]).bool()
        seen = seen.expand(batch, heads, -1, -1)
        sources.append(_attend(q, level.keys, level.values, seen, scale, _head_bias(level, heads))[0])
    if spec.select is not None:
        chunk = spec.select.chunk
        seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
        for b in range(batch):
            for h in range(heads):
                for i in range(length):
                    for c in chosen[b][h][i]:
                        seen[b, h, i, c * chunk : (c + 1) * chunk] = True
        sources.append(_attend(q, k, v, seen & _everything(spec, q), scale)[0])
    assert extras.gates.shape[-1] == len(sources)
    gates = torch.sigmoid(extras.gates.double())
    out = torch.stack([gates[..., s, None] * source for s, source in enumerate(sources)]).sum(0)
    return out, None, torch.zeros(batch, heads, length, dtype=torch.float64)


# Selection


@torch.no_grad()
def _choose(
    q: Tensor,
    pool_keys: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
    levels: list[Level],
    left_out: set[int],
    scale: float,
) -> Choices:
    """Chosen chunks of every query and head."""
    batch, length, heads, _ = q.shape
    select = spec.select
    chosen: Choices = [[[() for _ in range(length)] for _ in range(heads)] for _ in range(batch)]
    if select is None:
        return chosen
    chunk = select.chunk

    # The scoring queries, and the position by which the summaries of "mass" must end for each.
    if select.per == "token":
        asking, before = q, [i + 1 for i in range(length)]
    else:
        tiles = range(-(-length // chunk))
        means = [q[:, t * chunk : (t + 1) * chunk].mean(1) for t in tiles]
        if spec.causal and not select.lookahead:
            means = [torch.zeros_like(means[0]), *means[:-1]]
        asking, before = torch.stack(means, dim=1), [t * chunk for t in tiles]

    if select.score == "mean":
        scores = _mean_scores(asking, pool_keys, spec, select, extras, levels, left_out, scale)
    else:
        scores = _mass_scores(asking, before, length, spec, levels, scale)
    if select.per == "tile" and spec.causal and not select.lookahead:
        scores[:, :, 0] = 0.0
    if select.heads == "kv":
        group = heads // pool_keys.shape[2]
        scores = torch.stack(
            [scores[:, h // group * group : (h // group + 1) * group].sum(1) for h in range(heads)], dim=1
        )

    listed = scores.tolist()
    for i in range(length):
        if spec.merge == "softmax" and spec.window is not None and i in spec.window.global_tokens:
            continue
        candidates = _candidates(i, length, spec, select, left_out)
        for b in range(batch):
            for h in range(heads):
                row = listed[b][h][i if select.per == "token" else i // chunk]
                chosen[b][h][i] = _best(row, candidates, _always(i, candidates, select), select.k)
    return chosen


def _candidates(i: int, length: int, spec: AttentionSpec, select: TopChunks, left_out: set[int]) -> set[int]:
    chunk = select.chunk
    found = set()
    for j in range(-(-length // chunk)):
        start, stop = j * chunk, min((j + 1) * chunk, length)
        if spec.merge == "gate":
            if j < i // chunk or (not spec.causal and j != i // chunk):
                found.add(j)
            continue
        assert spec.window is not None
        begin, end = edges(i, length, chunk, spec.window.reach)
        if (stop <= begin or (not spec.causal and start >= end)) and not set(range(start, stop)) <= left_out:
            found.add(j)
    return found


def _always(i: int, candidates: set[int], select: TopChunks) -> set[int]:
    own = i // select.chunk
    always = set()
    if "first" in select.always and 0 in candidates:
        always.add(0)
    if "own" in select.always:
        always.add(own)
    if "previous" in select.always and own >= 1:
        always.add(own - 1)
    return always


def _best(scores: list[float], candidates: set[int], always: set[int], k: int) -> tuple[int, ...]:
    """``always`` and, up to k in all, the candidates of the highest scores; of equal ones the lower first."""
    ranked = sorted(candidates - always, key=lambda j: (-scores[j], j))
    return tuple(sorted(always | set(ranked[: max(0, k - len(always))])))


def _mean_scores(
    asking: Tensor,
    pool_keys: Tensor,
    spec: AttentionSpec,
    select: TopChunks,
    extras: AttentionExtras,
    levels: list[Level],
    left_out: set[int],
    scale: float,
) -> Tensor:
    """[batch, heads, asking, chunks]: the scale times q.k, k the key of the chunk."""
    if spec.summaries and spec.summaries[0].chunk == spec.summaries[0].stride == select.chunk:
        return _scores(asking, levels[0].keys, scale)
    length = pool_keys.shape[1]
    starts = list(range(0, length, select.chunk))
    ends = [min(start + select.chunk, length) for start in starts]
    means = []
    for start, end in zip(starts, ends, strict=True):
        members = [t for t in range(start, end) if t not in left_out]
        means.append(pool_keys[:, members].mean(1) if members else torch.zeros_like(pool_keys[:, 0]))
    return _scores(asking, _rotated(torch.stack(means, dim=1), starts, ends, extras), scale)


def _mass_scores(
    asking: Tensor, before: list[int], length: int, spec: AttentionSpec, levels: list[Level], scale: float
) -> Tensor:
    """[batch, heads, asking, chunks]: the weights of the summaries of level 1, once for each stride that is shared."""
    assert spec.select is not None
    level, finest, chunk = levels[0], spec.summaries[0], spec.select.chunk
    seen = torch.tensor([_complete(level, end if spec.causal else None) for end in before]).bool()
    weights, _ = softmax(_scores(asking, level.keys, scale) + _head_bias(level, asking.shape[2]), seen)

    # Pieces of ``stride`` tokens, numbered from position 0, of each summary and of each chunk.
    shared = torch.zeros(len(level.starts), -(-length // chunk), dtype=torch.float64)
    for m in range(shared.shape[0]):
        for j in range(shared.shape[1]):
            of_summary = set(range(m, m + finest.chunk // finest.step))
            of_chunk = set(range(j * chunk // finest.step, (j + 1) * chunk // finest.step))
            shared[m, j] = len(of_summary & of_chunk)
    return weights @ shared

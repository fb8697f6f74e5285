"""Chunk summaries of all levels: pooled where the tokens are, brought to all ranks, and combined there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distattn.extras import AttentionExtras, AttentionPool, Mlp, MlpPool
from distattn.hierarchy import Hierarchy
from distattn.kernels.attention import accumulator_dtype
from distattn.kernels.rows import chunk_means, chunk_means_backward
from distattn.levels import Level
from distattn.plan import Plan


class Pooled(NamedTuple):
    """Summaries of one level, of the whole sequence, in the accumulator's dtype.

    keys: [batch, count, kv_heads, head_dim], turned to the centres of their chunks. values: [batch, count, kv_heads,
    value_dim]. bias: [count, kv_heads].
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


def _hierarchy(plan: Plan) -> Hierarchy:
    assert plan.hierarchy is not None
    return plan.hierarchy


def pool_own(k: Tensor, v: Tensor, plan: Plan, extras: AttentionExtras) -> list[Tensor]:
    """Keys and values of the level-1 summaries of this rank's chunks, [batch, n, kv_heads, dim]; [] without levels.
    Differentiable."""
    levels = _hierarchy(plan).levels
    if not levels:
        return []
    pool = extras.pool[0] if extras.pool else None
    return list(_pool_tokens(k if extras.pool_keys is None else extras.pool_keys, v, plan, levels[0], pool))


def gather_summaries(pooled: list[Tensor], plan: Plan) -> list[Tensor]:
    """Those of :func:`pool_own` of all ranks, on every rank. Differentiable."""
    gathered: list[Tensor] = torch.ops.distattn.gather_rows(pooled, plan.name, "summaries") if pooled else []
    return gathered


def finest_level(gathered: list[Tensor], plan: Plan, extras: AttentionExtras) -> Pooled:
    """Level 1, from what :func:`gather_summaries` gives. Differentiable."""
    keys, values = gathered
    return _finished(keys, values, 0, plan, extras)


def make_summaries(gathered: list[Tensor], plan: Plan, extras: AttentionExtras) -> list[Pooled]:
    """All levels, from what :func:`gather_summaries` gives. Differentiable."""
    levels = _hierarchy(plan).levels
    found: list[Pooled] = []
    for number, level in enumerate(levels):
        if number == 0:
            keys, values = gathered
        else:
            pool = extras.pool[number] if number < len(extras.pool) else None
            sizes = levels[number - 1].on(keys.device, "size").to(keys.dtype)
            parts = [_by_chunk(x, level.members, level.count) for x in (keys, values, sizes.view(1, -1, 1, 1))]
            keys, values = pool_members(parts[0], parts[1], parts[2][..., 0, 0], pool)
        found.append(_finished(keys, values, number, plan, extras))
    return found


def _finished(keys: Tensor, values: Tensor, number: int, plan: Plan, extras: AttentionExtras) -> Pooled:
    level = _hierarchy(plan).levels[number]
    return Pooled(_turned(keys, level, extras), values, _bias(keys, number, level, plan, extras))


def buffer_of(levels: list[Pooled], hierarchy: Hierarchy, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """(k, v, bias) of the summary buffer: [batch, rows, kv_heads, dim] of a dtype, and [batch, rows, kv_heads] or None
    if there is no bias."""
    rows = [*(level.first_row for level in hierarchy.levels[1:]), hierarchy.rows]
    parts: list[list[Tensor]] = [[], [], []]
    for pooled, level, stop in zip(levels, hierarchy.levels, rows, strict=True):
        padding = stop - level.first_row - level.count
        parts[0].append(F.pad(pooled.keys.to(dtype), (0, 0, 0, 0, 0, padding)))
        parts[1].append(F.pad(pooled.values.to(dtype), (0, 0, 0, 0, 0, padding)))
        bias = pooled.bias.expand(pooled.keys.shape[0], -1, -1)
        parts[2].append(F.pad(bias, (0, 0, 0, padding)))
    k, v, bias = (torch.cat(part, dim=1) for part in parts)
    return k, v, None if all(level.bias == "none" for level in hierarchy.spec.summaries) else bias


def mean_keys(k: Tensor, plan: Plan, extras: AttentionExtras) -> Tensor:
    """[batch, chunks, kv_heads, head_dim]: the mean keys of the chunks to choose from, where no level has them."""
    hierarchy = _hierarchy(plan)
    keys = _means(k if extras.pool_keys is None else extras.pool_keys, hierarchy.chunk, _left_out(plan, k.device))
    means: Tensor = torch.ops.distattn.gather_rows([keys], plan.name, "chunks")[0]
    if extras.rotate is None:
        return means
    return extras.rotate(means, hierarchy.on(k.device, "chunk_centre"))


def _turned(keys: Tensor, level: Level, extras: AttentionExtras) -> Tensor:
    if extras.rotate is None:
        return keys
    return extras.rotate(keys, level.on(keys.device, "centre")).to(keys.dtype)


def _bias(keys: Tensor, number: int, level: Level, plan: Plan, extras: AttentionExtras) -> Tensor:
    kind = plan.spec.summaries[number].bias
    shape = (level.count, keys.shape[2])
    if kind == "learned":
        assert extras.key_bias is not None
        return extras.key_bias[number].to(keys.dtype).expand(shape)
    if kind == "none":
        return keys.new_zeros(shape)
    return level.on(keys.device, "log_size").to(keys.dtype)[:, None].expand(shape)


def _left_out(plan: Plan, device: torch.device) -> Tensor | None:
    """bool [tokens]: this rank's global keys; None if there are none in the sequence."""
    hierarchy = _hierarchy(plan)
    if not len(hierarchy.left_out):
        return None
    return hierarchy.on(device, "left_out_rows")


def _pool_tokens(
    k: Tensor, v: Tensor, plan: Plan, level: Level, pool: AttentionPool | MlpPool | None
) -> tuple[Tensor, Tensor]:
    """The level-1 summaries of the chunks that this rank owns."""
    left_out = _left_out(plan, k.device)
    if pool is None and level.stride == level.chunk:
        return _means(k, level.chunk, left_out), _means(v, level.chunk, left_out)
    dtype = accumulator_dtype(k.dtype)
    there = torch.ones(k.shape[1], dtype=dtype, device=k.device) if left_out is None else (~left_out).to(dtype)
    rows = [k.to(dtype), v.to(dtype), there.view(1, -1, 1, 1)]
    if level.stride == level.chunk:
        parts = [_by_chunk(x, level.chunk, -(-k.shape[1] // level.chunk)) for x in rows]
    else:
        rows = _with_halo(rows, plan)
        index = _hierarchy(plan).on(k.device, "overlap_rows")
        parts = [x[:, index] for x in rows]
    return pool_members(parts[0], parts[1], parts[2][..., 0, 0], pool)


def _with_halo(rows: list[Tensor], plan: Plan) -> list[Tensor]:
    """K, V and what is there of this rank's rows, those that follow its segments added."""
    halo = _hierarchy(plan).halo
    if halo is None:
        return rows
    k, v = torch.ops.distattn.gather_rows(rows[:2], plan.name, "halo")
    there = rows[2].new_ones((1, len(halo[1]), 1, 1))
    return [torch.cat(pair, dim=1) for pair in zip(rows, (k, v, there), strict=True)]


def _by_chunk(x: Tensor, members: int, count: int) -> Tensor:
    """[batch, rows, heads, dim] as [batch, count, members, heads, dim], zeros beyond the end."""
    padding = count * members - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, 0, padding)).view(x.shape[0], count, members, *x.shape[2:])


def pool_members(k: Tensor, v: Tensor, sizes: Tensor, pool: AttentionPool | MlpPool | None) -> tuple[Tensor, Tensor]:
    """Pools the members of chunks.

    Args:
        k, v: [batch, chunks, members, kv_heads, dim], zeros where there is no member.
        sizes: [1, chunks, members]: how many tokens each stands for; 0: it is no member.
        pool: learned parameters, None for the mean.

    Returns:
        [batch, chunks, kv_heads, dim] of both.
    """
    if isinstance(pool, MlpPool):
        there = (sizes > 0).to(k.dtype)[..., None, None]
        return _mlp(k, there, pool.keys), _mlp(v, there, pool.values)
    weights = sizes.unsqueeze(-1)
    if pool is not None:
        scores = torch.einsum("bcmhd,hd->bcmh", k, pool.query.to(k.dtype))
        weights = torch.where(weights > 0, scores + weights.clamp_min(1).log(), -torch.inf)
        weights = torch.softmax(weights.masked_fill((weights == -torch.inf).all(2, keepdim=True), 0.0), dim=2)
        weights = weights * (sizes.unsqueeze(-1) > 0)
    else:
        weights = weights / weights.sum(2, keepdim=True).clamp_min(1.0)
    return tuple((weights.unsqueeze(-1) * x).sum(2) for x in (k, v))  # type: ignore[return-value]


def _mlp(x: Tensor, there: Tensor, mlp: Mlp) -> Tensor:
    """x: [batch, chunks, members, kv_heads, dim]; there: [1, chunks, members, 1, 1]."""
    positions, w1, b1, w2 = (parameter.to(x.dtype) for parameter in mlp)
    x = (x + positions[:, None]) * there
    return F.linear(F.silu(F.linear(x.transpose(2, 3).flatten(3), w1, b1)), w2)


def _means(x: Tensor, chunk: int, left_out: Tensor | None) -> Tensor:
    means: Tensor = torch.ops.distattn.chunk_means(x, left_out, chunk)
    return means


torch.library.define(
    "distattn::chunk_means", "(Tensor x, Tensor? left_out, int chunk) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    "distattn::chunk_means_backward",
    "(Tensor grad, Tensor? left_out, int rows, int chunk, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("distattn::chunk_means", "default")
def _chunk_means(x: Tensor, left_out: Tensor | None, chunk: int) -> Tensor:
    return chunk_means(x, chunk, left_out)[0]


@torch.library.register_fake("distattn::chunk_means")
def _chunk_means_fake(x: Tensor, left_out: Tensor | None, chunk: int) -> Tensor:
    batch, rows, heads, dim = x.shape
    return x.new_empty((batch, -(-rows // chunk), heads, dim), dtype=accumulator_dtype(x.dtype))


@torch.library.impl("distattn::chunk_means_backward", "default")
def _chunk_means_backward(grad: Tensor, left_out: Tensor | None, rows: int, chunk: int, dtype: torch.dtype) -> Tensor:
    there = torch.ones(rows, device=grad.device) if left_out is None else (~left_out).float()
    counts = F.pad(there, (0, -rows % chunk)).view(-1, chunk).sum(1)
    return chunk_means_backward(grad.contiguous(), counts, rows, chunk, left_out, dtype)


@torch.library.register_fake("distattn::chunk_means_backward")
def _chunk_means_backward_fake(
    grad: Tensor, left_out: Tensor | None, rows: int, chunk: int, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty((grad.shape[0], rows, *grad.shape[2:]), dtype=dtype)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, left_out, chunk = inputs
    ctx.save_for_backward(left_out)
    ctx.rest = x.shape[1], chunk, x.dtype


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    return torch.ops.distattn.chunk_means_backward(grad, ctx.saved_tensors[0], *ctx.rest), None, None


torch.library.register_autograd("distattn::chunk_means", _differentiate, setup_context=_save)

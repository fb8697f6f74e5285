"""How well chunks are chosen, as a loss: what a choice leaves out gives no gradient, so attention cannot teach it.

Where it is known which bytes a row must find, as in windows with planted facts, the scores that choose are trained as
those of a classifier: cross-entropy of a softmax over the chunks that could be chosen, with the chunk of these bytes as
the right one. (DeepSeek-AI, "DeepSeek-V3.2", 2025, section 2.1, trains its indexer by the Kullback-Leibler divergence
from dense attention; here the target is the known place.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distattn.exchange import gather_rows
from distattn.extras import AttentionExtras
from distattn.kernels.attention import accumulator_dtype
from distattn.kernels.uploads import upload
from distattn.plan import Plan
from distattn.spans import Bools, Ints


def choice_loss(
    q: Tensor, k: Tensor, plan: Plan, lookups: Ints, extras: AttentionExtras, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Of the rows that look something up; all ranks of the plan call this together.

    Counted are lookups in chunks that the row could choose; those in its window, and what is always chosen, need no
    choice.

    Args:
        q: [1, plan.tokens, heads, head_dim] and k: [1, plan.tokens, kv_heads, head_dim], what `attend` is given.
        plan: whose spec chooses by products with mean keys (score "mean").
        lookups: int64 [m, 2], the same on every rank: positions of rows, and of what each must find. It lies on the
            host, so that nothing waits for a GPU.
        extras: what `attend` is given.
        scale: of the scores; default head_dim ** -0.5.

    Returns:
        the sum of their losses in nats, the same on every rank, each with the gradient of its own rows alone; and
        [2], how many of these chunks are chosen, and how many there are to be: one a row (or tile) and choice.

    Raises:
        PeerLost, StepTimeout, PlanMismatch: as every exchange.
    """
    spec, hierarchy = plan.spec, plan.hierarchy
    select = spec.select
    assert select is not None and select.score == "mean" and hierarchy is not None
    chunk, chunks, kv_heads = hierarchy.chunk, hierarchy.chunks, plan.kv_heads
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dtype = accumulator_dtype(q.dtype)
    candidates = _candidates(plan)
    row, own, target = _counted(lookups, candidates, plan)

    def on_device(x: NDArray[Any]) -> Tensor:
        return upload([x], q.device)[0]

    with torch.autocast(q.device.type, enabled=False):
        pooled = k if extras.pool_keys is None else extras.pool_keys
        # Segments are whole chunks, but for the end of the sequence. Sums have an order, unlike those of an index_add.
        rows = F.pad(torch.cat((pooled[0], q[0]), dim=1).to(dtype), (0, 0, 0, 0, 0, -plan.tokens % chunk))
        mine = plan.on(q.device, "positions")[::chunk] // chunk
        sums = rows.new_zeros((chunks, *rows.shape[1:])).index_copy(0, mine, rows.unflatten(0, (-1, chunk)).sum(1))
        sizes = torch.full((chunks, 1, 1), chunk, dtype=dtype, device=q.device)
        sizes[-1] -= chunks * chunk - plan.seq_len
        keys, queries = _over_ranks(sums, plan).div(sizes).split([kv_heads, plan.heads], dim=1)
        if extras.rotate is not None:
            keys = extras.rotate(keys.unsqueeze(0), hierarchy.on(q.device, "chunk_centre"))[0]
        if select.per == "tile":
            chooser = queries[on_device(own - 1)]
        else:
            there, place = np.nonzero(row[:, None] == plan.positions.numpy())
            nothing = q.new_zeros((len(row), *q.shape[2:]), dtype=dtype)
            chooser = nothing.index_put((on_device(there),), q[0, on_device(place)].to(dtype))
            chooser = _over_ranks(chooser, plan)
        chooser = chooser.unflatten(1, (kv_heads, -1))  # [m, kv_heads, share, dim]
        if select.heads == "kv":
            chooser = chooser.sum(2, keepdim=True)
        scores = torch.einsum("mgsd,cgd->mgsc", chooser, keys) * scale
        until = on_device(own - hierarchy.window[1] + 1)[:, None]
        allowed = (torch.arange(chunks, device=q.device) < until) & on_device(candidates)
        scores = scores.masked_fill(~allowed[:, None, None], float("-inf"))
        right = on_device(target)[:, None, None].expand(scores.shape[:3])
        loss = F.cross_entropy(scores.flatten(0, 2), right.flatten(), reduction="sum")
        better = (scores.detach() > scores.detach().gather(3, right[..., None])).sum(3)
        chosen = (better < select.k - ("first" in select.always)).sum()
        return loss, torch.stack((chosen.to(dtype), torch.full_like(loss, right.numel())))


def _candidates(plan: Plan) -> Bools:
    """bool [chunks]: which are chosen by their scores."""
    hierarchy = plan.hierarchy
    assert hierarchy is not None and hierarchy.spec.select is not None
    found = hierarchy.selectable.copy()
    if "first" in hierarchy.spec.select.always:
        found[0] = False
    return found


def _counted(lookups: Ints, candidates: Bools, plan: Plan) -> tuple[Ints, Ints, Ints]:
    """(positions, their chunks, chunks to be chosen) of what is counted."""
    hierarchy = plan.hierarchy
    assert hierarchy is not None and hierarchy.spec.select is not None
    row, own, target = lookups[:, 0], lookups[:, 0] // hierarchy.chunk, lookups[:, 1] // hierarchy.chunk
    counted = (target < own - hierarchy.window[1] + 1) & candidates[target]
    row, own, target = row[counted], own[counted], target[counted]
    if hierarchy.spec.select.per == "tile":
        # One a tile and chunk, however many of its rows foretell a byte of the answer.
        _, first = np.unique(own * hierarchy.chunks + target, return_index=True)
        row, own, target = row[first], own[first], target[first]
    return row, own, target


def _over_ranks(x: Tensor, plan: Plan) -> Tensor:
    group = plan.group_name
    if group is None:
        return x
    total: Tensor = _Sum.apply(x, plan.world_size, group)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    """The sum over ranks, in their order. All ranks make the same of it, so its gradient is that of each rank's x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: str) -> Tensor:
        flat = x.reshape(-1).contiguous()
        return torch.stack(gather_rows(flat, [flat.numel()] * ranks, group)).sum(0).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[0], None, None

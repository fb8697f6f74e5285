"""The oracle: attention in float64 by its definition, with no planning, tiles, pages or kernels.

Who attends to whom comes from `Pattern.allows` alone. Everything that distattn computes by other means is
checked against these few functions, and `max_error` is the only measure of error that the project uses.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distattn.patterns import Pattern

Part = tuple[Tensor, Tensor]
"""Attention over some of the keys: out [B, R, H, Dv] and lse [B, R, H], both float64."""


def attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float | None = None) -> Part:
    """Dense masked attention over a whole sequence, in float64.

        s_ij = scale q_i . k_j,  lse_i = log sum_j exp(s_ij),  out_i = sum_j exp(s_ij - lse_i) v_j

    with j over the keys that `pattern` allows query i. Autograd gives the gradients of both results. A query
    that may attend to nothing gets out 0, lse -inf and gradients of exactly zero.

    Args:
        q: [B, N, H, D], any floating dtype.
        k: [B, N, Hkv, D]. Query head h reads key/value head h // (H // Hkv).
        v: [B, N, Hkv, Dv].
        pattern: which (query position, key position) pairs are attended.
        scale: what scores are multiplied by; 1 / sqrt(D) if None.

    Returns:
        out [B, N, H, Dv] and lse [B, N, H] (natural logarithm), float64, on the device of q. Needs O(B N^2)
        memory for the head in work, and that of all heads if gradients are wanted.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if q.ndim == 4 and k.ndim == 4 and k.shape[1] != q.shape[1]:
        raise ValueError(f"k has {k.shape[1]} rows; expected as many as q, {q.shape[1]}")
    positions = torch.arange(q.shape[1]) if q.ndim == 4 else torch.arange(0)
    return attention_rows(q, positions, k, v, pattern, scale, slice_keys=max(1, q.shape[1]))


def attention_rows(
    q: Tensor,
    positions: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float | None = None,
    *,
    key_positions: Tensor | None = None,
    slice_keys: int = 16_384,
) -> Part:
    """Attention of chosen query rows over all the keys, or over the keys that one rank owns, in float64.

    Keys are visited in slices, so that memory is O(B R slice_keys) beyond the arguments: a few dozen rows
    over a million keys are cheap. Where the keys are sharded, every rank calls this with the same queries and
    its own keys, and `merge` combines the results; nobody has to gather K and V.

        parts = [attention_rows(q, rows, k_r, v_r, pattern, key_positions=pos_r) for each rank r]
        out, lse = merge(parts)

    Args:
        q: [B, R, H, D], the queries of the chosen rows.
        positions: int64 [R], their positions in the sequence; any order.
        k: [B, n, Hkv, D].
        v: [B, n, Hkv, Dv].
        pattern: which (query position, key position) pairs are attended.
        scale: what scores are multiplied by; 1 / sqrt(D) if None.
        key_positions: int64 [n], the positions of the keys; 0 .. n - 1 if None.
        slice_keys: keys visited at a time.

    Returns:
        out [B, R, H, Dv] and lse [B, R, H], float64, on the device of q; see `attention`.

    Raises:
        ValueError: shapes that do not fit together, or slice_keys below 1.
    """
    if key_positions is None:
        key_positions = torch.arange(k.shape[1] if k.ndim == 4 else 0)
    _check(q, positions, k, v, key_positions)
    if slice_keys < 1:
        raise ValueError(f"slice_keys is {slice_keys}; expected at least 1")
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    patterns = pattern.by_head(heads)
    q64 = q.double()
    rows = positions.cpu().numpy()[:, None]
    total: Part | None = None
    for first in range(0, max(1, k.shape[1]), slice_keys):  # once even without keys: all rows are then empty
        piece = slice(first, first + slice_keys)
        columns = key_positions[piece].cpu().numpy()[None, :]
        masks = {p: np.broadcast_to(p.allows(rows, columns), (len(rows), columns.shape[1])) for p in set(patterns)}
        # Keys that no row of any head may attend to add nothing to the sums: leave them out first.
        used = np.logical_or.reduce([mask.any(axis=0) for mask in masks.values()])
        if total is not None and not used.any():
            continue
        index = torch.from_numpy(np.flatnonzero(used)).to(k.device)
        k64 = k[:, piece].index_select(1, index).double()
        v64 = v[:, piece].index_select(1, index).double()
        allowed = {p: torch.from_numpy(mask[:, used]).to(q.device) for p, mask in masks.items()}
        by_head = [
            _softmax_part(q64[:, :, h], k64[:, :, h // group], v64[:, :, h // group], allowed[p], scale)
            for h, p in enumerate(patterns)
        ]
        part = (
            torch.stack([out for out, _ in by_head], dim=2),
            torch.stack([lse for _, lse in by_head], dim=2),
        )
        total = part if total is None else merge([total, part])
    assert total is not None
    return total


def merge(parts: Sequence[Part]) -> Part:
    """Combine attention over disjoint sets of keys into attention over their union, by log-sum-exp.

        lse = log sum_p exp(lse_p),  out = sum_p exp(lse_p - lse) out_p

    Differentiable. Where every part is empty (lse -inf) the result is out 0 and lse -inf.

    Args:
        parts: at least one (out [..., Dv], lse [...]) of equal shapes; computed in float64 whatever their
            dtype.

    Returns:
        out [..., Dv] and lse [...], float64.

    Raises:
        ValueError: no parts, or parts of different shapes.
    """
    if not parts:
        raise ValueError("parts is empty; expected at least one (out, lse)")
    shapes = {(tuple(out.shape), tuple(lse.shape)) for out, lse in parts}
    if len(shapes) > 1:
        raise ValueError(f"parts have the shapes {sorted(shapes)}; expected all alike")
    outs = torch.stack([out.double() for out, _ in parts])
    lses = torch.stack([lse.double() for _, lse in parts])
    weights, lse, empty = _softmax_weights(lses, dim=0)
    return (weights.unsqueeze(-1) * outs).sum(dim=0).masked_fill(empty.unsqueeze(-1), 0.0), lse


def max_error(x: Tensor, reference: Tensor) -> float:
    """max |x - reference| / max(1, max |reference|), the error that every tolerance in this project is about.

    Equal infinities (the lse of a row that attends to nothing) count as no error. A NaN, or an infinity on
    one side only, makes the error inf, so that a comparison with a tolerance cannot pass by accident.

    Args:
        x: any shape, any floating dtype.
        reference: the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != reference.shape:
        raise ValueError(f"x has the shape {tuple(x.shape)}; expected {tuple(reference.shape)}, as reference")
    if x.numel() == 0:
        return 0.0
    x64, ref64 = x.detach().double(), reference.detach().double().to(x.device)
    distance = (x64 - ref64).abs().masked_fill(x64 == ref64, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    largest = ref64.abs().masked_fill(~ref64.isfinite(), 0.0).max().item()
    return distance.max().item() / max(1.0, largest)


def _softmax_part(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Part:
    """One head: q [B, R, D], k [B, n, D], v [B, n, Dv], allowed bool [R, n] -> out [B, R, Dv], lse [B, R]."""
    scores = (scale * (q @ k.transpose(1, 2))).masked_fill(~allowed, -math.inf)
    weights, lse, empty = _softmax_weights(scores, dim=2)
    return (weights @ v).masked_fill(empty.unsqueeze(-1), 0.0), lse


def _softmax_weights(scores: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over `dim` that is safe, forward and backward, where all scores are -inf.

    Returns:
        the weights, of the shape of scores (all 0 where every score is -inf), the log-sum-exp, without `dim`
        (-inf there), and whether every score was -inf, bool, without `dim`.
    """
    if scores.shape[dim] == 0:
        lse = scores.sum(dim=dim) - math.inf
        return scores, lse, torch.ones_like(lse, dtype=torch.bool)
    largest = scores.detach().amax(dim=dim, keepdim=True)
    empty = largest == -math.inf
    largest = largest.masked_fill(empty, 0.0)
    weights = torch.exp(scores - largest)
    norm = weights.sum(dim=dim, keepdim=True).masked_fill(empty, 1.0)
    lse = (largest + norm.log()).masked_fill(empty, -math.inf)
    return weights / norm, lse.squeeze(dim), empty.squeeze(dim)


def _check(q: Tensor, positions: Tensor, k: Tensor, v: Tensor, key_positions: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has the shape {tuple(x.shape)}; expected [batch, rows, heads, dim]")
    batch, rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k has the shape {tuple(k.shape)}; expected [{batch}, n, kv_heads, {dim}] as q")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has the shape {tuple(v.shape)}; expected [{batch}, {k.shape[1]}, {kv_heads}, any]")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads; expected a multiple of the {kv_heads} key/value heads of k")
    if positions.shape != (rows,):
        raise ValueError(f"positions has the shape {tuple(positions.shape)}; expected [{rows}], as q has rows")
    if key_positions.shape != (k.shape[1],):
        shape = tuple(key_positions.shape)
        raise ValueError(f"key_positions has the shape {shape}; expected [{k.shape[1]}], as k has rows")

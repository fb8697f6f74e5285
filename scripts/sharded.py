"""The data of a sequence that is sharded, whoever owns which rows, and sampled rows of its attention in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distattn import hierarchy_rows, reference
from distattn.spec import AttentionSpec

Segments = tuple[tuple[int, int], ...]
"""Runs of positions (first, stop) that a rank owns, ascending."""

SAMPLED = 16  # rows that are checked
_BLOCK = 1024  # rows that are made at a time, from a seed of their own


class Data:
    """q, k, v and the output's gradient of one sequence of ``length`` tokens, normally distributed.

    A row depends on its position alone, so that all that run on it, in whatever layout, attend to the same.
    """

    KINDS = ("q", "k", "v", "grad")

    def __init__(
        self, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.length, self.dim, self.dtype, self.device = length, dim, dtype, device
        self.heads = {"q": heads, "k": kv_heads, "v": kv_heads, "grad": heads}
        self._generator = torch.Generator(device=device)

    def rows(self, kind: str, segments: Segments) -> Tensor:
        """[1, tokens, heads, dim]: the rows of some segments, one after the other."""
        heads = self.heads[kind]
        rows = torch.empty(sum(b - a for a, b in segments), heads, self.dim, dtype=self.dtype, device=self.device)
        at = 0
        for first, stop in segments:
            for block in range(first // _BLOCK, -(-stop // _BLOCK)):
                a, b = max(first, block * _BLOCK), min(stop, (block + 1) * _BLOCK)
                self._generator.manual_seed(4 * block + self.KINDS.index(kind))
                size = (_BLOCK, heads, self.dim)
                made = torch.randn(size, generator=self._generator, dtype=self.dtype, device=self.device)
                rows[at : at + b - a] = made[a - block * _BLOCK : b - block * _BLOCK]
                at += b - a
        return rows.unsqueeze(0)

    def at(self, kind: str, positions: Sequence[int]) -> Tensor:
        """[1, positions, heads, dim]."""
        return self.rows(kind, tuple((i, i + 1) for i in positions))


def contiguous(length: int, rank: int, ranks: int) -> Segments:
    """The segments of one of ranks that own a run each, to within a row of the same length."""
    return ((rank * length // ranks, (rank + 1) * length // ranks),)


def sampled(length: int) -> list[int]:
    """Positions spread over the whole sequence, the first and the last among them."""
    return sorted({round(i * (length - 1) / (SAMPLED - 1)) for i in range(SAMPLED)})


def assemble(x: Tensor, segments: Segments, positions: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """[positions, ...]: those rows of x [tokens, ...], sharded over a group by ``segments``, on every rank."""
    found = x.new_zeros(len(positions), *x.shape[1:])
    before = 0
    for first, stop in segments:
        for at, i in enumerate(positions):
            if first <= i < stop:
                found[at] = x[before + i - first]
        before += stop - first
    dist.all_reduce(found, group=group)  # one rank has each row, others add zeros
    return found


def oracle(data: Data, spec: AttentionSpec, positions: Sequence[int], chosen: Tensor | None) -> Tensor:
    """[1, positions, heads, dim] in float64, on every rank: what the rows at these positions must be.

    A collective over all ranks, each of which attends over as many of the keys.

    chosen: int [positions, tables, n]: chunks that the rows chose, where the spec has them choose.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = contiguous(data.length, rank, ranks)
    q, k, v = data.at("q", positions), data.rows("k", mine), data.rows("v", mine)
    own = torch.arange(*mine[0])
    more: list[reference.Part] = []
    if spec.is_static:
        at = torch.tensor(positions)
        out, lse = reference.attention_rows(q, at, k, v, spec.tokens, key_positions=own)
    else:

        def total(x: Tensor) -> Tensor:
            dist.all_reduce(x)
            return x

        given = None if chosen is None else chosen.cpu()
        (out, lse), summaries = hierarchy_rows.attention_rows(
            q, list(positions), k, v, spec, data.length, key_positions=own, chosen=given, total=total
        )
        more.append(summaries)
    outs, lses = ([torch.empty_like(x) for _ in range(ranks)] for x in (out, lse))
    dist.all_gather(outs, out.contiguous())
    dist.all_gather(lses, lse.contiguous())
    return reference.merge([*zip(outs, lses, strict=True), *more])[0]


def error_of(x: Tensor, expected: Tensor) -> float:
    """The largest difference in a row of a head, over the largest number of that row; inf for what is not finite.

    Outputs and gradients become smaller the more keys a row attends to, so each row is measured by itself.

    x, expected: [..., dim].
    """
    x, expected = x.double(), expected.double()
    error = (x - expected).abs().amax(-1) / expected.abs().amax(-1).clamp_min(1e-30)
    return error.nan_to_num(nan=math.inf).max().item()

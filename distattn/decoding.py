"""One step of a cache: sequences get new tokens, whose queries visit pages wherever these lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distattn import operators
from distattn.algebra import Pattern
from distattn.axis import Axis
from distattn.errors import ConfigError
from distattn.exchange import Exchange
from distattn.extras import AttentionExtras
from distattn.kernels.attention import Pages, accumulator_dtype, attention_forward
from distattn.kernels.decode import decode_attention
from distattn.kernels.selected import AnyTable
from distattn.kernels.table import TileTable
from distattn.paged import Tiles, place, table_of, wanted
from distattn.patterns import Causal
from distattn.routes import Part, Routes
from distattn.spans import Ints
from distattn.spec import AttentionSpec
from distattn.tiles import visit

if TYPE_CHECKING:
    from distattn.cache import Cache

FEW = 16
"""Up to so many new tokens of each sequence are attended one by one; more are tiles."""
_BLOCK_Q = 128


@dataclass(frozen=True, eq=False)
class _Group:
    """What layers of one spec share in a step."""

    tiles: Tiles
    routes: Routes
    table: TileTable


class Step:
    """New tokens of some sequences, one after the other: made by ``Cache.begin``.

    Attributes:
        counts: how many new tokens, by sequence, in the order of the rows.
        rows: of all ranks.
        mine: (first, stop), those that this rank computes.
        positions: int64 tensor, of these.
    """

    def __init__(self, cache: Cache, counts: Mapping[int, int], start: Ints, stay: tuple[Ints, Ints]) -> None:
        self.cache, self.counts, self.start = cache, dict(counts), start
        self.count = np.fromiter(counts.values(), np.int64)
        self.rows = int(self.count.sum())
        self._stay = stay
        self._home = np.arange(self.rows) * cache.world_size // self.rows
        first, stop = np.searchsorted(self._home, [cache.rank, cache.rank + 1])
        self.mine = int(first), int(stop)
        at = np.repeat(start - (self.count.cumsum() - self.count), self.count) + np.arange(self.rows)
        self.positions = torch.from_numpy(at[first:stop])
        said = repr((list(counts.items()), start.tolist())).encode()
        name = hashlib.blake2b(said, digest_size=4).hexdigest()
        self._exchange = Exchange(cache.group_name, cache.rank, operators.sent, name)
        self._groups: dict[AttentionSpec, _Group] = {}

    def home(self, row: int) -> int:
        """The rank that computes a row."""
        return int(self._home[row])

    def last_rows(self) -> dict[int, int]:
        """By sequence, its last new row."""
        return dict(zip(self.counts, (self.count.cumsum() - 1).tolist(), strict=True))

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        extras: AttentionExtras | None = None,
    ) -> Tensor:
        """Attention of this rank's new rows to the cache and to each other; their keys and values are kept.

        All ranks call it, once for each layer.

        Args:
            q: [1, rows of this rank, heads, head_dim], in the cache's dtype. k, v: [1, rows of this rank, kv_heads, dim].
            scale: factor of the scores; default ``head_dim ** -0.5``.
            extras: what the spec needs beside these, as in :func:`attend`.

        Returns:
            out [1, rows of this rank, heads, value_dim], in the dtype of q.

        Raises:
            ConfigError: a shape or a dtype is not what the cache has.
            PeerLost, StepTimeout, PlanMismatch: as every exchange.
        """
        cache = self.cache
        scale = cache.head_dim**-0.5 if scale is None else scale
        self._check(q, k, v)
        spec = cache.specs[layer]
        if spec not in self._groups:
            self._groups[spec] = self._group(spec)
        group = self._groups[spec]
        asks, (slots, kept_k, kept_v), _ = group.routes.go(q[0], k[0], v[0], None)
        pool_k, pool_v = cache.k[layer], cache.v[layer]
        pool_k[slots], pool_v[slots] = kept_k, kept_v
        parts = [attend_tiles(asks, pool_k, pool_v, group.table, scale)]
        (out, _), *_ = group.routes.come_back(parts, q.shape[1])
        return out.to(q.dtype).unsqueeze(0)

    def end(self) -> None:
        """After the last layer: lets go what no later query visits."""
        for sequence, start, count in zip(self.counts, self.start.tolist(), self.count.tolist(), strict=True):
            if (start + count) // self.cache.block_k > start // self.cache.block_k:
                self.cache.release(sequence)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        cache, rows = self.cache, self.mine[1] - self.mine[0]
        shapes = {
            "q": (q, (1, rows, cache.heads, cache.head_dim)),
            "k": (k, (1, rows, cache.kv_heads, cache.head_dim)),
            "v": (v, (1, rows, cache.kv_heads, cache.value_dim)),
        }
        for name, (x, shape) in shapes.items():
            if tuple(x.shape) != shape or x.dtype != cache.dtype:
                why = f"{name} is {x.dtype} {tuple(x.shape)}; expected {cache.dtype} {shape} on rank {cache.rank}"
                if cache.group_name is not None:
                    operators.refuse_in(cache.group_name, why)
                raise ConfigError(why)

    @cached_property
    def _pages(self) -> tuple[Ints, Ints, Ints]:
        """(first int64 [sequences + 1], owner, block) of the pages of all sequences, one after the other."""
        found = [self.cache.tables.pages(sequence) for sequence in self.counts]
        first = np.cumsum([0, *(len(owner) for owner, _ in found)])
        owner, block = (np.concatenate(x).astype(np.int64) for x in zip(*found, strict=True))
        return first, owner, block

    def _group(self, spec: AttentionSpec) -> _Group:
        cache = self.cache
        tiles = Tiles.of(self.start, self.count, 1 if self.count.max() <= FEW else _BLOCK_Q)
        first, owner, block = self._pages

        def where(tile: Ints, page: Ints) -> tuple[Ints, Ints]:
            sequence = tiles.sequence[tile]
            at = first[sequence] + page
            there = at < first[sequence + 1]  # rows behind the new ones of a sequence may ask for more
            at = np.where(there, at, 0)
            return np.where(there, owner[at], -1), block[at]

        patterns = [causal(pattern) for pattern in spec.tokens.by_head(cache.heads)]
        distinct = list(dict.fromkeys(patterns))
        length = int((self.start + self.count).max())
        axes = Axis(length, tiles.block, first=tiles.first), Axis.grid(length, cache.block_k)
        placed = [place(visit(pattern, *axes), where) for pattern in distinct]
        head_table = tuple(distinct.index(pattern) for pattern in patterns)
        asked = wanted(placed, len(tiles), cache.world_size)
        routes = Routes.of(self._exchange, self._home, self._stay, tiles, asked, False, cache.device)
        blocks = tiles.block, cache.block_k
        table = table_of(placed, cache.rank, asked[:, cache.rank], head_table, blocks, cache.tables.blocks)
        return _Group(tiles, routes, table)


def causal(pattern: Pattern) -> Pattern:
    """What the pattern allows of the positions up to the query's."""
    return pattern if isinstance(pattern, Causal) else Causal() & pattern


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, table: AnyTable, scale: float, bias: Tensor | None = None) -> Part:
    """(out [rows, heads, value_dim], lse [rows, heads]) of query tiles, in the accumulator's dtype.

    q: [rows, heads, head_dim]. k, v: [slots, kv_heads, dim]. bias: [slots, kv_heads].
    """
    if table.block_q == 1:
        return decode_attention(q, k, v, table, scale=scale, bias=bias)
    dtype = accumulator_dtype(q.dtype)
    out = q.new_zeros((1, q.shape[0], q.shape[1], v.shape[2]), dtype=dtype)
    lse = q.new_full(out.shape[:3], -torch.inf, dtype=dtype)
    own, nothing = Pages(k.unsqueeze(0), v.unsqueeze(0)), Pages(k[:0].unsqueeze(0), v[:0].unsqueeze(0))
    attention_forward(q.unsqueeze(0), own, nothing, table, out, lse, scale=scale)
    return out[0], lse[0]

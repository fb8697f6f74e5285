"""How the rows of one step travel between ranks, and back: queries to pages, keys and values to where they stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distattn.exchange import Exchange
from distattn.kernels.rows import merge_all
from distattn.kernels.uploads import upload
from distattn.paged import Tiles
from distattn.pages import Written
from distattn.spans import Bools, Ints

Part = tuple[Tensor, Tensor]
"""Attention over some of the keys: out [rows, heads, value_dim] and lse [rows, heads]."""


def rows_of(rank: int, ranks: int, rows: int) -> tuple[int, int]:
    """(first, stop): which of the new rows a rank computes."""
    return -(-rank * rows // ranks), -(-(rank + 1) * rows // ranks)


@dataclass(frozen=True, eq=False)
class Routes:
    """Which rows go where; the same arrays on all ranks.

    Attributes:
        rows: new ones. Each rank computes as many, to within one, in their order.
        stay: where their keys and values stay.
        tiles: of the rows. wanted: bool [tiles, ranks], which ranks a tile visits; all of them, if there is one rank.
        everywhere: whether what summaries are made of, and every query, goes to all ranks.
    """

    exchange: Exchange
    rows: int
    stay: Written
    tiles: Tiles
    wanted: Bools
    everywhere: bool
    device: torch.device
    _there: dict[tuple[str, int], slice | Tensor] = field(default_factory=dict)
    _how_many: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.exchange.rank

    @cached_property
    def asked(self) -> Bools:
        """bool [rows, ranks]: which ranks a query visits."""
        return self.wanted[self.tiles.place // self.tiles.block]

    @cached_property
    def place(self) -> Ints:
        """int64 [rows]: of each row among the query tiles of this rank; of rows that visit this rank."""
        number, block = np.cumsum(self.wanted[:, self.rank]) - 1, self.tiles.block
        return number[self.tiles.place // block] * block + self.tiles.place % block

    @cached_property
    def places(self) -> int:
        """Rows of all query tiles of this rank. Tiles that it has nothing for are left out."""
        return int(self.wanted[:, self.rank].sum()) * self.tiles.block

    @cached_property
    def stays_here(self) -> bool:
        """Whether there is one rank, and the rows as they are make up its query tiles.

        The last tile may be short; but not where smaller tiles choose, of which some would be behind all rows.
        """
        whole = self.places == self.rows or not self.everywhere
        return self.exchange.world_size == 1 and whole and self.tiles.are_rows

    def go(
        self, q: Tensor, k: Tensor, v: Tensor, plain: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | slice, Tensor, Tensor], tuple[Tensor, ...] | None]:
        """Sends this rank's rows out, and receives what is meant for this rank.

        Args:
            q: [mine, heads, head_dim]. k, v: [mine, kv_heads, dim].
            plain: what is pooled instead of k; with ``everywhere``.

        Returns:
            the query tiles [places, heads, head_dim]; (slots of n rows, k, v) that stay here; and with ``everywhere``
            queries and what is pooled of all rows, (q [rows, ..], plain, v).
        """
        pooled: tuple[Tensor, ...] | None = None
        if self.stays_here:
            if self.everywhere:
                assert plain is not None
                pooled = q, plain, v
            return q, (self.stay.run or self._slots, k, v), pooled
        rows, width = self.rows, (q.shape[1:], k.shape[1:], v.shape[1:])
        sizes = [int(np.prod(shape)) for shape in width]
        if self.everywhere:
            assert plain is not None
            pooled = tuple(q.new_empty((rows, *shape)) for shape in width)
        asks = q.new_zeros((self.places, *width[0]))
        kept_k: list[Tensor] = []
        kept_v: list[Tensor] = []

        def take(peer: int, parts: list[Tensor]) -> None:
            asks[self._at("place", peer)] = parts[0]
            kept_k.append(parts[1])
            kept_v.append(parts[2])
            if pooled is not None:
                first, stop = self._rows_of(peer)
                for target, part in zip(pooled, (parts[0], parts[3], parts[4]), strict=True):
                    target[first:stop] = part

        def give(peer: int) -> list[Tensor]:
            query, stays = self._at("query", peer), self._at("stays", peer)
            parts = [q[query], k[stays], v[stays]]
            return parts if plain is None or not self.everywhere else [*parts, plain, v]

        def deliver(flat: Tensor) -> None:
            got = dict(zip(receives, flat.split([*receives.values()]), strict=True)) if receives else {}
            for peer in range(self.exchange.world_size):
                if peer == self.rank:
                    take(peer, give(peer))
                elif peer in got:
                    counts = self._counts(peer, self.rank)
                    shapes = [(count, *width[kind]) for count, kind in zip(counts, (0, 1, 2, 1, 2), strict=False)]
                    parts = got[peer].split([int(np.prod(shape)) for shape in shapes])
                    take(peer, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)])

        def total(source: int, target: int) -> int:
            counts = self._counts(source, target)
            return sum(count * sizes[kind] for count, kind in zip(counts, (0, 1, 2, 1, 2), strict=False))

        peers = [peer for peer in range(self.exchange.world_size) if peer != self.rank]
        sends = {p: total(self.rank, p) for p in peers if total(self.rank, p)}
        flat = torch.cat([q.new_empty(0), *(x.flatten() for p in sends for x in give(p))])
        receives = {p: total(p, self.rank) for p in peers if total(p, self.rank)}
        into = q.new_empty(sum(receives.values()))
        self.exchange.send("bring queries to the cache", "cache", flat, sends, into, receives, deliver).wait()
        return asks, (self._slots, torch.cat(kept_k), torch.cat(kept_v)), pooled

    def come_back(self, parts: list[Part], mine: int) -> list[Part]:
        """Sends partial results of the query tiles to where their rows are computed, and merges what comes.

        Args:
            parts: of this rank's query tiles, one or several softmaxes.
            mine: how many rows this rank computes.
        """
        if self.stays_here:
            return parts
        out, lse = parts[0]
        ranks, heads, dim = self.exchange.world_size, lse.shape[1], out.shape[2]
        outs = out.new_zeros((len(parts), ranks, mine, heads, dim))
        lses = lse.new_full((len(parts), ranks, mine, heads), -torch.inf)

        def give(peers: Iterable[int]) -> Tensor:
            places = [self._at("place", peer) for peer in peers]
            rows = [y[at].flatten() for at in places for pair in parts for y in pair]
            return torch.cat([out.new_empty(0), *rows])

        def deliver(flat: Tensor) -> None:
            got = dict(zip(receives, flat.split([*receives.values()]), strict=True)) if receives else {}
            for peer in range(ranks):
                count = self._counts(self.rank, peer)[0]
                if not count:
                    continue
                results = give([peer]) if peer == self.rank else got[peer]
                at = self._at("query", peer)
                for number, part in enumerate(results.chunk(len(parts))):
                    values, logs = part.split([count * heads * dim, count * heads])
                    outs[number, peer][at] = values.view(count, heads, dim)
                    lses[number, peer][at] = logs.view(count, heads)

        peers = [peer for peer in range(ranks) if peer != self.rank]
        sends = {p: n * heads * (dim + 1) * len(parts) for p in peers if (n := self._counts(p, self.rank)[0])}
        counts = {p: self._counts(self.rank, p)[0] for p in peers}
        receives = {p: count * heads * (dim + 1) * len(parts) for p, count in counts.items() if count}
        into = out.new_empty(sum(receives.values()))
        self.exchange.send("return results of the cache", "cache", give(sends), sends, into, receives, deliver).wait()
        return [merge_all(outs[number], lses[number]) for number in range(len(parts))]

    def _counts(self, source: int, target: int) -> list[int]:
        """Rows that go from one rank to another: queries, keys, values, and what is pooled."""
        if (source, target) not in self._how_many:
            first, stop = self._rows_of(source)
            stays = int((self.stay.owner[first:stop] == target).sum())
            counts = [int(self.asked[first:stop, target].sum()), stays, stays]
            self._how_many[source, target] = [*counts, *[stop - first] * 2] if self.everywhere else counts
        return self._how_many[source, target]

    def _rows_of(self, rank: int) -> tuple[int, int]:
        return rows_of(rank, self.exchange.world_size, self.rows)

    def _at(self, what: str, peer: int) -> slice | Tensor:
        """Rows, as a slice where they follow each other. Of what a peer sends here: "place" of its queries; of what
        goes to a peer: rows of this rank, "query" those that visit it, "stays" those whose keys stay there."""
        if (what, peer) not in self._there:
            first, stop = self._rows_of(peer if what == "place" else self.rank)
            part = slice(first, stop)
            if what == "query":
                found = np.flatnonzero(self.asked[part, peer])
            elif what == "stays":
                found = np.flatnonzero(self.stay.owner[part] == peer)
            else:
                found = self.place[part][self.asked[part, self.rank]]
            first = int(found[0]) if len(found) else 0
            follow = (np.diff(found) == 1).all()
            self._there[what, peer] = slice(first, first + len(found)) if follow else upload([found], self.device)[0]
        return self._there[what, peer]

    @cached_property
    def _slots(self) -> Tensor:
        """int64: where the keys stay that come to this rank, in the order in which they come."""
        return upload([self.stay.slot[self.stay.owner == self.rank]], self.device)[0]

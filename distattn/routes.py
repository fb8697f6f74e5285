"""How the rows of one step travel between ranks, and back: queries to pages, keys and values to where they stay."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distattn.exchange import Exchange
from distattn.kernels.rows import merge
from distattn.paged import Tiles
from distattn.spans import Bools, Ints

Part = tuple[Tensor, Tensor]
"""Attention over some of the keys: out [rows, heads, value_dim] and lse [rows, heads]."""


@dataclass(frozen=True, eq=False)
class Routes:
    """Which rows go where; the same arrays on all ranks.

    Attributes:
        home: int64 [rows], ascending: the rank that computes each new row.
        owner, slot: int64 [rows]: where its key and value stay.
        asked: bool [rows, ranks]: which ranks a query visits.
        place: int64 [rows]: of each row among the query tiles of this rank; of rows that visit this rank.
        places: rows of all of these tiles.
        everywhere: whether what summaries are made of, and every query, goes to all ranks.
    """

    exchange: Exchange
    rank: int
    home: Ints
    owner: Ints
    slot: Ints
    asked: Bools
    place: Ints
    places: int
    everywhere: bool
    device: torch.device
    _copies: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        exchange: Exchange,
        home: Ints,
        stay: tuple[Ints, Ints],
        tiles: Tiles,
        wanted: Bools,
        everywhere: bool,
        device: torch.device,
    ) -> Routes:
        """wanted: bool [tiles, ranks]. Tiles that this rank has nothing for are left out of ``place``."""
        rank = exchange.rank
        number = np.cumsum(wanted[:, rank]) - 1
        tile = tiles.place // tiles.block
        place = number[tile] * tiles.block + tiles.place % tiles.block
        places = int(wanted[:, rank].sum()) * tiles.block
        return Routes(exchange, rank, home, *stay, wanted[tile], place, places, everywhere, device)

    def go(
        self, q: Tensor, k: Tensor, v: Tensor, plain: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...] | None]:
        """Sends this rank's rows out, and receives what is meant for this rank.

        Args:
            q: [mine, heads, head_dim]. k, v: [mine, kv_heads, dim].
            plain: what is pooled instead of k; with ``everywhere``.

        Returns:
            the query tiles [places, heads, head_dim]; (slots int64 [n], k, v) that stay here; and with ``everywhere``
            queries and what is pooled of all rows, (q [rows, ..], plain, v).
        """
        rows, width = len(self.home), (q.shape[1:], k.shape[1:], v.shape[1:])
        sizes = [int(np.prod(shape)) for shape in width]
        pooled: tuple[Tensor, ...] | None = None
        if self.everywhere:
            assert plain is not None
            pooled = tuple(q.new_empty((rows, *shape)) for shape in width)
        asks = q.new_zeros((self.places, *width[0]))
        slots, kept_k, kept_v = [], [], []

        def take(peer: int, parts: list[Tensor]) -> None:
            asks[self._at("place", peer)] = parts[0]
            slots.append(self._at("slot", peer))
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

        def deliver(got: dict[int, Tensor]) -> None:
            for peer in range(self.exchange.world_size):
                if peer == self.rank:
                    take(peer, give(peer))
                elif peer in got:
                    counts = self._counts(peer, self.rank)
                    shapes = [(count, *width[kind]) for count, kind in zip(counts, (0, 1, 2, 1, 2), strict=False)]
                    flat = got[peer].split([int(np.prod(shape)) for shape in shapes])
                    take(peer, [part.view(shape) for part, shape in zip(flat, shapes, strict=True)])

        def total(source: int, target: int) -> int:
            counts = self._counts(source, target)
            return sum(count * sizes[kind] for count, kind in zip(counts, (0, 1, 2, 1, 2), strict=False))

        peers = [peer for peer in range(self.exchange.world_size) if peer != self.rank]
        sends = {p: torch.cat([x.flatten() for x in give(p)]) for p in peers if total(self.rank, p)}
        receives = {p: total(p, self.rank) for p in peers if total(p, self.rank)}
        self.exchange.send("bring", "cache", sends, receives, q, deliver, pairs=False).wait()
        return asks, (torch.cat(slots), torch.cat(kept_k), torch.cat(kept_v)), pooled

    def come_back(self, parts: list[Part], mine: int) -> list[Part]:
        """Sends partial results of the query tiles to where their rows are computed, and merges what comes, in order.

        Args:
            parts: of this rank's query tiles, one or several softmaxes.
            mine: how many rows this rank computes.
        """
        out, lse = parts[0]
        merged = [(o.new_zeros((mine, *o.shape[1:])), x.new_full((mine, x.shape[1]), -torch.inf)) for o, x in parts]
        width = lse.shape[1] * (out.shape[2] + 1)

        def give(peer: int) -> Tensor:
            at = self._at("place", peer)
            return torch.cat([x for o, x in parts for x in (o[at].flatten(), x[at].flatten())])

        def deliver(got: dict[int, Tensor]) -> None:
            for peer in range(self.exchange.world_size):
                flat = give(peer) if peer == self.rank else got.get(peer)
                if flat is None or not flat.numel():
                    continue
                at = self._at("query", peer)
                for (total, total_lse), part in zip(merged, flat.chunk(len(parts)), strict=True):
                    values, logs = part.split([len(at) * lse.shape[1] * out.shape[2], len(at) * lse.shape[1]])
                    values, logs = values.view(len(at), *out.shape[1:]), logs.view(len(at), -1)
                    total[at], total_lse[at] = merge(total[at], total_lse[at], values, logs)

        peers = [peer for peer in range(self.exchange.world_size) if peer != self.rank]
        sends = {p: give(p) for p in peers if self._counts(p, self.rank)[0]}
        counts = {p: self._counts(self.rank, p)[0] for p in peers}
        receives = {p: count * width * len(parts) for p, count in counts.items() if count}
        self.exchange.send("return", "cache", sends, receives, out, deliver, pairs=False).wait()
        return merged

    def _counts(self, source: int, target: int) -> list[int]:
        """Rows that go from one rank to another: queries, keys, values, and what is pooled."""
        first, stop = self._rows_of(source)
        stays = int((self.owner[first:stop] == target).sum())
        counts = [int(self.asked[first:stop, target].sum()), stays, stays]
        return [*counts, stop - first, stop - first] if self.everywhere else counts

    def _rows_of(self, rank: int) -> tuple[int, int]:
        first, stop = np.searchsorted(self.home, [rank, rank + 1])
        return int(first), int(stop)

    def _at(self, what: str, peer: int) -> Tensor:
        """int64 on the device. Of what a peer sends here: "place" of its queries, "slot" of its keys; of what goes to a
        peer: rows of this rank, "query" those that visit it, "stays" those whose keys stay there."""
        if (what, peer) not in self._copies:
            first, stop = self._rows_of(self.rank if what in ("query", "stays") else peer)
            part = slice(first, stop)
            if what == "query":
                found = np.flatnonzero(self.asked[part, peer])
            elif what == "stays":
                found = np.flatnonzero(self.owner[part] == peer)
            elif what == "place":
                found = self.place[part][self.asked[part, self.rank]]
            else:
                found = self.slot[part][self.owner[part] == self.rank]
            self._copies[what, peer] = torch.from_numpy(found).to(self.device)
        return self._copies[what, peer]

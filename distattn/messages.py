"""Which rows travel between ranks. Plans make these, and the exchange carries them out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distattn.kernels.rows import Places

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Message:
    """Rows that travel between this rank and a peer.

    peer: a rank; this rank itself for rows that only move into the guest buffer.
    kv_heads: the key/value heads that travel, as indices; query heads where queries travel.
    rows: int64 [runs, 2], runs (first, stop) of rows: of the rank's own tokens where it sends, of the
        guest buffer where it receives.
    """

    peer: int
    kv_heads: tuple[int, ...]
    rows: Ints

    @cached_property
    def places(self) -> Places:
        return Places(self.rows, self.kv_heads)

    @property
    def count(self) -> int:
        return self.places.count


@dataclass(frozen=True, eq=False)
class Parcel:
    """Messages to other ranks, or from them, as one flat tensor: one after the other, by peer.

    places: what is packed, and unpacked, at a time: the rows of all messages, joined, or where heads differ of each.
    rows: by peer, ascending: rows of one head.
    """

    places: tuple[Places, ...]
    rows: dict[int, int]

    @staticmethod
    def of(messages: Iterable[Message]) -> Parcel:
        """messages: sorted by peer."""
        rows: dict[int, int] = {}
        places = []
        for message in messages:
            rows[message.peer] = rows.get(message.peer, 0) + message.count * len(message.kv_heads)
            places.append(message.places)
        if len({part.heads for part in places}) == 1:
            places = places if len(places) == 1 else [Places.joined(places)]
        return Parcel(tuple(places), rows)


@dataclass(frozen=True, eq=False)
class Transfer:
    """Messages that travel together.

    kind: "neighbours" (each rank with few others), "all_to_all" (one uneven collective), or "all_gather" (every
        rank sends the same rows to all; ``chunk`` is the largest rank's number of them, to which others are padded).
    sends, receives: by peer. An all_gather has one entry in ``sends``, with this rank as peer.
    returns: what comes back when what was received goes home: a message for each that went out, to each rank in the
        case of an all_gather.
    """

    kind: str
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    returns: tuple[Message, ...]
    chunk: int = 0

    def parcel(self, which: str, but: int | None = None) -> Parcel:
        """What of "sends", "receives" or "returns" goes to all ranks but one, or comes from them. Kept."""
        if (which, but) not in self._parcels:
            self._parcels[which, but] = Parcel.of(m for m in getattr(self, which) if m.peer != but)
        return self._parcels[which, but]

    @cached_property
    def _parcels(self) -> dict[tuple[str, int | None], Parcel]:
        return {}

    def sent_bytes(self, row_bytes: int, rank: int, world_size: int) -> int:
        """Bytes that this rank sends to others, where a row of one key/value head has ``row_bytes``."""
        if self.kind == "all_gather":
            return (world_size - 1) * self.chunk * len(self.sends[0].kv_heads) * row_bytes
        return sum(m.count * len(m.kv_heads) for m in self.sends if m.peer != rank) * row_bytes

    def received_bytes(self, row_bytes: int, rank: int, world_size: int) -> int:
        if self.kind == "all_gather":
            return self.sent_bytes(row_bytes, rank, world_size)
        return sum(m.count * len(m.kv_heads) for m in self.receives if m.peer != rank) * row_bytes

    def returned_bytes(self, row_bytes: int, rank: int) -> int:
        """Bytes that this rank sends when what it received goes home (gradients, partial results)."""
        return sum(m.count * len(m.kv_heads) for m in self.receives if m.peer != rank) * row_bytes


def join_runs(first: Ints, stop: Ints) -> Ints:
    """int64 [runs, 2]: intervals that follow one another joined."""
    if len(first) == 0:
        return np.zeros((0, 2), np.int64)
    new = np.concatenate((np.ones(1, np.bool_), first[1:] != stop[:-1]))
    return np.stack((first[new], stop[np.append(new[1:], True)]), axis=1)


def to_everyone(owner: Ints, local: Ints, heads: tuple[int, ...], rank: int, world_size: int) -> Transfer:
    """Brings rows of all ranks to every rank, in order, to the front of a buffer.

    owner: int64 [n], who owns each row. local: int64 [m]: those of this rank, as rows of what it sends.
    """
    counts = np.bincount(owner, minlength=world_size)
    send_rows = join_runs(local, local + 1)
    receives = []
    for peer in np.flatnonzero(counts):
        at = np.flatnonzero(owner == peer)
        receives.append(Message(int(peer), heads, join_runs(at, at + 1)))
    # Padding is cheap where ranks hold similarly many rows; otherwise each sends just its own.
    sends = tuple(Message(peer, heads, send_rows) for peer in range(world_size)) if len(local) else ()
    if counts.max() * world_size <= 2 * counts.sum():
        mine = Message(rank, heads, send_rows)
        return Transfer("all_gather", (mine,), tuple(receives), sends, int(counts.max()))
    return Transfer("all_to_all", sends, tuple(receives), sends)

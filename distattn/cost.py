"""What a rank computes, sends and receives, and how a pass that does it goes through time. Nothing is run.

A pass is simulated as it is written in passes.py: kernels run one after the other on one stream, exchanges on another,
started as early as passes start them; who waits for what has not come loses time. A GPU that is faster than its host
waits for the host.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from distattn.machine import Floats, Machine


@dataclass(frozen=True)
class Work:
    """What one rank does in a forward pass of one layer.

    tiles: visited, over all heads. pairs: attended (query, key) pairs, over all heads.
    flops: of the visited tiles, whole tiles counted: 2 block_q block_k (head_dim + value_dim) each.
    bytes_sent, bytes_received: to and from other ranks, as if nothing were padded.
    guest_rows: rows of other ranks' keys that it visits.
    """

    tiles: float
    pairs: float
    flops: float
    bytes_sent: float
    bytes_received: float
    guest_rows: float

    def plus(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Prediction:
    """Seconds of a pass, each float64 [ranks].

    total: of the pass. compute: of tile kernels and of choosing chunks. copies: of packing, unpacking, casting, zeros
    and whatever else only moves numbers on the device. exchange: of what travels, whether or not it is hidden.
    exposed: of waiting for it, and what it costs the kernels beside it. host: of the host, which is beside all this.
    """

    total: Floats
    compute: Floats
    copies: Floats
    exchange: Floats
    exposed: Floats
    host: Floats

    @property
    def slowest(self) -> int:
        """The rank that takes longest."""
        return int(self.total.argmax())

    @property
    def seconds(self) -> float:
        """Of the slowest rank."""
        return float(self.total.max())

    def bound(self, rank: int) -> str:
        """What it is bound by: "host" (where this is kept longer than the device), "exchange" (where this is waited for
        longer than anything is computed or moved), "copies" or "compute"."""
        if self.host[rank] >= self.compute[rank] + self.copies[rank] + self.exposed[rank]:
            return "host"
        names = ("compute", "exposed", "copies")
        longest = max(names, key=lambda name: float(getattr(self, name)[rank]))
        return "exchange" if longest == "exposed" else longest

    def plus(self, other: Prediction) -> Prediction:
        """Both, one after the other."""
        return Prediction(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Timeline:
    """A pass of all ranks, as it goes on.

    host: seconds before the host launches anything. group: so many ranks in a row take part in each collective;
    default: all.

    now: float64 [ranks], when the stream of kernels is done with what was given to it. line: the same of exchanges.
    """

    def __init__(self, machine: Machine, world_size: int, host: float = 0.0, group: int | None = None) -> None:
        self.machine, self.world_size, self.group = machine, world_size, group or world_size
        self.now, self.line = np.zeros((2, world_size))
        self._compute, self._copies, self._exchange, self._exposed, self._host = np.zeros((5, world_size))
        self._launch(host)

    def _launch(self, host: Floats | float) -> None:
        """The host is kept for so long; nothing is begun before it is launched."""
        self._host = self._host + host
        self.now = np.maximum(self.now, self._host)

    def compute(self, seconds: Floats, host: float, backward: bool = False) -> None:
        """Kernels, of a backward pass or a forward one. host: seconds that the host needs to launch them."""
        self._launch(np.where(seconds > 0, host, 0.0))
        drag = self.machine.drag["backward" if backward else "forward"]
        beside = np.clip(self.line - self.now, 0.0, seconds)
        self.now = self.now + seconds + drag * beside
        self._compute += seconds
        self._exposed += drag * beside

    def copy(self, nbytes: Floats | float, pack: bool = False, launches: int = 1) -> None:
        """Moves bytes, read and written ones counted, on the device."""
        moved = np.broadcast_to(np.asarray(nbytes, np.float64), (self.world_size,))
        seconds = moved / (self.machine.pack if pack else self.machine.copy)
        self._launch(np.where(moved > 0, launches * self.machine.host["launch"], 0.0))
        self.now = self.now + seconds
        self._copies += seconds

    def start(
        self,
        kind: str,
        nbytes: Floats,
        distance: int | None = None,
        abroad: float = 1.0,
        ready: Floats | None = None,
    ) -> Floats:
        """Starts exchanges when all who take part are there; when they are done on each rank.

        nbytes: that a rank sends, or receives if that is more.
        distance: between the ranks of a pair.
        abroad: share of the bytes that goes between nodes, where there are several.
        ready: when it can be started, where it is beside what was computed since; default: now.
        """
        self._launch(self.machine.host["exchange"])
        begin = np.maximum(self.now if ready is None else ready, self.line)
        if kind == "neighbours":
            step = distance or 1
            peers = np.maximum(np.roll(begin, step), np.roll(begin, -step))
            begin = np.where(nbytes > 0, np.maximum(begin, peers), begin)
        else:
            begin = self._latest(begin)
        seconds = self.machine.travels(kind, nbytes, self.group, abroad)
        if kind != "neighbours":
            seconds = self._latest(seconds)
        self.line = begin + seconds
        self._exchange += seconds
        return self.line

    def _latest(self, seconds: Floats) -> Floats:
        """Of all who take part."""
        return np.asarray(seconds.reshape(-1, self.group).max(axis=1).repeat(self.group))

    def within(self, part: Prediction) -> None:
        """A whole pass, of which nothing is under way at its end."""
        self.now = self.now + part.total
        for x, y in zip(self._sums, (part.compute, part.copies, part.exchange, part.exposed, part.host), strict=True):
            x += y

    def wait(self, done: Floats) -> None:
        """Until something that was started is done."""
        late = np.maximum(done - self.now, 0.0)
        self._exposed += late
        self.now = self.now + late

    def mark(self) -> tuple[Floats, ...]:
        """Where it stands, for :meth:`go_on`."""
        return self.now, self.line, *(x.copy() for x in self._sums)

    def go_on(self, mark: tuple[Floats, ...], times: int) -> None:
        """What came since the mark, so many times more."""
        self.now, self.line = (x + times * (x - y) for x, y in zip((self.now, self.line), mark, strict=False))
        for x, y in zip(self._sums, mark[2:], strict=True):
            x += times * (x - y)

    @property
    def _sums(self) -> tuple[Floats, ...]:
        return self._compute, self._copies, self._exchange, self._exposed, self._host

    def end(self, host: float) -> Prediction:
        """What it comes to. host: seconds of the host beside launches and exchanges."""
        busy = self._host + host
        total = np.maximum(self.now, busy)
        return Prediction(total, self._compute, self._copies, self._exchange, self._exposed, busy)

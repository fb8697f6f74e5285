"""How long a step takes on a machine, from what a rank computes, sends and receives. Nothing is run.

A step takes as long as the longer of its arithmetic and its messages, since the exchange runs while tiles that need no
guest are computed, plus what cannot overlap: the latency of the exchange.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Machine:
    """Speeds of one rank.

    flops: floating-point operations a second that the tile kernel reaches.
    bandwidth: bytes a second that a rank sends, and at the same time receives.
    latency: seconds that an exchange takes at least.
    """

    name: str
    flops: float
    bandwidth: float
    latency: float

    @staticmethod
    def h100() -> Machine:
        """An H100 with NVLink: 600 TFLOP/s in bf16 tiles, 200 GB/s, 50 microseconds. Assumed, not measured."""
        return Machine("H100, NVLink (assumed)", 600e12, 200e9, 50e-6)

    @staticmethod
    def cpu() -> Machine:
        """One core in float32 with gloo on loopback: 60 GFLOP/s, 1 GB/s, 1 millisecond. Assumed, not measured."""
        return Machine("one CPU core, gloo (assumed)", 60e9, 1e9, 1e-3)


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
    """Seconds. ``bound`` says which part is the longest: "compute", "exchange" or "latency"."""

    compute: float
    exchange: float
    latency: float

    @property
    def total(self) -> float:
        return max(self.compute, self.exchange) + self.latency

    @property
    def bound(self) -> str:
        return max(("compute", "exchange", "latency"), key=lambda name: getattr(self, name))


def step_time(machine: Machine, work: Work) -> Prediction:
    """The time of one rank's forward pass."""
    travels = max(work.bytes_sent, work.bytes_received)
    return Prediction(
        compute=work.flops / machine.flops,
        exchange=travels / machine.bandwidth,
        latency=machine.latency if travels else 0.0,
    )

"""A step of ours without its journeys: what arrived in one step is delivered again in others, and nothing travels.

The rest of a step stays as it is: packing, unpacking, kernels, choices, and the values. So the time of a step less that
of the same step without journeys is the time that journeys cost, the "exposed" communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from distattn.exchange import Exchange, Pending
from distattn.kernels.rows import pack_rows, unpack_rows
from distattn.messages import Transfer


class Recorded:
    """What arrives in a step, by the order in which exchanges begin."""

    def __init__(self) -> None:
        self._kept: list[list[Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What arrives inside is kept."""
        self._kept.clear()
        send, gather = Exchange.send, Exchange._all_gather

        def keep_sent(exchange: Exchange, *args: Any) -> Pending:
            *rest, into, come = args[:6]
            deliver = args[6] if len(args) > 6 else None
            kept = self._new()

            def keep(flat: Tensor) -> None:
                kept.append(flat.clone())  # a slot is used again
                if deliver is not None:
                    deliver(flat)

            return send(exchange, *rest, into, come, keep)

        def keep_gathered(
            exchange: Exchange, what: str, transfer: Transfer, sources: Sequence[Tensor], targets: Sequence[Tensor]
        ) -> Pending:
            pending = gather(exchange, what, transfer, sources, targets)
            if exchange.group is None:
                return pending
            kept = self._new()

            def finish() -> None:
                pending.wait()
                kept.extend(pack_rows(targets, m.places) for m in transfer.receives)

            return Pending(finish)

        with _replaced(keep_sent, keep_gathered):
            yield

    @contextmanager
    def delivered(self) -> Iterator[None]:
        """One step inside gets what was kept, in place of what others send."""
        left = iter(self._kept)
        gather = Exchange._all_gather

        def send(exchange: Exchange, *args: Any) -> Pending:
            (kept,), into, deliver = next(left), args[4], args[6] if len(args) > 6 else None

            def finish() -> None:
                into.copy_(kept)
                if deliver is not None:
                    deliver(into)

            return Pending(finish)

        def gathered(
            exchange: Exchange, what: str, transfer: Transfer, sources: Sequence[Tensor], targets: Sequence[Tensor]
        ) -> Pending:
            if exchange.group is None:
                return gather(exchange, what, transfer, sources, targets)
            kept = next(left)

            def finish() -> None:
                for message, flat in zip(transfer.receives, kept, strict=True):
                    unpack_rows(targets, message.places, flat)

            return Pending(finish)

        with _replaced(send, gathered):
            yield
        if next(left, None) is not None:
            raise RuntimeError("a step made fewer exchanges than the one that was recorded")

    def _new(self) -> list[Tensor]:
        self._kept.append([])
        return self._kept[-1]


@contextmanager
def _replaced(send: Callable[..., Pending], gather: Callable[..., Pending]) -> Iterator[None]:
    before = Exchange.send, Exchange._all_gather
    Exchange.send, Exchange._all_gather = send, gather  # type: ignore[method-assign]
    try:
        yield
    finally:
        Exchange.send, Exchange._all_gather = before  # type: ignore[method-assign]

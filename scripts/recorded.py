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
        self._kept: list[dict[int, Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What arrives inside is kept."""
        self._kept.clear()
        send, gather = Exchange.send, Exchange._all_gather

        def keep_sent(exchange: Exchange, *args: Any) -> Pending:
            *rest, into = args[:5]
            kept = self._new()

            def keep(got: dict[int, Tensor]) -> None:
                kept.update({peer: x.clone() for peer, x in got.items()})  # a slot is used again
                for deliver in args[5:]:
                    deliver(got)

            return send(exchange, *rest, into, keep)

        def keep_gathered(
            exchange: Exchange, what: str, transfer: Transfer, sources: Sequence[Tensor], targets: Sequence[Tensor]
        ) -> Pending:
            pending = gather(exchange, what, transfer, sources, targets)
            if exchange.group is None or not sources[0].is_cuda:  # it went through `send`
                return pending
            kept = self._new()

            def finish() -> None:
                pending.wait()
                kept.update({n: pack_rows(targets, m.places) for n, m in enumerate(transfer.receives)})

            return Pending(finish)

        with _replaced(keep_sent, keep_gathered):
            yield

    @contextmanager
    def delivered(self) -> Iterator[None]:
        """One step inside gets what was kept, in place of what others send."""
        left = iter(self._kept)
        gather = Exchange._all_gather

        def send(exchange: Exchange, *args: Any) -> Pending:
            kept, sizes, into = next(left), args[3], args[4]

            def finish() -> None:
                for peer, x in zip(sizes, into.split([*sizes.values()]) if sizes else (), strict=True):
                    x.copy_(kept[peer])
                for deliver in args[5:]:
                    deliver(dict(kept))

            return Pending(finish)

        def gathered(
            exchange: Exchange, what: str, transfer: Transfer, sources: Sequence[Tensor], targets: Sequence[Tensor]
        ) -> Pending:
            if exchange.group is None or not sources[0].is_cuda:
                return gather(exchange, what, transfer, sources, targets)
            kept = next(left)

            def finish() -> None:
                for n, message in enumerate(transfer.receives):
                    unpack_rows(targets, message.places, kept[n])

            return Pending(finish)

        with _replaced(send, gathered):
            yield
        if next(left, None) is not None:
            raise RuntimeError("a step made fewer exchanges than the one that was recorded")

    def _new(self) -> dict[int, Tensor]:
        self._kept.append({})
        return self._kept[-1]


@contextmanager
def _replaced(send: Callable[..., Pending], gather: Callable[..., Pending]) -> Iterator[None]:
    before = Exchange.send, Exchange._all_gather
    Exchange.send, Exchange._all_gather = send, gather  # type: ignore[method-assign]
    try:
        yield
    finally:
        Exchange.send, Exchange._all_gather = before  # type: ignore[method-assign]

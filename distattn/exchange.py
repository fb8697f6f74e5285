"""How rows travel between ranks: the only file that sends or receives queries, keys, values and their gradients.

An `Exchange` belongs to one pass over one plan. It packs the rows that a `Transfer` names, starts sending at once, and
unpacks when asked to wait, so that a rank computes in between. It counts every byte that it gives to
torch.distributed; the plan foretells the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.kernels.rows import pack_rows, rows_in_place, split_rows, unpack_rows
from distattn.messages import Message, Transfer
from distattn.watch import Stage, Watch, watch_of

# PyTorch 2.13 renamed it, and warns of the old name.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

before_stage: Callable[[int, str], None] | None = None
"""For tests of faults: called before each exchange starts, with this rank and what it is about to exchange."""


def begin(watch: Watch, what: str, on_gpu: bool) -> Stage:
    """Every exchange begins here; its operations are started ``with`` the stage, and ``stage.wait(works)`` ends it.

    Args:
        what: equal on all ranks.
        on_gpu: where the tensors are.
    """
    if before_stage is not None:
        before_stage(watch.rank, what)
    return watch.enter(what, on_gpu)


@dataclass
class Counter:
    """Bytes that this process has given to torch.distributed to send, by kind of transfer."""

    sent: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, nbytes: int) -> None:
        self.sent[kind] = self.sent.get(kind, 0) + nbytes

    @property
    def total(self) -> int:
        return sum(self.sent.values())


class Pending:
    """A transfer under way. ``wait`` returns when its rows are where they belong."""

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish

    def wait(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()

    @staticmethod
    def all(parts: Iterable[Pending]) -> Pending:
        """Several, which were started in this order."""
        started = list(parts)

        def finish() -> None:
            for part in started:
                part.wait()

        return Pending(finish)


class Exchange:
    """Moves rows between the ranks of a process group.

    Args:
        group_name: of the process group; None where there is one rank, and rows only move locally.
        rank: of this process in the group.
        counter: where bytes are counted.
        plan: what errors name it by.
    """

    def __init__(self, group_name: str | None, rank: int, counter: Counter, plan: str = "") -> None:
        self.group = None if group_name is None else resolve_group(group_name)
        self.watch = None if group_name is None else watch_of(group_name)
        self.plan = plan[:8]
        self.rank = rank
        self.world_size = 1 if self.group is None else self.group.size()
        self.counter = counter

    def bring(self, what: str, transfer: Transfer, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Pending:
        """Starts to bring rows of all ranks' ``sources`` into this rank's ``targets``.

        Nothing is copied here where a single tensor's rows lie in one piece.

        Args:
            what: of what; equal on all ranks, and other for what must not be taken for it.
            sources: one or more tensors [batch, rows, heads, dim] of one dtype, such as K and V.
            targets: the same with the rows of the guest buffer.
        """
        if transfer.kind == "all_gather":
            return self._all_gather(what, transfer, sources, targets)
        for message in transfer.sends:
            if message.peer == self.rank:
                # A message to itself: both sides are here.
                unpack_rows(targets, _mine(transfer.receives, self.rank).places, pack_rows(sources, message.places))
        sends = _by_peer(transfer.sends, self.rank, lambda m: _flat(sources, m))
        sizes = _sizes(transfer.receives, self.rank, targets)
        into = _in_place(targets, [m for m in transfer.receives if m.peer != self.rank])
        if into is not None:
            return self.send(f"bring {what}", transfer.kind, sends, sizes, into)
        return self.send(
            f"bring {what}", transfer.kind, sends, sizes, targets[0].new_empty(sum(sizes.values())),
            lambda got: self._place(transfer, targets, got),
        )  # fmt: skip

    def take_home(
        self,
        what: str,
        transfer: Transfer,
        guests: Sequence[Tensor],
        receive: Callable[[Message, list[Tensor]], None],
    ) -> Pending:
        """The reverse: starts to send what lies in the guest buffer back to the rows' owners.

        Args:
            what: as in :meth:`bring`.
            guests: tensors [batch, guest rows, heads, dim] of one dtype, such as gradients of guest K and V.
            receive: called once for each message that this rank had sent (in the order of peers), with that message and
                the returned rows of each tensor, [batch, rows, heads, dim], which it may not write to.
        """
        outgoing = transfer.receives
        incoming = transfer.returns
        mine = [m for m in outgoing if m.peer == self.rank]
        sends = _by_peer(outgoing, self.rank, lambda m: _flat(guests, m))
        sizes = _sizes(incoming, self.rank, guests)

        def deliver(got: dict[int, Tensor]) -> None:
            for message in incoming:
                if message.peer == self.rank:
                    flat = _joined([_flat(guests, m) for m in mine])
                else:
                    size = message.count * len(message.kv_heads) * _width(guests)
                    flat, got[message.peer] = got[message.peer].split([size, got[message.peer].numel() - size])
                receive(message, split_rows(guests, message.places, flat))

        kind = "all_to_all" if transfer.kind == "all_gather" else transfer.kind
        return self.send(f"return {what}", kind, sends, sizes, guests[0].new_empty(sum(sizes.values())), deliver)

    def _all_gather(
        self, what: str, transfer: Transfer, sources: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> Pending:
        mine = _flat(sources, transfer.sends[0])
        if self.group is None:
            unpack_rows(targets, _mine(transfer.receives, self.rank).places, mine)
            return Pending()
        per_row = len(transfer.sends[0].kv_heads) * _width(sources)
        size = transfer.chunk * per_row
        padded = mine
        if mine.numel() < size:
            padded = mine.new_zeros(size)
            padded[: mine.numel()] = mine

        def place(got: dict[int, Tensor]) -> None:
            for message in transfer.receives:
                unpack_rows(targets, message.places, got[message.peer][: message.count * per_row])

        if not mine.is_cuda:
            sizes = dict.fromkeys([peer for peer in range(self.world_size) if peer != self.rank], size)
            into, to_all = mine.new_empty(size * len(sizes)), dict.fromkeys(sizes, padded)
            return self.send(
                f"bring {what}", "all_gather", to_all, sizes, into, lambda x: place({**x, self.rank: mine})
            )
        every: Tensor | None = None
        if all(m.count == transfer.chunk for m in transfer.receives) and len(transfer.receives) == self.world_size:
            every = _in_place(targets, transfer.receives)
        into = mine.new_empty(self.world_size * size) if every is None else every
        stage = self._begin(f"bring {what}", "all_gather", mine)
        with stage:
            work = _all_gather_single(into, padded, group=self.group, async_op=True)
        self.counter.add("all_gather", padded.nbytes * (self.world_size - 1))

        def finish() -> None:
            stage.wait([work])
            if every is None:
                place(dict(enumerate(into.view(self.world_size, -1))))

        return Pending(finish)

    def _begin(self, way: str, kind: str, like: Tensor) -> Stage:
        assert self.watch is not None
        return begin(self.watch, f"{way} ({kind}), plan {self.plan}", like.is_cuda)

    def send(
        self,
        way: str,
        kind: str,
        sends: dict[int, Tensor],
        sizes: dict[int, int],
        into: Tensor,
        deliver: Callable[[dict[int, Tensor]], None] = lambda got: None,
    ) -> Pending:
        """Starts to send flat tensors to peers and to receive ``sizes`` elements from each. All ranks take part.

        On CPUs it is pair by pair: there messages carry a tag made of all exchanges so far, so that ranks that differ
        in these wait in vain, and never take what was meant for something else. NCCL makes the same of one call.

        Args:
            way: what it is for, as errors name it, such as "bring keys". kind: under which the bytes are counted.
            sizes: by peer, ascending.
            into: flat, where what comes lies, in the order of peers.
            deliver: gets what came, by peer.
        """
        if self.group is None:
            return Pending(lambda: deliver({}))
        stage = self._begin(way, kind, into)
        self.counter.add(kind, sum(x.nbytes for x in sends.values()))
        got = dict(zip(sizes, into.split([*sizes.values()]), strict=True)) if sizes else {}
        if not into.is_cuda:
            works = _start_pairs(stage, self.group, sends, got)
            keep = list(sends.values())
        else:
            parts = [sends[peer] for peer in sorted(sends)]
            flat = into.new_empty(0) if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)
            out_sizes = [sizes.get(peer, 0) for peer in range(self.world_size)]
            in_sizes = [_numel(sends.get(peer)) for peer in range(self.world_size)]
            with stage:
                works = [dist.all_to_all_single(into, flat, out_sizes, in_sizes, group=self.group, async_op=True)]
            keep = [flat]

        def finish() -> None:
            stage.wait(works)
            keep.clear()
            deliver(got)

        return Pending(finish)

    def _place(self, transfer: Transfer, targets: Sequence[Tensor], got: dict[int, Tensor]) -> None:
        for message in transfer.receives:
            if message.peer == self.rank:
                continue
            size = message.count * len(message.kv_heads) * _width(targets)
            flat, got[message.peer] = got[message.peer].split([size, got[message.peer].numel() - size])
            unpack_rows(targets, message.places, flat)


def _start_pairs(
    stage: Stage, group: dist.ProcessGroup, sends: dict[int, Tensor], receives: dict[int, Tensor]
) -> list[dist.Work]:
    """Starts to send tensors to peers and to receive others, by peer."""
    operations = [
        dist.P2POp(operation, x, group=group, tag=stage.tag, group_peer=peer)
        for operation, by_peer in ((dist.isend, sends), (dist.irecv, receives))
        for peer, x in sorted(by_peer.items())
    ]
    with stage:
        return dist.batch_isend_irecv(operations) if operations else []


def _flat(tensors: Sequence[Tensor], message: Message) -> Tensor:
    """What a message has of tensors, flat: a view where that lies in one piece."""
    view = rows_in_place(tensors[0], [message.places]) if len(tensors) == 1 else None
    return pack_rows(tensors, message.places) if view is None else view


def _in_place(tensors: Sequence[Tensor], messages: Sequence[Message]) -> Tensor | None:
    """A flat view of where messages, one after the other, belong; None where that is not in one piece."""
    return rows_in_place(tensors[0], [m.places for m in messages]) if len(tensors) == 1 else None


def _width(tensors: Sequence[Tensor]) -> int:
    """Elements of one row of one head, over the batch and all tensors."""
    return sum(x.shape[0] * x.shape[-1] for x in tensors)


def _numel(x: Tensor | None) -> int:
    return 0 if x is None else x.numel()


def _mine(messages: Sequence[Message], rank: int) -> Message:
    return next(m for m in messages if m.peer == rank)


def _by_peer(messages: Sequence[Message], rank: int, pack: Callable[[Message], Tensor]) -> dict[int, Tensor]:
    parts: dict[int, list[Tensor]] = {}
    for message in messages:
        if message.peer != rank:
            parts.setdefault(message.peer, []).append(pack(message))
    return {peer: _joined(x) for peer, x in parts.items()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _sizes(messages: Sequence[Message], rank: int, tensors: Sequence[Tensor]) -> dict[int, int]:
    """Elements that come from each other rank; messages are sorted by peer."""
    sizes: dict[int, int] = {}
    for message in messages:
        if message.peer != rank:
            size = message.count * len(message.kv_heads) * _width(tensors)
            sizes[message.peer] = sizes.get(message.peer, 0) + size
    return sizes


def resolve_group(group_name: str) -> dist.ProcessGroup:
    """The process group of a name (the form in which a group can be an argument of a custom operator)."""
    return dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]


def gather_rows(x: Tensor, counts: list[int], group_name: str | None) -> list[Tensor]:
    """Every rank's rows [counts[rank], ...], on every rank.

    Raises:
        PeerLost, StepTimeout, PlanMismatch: as every exchange.
    """
    assert group_name is not None
    stage = begin(watch_of(group_name), f"gather rows of {list(x.shape[1:])}, {x.dtype}", x.is_cuda)
    group = resolve_group(group_name)
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: x.shape[0]] = x
    every = [torch.empty_like(padded) for _ in counts]
    if x.is_cuda:
        with stage:
            works = [dist.all_gather(every, padded, group=group, async_op=True)]
    else:
        every[group.rank()] = padded
        others = {peer: part for peer, part in enumerate(every) if part is not padded}
        works = _start_pairs(stage, group, dict.fromkeys(others, padded), others)
    stage.wait(works)
    return [part[:count] for part, count in zip(every, counts, strict=True)]

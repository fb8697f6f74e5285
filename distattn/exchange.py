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
from distattn.messages import Message, Parcel, Transfer
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

    def check(self) -> None:
        """Raises PeerLost, StepTimeout or PlanMismatch if an exchange is known to have failed on a GPU."""
        if self.watch is not None and self.watch.verdict is not None:
            raise self.watch.verdict

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
        goes, comes = (transfer.parcel(which, self.rank) for which in ("sends", "receives"))
        into = _in_place(targets, comes)
        here = into is not None
        if into is None:
            into = targets[0].new_empty(sum(comes.rows.values()) * _width(targets))

        def deliver(flat: Tensor) -> None:
            for places, part in zip(comes.places, flat.split([p.size(targets) for p in comes.places]), strict=True):
                unpack_rows(targets, places, part)

        return self.send(
            f"bring {what}", transfer.kind, _flat(sources, goes), _sizes(goes, sources), into, _sizes(comes, targets),
            None if here else deliver,
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
        goes, comes = (transfer.parcel(which, self.rank) for which in ("receives", "returns"))
        sizes = _sizes(comes, guests)

        def deliver(flat: Tensor) -> None:
            first = 0
            for message in transfer.returns:
                size = message.places.size(guests)
                if message.peer == self.rank:
                    mine = Parcel.of(m for m in transfer.receives if m.peer == self.rank)
                    part = _flat(guests, mine)
                else:
                    part = flat[first : first + size]
                    first += size
                receive(message, split_rows(guests, message.places, part))

        kind = "all_to_all" if transfer.kind == "all_gather" else transfer.kind
        into = guests[0].new_empty(sum(sizes.values()))
        return self.send(f"return {what}", kind, _flat(guests, goes), _sizes(goes, guests), into, sizes, deliver)

    def _all_gather(
        self, what: str, transfer: Transfer, sources: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> Pending:
        mine = _flat(sources, transfer.parcel("sends"))
        if self.group is None:
            unpack_rows(targets, _mine(transfer.receives, self.rank).places, mine)
            return Pending()
        per_row = len(transfer.sends[0].kv_heads) * _width(sources)
        size = transfer.chunk * per_row
        padded = mine
        if mine.numel() < size:
            padded = mine.new_zeros(size)
            padded[: mine.numel()] = mine
        every: Tensor | None = None
        if all(m.count == transfer.chunk for m in transfer.receives) and len(transfer.receives) == self.world_size:
            every = _in_place(targets, transfer.parcel("receives"))
        into = mine.new_empty(self.world_size * size) if every is None else every
        stage = self._begin(f"bring {what}", "all_gather", mine)
        if mine.is_cuda:
            with stage:
                works = [_all_gather_single(into, padded, group=self.group, async_op=True)]
        else:
            got = dict(enumerate(into.split(size)))
            got.pop(self.rank).copy_(padded)
            works = _start_pairs(stage, self.group, dict.fromkeys(got, padded), got)
        self.counter.add("all_gather", padded.nbytes * (self.world_size - 1))

        def finish() -> None:
            stage.wait(works)
            if every is None:
                rows = into.view(self.world_size, -1)
                for message in transfer.receives:
                    unpack_rows(targets, message.places, rows[message.peer][: message.count * per_row])

        return Pending(finish)

    def _begin(self, way: str, kind: str, like: Tensor) -> Stage:
        assert self.watch is not None
        return begin(self.watch, f"{way} ({kind}), plan {self.plan}", like.is_cuda)

    def send(
        self,
        way: str,
        kind: str,
        flat: Tensor,
        sizes: dict[int, int],
        into: Tensor,
        come: dict[int, int],
        deliver: Callable[[Tensor], None] | None = None,
    ) -> Pending:
        """Starts to send parts of a flat tensor to peers, and to receive parts of another. All ranks take part.

        On CPUs it is pair by pair: there messages carry a tag made of all exchanges so far, so that ranks that differ
        in these wait in vain, and never take what was meant for something else. NCCL makes the same of one call.

        Args:
            way: what it is for, as errors name it, such as "bring keys". kind: under which the bytes are counted.
            flat: one part after the other. sizes: elements of each, by peer, ascending.
            into: where what comes lies. come: elements of each part, as of ``flat``.
            deliver: gets ``into`` once all is there.
        """
        if self.group is None:
            return Pending(None if deliver is None else lambda: deliver(into))
        stage = self._begin(way, kind, into)
        self.counter.add(kind, flat.nbytes)
        if not into.is_cuda:
            sends, receives = (
                dict(zip(n, x.split([*n.values()]), strict=True)) if n else {} for n, x in ((sizes, flat), (come, into))
            )
            works = _start_pairs(stage, self.group, sends, receives)
        else:
            ranks = range(self.world_size)
            in_sizes, out_sizes = ([n.get(peer, 0) for peer in ranks] for n in (sizes, come))
            with stage:
                works = [dist.all_to_all_single(into, flat, out_sizes, in_sizes, group=self.group, async_op=True)]
        keep = [flat]

        def finish() -> None:
            stage.wait(works)
            keep.clear()
            if deliver is not None:
                deliver(into)

        return Pending(finish)


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


def _flat(tensors: Sequence[Tensor], parcel: Parcel) -> Tensor:
    """Packed: a view where it lies in one piece."""
    view = _in_place(tensors, parcel)
    if view is not None:
        return view
    parts = [pack_rows(tensors, places) for places in parcel.places]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _in_place(tensors: Sequence[Tensor], parcel: Parcel) -> Tensor | None:
    """A flat view of where a parcel's rows belong; None where that is not in one piece."""
    if not parcel.places:
        return tensors[0].new_empty(0)
    alone = len(tensors) == 1 and len(parcel.places) == 1
    return rows_in_place(tensors[0], parcel.places[0]) if alone else None


def _width(tensors: Sequence[Tensor]) -> int:
    """Elements of one row of one head, over the batch and all tensors."""
    return sum(x.shape[0] * x.shape[-1] for x in tensors)


def _mine(messages: Sequence[Message], rank: int) -> Message:
    return next(m for m in messages if m.peer == rank)


def _sizes(parcel: Parcel, tensors: Sequence[Tensor]) -> dict[int, int]:
    """Elements that go to each peer, or come from it."""
    width = _width(tensors)
    return {peer: rows * width for peer, rows in parcel.rows.items()}


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

"""Chunks that were chosen by the data: what ranks ask of each other, in which rounds it comes, and what tiles visit.

Each chunk comes once a rank, and only to the ranks and heads that chose it. These come in one round; but where some
rank wants more than half of what the others have, in a round for each other rank, so that two guest buffers of one
owner's chunks are enough. (A ring that passes whole shards on would send no less: from its owner a chunk comes to those
alone who chose it.) A rank's own chunks need no journey and are attended together with those of the first round.

Ranks ask with a byte for each chunk and head of the other, as soon as they have chosen, and beside what is computed
then. The host learns only how many come and go; which, and where they lie, stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.aside import mark
from distattn.exchange import Exchange, Pending
from distattn.hierarchy import Hierarchy
from distattn.kernels.chunk_places import masks_of_chunks, pages_of_chunks
from distattn.kernels.selected import SelectedTable
from distattn.plan import Plan

# Of what other ranks have: if one wants more than this, chunks come in several rounds.
_MUCH = 0.5
# Bytes of the numbers in what a rank says to another.
_NUMBERS = 16


class Asked(NamedTuple):
    """What ranks asked of each other.

    counts: int64 [2 world_size + 1], on the host: how many chunks this rank asks of each rank, how many each asks of
        it, and the most that any rank asks of all.
    given: uint8 [world_size - 1, kv_heads x own chunks]: what the others ask of this rank, by rank.
    """

    counts: Tensor
    given: Tensor

    @staticmethod
    def nothing(device: torch.device) -> Asked:
        """Of a rank that is alone."""
        return Asked(torch.zeros(3, dtype=torch.int64), torch.zeros((0, 0), dtype=torch.uint8, device=device))


class Asks:
    """Ranks tell each other which chunks they want; all of them do, together.

    What a rank says to another: int64 [2], of how many chunks it asks all, and of how many this one; and a byte for
    each head and chunk of this one's, 1 or 0.

    Args:
        chosen: int32 [batch, tables, tiles, n]: chunks of each tile, ascending, then -1; alike in the rows of the batch
            as far as ``Selection`` says.

    Attributes:
        wanted: see :func:`wanted_by_owner`; None of a rank that is alone.
        asked: the mark after which all this is there.
    """

    def __init__(self, plan: Plan, exchange: Exchange, chosen: Tensor) -> None:
        assert plan.hierarchy is not None
        self.asked = mark(chosen.device)
        self._exchange, self._rank, self._world, self._device = exchange, plan.rank, plan.world_size, chosen.device
        self.wanted: Tensor | None = None
        if self._world == 1:
            return
        self.wanted = wanted = wanted_by_owner(chosen, plan)
        edges = plan.hierarchy.pairs_of_owner
        before = torch.cat((wanted.new_zeros(1, dtype=torch.int64), wanted.cumsum(0)))
        self._mine = before[plan.hierarchy.on(chosen.device, "pairs_of_owner")].diff()
        numbers = torch.stack((before[-1].expand(self._world), self._mine), dim=1).view(torch.uint8)
        bits = wanted.view(torch.uint8)
        others = [peer for peer in range(self._world) if peer != self._rank]
        said = [part for peer in others for part in (numbers[peer], bits[edges[peer] : edges[peer + 1]])]
        sizes = {peer: _NUMBERS + int(edges[peer + 1] - edges[peer]) for peer in others}
        heard = _NUMBERS + int(edges[self._rank + 1] - edges[self._rank])
        self._heard = bits.new_empty((len(others), heard))
        self._said = torch.cat(said)  # held until it is waited for
        self._told: Pending = exchange.send(
            "ask for chunks", "selected", self._said, sizes, self._heard.flatten(), dict.fromkeys(others, heard)
        )
        self.asked = mark(chosen.device)
        self._read = torch.empty(self._world + 2 * len(others), dtype=torch.int64, pin_memory=chosen.is_cuda)

    def wait(self) -> Asked:
        """Returns when the host knows the numbers. To be called aside, after ``asked``: then on a GPU it waits for the
        choice and for the other ranks, and not for what was launched since."""
        if self._world == 1:
            return Asked.nothing(self._device)
        self._read[: self._world].copy_(self._mine, non_blocking=True)
        self._told.wait()
        # Of one other rank they are in one piece: then no kernel has to wait for room beside those that compute.
        self._read[self._world :].copy_(self._heard[:, :_NUMBERS].flatten().view(torch.int64), non_blocking=True)
        if known := mark(self._device):
            known.synchronize()
            self._exchange.check()  # else they may be any numbers
        read = self._read.tolist()
        mine, said = read[: self._world], read[self._world :]
        asked_of_me = said[1::2]
        asked_of_me.insert(self._rank, 0)
        most = max(sum(mine), *said[::2])
        return Asked(torch.tensor([*mine, *asked_of_me, most]), self._heard[:, _NUMBERS:].contiguous())


@dataclass(frozen=True, eq=False)
class Round:
    """What comes together.

    take: int64 [n], the numbers (head x chunks + chunk) of what comes to this rank, by owner; each is a guest page.
    take_from: how many, by owner.
    give: int64 [m], those that this rank sends, by who asked. give_to: how many, by who asked.
    """

    take: Tensor
    take_from: dict[int, int]
    give: Tensor
    give_to: dict[int, int]


class ChosenChunks:
    """What the tiles of one rank chose in one call.

    Args:
        chosen: see :class:`Asks`.
        wanted: what Asks has found out of it, if it is still there.

    Attributes:
        asked: for the way back.
        rounds: in which they come from other ranks; one at least, in which nothing comes to a rank that is alone.
    """

    def __init__(self, plan: Plan, chosen: Tensor, asked: Asked, wanted: Tensor | None = None) -> None:
        assert plan.hierarchy is not None
        self._plan, self._chosen, self.asked = plan, chosen, asked
        self.hierarchy: Hierarchy = plan.hierarchy
        self.rounds = tuple(self._made_rounds(wanted))

    def tables(self, number: int) -> list[SelectedTable]:
        """What tiles visit in a round: of guests, and in the first one of own pages, too. One table a row of the batch.

        A chunk is a page, and guests lie as ``Rounds`` says.
        """
        hierarchy, chosen, plan = self.hierarchy, self._chosen, self._plan
        chunk, (batch, _, tiles, _) = hierarchy.chunk, chosen.shape
        own_pages, take = -(-plan.tokens // chunk), self.rounds[number].take
        own = hierarchy.on(chosen.device, "own_page")
        place = own if number == 0 else torch.full_like(own, -1)
        if len(take):
            place = place.repeat(plan.kv_heads)
            place[take] = torch.arange(own_pages, own_pages + batch * len(take), batch, device=chosen.device)
        pages = pages_of_chunks(chosen, place.view(-1, hierarchy.chunks))
        guest_pages = max(batch * (len(take) - 1) + 1, 0)
        blocks = hierarchy.tile, chunk, tiles, own_pages, guest_pages, hierarchy.head_table
        masks = self._masks
        return [SelectedTable(*blocks, pages[b], None if masks is None else masks[b]) for b in range(batch)]

    def _made_rounds(self, wanted: Tensor | None) -> Iterator[Round]:
        hierarchy, plan = self.hierarchy, self._plan
        world, rank, device = plan.world_size, plan.rank, self._chosen.device
        if world == 1:
            nothing = torch.zeros(0, dtype=torch.int64, device=device)
            yield Round(nothing, {}, nothing, {})
            return
        counts = self.asked.counts.tolist()
        take, give, most = counts[:world], counts[world : 2 * world], counts[-1]
        others = [(rank + distance) % world for distance in range(1, world)]
        # The same answer on every rank: all know the most.
        if most <= _MUCH * plan.kv_heads * hierarchy.chunks * (world - 1) / world:
            groups = [(sorted(others), sorted(others))]
        else:
            # In round s this rank receives from the one s before it, and sends to the one s after it.
            groups = [([owner], [asks]) for owner, asks in zip(others[::-1], others, strict=True)]
        pairs, edges = hierarchy.on(device, "pairs_by_owner"), hierarchy.pairs_of_owner
        wanted = wanted_by_owner(self._chosen, plan) if wanted is None else wanted
        taken = pairs[_true(wanted, sum(take))]
        own_pairs = pairs[int(edges[rank]) : int(edges[rank + 1])]
        for owners, askers in groups:
            first = sum(take[: owners[0]])
            given = self.asked.given
            if len(askers) < len(others):  # by a slice: an index made of a list would wait for the device
                row = askers[0] - (askers[0] > rank)
                given = given[row : row + 1]
            to = _true(given.flatten() > 0, sum(give[r] for r in askers))
            yield Round(
                taken[first : first + sum(take[r] for r in owners)],
                {r: take[r] for r in owners if take[r]},
                own_pairs[to % max(len(own_pairs), 1)],
                {r: give[r] for r in askers if give[r]},
            )

    @cached_property
    def _masks(self) -> Tensor | None:
        """Leaves out global keys, what is beyond the end, and of a token's own chunk what follows the token."""
        hierarchy, select, chosen = self.hierarchy, self._plan.spec.select, self._chosen
        assert select is not None
        own = hierarchy.causal and "own" in select.always
        if hierarchy.chooses_whole_chunks and not own:
            return None
        position = hierarchy.on(chosen.device, "positions") if own else None
        return masks_of_chunks(chosen, hierarchy.on(chosen.device, "chunk_masks"), hierarchy.chunk, position)


def wanted_by_owner(chosen: Tensor, plan: Plan) -> Tensor:
    """bool [kv_heads * chunks], in the order of ``Hierarchy.pairs_by_owner``: what is wanted of other ranks."""
    hierarchy = plan.hierarchy
    assert hierarchy is not None
    wanted = wanted_chunks(chosen, hierarchy).flatten()[hierarchy.on(chosen.device, "pairs_by_owner")]
    edges = hierarchy.pairs_of_owner
    wanted[edges[plan.rank] : edges[plan.rank + 1]] = False
    return wanted


def wanted_chunks(chosen: Tensor, hierarchy: Hierarchy) -> Tensor:
    """bool [kv_heads, chunks]: what is chosen by some tile of this rank."""
    tables = chosen.shape[1]
    found = torch.zeros((tables, hierarchy.chunks + 1), dtype=torch.bool, device=chosen.device)
    index = torch.where(chosen < 0, hierarchy.chunks, chosen).long().transpose(0, 1).flatten(1)
    found.scatter_(1, index, True)
    by_head: Tensor = found[:, :-1].unflatten(0, (hierarchy.kv_heads, -1)).any(1)
    return by_head


def _true(mask: Tensor, count: int) -> Tensor:
    """int64 [count]: where a mask, which has so many, is true. The device is not waited for."""
    return (~mask).to(torch.uint8).sort(stable=True)[1][:count]

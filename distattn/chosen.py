"""Chunks that were chosen by the data: what ranks ask of each other, in which rounds it comes, and what tiles visit.

Each chunk comes once a rank, and only to the ranks and heads that chose it. A rank's own chunks need no journey and
are attended while others are on theirs. These come in one round; but where some rank wants more than half of what the
others have, in a round for each other rank, so that two guest buffers of one owner's chunks are enough. (A ring that
passes whole shards on would send no less: from its owner a chunk comes to those alone who chose it.)

Ranks ask with a byte for each chunk and head of the other. The host learns only how many come and go; which, and where
they lie, stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.exchange import Exchange, Pending
from distattn.hierarchy import Hierarchy
from distattn.kernels.attention import Pages
from distattn.kernels.rows import add_chunks, take_chunks
from distattn.kernels.selected import SelectedTable
from distattn.plan import Plan

# Of what other ranks have: if one wants more than this, chunks come in several rounds.
_MUCH = 0.5


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
        chosen: int32 [batch, tables, tiles, n]: chunks of each tile, ascending, then -1; alike in the rows of the batch
            as far as ``Selection`` says.
        asked: of the forward pass, in a backward pass; None: ranks tell each other what they want. Then all of them
            come here together, and wait for the device.

    Attributes:
        asked: for the way back.
        rounds: in which they come from other ranks. Tables count the rank's own chunks as number 0, these from 1.
    """

    def __init__(self, plan: Plan, exchange: Exchange, chosen: Tensor, asked: Asked | None) -> None:
        assert plan.hierarchy is not None
        self._plan, self._exchange, self._chosen = plan, exchange, chosen
        self._hierarchy: Hierarchy = plan.hierarchy
        self.asked = self._ask() if asked is None else asked
        self.rounds = tuple(self._made_rounds())

    def guest_numel(self, number: int, of: Pages) -> tuple[int, int]:
        """Elements of the guest buffers of K and of V in a round, from 1, for such own K and V."""
        chunks, batch = sum(self.rounds[number - 1].take_from.values()), of.k.shape[0]
        return tuple(chunks * batch * self._hierarchy.chunk * x.shape[3] for x in of)  # type: ignore[return-value]

    def guests(self, buffers: tuple[Tensor, Tensor], of: Pages) -> Pages:
        """Flat buffers of K and of V (or of their gradients) as guests, for such own K and V.

        A buffer holds [chunks, batch, chunk, dim]. All heads see all pages, of which each visits its own.
        """
        batch, _, heads, _ = of.k.shape
        chunk = self._hierarchy.chunk
        found = []
        for x, y in zip(buffers, of, strict=True):
            dim = y.shape[3]
            rows = max(x.numel() // (chunk * dim) - batch + 1, 0) * chunk  # of one of the batch, to its last page
            found.append(x.as_strided((batch, rows, heads, dim), (chunk * dim, dim, 0, 1)))
        return Pages(*found)

    def tables(self, number: int) -> list[SelectedTable]:
        """What tiles visit in a round, of own pages (0) or of guests (from 1): one table a row of the batch."""
        hierarchy, chosen, plan = self._hierarchy, self._chosen, self._plan
        chunk, (batch, tables, tiles, _) = hierarchy.chunk, chosen.shape
        own_pages = -(-plan.tokens // chunk)
        guest_pages = 0
        if number == 0:
            place = hierarchy.on(chosen.device, "own_page").expand(plan.kv_heads, -1)
        else:
            take = self.rounds[number - 1].take
            guest_pages = max(batch * (len(take) - 1) + 1, 0)
            place = chosen.new_full((plan.kv_heads * hierarchy.chunks,), -1, dtype=torch.int64)
            place[take] = own_pages + batch * torch.arange(len(take), device=chosen.device)
            place = place.view(plan.kv_heads, -1)
        head = torch.arange(tables, device=chosen.device) // (tables // plan.kv_heads)
        pages = place[head[None, :, None, None], chosen.clamp_min(0).long()]
        pages = torch.where(chosen < 0, -1, pages).int()
        blocks = hierarchy.tile, chunk, tiles, own_pages, guest_pages, hierarchy.head_table
        masks = self._masks
        return [SelectedTable(*blocks, pages[b], None if masks is None else masks[b]) for b in range(batch)]

    def bring(self, number: int, own: Pages, buffers: tuple[Tensor, Tensor], again: str = "") -> list[Pending]:
        """Starts to bring what comes in a round, from 1, into flat buffers of K and of V.

        again: names it otherwise in a backward pass.
        """
        some, chunk = self.rounds[number - 1], self._hierarchy.chunk
        page, head = self._own_places(some.give)
        pending = []
        for what, x, into in zip(("keys", "values"), own, buffers, strict=True):
            taken = take_chunks(x, page, head, chunk)
            pending.append(self._send(f"bring chosen {what}{again}", taken, some.give_to, some.take_from, into))
        return pending

    def take_home(self, number: int, d_guests: tuple[Tensor, Tensor], d_own: Pages) -> list[Pending]:
        """Starts to send the gradients of a round's guests, flat, to the owners, who add them to ``d_own``."""
        some, chunk = self.rounds[number - 1], self._hierarchy.chunk
        page, head = self._own_places(some.give)
        pending = []
        for what, x, total in zip(("keys", "values"), d_guests, d_own, strict=True):
            came = x.new_empty((len(page), total.shape[0], chunk, total.shape[3]))

            def add(_: dict[int, Tensor], came: Tensor = came, total: Tensor = total) -> None:
                first = 0
                # Rank by rank: no chunk comes twice from one, and the order is always the same.
                for count in some.give_to.values():
                    mine = slice(first, first + count)
                    add_chunks(total, page[mine], head[mine], came[mine])
                    first += count

            pages = x.view(-1, total.shape[0], chunk, total.shape[3])
            pending.append(
                self._send(
                    f"return gradients of chosen {what}", pages, some.take_from, some.give_to, came.flatten(), add
                )
            )
        return pending

    def _send(self, way, chunks, sends, comes, into, deliver=lambda got: None) -> Pending:  # type: ignore[no-untyped-def]
        """Sends chunks by peer; ``sends`` and ``comes`` say how many."""
        one = chunks[0].numel() if len(chunks) else into.numel() // max(sum(comes.values()), 1)
        parts = (
            {peer: x.flatten() for peer, x in zip(sends, chunks.split([*sends.values()]), strict=True)} if sends else {}
        )
        sizes = {peer: count * one for peer, count in comes.items()}
        return self._exchange.send(way, "selected", parts, sizes, into[: sum(sizes.values())], deliver)

    def _ask(self) -> Asked:
        hierarchy, plan, device = self._hierarchy, self._plan, self._chosen.device
        world, rank = plan.world_size, plan.rank
        if world == 1:
            return Asked.nothing(device)
        wanted = wanted_chunks(self._chosen, hierarchy).flatten()[hierarchy.on(device, "pairs_by_owner")]
        edges = hierarchy.pairs_of_owner
        wanted[edges[rank] : edges[rank + 1]] = False
        total = wanted.sum()
        header = total.view(1).view(torch.uint8)
        bits = wanted.view(torch.uint8)
        others = [peer for peer in range(world) if peer != rank]
        sends = {peer: torch.cat((header, bits[edges[peer] : edges[peer + 1]])) for peer in others}
        size = len(header) + int(edges[rank + 1] - edges[rank])
        came = bits.new_empty((world - 1, size))
        self._exchange.send("ask for chunks", "selected", sends, dict.fromkeys(others, size), came.flatten()).wait()
        given = came[:, len(header) :].contiguous()
        totals = came[:, : len(header)].reshape(-1).clone().view(torch.int64)
        most = torch.cat((total.view(1), totals)).max()
        before = torch.cat((total.new_zeros(1), wanted.cumsum(0)))[hierarchy.on(device, "pairs_of_owner")]
        asked_of_me = given.sum(1, dtype=torch.int64)
        mine = torch.cat((asked_of_me[:rank], total.new_zeros(1), asked_of_me[rank:]))
        return Asked(torch.cat((before.diff(), mine, most.view(1))).cpu(), given)

    def _made_rounds(self) -> Iterator[Round]:
        hierarchy, plan = self._hierarchy, self._plan
        world, rank, device = plan.world_size, plan.rank, self._chosen.device
        if world == 1:
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
        wanted = wanted_chunks(self._chosen, hierarchy).flatten()[pairs]
        mine = slice(int(edges[rank]), int(edges[rank + 1]))
        wanted[mine] = False
        own_pairs = pairs[mine]
        for owners, askers in groups:
            first, stop = (0, len(wanted)) if len(owners) > 1 else edges[owners[0] : owners[0] + 2]
            here = _true(wanted[first:stop], sum(take[r] for r in owners)) + first
            rows = [asker - (asker > rank) for asker in askers]
            to = _true(self.asked.given[rows].flatten() > 0, sum(give[r] for r in askers))
            yield Round(
                pairs[here],
                {r: take[r] for r in owners if take[r]},
                own_pairs[to % max(len(own_pairs), 1)],
                {r: give[r] for r in askers if give[r]},
            )

    def _own_places(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(own pages, heads) of some of this rank's chunks."""
        chunks = self._hierarchy.chunks
        return self._hierarchy.on(numbers.device, "own_page")[numbers % chunks], numbers // chunks

    @cached_property
    def _masks(self) -> Tensor | None:
        """Leaves out global keys, what is beyond the end, and of a token's own chunk what follows the token."""
        hierarchy, select, chosen = self._hierarchy, self._plan.spec.select, self._chosen
        assert select is not None
        own = hierarchy.causal and "own" in select.always
        if hierarchy.chooses_whole_chunks and not own:
            return None
        chunk = hierarchy.chunk
        masks = hierarchy.on(chosen.device, "chunk_masks")[chosen.clamp_min(0).long()]
        if own:
            position = hierarchy.on(chosen.device, "positions")
            first = 32 * torch.arange(masks.shape[-1], device=chosen.device)
            until = (position % chunk + 1)[:, None] - first
            causal = ((1 << until.clamp(0, 32)) - 1).to(torch.int32)  # [tokens, words]
            is_own = chosen == (position // chunk)[:, None]
            masks = torch.where(is_own.unsqueeze(-1), masks & causal[:, None], masks)
        return masks.unsqueeze(-2).contiguous()


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

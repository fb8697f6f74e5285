"""Chunks that were chosen by the data: what ranks ask of each other, in which rounds it comes, and what tiles visit.

Each chunk comes once a rank, and only to the ranks and heads that chose it. A rank's own chunks need no journey and
are attended while others are on theirs. These come in one round; but where some rank wants more than half of what the
others have, in a round for each other rank, so that two guest buffers of one owner's chunks are enough. (A ring that
passes whole shards on would send no less: from its owner a chunk comes to those alone who chose it.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distattn.exchange import Exchange, Pending
from distattn.hierarchy import Hierarchy
from distattn.kernels.attention import Pages
from distattn.kernels.selected import SelectedTable
from distattn.plan import Plan
from distattn.spans import Ints

# Of what other ranks have: if one wants more than this, chunks come in several rounds.
_MUCH = 0.5


@dataclass(frozen=True, eq=False)
class Round:
    """What comes together.

    take: int64 [n, 2], the (key/value head, chunk) that come to this rank, by owner. take_from: how many, by owner.
    give: int64 [m, 2], those that this rank sends, by who asked. give_to: how many, by who asked.
    """

    take: Ints
    take_from: dict[int, int]
    give: Ints
    give_to: dict[int, int]

    @cached_property
    def slot(self) -> Ints:
        """int64 [n]: the guest page of each that comes, among those of its head."""
        order = np.argsort(self.take[:, 0], kind="stable")
        by_head = np.bincount(self.take[:, 0])
        slot = np.empty(len(order), np.int64)
        slot[order] = np.arange(len(order)) - np.repeat(np.cumsum(by_head) - by_head, by_head)
        return slot

    @property
    def pages(self) -> int:
        """Guest pages that it needs."""
        return int(self.slot.max(initial=-1)) + 1


class ChosenChunks:
    """What the tiles of one rank chose in one call.

    Args:
        chosen: int32 [batch, tables, tiles, n]: chunks of each tile, ascending, then -1; alike in the rows of the batch
            as far as ``Selection`` says.
        asked: of the forward pass, in a backward pass; None: ranks tell each other what they want. Then all of them
            come here together, and wait for the device.

    Attributes:
        asked: int64 [..], on the host: what ranks asked of each other, for the way back.
        rounds: in which they come from other ranks. Tables count the rank's own chunks as number 0, these from 1.
    """

    def __init__(self, plan: Plan, exchange: Exchange, chosen: Tensor, asked: Tensor | None) -> None:
        assert plan.hierarchy is not None
        self._plan, self._exchange, self._chosen = plan, exchange, chosen
        self._hierarchy: Hierarchy = plan.hierarchy
        self.asked = self._ask() if asked is None else asked
        self.rounds = tuple(self._made_rounds())

    @property
    def comes_at_once(self) -> bool:
        """Whether all that comes lies in one guest buffer, which can be kept for the backward pass."""
        return len(self.rounds) <= 1

    def guest_rows(self, number: int) -> int:
        """Rows of the guest buffer in a round, from 1."""
        return self.rounds[number - 1].pages * self._hierarchy.chunk

    def tables(self, number: int) -> list[SelectedTable]:
        """What tiles visit in a round, of own pages (0) or of guests (from 1): one table a row of the batch."""
        chunk, chosen, plan = self._hierarchy.chunk, self._chosen, self._plan
        own_pages = -(-plan.tokens // chunk)
        if number == 0:
            guest_pages = 0
            place = self._hierarchy.on(chosen.device, "own_page").expand(plan.kv_heads, -1)
        else:
            some = self.rounds[number - 1]
            guest_pages = some.pages
            at = np.full((plan.kv_heads, self._hierarchy.chunks), -1, np.int64)
            at[some.take[:, 0], some.take[:, 1]] = own_pages + some.slot
            place = torch.from_numpy(at).to(chosen.device)
        share = chosen.shape[1] // plan.kv_heads
        head = torch.arange(chosen.shape[1], device=chosen.device) // share
        pages = place[head[None, :, None, None], chosen.clamp_min(0).long()]
        pages = torch.where(chosen < 0, -1, pages).int()
        hierarchy, tiles, masks = self._hierarchy, chosen.shape[2], self._masks
        return [
            SelectedTable(
                hierarchy.tile,
                chunk,
                tiles,
                own_pages,
                guest_pages,
                hierarchy.head_table,
                pages[b],
                None if masks is None else masks[b],
            )
            for b in range(len(chosen))
        ]

    def bring(self, number: int, own: Pages, guests: Pages) -> Pending:
        """Starts to bring what comes in a round, from 1, to the front of a guest buffer."""
        some, chunk = self.rounds[number - 1], self._hierarchy.chunk
        page, head = self._given(some, own.k.device)
        rows = torch.cat([_taken(_by_chunk(x, chunk), page, head) for x in own], dim=1)
        slot, to_head = (torch.from_numpy(x).to(own.k.device) for x in (some.slot, some.take[:, 0].copy()))
        batch = own.k.shape[0]
        widths = [batch * chunk * x.shape[3] for x in own]

        def arrive(got: dict[int, Tensor]) -> None:
            if not len(slot):
                return
            flat = torch.cat([got[peer] for peer in some.take_from]).view(len(slot), -1)
            for x, part in zip(guests, flat.split(widths, dim=1), strict=True):
                pages = x[:, : some.pages * chunk].unflatten(1, (some.pages, chunk))
                pages[:, slot, :, to_head] = part.view(-1, batch, chunk, x.shape[3])

        sizes = {peer: count * sum(widths) for peer, count in some.take_from.items()}
        return self._send("bring", _flat(rows, some.give_to), sizes, rows, arrive)

    def take_home(self, number: int, d_guests: Pages, d_own: Pages) -> Pending:
        """Starts to send the gradients of a round's guests to the owners, who add them to ``d_own``."""
        some, chunk = self.rounds[number - 1], self._hierarchy.chunk
        device, batch = d_guests.k.device, d_guests.k.shape[0]
        slot, head = (torch.from_numpy(x).to(device) for x in (some.slot, some.take[:, 0].copy()))
        rows = torch.cat([_taken(_by_chunk(x, chunk), slot, head) for x in d_guests], dim=1)
        page, to_head = self._given(some, device)
        widths = [batch * chunk * x.shape[3] for x in d_own]

        def arrive(got: dict[int, Tensor]) -> None:
            first = 0
            # Rank by rank: no chunk comes twice from one, and the order is always the same.
            for peer, count in some.give_to.items():
                mine = slice(first, first + count)
                parts = got[peer].view(count, -1).split(widths, dim=1)
                for x, part in zip(d_own, parts, strict=True):
                    total = _by_chunk(x, chunk)
                    total[:, page[mine], :, to_head[mine]] += part.view(count, batch, chunk, x.shape[3])
                    if x.shape[1] % chunk:  # then it was a copy
                        x.copy_(total.flatten(1, 2)[:, : x.shape[1]])
                first += count

        sizes = {peer: count * sum(widths) for peer, count in some.give_to.items()}
        return self._send("return", _flat(rows, some.take_from), sizes, rows, arrive)

    def _send(self, way, sends, sizes, like, arrive) -> Pending:  # type: ignore[no-untyped-def]
        return self._exchange.send(way, "selected", sends, sizes, like, arrive, pairs=not self.comes_at_once)

    def _ask(self) -> Tensor:
        hierarchy, plan, chosen = self._hierarchy, self._plan, self._chosen
        if plan.world_size == 1:
            return torch.zeros(0, dtype=torch.int64)
        head, chunk = np.nonzero(wanted_chunks(chosen, hierarchy).cpu().numpy())
        owner = hierarchy.chunk_owner[chunk]
        order = np.flatnonzero(owner != plan.rank)
        order = order[np.argsort(owner[order], kind="stable")]
        want = np.stack((head, chunk), axis=1)[order]
        counts = np.bincount(owner[order], minlength=plan.world_size)
        matrix, given = self._exchange.ask(torch.from_numpy(want).to(chosen.device), counts.tolist(), "selected")
        return torch.cat((matrix.flatten(), torch.from_numpy(want).flatten(), given.cpu().flatten()))

    def _made_rounds(self) -> Iterator[Round]:
        world, rank = self._plan.world_size, self._plan.rank
        if world == 1:
            return
        asked = self.asked.numpy()
        counts, ids = asked[: world * world].reshape(world, world), asked[world * world :].reshape(-1, 2)
        take_ptr = np.concatenate(([0], np.cumsum(counts[rank])))
        give_ptr = take_ptr[-1] + np.concatenate(([0], np.cumsum(counts[:, rank])))
        others = [(rank + distance) % world for distance in range(1, world)]
        # The same answer on every rank: all know all counts.
        if counts.sum(axis=1).max() <= _MUCH * self._plan.kv_heads * self._hierarchy.chunks * (world - 1) / world:
            groups = [(sorted(others), sorted(others))]
        else:
            # In round s this rank receives from the one s before it, and sends to the one s after it.
            groups = [([owner], [asks]) for owner, asks in zip(others[::-1], others, strict=True)]
        for owners, askers in groups:
            yield Round(
                np.concatenate([ids[take_ptr[r] : take_ptr[r + 1]] for r in owners]),
                {r: n for r in owners if (n := int(counts[rank, r]))},
                np.concatenate([ids[give_ptr[r] : give_ptr[r + 1]] for r in askers]),
                {r: n for r in askers if (n := int(counts[r, rank]))},
            )

    def _given(self, some: Round, device: torch.device) -> tuple[Tensor, Tensor]:
        """(own pages, heads) of what this rank sends."""
        page = self._hierarchy.own_page[some.give[:, 1]]
        return torch.from_numpy(page).to(device), torch.from_numpy(some.give[:, 0].copy()).to(device)

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


def _by_chunk(x: Tensor, chunk: int) -> Tensor:
    """[batch, chunks, chunk, heads, dim]: a view where all chunks are whole, else a copy that ends with zeros."""
    missing = -x.shape[1] % chunk
    whole = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    by_chunk: Tensor = whole.unflatten(1, (-1, chunk))
    return by_chunk


def _taken(x: Tensor, page: Tensor, head: Tensor) -> Tensor:
    """[n, batch * chunk * dim]: chunks of heads."""
    rows: Tensor = x[:, page, :, head]
    return rows.reshape(len(page), x.shape[0] * x.shape[2] * x.shape[4])


def _flat(rows: Tensor, counts: dict[int, int]) -> dict[int, Tensor]:
    """Rows of several peers, in their order, as one flat tensor for each."""
    parts = rows.split(list(counts.values())) if counts else ()
    return {peer: part.flatten() for peer, part in zip(counts, parts, strict=True)}

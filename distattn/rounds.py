"""Chosen chunks on their way, round by round: one is attended while the next one travels.

A chunk travels with a row of K and the row of V behind it, in one message, and lies like that among the guests.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from distattn.aside import after_aside, aside
from distattn.chosen import ChosenChunks, Round
from distattn.exchange import Exchange, Pending
from distattn.kernels.attention import Pages
from distattn.kernels.rows import add_chunks, take_chunks
from distattn.kernels.selected import SelectedTable


class Rounds:
    """The rounds of one pass; the first one begins to travel at once, and beside what is computed if made aside.

    Iterating gives of each its number, its guests, when they are there, and the tables of ``ChosenChunks.tables``. What
    is done with one is launched before the next one is asked for: then its guests may be written over.

    Args:
        own: this rank's K and V.
        kept: guests of a single round that a forward pass has kept, if this is a backward pass.

    Attributes:
        made: what other streams read of what was made here, if this was made aside.
    """

    def __init__(self, chunks: ChosenChunks, exchange: Exchange, own: Pages, kept: Tensor | None = None) -> None:
        self._chunks, self._exchange, self._own = chunks, exchange, own
        self._again = "" if kept is None else " again"
        self._width = own.k.shape[3] + own.v.shape[3]
        if kept is not None and len(chunks.rounds) == 1:
            self._slots, self._first = [kept], Pending()
            return
        sizes = [sum(some.take_from.values()) * self._numel for some in chunks.rounds]
        self._slots = [own.k.new_empty(max(part, default=0)) for part in (sizes[::2], sizes[1::2])]
        self._first = self._bring(0)

    @property
    def made(self) -> list[Tensor]:
        return [
            self._chunks.asked.given,
            *self._slots,
            *(x for some in self._chunks.rounds for x in (some.take, some.give)),
        ]

    @cached_property
    def tables(self) -> list[SelectedTable]:
        """Of the first round."""
        return self._chunks.tables(0)

    def __iter__(self) -> Iterator[tuple[int, Pages, list[SelectedTable]]]:
        pending, rounds, device = self._first, self._chunks.rounds, self._own.k.device
        for number in range(len(rounds)):
            arrived = pending
            if number + 1 < len(rounds):
                with aside(device):
                    pending = self._bring(number + 1)  # the other slot is free, since the round before is done
            tables = self._chunks.tables(number) if number else self.tables
            # There where it has set out, or what was packed would be free before it has left.
            with aside(device):
                arrived.wait()
            after_aside(device)
            yield number, self._pages(self._slot(number)), tables

    @property
    def kept(self) -> Tensor | None:
        """The guests, for the backward pass, if they came in one round; else it brings them again."""
        return self._slots[0] if len(self._chunks.rounds) == 1 else None

    @property
    def _numel(self) -> int:
        """Elements of a chunk of K and V."""
        return self._own.k.shape[0] * self._chunks.hierarchy.chunk * self._width

    def _slot(self, number: int) -> Tensor:
        """What a round has of its guest buffer."""
        return self._slots[number % 2][: sum(self._chunks.rounds[number].take_from.values()) * self._numel]

    def _pages(self, flat: Tensor) -> Pages:
        """A round's guests, or their gradients, flat [chunks, batch, chunk, head_dim + value_dim], as pages.

        All heads see all pages, of which each visits its own.
        """
        batch, _, heads, dim = self._own.k.shape
        chunk, width = self._chunks.hierarchy.chunk, self._width
        rows = max(flat.numel() // (chunk * width) - batch + 1, 0) * chunk  # of one of the batch, to its last page
        strides = chunk * width, width, 0, 1
        k, v = (
            flat.as_strided((batch, rows, heads, n), strides, flat.storage_offset() + first)
            for first, n in ((0, dim), (dim, width - dim))
        )
        return Pages(k, v)

    def gradients(self, number: int, dtype: torch.dtype) -> tuple[Tensor, Pages]:
        """Zeros of the size of a round's guests: flat, and as pages."""
        slot = self._slot(number)
        flat = slot.new_zeros(slot.shape, dtype=dtype)
        return flat, self._pages(flat)

    def _bring(self, number: int) -> Pending:
        if self._exchange.group is None:
            return Pending()
        some, into = self._chunks.rounds[number], self._slot(number)
        taken = take_chunks(self._own, *self._places(some), self._chunks.hierarchy.chunk)
        goes, comes = (self._sizes(counts) for counts in (some.give_to, some.take_from))
        way = f"bring chosen keys and values{self._again}"
        return self._exchange.send(way, "selected", taken.flatten(), goes, into, comes)

    def take_home(self, number: int, d_guests: Tensor, d_own: Pages) -> Pending:
        """Starts to send the gradients of a round's guests, flat, to the owners, who add them to ``d_own``."""
        some = self._chunks.rounds[number]
        page, head = self._places(some)
        came = d_guests.new_empty(len(page) * self._numel)

        def add(flat: Tensor) -> None:
            values = flat.view(-1, self._own.k.shape[0], self._chunks.hierarchy.chunk, self._width)
            first = 0
            # Rank by rank: no chunk comes twice from one, and the order is always the same.
            for count in some.give_to.values():
                mine = slice(first, first + count)
                add_chunks(d_own, page[mine], head[mine], values[mine])
                first += count

        goes, comes = (self._sizes(counts) for counts in (some.take_from, some.give_to))
        way = "return gradients of chosen keys and values"
        return self._exchange.send(way, "selected", d_guests, goes, came, comes, add)

    def _sizes(self, counts: dict[int, int]) -> dict[int, int]:
        return {peer: count * self._numel for peer, count in counts.items()}

    def _places(self, some: Round) -> tuple[Tensor, Tensor]:
        """(own pages, heads) of the chunks that this rank gives."""
        hierarchy = self._chunks.hierarchy
        own_page = hierarchy.on(some.give.device, "own_page")
        return own_page[some.give % hierarchy.chunks], some.give // hierarchy.chunks

"""A tile table whose tiles were chosen on the device, by the data: each query tile names the pages that it visits.

Nothing is copied to the host, and nothing waits for the device: all that the host needs are bounds, which follow from
shapes. Items of work are made as in work.py, with PyTorch operations on the device; on GPUs those of query tiles, where
no row is cut, in Triton (items_triton.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from distattn.kernels import work
from distattn.kernels.masks import Masks
from distattn.kernels.table import TileTable, Tiling

# Kernels count the parts of visits in int32, up to 8 of each.
_MOST = 1 << 28


@dataclass(frozen=True, eq=False)
class SelectedTable(Tiling):
    """Tiles of the score matrix, by query tile; serves wherever a :class:`TileTable` does.

    Attributes, beside those of a Tiling:
        selected: int32 [tables, tiles, n]: the pages that each query tile visits, in any order and none twice; a number
            below 0 is no page.
        masks: int32 [tables, tiles, n, block_q or 1, ceil(block_k / 32)], contiguous, on the same device: which pairs
            of each of these tiles are allowed, column c as bit c % 32 of word c // 32; one row stands for all rows of
            a tile. None if all are; then no page that is selected may have fewer than block_k rows.

    Raises:
        ValueError: shapes, dtypes or devices are others.
    """

    selected: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        tables = max(self.head_table) + 1
        shape = tuple(self.selected.shape)
        if self.selected.ndim != 3 or shape[:2] != (tables, self.tiles) or self.selected.dtype != torch.int32:
            raise ValueError(
                f"selected is {self.selected.dtype} {list(shape)}; expected torch.int32 [{tables}, {self.tiles}, n]"
            )
        if self.selected.numel() >= _MOST:
            raise ValueError(f"selected has {self.selected.numel()} entries; expected fewer than {_MOST}")
        if self.masks is None:
            return
        wanted = (*shape, self.mask_rows, -(-self.block_k // 32))
        if tuple(self.masks.shape) != wanted or self.masks.dtype != torch.int32:
            found = f"{self.masks.dtype} {list(self.masks.shape)}"
            raise ValueError(f"masks is {found}; expected torch.int32 {list(wanted)}")
        if self.masks.device != self.selected.device:
            raise ValueError(f"masks is on {self.masks.device}; expected {self.selected.device}, like selected")
        if not self.masks.is_contiguous():
            raise ValueError(f"masks has strides {self.masks.stride()}; expected a contiguous tensor")

    @property
    def tables(self) -> int:
        return self.selected.shape[0]

    @property
    def names_pages(self) -> bool:
        return True

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    @property
    def mask_rows(self) -> int:
        """Rows of a mask: 1 or block_q."""
        one = self.masks is not None and self.masks.ndim == 5 and self.masks.shape[3] == 1
        return 1 if one else self.block_q

    @property
    def is_empty(self) -> bool:
        """Whether there is no place for a page to visit; whether one is named, only the device knows."""
        return self.selected.numel() == 0 or self.pages == 0

    def empty_rows(self, device: torch.device) -> Tensor | None:
        """bool [tables, tiles]: which rows visit nothing."""
        assert device == self.selected.device
        return (self.selected < 0).all(dim=2)

    def check_rows(self, own_rows: int) -> None:
        """Raises ValueError if a page may be selected of which only a part exists and no mask says so."""
        if self.masks is None and own_rows != self.own_pages * self.block_k:
            raise ValueError(
                f"own has {own_rows} rows; expected {self.own_pages * self.block_k}, whole pages of {self.block_k}, "
                "where selected tiles have no masks"
            )

    def query_work(self, programs: int) -> work.Work:
        """Items of query tiles, for a chip that runs so many programs at once."""
        rows, number = self.tables * self.tiles, self.selected.shape[2]
        if self.selected.is_cuda and rows * number and number <= self._longest(number * self.tiles, programs, 1):
            from distattn.kernels import items_triton

            if number <= items_triton.MOST and self.pages <= items_triton.MOST_PAGES:
                return items_triton.query_work(self)
        chosen = self.selected.reshape(rows, number)
        nothing, first = chosen < 0, torch.arange(0, rows * number, max(number, 1), device=chosen.device)
        # Sorted and added up to where two more entries follow.
        page, entry = (chosen.new_zeros(rows * number + 2) for _ in range(2))
        place = torch.empty_like(chosen, dtype=torch.int64)
        torch.sort(torch.where(nothing, self.pages, chosen), dim=1, out=(page[:-2].view(rows, number), place))
        torch.add(first[:, None], place, out=entry[:-2].view(rows, number))
        return self._work(number - nothing.sum(dim=1), first, page, entry, self.tiles, number, programs, 1)

    def key_work(self, programs: int, share: int) -> work.Work:
        """Items of key pages, each for ``share`` query heads."""
        chosen = self.selected.flatten()
        entry = torch.arange(chosen.numel(), device=chosen.device, dtype=torch.int32)
        number = self.selected.shape[2]
        owner = entry // (self.tiles * number) * self.pages + chosen
        owner, order = torch.where(chosen < 0, self.tables * self.pages, owner).sort(stable=True)
        edges = torch.arange(self.tables * self.pages + 1, device=chosen.device, dtype=torch.int32)
        first = torch.searchsorted(owner, edges)
        tile, entry = (_longer(x, 2) for x in ((entry // number % self.tiles)[order], order))
        return self._work(first.diff(), first[:-1], tile, entry, self.pages, self.tiles, programs, share)

    def _longest(self, entries: int, programs: int, share: int) -> int:
        """How many visits an item may have, where each table has so many entries."""
        # Each cut leaves a partial result of all heads: not more of them than programs.
        even = entries * len(self.head_table) / programs / share
        return max(work.longest_piece(even), entries * self.tables // programs, 1)

    def _work(
        self,
        count: Tensor,
        first: Tensor,
        other: Tensor,
        entry: Tensor,
        rows_of_table: int,
        most: int,
        programs: int,
        share: int,
    ) -> work.Work:
        """As work.make_items.

        Row r visits ``other[first[r] + i]`` for i < count[r], which is ``most`` at most, each with mask
        ``entry[first[r] + i]``; both int32, with two entries more. Every table has as many entries.
        """
        device, rows, entries = count.device, len(count), (len(other) - 2) // self.tables
        longest = self._longest(entries, programs, share)
        # Of a table: ceil(count / longest) summed up is no more than its rows and this.
        cuts = entries // longest if most > longest else 0
        last, edges = _places(self.tables, rows_of_table, most, device)
        nothing = other.new_zeros(self.tables + 2)  # serves wherever there is nothing
        if cuts:
            pieces = (count + longest - 1) // longest
            stop = pieces.cumsum(0)
            number = torch.arange(rows + self.tables * cuts, device=device)
            row = torch.searchsorted(stop, number, right=True).clamp_max(rows - 1)
            exists = number < stop[-1]
            piece = number - (stop - pieces)[row]
            begin, end = (n * count[row] // pieces[row].clamp_min(1) for n in (piece, piece + 1))
            visits = torch.where(exists, end - begin, 0)
            cut = exists & (pieces[row] > 1)
            slot = torch.where(cut, cut.cumsum(0) - 1, -1)
            begin = begin + first[row]
            is_cut = pieces > 1
            cut_rows = (~is_cut).to(torch.int8).sort(stable=True)[1][: self.tables * cuts]
            first_slot = torch.where(is_cut, pieces, 0).cumsum(0) - pieces
            split = _longer(torch.stack((cut_rows, first_slot[cut_rows], pieces[cut_rows]), dim=1))
            ends = is_cut.view(self.tables, rows_of_table).sum(1).cumsum(0).int()
            split_ptr = torch.cat((nothing[:1], ends, nothing[:1]))
            last = last[row]
        else:  # every row is an item: in a third of the launches
            exists, visits, begin = count > 0, count, first
            split = split_ptr = nothing
        key, order = torch.where(exists, last - visits, self.tables * (most + 1)).sort(stable=True)
        items = other.new_zeros(len(key) * work.ITEM + 1)
        columns = items[:-1].view(-1, work.ITEM)
        columns[:, 0], columns[:, 6] = (row[order], slot[order]) if cuts else (order, -1)
        begin, visits = begin[order], visits[order]
        if self.masks is None:
            columns[:, 3], columns[:, 4] = visits, begin
            visited = work.Visits(other, torch.ones_like(other), nothing, nothing, nothing)
        else:
            columns[:, 1], columns[:, 2] = begin, begin + visits
            visited = work.Visits(nothing, nothing, other, entry, self.masks)
        return work.Work(
            visits=visited,
            items=items,
            item_ptr=torch.searchsorted(key, edges, out_int32=True),
            most=rows_of_table + cuts,
            # Rows are cut if count > longest, where ceil(count / longest) < 2 count / longest.
            slots=2 * self.tables * cuts,
            split=split,
            split_ptr=split_ptr,
            most_split=cuts,
            one_table=False,  # how many items there are, only item_ptr tells
            mean=entries / (rows_of_table + cuts),
        )

    @cached_property
    def on_host(self) -> TileTable:
        """The same table for kernels whose tables are the host's. Waits for the device."""
        chosen = self.selected.flatten(0, 1).cpu().numpy()
        order = np.argsort(chosen, axis=1, kind="stable")
        row, place = np.nonzero(np.take_along_axis(chosen, order, axis=1) >= 0)
        entry = row * chosen.shape[1] + order[row, place]
        page = chosen.ravel()[entry]
        ptr = np.searchsorted(row, np.arange(len(chosen) + 1)).astype(np.int32)
        none, nowhere = np.zeros(0, np.int32), np.zeros(len(chosen) + 1, np.int32)
        words = np.zeros((0, self.mask_rows, -(-self.block_k // 32)), np.uint32)
        if self.masks is not None:
            words = self.masks.flatten(0, 2).cpu().numpy().view(np.uint32)[entry]
        masked = self.masks is not None
        return TileTable(
            block_q=self.block_q,
            block_k=self.block_k,
            tiles=self.tiles,
            own_pages=self.own_pages,
            guest_pages=self.guest_pages,
            head_table=self.head_table,
            full_ptr=nowhere if masked else ptr,
            full_first=none if masked else page,
            full_count=none if masked else np.ones_like(page),
            part_ptr=ptr if masked else nowhere,
            part_page=page if masked else none,
            part_mask=np.arange(len(page), dtype=np.int32) if masked else none,
            masks=Masks(self.block_k, words),
        )


@lru_cache(maxsize=16)
def _places(tables: int, rows_of_table: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers by which rows are ordered by table, longest first: int64 [rows], of one that visits nothing, less what a
    row visits; and int64 [tables + 2], those with which tables begin and end, the last one twice. Kept, as work.py
    keeps units.
    """
    row, edges = np.arange(tables * rows_of_table), np.minimum(np.arange(tables + 2), tables)
    last, edges = row // max(rows_of_table, 1) * (most + 1) + most, edges * (most + 1)
    return torch.from_numpy(last).to(device), torch.from_numpy(edges).to(device)


def _longer(x: Tensor, more: int = 1) -> Tensor:
    """int32, flat, with some zeros behind it."""
    return torch.cat((x.flatten().int(), x.new_zeros(more, dtype=torch.int32)))


AnyTable = TileTable | SelectedTable

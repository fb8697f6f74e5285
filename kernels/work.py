"""What the programs of a compiled kernel do: a tile table on the device, and its rows cut into items of work.

Rows differ: beside query tiles that visit five pages there may be one that visits eight thousand. An item is a row,
or a piece of a long row, and items are ordered longest first, so that a chip that takes them in order is busy to the
end (Graham, "Bounds on multiprocessing timing anomalies", 1969: at most 4/3 of the best for whole rows). The pieces of
a row leave partial results in slots, which a second kernel adds up, in order: the result does not depend on timing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distattn.kernels.table import KeyTable, TileTable
from distattn.kernels.uploads import upload

if TYPE_CHECKING:
    from distattn.kernels.selected import AnyTable

ITEM = 8
"""Columns of an item: row, where its PARTIAL visits begin, where they end, FULL visits, the run of the first of these,
visits of that run to skip, slot or -1, nothing (an item is one aligned load)."""
UNIT = 4
"""Columns of a unit, heads that a program takes together: table, first query head, key/value head, query heads."""
# The longest item takes at most this share of the time that an evenly loaded chip would need for everything.
_LONGEST = 0.25
# Pieces shorter than this spend more on their partial results than they save.
_SHORTEST = 16


class Visits(NamedTuple):
    """One direction of a tile table on the device; the fields are those of TileTable or KeyTable, int32.

    The order of a row's visits: its PARTIAL ones, then those of its FULL runs.
    """

    full_first: Tensor
    full_count: Tensor
    part_other: Tensor
    part_mask: Tensor
    masks: Tensor


@dataclass(frozen=True, eq=False)
class Work:
    """What one launch reads.

    visits: the table.
    items: int32 [items, ITEM], by table, longest first. All arrays have an entry more, which nobody needs, those of
        PARTIAL visits have two, and the masks of a TileTable one mask.
    item_ptr: int32 [tables + 1].
    most: the largest number of items of a table.
    slots: number of partial results.
    split: int32 [rows that were cut, 3]: row, its first slot, how many it has; by table. Their partial results are
        to be added up.
    split_ptr: int32 [tables + 1]; most_split: the largest number of such rows of a table.
    one_table: there is one table, and it has ``most`` items.
    mean: visits of an item, about.
    """

    visits: Visits
    items: Tensor
    item_ptr: Tensor
    most: int
    slots: int
    split: Tensor
    split_ptr: Tensor
    most_split: int
    one_table: bool
    mean: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.items, self.item_ptr, self.split, self.split_ptr, *self.visits

    @property
    def numbers(self) -> Hashable:
        return self.most, self.slots, self.most_split, self.one_table, self.mean


def query_work(table: AnyTable, device: torch.device, programs: int) -> Work:
    """Items of query tiles, for a chip that runs so many programs at once. Kept with the table."""
    key = ("query", device, programs)
    if key not in table.cache:
        if isinstance(table, TileTable):
            other = (table.part_page, table.part_mask)
            made = _make(table, table.tiles, table, other, table.heads_by_table, device, programs, 1)
        else:
            made = table.query_work(programs)
        table.cache[key] = made
    work: Work = table.cache[key]
    return work


def key_work(table: AnyTable, device: torch.device, programs: int, share: int) -> Work:
    """Items of key pages, each for ``share`` query heads. Kept with the table."""
    key = ("key", device, programs, share)
    if key not in table.cache:
        if isinstance(table, TileTable):
            by_key = table.by_key
            other = (by_key.part_tile, by_key.part_mask)
            made = _make(by_key, table.pages, table, other, table.heads_by_table, device, programs, share)
        else:
            made = table.key_work(programs, share)
        table.cache[key] = made
    work: Work = table.cache[key]
    return work


def _make(
    rows: TileTable | KeyTable,
    rows_of_table: int,
    table: TileTable,
    partial: tuple[NDArray[np.int32], NDArray[np.int32]],
    heads: NDArray[np.int64],
    device: torch.device,
    programs: int,
    share: int,
) -> Work:
    items, item_ptr, split, split_ptr, slots = make_items(
        rows.full_ptr, rows.full_count, rows.part_ptr, rows_of_table, heads, programs, share
    )

    def longer(array: NDArray[np.int32], more: int = 1) -> NDArray[np.int32]:
        # Some entries more: what is read ahead exists, and nothing is empty.
        out = np.zeros(array.size + more, np.int32)
        out[: array.size] = array.ravel()
        return out

    arrays = [longer(x) for x in (items, item_ptr, split, split_ptr, rows.full_first, rows.full_count)]
    there = upload([*arrays, *(longer(x, 2) for x in partial)], device)
    return Work(
        Visits(there[4], there[5], there[6], there[7], table.masks.words_and_none(device).flatten()),
        there[0],
        there[1],
        int(np.diff(item_ptr).max(initial=0)),
        slots,
        there[2],
        there[3],
        int(np.diff(split_ptr).max(initial=0)),
        table.tables == 1,
        _about(float(rows.full_count.sum() + len(partial[0])) / max(len(items), 1)),
    )


def make_items(
    full_ptr: NDArray[np.int32],
    full_count: NDArray[np.int32],
    part_ptr: NDArray[np.int32],
    rows_of_table: int,
    heads: NDArray[np.int64],
    programs: int,
    share: int = 1,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], int]:
    """Cuts rows into items.

    Args:
        rows_of_table: how many rows each table has, one table after the other.
        heads: int64 [tables]: query heads that read each table.
        programs: how many items run at a time.
        share: query heads that an item's visits are made for.

    Returns:
        items int32 [n, ITEM], item_ptr int32 [tables + 1], split int32 [m, 3], split_ptr int32 [tables + 1], slots.
    """
    before = np.zeros(len(full_count) + 1, np.int64)  # FULL visits in all runs before each run
    np.cumsum(full_count, out=before[1:])
    partial = np.diff(part_ptr).astype(np.int64)
    visits = partial + np.diff(before[full_ptr])
    table = np.arange(len(visits)) // max(rows_of_table, 1)
    longest = longest_piece(float((visits * heads[table]).sum()) / programs / share)
    most, tables = int(visits.max(initial=0)), np.arange(len(heads) + 1)
    if most <= longest:  # every row is an item
        row = np.flatnonzero(visits)
        count, begin, end, run = visits[row], part_ptr[row], part_ptr[row + 1], full_ptr[row]
        skip, slot = np.zeros_like(row), np.full_like(row, -1)
        split, split_ptr, slots = np.zeros((0, 3), np.int32), np.zeros(len(tables), np.int32), 0
    else:
        pieces = -(-visits // longest)
        row = np.repeat(np.arange(len(visits)), pieces)
        piece = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        # Equal pieces, to within one visit.
        first = piece * visits[row] // np.maximum(pieces[row], 1)
        count = (piece + 1) * visits[row] // np.maximum(pieces[row], 1) - first
        full_before = before[full_ptr[row]] + np.maximum(first - partial[row], 0)
        run = np.searchsorted(before, full_before, side="right") - 1
        skip = full_before - before[run]
        cut = pieces[row] > 1
        slots, slot = int(cut.sum()), np.where(cut, np.cumsum(cut) - 1, -1)
        begin, end = (part_ptr[row] + np.minimum(at, partial[row]) for at in (first, first + count))
        split_row = np.flatnonzero(pieces > 1)
        split = np.stack((split_row, np.cumsum(pieces[split_row]) - pieces[split_row], pieces[split_row]), axis=1)
        split, split_ptr = split.astype(np.int32), np.searchsorted(table[split_row], tables).astype(np.int32)
    order = np.argsort(table[row] * (most + 1) - count, kind="stable")
    columns = (row, begin, end, count - (end - begin), run, skip, slot, np.zeros_like(row))
    items = np.stack(columns, axis=1)[order].astype(np.int32)
    item_ptr = np.searchsorted(table[row], tables).astype(np.int32)
    return items, item_ptr, split, split_ptr, slots


def _about(x: float) -> float:
    """To within a tenth: that tables which are nearly alike are launched alike."""
    return 2 ** (round(4 * math.log2(x)) / 4) if x else x


_WAVES, _FEWEST = 16, 128


def waves_of(work: Work, numbers: int, programs: int) -> int:
    """Programs that go through ``numbers`` items on a chip that runs ``programs`` at once, one wave after the other.

    In one wave each program would have its share from the start, and wait with it for as long as an exchange has its
    multiprocessor, which may wait for a peer: seen on two H100s, a launch of 23 ms took 39. Of several waves the others
    take more meanwhile. A program has _FEWEST visits at least, for which its start is little.
    """
    visits = numbers * work.mean
    return min(numbers, programs * max(1, min(_WAVES, int(visits / (programs * _FEWEST)))))


def longest_piece(even: float) -> int:
    """How many visits an item may have where an evenly loaded chip has so many a program."""
    return max(_SHORTEST, int(_LONGEST * even))


@lru_cache(maxsize=64)
def query_units(head_table: tuple[int, ...], kv_heads: int, most: int, device: torch.device) -> tuple[Tensor, int, int]:
    """Units of query heads: as many of those that share a key/value head and a table as divide them, up to ``most``.

    Kept, so that only the first of many tables waits until units are on the device.

    Returns:
        units int32 [n, UNIT], heads of each, and how many units beside each other read the same keys.
    """
    heads = len(head_table)
    share = heads // kv_heads
    alike = all(len({*head_table[h : h + share]}) == 1 for h in range(0, heads, share))
    size = max(n for n in range(1, max(most, 1) + 1) if share % n == 0) if alike else 1
    units = [(head_table[h], h, h // share, size) for h in range(0, heads, size)]
    return torch.tensor(units, dtype=torch.int32, device=device), size, share // size if alike else 1


@lru_cache(maxsize=64)
def key_units(head_table: tuple[int, ...], kv_heads: int, device: torch.device) -> list[Tensor]:
    """Units by key/value head: runs of its query heads that share a table. Kept, as those of queries.

    Returns:
        int32 [n, UNIT] each, to be run one after the other: a key/value head occurs once in each.
    """
    share = len(head_table) // kv_heads
    rounds: list[list[tuple[int, int, int, int]]] = []
    for kv_head in range(kv_heads):
        mine = range(kv_head * share, (kv_head + 1) * share)
        for number, (index, members) in enumerate(groupby(mine, key=head_table.__getitem__)):
            heads = list(members)
            rounds += [[]] if number == len(rounds) else []
            rounds[number].append((index, heads[0], kv_head, len(heads)))
    return [torch.tensor(units, dtype=torch.int32, device=device) for units in rounds]

"""Items of query tiles of a table that was selected on the device, where no row is cut, in Triton.

selected.py says in PyTorch operations what they are; these kernels make the same, in the same order, in three launches.
Items are ordered by counting: how many rows of each block visit how many pages, added up in the order in which these
are to come (by table, the most pages first, block by block; and behind all tables those that visit nothing), says
where each block's items begin. No two programs write to one place, and none waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from distattn.kernels.launching import Launches, Part, Recording
from distattn.kernels.work import ITEM, Visits, Work

if TYPE_CHECKING:
    from distattn.kernels.selected import SelectedTable

MOST = 128
"""Entries of a row, at most: a program sorts whole rows."""
MOST_PAGES = 2**31 // 128 - 1
"""Pages, at most: one and its place in a row are sorted as one int32."""
_LAUNCHES = Launches()
# Of a step of a program: rows at most, which are compared with each other, entries, and what is added up.
_ROWS, _ENTRIES, _NUMBERS = 32, 2048, 4096
# Blocks of rows of all tables, about: as many as a GPU has room for, and few enough that one program adds them up.
_BLOCKS = 512
_ITEM = tl.constexpr(ITEM)
_NOWHERE = tl.constexpr(2**31 - 1)  # behind all pages and places


@triton.jit
def _place_of(table, block, count, tables, blocks, n):
    """Where in the order of items it is noted how many rows of a block visit ``count`` of n pages."""
    return tl.where(count > 0, (table * n + n - count) * blocks, (tables * n + table) * blocks) + block


@triton.jit(do_not_specialize=["n", "tiles", "tables", "steps"])
def _sort_rows(
    selected, page_out, entry_out, counts, numbers, n, tiles, tables, steps,
    N_2: tl.constexpr, COUNTS_2: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, table): each row's pages in rising order, behind them page 0 for each place without one;
    how many pages it has; and how many rows of the block have how many."""
    block, table = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, N_2)[None, :]
    kind = tl.arange(0, COUNTS_2)
    number = tl.zeros([COUNTS_2], tl.int32)
    for step in range(steps):
        row = (block * steps + step) * ROWS + tl.arange(0, ROWS)  # of the table
        exists = row < tiles
        first = (table * tiles + row) * n
        inside = exists[:, None] & (place < n)
        entry = first[:, None] + place
        page = tl.load(selected + entry, mask=inside, other=-1)
        count = tl.sum((page >= 0).to(tl.int32), 1)
        key = tl.sort(tl.where(page < 0, _NOWHERE, page * N_2 + place), dim=1)
        there = key != _NOWHERE
        tl.store(page_out + entry, tl.where(there, key // N_2, 0), mask=inside)
        if MASKS:
            tl.store(entry_out + entry, first[:, None] + tl.where(there, key % N_2, 0), mask=inside)
        else:
            tl.store(entry_out + entry, tl.full([ROWS, N_2], 1, tl.int32), mask=inside)
        tl.store(counts + table * tiles + row, count, mask=exists)
        number += tl.sum(((count[:, None] == kind[None, :]) & exists[:, None]).to(tl.int32), 0)
    at = _place_of(table, block, kind, tables, tl.num_programs(0), n)
    tl.store(numbers + at, number, mask=kind <= n)


@triton.jit(do_not_specialize=["n", "blocks", "tables", "entries"])
def _add_up(
    numbers, begins, item_ptr, nothing, page_out, entry_out, n, blocks, tables, entries,
    NUMBERS: tl.constexpr, MASKS: tl.constexpr,
):  # fmt: skip
    """One program: what comes before each number, and before each table's first one; and the zeros."""
    total = 0
    for start in range(0, tables * (n + 1) * blocks, NUMBERS):
        at = start + tl.arange(0, NUMBERS)
        inside = at < tables * (n + 1) * blocks
        number = tl.load(numbers + at, mask=inside, other=0)
        begin = total + tl.cumsum(number, 0) - number
        tl.store(begins + at, begin, mask=inside)
        table = at // (n * blocks)
        begins_table = inside & (at % (n * blocks) == 0) & (table <= tables)
        tl.store(item_ptr + table, begin, mask=begins_table)
        tl.store(nothing + table, tl.zeros([NUMBERS], tl.int32), mask=begins_table)
        total += tl.sum(number, 0)
    behind = entries + tl.arange(0, 2)
    tl.store(page_out + behind, tl.zeros([2], tl.int32))
    tl.store(entry_out + behind, tl.full([2], 0 if MASKS else 1, tl.int32))


@triton.jit(do_not_specialize=["n", "tiles", "tables", "steps"])
def _write_items(
    counts, begins, items, n, tiles, tables, steps, COUNTS_2: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr
):
    """Program (block of rows, table): an item each, in the order of rows among those of the block that visit as many
    pages."""
    block, table = tl.program_id(0), tl.program_id(1)
    number, kind, column = tl.arange(0, ROWS), tl.arange(0, COUNTS_2), tl.arange(0, _ITEM)[None, :]
    at_kind = _place_of(table, block, kind, tables, tl.num_programs(0), n)
    begin = tl.load(begins + at_kind, mask=kind <= n, other=0)  # of the rows to come
    for step in range(steps):
        row = (block * steps + step) * ROWS + number
        exists = row < tiles
        row += table * tiles
        count = tl.load(counts + row, mask=exists, other=-1)
        is_kind = count[:, None] == kind[None, :]
        earlier = (count[None, :] == count[:, None]) & (number[None, :] < number[:, None])
        at = tl.sum(tl.where(is_kind, begin[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
        first = row * n
        value = tl.where(column == 0, row[:, None], tl.where(column == 6, -1, 0))
        if MASKS:
            value = tl.where(column == 1, first[:, None], tl.where(column == 2, (first + count)[:, None], value))
        else:
            value = tl.where(column == 3, count[:, None], tl.where(column == 4, first[:, None], value))
        tl.store(items + at.to(tl.int64)[:, None] * _ITEM + column, value, mask=exists[:, None])
        begin += tl.sum(is_kind.to(tl.int32), 0)


def query_work(table: SelectedTable) -> Work:
    """As SelectedTable.query_work, of a table that has rows, with 1 to MOST entries each, of which none is cut,
    and of MOST_PAGES pages at most."""
    selected = table.selected.contiguous()
    tables, tiles, n = selected.shape
    kept, passing = _sizes(tables, tiles, n, _blocks_of(tables, tiles, n)[2])
    # Host time: two tensors of many parts are sooner looked at than many tensors.
    made = torch.empty(sum(kept), dtype=torch.int32, device=selected.device)
    scratch = torch.empty(sum(passing), dtype=torch.int32, device=selected.device)
    _LAUNCHES.run((selected, made, scratch), table.has_masks, partial(_record, table.has_masks))
    page, entry, items, item_ptr, nothing = made.split(kept)
    if table.masks is None:
        visits = Visits(page, entry, nothing, nothing, nothing)
    else:
        visits = Visits(nothing, nothing, page, entry, table.masks)
    return Work(visits, items, item_ptr, tiles, 0, nothing, nothing, 0, one_table=False, mean=float(n))


def _record(masks: bool, recording: Recording) -> None:
    selected, made, scratch = recording.parts
    tables, tiles, n = selected.now.shape
    rows, steps, blocks = _blocks_of(tables, tiles, n)
    kept, passing = _sizes(tables, tiles, n, blocks)
    page, entry, items, item_ptr, nothing = _split(made, kept)
    counts, numbers, begins = _split(scratch, passing)
    counts_2 = triton.next_power_of_2(n + 1)
    recording.launch(
        _sort_rows, (blocks, tables), selected, page, entry, counts, numbers, n, tiles, tables, steps,
        N_2=triton.next_power_of_2(n), COUNTS_2=counts_2, ROWS=rows, MASKS=masks, num_warps=4,
    )  # fmt: skip
    recording.launch(
        _add_up, (1,), numbers, begins, item_ptr, nothing, page, entry, n, blocks, tables, tables * tiles * n,
        NUMBERS=_NUMBERS, MASKS=masks, num_warps=8,
    )  # fmt: skip
    recording.launch(
        _write_items, (blocks, tables), counts, begins, items, n, tiles, tables, steps,
        COUNTS_2=counts_2, ROWS=rows, MASKS=masks, num_warps=4,
    )  # fmt: skip


def _blocks_of(tables: int, tiles: int, n: int) -> tuple[int, int, int]:
    """Rows of a step of a program, its steps, and blocks of rows that a table has."""
    rows = min(_ROWS, _ENTRIES // triton.next_power_of_2(n))
    pieces = -(-tiles // rows)
    steps = -(-pieces * tables // _BLOCKS)
    return rows, steps, -(-pieces // steps)


@lru_cache(maxsize=64)
def _sizes(tables: int, tiles: int, n: int, blocks: int) -> tuple[list[int], list[int]]:
    """Of page, entry (1 throughout where there are no masks), items, item_ptr, nothing; and of counts, numbers, begins.

    All begin at multiples of 16 bytes, and have the entries more that work.py wants.
    """
    entries, numbers = tables * tiles * n, tables * (n + 1) * blocks
    kept = entries + 2, entries + 2, tables * tiles * ITEM + 1, tables + 2, tables + 2
    return _even(kept), _even((tables * tiles, numbers, numbers))


def _even(sizes: Sequence[int]) -> list[int]:
    return [-(-size // 4) * 4 for size in sizes]


def _split(whole: Part, sizes: list[int]) -> list[Part]:
    begins = accumulate(sizes, initial=0)
    return [Part(whole.number, begin * 4, x) for x, begin in zip(whole.now.split(sizes), begins, strict=False)]

"""Items that are made in Triton, against those made in PyTorch operations, which are the definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from selected_cases import Case, inputs, table_of

from distattn.kernels.attention import Choice, Pages, attention_backward, attention_forward, row_deltas
from distattn.kernels.launching import Launches
from distattn.kernels.selected import SelectedTable
from distattn.kernels.work import Work

PROGRAMS = 1  # of a chip so small that no row is cut for it


@pytest.fixture
def in_triton() -> Callable[[SelectedTable], Work]:
    pytest.importorskip("triton")
    from distattn.kernels import items_triton

    return items_triton.query_work


def random_table(tables: int, tiles: int, n: int, masked: bool, seed: int = 0) -> SelectedTable:
    """Rows of which some visit nothing, and some all that they may; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    pages = 2 * n
    selected = torch.rand(tables, tiles, pages, generator=generator).argsort(dim=2)[..., :n].int()
    share = 1.6 * torch.rand(tables, tiles, 1, generator=generator) - 0.3
    selected[torch.rand(selected.shape, generator=generator) < share] = -1
    return table_with(selected, masked)


def table_with(selected: torch.Tensor, masked: bool) -> SelectedTable:
    tables, tiles, n = selected.shape
    masks = torch.zeros(tables, tiles, n, 1, 1, dtype=torch.int32, device=selected.device) if masked else None
    return SelectedTable(8, 16, tiles, 300, 0, tuple(range(tables)), selected, masks)


def same(made: Work) -> list[int]:
    """For each tensor, which is the first that is the same."""
    addresses = [id(x) for x in made.tensors]
    return [addresses.index(x) for x in addresses]


def check(made: Work, table: SelectedTable) -> None:
    """``made`` is what PyTorch operations make of the table on the CPU: item by item, and visit by visit."""
    tables, tiles, n = table.selected.shape
    expected = table.query_work(PROGRAMS)
    assert made.numbers == expected.numbers and expected.slots == 0
    assert torch.equal(made.items[: tables * tiles * 8].cpu(), expected.items[:-1])
    assert torch.equal(made.item_ptr[: tables + 1].cpu(), expected.item_ptr[: tables + 1])
    assert all(x.dtype == torch.int32 and x.data_ptr() % 16 == 0 for x in made.tensors)
    # Work of other tables is launched alike: the same tensors are one.
    assert same(made) == same(expected)
    fields = slice(0, 2) if table.masks is None else slice(2, 4)
    there = (torch.arange(n) < (table.selected >= 0).sum(2, keepdim=True)).flatten()
    for mine, theirs in zip(made.visits[fields], expected.visits[fields], strict=True):
        assert torch.equal(mine[: len(there)].cpu()[there], theirs[: len(there)][there])
        # What is read ahead, too, is a page, or a mask, that exists.
        assert len(mine) >= len(there) + 2 and 0 <= int(mine[: len(there) + 2].min())
        assert int(mine[: len(there) + 2].max()) < max(table.pages, len(there))
    assert not made.split_ptr[: tables + 1].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("tables", "tiles", "n"),
    [(1, 1, 1), (1, 65, 3), (3, 64, 8), (2, 130, 5), (5, 9, 40), (2, 40, 33), (7, 3, 2), (2, 20, 128), (1, 200, 1)],
)
def test_items_are_those_of_the_definition(
    tables: int, tiles: int, n: int, masked: bool, in_triton: Callable[[SelectedTable], Work]
) -> None:
    table = random_table(tables, tiles, n, masked)
    check(in_triton(table_with(table.selected.to(DEVICE), masked)), table)


@pytest.mark.parametrize("what", ["nothing", "all", "nothing in one table", "not contiguous"])
def test_rows_that_are_alike(what: str, in_triton: Callable[[SelectedTable], Work]) -> None:
    selected = torch.arange(6, dtype=torch.int32).flip(0).repeat(3, 70, 1)
    if what == "not contiguous":
        selected = random_table(70, 3, 6, True).selected.transpose(0, 1)
    elif what != "all":
        selected[1 if what == "nothing in one table" else slice(None)] = -1
    check(in_triton(table_with(selected.to(DEVICE), True)), table_with(selected, True))


@pytest.mark.parametrize("blocks", [1, 7, 1000])
def test_many_rows_are_taken_step_by_step(
    blocks: int, in_triton: Callable[[SelectedTable], Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_NUMBERS", 8), ("_ROWS", 4), ("_BLOCKS", blocks)):
        monkeypatch.setattr(f"distattn.kernels.items_triton.{name}", value)
    monkeypatch.setattr("distattn.kernels.items_triton._LAUNCHES", Launches())  # others were recorded for other steps
    table = random_table(3, 50, 7, True)
    check(in_triton(table_with(table.selected.to(DEVICE), True)), table)


class Logged:
    """Stands for a kernel: logs the tensors, by address, of launches and of those of the compiled kernel."""

    packed_metadata = None

    def __init__(self, kernel: Any, log: list[list[int]]) -> None:
        self.arg_names, self._log = kernel.arg_names, log

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., "Logged"]:
        def launch(*values: Any, **_: Any) -> Logged:
            addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values]
            self._log.append([x for x in addresses if type(x) is int and x > 1 << 20])
            return self

        return launch


def test_launches_are_replayed_for_other_tables(
    in_triton: Callable[[SelectedTable], Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distattn.kernels import items_triton

    log: list[list[int]] = []
    recorded = Launches()
    monkeypatch.setattr(items_triton, "_LAUNCHES", recorded)
    for name in ("_sort_rows", "_add_up", "_write_items"):
        monkeypatch.setattr(items_triton, name, Logged(getattr(items_triton, name), log))
    kept = []  # so that none lies where another one lay
    for seed in range(3):
        table = table_with(random_table(2, 70, 5, True, seed).selected.to(DEVICE), True)
        made = in_triton(table)
        kept.append(made)
        selected, page, entry, counts, numbers = log[-3]
        assert [selected, page, entry] == [x.data_ptr() for x in (table.selected, *made.visits[2:4])]
        begins = log[-2][1]
        assert log[-2:] == [
            [numbers, begins, made.item_ptr.data_ptr(), made.split.data_ptr(), page, entry],
            [counts, begins, made.items.data_ptr()],
        ]
        assert counts + 4 * 140 <= numbers and numbers + 4 * 2 * 6 * 2 <= begins
    assert len(recorded._kept) == 1 and len(log) == 9


@pytest.mark.parametrize(
    "case",
    [
        Case(90, 16, 16, 4, 2, (0, 0, 1, 1), 4, True),
        Case(96, 12, 32, 4, 2, (0, 0, 1, 1), 3, False),
        Case(90, 16, 32, 4, 2, (0, 0, 1, 1), 3, True, one_row=True),
    ],
)
def test_attention_with_these_items_is_the_same(
    case: Case, in_triton: Callable[[SelectedTable], Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distattn.kernels.attention_triton import programs_at_once

    monkeypatch.setattr("distattn.kernels.attention.choose", lambda *_, **__: Choice("triton", "a test of it"))
    monkeypatch.setattr("distattn.kernels.items_triton.MOST", 0)  # unless they are asked for, items are PyTorch's
    found = []
    for make in (None, in_triton):
        table, _ = table_of(case)
        q, _, _, grad, grad_lse, _, own, guests, _ = inputs(case, table, 16)
        if make is not None:
            table.cache["query", q.device, programs_at_once(q.device)] = make(table)
        out, lse, dq = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=DEVICE), torch.zeros_like(q)
        attention_forward(q, own, guests, table, out, lse, scale=0.3)
        d_own, d_guests = (Pages(*map(torch.zeros_like, pages)) for pages in (own, guests))
        delta = row_deltas(out, grad, grad_lse)
        attention_backward(q, own, guests, table, grad, lse, delta, dq, d_own, d_guests, scale=0.3)
        found.append((out, lse, dq))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))
    assert bool(found[0][0].any()) and bool(found[0][2].any())

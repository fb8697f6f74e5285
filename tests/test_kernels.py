"""The tile kernel on its own: resuming, merging, guests, and steps, against plain attention."""

import kernel_cases
import numpy as np
import pytest
import torch
from kernel_cases import Case, check

from distattn import reference
from distattn.axis import Axis
from distattn.kernels.attention import (
    Biases,
    Choice,
    Pages,
    attention_backward,
    attention_forward,
    choose,
    choose_by_shape,
)
from distattn.kernels.rows import merge
from distattn.kernels.selected import SelectedTable
from distattn.kernels.table import TileTable
from distattn.patterns import Causal, Pattern, SlidingWindow, Strided
from distattn.tiles import Extents, assemble, visit

BLOCK, LENGTH, HEADS, KV_HEADS, DIM = 8, 300, 4, 2, 16
PAGES = -(-LENGTH // BLOCK)
NOBODY = Pages(torch.zeros(1, 0, KV_HEADS, DIM), torch.zeros(1, 0, KV_HEADS, DIM))


def table_of(pattern: Pattern, pages: np.ndarray, own: int) -> TileTable:
    """A table over some pages of the sequence, the first ``own`` of them the rank's own and the others guests."""
    queries, keys = Axis.grid(LENGTH, BLOCK), Axis.grid(LENGTH, BLOCK)
    extents = Extents.of(pages[:own], 0).joined(Extents.of(pages[own:], own))
    visits = visit(pattern, queries, keys)
    return assemble([[(visits, extents)]], [0] * HEADS, queries.blocks, (BLOCK, BLOCK), own, len(pages) - own)


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, LENGTH, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def run(
    q: torch.Tensor,
    own: Pages,
    guests: Pages,
    table: TileTable,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if before:
        out, lse = before
    else:
        # Poisoned, so that a row that nobody writes shows, but for tiles that visit nothing, which are left alone.
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan)
        empty = np.repeat(table.full_pages + table.part_pages == 0, BLOCK)[:LENGTH]
        out[:, empty], lse[:, empty] = 0.0, -torch.inf
    attention_forward(q, own, guests, table, out, lse, scale=DIM**-0.5, before=out if before else None)
    return out, lse


PATTERN = Causal() & (SlidingWindow(200, 0) | Strided(5))


def test_more_pages_than_one_step(qkv: list[torch.Tensor]) -> None:
    q, k, v = qkv
    out, lse = run(q, Pages(k, v), NOBODY, table_of(PATTERN, np.arange(PAGES), PAGES))
    expected, expected_lse = reference.attention(q, k, v, PATTERN)
    assert reference.max_error(out, expected) < 1e-5
    assert reference.max_error(lse, expected_lse) < 1e-5


def test_resuming_merging_and_one_pass_agree(qkv: list[torch.Tensor]) -> None:
    q, k, v = qkv
    half = PAGES // 2
    first, second = Pages(k[:, : half * BLOCK], v[:, : half * BLOCK]), Pages(k[:, half * BLOCK :], v[:, half * BLOCK :])
    tables = table_of(PATTERN, np.arange(half), half), table_of(PATTERN, np.arange(half, PAGES), PAGES - half)
    whole = run(q, Pages(k, v), NOBODY, table_of(PATTERN, np.arange(PAGES), PAGES))
    one, two = run(q, first, NOBODY, tables[0]), run(q, second, NOBODY, tables[1])
    # Before the second half begins, its rows attend to nothing.
    assert (two[1][:, : half * BLOCK] == -torch.inf).all() and (two[0][:, : half * BLOCK] == 0).all()
    for x, y in zip(merge(*one, *two), whole, strict=True):
        torch.testing.assert_close(x, y)
    for x, y in zip(run(q, second, NOBODY, tables[1], before=one), whole, strict=True):
        torch.testing.assert_close(x, y)


def test_guest_pages_give_the_same_and_get_their_gradients(qkv: list[torch.Tensor]) -> None:
    q, k, v = qkv
    half = PAGES // 2
    # The sequence's second half is owned, and its first half visits as guests, after it in the arena.
    table = table_of(PATTERN, np.concatenate((np.arange(half, PAGES), np.arange(half))), PAGES - half)
    split = half * BLOCK
    own, guests = Pages(k[:, split:], v[:, split:]), Pages(k[:, :split], v[:, :split])
    assert table.visits_from(table.own_pages)[:half].all()
    out, lse = run(q, own, guests, table)
    torch.testing.assert_close(out, run(q, Pages(k, v), NOBODY, table_of(PATTERN, np.arange(PAGES), PAGES))[0])

    double = [x.double().requires_grad_() for x in qkv]
    expected, _ = reference.attention(*double, PATTERN)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    dq, dk, dv = torch.autograd.grad((expected * weight).sum(), double)
    found = torch.zeros_like(q)
    d_own, d_guests = (Pages(torch.zeros_like(x.k), torch.zeros_like(x.v)) for x in (own, guests))
    delta = (weight * out).sum(-1)
    attention_backward(q, own, guests, table, weight, lse, delta, found, d_own, d_guests, scale=DIM**-0.5)
    for x, y in (
        (found, dq),
        (torch.cat((d_guests.k, d_own.k), 1), dk),
        (torch.cat((d_guests.v, d_own.v), 1), dv),
    ):
        assert reference.max_error(x, y) < 1e-5


def test_chosen_tiles_leave_the_others_alone(qkv: list[torch.Tensor]) -> None:
    q, k, v = qkv
    table = table_of(PATTERN, np.arange(PAGES), PAGES)
    out, lse = torch.full_like(q, 7.0), torch.full(q.shape[:3], 7.0)
    chosen = table.subset(np.isin(np.arange(PAGES), (1, 3, PAGES - 1)))
    attention_forward(q, Pages(k, v), NOBODY, chosen, out, lse, scale=DIM**-0.5)
    touched = [BLOCK, 2 * BLOCK - 1, 3 * BLOCK, LENGTH - 1]
    assert (out[:, touched] != 7.0).any(dim=-1).all()
    assert (out[:, :BLOCK] == 7.0).all() and (lse[:, 2 * BLOCK : 3 * BLOCK] == 7.0).all()


def test_merging_with_nothing_changes_nothing() -> None:
    out, lse = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4)
    nothing = torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4), -torch.inf)
    for a, b in (
        (merge(out, lse, *nothing), (out, lse)),
        (merge(*nothing, out, lse), (out, lse)),
        (merge(*nothing, *nothing), nothing),
    ):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "block", "dims", "kernel", "why"),
    [
        ("cpu", (9, 0), torch.bfloat16, 128, (128, 128), "torch", "not on a GPU"),
        ("cuda", (9, 0), torch.float64, 128, (128, 128), "torch", "checking"),
        ("cuda", (9, 0), torch.bfloat16, 128, (128, 128), "hopper", "Hopper"),
        ("cuda", (9, 0), torch.float16, 128, (64, 64), "hopper", "Hopper"),
        ("cuda", (8, 0), torch.bfloat16, 128, (128, 128), "triton", "8.0"),
        ("cuda", (9, 0), torch.float32, 128, (128, 128), "triton", "16 bits"),
        ("cuda", (9, 0), torch.bfloat16, 64, (128, 128), "triton", "64 x 64"),
        ("cuda", (9, 0), torch.bfloat16, 128, (80, 80), "triton", "80"),
        ("cuda", (9, 0), torch.bfloat16, 128, (128, 64), "triton", "64"),
    ],
)
def test_the_choice_of_kernels_says_why(
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    block: int,
    dims: tuple[int, int],
    kernel: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = choose_by_shape(torch.device(device), dtype, block, block, *dims)
    assert choice.kernel == kernel and why in choice.why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_16_bits_are_rounded_once(dtype: torch.dtype, qkv: list[torch.Tensor]) -> None:
    q, k, v = (x.to(dtype) for x in qkv)
    table = table_of(PATTERN, np.arange(PAGES), PAGES)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    attention_forward(q, Pages(k, v), NOBODY, table, out, lse, scale=DIM**-0.5)
    delta = (out.float() ** 2).sum(-1)
    found = [[torch.zeros_like(x, dtype=made) for x in (q, k, v)] for made in (torch.float32, dtype)]
    nobody = Pages(*(x.to(dtype) for x in NOBODY))
    for dq, dk, dv in found:
        d_nobody = Pages(dk[:, :0], dv[:, :0])
        attention_backward(q, Pages(k, v), nobody, table, out, lse, delta, dq, Pages(dk, dv), d_nobody, scale=DIM**-0.5)
    for wide, narrow in zip(*found, strict=True):
        assert torch.equal(wide.to(dtype), narrow)


@pytest.mark.parametrize(
    "case",
    [
        Case(Causal() & SlidingWindow(30, 3) | Strided(7), 90, heads=6, kv_heads=2, batch=2, bias=True),
        Case(SlidingWindow(200, 9), 500, 8, 8, 2, 1, bias=True),
        Case(~Causal(), 70, 16, 24, dtype=torch.bfloat16, bias=True),
    ],
    ids=["two heads of three", "more pages than one step", "rows that see nothing, bfloat16"],
)
def test_a_key_bias_is_added_to_scores(case: Case) -> None:
    check(case)


def test_what_the_kernels_for_hopper_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distattn.kernels.attention.choose_by_shape", lambda *_: Choice("hopper", "it fits"))
    q = torch.zeros(1, 16, 1, DIM)
    pages, nobody, bias = Pages(q, q), Pages(q[:, :0], q[:, :0]), Biases(q[..., 0], q[:, :0, :, 0])
    selected = SelectedTable(8, 8, 2, 2, 0, (0,), torch.zeros(1, 2, 1, dtype=torch.int32))
    assert choose(q, pages, nobody, selected, q, -1.0) == ("triton", "scale is -1.0, not positive")
    tiles = "the tiles were selected on the GPU"
    single = f"{tiles}, and heads that share them are not pairs"
    assert choose(q, pages, nobody, selected, q, 1.0, bias) == ("triton", single)
    assert choose(q, pages, nobody, selected, q, 1.0, backward=True) == (
        "triton",
        f"{tiles}, and this is the backward pass",
    )
    rows = SelectedTable(8, 8, 2, 2, 0, (0, 0), selected.selected, torch.zeros(1, 2, 1, 8, 1, dtype=torch.int32))
    assert choose(q, pages, nobody, rows, q, 1.0) == ("triton", f"{tiles}, and masks have a row for each query")
    whole = kernel_cases.table_of(Case(Causal(), 16, 8, 8))
    assert choose(q, pages, nobody, whole, q, 1.0, bias) == ("triton", "keys have a bias")

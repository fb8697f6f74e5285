"""The kernels in Triton against the float64 oracle: in Triton's interpreter without a GPU, compiled with one."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from distattn import reference
from distattn.axis import Axis
from distattn.kernels import work
from distattn.kernels.attention import Pages, attention_backward, attention_forward
from distattn.kernels.table import TileTable
from distattn.patterns import Causal, Dense, Documents, GlobalTokens, Pattern, PerHead, SlidingWindow
from distattn.tiles import Extents, assemble, visit

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    pattern: Pattern
    length: int
    block_q: int = 16
    block_k: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    batch: int = 1
    scale: float = 0.25


WINDOW = Causal() & (SlidingWindow(30, 0) | GlobalTokens(range(3)))
# The interpreter multiplies no bfloat16.
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16
CASES = {
    "window, heads packed": Case(WINDOW, 50, batch=2),
    "three heads a key head, odd sizes": Case(Causal() & SlidingWindow(70, 0), 130, 24, 48, 3, 1, 20, 33),
    "heads one by one": Case(Dense(), 90, 64, 32, 2, 1, dtype=LOW),
    "rows that see nothing": Case(Documents([40, 20]) & Causal() & ~SlidingWindow(10, 0), 60, scale=-0.3),
    "a table a head": Case(PerHead([Causal(), WINDOW, Dense(), SlidingWindow(9, 9)]), 50, 16, 32),
    "pages in parts": Case(Causal(), 140, 64, 128, 2, 1, 160, 20),
}


def table_of(case: Case) -> TileTable:
    """Every second page is the rank's own, the others are guests."""
    axes = Axis.grid(case.length, case.block_q), Axis.grid(case.length, case.block_k)
    by_head = case.pattern.by_head(case.heads)
    distinct = list(dict.fromkeys(by_head))
    head_table = [distinct.index(pattern) for pattern in by_head]
    pages = arena(case)
    own = int(np.count_nonzero(pages[0]))
    extents = Extents.of(np.flatnonzero(pages[0]), 0).joined(Extents.of(np.flatnonzero(pages[1]), own))
    parts = [[(visit(pattern, *axes), extents)] for pattern in distinct]
    blocks = case.block_q, case.block_k
    return assemble(parts, head_table, axes[0].blocks, blocks, own, int(np.count_nonzero(pages[1])))


def arena(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """bool [pages]: the rank's own pages, the last among them, and guests."""
    number = np.arange(-(-case.length // case.block_k))[::-1]
    return number % 2 == 0, number % 2 == 1


def split(case: Case, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of own pages and of guests; the last page may be short."""
    own = np.repeat(arena(case)[0], case.block_k)[: case.length]
    return x[:, own], x[:, ~own]


def inputs(case: Case) -> list[torch.Tensor]:
    """q, k, v and gradients of out and lse; heads before tokens in memory, so that strides are not the usual ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(case.heads, case.head_dim), (case.kv_heads, case.head_dim), (case.kv_heads, case.value_dim)]
    shapes += [(case.heads, case.value_dim)]
    made = [
        torch.randn(case.batch, heads, case.length, dim, generator=generator).transpose(1, 2).to(DEVICE, case.dtype)
        for heads, dim in shapes
    ]
    return [*made, torch.randn(case.batch, case.length, case.heads, generator=generator).to(DEVICE)]


@pytest.fixture(autouse=True)
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distattn.kernels.attention.use_triton", lambda q: True)


@pytest.mark.parametrize(
    ("name", "cut"), [*((name, False) for name in CASES), ("a table a head", True), ("window, heads packed", True)]
)
def test_triton_matches_the_oracle(name: str, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut:  # every row of more than two visits leaves partial results
        monkeypatch.setattr(work, "_SHORTEST", 2)
        monkeypatch.setattr(work, "_LONGEST", 0.0)
    case = CASES[name]
    table = table_of(case)
    q, k, v, grad, grad_lse = inputs(case)
    own, guests = (Pages(*pair) for pair in zip(split(case, k), split(case, v), strict=True))
    out, lse = q.new_full((*q.shape[:3], case.value_dim), torch.nan), torch.full(q.shape[:3], torch.nan, device=DEVICE)
    if table.has_empty_rows:
        out.zero_(), lse.fill_(-torch.inf)
    attention_forward(q, own, guests, table, out, lse, scale=case.scale)

    double = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = reference.attention(*double, case.pattern, scale=case.scale)
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
    assert reference.max_error(out, expected) < tolerance
    seen = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert reference.max_error(lse[seen], expected_lse[seen]) < tolerance

    loss = (expected * grad).sum() + (expected_lse * grad_lse)[seen].sum()
    wanted = torch.autograd.grad(loss, double)
    delta = (grad.float() * out.float()).sum(-1) - grad_lse
    dq = torch.zeros(q.shape, device=DEVICE)
    d_own, d_guests = (Pages(*(torch.zeros(x.shape, device=DEVICE) for x in pages)) for pages in (own, guests))
    # In two halves, as a rank does whose guests arrive later.
    for part in (table.subset(table.visits_guests), table.subset(~table.visits_guests)):
        attention_backward(q, own, guests, part, grad, lse, delta, dq, d_own, d_guests, scale=case.scale)
    assert reference.max_error(dq, wanted[0]) < tolerance
    for found, other, full in zip(d_own, d_guests, wanted[1:], strict=True):
        for mine, part in zip((found, other), split(case, full), strict=True):
            assert reference.max_error(mine, part) < tolerance


def test_triton_resumes() -> None:
    case = CASES["window, heads packed"]
    table = table_of(case)
    q, k, v, _, _ = inputs(case)
    own, guests = (Pages(*pair) for pair in zip(split(case, k), split(case, v), strict=True))
    out = torch.zeros((*q.shape[:3], case.value_dim), device=DEVICE)
    lse = torch.full(q.shape[:3], -torch.inf, device=DEVICE)
    attention_forward(q, own, guests, table, out, lse, scale=case.scale)
    twice, twice_lse = out.clone(), lse.clone()
    attention_forward(q, own, guests, table, twice, twice_lse, scale=case.scale, resume=True)
    # Every key counted twice: the same mean, and log 2 more.
    torch.testing.assert_close(twice, out, atol=1e-5, rtol=0)
    torch.testing.assert_close(twice_lse, lse + np.log(2), atol=1e-5, rtol=0)


def test_rows_are_cut_into_items() -> None:
    generator = np.random.default_rng(0)
    partial, runs = generator.integers(0, 4, 30), generator.integers(0, 4, 30)
    full_count = generator.integers(1, 40, runs.sum()).astype(np.int32)
    full_ptr, part_ptr = (np.append(0, np.cumsum(x)).astype(np.int32) for x in (runs, partial))
    items, item_ptr, split, split_ptr, slots = work.make_items(full_ptr, full_count, part_ptr, 15, np.array([2, 2]), 8)
    visits = partial + np.add.reduceat(np.append(full_count, 0), full_ptr[:-1]) * (runs > 0)
    assert slots == (items[:, 5] >= 0).sum() == split[:, 2].sum() and sorted(items[items[:, 5] >= 0, 5]) == [
        *range(slots)
    ]
    for row in range(30):
        mine = items[items[:, 0] == row]
        mine = mine[np.argsort(mine[:, 1])]
        edges = [0, *np.cumsum(mine[:, 2])]
        assert edges[-1] == visits[row] and [*mine[:, 1]] == edges[:-1]
        pages = np.concatenate(
            [[(r, i) for i in range(full_count[r])] for r in range(full_ptr[row], full_ptr[row + 1])] or [[]]
        )
        for _, first, count, run, skip, slot in mine:
            if first + count > partial[row]:
                assert (run, skip) == (*pages[max(first - partial[row], 0)],)
            assert (slot >= 0) == (len(mine) > 1)
    for table in range(2):
        mine = items[item_ptr[table] : item_ptr[table + 1]]
        assert (mine[:, 0] // 15 == table).all() and (np.diff(mine[:, 2]) <= 0).all()
        assert (split[split_ptr[table] : split_ptr[table + 1], 0] // 15 == table).all()

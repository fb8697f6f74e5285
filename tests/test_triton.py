"""The kernels in Triton against the float64 oracle: in Triton's interpreter without a GPU, compiled with one."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, Case, check, inputs, split, table_of

from distattn.kernels import work
from distattn.kernels.attention import Choice, Pages, attention_forward
from distattn.patterns import Causal, Dense, Documents, GlobalTokens, PerHead, SlidingWindow

pytest.importorskip("triton")


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
    "a bias": Case(WINDOW | Documents([40, 20]), 60, 16, 24, 3, 1, batch=2, bias=True),
}
# Full shapes, for a GPU.
WIDE = Causal() & (SlidingWindow(300, 0) | GlobalTokens(range(70)))
LARGE = {
    "128 x 128, bfloat16": Case(WIDE, 1000, 128, 128, 8, 2, 128, 128, LOW, 2, 0.09),
    "128 x 128, float32": Case(WIDE, 700, 128, 128, 4, 2, 128, 128, scale=0.09),
    "a bias, bfloat16": Case(WIDE, 1000, 128, 64, 8, 2, 128, 128, LOW, scale=0.09, bias=True),
    "16 tokens x 8 heads": Case(WIDE, 500, 16, 64, 8, 1, 64, 64, LOW, scale=0.12, bias=True),
    "1 token x 16 heads": Case(WIDE, 200, 1, 64, 16, 1, 128, 128, LOW, scale=0.09),
    **{f"heads of {dim}": Case(WIDE, 600, 64, 64, 6, 1, dim, dim, LOW, scale=0.1) for dim in (32, 80, 96, 192, 256)},
}


@pytest.fixture(autouse=True)
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distattn.kernels.attention.choose", lambda *_, **__: Choice("triton", "a test of it"))


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        *((name, False) for name in CASES),
        *((name, True) for name in ("a table a head", "window, heads packed", "a bias")),
    ],
)
def test_triton_matches_the_oracle(name: str, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut:  # every row of more than two visits leaves partial results
        monkeypatch.setattr(work, "_SHORTEST", 2)
        monkeypatch.setattr(work, "_LONGEST", 0.0)
    check(CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_full_shapes(name: str) -> None:
    check(LARGE[name])


def test_triton_resumes() -> None:
    case = CASES["window, heads packed"]
    table = table_of(case)
    q, k, v, _, _ = inputs(case)
    own, guests = (Pages(*pair) for pair in zip(split(case, k), split(case, v), strict=True))
    out = torch.zeros((*q.shape[:3], case.value_dim), device=DEVICE)
    lse = torch.full(q.shape[:3], -torch.inf, device=DEVICE)
    attention_forward(q, own, guests, table, out, lse, scale=case.scale)
    twice, twice_lse = out.clone(), lse.clone()
    attention_forward(q, own, guests, table, twice, twice_lse, scale=case.scale, before=twice)
    # Every key counted twice: the same mean, and log 2 more.
    torch.testing.assert_close(twice, out, atol=1e-5, rtol=0)
    torch.testing.assert_close(twice_lse, lse + np.log(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("heads", "dim"), [(3, 33), (2, 64)])
def test_row_deltas(heads: int, dim: int) -> None:
    from distattn.kernels.attention_triton_backward import row_deltas

    generator = torch.Generator().manual_seed(0)
    out, grad = (torch.randn(2, heads, 50, dim, generator=generator).transpose(1, 2).to(DEVICE) for _ in range(2))
    grad_lse = torch.randn(2, heads, 50, generator=generator).transpose(1, 2).to(DEVICE)
    found = row_deltas(out, grad, grad_lse)
    torch.testing.assert_close(found, (out * grad).sum(-1) - grad_lse, atol=1e-5, rtol=1e-5)


def test_rows_are_cut_into_items() -> None:
    generator = np.random.default_rng(0)
    partial, runs = generator.integers(0, 4, 30), generator.integers(0, 4, 30)
    full_count = generator.integers(1, 40, runs.sum()).astype(np.int32)
    full_ptr, part_ptr = (np.append(0, np.cumsum(x)).astype(np.int32) for x in (runs, partial))
    items, item_ptr, split, split_ptr, slots = work.make_items(full_ptr, full_count, part_ptr, 15, np.array([2, 2]), 8)
    visits = partial + np.add.reduceat(np.append(full_count, 0), full_ptr[:-1]) * (runs > 0)
    slot = items[:, 6]
    assert slots == (slot >= 0).sum() == split[:, 2].sum() and sorted(slot[slot >= 0]) == [*range(slots)]
    for row in range(30):
        mine = items[items[:, 0] == row]
        pages = np.concatenate(
            [[(r, i) for i in range(full_count[r])] for r in range(full_ptr[row], full_ptr[row + 1])] or [[]]
        )
        seen, done = [], 0
        for _, begin, end, full, run, skip, _, _ in mine[np.lexsort((mine[:, 5], mine[:, 4], mine[:, 1]))]:
            seen += range(begin, end)
            if full:
                assert (run, skip) == (*pages[done],)
            done += full
        assert seen == [*range(part_ptr[row], part_ptr[row + 1])] and done == len(pages)
        assert ((mine[:, 6] >= 0) == (len(mine) > 1)).all() and len(mine) == (visits[row] > 0) * max(len(mine), 1)
    for table in range(2):
        mine = items[item_ptr[table] : item_ptr[table + 1]]
        assert (mine[:, 0] // 15 == table).all() and (np.diff(mine[:, 2] - mine[:, 1] + mine[:, 3]) <= 0).all()
        assert (split[split_ptr[table] : split_ptr[table + 1], 0] // 15 == table).all()

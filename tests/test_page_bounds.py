"""Bounds of pages and the pages that they choose, by their definition: in PyTorch operations and in Triton."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor

from distattn.kernels import page_bounds
from distattn.kernels.chunks import Choosing

BLOCK, KV_HEADS, DIM, ROWS = 6, 2, 20, 3


@pytest.fixture(params=["torch", "triton"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "torch" and DEVICE == "cuda":
        pytest.skip("tensors are on a GPU")
    return str(request.param)


def function(engine: str, name: str) -> Callable[..., Any]:
    if engine == "torch" or DEVICE == "cuda":
        return getattr(page_bounds, name)  # type: ignore[no-any-return]
    from distattn.kernels import page_bounds_triton

    made = getattr(page_bounds_triton, name)
    if name == "choose_pages":
        return made  # type: ignore[no-any-return]

    def update(high: Tensor, low: Tensor, start: int, k: Tensor, block: int) -> None:
        made(high[start // block :], low[start // block :], start % block, k, block)

    return update


def test_bounds_are_those_of_all_keys_of_a_page(engine: str) -> None:
    k = torch.randn(43, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    high, low = (torch.full((9, KV_HEADS, DIM), 7.0, device=DEVICE) for _ in range(2))
    first = 0
    for count in (3, 1, 2, 1, 20, 4, 12):  # in a page, up to its end, from its beginning, over several
        function(engine, "update_bounds")(high, low, first, k[first : first + count], BLOCK)
        first += count
    pages = [k[at : at + BLOCK] for at in range(0, 43, BLOCK)]
    assert torch.equal(high[:8], torch.stack([page.amax(0) for page in pages]))
    assert torch.equal(low[:8], torch.stack([page.amin(0) for page in pages]))
    assert bool((high[8] == 7).all()) and bool((low[8] == 7).all())


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("equal", [False, True])
def test_the_pages_with_the_highest_bounds_are_chosen(equal: bool, heads: int, engine: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(ROWS, heads, DIM, generator=generator)
    low = torch.randn(70, KV_HEADS, DIM, generator=generator)
    high = low + torch.rand(low.shape, generator=generator)
    if equal:  # ties, of numbers whose products are exact
        q, low = q.round(), low[:2].round().repeat(35, 1, 1)
        high = low + 1
    own = np.array([0, 3, 69])
    by = Choosing(80, 5, 1, True, ("own",), False, 1, 1, 1, BLOCK)
    selectable = torch.arange(80) != 40
    there = torch.from_numpy(own.astype(np.int32)).to(DEVICE)
    found = function(engine, "choose_pages")(
        by, q.to(DEVICE), high.to(DEVICE), low.to(DEVICE), there, selectable.to(DEVICE)
    )
    assert found.dtype == torch.int32
    share = heads // KV_HEADS
    for kv_head in range(KV_HEADS):
        for row, mine in enumerate(own.tolist()):
            group = q[row, kv_head * share : (kv_head + 1) * share].double()
            ends = torch.maximum(group[:, None] * high[:, kv_head], group[:, None] * low[:, kv_head])
            bounds = ends.sum(2).amax(0).float().tolist()
            others = [page for page in range(mine) if selectable[page]]
            chosen = sorted([mine, *sorted(others, key=lambda page: (-bounds[page], page))[:4]])
            assert found[kv_head, row].tolist() == chosen + [-1] * (5 - len(chosen))

"""Bounds of pages in Triton. What they are is said in page_bounds.py."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.chunks_triton import record_best
from distattn.kernels.launching import Launches, Recording

if TYPE_CHECKING:
    from distattn.kernels.chunks import Choosing

_UPDATES, _CHOICES = Launches(), Launches()
# Pages of a program: enough programs to keep all multiprocessors reading, and rows of the matrix unit that are filled.
_PAGES, _ROWS = 64, 16


@triton.jit(do_not_specialize=["n", "head_rows", "fresh"])
def _update_bounds(
    high, low, k, n, head_rows, fresh, page_n, page_h, k_n, k_h,
    BLOCK: tl.constexpr, BLOCK_2: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
):  # fmt: skip
    """Program (page, key/value head). The first page gets ``head_rows`` of the n rows, and has others if not fresh."""
    page, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.where(page == 0, 0, head_rows + (page - 1) * BLOCK)
    stop = tl.minimum(head_rows + page * BLOCK, n)
    row = first + tl.arange(0, BLOCK_2)
    d = tl.arange(0, DIM_2)
    there = (row < stop)[:, None] & (d < DIM)
    x = tl.load(k + row.to(tl.int64)[:, None] * k_n + head * k_h + d, mask=there, other=0.0).to(tl.float32)
    top = tl.max(tl.where(there, x, float("-inf")), 0)
    bottom = tl.min(tl.where(there, x, float("inf")), 0)
    at = page.to(tl.int64) * page_n + head * page_h + d
    old = (d < DIM) & (page == 0) & (fresh == 0)
    top = tl.maximum(top, tl.load(high + at, mask=old, other=float("-inf")).to(tl.float32))
    bottom = tl.minimum(bottom, tl.load(low + at, mask=old, other=float("inf")).to(tl.float32))
    tl.store(high + at, top, mask=d < DIM)
    tl.store(low + at, bottom, mask=d < DIM)


@triton.jit(do_not_specialize=["n", "pages"])
def _bounds(
    q, high, low, own, scores, n, pages, q_n, q_h, page_n, page_h, scores_t, scores_n,
    GROUP: tl.constexpr, GROUP_2: tl.constexpr, TOKENS: tl.constexpr, PAGES: tl.constexpr, DIM: tl.constexpr,
    DIM_2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (key/value head, pages, rows), so that programs beside each other read what lies beside each other.

    scores [kv_heads, rows, pages]: those of pages before a row's own.
    """
    kv_head = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, TOKENS * GROUP_2)
    token = tl.program_id(2) * TOKENS + r // GROUP_2
    there = (token < n) & (r % GROUP_2 < GROUP)
    d = tl.arange(0, DIM_2)
    page = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    wanted = page < tl.max(tl.load(own + token, mask=there, other=0), 0)
    mask = wanted[:, None] & (d < DIM)
    at = page.to(tl.int64)[:, None] * page_n + kv_head * page_h + d
    top = tl.load(high + at, mask=mask, other=0.0)
    bottom = tl.load(low + at, mask=mask, other=0.0)
    head = kv_head * GROUP + r % GROUP_2
    x_at = q + token.to(tl.int64)[:, None] * q_n + head[:, None] * q_h + d
    x = tl.load(x_at, mask=there[:, None] & (d < DIM), other=0.0)
    s = tl.dot(tl.where(x > 0, x, 0.0).to(x.dtype), tl.trans(top), input_precision=PRECISION)
    s = tl.dot(tl.where(x < 0, x, 0.0).to(x.dtype), tl.trans(bottom), s, input_precision=PRECISION)
    s = tl.where(there[:, None], s, float("-inf"))
    s = tl.max(tl.reshape(s, [TOKENS, GROUP_2, PAGES]), 1)
    out = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    s_at = scores + kv_head * scores_t + out.to(tl.int64)[:, None] * scores_n + page[None, :]
    tl.store(s_at, s, mask=(out < n)[:, None] & wanted[None, :] & (page < pages)[None, :])


def update_bounds(high: Tensor, low: Tensor, before: int, k: Tensor, block: int) -> None:
    """high, low: from the first page on that gets keys; ``before``: how many it has."""
    pages = triton.cdiv(before + len(k), block)
    k = k if k.stride(2) == 1 else k.contiguous()
    numbers = pages, min(len(k), block - before), int(before == 0), block
    _UPDATES.run((high[:pages], low[:pages], k), numbers, partial(_record_update, *numbers))


def _record_update(pages: int, head_rows: int, fresh: int, block: int, recording: Recording) -> None:
    high, low, k = recording.parts
    rows, kv_heads, dim = k.now.shape
    recording.launch(
        _update_bounds, (pages, kv_heads), high, low, k, rows, head_rows, fresh, *high.now.stride()[:2],
        *k.now.stride()[:2], BLOCK=block, BLOCK_2=triton.next_power_of_2(block), DIM=dim,
        DIM_2=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip


def choose_pages(by: Choosing, q: Tensor, high: Tensor, low: Tensor, own: Tensor, selectable: Tensor) -> Tensor:
    rows, (pages, kv_heads) = len(q), high.shape[:2]
    q = q if q.stride(2) == 1 else q.contiguous()
    scores = torch.empty((kv_heads, rows, pages), dtype=torch.float32, device=q.device)
    found = torch.empty((kv_heads, rows, by.most), dtype=torch.int32, device=q.device)
    given = q, high, low, own, selectable.view(torch.int8), scores, found
    _CHOICES.run(given, by, partial(_record_choice, by))
    return found


def _record_choice(by: Choosing, recording: Recording) -> None:
    q, high, low, own, allowed, scores, found = recording.parts
    (rows, heads, dim), (pages, kv_heads) = q.now.shape, high.now.shape[:2]
    group_2 = triton.next_power_of_2(heads // kv_heads)
    tokens = max(1, _ROWS // group_2)
    recording.launch(
        _bounds, (kv_heads, triton.cdiv(pages, _PAGES), triton.cdiv(rows, tokens)),
        q, high, low, own, scores, rows, pages, *q.now.stride()[:2], *high.now.stride()[:2],
        *scores.now.stride()[:2], GROUP=heads // kv_heads, GROUP_2=group_2, TOKENS=tokens, PAGES=_PAGES, DIM=dim,
        DIM_2=max(16, triton.next_power_of_2(dim)), PRECISION="tf32x3", num_warps=4,
    )  # fmt: skip
    record_best(recording, by, pages, scores, own, own, allowed, found)

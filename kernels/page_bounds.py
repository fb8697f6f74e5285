"""Pages that queries choose by a bound of their products with the keys of each page.

With the largest and the smallest value of each feature among a page's keys, no key k of the page has a product with a
query q above

    sum_d max(q_d high_d, q_d low_d) = max(q, 0).high + min(q, 0).low

(Tang et al., "Quest: query-aware sparsity for efficient long-context LLM inference", 2024, section 3.3). Pages are
chosen as chunks are (chunks.py). On GPUs these are kernels in Triton (page_bounds_triton.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distattn.kernels.attention import accumulator_dtype
from distattn.kernels.chunks import Choosing, best


def update_bounds(high: Tensor, low: Tensor, start: int, k: Tensor, block: int) -> None:
    """New keys of a sequence, from position ``start`` on.

    Args:
        high, low: [pages, kv_heads, dim], of all pages of ``block`` positions; those that begin here are overwritten.
        k: [n, kv_heads, dim].
    """
    first, before, behind = start // block, start % block, -(start + len(k)) % block
    if k.is_cuda and k.dtype != torch.float64:
        from distattn.kernels import page_bounds_triton

        page_bounds_triton.update_bounds(high[first:], low[first:], before, k, block)
        return
    for bounds, nothing, reduce, join in (
        (high, -torch.inf, torch.amax, torch.maximum),
        (low, torch.inf, torch.amin, torch.minimum),
    ):
        found = reduce(F.pad(k, (0, 0, 0, 0, before, behind), value=nothing).unflatten(0, (-1, block)), 1)
        if before:
            found[0] = join(found[0], bounds[first])
        bounds[first : first + len(found)] = found


def choose_pages(by: Choosing, q: Tensor, high: Tensor, low: Tensor, own: Tensor, selectable: Tensor) -> Tensor:
    """The pages with the highest bounds, for all query heads that share a key/value head: by the highest among them.

    Args:
        by: pages are its chunks; causal, with a reach of 1.
        q: [rows, heads, dim]. high, low: [pages, kv_heads, dim], in the dtype of q.
        own: int32 [rows]: rows choose among the pages before this one.
        selectable: bool [pages or more]: which may be chosen at all.

    Returns:
        int32 [kv_heads, rows, most], ascending, then -1. Ties go to the lower page.
    """
    if q.is_cuda and q.dtype != torch.float64:
        from distattn.kernels import page_bounds_triton

        return page_bounds_triton.choose_pages(by, q, high, low, own, selectable)
    kv_heads, dtype = high.shape[1], accumulator_dtype(q.dtype)
    both = torch.cat((q.clamp_min(0), q.clamp_max(0)), -1).to(dtype).unflatten(1, (kv_heads, -1)).permute(1, 0, 2, 3)
    ends = torch.cat((high, low), -1).to(dtype).permute(1, 2, 0)  # [kv_heads, 2 dim, pages]
    bounds = torch.matmul(both.flatten(1, 2), ends).unflatten(1, both.shape[1:3]).amax(2)
    return best(bounds.unsqueeze(0), by, own, selectable)[0]

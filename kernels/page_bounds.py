"""Pages that queries choose by a bound of their products with the keys of each page.

With the largest and the smallest value of each feature among a page's keys, no key k of the page has a product with a
query q above

    sum_d max(q_d high_d, q_d low_d) = max(q, 0).high + min(q, 0).low

(Tang et al., "Quest: query-aware sparsity for efficient long-context LLM inference", 2024, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def update_bounds(high: Tensor, low: Tensor, start: int, k: Tensor, block: int) -> None:
    """New keys of a sequence, from position ``start`` on.

    Args:
        high, low: [pages, kv_heads, dim], of all pages of ``block`` positions; those that begin here are overwritten.
        k: [n, kv_heads, dim].
    """
    first, before, behind = start // block, start % block, -(start + len(k)) % block
    for bounds, nothing, reduce, join in (
        (high, -torch.inf, torch.amax, torch.maximum),
        (low, torch.inf, torch.amin, torch.minimum),
    ):
        found = reduce(F.pad(k, (0, 0, 0, 0, before, behind), value=nothing).unflatten(0, (-1, block)), 1)
        if before:
            found[0] = join(found[0], bounds[first])
        bounds[first : first + len(found)] = found


def choose_pages(q: Tensor, high: Tensor, low: Tensor, until: Tensor, number: int) -> Tensor:
    """The pages with the highest bounds, for all query heads that share a key/value head: by the highest among them.

    Args:
        q: [rows, heads, dim]. high, low: [pages, kv_heads, dim].
        until: int [rows]: rows choose among the pages before this one.
        number: how many a row chooses at most.

    Returns:
        int32 [kv_heads, rows, number], in any order; -1 where there are fewer pages.
    """
    kv_heads = high.shape[1]
    both = torch.cat((q.clamp_min(0), q.clamp_max(0)), -1).unflatten(1, (kv_heads, -1)).permute(1, 0, 2, 3)
    ends = torch.cat((high, low), -1).permute(1, 2, 0)  # [kv_heads, 2 dim, pages]
    bounds = torch.matmul(both.flatten(1, 2), ends).unflatten(1, both.shape[1:3]).amax(2)
    there = torch.arange(len(high), device=q.device) < until[:, None]
    bounds = bounds.masked_fill(~there, -torch.inf)
    found = bounds.topk(min(number, len(high)), dim=-1, sorted=False)
    pages = torch.where(found.values > -torch.inf, found.indices, -1).int()
    return F.pad(pages, (0, number - pages.shape[-1]), value=-1)

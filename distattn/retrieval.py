"""Pages that single queries retrieve of a cache by a bound of their scores, in place of attending to everything.

What has no choice of its own, and is dense, may be decoded so: a query attends to its own page up to itself, and to the
best of those before it. Prompts are read exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distattn.cached_levels import Asking, LevelPlan, Sizes
from distattn.errors import ConfigError
from distattn.extras import AttentionExtras
from distattn.kernels.page_bounds import choose_pages, update_bounds
from distattn.spec import AttentionSpec, TopChunks, chunk_window


@dataclass(frozen=True)
class Quest:
    """Retrieves ``pages`` pages for each key/value head (Tang et al., 2024; see kernels/page_bounds.py).

    Raises ConfigError if pages < 1.
    """

    pages: int

    def __post_init__(self) -> None:
        if self.pages < 1:
            raise ConfigError(f"pages is {self.pages}; expected at least 1")

    def plan(self, sizes: Sizes) -> LevelPlan:
        """What a query attends to then, as a spec whose chunks are pages."""
        select = TopChunks(self.pages, sizes.block_k, always=())
        return LevelPlan(AttentionSpec(chunk_window(sizes.block_k, 1), select=select), sizes)


class PageBounds:
    """One layer's bounds of all pages of all sequences, alike on every rank.

    high, low: [sequences, pages, kv_heads, head_dim].
    """

    def __init__(self, plan: LevelPlan, pages: int) -> None:
        self.plan, self._pages = plan, pages
        sizes = plan.sizes
        shape = sizes.sequences, -(-sizes.max_len // sizes.block_k), sizes.kv_heads, sizes.head_dim
        self.high, self.low = (torch.zeros(shape, dtype=sizes.dtype, device=sizes.device) for _ in range(2))

    def clear(self, slot: int) -> None:
        """Before a new sequence gets the slot."""
        self.high[slot], self.low[slot] = 0.0, 0.0

    def copy(self, old: int, new: int) -> None:
        """What one slot holds, for a fork."""
        for x in (self.high, self.low):
            x[new] = x[old]

    def pool(self, slot: int, start: int, k: Tensor, v: Tensor, extras: AttentionExtras) -> None:
        """New keys of a sequence, [n, kv_heads, head_dim]."""
        update_bounds(self.high[slot], self.low[slot], start, k, self.plan.sizes.block_k)

    def choose(self, slot: int, asking: Asking, q: Tensor, extras: AttentionExtras, scale: float) -> Tensor:
        """int32 [kv_heads, tiles, pages], -1 for none. q: [tiles, heads, head_dim]."""
        pages, until = int(asking.own.max()) + 1, asking.on(q.device, "own")
        sign = q if scale > 0 else -q
        return choose_pages(sign, self.high[slot, :pages], self.low[slot, :pages], until, self._pages)

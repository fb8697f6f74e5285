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
from distattn.patterns import Causal, GlobalKeys
from distattn.spec import AttentionSpec, TopChunks


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
        """What a query attends to then, as a spec whose chunks are pages: nothing but what it chooses."""
        select = TopChunks(self.pages + 1, sizes.block_k, always=("own",))
        return LevelPlan(AttentionSpec(Causal() & GlobalKeys(()), select=select, merge="gate"), sizes)


class PageBounds:
    """One layer's bounds of all pages of all sequences, alike on every rank.

    high, low: [sequences, pages, kv_heads, head_dim].
    """

    def __init__(self, plan: LevelPlan) -> None:
        self.plan = plan
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
        """int32 [kv_heads, tiles, pages], ascending, then -1. q: [tiles, heads, head_dim]."""
        pages, device, hierarchy = int(asking.own.max()) + 1, q.device, self.plan.hierarchy
        high, low = self.high[slot, :pages], self.low[slot, :pages]
        selectable = hierarchy.on(device, "selectable")
        return choose_pages(hierarchy.choosing, q if scale > 0 else -q, high, low, asking.on(device, "own"), selectable)

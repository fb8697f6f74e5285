"""Which pages a cache keeps though its specs would go on to visit others, too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distattn.algebra import Pattern
from distattn.errors import ConfigError
from distattn.spans import Bools, Ints

Mass = NDArray[np.float64]


@dataclass(frozen=True)
class SinksAndWindow:
    """Keeps the first tokens of a sequence and the latest ones, in whole pages, whatever the specs would visit.

    As StreamingLLM does (Xiao et al., "Efficient streaming language models with attention sinks", 2023, section 3.2),
    but keys keep the positions that they were rotated to. Summaries of what is let go stay.

    Raises ConfigError if sinks < 0 or window < 1.
    """

    sinks: int
    window: int

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ConfigError(f"sinks is {self.sinks} and window {self.window}; expected at least 0 and at least 1")

    def keeps(self, there: Bools, length: int, block: int, mass: Mass) -> Bools:
        """bool [whole pages]: which pages are kept of a sequence of this length.

        there: bool [whole pages], those that were not let go before. mass: [whole pages], see :class:`HeaviestPages`.
        """
        first = np.arange(length // block) * block
        return np.asarray((first < self.sinks) | (first + block > length - self.window))


@dataclass(frozen=True)
class HeaviestPages:
    """Keeps the latest tokens of a sequence, and of the pages before them those to which most attention was paid.

    After H2O (Zhang et al., "H2O: heavy-hitter oracle for efficient generative inference of large language models",
    2023, section 4), but by pages, alike in all heads and layers: a page's mass is the sum of the weights of its keys,
    over all layers, all heads, and the last ``observed`` new tokens of each step. For patterns of tokens alone, without
    retrieval. It takes two small exchanges more a step, not a layer, and reads the keys a second time.

    pages: how many are kept, besides the latest. window: tokens that are kept in any case, in whole pages.

    Raises ConfigError if a number is below 1.
    """

    pages: int
    window: int
    observed: int = 16

    def __post_init__(self) -> None:
        for name in ("pages", "window", "observed"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")

    def keeps(self, there: Bools, length: int, block: int, mass: Mass) -> Bools:
        """As that of :class:`SinksAndWindow`. Of equal pages the first ones are kept."""
        kept = (np.arange(length // block) + 1) * block > length - self.window
        before = np.flatnonzero(there & ~kept)
        kept[before[np.argsort(-mass[before], kind="stable")[: self.pages]]] = True
        return kept


Policy = SinksAndWindow | HeaviestPages


def page_logs(
    q: Tensor, at: Ints, k: Tensor, pages: Ints, blocks: Ints, rows: int, patterns: list[Pattern], scale: float
) -> Tensor:
    """The log-sum-exp of the scores of each page alone: float32 (float64) [rows, heads, pages], -inf where none.

    Args:
        q: [rows, heads, head_dim]. at: int64 [rows], their positions.
        k: [slots, kv_heads, head_dim]. pages, blocks: int64 [pages], the pages of the sequence and where they are.
        rows: of a page. patterns: of each head.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    found = q.new_full((len(at), heads, len(pages)), -torch.inf, dtype=wide)
    grouped = q.to(wide).unflatten(1, (kv_heads, heads // kv_heads))
    distinct = list(dict.fromkeys(patterns))
    which = torch.tensor([distinct.index(pattern) for pattern in patterns], device=q.device)
    for first in range(0, len(pages), 256):  # what is copied of the keys stays small
        some = slice(first, first + 256)
        keys = k.unflatten(0, (-1, rows))[torch.from_numpy(blocks[some]).to(q.device)].to(wide)
        scores = torch.einsum("nhgd,prhd->nhgpr", grouped, keys).flatten(1, 2) * scale
        position = (pages[some, None] * rows + np.arange(rows)).ravel()
        allowed = np.stack([pattern.allows(at[:, None], position) for pattern in distinct], axis=1)
        seen = torch.from_numpy(allowed).to(q.device)[:, which].unflatten(2, (-1, rows))
        found[..., some] = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    return found

"""Pages of a cache in which chosen chunks lie, and which of their tokens a query may see.

On GPUs this is a kernel in Triton (chosen_pages_triton.py), elsewhere PyTorch operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distattn.kernels.chunks import packed_bits


class Where(NamedTuple):
    """Where the chunks of sequences lie, each in ``pieces`` pages of ``rows`` rows.

    page: int64 [pieces of all sequences], the page of each on this rank, or -1. first: int64 [sequences + 1], where
    those of each sequence begin. bits: int32 [chunks * pieces, words]: the tokens of a piece that may be seen at all,
    bit i % 32 of word i // 32.
    """

    page: Tensor
    first: Tensor
    bits: Tensor
    pieces: int
    rows: int


def chosen_pages(chosen: Tensor, sequence: Tensor, last: Tensor, where: Where) -> tuple[Tensor, Tensor]:
    """The pages of chosen chunks.

    Args:
        chosen: int32 [tables, tiles, n]: chunks of a tile's sequence, none twice, or -1.
        sequence: int64 [tiles]. last: int64 [tiles]: tokens up to this position may be seen.

    Returns:
        pages int32 [tables, tiles, n * pieces], -1 where there is none, and masks int32 [.., n * pieces, 1, words].
    """
    if chosen.is_cuda:
        from distattn.kernels import chosen_pages_triton

        return chosen_pages_triton.chosen_pages(chosen, sequence, last, where)
    piece = chosen.clamp_min(0).long()[..., None] * where.pieces + torch.arange(where.pieces)
    at = where.first[sequence][:, None, None] + piece
    there = (chosen >= 0)[..., None] & (at < where.first[sequence + 1][:, None, None])
    pages = torch.where(there, where.page[torch.where(there, at, 0)], -1).flatten(2).int()
    position = piece[..., None] * where.rows + torch.arange(where.rows)
    seen = packed_bits(position <= last[:, None, None, None], where.bits.shape[1]) & where.bits[piece]
    return pages, torch.where(there[..., None], seen, 0).flatten(2, 3).unsqueeze(3).contiguous()

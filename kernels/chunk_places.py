"""Where chosen chunks lie among a rank's pages and its guests, and which of their tokens may be seen.

On GPUs these are kernels in Triton (chunk_places_triton.py), elsewhere PyTorch operations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pages_of_chunks(chosen: Tensor, place: Tensor) -> Tensor:
    """The pages of chosen chunks.

    Args:
        chosen: int32 [batch, tables, tiles, n]: chunks, or -1.
        place: int64 [heads, chunks], contiguous: the page of each chunk, or -1; as many tables, one after the other,
            for each head.

    Returns:
        int32, like ``chosen``: -1 where there is no chunk.
    """
    if chosen.is_cuda:
        from distattn.kernels import chunk_places_triton

        return chunk_places_triton.pages_of_chunks(chosen, place)
    tables = chosen.shape[1]
    head = torch.arange(tables) // (tables // len(place))
    pages = place[head[None, :, None, None], chosen.clamp_min(0).long()]
    return torch.where(chosen < 0, -1, pages).int()


def masks_of_chunks(chosen: Tensor, bits: Tensor, chunk: int, position: Tensor | None = None) -> Tensor:
    """Masks of chosen chunks of ``chunk`` tokens each, of a row for all of a tile.

    Args:
        chosen: int32 [batch, tables, tiles, n]: chunks, or -1.
        bits: int32 [chunks, words]: tokens of a chunk that may be seen at all, bit i % 32 of word i // 32.
        position: int64 [tiles]: of its own chunk a tile sees no token that follows this one.

    Returns:
        int32 [batch, tables, tiles, n, 1, words]; where there is no chunk, anything.
    """
    if chosen.is_cuda:
        from distattn.kernels import chunk_places_triton

        return chunk_places_triton.masks_of_chunks(chosen, bits, chunk, position)
    masks = bits[chosen.clamp_min(0).long()]
    if position is not None:
        until = (position % chunk + 1)[:, None] - 32 * torch.arange(bits.shape[1])
        causal = ((1 << until.clamp(0, 32)) - 1).to(torch.int32)  # [tiles, words]
        is_own = chosen == (position // chunk)[:, None]
        masks = torch.where(is_own.unsqueeze(-1), masks & causal[:, None], masks)
    return masks.unsqueeze(-2).contiguous()

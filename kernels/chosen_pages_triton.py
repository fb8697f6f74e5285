"""Pages of chosen chunks in Triton. What they are is said in chosen_pages.py."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.launching import Launches, Recording

if TYPE_CHECKING:
    from distattn.kernels.chosen_pages import Where

_LAUNCHES = Launches()


@triton.jit(do_not_specialize=["n"])
def _chosen_pages(
    chosen, sequence, last, page, first, bits, pages, masks, n,
    PIECES: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, WORDS_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (entries, tile, table)."""
    tile = tl.program_id(1)
    number = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tile
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < n * PIECES
    chunk = tl.load(chosen + number * n + entry // PIECES, mask=inside, other=-1)
    piece = chunk * PIECES + entry % PIECES
    of = tl.load(sequence + tile)
    at = tl.load(first + of) + piece
    there = (chunk >= 0) & (at < tl.load(first + of + 1))
    out = number * n * PIECES + entry
    tl.store(pages + out, tl.load(page + at, mask=there, other=-1).to(tl.int32), mask=inside)
    word = tl.arange(0, WORDS_2)[None, :]
    mask = (word < WORDS) & there[:, None]
    found = tl.load(bits + piece[:, None] * WORDS + word, mask=mask, other=0)
    seen = tl.load(last + tile) + 1 - (piece[:, None] * ROWS + word * 32)
    one = (word * 0 + 1).to(tl.int64)
    found &= ((one << tl.minimum(tl.maximum(seen, 0), 32).to(tl.int64)) - 1).to(tl.int32)
    tl.store(masks + out[:, None] * WORDS + word, found, mask=inside[:, None] & (word < WORDS))


def chosen_pages(chosen: Tensor, sequence: Tensor, last: Tensor, where: Where) -> tuple[Tensor, Tensor]:
    tables, tiles, n = chosen.shape
    words = where.bits.shape[1]
    pages = torch.empty((tables, tiles, n * where.pieces), dtype=torch.int32, device=chosen.device)
    masks = torch.empty((*pages.shape, 1, words), dtype=torch.int32, device=chosen.device)
    if pages.numel():
        given = chosen.contiguous(), sequence, last, where.first, where.bits, pages, masks
        _LAUNCHES.run(given, where[3:], partial(_record, where), (where.page,))  # of which there are ever more
    return pages, masks


def _record(where: Where, recording: Recording) -> None:
    chosen, sequence, last, first, bits, pages, masks = recording.parts
    tables, tiles, n = chosen.now.shape
    words = bits.now.shape[1]
    block = min(256, triton.next_power_of_2(n * where.pieces))
    recording.launch(
        _chosen_pages, (triton.cdiv(n * where.pieces, block), tiles, tables), chosen, sequence, last, where.page, first,
        bits, pages, masks, n, PIECES=where.pieces, ROWS=where.rows, WORDS=words,
        WORDS_2=triton.next_power_of_2(words), BLOCK=block, num_warps=2,
    )  # fmt: skip

"""Pages and masks of chosen chunks in Triton. What they are is said in chunk_places.py."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.launching import Launches, Recording

_PAGES, _MASKS = Launches(), Launches()
_BLOCK = 256


@triton.jit(do_not_specialize=["entries", "tables", "share", "chunks"])
def _pages_of_chunks(chosen, place, pages, entries, tables, share, chunks, BLOCK: tl.constexpr):
    """Program (entries of a table, table of one of the batch)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    first = tl.program_id(1).to(tl.int64) * entries
    chunk = tl.load(chosen + first + at, mask=inside, other=-1)
    head = tl.program_id(1) % tables // share
    page = tl.load(place + head * chunks + chunk, mask=chunk >= 0, other=-1)
    tl.store(pages + first + at, page.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["entries", "n"])
def _masks_of_chunks(
    chosen, bits, position, masks, entries, n,
    CHUNK: tl.constexpr, WORDS: tl.constexpr, WORDS_2: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (entries of a table, table of one of the batch)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    first = tl.program_id(1).to(tl.int64) * entries
    chunk = tl.load(chosen + first + at, mask=inside, other=-1)
    word = tl.arange(0, WORDS_2)[None, :]
    some = (chunk >= 0)[:, None] & (word < WORDS)
    found = tl.load(bits + chunk[:, None] * WORDS + word, mask=some, other=0)
    if OWN:
        own = tl.load(position + at // n, mask=inside, other=0)
        seen = (tl.where(own // CHUNK == chunk, own % CHUNK + 1, WORDS * 32)[:, None] - word * 32).to(tl.int64)
        one = (word * 0 + 1).to(tl.int64)
        found &= ((one << tl.minimum(tl.maximum(seen, 0), 32)) - 1).to(tl.int32)
    tl.store(masks + (first + at)[:, None] * WORDS + word, found, mask=inside[:, None] & (word < WORDS))


def pages_of_chunks(chosen: Tensor, place: Tensor) -> Tensor:
    pages = torch.empty(chosen.shape, dtype=torch.int32, device=chosen.device)
    if pages.numel():
        _PAGES.run((chosen.contiguous(), place, pages), None, _record_pages)
    return pages


def _record_pages(recording: Recording) -> None:
    chosen, place, pages = recording.parts
    (batch, tables, tiles, n), (heads, chunks) = chosen.now.shape, place.now.shape
    recording.launch(
        _pages_of_chunks, (triton.cdiv(tiles * n, _BLOCK), batch * tables), chosen, place, pages, tiles * n, tables,
        tables // heads, chunks, BLOCK=_BLOCK, num_warps=2,
    )  # fmt: skip


def masks_of_chunks(chosen: Tensor, bits: Tensor, chunk: int, position: Tensor | None = None) -> Tensor:
    masks = torch.empty((*chosen.shape, 1, bits.shape[1]), dtype=torch.int32, device=chosen.device)
    if masks.numel():
        own = position is not None
        given = chosen.contiguous(), bits, bits if position is None else position, masks
        _MASKS.run(given, (chunk, own), partial(_record_masks, chunk, own))
    return masks


def _record_masks(chunk: int, own: bool, recording: Recording) -> None:
    chosen, bits, position, masks = recording.parts
    (batch, tables, tiles, n), words = chosen.now.shape, bits.now.shape[1]
    recording.launch(
        _masks_of_chunks, (triton.cdiv(tiles * n, _BLOCK), batch * tables), chosen, bits, position, masks, tiles * n, n,
        CHUNK=chunk, WORDS=words, WORDS_2=triton.next_power_of_2(words), OWN=own, BLOCK=_BLOCK, num_warps=2,
    )  # fmt: skip

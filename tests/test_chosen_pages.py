"""Pages of chosen chunks by their definition, in PyTorch operations and in Triton."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE

from distattn.kernels import chosen_pages as in_torch
from distattn.kernels.chosen_pages import Where
from distattn.levels import packed


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize(("rows", "pieces"), [(64, 1), (40, 3), (16, 2)])
def test_chosen_chunks_are_pages_with_masks(rows: int, pieces: int, engine: str) -> None:
    if engine == "torch" and DEVICE == "cuda":
        pytest.skip("tensors are on a GPU")
    make = in_torch.chosen_pages
    if engine == "triton" and DEVICE != "cuda":
        from distattn.kernels import chosen_pages_triton

        make = chosen_pages_triton.chosen_pages
    random = np.random.default_rng(0)
    chunks, first = 9, np.array([0, 5 * pieces + 1, 13 * pieces + 1])  # pages of two sequences: they end in a chunk
    page = np.where(random.random(first[-1]) < 0.3, -1, random.permutation(first[-1]))
    may = random.random((chunks * pieces, rows)) < 0.9
    sequence, last = np.array([0, 0, 1]), np.array([2 * rows * pieces + 5, 5 * rows * pieces, 8 * rows * pieces - 1])
    chosen = np.stack([random.permuted(np.arange(-2, chunks - 1)).clip(-1)[:6] for _ in range(6)]).reshape(2, 3, 6)
    there = [
        torch.from_numpy(x).to(DEVICE) for x in (chosen.astype(np.int32), sequence, last, page, first, packed(may))
    ]
    pages, masks = make(*there[:3], Where(*there[3:], pieces, rows))
    assert pages.dtype == masks.dtype == torch.int32 and masks.is_contiguous()
    words = masks.cpu().numpy().view(np.uint8)
    bits = np.unpackbits(words, axis=-1, bitorder="little").astype(bool)[..., :rows]
    for table, tile, n in np.ndindex(chosen.shape):
        for piece in range(pieces):
            entry = table, tile, n * pieces + piece
            number = int(chosen[table, tile, n]) * pieces + piece
            at = first[sequence[tile]] + number
            if chosen[table, tile, n] < 0 or at >= first[sequence[tile] + 1]:
                assert pages[entry] == -1
                continue
            seen = number * rows + np.arange(rows) <= last[tile]
            assert pages[entry] == page[at]
            assert page[at] < 0 or (bits[entry][0] == (may[number] & seen)).all()

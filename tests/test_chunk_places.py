"""Pages and masks of chosen chunks by their definition, in PyTorch operations and in Triton."""

import importlib
import types

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor

from distattn.levels import packed

CHUNKS = 11


@pytest.fixture(params=["chunk_places", "chunk_places_triton"])
def kernels(request: pytest.FixtureRequest) -> types.ModuleType:
    if request.param == "chunk_places" and DEVICE == "cuda":
        pytest.skip("tensors are on a GPU")
    if request.param != "chunk_places":
        pytest.importorskip("triton")
    return importlib.import_module(f"distattn.kernels.{request.param}")


def choices(batch: int, tables: int, tiles: int, n: int) -> Tensor:
    random = np.random.default_rng(0)
    chosen = random.permuted(np.tile(np.arange(CHUNKS), (batch, tables, tiles, 1)), axis=3)[..., :n]
    return torch.from_numpy(np.where(random.random(chosen.shape) < 0.3, -1, chosen).astype(np.int32)).to(DEVICE)


@pytest.mark.parametrize(
    ("heads", "shape"), [(1, (2, 3, 5, 4)), (2, (1, 6, 90, 7)), (3, (3, 3, 1, 1)), (2, (1, 2, 4, 0))]
)
def test_the_pages_of_chosen_chunks(heads: int, shape: tuple[int, ...], kernels: types.ModuleType) -> None:
    chosen = choices(*shape)
    place = torch.randint(-1, 50, (heads, CHUNKS), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for some in (chosen, choices(*shape[::-1]).permute(3, 2, 1, 0)):
        found = kernels.pages_of_chunks(some, place)
        assert found.dtype == torch.int32 and found.shape == shape
        for b, table, tile, i in np.ndindex(shape):
            chunk = int(some[b, table, tile, i])
            expected = -1 if chunk < 0 else place[table // (shape[1] // heads), chunk]
            assert found[b, table, tile, i] == expected


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("chunk", "n"), [(4, 3), (32, 5), (40, 7), (70, 11)])
def test_the_masks_of_chosen_chunks(chunk: int, n: int, own: bool, kernels: types.ModuleType) -> None:
    chosen, may = choices(2, 2, 30, n), np.random.default_rng(1).random((CHUNKS, chunk)) < 0.8
    position = torch.arange(30) * CHUNKS * chunk // 30 + torch.arange(30) % 2
    args = torch.from_numpy(packed(may)).to(DEVICE), chunk, position.to(DEVICE) if own else None
    masks = kernels.masks_of_chunks(chosen, *args)
    assert masks.dtype == torch.int32 and masks.is_contiguous() and masks.shape == (*chosen.shape, 1, -(-chunk // 32))
    bits = np.unpackbits(masks.cpu().numpy().view(np.uint8), axis=-1, bitorder="little").astype(bool)
    assert not bits[chosen.cpu().numpy() >= 0][..., chunk:].any()
    cut = 0
    for b, table, tile, i in np.argwhere(chosen.cpu().numpy() >= 0):
        number, at = int(chosen[b, table, tile, i]), int(position[tile])
        seen = np.arange(chunk) <= (at % chunk if own and at // chunk == number else chunk)
        cut += not seen.all()
        assert (bits[b, table, tile, i, 0, :chunk] == (may[number] & seen)).all()
    assert (cut > 0) == own

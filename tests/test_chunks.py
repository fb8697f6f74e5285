"""Choosing chunks and what is visited beside them: in PyTorch operations against the definition, in Triton as those."""

import importlib
import types
from itertools import product

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor

from distattn.kernels import chunks as in_torch
from distattn.kernels.chunks import Choosers, Choosing, Ladder, Rung


@pytest.fixture(params=["torch", "chunks_triton"])
def kernels(request: pytest.FixtureRequest) -> types.ModuleType:
    return kernels_of(request.param)


@pytest.fixture(params=["torch", "summary_pages_triton"])
def page_kernels(request: pytest.FixtureRequest) -> types.ModuleType:
    return kernels_of(request.param)


def kernels_of(name: str) -> types.ModuleType:
    if name == "torch":
        return in_torch
    pytest.importorskip("triton")
    return importlib.import_module(f"distattn.kernels.{name}")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CHUNK, CHUNKS, HEADS, KV_HEADS, DIM = 4, 11, 6, 2, 20
# rows choose alone or as a chunk; columns are chunks, or summaries of 4 tokens, 2 apart
WAYS = {
    "tokens, products": Choosing(CHUNKS, 3, 2, True, ("first",), False, 1, 1, 1, CHUNK),
    "tiles, products, both sides": Choosing(CHUNKS, 4, 2, False, ("first",), False, 1, 1, 1, 1),
    "tiles, products, heads together": Choosing(CHUNKS, 4, 2, True, ("first",), False, 1, 1, 3, 1),
    "tokens, mass": Choosing(CHUNKS, 4, 1, True, ("first", "own", "previous"), True, 2, 2, 3, CHUNK),
    "tiles, mass, a choice a head": Choosing(CHUNKS, 2, 2, True, (), True, 2, 2, 1, 1),
    "more than there are": Choosing(CHUNKS, 30, 1, True, ("own",), False, 1, 1, 1, CHUNK),
    "nothing is left to choose": Choosing(CHUNKS, 1, 1, True, ("own", "previous"), True, 1, 1, 3, CHUNK),
}


def by_definition(by: Choosing, choosers: Choosers, keys: Tensor, bias: Tensor, selectable: Tensor) -> list[list[int]]:
    rows, number, _, until = choosers
    group, found = HEADS // KV_HEADS, []
    for b, table, i in product(range(len(rows)), range(HEADS // by.share), range(len(number))):
        own = int(number[i]) // by.rows
        scores = np.zeros(by.chunks)
        for head in range(table * by.share, (table + 1) * by.share):
            s = 0.25 * (keys[b, : int(until[i]), head // group].double() @ rows[b, i, head].double()).numpy()
            if by.mass:
                s = s + bias[: len(s), head // group].double().numpy()
                s = np.exp(s - s.max(initial=-1e9)) / max(np.exp(s - s.max(initial=-1e9)).sum(), 1e-300)
            for column, weight in enumerate(s):
                for piece in range(column, column + by.overlap):
                    if piece // by.pieces < by.chunks:
                        scores[piece // by.pieces] += weight
        outside = [c for c in range(by.chunks) if c < own - by.reach + 1 or (not by.causal and c >= own + by.reach)]
        candidates = [c for c in outside if selectable[c]]
        always = {0} & set(candidates) if "first" in by.always else set()
        always |= {own} if "own" in by.always else set()
        always |= {own - 1} if "previous" in by.always and own else set()
        best = sorted(set(candidates) - always, key=lambda c: (-np.float32(scores[c]), c))
        chosen = sorted(always | set(best[: max(by.k - len(always), 0)]))
        found.append(chosen + [-1] * (by.most - len(chosen)))
    return found


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_the_best_chunks_are_chosen(name: str, equal: bool, one: bool, kernels: types.ModuleType, monkeypatch) -> None:
    by = WAYS[name]
    number = np.delete(np.arange(by.chunks * by.rows), np.s_[5:7])
    if kernels is not in_torch:  # several slices, and a row in several parts; the interpreter takes its time
        monkeypatch.setattr(kernels, "_SCRATCH", 1)
        monkeypatch.setattr(kernels, "_WIDEST", 8 if equal else 16)
        monkeypatch.setattr(kernels, "_GROUP", 2)
        number = number[[len(number) // 2, -1]]
    number = number[-1:] if one else number
    columns = by.chunks * by.pieces - (by.overlap - 1)
    batch = 2 if kernels is in_torch else 1
    rows, keys = random(batch, len(number), HEADS, DIM), random(batch, columns, KV_HEADS, DIM, seed=1)
    bias = random(columns, KV_HEADS, seed=2)
    if equal:  # ties, but for chunks at the ends; of numbers whose products are exact
        rows, keys, bias = rows.round(), keys[:, :1].expand_as(keys).round(), torch.zeros_like(bias)
        keys = keys.bfloat16()  # may be narrower than the rows
    bias[3] = -torch.inf
    own = number // by.rows
    if by.mass:
        end = number + 1 if by.rows > 1 else number * CHUNK
        size = CHUNK // by.pieces
        until = np.clip((end - by.overlap * size) // size + 1, 0, columns)
    else:
        until = np.clip(own - by.reach + 1, 0, by.chunks) if by.causal else np.full_like(own, by.chunks)
    selectable = torch.arange(by.chunks) != 4
    choosers = Choosers(rows, number, *(torch.from_numpy(x.astype(np.int32)) for x in (own, until)))
    expected = by_definition(by, choosers, keys, bias, selectable)
    there = Choosers(rows.to(DEVICE), number, choosers.own.to(DEVICE), choosers.until.to(DEVICE))
    found = kernels.choose_chunks(
        by, there, keys.to(DEVICE), bias.to(DEVICE) if by.mass else None, selectable.to(DEVICE), 0.25, few=equal or one
    )
    assert found.dtype == torch.int32
    assert found.flatten(0, 2).tolist() == expected


LADDERS = {
    "one level": Ladder([Rung(4, 30, 0, 2, 0, 1)], True, 4, 16, 2, 4),
    "two levels": Ladder([Rung(4, 60, 0, 2, 3, 4), Rung(16, 15, 64, 3, 0, 1)], True, 4, 32, 3, 3),
    "three levels, small pages": Ladder(
        [Rung(4, 60, 0, 2, 4, 2), Rung(8, 30, 64, 4, 3, 2), Rung(16, 15, 96, 3, 0, 1)], True, 4, 8, 14, 14
    ),
    "both sides, words and a half": Ladder([Rung(4, 60, 0, 2, 3, 4), Rung(16, 15, 96, 3, 0, 1)], False, 4, 48, 3, 3),
}


@pytest.mark.parametrize("name", LADDERS)
def test_a_token_is_visited_once(name: str, page_kernels: types.ModuleType) -> None:
    """Of the tokens beyond the window each is in a chosen chunk, or in just one of the summaries that are visited."""
    ladder = LADDERS[name]
    generator = np.random.default_rng(0)
    chunk, (low, *_) = ladder.chunk, ladder.rungs
    length = low.summaries * chunk
    position = np.arange(0, length, chunk)[:: 1 if page_kernels is in_torch else 9]
    chosen = np.full((1, 2, len(position), 3), -1)
    for index in np.ndindex(chosen.shape[:3]):
        tile = position[index[2]] // chunk
        numbers = np.arange(low.summaries)
        outside = numbers < tile - low.reach + 1
        outside |= (numbers >= tile + low.reach) & (not ladder.causal)
        some = np.sort(generator.permutation(numbers[outside])[:3])
        chosen[index][: len(some)] = some
    exists = np.zeros(ladder.pages * ladder.page, bool)
    for rung in ladder.rungs:
        exists[rung.first_row : rung.first_row + rung.summaries] = True
    words = np.zeros((ladder.pages, ladder.words), np.uint32)
    packed = np.packbits(exists.reshape(ladder.pages, -1), axis=-1, bitorder="little")
    words.view(np.uint8)[:, : packed.shape[1]] = packed
    first = np.arange(len(position), dtype=np.int32) * 100
    inputs = (chosen.astype(np.int32), position.astype(np.int32), words.view(np.int32), first)
    *some, begins = (torch.from_numpy(x).to(DEVICE) for x in inputs)
    pages, masks = (x.cpu().numpy() for x in page_kernels.summary_pages(*some, ladder, begins))
    pages = np.where(pages >= 0, pages - first[:, None], -1)
    assert pages.shape == (*chosen.shape[:3], ladder.most)
    assert masks.shape == (*pages.shape, 1, ladder.words)
    for index in np.ndindex(pages.shape[:3]):
        mine = pages[index]
        named = mine[mine >= 0]
        assert np.array_equal(mine, np.append(np.sort(named), np.full(len(mine) - len(named), -1)))
        counted = np.zeros(length, int)
        for page, mask in zip(named, masks[index][: len(named), 0], strict=True):
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: ladder.page]
            assert bits.any()
            for row in np.flatnonzero(bits) + page * ladder.page:
                rung = next(x for x in ladder.rungs if x.first_row <= row < x.first_row + x.summaries)
                counted[(row - rung.first_row) * rung.chunk :][: rung.chunk] += 1
        for one in chosen[index][chosen[index] >= 0]:
            counted[one * chunk : (one + 1) * chunk] += 1
        tile = position[index[2]] // chunk
        window = np.arange(length) // chunk >= tile - low.reach + 1
        if not ladder.causal:
            window &= np.arange(length) // chunk < tile + low.reach
        assert np.array_equal(counted, ~window)

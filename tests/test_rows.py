"""Packing, merging and pooling of rows: in PyTorch operations against the definition, and in Triton against those."""

import types

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE

from distattn.kernels import rows as in_torch
from distattn.kernels.rows import Places


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest) -> types.ModuleType:
    if request.param == "torch":
        return in_torch
    pytest.importorskip("triton")
    from distattn.kernels import rows_triton

    return rows_triton


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


PLACES = {
    "one run, all heads": Places(np.array([[3, 40]]), (0, 1, 2)),
    "runs, some heads": Places(np.array([[0, 2], [5, 6], [30, 50]]), (2, 0)),
    "many runs": Places(np.stack((np.arange(0, 50, 2), np.arange(1, 51, 2)), axis=1), (1,)),
    "an empty run between others": Places(np.array([[0, 2], [7, 7], [9, 12]]), (0, 1, 2)),
    "nothing": Places(np.zeros((0, 2), np.int64), (0,)),
}


@pytest.mark.parametrize("name", PLACES)
def test_rows_travel(name: str, kernels: types.ModuleType) -> None:
    places = PLACES[name]
    # Two tensors of different width and memory order.
    tensors = [random(2, 50, 3, 20), random(2, 3, 50, 12, seed=1).transpose(1, 2)]
    wanted = [x[:, places.index][:, :, list(places.heads)] for x in tensors]
    flat = kernels.pack_rows(tensors, places)
    assert torch.equal(flat, torch.cat([x.reshape(-1) for x in wanted]))
    parts = in_torch.split_rows(tensors, places, flat)
    assert all(torch.equal(a, b) for a, b in zip(parts, wanted, strict=True))

    targets = [torch.zeros_like(x) for x in tensors]
    kernels.unpack_rows(targets, places, flat)
    kernels.add_rows(targets[0], places, parts[0])
    for target, rows, times in zip(targets, wanted, (2, 1), strict=True):
        expected = torch.zeros_like(target)
        expected[:, places.index[:, None], list(places.heads)] = times * rows
        assert torch.equal(target, expected)


def test_rows_are_stored(kernels: types.ModuleType) -> None:
    at = torch.tensor([7, 0, 4], device=DEVICE)
    rows = random(3, 3, 20), random(3, 3, 12, seed=1).transpose(0, 1)  # of different width and memory order
    targets = torch.zeros(9, 3, 20, device=DEVICE), torch.zeros(9, 3, 12, dtype=torch.float16, device=DEVICE)
    kernels.store_rows(targets, at, rows)
    for target, x in zip(targets, rows, strict=True):
        expected = torch.zeros_like(target)
        expected[at] = x.to(target.dtype)
        assert torch.equal(target, expected)


def test_rows_in_one_piece_are_a_view() -> None:
    x = random(1, 50, 3, 20)

    def view(*places: Places, of: torch.Tensor = x) -> torch.Tensor | None:
        return in_torch.rows_in_place(of, Places.joined(places))

    first, second = Places(np.array([[3, 9]]), (0, 1, 2)), Places(np.array([[9, 20], [20, 31]]), (0, 1, 2))
    found = view(first, second)
    assert found is not None and found.data_ptr() == x[0, 3].data_ptr()
    assert torch.equal(found, torch.cat([in_torch.pack_rows([x], part) for part in (first, second)]))
    assert view(second, first) is None and view(Places(np.array([[3, 9]]), (0, 1))) is None
    assert view(first, of=random(2, 50, 3, 20)) is None and view(first, of=random(1, 3, 50, 20).transpose(1, 2)) is None
    nothing = view(Places(np.zeros((0, 2), np.int64), (0, 1, 2)))
    assert nothing is not None and nothing.numel() == 0


@pytest.mark.parametrize(("rows", "chunk", "dim"), [(40, 8, 20), (45, 8, 16), (300, 128, 8)])
def test_chunks_travel(rows: int, chunk: int, dim: int, kernels: types.ModuleType) -> None:
    pair = random(2, 3, rows, dim).transpose(1, 2), random(2, rows, 3, dim + 4, seed=1)
    last = (rows - 1) // chunk
    page, head = (torch.tensor(numbers, device=DEVICE) for numbers in ([0, last, last, 1], [2, 0, 1, 2]))
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, chunk)) for x in pair]
    wanted = torch.cat(
        [torch.stack([x[:, p * chunk : (p + 1) * chunk, h] for p, h in zip(page, head, strict=True)]) for x in padded],
        dim=-1,
    )
    wanted[1:3, :, rows - last * chunk :] = 0
    taken = kernels.take_chunks(pair, page, head, chunk)
    assert torch.equal(taken, wanted)
    totals = random(2, rows, 3, dim, seed=2), random(2, 3, rows, dim + 4, seed=3).transpose(1, 2)
    expected = [x.clone() for x in totals]
    for p, h, values in zip(page, head, taken, strict=True):
        for x, part in zip(expected, values.split([dim, dim + 4], dim=-1), strict=True):
            there = x[:, p * chunk : (p + 1) * chunk, h]
            there += part[:, : there.shape[1]]
    kernels.add_chunks(totals, page, head, taken)
    assert all(torch.equal(x, y) for x, y in zip(totals, expected, strict=True))
    assert kernels.take_chunks(pair, page[:0], head[:0], chunk).shape == (0, 2, chunk, 2 * dim + 4)


def test_joined_places_are_packed_one_after_the_other(kernels: types.ModuleType) -> None:
    parts = [
        Places(np.array(runs, np.int64).reshape(-1, 2), (2, 0)) for runs in ([[0, 2], [5, 6]], [], [[30, 50]], [[7, 8]])
    ]
    tensors = [random(2, 50, 3, 20), random(2, 3, 50, 12, seed=1).transpose(1, 2)]
    joined = Places.joined(parts)
    flat = kernels.pack_rows(tensors, joined)
    assert torch.equal(flat, torch.cat([in_torch.pack_rows(tensors, part) for part in parts]))
    targets = [torch.zeros_like(x) for x in tensors]
    kernels.unpack_rows(targets, joined, flat)
    for target, x in zip(targets, tensors, strict=True):
        expected = torch.zeros_like(x)
        where = slice(None), joined.index[:, None], [2, 0]
        expected[where] = x[where]
        assert torch.equal(target, expected)


def test_partial_results_merge(kernels: types.ModuleType) -> None:
    scores, values = random(2, 9, 3, 30) * 20, random(2, 9, 3, 30, 12, seed=1)
    scores[0, 1] = -torch.inf
    scores[0, 2, :, :20] = -torch.inf
    scores[0, 3, :, 20:] = -torch.inf

    def part(some: slice) -> tuple[torch.Tensor, torch.Tensor]:
        lse = scores[..., some].logsumexp(-1)
        weights = (scores[..., some] - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
        return (weights.unsqueeze(-1) * values[..., some, :]).sum(-2), lse

    out, lse = kernels.merge(*part(slice(0, 20)), *part(slice(20, 30)))
    expected, expected_lse = part(slice(0, 30))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_gates(number: int, kernels: types.ModuleType) -> None:
    parts = [random(2, 9, 3, 20, seed=seed).requires_grad_() for seed in range(number)]
    gates, grad = random(2, 9, 3, number, seed=7).requires_grad_(), random(2, 9, 3, 20, seed=8)
    expected = sum(gates[..., i, None].sigmoid() * part for i, part in enumerate(parts))
    wanted = torch.autograd.grad(expected, [*parts, gates], grad)
    with torch.no_grad():
        torch.testing.assert_close(kernels.gate(parts, gates), expected)
        d_parts, d_gates = kernels.gate_backward(grad, parts, gates)
    for x, y in zip([*d_parts, d_gates], wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("rows", "chunk"), [(40, 8), (45, 8), (300, 128), (5, 9)])
@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunk_means(rows: int, chunk: int, leave: bool, dtype: torch.dtype, kernels: types.ModuleType) -> None:
    x = random(2, 3, rows, 20).transpose(1, 2).to(dtype)
    left_out = (torch.arange(rows) % 5 == 0).to(DEVICE) if leave else None
    if left_out is not None:
        left_out[: chunk + 1] = True  # a chunk without a row
    means, counts = kernels.chunk_means(x, chunk, left_out)
    double = x.double().requires_grad_()
    kept = torch.ones(rows, dtype=torch.bool, device=DEVICE) if left_out is None else ~left_out
    pieces = [(double[:, i : i + chunk], kept[i : i + chunk]) for i in range(0, rows, chunk)]
    assert counts.tolist() == [int(some.sum()) for _, some in pieces]
    expected = torch.stack([p[:, some].sum(1) / max(int(some.sum()), 1) for p, some in pieces], dim=1)
    torch.testing.assert_close(means, expected.float(), atol=1e-5, rtol=1e-5)

    grad = random(*means.shape, seed=2)
    found = kernels.chunk_means_backward(grad, counts, rows, chunk, left_out, dtype)
    (wanted,) = torch.autograd.grad(expected, double, grad.double())
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(found, wanted.to(dtype), atol=tolerance, rtol=tolerance)

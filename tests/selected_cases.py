"""Cases of tables that were made on the device, and dense attention of what these allow."""

from typing import NamedTuple

import numpy as np
import torch
from kernel_cases import DEVICE
from torch import Tensor

from distattn.kernels.attention import Biases, Pages
from distattn.kernels.selected import SelectedTable


class Case(NamedTuple):
    length: int
    block_q: int
    block_k: int
    heads: int
    kv_heads: int
    head_table: tuple[int, ...]
    selected: int
    masked: bool
    more: bool = False  # guests, a bias and a batch of two
    one_row: bool = False  # of a mask stands for all queries of a tile


class Inputs(NamedTuple):
    """q and what is selected from; grad and grad_lse are the gradients of out and lse; bias [batch, tokens, kv_heads],
    zeros if there are no ``biases``."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    grad_lse: Tensor
    bias: Tensor
    own: Pages
    guests: Pages
    biases: Biases | None


def inputs(case: Case, table: SelectedTable, dim: int, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    batch = 1 + case.more

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, case.length, *shape, generator=generator).to(DEVICE)

    q, k, v, grad = (random(heads, dim).to(dtype) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads))
    grad_lse, bias = random(case.heads), random(case.kv_heads) * case.more
    own_rows = min(table.own_pages * case.block_k, case.length)

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        """The rank's own rows, and whole pages of guests."""
        guests = x.new_zeros(batch, table.guest_pages * case.block_k, *x.shape[2:])
        guests[:, : case.length - own_rows] = x[:, own_rows:]
        return x[:, :own_rows].contiguous(), guests

    own, guests = (Pages(*pair) for pair in zip(split(k), split(v), strict=True))
    return Inputs(q, k, v, grad, grad_lse, bias, own, guests, Biases(*split(bias)) if case.more else None)


def table_of(case: Case) -> tuple[SelectedTable, Tensor]:
    """A table in which some tiles choose fewer pages and some none; bool [heads, queries, keys]: what it allows."""
    generator = np.random.default_rng(0)
    tiles, pages, tables = -(-case.length // case.block_q), -(-case.length // case.block_k), max(case.head_table) + 1
    selected = generator.permuted(np.tile(np.arange(pages), (tables, tiles, 1)), axis=2)[..., : case.selected]
    selected = np.where(generator.random(selected.shape) < 0.3, -1, selected)
    selected[:, 2] = -1
    selected[:, 3:, 0] = 1  # one page that nearly all visit
    selected[..., 1:][selected[..., 1:] == 1] = -1
    bits = generator.random((*selected.shape, 1 if case.one_row else case.block_q, case.block_k)) < 0.6
    exists = (selected[..., None] * case.block_k + np.arange(case.block_k) < case.length)[..., None, :]
    bits = bits & exists if case.masked else np.ones_like(bits)
    words = np.zeros((*bits.shape[:-1], -(-case.block_k // 32)), np.uint32)
    packed = np.packbits(bits, axis=-1, bitorder="little")
    words.view(np.uint8)[..., : packed.shape[-1]] = packed
    table = SelectedTable(
        case.block_q,
        case.block_k,
        tiles,
        pages - pages // 2 * case.more,
        pages // 2 * case.more,
        case.head_table,
        torch.from_numpy(selected.astype(np.int32)).to(DEVICE),
        torch.from_numpy(words.view(np.int32)).to(DEVICE) if case.masked else None,
    )
    allowed = np.zeros((tables, tiles * case.block_q, pages * case.block_k), np.bool_)
    for index in np.argwhere(selected >= 0):
        t, tile, _ = index
        page = selected[tuple(index)]
        rows = slice(tile * case.block_q, (tile + 1) * case.block_q)
        allowed[t, rows, page * case.block_k : (page + 1) * case.block_k] = bits[tuple(index)]
    return table, torch.from_numpy(allowed[list(case.head_table), : case.length, : case.length]).to(DEVICE)


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    share = q.shape[2] // k.shape[2]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(share, 2)) * scale
    scores = scores + bias.repeat_interleave(share, 2).transpose(1, 2).unsqueeze(2)
    lse = scores.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp() * allowed
    return torch.einsum("bhnm,bmhd->bnhd", weights, v.repeat_interleave(share, 2)), lse.transpose(1, 2)

"""Attention of single queries over pages of a cache: few rows, which may each visit very many pages.

The definition is that of attention.py, over the pages of one or more tensors: those of tokens, and of summaries. On
GPUs the pages of a row are split among programs, which leave partial results that are merged by their log-sum-exp
(after Dao et al., "Flash-Decoding for long-context inference", 2023); elsewhere the tile kernel in PyTorch operations
serves, with tiles of one query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.kernels import attention_torch
from distattn.kernels.attention import Biases, Pages, accumulator_dtype
from distattn.kernels.selected import AnyTable, SelectedTable


class Source(NamedTuple):
    """Keys that rows visit.

    k: [slots, kv_heads, head_dim], whole pages of ``table.block_k`` slots. v: [slots, kv_heads, value_dim].
    table: tiles of one query; page p is slots ``p * block_k ..``, and there are no guests.
    bias: [slots, kv_heads] in the accumulator's dtype, added to the scores of a key; nothing if None.
    """

    k: Tensor
    v: Tensor
    table: AnyTable
    bias: Tensor | None = None


def decode_attention(
    q: Tensor, sources: Sequence[Source], *, scale: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of every row, over the pages that the tables name for it: one softmax over all sources.

    Args:
        q: [rows, heads, head_dim]; query head h reads key/value head h // (heads // kv_heads).
        sources: one to three, of equal kv_heads and dimensions, with ``table.tiles == rows``.
        scale: factor of the scores.
        dtype: of out; default: the accumulator's.

    Returns:
        out [rows, heads, value_dim], and lse [rows, heads] (natural logarithm) in the accumulator's dtype; a row that
        visits nothing has 0 and -inf.

    Raises:
        ValueError: a table has tiles of several queries, or it does not fit q and k.
    """
    rows = q.shape[0]
    for k, _, table, _ in sources:
        if table.block_q != 1 or table.tiles != rows:
            raise ValueError(f"table has {table.tiles} tiles of {table.block_q} queries; expected {rows} tiles of 1")
        if table.guest_pages or table.own_pages * table.block_k != k.shape[0]:
            found = f"{table.own_pages} pages of {table.block_k} and {table.guest_pages} guests"
            raise ValueError(f"table has {found}; expected whole pages of k, which has {k.shape[0]} slots")
    wide = accumulator_dtype(q.dtype)
    shape = rows, q.shape[1], sources[0].v.shape[2]
    if q.is_cuda and wide == torch.float32:
        from distattn.kernels import decode_triton

        out, lse = q.new_empty(shape, dtype=dtype or wide), q.new_empty(shape[:2], dtype=wide)
        decode_triton.decode(q, sources, out, lse, scale)
        return out, lse
    out, lse = q.new_zeros((1, *shape), dtype=wide), q.new_full((1, *shape[:2]), -torch.inf, dtype=wide)
    for number, (k, v, table, bias) in enumerate(sources):
        if table.is_empty:
            continue
        own, nothing = Pages(k.unsqueeze(0), v.unsqueeze(0)), Pages(k[:0].unsqueeze(0), v[:0].unsqueeze(0))
        biases = None if bias is None else Biases(bias.unsqueeze(0), bias[:0].unsqueeze(0))
        on_host = table.on_host if isinstance(table, SelectedTable) else table
        before = out if number else None
        attention_torch.forward(q.unsqueeze(0), own, nothing, on_host, out, lse, scale, before, biases)
    return out[0].to(dtype or wide), lse[0]

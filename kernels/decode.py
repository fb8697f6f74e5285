"""Attention of single queries over pages of a cache: few rows, which may each visit very many pages.

The definition is that of attention.py. On GPUs the pages of a row are split among programs, which leave partial results
that are merged by their log-sum-exp (after Dao et al., "Flash-Decoding for long-context inference", 2023); elsewhere
the tile kernel in PyTorch operations serves, with tiles of one query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distattn.kernels import attention_torch
from distattn.kernels.attention import Biases, Pages, accumulator_dtype
from distattn.kernels.selected import AnyTable, SelectedTable


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, table: AnyTable, *, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of every row, over the pages that the table names for it.

    Args:
        q: [rows, heads, head_dim]; query head h reads key/value head h // (heads // kv_heads).
        k: [slots, kv_heads, head_dim], whole pages of ``table.block_k`` slots. v: [slots, kv_heads, value_dim].
        table: tiles of one query, ``table.tiles == rows``; page p is slots ``p * block_k ..``, and there are no guests.
        scale: factor of the scores.
        bias: [slots, kv_heads] in the accumulator's dtype, added to the scores of a key; nothing if None.

    Returns:
        out [rows, heads, value_dim] and lse [rows, heads] (natural logarithm) in the accumulator's dtype; a row that
        visits nothing has 0 and -inf.

    Raises:
        ValueError: the table has tiles of several queries, or it does not fit q and k.
    """
    rows, slots = q.shape[0], k.shape[0]
    if table.block_q != 1 or table.tiles != rows:
        raise ValueError(f"table has {table.tiles} tiles of {table.block_q} queries; expected {rows} tiles of 1")
    if table.guest_pages or table.own_pages * table.block_k != slots:
        found = f"{table.own_pages} pages of {table.block_k} and {table.guest_pages} guests"
        raise ValueError(f"table has {found}; expected whole pages of k, which has {slots} slots")
    dtype = accumulator_dtype(q.dtype)
    out = q.new_zeros((rows, q.shape[1], v.shape[2]), dtype=dtype)
    lse = q.new_full((rows, q.shape[1]), -torch.inf, dtype=dtype)
    if table.is_empty:
        return out, lse
    if q.is_cuda and dtype == torch.float32:
        from distattn.kernels import decode_triton

        decode_triton.decode(q, k, v, bias, table, out, lse, scale)
        return out, lse
    own, nothing = Pages(k.unsqueeze(0), v.unsqueeze(0)), Pages(k[:0].unsqueeze(0), v[:0].unsqueeze(0))
    biases = None if bias is None else Biases(bias.unsqueeze(0), bias[:0].unsqueeze(0))
    on_host = table.on_host if isinstance(table, SelectedTable) else table
    whole = out.unsqueeze(0), lse.unsqueeze(0)
    attention_torch.forward(q.unsqueeze(0), own, nothing, on_host, *whole, scale, None, biases)
    return out, lse

"""Attention of query tiles over the pages that a tile table names, forward and backward.

This is the only way to the tile kernels. GPUs run those in Triton (attention_triton.py, attention_triton_backward.py),
all else those in PyTorch operations (attention_torch.py).

For a query row i and the set P(i) of keys that the table allows,

    lse_i = log sum_{j in P(i)} exp(scale q_i.k_j)            out_i = sum_{j in P(i)} exp(scale q_i.k_j - lse_i) v_j

and, with g = d loss / d out and h = d loss / d lse,

    p_ij = exp(scale q_i.k_j - lse_i)      delta_i = g_i.out_i - h_i      ds_ij = p_ij (g_i.v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j           dk_j = scale sum_i ds_ij q_i   dv_j = sum_i p_ij g_i

(Dao, "FlashAttention-2", 2023, sections 2 and 3; the term h_i follows from d lse_i / d s_ij = p_ij.)
A row that may attend to nothing has out 0, lse -inf, and zero gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distattn.kernels import attention_torch
from distattn.kernels.table import TileTable


class Pages(NamedTuple):
    """What an arena holds of K and V, or of their gradients.

    k: [batch, rows, kv_heads, head_dim] and v: [batch, rows, kv_heads, value_dim], any strides.
    """

    k: Tensor
    v: Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over keys are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_forward(
    q: Tensor,
    own: Pages,
    guests: Pages,
    table: TileTable,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    resume: bool = False,
) -> None:
    """Writes ``out`` and ``lse`` of the query tiles that visit something; the others are left alone.

    Args:
        q: [batch, tokens, heads, head_dim].
        own: the rank's own K and V, read in place.
        guests: received pages, ``table.guest_pages * table.block_k`` rows.
        table: what each query tile visits.
        out: [batch, tokens, heads, value_dim], written. With ``resume`` also read, and then it has the accumulator's
            dtype (see :func:`accumulator_dtype`).
        lse: [batch, tokens, heads] in the accumulator's dtype, natural logarithm, written. With ``resume`` also read.
        scale: factor of the scores.
        resume: continue from the (out, lse) of pages visited before, and write those of both together.
    """
    if use_triton(q):
        from distattn.kernels import attention_triton

        q, own, guests = _with_dense_rows(q), Pages(*map(_with_dense_rows, own)), Pages(*map(_with_dense_rows, guests))
        attention_triton.forward(q, own, guests, table, out, lse, scale, resume)
    else:
        attention_torch.forward(q, own, guests, table, out, lse, scale, resume)


def attention_backward(
    q: Tensor,
    own: Pages,
    guests: Pages,
    table: TileTable,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    d_own: Pages,
    d_guests: Pages,
    *,
    scale: float,
) -> None:
    """Adds the gradients of what the table visits to ``dq``, ``d_own`` and ``d_guests``.

    Args:
        grad_out: [batch, tokens, heads, value_dim].
        lse: [batch, tokens, heads], of everything that the row visits, on any rank and in any stage.
        delta: [batch, tokens, heads], ``(grad_out * out).sum(-1) - grad_lse``.
        dq: [batch, tokens, heads, head_dim] in the accumulator's dtype, as are ``d_own`` and ``d_guests``, which have
            the shapes of ``own`` and ``guests``. All are added to.
        Others as in :func:`attention_forward`.
    """
    if use_triton(q):
        from distattn.kernels import attention_triton_backward

        q, grad_out = _with_dense_rows(q), _with_dense_rows(grad_out)
        own, guests = Pages(*map(_with_dense_rows, own)), Pages(*map(_with_dense_rows, guests))
        attention_triton_backward.backward(q, own, guests, table, grad_out, lse, delta, dq, d_own, d_guests, scale)
    else:
        attention_torch.backward(q, own, guests, table, grad_out, lse, delta, dq, d_own, d_guests, scale)


def use_triton(q: Tensor) -> bool:
    """Whether tensors like q go to the kernels in Triton: those on a GPU, but for float64."""
    return q.device.type == "cuda" and q.dtype != torch.float64


def _with_dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it where the elements of a row are not beside each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from attention over each.

    Args:
        out, other_out: [..., value_dim] in the accumulator's dtype.
        lse, other_lse: [...].

    Returns:
        (out, lse) of the union: lse = log(e^a + e^b), out = e^(a - lse) out + e^(b - lse) other_out.
    """
    union = torch.logaddexp(lse, other_lse)
    base = union.masked_fill(union == -torch.inf, 0.0)
    return out * (lse - base).exp().unsqueeze(-1) + other_out * (other_lse - base).exp().unsqueeze(-1), union

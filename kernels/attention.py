"""Attention of query tiles over the pages that a tile table names, forward and backward.

This is the only way to the tile kernels. There are three kinds, and :func:`choose` says which one runs, and why: for
Hopper GPUs (attention_hopper*.py), for any GPU in Triton (attention_triton.py,
attention_triton_backward.py), and in PyTorch operations (attention_torch.py).

For a query row i and the set P(i) of keys that the table allows, with b_j the bias of a key, or 0,

    s_ij = scale q_i.k_j + b_j    lse_i = log sum_{j in P(i)} exp(s_ij)    out_i = sum_{j in P(i)} exp(s_ij - lse_i) v_j

and, with g = d loss / d out and h = d loss / d lse,

    p_ij = exp(s_ij - lse_i)      delta_i = g_i.out_i - h_i      ds_ij = p_ij (g_i.v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j           dk_j = scale sum_i ds_ij q_i   dv_j = sum_i p_ij g_i
    db_j = sum_i ds_ij

(Dao, "FlashAttention-2", 2023, sections 2 and 3; the term h_i follows from d lse_i / d s_ij = p_ij.)
A row that may attend to nothing has out 0, lse -inf, and zero gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distattn.kernels import attention_torch
from distattn.kernels.launching import Launches, Recording, kinds
from distattn.kernels.rows import copy_tiles
from distattn.kernels.selected import AnyTable, SelectedTable
from distattn.kernels.table import TileTable
from distattn.kernels.work import Work, query_work

_FORWARD = Launches()


class Pages(NamedTuple):
    """What an arena holds of K and V, or of their gradients.

    k: [batch, rows, kv_heads, head_dim] and v: [batch, rows, kv_heads, value_dim], any strides.
    """

    k: Tensor
    v: Tensor


class Biases(NamedTuple):
    """Numbers that are added to a key's scores, of every query: log n for a summary of n tokens.

    own, guests: [batch, rows, kv_heads] in the accumulator's dtype, rows as in the ``Pages`` of the same name.
    """

    own: Tensor
    guests: Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over keys are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_forward(
    q: Tensor,
    own: Pages,
    guests: Pages,
    table: AnyTable,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    before: Tensor | None = None,
    bias: Biases | None = None,
) -> None:
    """Writes ``out`` and ``lse`` of the query tiles that visit something; the others are left alone.

    With ``before`` it goes on from pages visited earlier, and writes what comes of both together; then tiles that visit
    nothing have in ``out`` what ``before`` has.

    Args:
        q: [batch, tokens, heads, head_dim].
        own: the rank's own K and V, read in place.
        guests: received pages, ``table.guest_pages * table.block_k`` rows.
        table: what each query tile visits; a ValueError if it is a SelectedTable that ``own`` does not fit.
        out: [batch, tokens, heads, value_dim], written, in any dtype.
        lse: [batch, tokens, heads] in the accumulator's dtype (see :func:`accumulator_dtype`), natural logarithm,
            written. With ``before`` also read.
        scale: factor of the scores.
        before: of the shape of ``out`` in the accumulator's dtype, the ``out`` of pages visited earlier, whose ``lse``
            is there; it may be ``out`` itself.
        bias: what is added to the scores of each key; nothing if None.
    """
    if before is not None and before is not out:
        empty = table.empty_rows(q.device)
        if empty is not None:
            copy_tiles(before, out, empty, table.head_table, table.block_q)
    if table.is_empty:
        return
    if isinstance(table, SelectedTable):
        table.check_rows(own.k.shape[1])
    resume = before is not None
    given = (q, *own, *guests, out, lse, out if before is None else before, *(bias or ()))
    key = ("forward", scale, resume, kinds(given))
    if recorded := table.recordings.get(key):
        recorded.replay(given)
        return
    kernel = choose(q, own, guests, table, out, scale, bias).kernel
    if kernel == "torch":
        attention_torch.forward(q, own, guests, _on_host(table), out, lse, scale, before, bias)
        return
    rows = given if kernel == "hopper" else (*map(_with_dense_rows, given[:5]), *given[5:])

    def record(recording: Recording) -> None:
        if kernel == "hopper" and isinstance(table, SelectedTable):
            from distattn.kernels import attention_hopper_selected

            attention_hopper_selected.forward(recording, table, scale, resume, bias is not None)
        elif kernel == "hopper":
            from distattn.kernels import attention_hopper

            assert isinstance(table, TileTable)
            attention_hopper.forward(recording, table, scale, resume)
        else:
            from distattn.kernels import attention_triton

            attention_triton.forward(recording, table, scale, resume, bias is not None)

    # Slices of a prompt have tables of their own, and so has each choice, which differ in little but what they name.
    work = _query_work(table, q.device)
    numbers = kernel, scale, resume, bias is not None, table.numbers, work.numbers
    launched = _FORWARD.run(rows, numbers, record, work.tensors)
    if launched is not None and all(x is y for x, y in zip(rows, given, strict=True)):
        table.recordings[key] = launched


def attention_backward(
    q: Tensor,
    own: Pages,
    guests: Pages,
    table: AnyTable,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    d_own: Pages,
    d_guests: Pages,
    *,
    scale: float,
    bias: Biases | None = None,
    d_bias: Biases | None = None,
) -> None:
    """Adds the gradients of what the table visits to ``dq``, ``d_own``, ``d_guests`` and ``d_bias``.

    The first three have the accumulator's dtype (see :func:`accumulator_dtype`), or else 16 bits: then they begin as
    zeros, and of all calls only one visits a row, so that nothing is rounded twice and a kernel may write and not add.

    Args:
        grad_out: [batch, tokens, heads, value_dim].
        lse: [batch, tokens, heads], of everything that the row visits, on any rank and in any stage.
        delta: [batch, tokens, heads], see :func:`row_deltas`.
        dq: [batch, tokens, heads, head_dim].
        d_own, d_guests: of the shapes of ``own`` and ``guests``, contiguous, all of one dtype.
        d_bias: of the shapes of ``bias``, in the accumulator's dtype; None just where ``bias`` is.
        Others as in :func:`attention_forward`.
    """
    if table.is_empty:
        return
    assert (bias is None) == (d_bias is None)
    read, written = (q, *own, *guests, grad_out, lse, delta), (dq, *d_own, *d_guests)
    biases = (*(bias or ()), *(d_bias or ()))
    given = (*read, *written, *biases)
    key = ("backward", scale, kinds(given))
    if recorded := table.recordings.get(key):
        recorded.replay(given)
        return
    kernel = choose(q, own, guests, table, grad_out, scale, bias, backward=True).kernel
    # Only the kernels for Hopper write, and dK and dV only if no key/value head is read through two tables.
    share = q.shape[2] // own.k.shape[2]
    alike = all(len({*table.head_table[h : h + share]}) == 1 for h in range(0, q.shape[2], share))
    sum_q = dq if kernel == "hopper" else _sums(dq)
    sum_own, sum_guests = (
        pages if kernel == "hopper" and alike else Pages(*map(_sums, pages)) for pages in (d_own, d_guests)
    )
    sums = (sum_q, *sum_own, *sum_guests)
    if kernel == "hopper":
        from distattn.kernels import attention_hopper_backward

        assert isinstance(table, TileTable)  # choose says so
        recording = Recording((*read, *sums))
        attention_hopper_backward.backward(recording, table, scale)
    elif kernel == "triton":
        from distattn.kernels import attention_triton_backward

        rows = (*map(_with_dense_rows, read[:6]), *read[6:], *sums, *biases)
        recording = Recording(rows, again=isinstance(table, TileTable))
        attention_triton_backward.backward(recording, table, scale, bias is not None)
    else:
        grads = sum_q, sum_own, sum_guests
        attention_torch.backward(q, own, guests, _on_host(table), grad_out, lse, delta, *grads, scale, bias, d_bias)
    for mine, summed in zip(written, sums, strict=True):
        if mine is not summed:
            mine.add_(summed)
    if kernel != "torch" and recording.ends(given):
        table.recordings[key] = recording


def prepare(q: Tensor, table: AnyTable) -> None:
    """Makes ahead what kernels need to know of a table that was selected on a GPU, in launches that may be many."""
    if q.is_cuda and q.dtype != torch.float64:
        _query_work(table, q.device)


def _query_work(table: AnyTable, device: torch.device) -> Work:
    from distattn.kernels.attention_triton import programs_at_once

    return query_work(table, device, programs_at_once(device))


def _on_host(table: AnyTable) -> TileTable:
    return table.on_host if isinstance(table, SelectedTable) else table


def _sums(x: Tensor) -> Tensor:
    """What gradients of x are added to: x itself, unless it has 16 bits."""
    return x if x.dtype == accumulator_dtype(x.dtype) else x.new_zeros(x.shape, dtype=accumulator_dtype(x.dtype))


class Choice(NamedTuple):
    """kernel: "hopper", "triton" or "torch". why: what decided."""

    kernel: str
    why: str


def choose(
    q: Tensor,
    own: Pages,
    guests: Pages,
    table: AnyTable,
    rows: Tensor,
    scale: float,
    bias: Biases | None = None,
    *,
    backward: bool = False,
) -> Choice:
    """Which kernels run on these tensors; ``rows`` is the output, or its gradient."""
    selected = isinstance(table, SelectedTable)
    blocks = (table.block_q, table.block_k)
    if selected and blocks in ((64, 32), (64, 64), (64, 128)):
        blocks = (128, 128)  # a tile of two heads, and pages side by side
    choice = choose_by_shape(q.device, q.dtype, *blocks, q.shape[3], own.v.shape[3])
    if choice.kernel != "hopper":
        return choice
    if scale <= 0:
        return Choice("triton", f"scale is {scale}, not positive")
    if isinstance(table, SelectedTable):
        if backward:
            return Choice("triton", "the tiles were selected on the GPU, and this is the backward pass")
        if table.has_masks and table.mask_rows > 1:
            return Choice("triton", "the tiles were selected on the GPU, and masks have a row for each query")
        if not _heads_in_pairs(table, own.k.shape[2]):
            return Choice("triton", "the tiles were selected on the GPU, and heads that share them are not pairs")
    elif bias is not None:
        return Choice("triton", "keys have a bias")
    from distattn.kernels.walk_hopper import fetchable

    fetched = [q, *own, *(guests if guests.k.shape[1] else ()), *([] if rows.dtype == torch.float32 else [rows])]
    if not all(map(fetchable, fetched)):
        return Choice("triton", "the heads of a token are not beside each other in memory, or not aligned to 16 bytes")
    return choice


def _heads_in_pairs(table: SelectedTable, kv_heads: int) -> bool:
    """Whether the query heads of each key/value head can be taken two by two, each pair with one table."""
    heads = table.head_table
    share = len(heads) // kv_heads
    return share % 2 == 0 and all(len({*heads[h : h + share]}) == 1 for h in range(0, len(heads), share))


def choose_by_shape(
    device: torch.device, dtype: torch.dtype, block_q: int, block_k: int, head_dim: int, value_dim: int
) -> Choice:
    """Which kernels run on tensors of these sizes, unless their place in memory does not suit."""
    if device.type != "cuda":
        return Choice("torch", f"tensors are on {device.type}, not on a GPU")
    if dtype == torch.float64:
        return Choice("torch", "float64 is for checking, and no GPU kernel is made for it")
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return Choice("triton", f"the GPU has compute capability {capability[0]}.{capability[1]}, not 9.0")
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("triton", f"{dtype} is not a type of 16 bits")
    if (block_q, block_k) != (128, 128):
        return Choice("triton", f"tiles are {block_q} x {block_k}, not 128 x 128")
    if head_dim not in (64, 128) or value_dim != head_dim:
        return Choice("triton", f"head_dim is {head_dim} and value_dim {value_dim}, not both 64 or both 128")
    return Choice("hopper", "the GPU is a Hopper, and its kernels take these sizes")


def row_deltas(out: Tensor, grad_out: Tensor, grad_lse: Tensor) -> Tensor:
    """[batch, tokens, heads] in the dtype of grad_lse: delta, ``(grad_out * out).sum(-1) - grad_lse``.

    out and grad_out: [batch, tokens, heads, value_dim].
    """
    if out.is_cuda and grad_lse.dtype == torch.float32:
        from distattn.kernels import attention_triton_backward

        return attention_triton_backward.row_deltas(_with_dense_rows(out), _with_dense_rows(grad_out), grad_lse)
    return (grad_out.to(grad_lse.dtype) * out.to(grad_lse.dtype)).sum(-1) - grad_lse


def _with_dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it where the elements of a row are not beside each other."""
    return x if x.stride(-1) == 1 else x.contiguous()

"""What is done to rows beside attention: packing them for a journey, merging partial results, pooling chunks.

Each function runs in PyTorch operations on CPUs and in one Triton kernel on GPUs (rows_triton.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distattn.kernels.launching import Recording

# Up to this many runs are copied one by one; more are gathered through an index.
_FEW_RUNS = 16


@dataclass(frozen=True, eq=False)
class Places:
    """Rows of some heads of a tensor [batch, rows, heads, dim].

    runs: int64 [n, 2], rows first .. stop - 1 each. heads: indices. parts: what these were joined from, if they were,
    see :meth:`joined`.
    """

    runs: NDArray[np.int64]
    heads: tuple[int, ...]
    parts: tuple[Places, ...] = ()

    @staticmethod
    def joined(parts: Sequence[Places]) -> Places:
        """Places that are packed one after the other, each as if it were alone, and all in one launch.

        parts: one or more, with equal heads and no parts of their own.
        """
        assert len({part.heads for part in parts}) == 1 and not any(part.parts for part in parts)
        return Places(np.concatenate([part.runs for part in parts]), parts[0].heads, tuple(parts))

    def size(self, tensors: Sequence[Tensor]) -> int:
        """Numbers that these rows of all tensors have."""
        return self.count * len(self.heads) * sum(x.shape[0] * x.shape[3] for x in tensors)

    @cached_property
    def count(self) -> int:
        """How many rows."""
        return int((self.runs[:, 1] - self.runs[:, 0]).sum())

    @cached_property
    def span(self) -> tuple[int, int] | None:
        """(first, stop) where the rows follow one another; None where they do not."""
        if not len(self.runs):
            return 0, 0
        together = bool((self.runs[1:, 0] == self.runs[:-1, 1]).all())
        return (int(self.runs[0, 0]), int(self.runs[-1, 1])) if together else None

    @cached_property
    def index(self) -> Tensor:
        """int64 [count]: the rows."""
        parts = [torch.arange(a, b) for a, b in self.runs.tolist()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    @cached_property
    def _there(self) -> dict[torch.device, Tensor]:
        return {}

    def on(self, device: torch.device) -> Tensor:
        """int64 [4 n + heads] on a device: of each run where it begins, how many rows come before it, how many before
        its part, and how many its part has; and the heads."""
        if device not in self._there:
            parts = self.parts or (self,)
            runs, counts = [len(part.runs) for part in parts], [part.count for part in parts]
            length = self.runs[:, 1] - self.runs[:, 0]
            before = np.cumsum(length) - length, np.repeat(np.cumsum(counts) - counts, runs), np.repeat(counts, runs)
            flat = np.concatenate((self.runs[:, 0], *before, self.heads)).astype(np.int64)
            self._there[device] = torch.from_numpy(flat).to(device)
        return self._there[device]

    @cached_property
    def recordings(self) -> dict[Hashable, Recording]:
        """Launches that move these rows, by all else that they were made from."""
        return {}


def pack_rows(tensors: Sequence[Tensor], places: Places) -> Tensor:
    """The rows and heads of all tensors as one flat tensor: [batch, count, heads, dim] of the first, and of the second.

    Of joined places, these of the first part, then those of the next.

    tensors: one or two [batch, rows, heads, dim], of one dtype on one device, any strides.
    """
    if tensors[0].is_cuda:
        from distattn.kernels import rows_triton

        return rows_triton.pack_rows(tensors, places)
    parts = places.parts or (places,)
    return torch.cat([_heads(_taken(x, part), part.heads).reshape(-1) for part in parts for x in tensors])


def rows_in_place(x: Tensor, places: Places) -> Tensor | None:
    """A flat view of rows of x, in the form of :func:`pack_rows`.

    None where they do not lie in memory like that: batches of several, some heads only, rows that do not follow one
    another.
    """
    if places.span is None or x.shape[0] != 1 or len(places.heads) != x.shape[2] or not x.is_contiguous():
        return None
    first, stop = places.span
    return x[0, first:stop].flatten()


def unpack_rows(tensors: Sequence[Tensor], places: Places, flat: Tensor) -> None:
    """Writes what :func:`pack_rows` made of tensors of these shapes to their rows and heads."""
    if flat.is_cuda:
        from distattn.kernels import rows_triton

        rows_triton.unpack_rows(tensors, places, flat)
        return
    parts = places.parts or (places,)
    for part, packed in zip(parts, flat.split([part.size(tensors) for part in parts]), strict=True):
        for x, values in zip(tensors, split_rows(tensors, part, packed), strict=True):
            _each_run(x, part, values, lambda old, new: old.copy_(new))


def split_rows(tensors: Sequence[Tensor], places: Places, flat: Tensor) -> list[Tensor]:
    """What :func:`pack_rows` made, by tensor: [batch, count, heads, dim] each, without a copy. Not of joined places."""
    assert not places.parts
    shapes = [(x.shape[0], places.count, len(places.heads), x.shape[3]) for x in tensors]
    parts = flat.split([prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def add_rows(x: Tensor, places: Places, values: Tensor) -> None:
    """Adds values [batch, count, heads, dim], contiguous, to rows and heads of x. Not of joined places."""
    assert not places.parts
    if x.is_cuda:
        from distattn.kernels import rows_triton

        rows_triton.add_rows(x, places, values)
        return
    _each_run(x, places, values, lambda old, new: old.add_(new))


def store_rows(targets: Sequence[Tensor], at: Tensor | slice, rows: Sequence[Tensor]) -> None:
    """Writes rows to places of two tensors, in their dtypes: ``target[at] = rows``.

    targets: two contiguous [places, heads, dim]. at: int64 [n], none twice, or a slice of n places. rows: [n, heads,
    dim] for each.
    """
    if isinstance(at, Tensor) and at.is_cuda:
        from distattn.kernels import rows_triton

        rows_triton.store_rows(targets, at, rows)
        return
    for target, x in zip(targets, rows, strict=True):
        target[at] = x.to(target.dtype)


def take_chunks(tensors: tuple[Tensor, Tensor], page: Tensor, head: Tensor, chunk: int) -> Tensor:
    """[n, batch, chunk, x dim + y dim]: chunks of rows of two tensors, one head each, zeros beyond the last row.

    tensors: x and y [batch, rows, heads, dim], of one dtype, any strides; a row of y comes behind that of x.
    page, head: int64 [n]: rows page * chunk .. of that head.
    """
    if tensors[0].is_cuda:
        from distattn.kernels import rows_triton

        return rows_triton.take_chunks(tensors, page, head, chunk)
    padding = -tensors[0].shape[1] % chunk
    whole = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk)) for x in tensors]
    return torch.cat([x[:, page, :, head] for x in whole], dim=-1)


def add_chunks(tensors: tuple[Tensor, Tensor], page: Tensor, head: Tensor, values: Tensor) -> None:
    """Adds what :func:`take_chunks` takes, values [n, batch, chunk, x dim + y dim], to where it was taken from; no
    chunk of a head may be twice."""
    if tensors[0].is_cuda:
        from distattn.kernels import rows_triton

        rows_triton.add_chunks(tensors, page, head, values)
        return
    chunk = values.shape[2]
    for x, part in zip(tensors, values.split([x.shape[3] for x in tensors], dim=3), strict=True):
        whole = x.shape[1] // chunk
        by_chunk = x[:, : whole * chunk].unflatten(1, (whole, chunk))
        short = page == whole
        by_chunk[:, page[~short], :, head[~short]] += part[~short]
        for rows, last in zip(part[short], head[short].tolist(), strict=True):
            x[:, whole * chunk :, last] += rows[:, : x.shape[1] - whole * chunk]


def _heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    return x if len(heads) == x.shape[2] else x[:, :, list(heads)]


def _taken(x: Tensor, places: Places) -> Tensor:
    runs = places.runs
    if len(runs) == 1:
        return x[:, runs[0, 0] : runs[0, 1]]
    if 0 < len(runs) <= _FEW_RUNS:
        return torch.cat([x[:, a:b] for a, b in runs.tolist()], 1)
    return x.index_select(1, places.index)


def _each_run(x: Tensor, places: Places, values: Tensor, apply: Callable[[Tensor, Tensor], object]) -> None:
    whole = len(places.heads) == x.shape[2]
    if whole and len(places.runs) <= _FEW_RUNS:
        at = 0
        for a, b in places.runs.tolist():
            apply(x[:, a:b], values[:, at : at + b - a])
            at += b - a
        return
    where = (slice(None), places.index) if whole else (slice(None), places.index[:, None], torch.tensor(places.heads))
    old = x[where]
    apply(old, values)
    x[where] = old


def copy_tiles(x: Tensor, out: Tensor, tiles: Tensor, head_table: tuple[int, ...], block: int) -> None:
    """Copies tiles of x to out, which may have another dtype.

    x, out: [batch, tokens, heads, dim]. tiles: bool [tables, tiles], which tiles of ``block`` tokens, by the table of a
    head.
    """
    if x.is_cuda:
        from distattn.kernels import rows_triton

        rows_triton.copy_tiles(x, out, tiles, head_table, block)
        return
    rows = tiles[list(head_table)].repeat_interleave(block, 1)[:, : x.shape[1]].T
    out[:, rows] = x[:, rows].to(out.dtype)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from attention over each.

    Args:
        out, other_out: [..., value_dim] in the accumulator's dtype.
        lse, other_lse: [...].

    Returns:
        (out, lse) of the union: lse = log(e^a + e^b), out = e^(a - lse) out + e^(b - lse) other_out.
    """
    if out.is_cuda and out.dtype == torch.float32:
        from distattn.kernels import rows_triton

        return rows_triton.merge(out, lse, other_out, other_lse)
    union = torch.logaddexp(lse, other_lse)
    base = union.masked_fill(union == -torch.inf, 0.0)
    return out * (lse - base).exp().unsqueeze(-1) + other_out * (other_lse - base).exp().unsqueeze(-1), union


def merge_all(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`merge` of any number of sets of keys.

    Args:
        outs: [sets, ..., value_dim] in the accumulator's dtype; 0 where a set has no key.
        lses: [sets, ...]; -inf there.
    """
    highest = lses.amax(0)
    base = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = (lses - base).exp()
    total = weights.sum(0)
    out = (outs * weights.unsqueeze(-1)).sum(0) / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return out, base + total.log()


def gate(parts: Sequence[Tensor], gates: Tensor) -> Tensor:
    """``sum_i sigmoid(gates[..., i]) parts[i]``, summed in the accumulator's dtype.

    parts: [batch, tokens, heads, dim], of one dtype, which the result has. gates: [batch, tokens, heads, parts].
    """
    if gates.is_cuda and parts[0].dtype != torch.float64:
        from distattn.kernels import rows_triton

        return rows_triton.gate(parts, gates)
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    weights = torch.sigmoid(gates.to(dtype))
    total = parts[0].new_zeros(parts[0].shape, dtype=dtype)
    for i, part in enumerate(parts):
        total.addcmul_(weights[..., i, None], part.to(dtype))
    return total.to(parts[0].dtype)


def gate_backward(grad: Tensor, parts: Sequence[Tensor], gates: Tensor) -> tuple[list[Tensor], Tensor]:
    """The gradients of parts and gates, in their dtypes, from that of :func:`gate`."""
    if gates.is_cuda and parts[0].dtype != torch.float64:
        from distattn.kernels import rows_triton

        return rows_triton.gate_backward(grad, parts, gates)
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    weights, wide = torch.sigmoid(gates.to(dtype)), grad.to(dtype)
    products = torch.stack([(wide * part.to(dtype)).sum(-1) for part in parts], dim=-1)
    d_parts = [(weights[..., i, None] * wide).to(part.dtype) for i, part in enumerate(parts)]
    return d_parts, (products * weights * (1 - weights)).to(gates.dtype)


def chunk_means(x: Tensor, chunk: int, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means of chunks of rows.

    Args:
        x: [batch, rows, heads, dim], any strides. Chunk c has the rows c * chunk ..; the last one may be short.
        left_out: bool [rows], rows that no mean counts; None if all count.

    Returns:
        [batch, chunks, heads, dim], zeros where a chunk has no row, and [chunks], how many rows count; float32, but
        float64 for x in float64 on a CPU. Sums are made in that dtype, in an order in which neither other chunks nor
        the place of x in memory have a part.
    """
    if x.is_cuda:
        from distattn.kernels import rows_triton

        return rows_triton.chunk_means(x if x.stride(3) == 1 else x.contiguous(), chunk, left_out)
    rows = x.shape[1]
    chunks = -(-rows // chunk)
    dtype = torch.promote_types(x.dtype, torch.float32)
    counts = torch.ones(rows, dtype=dtype) if left_out is None else (~left_out).to(dtype)
    values = x.contiguous().to(dtype)
    if left_out is not None:
        values = values.masked_fill(left_out[:, None, None], 0.0)
    padding = chunks * chunk - rows
    sums = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, padding)).unflatten(1, (chunks, chunk)).sum(2)
    counts = torch.nn.functional.pad(counts, (0, padding)).view(chunks, chunk).sum(1)
    return sums / counts.clamp_min(1.0)[:, None, None], counts


def chunk_means_backward(
    grad: Tensor, counts: Tensor, rows: int, chunk: int, left_out: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The gradient of x, [batch, rows, heads, dim] of that dtype, from that of :func:`chunk_means`, float32."""
    if grad.is_cuda:
        from distattn.kernels import rows_triton

        return rows_triton.chunk_means_backward(grad, counts, rows, chunk, left_out, dtype)
    by_row = (grad / counts.clamp_min(1.0)[:, None, None]).repeat_interleave(chunk, 1)[:, :rows]
    if left_out is not None:
        by_row = by_row.masked_fill(left_out[:, None, None], 0.0)
    return by_row.to(dtype)

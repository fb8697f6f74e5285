"""The tile kernel in PyTorch operations: batched gathers of pages and matrix products, for every device.

Query tiles that visit equally many pages form a batch. A batch walks over its pages ``PAGES_AT_ONCE`` at a time with
the online softmax (Milakov and Gimelshein, 2018), so that scratch memory is bounded whatever a tile visits: the
scores of one step hold about ``SCRATCH_BYTES``. There is no loop over tiles.

PARTIAL pages come first in a tile's list (the order does not matter to a softmax), so that a step masks one block of
columns and leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distattn.kernels.table import TileTable

if TYPE_CHECKING:
    from distattn.kernels.attention import Biases, Pages

PAGES_AT_ONCE = 16
SCRATCH_BYTES = 4 << 20
# Below every score and finite: keeps exp(-inf - max) a zero and not a NaN in rows that attend to nothing.
LOWEST = -1e30


def forward(
    q: Tensor,
    own: Pages,
    guests: Pages,
    table: TileTable,
    out: Tensor,
    lse: Tensor,
    scale: float,
    before: Tensor | None,
    bias: Biases | None,
) -> None:
    dtype = lse.dtype
    for b, kv_head, heads, row0 in _head_groups(q, own, table):
        q_tiles = _Blocks(q[b][:, heads], table.block_q)
        out_tiles = _Blocks(out[b][:, heads], table.block_q)
        lse_tiles = _Blocks(lse[b][:, heads], table.block_q)
        tiles_before = None if before is None else _Blocks(before[b][:, heads], table.block_q)
        pages_k = _Blocks(own.k[b, :, kv_head], table.block_k, guests.k[b, :, kv_head])
        pages_v = _Blocks(own.v[b, :, kv_head], table.block_k, guests.v[b, :, kv_head])
        biases = _blocks_of_biases(bias, b, kv_head, table.block_k)
        group = q_tiles.shape[1]
        for batch in _batches(table, row0, group, dtype.itemsize):
            at = _index(batch, q)
            rows = q_tiles.gather(at).to(dtype).mul_(scale).flatten(1, 2)
            n, m, _ = rows.shape
            high = rows.new_full((n, m, 1), LOWEST)
            total = rows.new_zeros((n, m, 1))
            acc = rows.new_zeros((n, m, out.shape[-1]))
            if tiles_before is not None:
                old_lse = lse_tiles.gather(at).flatten(1, 2).unsqueeze(-1)
                high = old_lse.clamp_min(LOWEST)
                total = (old_lse - high).exp()
                acc = tiles_before.gather(at).flatten(1, 2) * total
            for some, pages, masks in _steps(table, batch + row0):
                here = slice(None) if len(some) == n else _index(some, q)
                page_index = _index(pages.ravel(), q)
                k = pages_k.gather(page_index).to(dtype).view(len(some), -1, q.shape[-1])
                v = pages_v.gather(page_index).to(dtype).view(len(some), -1, acc.shape[-1])
                scores = torch.bmm(rows[here], k.mT)
                if biases:
                    scores += biases.gather(page_index).view(len(some), 1, -1)
                _mask(scores, table, masks, group)
                new_high = torch.maximum(high[here], scores.amax(-1, keepdim=True))
                weights = scores.sub_(new_high).exp_()
                fade = (high[here] - new_high).exp_()
                total[here] = total[here] * fade + weights.sum(-1, keepdim=True)
                acc[here] = torch.baddbmm(acc[here].mul_(fade), weights, v)
                high[here] = new_high
            empty = total == 0
            acc /= total.masked_fill(empty, 1.0)
            high += total.log()
            out_tiles.scatter(at, acc.view(n, table.block_q, group, -1))
            lse_tiles.scatter(at, high.view(n, table.block_q, group))


def backward(
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
    scale: float,
    bias: Biases | None,
    d_bias: Biases | None,
) -> None:
    dtype = dq.dtype
    for b, kv_head, heads, row0 in _head_groups(q, own, table):
        q_tiles = _Blocks(q[b][:, heads], table.block_q)
        grad_tiles = _Blocks(grad_out[b][:, heads], table.block_q)
        lse_tiles = _Blocks(lse[b][:, heads], table.block_q)
        delta_tiles = _Blocks(delta[b][:, heads], table.block_q)
        dq_tiles = _Blocks(dq[b][:, heads], table.block_q)
        pages_k = _Blocks(own.k[b, :, kv_head], table.block_k, guests.k[b, :, kv_head])
        pages_v = _Blocks(own.v[b, :, kv_head], table.block_k, guests.v[b, :, kv_head])
        biases = _blocks_of_biases(bias, b, kv_head, table.block_k)
        dk_pages = _Blocks(d_own.k[b, :, kv_head], table.block_k, d_guests.k[b, :, kv_head])
        dv_pages = _Blocks(d_own.v[b, :, kv_head], table.block_k, d_guests.v[b, :, kv_head])
        d_biases = _blocks_of_biases(d_bias, b, kv_head, table.block_k)
        group = q_tiles.shape[1]
        for batch in _batches(table, row0, group, dtype.itemsize):
            at = _index(batch, q)
            rows = q_tiles.gather(at).to(dtype).mul_(scale).flatten(1, 2)
            grads = grad_tiles.gather(at).to(dtype).flatten(1, 2)
            row_lse = lse_tiles.gather(at).to(dtype).flatten(1, 2).unsqueeze(-1)
            # exp(s - inf) = 0: a row that attends to nothing gives no gradient.
            row_lse.masked_fill_(row_lse == -torch.inf, torch.inf)
            row_delta = delta_tiles.gather(at).to(dtype).flatten(1, 2).unsqueeze(-1)
            d_rows = torch.zeros_like(rows)
            for some, pages, masks in _steps(table, batch + row0):
                here = slice(None) if len(some) == len(batch) else _index(some, q)
                page_index = _index(pages.ravel(), q)
                k = pages_k.gather(page_index).to(dtype).view(len(some), -1, q.shape[-1])
                v = pages_v.gather(page_index).to(dtype).view(len(some), -1, grads.shape[-1])
                weights = torch.bmm(rows[here], k.mT)
                if biases:
                    weights += biases.gather(page_index).view(len(some), 1, -1)
                _mask(weights, table, masks, group)
                weights.sub_(row_lse[here]).exp_()
                dv_pages.add(
                    page_index, torch.bmm(weights.mT, grads[here]).unflatten(1, (-1, table.block_k)).flatten(0, 1)
                )
                d_scores = torch.bmm(grads[here], v.mT).sub_(row_delta[here]).mul_(weights)
                dk_pages.add(
                    page_index, torch.bmm(d_scores.mT, rows[here]).unflatten(1, (-1, table.block_k)).flatten(0, 1)
                )
                if d_biases:
                    d_biases.add(page_index, d_scores.sum(1).view(-1, table.block_k))
                d_rows[here] = torch.baddbmm(d_rows[here], d_scores, k)
            dq_tiles.add(at, d_rows.mul_(scale).view(len(batch), table.block_q, group, -1))
        dq_tiles.finish()
        dk_pages.finish()
        dv_pages.finish()
        if d_biases:
            d_biases.finish()


def _blocks_of_biases(bias: Biases | None, b: int, kv_head: int, block: int) -> _Blocks | None:
    return None if bias is None else _Blocks(bias.own[b, :, kv_head], block, bias.guests[b, :, kv_head])


def _head_groups(q: Tensor, own: Pages, table: TileTable) -> Iterator[tuple[int, int, slice, int]]:
    """(batch index, key/value head, query heads beside each other that read it through one table, its first row)."""
    share = q.shape[2] // own.k.shape[2]
    for kv_head in range(own.k.shape[2]):
        mine = range(kv_head * share, (kv_head + 1) * share)
        for index, members in groupby(mine, key=table.head_table.__getitem__):
            heads = list(members)
            for b in range(q.shape[0]):
                yield b, kv_head, slice(heads[0], heads[-1] + 1), index * table.tiles


def _batches(table: TileTable, row0: int, group: int, itemsize: int) -> Iterator[NDArray[np.int64]]:
    """Query tiles in batches whose scratch is bounded and whose members visit similarly many pages."""
    rows = slice(row0, row0 + table.tiles)
    total = table.part_pages[rows] + table.full_pages[rows]
    ids = np.flatnonzero(total)
    if len(ids) == 0:
        return
    partial, total = table.part_pages[rows][ids], total[ids]
    # Tiles with more than one step need not agree: their remainders are handled step by step.
    shape = np.where(total <= PAGES_AT_ONCE, total * (PAGES_AT_ONCE + 1) + partial, PAGES_AT_ONCE * (PAGES_AT_ONCE + 2))
    order = np.lexsort((ids, shape))
    ids, shape, total = ids[order], shape[order], total[order]
    edges = np.flatnonzero(np.diff(shape)) + 1
    for start, stop in zip([0, *edges], [*edges, len(ids)], strict=True):
        width = min(PAGES_AT_ONCE, max(int(total[start]), 1)) * table.block_k
        step = max(1, SCRATCH_BYTES // (table.block_q * group * width * itemsize))
        for i in range(start, stop, step):
            yield ids[i : min(i + step, stop)]


def _steps(
    table: TileTable, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """For the rows of a batch: (members, their next pages [members, pages], masks [members, partial pages])."""
    partial, full = table.part_pages[rows], table.full_pages[rows]
    total = partial + full
    for first in range(0, int(total.max()), PAGES_AT_ONCE):
        stop = np.minimum(total, first + PAGES_AT_ONCE)
        n_partial = np.clip(partial - first, 0, stop - first)
        n_full = stop - first - n_partial
        kinds = n_full * (PAGES_AT_ONCE + 1) + n_partial
        for kind in np.unique(kinds[stop > first]):
            some = np.flatnonzero((kinds == kind) & (stop > first))
            n_f, n_p = divmod(int(kind), PAGES_AT_ONCE + 1)
            pages, masks = table.expand(rows[some], first, n_p, n_f)
            yield some, pages, masks


def _mask(scores: Tensor, table: TileTable, masks: NDArray[np.int64], group: int) -> None:
    """Sets the scores that the masks of the first pages forbid to -inf. scores [n, block_q * group, columns]."""
    n, partial = masks.shape
    if partial == 0:
        return
    columns = scores.view(n, table.block_q, group, -1)[..., : partial * table.block_k]
    columns = columns.unflatten(-1, (partial, table.block_k))
    if n > 1 and (masks == masks[0]).all():
        masks = masks[:1]
    # Chosen before it is moved: the dictionary may be large.
    forbidden = ~table.masks.allows[torch.from_numpy(masks)].to(scores.device)
    columns.masked_fill_(forbidden.transpose(1, 2).unsqueeze(2), -torch.inf)


def _index(index: NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(index)).to(like.device)


class _Blocks:
    """Rows [tokens, ...] seen as blocks [blocks, block, ...], a second buffer's blocks after them.

    The last block of the first buffer may be short: it is kept aside, padded with zeros.
    """

    def __init__(self, x: Tensor, block: int, more: Tensor | None = None) -> None:
        self.x, self.block, self.shape = x, block, x.shape
        whole, self.short = divmod(x.shape[0], block)
        self.parts = [x[: whole * block].unflatten(0, (whole, block))]
        if self.short:
            self.tail = x.new_zeros((1, block, *x.shape[1:]))
            self.tail[0, : self.short] = x[whole * block :]
            self.parts.append(self.tail)
        if more is not None and more.shape[0]:
            self.parts.append(more.unflatten(0, (-1, block)))

    def _split(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor | slice, Tensor]]:
        """(blocks, which entries of index they hold, where in them)."""
        first = 0
        for part in self.parts:
            inside = (index >= first) & (index < first + len(part))
            if bool(inside.all()):
                yield part, slice(None), index - first
            elif bool(inside.any()):
                yield part, inside.nonzero().squeeze(1), index[inside] - first
            first += len(part)

    def gather(self, index: Tensor) -> Tensor:
        """A copy of the blocks ``index`` int64 [n]: [n, block, ...]."""
        out = self.x.new_empty((len(index), self.block, *self.shape[1:]))
        for part, which, where in self._split(index):
            if isinstance(which, slice):
                return part[where]
            out[which] = part[where]
        return out

    def scatter(self, index: Tensor, values: Tensor) -> None:
        """Writes distinct blocks."""
        for part, which, where in self._split(index):
            part[where] = values[which].to(part.dtype)
        self._write_tail()

    def add(self, index: Tensor, values: Tensor) -> None:
        """Adds to blocks, in the order of ``index`` (blocks may occur twice). Call :meth:`finish` after the last."""
        for part, which, where in self._split(index):
            part.index_add_(0, where, values[which])

    def finish(self) -> None:
        self._write_tail()

    def _write_tail(self) -> None:
        if self.short:
            self.x[-self.short :] = self.tail[0, : self.short].to(self.x.dtype)

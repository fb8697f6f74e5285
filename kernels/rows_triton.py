"""The functions of rows.py in Triton, one kernel each; see there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.launching import Launches, Recording, kinds
from distattn.kernels.rows import Places
from distattn.kernels.walk_triton import UNIT_SIZE
from distattn.kernels.work import query_units

_STORES, _MEANS = Launches(), Launches()
_PACK, _UNPACK, _ADD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _move_part(
    x, flat, at, flat_row, there, batch, head, x_b, x_n, x_h, x_d, WAY: tl.constexpr, DIM: tl.constexpr,
    DIM_2: tl.constexpr,
):  # fmt: skip
    """Rows ``at`` of a head of x, and rows ``flat_row`` of flat, DIM numbers each."""
    d = tl.arange(0, DIM_2).to(tl.int64)
    mask = there[:, None] & (d < DIM)
    x_at = x + batch * x_b + head * x_h + at[:, None] * x_n + d * x_d
    flat_at = flat + flat_row[:, None] * DIM + d
    if WAY == _PACK:
        tl.store(flat_at, tl.load(x_at, mask=mask), mask=mask)
    else:
        values = tl.load(flat_at, mask=mask)
        if WAY == _ADD:
            values += tl.load(x_at, mask=mask)
        tl.store(x_at, values, mask=mask)


@triton.jit(do_not_specialize=["runs", "count"])
def _move_rows(
    x, y, flat, places, runs, count, x_b, x_n, x_h, x_d, y_b, y_n, y_h, y_d,
    WAY: tl.constexpr, HEADS: tl.constexpr, X_DIM: tl.constexpr, X_DIM_2: tl.constexpr, Y_DIM: tl.constexpr,
    Y_DIM_2: tl.constexpr, TENSORS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program (rows, head, batch and tensor): ROWS rows of one head of x or y, of which there is none if TENSORS is 1.

    flat: of each part of the places [batch, its rows, HEADS, X_DIM] of x, then [batch, its rows, HEADS, Y_DIM] of y.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    number = tl.program_id(1)
    batch = (tl.program_id(2) // TENSORS).to(tl.int64)
    there = row < count
    # The last run that begins at or before a row, found bit by bit.
    before = places + runs
    run = tl.zeros([ROWS], tl.int32)
    for step in tl.static_range(STEPS):
        candidate = run + (1 << (STEPS - 1 - step))
        fits = (candidate < runs) & (tl.load(before + tl.minimum(candidate, runs - 1)) <= row)
        run = tl.where(fits, candidate, run)
    at = tl.load(places + run) + row - tl.load(before + run)
    part_begin = tl.load(places + 2 * runs + run)
    part_rows = tl.load(places + 3 * runs + run)
    head = tl.load(places + 4 * runs + number)
    heads = (tl.num_programs(2) // TENSORS) * HEADS  # of all sequences
    begin = part_begin * heads * (X_DIM + Y_DIM)
    flat_row = (batch * part_rows + row - part_begin) * HEADS + number
    if tl.program_id(2) % TENSORS == 0:
        _move_part(x, flat + begin[:, None], at, flat_row, there, batch, head, x_b, x_n, x_h, x_d, WAY, X_DIM, X_DIM_2)
    else:
        begin += part_rows * heads * X_DIM
        _move_part(y, flat + begin[:, None], at, flat_row, there, batch, head, y_b, y_n, y_h, y_d, WAY, Y_DIM, Y_DIM_2)


def _move(tensors: Sequence[Tensor], flat: Tensor, places: Places, way: tl.constexpr) -> None:
    """One launch for one tensor or two."""
    assert 1 <= len(tensors) <= 2
    batch, heads = len(tensors[0]), len(places.heads)
    if not (places.count and heads and flat.numel()):
        return
    given = (*tensors, flat)
    key = (way.value, kinds(given))
    if recorded := places.recordings.get(key):
        recorded.replay(given)
        return
    assert flat.numel() == places.size(tensors)
    recording = Recording(given)
    *parts, flat_part = recording.parts
    dims = [x.shape[3] for x in tensors]
    dims_2 = [triton.next_power_of_2(dim) for dim in dims]
    rows, runs = max(1, 4096 // max(dims_2)), len(places.runs)
    recording.launch(
        _move_rows, (triton.cdiv(places.count, rows), heads, batch * len(tensors)),
        parts[0], parts[-1], flat_part, places.on(flat.device), runs, places.count,
        *tensors[0].stride(), *tensors[-1].stride(), WAY=way.value, HEADS=heads, X_DIM=dims[0],
        X_DIM_2=dims_2[0], Y_DIM=sum(dims[1:]), Y_DIM_2=dims_2[-1], TENSORS=len(tensors), ROWS=rows,
        STEPS=-(-runs.bit_length() // 4) * 4,
    )  # fmt: skip
    if recording.ends(given):
        places.recordings[key] = recording


def pack_rows(tensors: Sequence[Tensor], places: Places) -> Tensor:
    flat = tensors[0].new_empty(places.size(tensors))
    _move(tensors, flat, places, _PACK)
    return flat


def unpack_rows(tensors: Sequence[Tensor], places: Places, flat: Tensor) -> None:
    _move(tensors, flat, places, _UNPACK)


def add_rows(x: Tensor, places: Places, values: Tensor) -> None:
    _move([x], values.contiguous(), places, _ADD)


@triton.jit
def _store_rows(
    x_out, y_out, at, x, y, x_n, x_h, y_n, y_h,
    HEADS: tl.constexpr, X_DIM: tl.constexpr, Y_DIM: tl.constexpr, X_DIM_2: tl.constexpr, Y_DIM_2: tl.constexpr,
    HEADS_2: tl.constexpr,
):  # fmt: skip
    """Program row."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_2)[:, None].to(tl.int64)
    there = tl.load(at + row) * HEADS + head
    d = tl.arange(0, X_DIM_2)
    mask = (head < HEADS) & (d < X_DIM)
    values = tl.load(x + row * x_n + head * x_h + d, mask=mask, other=0.0)
    tl.store(x_out + there * X_DIM + d, values.to(x_out.dtype.element_ty), mask=mask)
    d = tl.arange(0, Y_DIM_2)
    mask = (head < HEADS) & (d < Y_DIM)
    values = tl.load(y + row * y_n + head * y_h + d, mask=mask, other=0.0)
    tl.store(y_out + there * Y_DIM + d, values.to(y_out.dtype.element_ty), mask=mask)


def store_rows(targets: Sequence[Tensor], at: Tensor, rows: Sequence[Tensor]) -> None:
    if at.numel():
        x, y = (x if x.stride(2) == 1 else x.contiguous() for x in rows)
        _STORES.run((*targets, at, x, y), None, _record_store)


def _record_store(recording: Recording) -> None:
    x_out, y_out, at, x, y = recording.parts
    (count, heads, x_dim), y_dim = x.now.shape, y.now.shape[2]
    recording.launch(
        _store_rows, (count,), x_out, y_out, at, x, y, *x.now.stride()[:2], *y.now.stride()[:2], HEADS=heads,
        X_DIM=x_dim, Y_DIM=y_dim, X_DIM_2=triton.next_power_of_2(x_dim), Y_DIM_2=triton.next_power_of_2(y_dim),
        HEADS_2=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip


@triton.jit
def _move_chunk(
    x, flat, at, flat_row, inside, rows, batch, head, x_b, x_n, x_h, x_d,
    WAY: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows ``at`` of a head of x, which has ``rows``, and rows ``flat_row`` of flat, WIDTH numbers apart."""
    d = tl.arange(0, DIM_2).to(tl.int64)
    inside = inside[:, None] & (d < DIM)
    there = inside & (at < rows)[:, None]
    x_at = x + batch * x_b + head * x_h + at[:, None] * x_n + d * x_d
    flat_at = flat + flat_row[:, None] * WIDTH + d
    if WAY == _PACK:
        tl.store(flat_at, tl.load(x_at, mask=there, other=0.0), mask=inside)
    else:
        tl.store(x_at, tl.load(x_at, mask=there) + tl.load(flat_at, mask=there), mask=there)


@triton.jit(do_not_specialize=["rows"])
def _move_chunks(
    x, y, flat, pages, heads, rows, x_b, x_n, x_h, x_d, y_b, y_n, y_h, y_d, WAY: tl.constexpr, CHUNK: tl.constexpr,
    X_DIM: tl.constexpr, X_DIM_2: tl.constexpr, Y_DIM: tl.constexpr, Y_DIM_2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (number, rows, batch and tensor): ROWS rows of one chunk between x or y, which have ``rows`` rows, and
    flat [n, batch, CHUNK, X_DIM + Y_DIM]."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    batch = (tl.program_id(2) // 2).to(tl.int64)
    at = tl.load(pages + number).to(tl.int64) * CHUNK + row
    head = tl.load(heads + number)
    flat_row = (number * (tl.num_programs(2) // 2) + batch) * CHUNK + row
    inside = row < CHUNK
    if tl.program_id(2) % 2 == 0:
        _move_chunk(
            x, flat, at, flat_row, inside, rows, batch, head, x_b, x_n, x_h, x_d, WAY, X_DIM, X_DIM_2, X_DIM + Y_DIM
        )  # fmt: skip
    else:
        _move_chunk(
            y, flat + X_DIM, at, flat_row, inside, rows, batch, head, y_b, y_n, y_h, y_d, WAY, Y_DIM, Y_DIM_2,
            X_DIM + Y_DIM,
        )  # fmt: skip


def _chunks(tensors: tuple[Tensor, Tensor], flat: Tensor, page: Tensor, head: Tensor, way: tl.constexpr) -> None:
    if not flat.numel():
        return
    x, y = tensors
    batch, chunk = flat.shape[1:3]
    dims_2 = [triton.next_power_of_2(x.shape[3]) for x in tensors]
    rows = min(max(1, 8192 // max(dims_2)), triton.next_power_of_2(chunk))
    _move_chunks[(len(page), triton.cdiv(chunk, rows), 2 * batch)](
        x, y, flat, page, head, x.shape[1], *x.stride(), *y.stride(), WAY=way.value, CHUNK=chunk, X_DIM=x.shape[3],
        X_DIM_2=dims_2[0], Y_DIM=y.shape[3], Y_DIM_2=dims_2[1], ROWS=rows,
    )  # fmt: skip


def take_chunks(tensors: tuple[Tensor, Tensor], page: Tensor, head: Tensor, chunk: int) -> Tensor:
    x, y = tensors
    taken = x.new_empty((len(page), x.shape[0], chunk, x.shape[3] + y.shape[3]))
    _chunks(tensors, taken, page, head, _PACK)
    return taken


def add_chunks(tensors: tuple[Tensor, Tensor], page: Tensor, head: Tensor, values: Tensor) -> None:
    _chunks(tensors, values, page, head, _ADD)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _copy_tiles(
    x, out, chosen, units, tokens, tiles, x_b, x_n, x_h, out_b, out_n, out_h,
    BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (rows, head, batch)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = units + tl.program_id(1) * UNIT_SIZE
    head, batch = tl.load(unit + 1).to(tl.int64), tl.program_id(2).to(tl.int64)
    there = row < tokens
    there &= tl.load(chosen + tl.load(unit) * tiles + row // BLOCK, mask=there, other=0) != 0
    d = tl.arange(0, DIM_2)
    mask = there[:, None] & (d < DIM)
    row = row.to(tl.int64)[:, None]
    values = tl.load(x + batch * x_b + head * x_h + row * x_n + d, mask=mask)
    tl.store(out + batch * out_b + head * out_h + row * out_n + d, values.to(out.dtype.element_ty), mask=mask)


def copy_tiles(x: Tensor, out: Tensor, tiles: Tensor, head_table: tuple[int, ...], block: int) -> None:
    batch, tokens, heads, dim = x.shape
    if not x.numel():
        return
    assert x.stride(3) == out.stride(3) == 1
    units, *_ = query_units(head_table, heads, 1, x.device)
    dim_2 = triton.next_power_of_2(dim)
    rows = max(1, 8192 // dim_2)
    _copy_tiles[(triton.cdiv(tokens, rows), heads, batch)](
        x, out, tiles.to(torch.int8), units, tokens, tiles.shape[1], *x.stride()[:3], *out.stride()[:3],
        BLOCK=block, DIM=dim, DIM_2=dim_2, ROWS=rows,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _merge(
    out, lse, other_out, other_lse, merged, merged_lse, rows, DIM: tl.constexpr, DIM_2: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    a = tl.load(lse + row, mask=there, other=float("-inf"))
    b = tl.load(other_lse + row, mask=there, other=float("-inf"))
    high = tl.maximum(tl.maximum(a, b), -1e30)  # finite, so that rows without keys weigh nothing
    share, other_share = tl.exp(a - high), tl.exp(b - high)
    total = share + other_share
    whole = tl.where(total == 0.0, 1.0, total)
    d = tl.arange(0, DIM_2)
    mask = there[:, None] & (d < DIM)
    at = row[:, None] * DIM + d
    values = tl.load(out + at, mask=mask) * (share / whole)[:, None]
    values += tl.load(other_out + at, mask=mask) * (other_share / whole)[:, None]
    tl.store(merged + at, values, mask=mask)
    tl.store(merged_lse + row, tl.where(total == 0.0, float("-inf"), high + tl.log(whole)), mask=there)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    parts = [x.contiguous() for x in (out, lse, other_out, other_lse)]
    merged, merged_lse = torch.empty_like(parts[0]), torch.empty_like(parts[1])
    dim = out.shape[-1]
    dim_2 = triton.next_power_of_2(dim)
    rows = max(1, 4096 // dim_2)
    if lse.numel():
        _merge[(triton.cdiv(lse.numel(), rows),)](
            *parts, merged, merged_lse, lse.numel(), DIM=dim, DIM_2=dim_2, ROWS=rows
        )
    return merged, merged_lse


@triton.jit(do_not_specialize=["rows"])
def _gate(
    gates, grad, x0, x1, x2, out, d0, d1, d2, d_gates, rows, DIM: tl.constexpr, DIM_2: tl.constexpr,
    PARTS: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All tensors contiguous: rows x DIM, but gates and d_gates rows x PARTS."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    d = tl.arange(0, DIM_2)
    mask = there[:, None] & (d < DIM)
    at = row[:, None] * DIM + d
    total = tl.zeros([ROWS, DIM_2], tl.float32)
    if BACKWARD:
        total = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(PARTS):
        x = x0 if i == 0 else (x1 if i == 1 else x2)
        dx = d0 if i == 0 else (d1 if i == 1 else d2)
        weight = tl.sigmoid(tl.load(gates + row * PARTS + i, mask=there, other=0.0).to(tl.float32))
        part = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            tl.store(dx + at, (total * weight[:, None]).to(dx.dtype.element_ty), mask=mask)
            product = tl.sum(total * part, 1) * weight * (1.0 - weight)
            tl.store(d_gates + row * PARTS + i, product.to(d_gates.dtype.element_ty), mask=there)
        else:
            total += part * weight[:, None]
    if not BACKWARD:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def _launch_gate(
    parts: Sequence[Tensor], gates: Tensor, grad: Tensor | None, out: Tensor, d_parts: Sequence[Tensor], d_gates: Tensor
) -> None:
    three, d_three = ([*x, *[x[0]] * (3 - len(x))] for x in ([x.contiguous() for x in parts], d_parts))
    dim = parts[0].shape[3]
    dim_2 = triton.next_power_of_2(dim)
    rows = max(1, 4096 // dim_2)
    if out.numel():
        _gate[(triton.cdiv(out.numel() // dim, rows),)](
            gates.contiguous(), out if grad is None else grad.contiguous(), *three, out, *d_three, d_gates,
            out.numel() // dim, DIM=dim, DIM_2=dim_2, PARTS=len(parts), BACKWARD=grad is not None, ROWS=rows,
        )  # fmt: skip


def gate(parts: Sequence[Tensor], gates: Tensor) -> Tensor:
    out = torch.empty(parts[0].shape, dtype=parts[0].dtype, device=parts[0].device)
    _launch_gate(parts, gates, None, out, [out], gates)
    return out


def gate_backward(grad: Tensor, parts: Sequence[Tensor], gates: Tensor) -> tuple[list[Tensor], Tensor]:
    d_parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in parts]
    d_gates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    _launch_gate(parts, gates, grad, d_parts[0], d_parts, d_gates)
    return d_parts, d_gates


@triton.jit(do_not_specialize=["rows", "chunk"])
def _chunk_means(
    x, left_out, means, counts, rows, chunk, x_b, x_n, x_h, x_d, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_2: tl.constexpr, SOME_LEFT_OUT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (chunk and head, batch). Heads of a row lie beside each other, and so do the programs that read them."""
    number, head, batch = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1).to(tl.int64)
    head = head.to(tl.int64)
    d = tl.arange(0, DIM_2).to(tl.int64)
    first = number.to(tl.int64) * chunk
    size = tl.minimum(rows - first, chunk)
    total = tl.zeros([DIM_2], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for start in range(0, size, ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < size
        if SOME_LEFT_OUT:
            there &= tl.load(left_out + first + row, mask=there, other=1) == 0
        at = x + batch * x_b + head * x_h + (first + row)[:, None] * x_n + d * x_d
        total += tl.sum(tl.load(at, mask=there[:, None] & (d < DIM), other=0.0).to(tl.float32), 0)
        count += there.to(tl.float32)
    kept = tl.sum(count, 0)
    out = (batch * tl.num_programs(0) + tl.program_id(0)) * DIM
    tl.store(means + out + d, total / tl.maximum(kept, 1.0), mask=d < DIM)
    if (head == 0) & (batch == 0):
        tl.store(counts + number, kept)


def chunk_means(x: Tensor, chunk: int, left_out: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, rows, heads, dim = x.shape
    chunks = -(-rows // chunk)
    means = x.new_zeros((batch, chunks, heads, dim), dtype=torch.float32)
    counts = x.new_zeros(chunks, dtype=torch.float32)
    if means.numel():
        some = x if left_out is None else left_out.view(torch.int8)
        numbers = chunk, left_out is not None
        _MEANS.run((x, some, means, counts), numbers, partial(_record_means, *numbers))
    return means, counts


def _record_means(chunk: int, some_left_out: bool, recording: Recording) -> None:
    x, left_out, means, counts = recording.parts
    batch, rows, heads, dim = x.now.shape
    dim_2 = triton.next_power_of_2(dim)
    recording.launch(
        _chunk_means, (triton.cdiv(rows, chunk) * heads, batch),
        x, left_out, means, counts, rows, chunk, *x.now.stride(), HEADS=heads, DIM=dim, DIM_2=dim_2,
        SOME_LEFT_OUT=some_left_out, ROWS=min(64, max(1, 4096 // dim_2)),
        num_warps=2,  # 3.0 ms for 8.6 GB where four took 5.2
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "chunk", "chunks"])
def _chunk_means_backward(
    grad, counts, left_out, dx, rows, chunk, chunks, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
    SOME_LEFT_OUT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (rows, head, batch); grad [batch, chunks, HEADS, DIM] and dx [batch, rows, HEADS, DIM] are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    there = row < rows
    d = tl.arange(0, DIM_2)
    mask = there[:, None] & (d < DIM)
    number = row // chunk
    share = 1.0 / tl.maximum(tl.load(counts + number, mask=there, other=1.0), 1.0)
    if SOME_LEFT_OUT:
        share = tl.where(tl.load(left_out + row, mask=there, other=1) == 0, share, 0.0)
    values = tl.load(grad + ((batch * chunks + number) * HEADS + head)[:, None] * DIM + d, mask=mask, other=0.0)
    at = dx + ((batch * rows + row) * HEADS + head)[:, None] * DIM + d
    tl.store(at, (values * share[:, None]).to(dx.dtype.element_ty), mask=mask)


def chunk_means_backward(
    grad: Tensor, counts: Tensor, rows: int, chunk: int, left_out: Tensor | None, dtype: torch.dtype
) -> Tensor:
    batch, chunks, heads, dim = grad.shape
    dx = grad.new_empty((batch, rows, heads, dim), dtype=dtype)
    if dx.numel():
        dim_2 = triton.next_power_of_2(dim)
        step = max(1, 4096 // dim_2)
        _chunk_means_backward[(triton.cdiv(rows, step), heads, batch)](
            grad.contiguous(), counts, counts if left_out is None else left_out.to(torch.int8), dx, rows, chunk, chunks,
            HEADS=heads, DIM=dim, DIM_2=dim_2, SOME_LEFT_OUT=left_out is not None, ROWS=step,
        )  # fmt: skip
    return dx

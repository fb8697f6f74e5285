#!/usr/bin/env python3
"""Attention of one step of decoding on one GPU (or CPU), bfloat16, 32 query heads and 8 key heads of 128.

    python scripts/bench_decode.py [--cases NAME ...] [--rounds 20] [--shrink 1] [--profile] [--csv FILE]
    python scripts/bench_decode.py --launches       # how the kernel is best launched, for the dense case
    torchrun --nproc-per-node=4 scripts/bench_decode.py --cases 'dense, 1M'     # the cache sharded over 4 GPUs

Cases with one sequence are a step of a cache that holds it; its content is random. "ms" is the time that the GPU needs:
the step is captured in a CUDA graph, which is launched while the GPU has other work and its cache other content.
"eager_ms" is that of a call, the host's part of it included. "visited" is the share of the cached keys that are read,
"GB/s" what is read a second, and "of copy" as a share of what a copy on the device reads and writes in the same
process. Pages lie in random order. Each result is compared with float64 or, where queries choose, with what was not
captured. "kernels" is how many kernels and copies an eager call is on the GPU; with --profile each is printed, with its
time. Where a tile chooses, the step is one of the 63 of 64 that keep a choice. On several GPUs nothing is captured, and
"ms" is "eager_ms" on the rank that has the query; "GB/s" is of all of them. The batch is of 64 ragged sequences, beside
FlexAttention and PyTorch's attention on tensors that are padded to the longest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from measuring import add_output, here, positive, write_rows
from torch import Tensor
from torch.autograd import DeviceType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from distattn import decoding, presets, reference
from distattn.cache import Cache
from distattn.extras import AttentionExtras
from distattn.kernels.decode import Source, decode_attention
from distattn.kernels.masks import Masks
from distattn.kernels.selected import AnyTable, SelectedTable
from distattn.kernels.table import TileTable
from distattn.levels import packed
from distattn.patterns import Dense
from distattn.retrieval import Quest
from distattn.spec import AttentionSpec

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 128
SCALE = DIM**-0.5
MILLION = 1_048_576


class Case(NamedTuple):
    """retrieve: pages by Quest's bound. sequences: of ragged lengths up to ``length``, or one of that length."""

    length: int
    spec: AttentionSpec
    retrieve: int | None = None
    sequences: int = 1


CHOOSES = presets.hierarchical(1024, (64, 1024), (64,), 16, "token", global_keys=range(64))
CHOOSES_BY_TILE = presets.hierarchical(1024, (64, 1024), (64,), 16, "tile", global_keys=range(64))
CASES = {
    "dense, 1M": Case(MILLION, presets.dense()),
    "Quest, 128 pages, 1M": Case(MILLION, presets.dense(), retrieve=128),
    "hierarchical, 1M": Case(MILLION, CHOOSES),
    "hierarchical, a choice a tile, 1M": Case(MILLION, CHOOSES_BY_TILE),
    "window 4,096 and 64 globals, 1M": Case(MILLION, presets.longformer(4095, 1, range(64), causal=True)),
    # Padded keys of 32,768 tokens would have 2^31 elements, for which FlexAttention is not compiled.
    "64 ragged sequences up to 32,640": Case(32_640, presets.dense(), sequences=64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="NAME", help=f"of {[*CASES]}")
    parser.add_argument("--rounds", type=positive, default=20)
    parser.add_argument("--shrink", type=positive, default=1, help="divides lengths, to try the script")
    parser.add_argument("--profile", action="store_true", help="prints the kernels of a call and their time")
    parser.add_argument("--launches", action="store_true", help="times ways to launch the kernel instead")
    add_output(parser)
    options = parser.parse_args()
    mesh = joined()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    copied = copy_speed(device)
    rows: list[dict[str, object]] = []
    first = mesh is None or mesh.get_rank() == 0
    if first:
        print(f"copy on the device: {copied / 1e9:,.0f} GB/s read and written")

    def add(**row: object) -> None:
        if not first:
            return
        print(", ".join(f"{name} {f'{x:.4g}' if isinstance(x, float) else x}" for name, x in row.items()), flush=True)
        rows.append({**here(options.commit), **row})

    if options.launches:
        for row in launches(max(MILLION // options.shrink, 4 * BLOCK), dtype, device, options.rounds):
            add(**row)
    for name in [] if options.launches else options.cases:
        case = CASES[name]
        case = case._replace(length=max(case.length // options.shrink, 4 * BLOCK))
        if case.sequences == 1:
            found = one(case, dtype, device, options, mesh)
        elif mesh is None:
            found = ragged(case, dtype, device, options)
        else:
            continue
        for row in found:
            speed = row.pop("read") / row["ms"] * 1e3
            ranks = 1 if mesh is None else mesh.size()
            add(case=name, ranks=ranks, length=case.length, **row, **{"GB/s": speed / 1e9, "of copy": speed / copied})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.csv and first:
        write_rows(options.csv, rows)


def joined() -> DeviceMesh | None:
    """The ranks that torchrun has started; None if it has not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return init_device_mesh(kind, (dist.get_world_size(),))


def copy_speed(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.zeros((1 << 31 if device.type == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(times(lambda: target.copy_(source), 10, device)) * 1e3


def one(
    case: Case, dtype: torch.dtype, device: torch.device, options: Any, mesh: DeviceMesh | None
) -> Iterator[dict[str, Any]]:
    """One sequence in a cache gets one token."""
    torch.manual_seed(0)
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": dtype, "device": device}
    retrieve = None if case.retrieve is None else Quest(max(case.retrieve // options.shrink, 1))
    cache = Cache([case.spec], tokens=case.length, retrieve=retrieve, mesh=mesh, **sizes)
    shuffle(cache)
    sequence = cache.add()
    # Written by hand: reading a million tokens is another script's matter. The last page is not filled, so that the
    # step may run again and again.
    cache.tables.append({sequence: case.length - BLOCK // 2})
    filled = [cache.k[0], cache.v[0]]
    if (levels := cache.levels[0]) is not None:
        filled += [levels.k, levels.v] if case.retrieve is None else [levels.high, levels.low]
    for x in filled:
        x.normal_()
    if case.retrieve is not None:
        levels.high.abs_(), levels.low.abs_().neg_()
    step = cache.begin({sequence: 1})
    mine = len(step.positions)
    q, k, v = (torch.randn(1, mine, heads, DIM, device=device, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def attend() -> Tensor:
        return step.attend(0, q, k, v, scale=SCALE, extras=AttentionExtras())

    with counted() as visits:
        out = attend()
    keys = torch.tensor(float(sum(visits)), device=device)
    if mesh is not None:
        dist.all_reduce(keys)
    replay, result = captured(attend, device) if mesh is None else (attend, attend)
    if mesh is not None:
        error = reference.max_error(result(), out)
    elif case.spec.is_static and case.retrieve is None:
        expected = row_of(cache, sequence, q, case.spec)
        error = reference.max_error(out[0], expected)
    else:
        error = reference.max_error(result(), out)
    assert error < 2e-2, f"{case}: error {error}"
    itemsize = torch.empty(0, dtype=dtype).itemsize
    read = float(keys) * KV_HEADS * 2 * DIM * itemsize
    gpu = statistics.median(times(replay, options.rounds, device, behind=mesh is None))
    eager = statistics.median(times(attend, options.rounds, device))
    yield {
        "kernel": "distattn",
        "ms": gpu,
        "eager_ms": eager,
        "visited": float(keys) / case.length,
        "error": error,
        "kernels": launched(attend, device, options.profile),
        "read": read,
    }


def launched(run: Callable[[], object], device: torch.device, told: bool) -> int:
    """How many kernels and copies one call is on the GPU; on a CPU 0. told: they are printed, in their order."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = [event for event in found.events() or [] if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    for event in events if told else ():
        print(f"    {event.time_range.elapsed_us():9.2f} us  {event.name[:100]}")
    return len(events)


def shuffle(cache: Cache) -> None:
    """Blocks are handed out in random order then, as after much use."""
    tables = cache.tables
    sequences = [tables.add() for _ in range(tables.blocks * tables.world_size)]
    tables.append(dict.fromkeys(sequences, 1))
    for number in np.random.default_rng(0).permutation(sequences).tolist():
        tables.free(number)


def row_of(cache: Cache, sequence: int, q: Tensor, spec: AttentionSpec) -> Tensor:
    """The last row of a sequence in float64, [1, heads, dim]."""
    owner, block = cache.tables.pages(sequence)
    length = cache.tables.length(sequence)
    at = torch.from_numpy(block.astype(np.int64)).to(q.device)
    k, v = (x[0].unflatten(0, (-1, BLOCK))[at].flatten(0, 1)[None, :length] for x in (cache.k, cache.v))
    return reference.attention_rows(q, torch.tensor([length - 1]), k, v, spec.tokens, SCALE)[0][0]


@contextmanager
def counted() -> Iterator[list[float]]:
    """Collects how many keys each launch visits, as a mean over key/value heads."""
    found: list[float] = []
    kept = decoding.decode_attention

    def count(q: Tensor, sources: Sequence[Source], **more: Any) -> Any:
        found.extend(keys_of(source.table) for source in sources)
        return kept(q, sources, **more)

    decoding.decode_attention = count
    try:
        yield found
    finally:
        decoding.decode_attention = kept


def keys_of(table: AnyTable) -> float:
    table = table.on_host if isinstance(table, SelectedTable) else table
    keys = int(table.full_count.sum()) * table.block_k
    return (keys + int(table.masks.allowed[table.part_mask].sum())) / table.tables


def ragged(case: Case, dtype: torch.dtype, device: torch.device, options: Any) -> Iterator[dict[str, Any]]:
    """Sequences of random lengths, and what others make of them when they are padded."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(case.length // 32, case.length, case.sequences)
    lengths[0] = case.length
    pages = -(-lengths // BLOCK)
    order = generator.permutation(int(pages.sum()))
    table = paged_table(lengths, order)
    torch.manual_seed(0)
    q = torch.randn(case.sequences, HEADS, DIM, device=device, dtype=dtype)
    k, v = (torch.randn(len(order) * BLOCK, KV_HEADS, DIM, device=device, dtype=dtype) for _ in range(2))

    def ours() -> Tensor:
        return decode_attention(q, [Source(k, v, table)], scale=SCALE, dtype=dtype)[0]

    # The same keys, padded: [batch, kv_heads, longest, dim].
    first = np.concatenate(([0], pages.cumsum()))
    longest = int(pages.max()) * BLOCK
    padded = [torch.zeros(case.sequences, KV_HEADS, longest, DIM, device=device, dtype=dtype) for _ in range(2)]
    for number in range(case.sequences):
        at = torch.from_numpy(order[first[number] : first[number + 1]]).to(device)
        for target, x in zip(padded, (k, v), strict=True):
            rows = x.unflatten(0, (-1, BLOCK))[at].flatten(0, 1)
            target[number, :, : len(rows)] = rows.transpose(0, 1)
    there = torch.arange(longest, device=device) < torch.from_numpy(lengths).to(device)[:, None]
    queries = q.unsqueeze(2)
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {"distattn": lambda: ours}
    for name, backend in (("cuDNN, padded", SDPBackend.CUDNN_ATTENTION), ("SDPA, padded", None)):
        makers[name] = lambda backend=backend: padded_attention(queries, *padded, there, backend)
    if device.type == "cuda":
        makers["FlexAttention, padded"] = lambda: flex_attention(queries, *padded, lengths)
    itemsize = torch.empty(0, dtype=dtype).itemsize
    read = int(lengths.sum()) * KV_HEADS * 2 * DIM * itemsize
    runs: dict[str, Callable[[], Tensor]] = {}
    errors: dict[str, float] = {}
    sampled = [0, case.sequences // 2, case.sequences - 1]
    for name, make in makers.items():
        try:
            runs[name] = make()
            out = runs[name]().view(case.sequences, HEADS, DIM)
        except Exception as error:  # such as a backend that does not take these shapes
            print(f"{name} does not run: {str(error).splitlines()[0]}")
            runs.pop(name, None)
            continue
        errors[name] = max(
            reference.max_error(
                out[n : n + 1],
                reference.attention_rows(
                    q[n : n + 1].unsqueeze(1),
                    torch.zeros(1, dtype=torch.int64),
                    *(x[n : n + 1, :, : lengths[n]].transpose(1, 2) for x in padded),
                    Dense(),
                    SCALE,
                )[0][:, 0],
            )
            for n in sampled
        )
        assert errors[name] < 2e-2, f"{name}: error {errors[name]}"
    measured: dict[str, list[float]] = {name: [] for name in runs}
    replays = {name: captured(run, device)[0] if name == "distattn" else run for name, run in runs.items()}
    for _ in range(options.rounds):  # one after the other, since the GPU slows down as it gets warm
        for name, run in replays.items():
            measured[name] += times(run, 1, device, behind=True)
    for name, found in measured.items():
        eager = statistics.median(times(runs[name], options.rounds, device))
        yield {
            "kernel": name, "ms": statistics.median(found), "eager_ms": eager, "visited": 1.0, "error": errors[name],
            "kernels": launched(runs[name], device, options.profile), "read": read,
        }  # fmt: skip


def paged_table(lengths: np.ndarray, order: np.ndarray) -> TileTable:
    """Sequences that attend to all of their keys; page i of them all, one after the other, is page order[i]."""
    pages, rest = -(-lengths // BLOCK), lengths % BLOCK
    row = np.repeat(np.arange(len(lengths)), pages)
    last = np.zeros(len(row), np.bool_)
    last[pages.cumsum() - 1] = True
    partial = last & (rest[row] > 0)
    words = packed(np.arange(BLOCK) < rest[row[partial], None]).view(np.uint32)[:, None]
    ptr = [np.concatenate(([0], np.bincount(row[x], minlength=len(lengths)).cumsum())) for x in (~partial, partial)]
    return TileTable(
        block_q=1,
        block_k=BLOCK,
        tiles=len(lengths),
        own_pages=len(order),
        guest_pages=0,
        head_table=(0,) * HEADS,
        full_ptr=ptr[0].astype(np.int32),
        full_first=order[~partial].astype(np.int32),
        full_count=np.ones(int((~partial).sum()), np.int32),
        part_ptr=ptr[1].astype(np.int32),
        part_page=order[partial].astype(np.int32),
        part_mask=np.arange(int(partial.sum()), dtype=np.int32),
        masks=Masks(BLOCK, words),
    )


def padded_attention(q: Tensor, k: Tensor, v: Tensor, there: Tensor, backend: Any) -> Callable[[], Tensor]:
    mask = there[:, None, None]

    def run() -> Tensor:
        if backend is None:
            return scaled_dot_product_attention(q, k, v, mask, scale=SCALE, enable_gqa=True)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, mask, scale=SCALE, enable_gqa=True)

    return run


def flex_attention(q: Tensor, k: Tensor, v: Tensor, lengths: np.ndarray) -> Callable[[], Tensor]:
    from torch.nn.attention import flex_attention as flex

    length = torch.from_numpy(lengths).to(q.device)

    def exists(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < length[b]

    mask = flex.create_block_mask(exists, len(lengths), None, 1, k.shape[2], device=str(q.device))
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, scale=SCALE, enable_gqa=True)


def launches(length: int, dtype: torch.dtype, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """The dense kernel with other numbers of keys at a time, stages, warps, and programs."""
    from distattn.kernels import decode_triton

    assert device.type == "cuda", "ways to launch a kernel are of interest on a GPU"
    order = np.random.default_rng(0).permutation(length // BLOCK)
    q = torch.randn(1, HEADS, DIM, device=device, dtype=dtype)
    k, v = (torch.randn(length, KV_HEADS, DIM, device=device, dtype=dtype) for _ in range(2))
    out, lse = torch.empty(1, HEADS, DIM, device=device), torch.empty(1, HEADS, device=device)
    for programs in (1, 2, 4, 8):
        for columns, stages, warps in ((32, 4, 4), (64, 3, 4), (64, 4, 4), (64, 5, 4), (128, 3, 4), (128, 3, 8)):
            table = paged_table(np.asarray([length]), order)

            how = decode_triton.How(columns, stages, warps, programs)

            def run(table: TileTable = table, how: decode_triton.How = how) -> None:
                decode_triton.decode(q, [Source(k, v, table)], out, lse, SCALE, how)

            try:
                ms = statistics.median(times(run, rounds, device))
            except Exception as error:  # too much shared memory
                print(f"{how} does not run: {str(error).splitlines()[0]}")
                continue
            speed = (k.nbytes + v.nbytes) / ms / 1e6
            yield {
                "programs": programs, "columns": columns, "stages": stages, "warps": warps, "ms": ms, "GB/s": speed,
            }  # fmt: skip


def captured(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Callable[[], Tensor]]:
    """(what replays it, what replays it and gives the result), after it has run three times; on a CPU itself."""
    if device.type != "cuda":
        return run, run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def result() -> Tensor:
        graph.replay()
        return out

    return graph.replay, result


def times(run: Callable[[], object], rounds: int, device: torch.device, behind: bool = False) -> list[float]:
    """Milliseconds of each round, after one that does not count.

    behind: other work of the device, as in a model: then the host's part of launching is not in it, and the device's
    cache holds something else.
    """
    run()
    found = []
    other = torch.empty(1 << 30 if behind and device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    for _ in range(rounds):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            other.zero_()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            found.append(start.elapsed_time(stop))
        else:
            began = time.perf_counter()
            run()
            found.append((time.perf_counter() - began) * 1e3)
    return found


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Measures the speeds from which the cost model foretells times, and writes them as a machine file.

    python scripts/calibrate.py --output h100.json                                  # one GPU, or the CPU
    torchrun --nproc-per-node=4 scripts/calibrate.py --output h100x4.json           # exchanges, too

Kernels are measured with the product's own entrances, on tables that `make_plan` made or that look like those which are
made when chunks are chosen; their times are split by least squares into what a visit, a row of tiles and a mask take.
Exchanges are measured in the three forms in which rows travel, from 64 KiB to 256 MiB a rank, and beside a kernel. What
this run cannot measure (exchanges on one GPU, what lies between nodes) is taken from `--base` and marked as assumed.

`distattn.machine.Machine.load("h100x4.json")`, `plan.explain(machine=...)` and `distattn job=plan job.machine=...` read
the file. It takes about half a minute on H100s, and as long again for kernels that Triton must compile first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from bench_kernels import seconds
from measuring import here, in_a_folder, positive
from torch import Tensor

from distattn import presets
from distattn.attend import attend
from distattn.exchange import Counter, Exchange
from distattn.extras import AttentionExtras
from distattn.kernels.attention import Biases, Pages, attention_backward, attention_forward, row_deltas
from distattn.kernels.rows import Places, pack_rows, unpack_rows
from distattn.kernels.selected import AnyTable, SelectedTable
from distattn.kernels.table import TileTable
from distattn.launch.ranks import prepare_nccl
from distattn.machine import DRAG, EXCHANGES, HOST, ChoiceSpeed, Curve, KernelSpeed, Machine
from distattn.patterns import BlockSparse, Causal, GlobalKeys, Pattern, SlidingWindow
from distattn.plan import Plan, make_plan
from distattn.selection import choose, scorers_of, summary_table
from distattn.spec import AttentionSpec
from distattn.summaries import gather_summaries, pool_own

SMALLEST, LARGEST = 1 << 16, 1 << 28  # bytes a rank
SUMMARY_PAGE = 32  # rows of a page of summaries where chunks are chosen


class Setting(NamedTuple):
    """Sizes of what is measured, and on what.

    length: tokens of the longest case; heads, kv_heads, dim: as everywhere.
    """

    device: torch.device
    dtype: torch.dtype
    length: int
    heads: int
    kv_heads: int
    dim: int
    rounds: int

    def random(self, length: int, heads: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(1, length, heads, self.dim, device=self.device, dtype=dtype or self.dtype)

    def plan(self, spec: AttentionSpec, length: int, block: int = 128) -> Plan:
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.dim}
        return make_plan(spec, length, **sizes, block_q=block, block_k=block)


class Launch(NamedTuple):
    """What is visited by the query tiles of all heads, and how it is run: way -> call."""

    name: str
    visits: float
    rows: float
    masked: float
    runs: dict[str, Callable[[], object]]


def median(run: Callable[[], object], s: Setting, rounds: int | None = None) -> tuple[float, float]:
    """(seconds on the device, seconds of the host) after a warm-up."""
    for _ in range(2):
        run()
    took = [seconds(run, s.device) for _ in range(rounds or s.rounds)]
    return statistics.median(x for x, _ in took), statistics.median(x for _, x in took)


def runs_of(
    q: Tensor, own: Pages, table: Callable[[], AnyTable], bias: bool, ways: Sequence[str]
) -> dict[str, Callable[[], object]]:
    """Calls of the tile kernels as passes make them; ``table`` is asked each time, as it is made each time."""
    nobody = Pages(own.k[:, :0], own.v[:, :0])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    summed, summed_lse = torch.zeros_like(q, dtype=wide), torch.zeros_like(lse)
    zeros = [torch.zeros(own.k.shape[:3], dtype=wide, device=q.device) for _ in range(2)]
    biases = Biases(zeros[0], zeros[0][:, :0]) if bias else None
    d_bias = Biases(zeros[1], zeros[1][:, :0]) if bias else None
    grad, grad_lse = torch.randn_like(q), torch.zeros_like(lse)
    attention_forward(q, own, nobody, table(), summed, lse, scale=q.shape[3] ** -0.5, bias=biases)
    out.copy_(summed)
    delta = row_deltas(out, grad, grad_lse)
    # What one launch makes is written in 16 bits; what several add to, as beside summaries, is summed up in 32.
    kind = wide if bias or "forward" not in ways else q.dtype
    dq, dk, dv = (torch.zeros_like(x, dtype=kind) for x in (q, *own))

    def forward() -> None:
        attention_forward(q, own, nobody, table(), out, lse, scale=q.shape[3] ** -0.5, bias=biases)

    def resume() -> None:
        attention_forward(
            q, own, nobody, table(), summed, summed_lse, scale=q.shape[3] ** -0.5, before=summed, bias=biases
        )

    def backward() -> None:
        some = Pages(dk, dv), Pages(dk[:, :0], dv[:, :0])
        scale = q.shape[3] ** -0.5
        attention_backward(
            q, own, nobody, table(), grad, lse, delta, dq, *some, scale=scale, bias=biases, d_bias=d_bias
        )

    every = {"forward": forward, "resume": resume, "backward": backward}
    return {way: every[way] for way in ways}


def blocks_a_row(length: int, block: int, take: int) -> Pattern:
    """So many random blocks a row."""
    rows = length // block
    take = min(take, rows)
    generator = np.random.default_rng(0)
    columns = [np.sort(generator.choice(rows, take, replace=False)) for _ in range(rows)]
    return BlockSparse(np.arange(rows + 1) * take, np.concatenate(columns), block)


def planned(
    s: Setting,
    name: str,
    pattern: Pattern,
    length: int,
    ways: Sequence[str],
    bias: bool = False,
    block: int = 128,
    dtype: torch.dtype | None = None,
) -> Launch:
    """A launch of a table that was planned."""
    q = s.random(length, s.heads, dtype)
    own = Pages(s.random(length, s.kv_heads, dtype), s.random(length, s.kv_heads, dtype))
    table: TileTable = s.plan(AttentionSpec(pattern), length, block).stages[0].table
    visits = s.heads * float((table.full_pages + table.part_pages).sum())
    return Launch(
        name,
        visits,
        float(s.heads * table.tiles),
        s.heads * float(table.part_pages.sum()),
        runs_of(q, own, lambda: table, bias, ways),
    )


def chosen(s: Setting, name: str, tile: int, page: int, pages: int, take: int, length: int, masks: bool) -> Launch:
    """A launch of a table that was made on the device: ``take`` of ``pages`` pages for each tile of queries.

    masks: of one row, with a bias of keys, as those of summaries.
    """
    q = s.random(length, s.heads)
    own = Pages(s.random(pages * page, s.kv_heads), s.random(pages * page, s.kv_heads))
    tiles, share, take = length // tile, s.heads // s.kv_heads, min(take, pages)
    drawn = torch.rand(s.kv_heads, tiles, pages, device=s.device).topk(take).indices
    selected = drawn.sort(dim=-1).values.int()
    words = torch.full((s.kv_heads, tiles, take, 1, -(-page // 32)), -1, dtype=torch.int32, device=s.device)
    head_table = tuple(head // share for head in range(s.heads))

    def table() -> SelectedTable:
        return SelectedTable(tile, page, tiles, pages, 0, head_table, selected, words if masks else None)

    visits = float(s.heads * tiles * take)
    runs = runs_of(q, own, table, masks, ("resume", "backward"))
    return Launch(name, visits, float(s.heads * tiles), 0.0, runs)


class Case(NamedTuple):
    """Launches of one kind and size, by which a KernelSpeed is found."""

    kind: str
    blocks: tuple[int, int]
    itemsize: int
    launches: Callable[[Setting], list[Launch]]


def cases(s: Setting) -> list[Case]:
    both = ("forward", "resume", "backward")
    long, short = s.length, s.length // 2
    window = SlidingWindow(max(long // 8, 256) - 1, 0)
    far = Causal() & (window | GlobalKeys(range(64)))

    def patterns(s: Setting) -> list[Launch]:
        return [
            planned(s, "16 blocks a row", blocks_a_row(short, 128, 16), short, both),
            planned(s, "64 blocks a row", blocks_a_row(short, 128, 64), short, both),
            planned(s, "dense causal", Causal(), short, both),
            planned(s, "dense causal, longer", Causal(), long, both),
            planned(s, "window", Causal() & window, long, both),
            planned(s, "window and 64 globals", far, long, both),
        ]

    def biased(s: Setting) -> list[Launch]:
        ways = ("resume", "backward")
        return [
            planned(s, f"{n} blocks a row, bias", blocks_a_row(short, 128, n), short, ways, bias=True) for n in (8, 32)
        ]

    def portable(dtype: torch.dtype, block: int, length: int) -> Callable[[Setting], list[Launch]]:
        return lambda s: [
            planned(
                s, f"{n} blocks of {block} a row", blocks_a_row(length, block, n), length, both, False, block, dtype
            )
            for n in (8, 24)
        ]

    def of_chunks(tile: int, page: int, masks: bool) -> Callable[[Setting], list[Launch]]:
        name = "summaries" if masks else "chunks"
        length = short if tile > 1 else short // 4
        pages = 96 if masks else max(short // page, 1)
        return lambda s: [
            chosen(s, f"{n} pages of {name}, tiles of {tile}", tile, page, pages, n, length, masks) for n in (8, 32)
        ]

    size = s.dtype.itemsize
    found = [
        Case("pattern", (128, 128), size, patterns),
        Case("biased", (128, 128), size, biased),
        Case("pattern", (64, 64), size, portable(s.dtype, 64, short)),
        Case("chosen", (64, 64), size, of_chunks(64, 64, False)),
        Case("chosen", (1, 64), size, of_chunks(1, 64, False)),
        Case("summaries", (64, SUMMARY_PAGE), size, of_chunks(64, SUMMARY_PAGE, True)),
        Case("summaries", (1, SUMMARY_PAGE), size, of_chunks(1, SUMMARY_PAGE, True)),
    ]
    if size != 4:
        found.append(Case("pattern", (128, 128), 4, portable(torch.float32, 128, short // 4)))
    return found


def split(rows: Sequence[Sequence[float]], times: Sequence[float]) -> tuple[list[float], list[float]]:
    """Coefficients of at least 0 with the smallest relative errors, and what they foretell.

    There are few columns: each subset of them is tried.
    """
    matrix, took = np.asarray(rows, np.float64), np.asarray(times)
    used = [i for i in range(matrix.shape[1]) if matrix[:, i].any()]
    best: tuple[float, np.ndarray] | None = None
    for count in range(1, len(used) + 1):
        for columns in combinations(used, count):
            part = matrix[:, columns] / took[:, None]
            found = np.linalg.lstsq(part, np.ones(len(took)), rcond=None)[0]
            error = float(((part @ found - 1) ** 2).sum())
            if (found >= 0).all() and (best is None or error < best[0] - 1e-12):
                whole = np.zeros(matrix.shape[1])
                whole[list(columns)] = found
                best = error, whole
    assert best is not None  # a single column of positive numbers has a positive coefficient
    return best[1].tolist(), (matrix @ best[1]).tolist()


def measure_kernels(s: Setting, say: Callable[[str], None]) -> tuple[KernelSpeed, ...]:
    found = []
    for case in cases(s):
        launches = case.launches(s)
        for way in launches[0].runs:
            took, host = zip(*(median(x.runs[way], s) for x in launches), strict=True)
            (visit, row, masked), told = split([x[1:4] for x in launches], took)
            busy = statistics.median(host) if s.device.type == "cuda" else 0.0
            speed = KernelSpeed(case.kind, way, case.itemsize, *case.blocks, 2 * s.dim, visit, row, masked, busy)
            found.append(speed)
            flops = 2 * case.blocks[0] * case.blocks[1] * 2 * s.dim * (2.5 if way == "backward" else 1)
            blocks = f"{case.blocks[0]} x {case.blocks[1]}"
            say(
                f"{case.kind}, {way}, {blocks}, {8 * case.itemsize} bits: {1e9 * visit:.2f} ns a visit "
                f"({flops / max(visit, 1e-30) / 1e12:.3g} TFLOP/s), {1e9 * row:.1f} ns a row, "
                f"{1e9 * masked:.2f} ns a mask, host {1e3 * busy:.2f} ms"
            )
            for x, seen, fitted in zip(launches, took, told, strict=True):
                say(f"    {x.name:<36}{1e3 * seen:>10.3f} ms, fitted {1e3 * fitted:>10.3f} ({fitted / seen - 1:+.1%})")
        del launches
        if s.device.type == "cuda":
            torch.cuda.empty_cache()
    return tuple(found)


def measure_choices(s: Setting, say: Callable[[str], None]) -> tuple[ChoiceSpeed, ...]:
    """Choosing chunks, and the tables of what is then visited beside them."""
    tile = presets.hierarchical(1024, (64, 1024), (64,), 16, "tile")
    token = presets.hierarchical(1024, (64, 1024), (64,), 16, "token")
    mass = presets.hierarchical(1024, (64, 1024), (64,), 16, "token", "mass")
    found = []
    for spec, longest in ((tile, 4 * s.length), (token, s.length // 2), (mass, s.length // 2)):
        select = spec.select
        assert select is not None
        counts, times = [], []
        for length in (max(longest // 4, 2048), max(longest, 4096)):
            plan, extras = s.plan(spec, length), AttentionExtras()
            hierarchy = plan.hierarchy
            assert hierarchy is not None
            q, k, v = (s.random(length, heads) for heads in (s.heads, s.kv_heads, s.kv_heads))
            gathered = gather_summaries(pool_own(k, v, plan, extras), plan)

            def run(q=q, k=k, gathered=gathered, plan=plan, extras=extras) -> None:  # type: ignore[no-untyped-def]
                summary_table(choose(scorers_of(q, plan), k, gathered, plan, extras, s.dim**-0.5), plan)

            with torch.no_grad():
                times.append(median(run, s, max(s.rounds // 2, 2))[0])
            heads = s.heads if select.score == "mass" else s.kv_heads
            counts.append((float(heads * len(hierarchy.tile_position)), float(heads * hierarchy.tile_until.sum())))
        (row, column), told = split(counts, times)
        found.append(ChoiceSpeed(select.per, select.score, row, column))
        say(f"choice, per {select.per}, by {select.score}: {1e9 * row:.1f} ns a row, {1e12 * column:.2f} ps a score")
        for seen, fitted in zip(times, told, strict=True):
            say(f"    {1e3 * seen:>46.3f} ms, fitted {1e3 * fitted:>10.3f}")
    return tuple(found)


def measure_memory(s: Setting) -> tuple[float, float, float]:
    """(FLOP/s of a product of matrices, bytes a second of a copy, and of packing and unpacking rows)."""
    cuda = s.device.type == "cuda"
    side, size = (8192, 1 << 30) if cuda else (1024, 1 << 25)
    a, b = (torch.randn(side, side, device=s.device, dtype=s.dtype) for _ in range(2))
    flops = 2 * side**3 / median(lambda: a @ b, s)[0]
    from_, to = (torch.empty(size, dtype=torch.uint8, device=s.device) for _ in range(2))
    copy = 2 * size / median(lambda: to.copy_(from_), s)[0]
    rows = s.random(s.length, s.kv_heads), s.random(s.length, s.kv_heads)
    runs = np.asarray([(at, at + 128) for at in range(0, s.length, 256)])
    places = Places(runs, tuple(range(s.kv_heads)))

    def there_and_back() -> None:
        unpack_rows(rows, places, pack_rows(rows, places))

    moved = 4 * places.count * s.kv_heads * 2 * s.dim * s.dtype.itemsize
    return flops, copy, moved / median(there_and_back, s)[0]


def measure_host(s: Setting, kernels: Sequence[KernelSpeed], mesh: Any) -> dict[str, float]:
    """Seconds that the host needs beside launches; 0 on CPUs, where calls wait for their results."""
    if s.device.type != "cuda":
        return dict.fromkeys(HOST, 0.0)
    plan = s.plan(AttentionSpec(Causal()), 1024)
    q, k, v = (s.random(1024, heads).requires_grad_() for heads in (s.heads, s.kv_heads, s.kv_heads))
    kept: list[Tensor] = []

    def forward() -> None:
        kept[:] = [attend(q, k, v, plan)]

    def backward() -> None:
        torch.autograd.grad(kept[0], (q, k, v), kept[0].detach(), retain_graph=True)

    launch = {
        way: next(x.host for x in kernels if (x.kind, x.way) == ("pattern", way)) for way in ("forward", "backward")
    }
    small = torch.zeros(8, device=s.device)
    found = {
        "launch": median(lambda: small.add_(1), s, 50)[1],
        "forward": max(median(forward, s, 20)[1] - launch["forward"], 0.0),
        "backward": max(median(backward, s, 20)[1] - launch["backward"], 0.0),
    }
    if mesh is None:
        return found
    sizes = {"heads": s.heads, "kv_heads": s.kv_heads, "head_dim": s.dim}
    near = make_plan(presets.mistral(256), 1024 * mesh.size(), mesh=mesh, layout="contiguous", **sizes)
    stage = near.stages[0]
    own = Pages(s.random(near.tokens, s.kv_heads), s.random(near.tokens, s.kv_heads))
    slots = Pages(s.random(stage.guest_rows, s.kv_heads), s.random(stage.guest_rows, s.kv_heads))

    def bring() -> None:
        exchange = Exchange(near.group_name, near.rank, Counter(), near.key)
        for transfer in stage.transfers:
            exchange.bring("keys and values", transfer, own, slots).wait()

    found["exchange"] = median(bring, s, 20)[1]
    return found


def start(kind: str, nbytes: int, s: Setting) -> tuple[Callable[[], list[Any]], float]:
    """What starts an exchange of so many bytes a rank, as `distattn.exchange` does, and the bytes that leave a rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = torch.empty(nbytes // 4, dtype=torch.float32, device=s.device)
    if kind == "neighbours":
        there = torch.empty_like(mine)
        after, before = (rank + 1) % world, (rank - 1) % world

        if s.device.type == "cuda":  # a collective, in which all ranks take part
            sizes = [[len(mine) * (peer == to) for peer in range(world)] for to in (before, after)]
            return lambda: [dist.all_to_all_single(there, mine, *sizes, async_op=True)], float(mine.nbytes)

        def pairs() -> list[Any]:
            return dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, there, before)])

        return pairs, float(mine.nbytes)
    part = mine[: len(mine) // world * world].view(world, -1)
    every = torch.empty((world, len(mine)), device=s.device) if kind == "all_gather" else torch.empty_like(part)
    if s.device.type == "cuda":
        if kind == "all_gather":
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            return lambda: [gather(every.flatten(), mine, async_op=True)], float(mine.nbytes * (world - 1))
        return lambda: [dist.all_to_all_single(every, part, async_op=True)], float(part.nbytes * (world - 1) / world)
    peers = [peer for peer in range(world) if peer != rank]

    def one_by_one() -> list[Any]:
        sends = [dist.P2POp(dist.isend, mine if kind == "all_gather" else part[peer], peer) for peer in peers]
        return dist.batch_isend_irecv(sends + [dist.P2POp(dist.irecv, every[peer], peer) for peer in peers])

    return one_by_one, float((mine.nbytes if kind == "all_gather" else part[0].nbytes) * (world - 1))


def slowest(took: float, s: Setting) -> float:
    """Of all ranks."""
    x = torch.tensor([took], dtype=torch.float64, device=s.device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def together(run: Callable[[], object], s: Setting, rounds: int | None = None) -> float:
    """Seconds of what all ranks begin at the same time: the slowest rank's median."""
    took = []
    for number in range(2 + (rounds or s.rounds)):
        dist.barrier()
        if s.device.type == "cuda":
            torch.cuda.synchronize()
        took.append(seconds(run, s.device)[0] if number >= 2 else (run(), 0.0)[1])
    return slowest(statistics.median(took[2:]), s)


def measure_exchanges(s: Setting, say: Callable[[str], None]) -> tuple[dict[str, Curve], dict[str, float]]:
    """(seconds by bytes, by kind; drag by way)."""
    curves: dict[str, Curve] = {}
    timed: dict[str, list[tuple[float, int]]] = {}
    drags: dict[str, float] = {}
    largest = LARGEST if s.device.type == "cuda" else 1 << 24
    for kind in EXCHANGES:
        points = []
        for nbytes in [SMALLEST << shift for shift in range(0, 64, 2) if SMALLEST << shift <= largest]:
            begin, leave = start(kind, nbytes, s)
            points.append((leave, together(lambda begin=begin: [x.wait() for x in begin()], s), nbytes))
            say(
                f"{kind}: {leave / 2**20:10.3f} MiB leave a rank, {1e3 * points[-1][1]:9.3f} ms, "
                f"{leave / points[-1][1] / 1e9:7.1f} GB/s"
            )
        leaving, times, sizes = zip(*points, strict=True)
        timed[kind] = [*zip(times, sizes, strict=True)]
        # What is smaller takes no longer.
        curves[kind] = Curve(leaving, tuple(np.minimum.accumulate(times[::-1])[::-1].tolist()))
    # Beside a kernel that lasts longer: started first, as passes do.
    for way, kernel in planned(s, "dense causal", Causal(), s.length // 2, DRAG).runs.items():
        alone = together(kernel, s)
        took, nbytes = min(timed["neighbours"], key=lambda point: abs(point[0] - alone / 2))
        begin, _ = start("neighbours", nbytes, s)

        def beside(begin=begin, kernel=kernel) -> None:  # type: ignore[no-untyped-def]
            works = begin()
            kernel()
            for work in works:
                work.wait()

        both = together(beside, s)
        drags[way] = min(max(both - max(alone, took), 0.0) / min(took, alone), 1.0)
        say(
            f"{1e3 * took:.3f} ms of neighbours beside a {way} kernel of {1e3 * alone:.3f} ms: {1e3 * both:.3f} ms "
            f"together, drag {drags[way]:.2f}"
        )
    return curves, drags


def where(s: Setting, commit: str | None) -> tuple[tuple[str, str], ...]:
    found = here(commit) | {"date": date.today().isoformat(), "heads": f"{s.heads}/{s.kv_heads} of {s.dim}"}
    if s.device.type == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        found["device"] = f"{found['device']}, {torch.get_num_threads()} threads"
    return tuple((str(key), str(value)) for key, value in found.items())


def calibrate(s: Setting, base: Machine, commit: str | None, mesh: Any, say: Callable[[str], None]) -> Machine:
    """What was measured, in place of what ``base`` says."""
    began = time.perf_counter()

    def done(part: str) -> None:
        say(f"-- {part}: {time.perf_counter() - began:.0f} s since the beginning")

    matmul, copy, pack = measure_memory(s)
    say(f"matmul {matmul / 1e12:.4g} TFLOP/s, copy {copy / 1e9:.4g} GB/s, packing {pack / 1e9:.4g} GB/s")
    done("memory")
    kernels = measure_kernels(s, say)
    done("kernels")
    choices = measure_choices(s, say)
    done("choices")
    host = measure_host(s, kernels, mesh)
    say("host: " + ", ".join(f"{name} {1e3 * x:.3f} ms" for name, x in host.items()))
    found: dict[str, Any] = {"kernels": kernels, "choices": choices, "matmul": matmul, "copy": copy, "pack": pack}
    names = {*found, *(f"host.{name}" for name in host)}
    found["host"] = {**base.host, **host}
    if mesh is not None:
        found["exchanges"], found["drag"] = measure_exchanges(s, say)
        found["ranks"] = mesh.size()
        names |= {"exchanges", "drag"}
        done("exchanges")
    rest = ["host.exchange", "exchanges", "drag", "between_nodes", "between_latency"]
    before = dict(base.assumed)
    assumed = [(name, f"{base.name}: {before.get(name, dict(base.conditions))}") for name in rest if name not in names]
    return replace(base, conditions=where(s, commit), assumed=tuple(assumed), **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=in_a_folder, required=True, help="where to write the machine file")
    parser.add_argument("--name", help="of the machine (default: the device's, and how many)")
    parser.add_argument("--base", help="machine file for what cannot be measured here (default: h100 or cpu)")
    parser.add_argument("--commit", help="what is measured, where git does not tell")
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds of each launch (default 5)")
    parser.add_argument("--length", type=positive, help="tokens of the longest case (default 32,768; CPU: 4,096)")
    arguments = parser.parse_args()
    cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mesh = None
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh

        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")  # as the launcher does
        if cuda:
            prepare_nccl()
        dist.init_process_group("nccl" if cuda else "gloo", **({"device_id": device} if cuda else {}))
        mesh = init_device_mesh(device.type, (world,))
    first = world == 1 or dist.get_rank() == 0

    def say(line: str) -> None:
        if first:
            print(line, flush=True)

    torch.manual_seed(0)
    sizes = (32_768, 32, 8, 128) if cuda else (4096, 4, 2, 64)
    s = Setting(device, torch.bfloat16 if cuda else torch.float32, *sizes, rounds=arguments.rounds)
    if arguments.length:
        s = s._replace(length=max(arguments.length // 1024, 1) * 1024)
    base = Machine.load(arguments.base or ("h100" if cuda else "cpu"))
    found = calibrate(s, base, arguments.commit, mesh, say)
    gpus = f"{dict(found.conditions)['device']}, {world} {'rank' if world == 1 else 'ranks'}"
    if first:
        replace(found, name=arguments.name or gpus).save(arguments.output)
        print(f"written to {arguments.output}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

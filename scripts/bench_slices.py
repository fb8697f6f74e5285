#!/usr/bin/env python3
"""Reading a prompt in slices into a cache, beside one pass over the whole of it: one layer's attention, on one GPU.

    python scripts/bench_slices.py [--cases NAME ...] [--slice 32768] [--rounds 3] [--shrink 1] [--csv FILE]

bfloat16 on a GPU, 32 query heads and 8 key heads of 128. "one_ms" and "slices_ms" are medians of the rounds from the
second on, taken in turns: then a pass has its plan, and a cache what it planned for the slices of the prompt before.
"one_MiB" and "slices_MiB" are the most that is held beside q, k, v and the cache: a slice's output is not kept.

Per slice, "plan_ms" is the host's time in Cache.begin, which plans, and "host_ms" its time in all of the slice,
until the GPU has been given everything. If slices take about so long each, it is the host that bounds them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from measuring import add_output, here, positive, write_rows
from torch import Tensor

from distattn import Cache, attend, make_plan, presets, reference
from distattn.spec import AttentionSpec

HEADS, KV_HEADS, DIM = 32, 8, 128


class Case(NamedTuple):
    length: int
    spec: AttentionSpec


CASES = {
    "dense, 256K": Case(262_144, presets.dense()),
    "window 4,096 and 64 globals, 1M": Case(1_048_576, presets.longformer(4095, 1, range(64), causal=True)),
    "two levels, no choice, 1M": Case(1_048_576, presets.combiner(1024)),
    "hierarchical, 1M": Case(
        1_048_576, presets.hierarchical(1024, (64, 1024), (64,), 16, "tile", global_keys=range(64))
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="NAME", help=f"of {[*CASES]}")
    parser.add_argument("--slice", type=positive, default=32_768, help="tokens")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--shrink", type=positive, default=1, help="divides lengths and slices, to try the script")
    add_output(parser)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, object]] = []
    for name in options.cases:
        case = CASES[name]
        size = max(options.slice // options.shrink, 1)
        row = measure(case._replace(length=case.length // options.shrink), size, options.rounds, device)
        print(name, row, flush=True)
        rows.append({**here(options.commit), "case": name, **row})
    if options.csv:
        write_rows(options.csv, rows)


def measure(case: Case, size: int, rounds: int, device: torch.device) -> dict[str, object]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    shapes = ((1, case.length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
    plan = make_plan(case.spec, case.length, **sizes)
    cache = Cache([case.spec], tokens=case.length, dtype=dtype, device=device, **sizes)
    last: list[Tensor] = []
    host: dict[str, list[float]] = {"plan": [], "host": []}

    def one() -> None:
        last[:] = [attend(q, k, v, plan)[:, -size:]]

    def slices() -> None:
        sequence = cache.add()
        for first in range(0, case.length, size):
            part = slice(first, min(first + size, case.length))
            last.clear()
            began = time.perf_counter()
            step = cache.begin({sequence: part.stop - part.start})
            host["plan"].append(time.perf_counter() - began)
            last[:] = [step.attend(0, q[:, part], k[:, part], v[:, part])]
            step.end()
            host["host"].append(time.perf_counter() - began)
        cache.free(sequence)

    taken: dict[str, list[float]] = {"one": [], "slices": []}
    held, results = {}, {}
    for number in range(rounds + 1):
        for name, run in (("one", one), ("slices", slices)):
            last.clear()
            before = start_of_peak(device)
            seconds = timed(run, device)
            if number:
                taken[name].append(seconds)
            held[name] = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else 0.0
            results[name] = last[0]
    tail = min(size, results["slices"].shape[1])
    error = reference.max_error(results["slices"][:, -tail:], results["one"][:, -tail:])
    found = {f"{name}_ms": statistics.median(x) * 1e3 for name, x in taken.items()}
    return {
        "length": case.length,
        "slice": size,
        **found,
        "times": found["slices_ms"] / found["one_ms"],
        **{f"{name}_ms": statistics.median(x) * 1e3 for name, x in host.items()},
        **{f"{name}_MiB": x for name, x in held.items()},
        "difference": error,
    }


def start_of_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

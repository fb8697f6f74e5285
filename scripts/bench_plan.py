"""How long planning takes and how much memory, in a process and on one core of its own.

    python scripts/bench_plan.py

Prints a table: the best and the median of a few runs, and the peak of what NumPy and Python allocate (tracemalloc, in a
run of its own, since tracing slows the others). Planning is from the pattern to the tile tables of one rank; the table
by key page is listed apart, since only training needs it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from distattn.axis import Axis
from distattn.kernels.table import TileTable
from distattn.patterns import Causal, Dense, Documents, GlobalTokens, Pattern, SlidingWindow
from distattn.tiles import Extents, assemble, visit

MILLION = 1 << 20
WINDOW = Causal() & (SlidingWindow(4095, 0) | GlobalTokens(range(64)))


def documents(seed: int) -> Documents:
    """2,000 documents of random lengths that fill a million tokens."""
    cuts = np.random.default_rng(seed).choice(np.arange(1, MILLION), 1999, replace=False)
    return Documents(tuple(np.diff(np.sort(cuts), prepend=0, append=MILLION).tolist()))


def plan(pattern: Pattern, length: int) -> TileTable:
    queries, keys = Axis.grid(length, 128), Axis.grid(length, 128)
    pages = Extents.of(np.arange(keys.blocks), 0)
    return assemble([[(visit(pattern, queries, keys), pages)]], [0], queries.blocks, (128, 128), keys.blocks, 0)


# name, how to make the pattern of a run, length, limits in ms and MiB (None: no limit was set)
CASES: list[tuple[str, Callable[[int], Pattern], int, float | None, float | None]] = [
    ("window 4,096 + 64 globals", lambda run: WINDOW, MILLION, 100, 64),
    ("window 4,096 + 64 globals", lambda run: WINDOW, 10 * MILLION, 1000, 640),
    ("causal", lambda run: Causal(), MILLION, None, None),
    ("dense", lambda run: Dense(), MILLION, None, None),
    ("2,000 documents, new lengths", documents, MILLION, 10, None),
    ("2,000 documents, causal", lambda run: Causal() & documents(run), MILLION, None, None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="runs of each case (default 9)")
    runs = parser.parse_args().runs
    print(
        f"{'pattern':<30}{'tokens':>12}{'best ms':>10}{'median':>8}{'limit':>7}"
        f"{'by key':>8}{'MiB':>8}{'limit':>7}{'table MB':>10}"
    )
    for name, make, length, limit_ms, limit_mib in CASES:
        times, by_key = [], []
        for run in range(runs):
            pattern = make(run)
            start = time.perf_counter()
            table = plan(pattern, length)
            times.append(1e3 * (time.perf_counter() - start))
            start = time.perf_counter()
            table.by_key  # noqa: B018 - made as it is read
            by_key.append(1e3 * (time.perf_counter() - start))
        tracemalloc.start()
        plan(make(runs), length)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        limits = ["-" if limit is None else f"{limit:g}" for limit in (limit_ms, limit_mib)]
        print(
            f"{name:<30}{length:>12,}{min(times):>10.1f}{statistics.median(times):>8.1f}{limits[0]:>7}"
            f"{min(by_key):>8.1f}{peak:>8.1f}{limits[1]:>7}{table.nbytes / 1e6:>10.2f}"
        )


if __name__ == "__main__":
    main()

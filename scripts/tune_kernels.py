#!/usr/bin/env python3
"""Finds how the portable kernels are launched best on the GPU at hand, and writes it to kernels/configurations.csv.

    python scripts/tune_kernels.py [--rounds 7] [--csv FILE] [--sizes ROWSxPAGE_ROWSxDIM ...]

Each size is a bfloat16 case in which every query tile visits 16 pages at random, as chosen on the device. Candidates
are compiled first, by several processes, into Triton's cache; then they are timed in turn, round after round, and the
lowest median wins, if it is at least 3 % below that of the rule in kernels/configurations.py. "us" is the time of the
pass, forward or backward, that the kernel is a part of; "rule_us" is the time with the rule. Lines of other GPUs
and of sizes that were not tried are kept.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import torch

from distattn.kernels import configurations
from distattn.kernels.attention import Biases, Pages, attention_backward, attention_forward
from distattn.kernels.configurations import Configuration, Kernel, Sizes, by_rule, taken_together
from distattn.kernels.selected import SelectedTable

SHAPES = ((128, 128), (64, 64), (128, 64), (128, 32), (16, 64))
SIZES = (*(Sizes(*shape, dim) for shape in SHAPES for dim in (64, 128)), Sizes(64, 64, 256))
KV_HEADS, SHARE, VISITS = 4, 4, 16
KERNELS: tuple[Kernel, ...] = ("forward", "queries", "keys")
CONFIGURATIONS = Path(configurations.__file__).with_suffix(".csv")
COLUMNS = ("capability", "kernel", "tile_rows", "page_rows", "dim", *Configuration._fields, "us", "rule_us")
WORTH = 0.97  # of the rule's time


def candidates(kernel: Kernel, sizes: Sizes) -> Iterator[Configuration]:
    """The rule first."""
    rule = by_rule(kernel, torch.bfloat16, sizes)
    yield rule
    rows = [n for n in (32, 64, 128) if n <= sizes.rows] if kernel == "keys" and sizes.rows > 16 else [sizes.rows]
    for found in map(Configuration._make, product((32, 64, 128), rows, (4, 8), (1, 2, 3))):
        held = found.columns * sizes.dim * (4 if kernel == "keys" else 2) * found.stages
        small = found.columns * found.rows <= 16 * 1024 and held <= 96 * 1024
        if found != rule and found.columns <= sizes.page_rows and small:
            yield found


class Trial:
    """A case of some sizes; tokens of 16 rows are one token of 16 heads."""

    def __init__(self, sizes: Sizes, device: torch.device, pages: int) -> None:
        by_token = sizes.rows <= 16
        share = 16 if by_token else SHARE if sizes.rows >= 128 else 1  # heads that make up a tile together are one tile
        block_q = 1 if by_token else sizes.rows
        heads, length = KV_HEADS * share, pages * sizes.page_rows
        tiles = length // block_q
        generator = torch.Generator(device=device).manual_seed(0)
        chosen = torch.rand(KV_HEADS, tiles, pages, generator=generator, device=device).topk(VISITS).indices.int()
        tables = tuple(h // share for h in range(heads))
        # Pages of 32 rows are those of summaries, of which only some rows are visited.
        masks = None if sizes.page_rows > 32 else torch.full_like(chosen, -1)[..., None, None]
        self.table = SelectedTable(block_q, sizes.page_rows, tiles, pages, 0, tables, chosen, masks)

        def random(number: int) -> torch.Tensor:
            shape = (1, length, number, sizes.dim)
            return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)

        self.sizes, self.q, self.grad, self.scale = sizes, random(heads), random(heads), sizes.dim**-0.5
        self.own = Pages(random(KV_HEADS), random(KV_HEADS))
        self.nobody = Pages(self.own.k[:, :0], self.own.v[:, :0])
        self.out, self.lse = torch.zeros_like(self.q), torch.zeros(1, length, heads, device=device)
        self.sums = [torch.zeros_like(x, dtype=torch.float32) for x in (self.q, *self.own)]
        # Where a tile has tokens enough, tables made by the host are for other kernels, and keys that have a bias not.
        self.bias = None if by_token else Biases(self.own.k[..., 0].float(), self.nobody.k[..., 0].float())

    def run(self, kernel: Kernel, candidate: Configuration) -> None:
        table = configurations.measured(torch.cuda.get_device_capability(self.q.device))
        sizes = taken_together(kernel, self.sizes)
        table[kernel, sizes] = candidate
        try:
            if kernel == "forward":
                attention_forward(
                    self.q, self.own, self.nobody, self.table, self.out, self.lse, scale=self.scale, bias=self.bias
                )
            else:
                sums = Pages(*self.sums[1:])
                attention_backward(
                    self.q, self.own, self.nobody, self.table, self.grad, self.lse, self.lse, self.sums[0], sums,
                    Pages(sums.k[:, :0], sums.v[:, :0]), scale=self.scale, bias=self.bias, d_bias=self.bias,
                )  # fmt: skip
        finally:
            del table[kernel, sizes]


def compiles(kernel: Kernel, sizes: Sizes, candidate: Configuration) -> str:
    """Runs it once on a small case; why not, if it does not run."""
    configurations.measured(torch.cuda.get_device_capability()).clear()
    try:
        Trial(sizes, torch.device("cuda"), VISITS).run(kernel, candidate)
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, or the assembler gave up
        return str(error).partition("\n")[0] or repr(error)
    return ""


def seconds(run: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(4_000_000)  # until the host has launched what is timed
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(stop)


def best(trial: Trial, kernel: Kernel, found: list[Configuration], rounds: int) -> tuple[Configuration, float, float]:
    """The fastest, its median in seconds, and that of the rule."""
    times: dict[Configuration, list[float]] = {candidate: [] for candidate in found}
    for number in range(rounds + 1):
        for candidate in found:
            took = seconds(lambda candidate=candidate: trial.run(kernel, candidate))
            if number:
                times[candidate].append(took)
    medians = {candidate: statistics.median(took) for candidate, took in times.items()}
    rule = by_rule(kernel, torch.bfloat16, taken_together(kernel, trial.sizes))
    fastest = min(found, key=medians.__getitem__)
    return fastest, medians[fastest], medians.get(rule, float("inf"))


def write(lines: list[dict[str, object]], path: Path, capability: str, tried: set[tuple[str, ...]]) -> None:
    """Keeps the lines of other GPUs and of what was not tried."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                what = line["kernel"], line["tile_rows"], line["page_rows"], line["dim"]
                if line["capability"] != capability or what not in tried:
                    kept.append(line)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *lines])


def sizes_of(text: str) -> Sizes:
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected ROWSxPAGE_ROWSxDIM, such as 128x64x128")
    sizes = Sizes(*map(int, text.split("x")))
    if any(n < 16 or n & (n - 1) for n in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}; expected powers of two of at least 16")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--csv", type=Path, default=CONFIGURATIONS, help="what is written (default: the package's own)")
    parser.add_argument("--sizes", nargs="+", type=sizes_of, default=SIZES, metavar="ROWSxPAGE_ROWSxDIM")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"argument --rounds: {arguments.rounds}; expected at least 1")
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    cases = [*product(KERNELS, arguments.sizes)]
    tasks = [
        (kernel, sizes, found) for kernel, sizes in cases for found in candidates(kernel, taken_together(kernel, sizes))
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 14), mp_context=spawn) as pool:
        reasons = list(pool.map(compiles, *zip(*tasks, strict=True)))
    for task, reason in zip(tasks, reasons, strict=True):
        if reason:
            print(*task, "does not run:", reason, flush=True)
    running = [task for task, reason in zip(tasks, reasons, strict=True) if not reason]
    major, minor = torch.cuda.get_device_capability()
    configurations.measured((major, minor)).clear()
    lines: list[dict[str, object]] = []
    for sizes in arguments.sizes:
        trial = Trial(sizes, torch.device("cuda"), 128)
        for kernel in KERNELS:
            runs = [task[2] for task in running if task[:2] == (kernel, sizes)]
            fastest, took, rule = best(trial, kernel, runs, arguments.rounds)
            print(kernel, *sizes, fastest, f"{1e6 * took:.0f} us, by rule {1e6 * rule:.0f} us", flush=True)
            if took < WORTH * rule:
                line = (
                    f"{major}.{minor}",
                    kernel,
                    *taken_together(kernel, sizes),
                    *fastest,
                    round(1e6 * took),
                    round(1e6 * rule),
                )
                lines.append(dict(zip(COLUMNS, line, strict=True)))
                configurations.measured((major, minor))[kernel, taken_together(kernel, sizes)] = fastest
    tried = {(kernel, *map(str, taken_together(kernel, sizes))) for kernel, sizes in cases}
    write(lines, arguments.csv, f"{major}.{minor}", tried)


if __name__ == "__main__":
    main()

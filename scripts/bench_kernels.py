#!/usr/bin/env python3
"""The tile kernels beside other attention kernels, forward and backward, on one GPU.

    python scripts/bench_kernels.py [--cases NAME ...] [--rounds 10] [--shrink 1] [--csv FILE]

Every round runs each kernel once, ours and the peers in turn, since a GPU that is limited by power changes its clock
from one second to the next; a row has the median of the rounds. TFLOP/s count 4 heads head_dim pairs forward and 2.5
times that backward, where the pairs are the attended ones for dense causal attention and else those of visited tiles.
Before anything is timed, sampled rows of each forward pass are checked against the float64 oracle.

Without a GPU the same script runs on the CPU, where `--shrink 64` divides lengths by 64: that shows that it works.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn import reference
from distattn.kernels.attention import Pages, attention_backward, attention_forward
from distattn.patterns import BlockSparse, Causal, GlobalKeys, Pattern, SlidingWindow
from distattn.plan import make_plan
from distattn.spec import AttentionSpec

BLOCK = 128
HEADS, KV_HEADS, DIM = 32, 8, 128
SAMPLED = 8  # rows that are checked against the oracle
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


class Case(NamedTuple):
    name: str
    length: int
    pattern: Callable[[int], Pattern]
    backward: bool = True


class Runner(NamedTuple):
    """One kernel on the data of a case: what computes the output, and what the gradients once that was done."""

    name: str
    forward: Callable[[], Tensor]
    backward: Callable[[], object]


def random_blocks(row: int) -> Callable[[int], Pattern]:
    def make(length: int) -> Pattern:
        blocks = length // BLOCK
        generator = np.random.default_rng(0)
        some = [np.sort(generator.choice(blocks, min(row, blocks), replace=False)) for _ in range(blocks)]
        return BlockSparse(np.arange(blocks + 1) * len(some[0]), np.concatenate(some), BLOCK)

    return make


def window(globals_: int) -> Callable[[int], Pattern]:
    def make(length: int) -> Pattern:
        near = SlidingWindow(4095, 0)
        return Causal() & (near | GlobalKeys(range(globals_)) if globals_ else near)

    return make


CASES = {
    case.name: case
    for case in (
        Case("dense causal", 32_768, lambda length: Causal()),
        Case("16 blocks a row", 65_536, random_blocks(16)),
        Case("64 blocks a row", 65_536, random_blocks(64)),
        Case("window 4,096", 131_072, window(0)),
        Case("window 4,096 + 64 globals", 131_072, window(64)),
        Case("window 4,096 + 64 globals, 1M", 1_048_576, window(64), backward=False),
    )
}


def ours(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, pattern: Pattern) -> tuple[Runner, int]:
    """Our kernels, and the pairs in the tiles that a head visits."""
    plan = make_plan(
        AttentionSpec(pattern), q.shape[1], heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, block_q=BLOCK, block_k=BLOCK
    )
    table, scale = plan.stages[0].table, DIM**-0.5
    own, nobody = Pages(k, v), Pages(k[:, :0], v[:, :0])
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)

    def forward() -> Tensor:
        attention_forward(q, own, nobody, table, out, lse, scale=scale)
        return out

    def backward() -> Tensor:
        delta = (grad.float() * out.float()).sum(-1)
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        d_nobody = Pages(dk[:, :0], dv[:, :0])
        attention_backward(q, own, nobody, table, grad, lse, delta, dq, Pages(dk, dv), d_nobody, scale=scale)
        return dq

    visited = int((table.full_pages + table.part_pages)[: table.tiles].sum()) * BLOCK * BLOCK
    return Runner("distattn", forward, backward), visited


def peers(case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, pattern: Pattern) -> list[Runner]:
    """The other kernels that can compute this case here; tensors are [batch, tokens, heads, dim]."""
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    found: list[Runner] = []

    def add(name: str, run: Callable[..., Tensor], inputs: list[Tensor], heads_first: bool) -> None:
        kept: list[Tensor] = []

        def forward() -> Tensor:
            kept[:] = [run(*inputs)]
            return kept[0].detach().transpose(1, 2) if heads_first else kept[0].detach()

        def backward() -> object:
            return torch.autograd.grad(
                kept[0], inputs, grad.transpose(1, 2) if heads_first else grad, retain_graph=True
            )

        try:
            forward()
            found.append(Runner(name, forward, backward))
        except Exception as error:  # a peer that this machine or case does not suit
            print(f"  {name} does not run: {str(error).splitlines()[0] if str(error) else error!r}", flush=True)

    if isinstance(pattern, Causal):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        backends = {"SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA, FA2": SDPBackend.FLASH_ATTENTION}
        if q.device.type == "cpu":
            backends = {"SDPA": SDPBackend.MATH}
        for name, backend in backends.items():

            def dense(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            add(name, dense, leaves, heads_first=True)
    if q.device.type == "cuda":
        flex = flex_attention(pattern, q.shape[1], q.device)
        add("FlexAttention", flex, leaves, heads_first=True)
        try:
            from flash_attn.cute import flash_attn_func
        except ImportError:
            return found
        reach = {"dense causal": (None, None), "window 4,096": (4095, 0)}.get(case.name)
        if reach:
            plain = [x.detach().requires_grad_() for x in (q, k, v)]

            def cute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out = flash_attn_func(q, k, v, causal=True, window_size=reach)
                return out[0] if isinstance(out, tuple) else out

            add("FlashAttention-4", cute, plain, heads_first=False)
    return found


def flex_attention(pattern: Pattern, length: int, device: torch.device) -> Callable[..., Tensor]:
    from torch.nn.attention import flex_attention as flex

    if isinstance(pattern, BlockSparse):
        blocks = length // BLOCK
        table = np.zeros((blocks, blocks), np.bool_)
        table[np.repeat(np.arange(blocks), np.diff(pattern.row_ptr)), list(pattern.col)] = True
        has = torch.from_numpy(table).to(device)

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return has[q // BLOCK, k // BLOCK]
    elif isinstance(pattern, Causal):

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k <= q
    else:
        always = 64 if "GlobalKeys" in repr(pattern) else 0

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & ((q - k < 4096) | (k < always))

    mask = flex.create_block_mask(allowed, None, None, length, length, device=str(device), _compile=True)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> float:
    rows = torch.linspace(0, q.shape[1] - 1, SAMPLED).long()
    expected, _ = reference.attention_rows(q[:, rows.to(q.device)], rows, k, v, pattern)
    return reference.max_error(out[:, rows.to(q.device)], expected)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(stop)
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(case: Case, shrink: int, rounds: int, device: torch.device) -> list[dict[str, object]]:
    length = max(case.length // shrink, 2 * BLOCK)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, length, heads, DIM, generator=generator, device=device, dtype=dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    pattern = case.pattern(length)
    mine, pairs = ours(q, k, v, grad, pattern)
    if isinstance(pattern, Causal):
        pairs = length * (length + 1) // 2
    runners = [mine, *peers(case, q, k, v, grad, pattern)]
    errors = {runner.name: error_of(runner.forward(), q, k, v, pattern) for runner in runners}
    rows = []
    for way in ("forward", "backward") if case.backward else ("forward",):
        times: dict[str, list[float]] = {runner.name: [] for runner in runners}
        for number in range(rounds + 2):
            for runner in runners:
                if number == 0:
                    runner.forward()
                took = seconds(getattr(runner, way), device)
                if number >= 2:  # the first two warm up
                    times[runner.name].append(took)
        flops = 4 * HEADS * DIM * pairs * (2.5 if way == "backward" else 1)
        for name, took in times.items():
            median = statistics.median(took)
            rows.append(
                {
                    "case": case.name,
                    "tokens": length,
                    "way": way,
                    "kernel": name,
                    "ms": round(1e3 * median, 4),
                    "tflops": round(flops / median / 1e12, 2),
                    "ours_over_this": round(statistics.median(times["distattn"]) / median, 3),
                    "max_error": f"{errors[name]:.1e}",
                }
            )
            print("  " + "  ".join(f"{key} {value}" for key, value in [*rows[-1].items()][2:]), flush=True)
    if errors["distattn"] > TOLERANCE[dtype]:
        raise SystemExit(f"{case.name}: error {errors['distattn']:.1e} is over {TOLERANCE[dtype]:g}")
    return rows


def here() -> dict[str, object]:
    """Where this was measured: GPU or CPU, versions, commit."""
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, "commit": commit or "unknown"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES], metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds of each case (default 10)")
    parser.add_argument("--shrink", type=int, default=1, help="divide lengths by this (default 1)")
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where, rows = here(), []
    for name in arguments.cases:
        print(name, flush=True)
        rows += measure(CASES[name], arguments.shrink, arguments.rounds, device)
        torch.cuda.empty_cache()
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *where])
            writer.writeheader()
            writer.writerows(row | where for row in rows)


if __name__ == "__main__":
    sys.exit(main())

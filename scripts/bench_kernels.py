#!/usr/bin/env python3
"""The tile kernels beside other attention kernels, forward and backward, on one GPU.

    python scripts/bench_kernels.py [--cases NAME ...] [--rounds 10] [--shrink 1] [--csv FILE] [--plot FILE.png]
        [--without KERNEL ...] [--commit NAME]

Every round runs each kernel once, ours and the peers in turn, since a GPU that is limited by power changes its clock
from one second to the next; a row has the median of the rounds. TFLOP/s count 4 heads head_dim pairs forward and 2.5
times that backward, where the pairs are the attended ones for dense causal attention and else those of visited tiles.
Times are the GPU's: it is kept busy until the host has launched what is measured, and "host_ms" is how long that took.
Before anything is timed, sampled rows of each forward pass are checked against the float64 oracle. "MiB" is the memory
that a pass allocates on a GPU at its peak beyond its inputs; our output is made before, that of peers in the pass.

Without a GPU the same script runs on the CPU, with fewer peers; `--shrink 256` divides lengths by 256.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measuring import add_output, here, in_a_folder, peak_since, positive, start_of_peak, write_rows
from torch import Tensor

from distattn import reference
from distattn.kernels.attention import Pages, attention_backward, attention_forward, row_deltas
from distattn.patterns import BlockSparse, Causal, GlobalKeys, Pattern, SlidingWindow
from distattn.plan import make_plan
from distattn.spec import AttentionSpec

BLOCK = 128
HEADS, KV_HEADS, DIM = 32, 8, 128
SAMPLED = 8  # rows that are checked against the oracle
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
PEERS = ("SDPA, cuDNN", "SDPA, FA2", "SDPA", "FlexAttention", "FlashAttention-4")
BUSY_CYCLES = 6_000_000  # of the GPU's clock, some 3 ms: longer than any of these kernels takes to launch


class Case(NamedTuple):
    """Dense causal attention; or a causal window and global keys; or so many random blocks a row, not causal."""

    name: str
    length: int
    window: int | None = None
    globals_: int = 0
    blocks: int | None = None

    @property
    def dense(self) -> bool:
        return self.window is None and self.blocks is None

    def pattern(self, length: int) -> Pattern:
        if self.blocks is not None:
            rows = length // BLOCK
            take = min(self.blocks, rows)
            generator = np.random.default_rng(0)
            columns = [np.sort(generator.choice(rows, take, replace=False)) for _ in range(rows)]
            return BlockSparse(np.arange(rows + 1) * take, np.concatenate(columns), BLOCK)
        if self.window is None:
            return Causal()
        near = SlidingWindow(self.window - 1, 0)
        return Causal() & (near | GlobalKeys(range(self.globals_)) if self.globals_ else near)


class Runner(NamedTuple):
    """One kernel on the data of a case: what computes the output, and what the gradients once that was done."""

    name: str
    forward: Callable[[], Tensor]
    backward: Callable[[], object]


CASES = {
    case.name: case
    for case in (
        Case("dense causal", 32_768),
        Case("16 blocks a row", 65_536, blocks=16),
        Case("64 blocks a row", 65_536, blocks=64),
        Case("window 4,096", 131_072, window=4096),
        Case("window 4,096 + 64 globals", 131_072, window=4096, globals_=64),
        Case("window 4,096 + 64 globals, 1M", 1_048_576, window=4096, globals_=64),
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
    grad_lse = torch.zeros_like(lse)

    def forward() -> Tensor:
        attention_forward(q, own, nobody, table, out, lse, scale=scale)
        return out

    def backward() -> Tensor:
        delta = row_deltas(out, grad, grad_lse)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_nobody = Pages(dk[:, :0], dv[:, :0])
        attention_backward(q, own, nobody, table, grad, lse, delta, dq, Pages(dk, dv), d_nobody, scale=scale)
        return dq

    visited = int((table.full_pages + table.part_pages)[: table.tiles].sum()) * BLOCK * BLOCK
    return Runner("distattn", forward, backward), visited


def peers(
    case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, pattern: Pattern, without: Sequence[str]
) -> list[Runner]:
    """The other kernels that can compute this case here, but those to do without; [batch, tokens, heads, dim]."""
    makers: dict[str, Callable[[], Callable[..., Tensor]]] = {}
    if q.device.type == "cuda":
        if case.dense:
            makers |= {"SDPA, cuDNN": lambda: sdpa("CUDNN_ATTENTION"), "SDPA, FA2": lambda: sdpa("FLASH_ATTENTION")}
        makers["FlexAttention"] = lambda: flex_attention(case, pattern, q.shape[1], q.device)
        if not case.globals_:
            makers["FlashAttention-4"] = lambda: flash_attention_4(case, pattern, q.device)
    elif case.dense:
        makers["SDPA"] = lambda: sdpa("MATH")
    found = []
    for name, make in makers.items():
        if name in without:
            continue
        try:
            runner = with_gradients(name, make(), q, k, v, grad)
            runner.forward()
            runner.backward()
            found.append(runner)
        except Exception as error:  # one that is not installed, or does not suit this machine
            print(f"  {name} does not run: {str(error).partition(chr(10))[0] or repr(error)}", flush=True)
    return found


def with_gradients(name: str, run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Runner:
    """run(q, k, v) -> out, all [batch, tokens, heads, dim]."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    kept: list[Tensor] = []

    def forward() -> Tensor:
        kept[:] = [run(*inputs)]
        return kept[0].detach()

    return Runner(name, forward, lambda: torch.autograd.grad(kept[0], inputs, grad, retain_graph=True))


def heads_first(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: run(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)


def sdpa(backend: str) -> Callable[..., Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return heads_first(run)


def flash_attention_4(case: Case, pattern: Pattern, device: torch.device) -> Callable[..., Tensor]:
    from flash_attn.cute import flash_attn_func

    if isinstance(pattern, BlockSparse):
        tables = (
            block_table(pattern.row_ptr, pattern.col, device),
            block_table(*transposed(pattern.row_ptr, pattern.col), device),
        )
        options = dict(block_sparse_tensors=tables[0], block_sparse_tensors_bwd=tables[1])
    else:
        options = dict(causal=True, window_size=(None, None) if case.window is None else (case.window - 1, 0))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return run


def transposed(row_ptr: Sequence[int], col: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same blocks of a square matrix by column."""
    row = np.repeat(np.arange(len(row_ptr) - 1), np.diff(row_ptr))
    order = np.lexsort((row, np.asarray(col)))
    return np.searchsorted(np.asarray(col)[order], np.arange(len(row_ptr))), row[order]


def block_table(row_ptr: Sequence[int], col: Sequence[int], device: torch.device) -> object:
    """FlashAttention-4's form of whole blocks: how many each row has, and which."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    count = np.diff(row_ptr)
    index = np.zeros((len(count), int(count.max())), np.int32)
    index[np.arange(index.shape[1]) < count[:, None]] = np.asarray(col)
    full = [torch.from_numpy(x.astype(np.int32)).to(device)[None, None] for x in (count, index)]
    return BlockSparseTensorsTorch(
        torch.zeros_like(full[0]), torch.zeros_like(full[1]), *full, block_size=(BLOCK, BLOCK)
    )


def flex_attention(case: Case, pattern: Pattern, length: int, device: torch.device) -> Callable[..., Tensor]:
    from torch._functorch import config as functorch_config
    from torch.nn.attention import flex_attention as flex

    blocks = length // BLOCK
    has = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    if isinstance(pattern, BlockSparse):
        row = np.repeat(np.arange(blocks), np.diff(pattern.row_ptr))
        has[torch.from_numpy(row).to(device), torch.tensor(pattern.col, device=device)] = True
    window, globals_ = case.window or length, case.globals_

    def in_a_block(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return has[q // BLOCK, k // BLOCK]

    def in_the_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((q - k < window) | (k < globals_))

    allowed = in_the_window if case.blocks is None else in_a_block
    functorch_config.donated_buffer = False  # the backward pass is timed again and again
    mask = torch.compile(flex.create_block_mask)(allowed, None, None, length, length, device=str(device))
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return heads_first(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True))


def error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> float:
    rows = torch.linspace(0, q.shape[1] - 1, SAMPLED).long()
    expected, _ = reference.attention_rows(q[:, rows.to(q.device)], rows, k, v, pattern)
    return reference.max_error(out[:, rows.to(q.device)], expected)


def seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """How long it takes, and how long the host was busy with it."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        began = time.perf_counter()
        run()
        host = time.perf_counter() - began
        stop.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(stop), host
    began = time.perf_counter()
    run()
    took = time.perf_counter() - began
    return took, took


def measure(
    case: Case, shrink: int, rounds: int, without: Sequence[str], device: torch.device
) -> list[dict[str, object]]:
    length = max(case.length // shrink, 2 * BLOCK)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, length, heads, DIM, generator=generator, device=device, dtype=dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    pattern = case.pattern(length)
    mine, pairs = ours(q, k, v, grad, pattern)
    if case.dense:
        pairs = length * (length + 1) // 2
    runners = [mine, *peers(case, q, k, v, grad, pattern, without)]
    errors = {runner.name: error_of(runner.forward(), q, k, v, pattern) for runner in runners}
    if errors["distattn"] > TOLERANCE[dtype]:
        raise SystemExit(f"{case.name}: error {errors['distattn']:.1e}; expected at most {TOLERANCE[dtype]:g}")
    rows = []
    for way in ("forward", "backward"):
        times: dict[str, list[float]] = {runner.name: [] for runner in runners}
        launches: dict[str, list[float]] = {runner.name: [] for runner in runners}
        mebibytes: dict[str, float] = {}
        for number in range(rounds + 2):
            for runner in runners:
                if number == 0:
                    runner.forward()
                before = start_of_peak(device)
                took, host = seconds(getattr(runner, way), device)
                mebibytes[runner.name] = peak_since(before, device)
                if number >= 2:  # the first two warm up
                    times[runner.name].append(took)
                    launches[runner.name].append(host)
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
                    "host_ms": round(1e3 * statistics.median(launches[name]), 3),
                    "ours_over_this": round(statistics.median(times["distattn"]) / median, 3),
                    "mib": round(mebibytes[name]),
                    "max_error": f"{errors[name]:.1e}",
                }
            )
            print("  " + "  ".join(f"{key} {value}" for key, value in [*rows[-1].items()][2:]), flush=True)
    return rows


def plot(rows: list[dict[str, object]], path: Path, device: object) -> None:
    """TFLOP/s by case: forward above, backward below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases, kernels = (list(dict.fromkeys(row[name] for row in rows)) for name in ("case", "kernel"))
    figure, axes = pyplot.subplots(2, 1, figsize=(12, 8), sharex=True, layout="constrained")
    for axis, way in zip(axes, ("forward", "backward"), strict=True):
        for number, kernel in enumerate(kernels):
            mine = {row["case"]: row["tflops"] for row in rows if row["way"] == way and row["kernel"] == kernel}
            at = [cases.index(case) + (number - (len(kernels) - 1) / 2) * 0.8 / len(kernels) for case in mine]
            bars = axis.bar(at, list(mine.values()), 0.8 / len(kernels), label=kernel)
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_ylabel(f"{way}, TFLOP/s")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(ncols=len(kernels), frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes[1].set_xticks(range(len(cases)), [str(case).replace(" + ", "\n+ ") for case in cases])
    figure.suptitle(f"Attention kernels on {device}, bfloat16, {HEADS}/{KV_HEADS} heads of {DIM}")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES], metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--rounds", type=positive, default=10, help="timed rounds of each case (default 10)")
    parser.add_argument("--shrink", type=positive, default=1, help="divide lengths by this (default 1)")
    parser.add_argument("--without", nargs="+", choices=PEERS, default=[], metavar="KERNEL", help=", ".join(PEERS))
    add_output(parser)
    parser.add_argument("--plot", type=in_a_folder, help="where to draw them, a PNG")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where, rows = here(arguments.commit), []
    for name in arguments.cases:
        print(name, flush=True)
        rows += measure(CASES[name], arguments.shrink, arguments.rounds, arguments.without, device)
        torch.cuda.empty_cache()
        if arguments.csv:  # after every case, so that a later failure loses nothing
            write_rows(arguments.csv, [row | where for row in rows])
    if arguments.plot:
        plot(rows, arguments.plot, where["device"])


if __name__ == "__main__":
    sys.exit(main())

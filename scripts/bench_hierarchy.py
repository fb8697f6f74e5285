#!/usr/bin/env python3
"""The hierarchical pass on one GPU (or CPU): times of its parts, and of dense attention in the same process.

    python scripts/bench_hierarchy.py [--cases NAME ...] [--rounds 5] [--shrink 1] [--forward-only] [--csv FILE]

Parts are timed where they run, on a GPU by events and without waiting for it: summaries (pooling), choice (scores and
top-k), tables (of what is visited), and attention, which is the rest. "backward" is the backward pass.
"of causal pairs" is what share of all causal (query, key) pairs is visited, a summary counted as one key.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from measuring import add_output, here, positive, synchronize, write_rows
from torch import Tensor

import distattn.attend  # noqa: F401  (the module is looked up below: its name is that of its function)
from distattn import presets
from distattn.chosen import ChosenChunks
from distattn.extras import AttentionExtras, Mlp, MlpPool
from distattn.plan import make_plan
from distattn.spec import AttentionSpec

ATTEND: Any = sys.modules["distattn.attend"]
PARTS = {
    (ATTEND, "pool_own"): "summaries",
    (ATTEND, "gather_summaries"): "summaries",
    (ATTEND, "make_summaries"): "summaries",
    (ATTEND, "scorers_of"): "choice",
    (ATTEND, "choose"): "choice",
    (ATTEND, "summary_table"): "tables",
    (ChosenChunks, "tables"): "tables",
}


class Case(NamedTuple):
    length: int
    heads: int
    kv_heads: int
    dim: int
    spec: AttentionSpec
    dense: bool  # whether dense attention is timed as well
    block: int = 128


HIERARCHICAL = presets.hierarchical(1024, (64, 1024), (64,), 16, "tile", global_keys=range(64))
COMBINER = presets.combiner(1024)
CASES = {
    "hierarchical, 256K": Case(262_144, 32, 8, 128, HIERARCHICAL, True),
    "hierarchical, 1M": Case(1_048_576, 32, 8, 128, HIERARCHICAL, False),
    "two levels, no choice, 1M": Case(1_048_576, 32, 8, 128, COMBINER, False),
    "NSA, 64K": Case(65_536, 64, 4, 128, presets.nsa(), True),
}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


class Parts:
    """Times the parts of a call while it is entered."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.kept, self.marks = device, {}, []

    @property
    def seconds(self) -> dict[str, float]:
        """Of each part; once the device is done."""
        found = dict.fromkeys(PARTS.values(), 0.0)
        for part, began, ended in self.marks:
            found[part] += began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
        return found

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> Parts:
        for (owner, name), part in PARTS.items():
            self.kept[owner, name] = getattr(owner, name)
            setattr(owner, name, self._timed(self.kept[owner, name], part))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), function in self.kept.items():
            setattr(owner, name, function)

    def _timed(self, function: Callable[..., object], part: str) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            began = self._now()
            found = function(*arguments)
            self.marks.append((part, began, self._now()))
            return found

        return run


def extras_of(case: Case, q: Tensor) -> AttentionExtras:
    if case.spec.merge == "softmax":
        return AttentionExtras()
    level = case.spec.summaries[0]

    def random(*shape: int) -> Tensor:
        return (0.02 * torch.randn(shape, device=q.device)).to(q.dtype).requires_grad_()

    mlps = [Mlp(random(level.chunk, case.dim), random(256, level.chunk * case.dim), random(256), random(case.dim, 256))]
    sources = 1 + bool(case.spec.summaries) + (case.spec.select is not None)
    return AttentionExtras(random(*q.shape[:3], sources), (MlpPool(mlps[0], mlps[0]),))


def measure(
    name: str, case: Case, rounds: int, shrink: int, forward_only: bool, device: torch.device
) -> dict[str, object]:
    length = max(case.length // shrink, 2048)
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, grad = (
        torch.randn(1, length, heads, case.dim, generator=generator, device=device, dtype=dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    extras = extras_of(case, q)
    began = time.perf_counter()
    plan = make_plan(
        case.spec,
        length,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.dim,
        block_q=case.block,
        block_k=case.block,
    )
    assert plan.hierarchy is not None
    _ = plan.stages, plan.hierarchy.levels and case.spec.select is None and plan.hierarchy.table
    row: dict[str, object] = {"case": name, "tokens": length, "planning_ms": 1e3 * (time.perf_counter() - began)}

    def forward() -> Tensor:
        return ATTEND.attend(q, k, v, plan, extras=extras)

    times: dict[str, list[float]] = {}
    with torch.no_grad():
        forward()
        for _ in range(rounds):
            times.setdefault("forward", []).append(seconds(forward, device))
            with Parts(device) as parts:
                whole = seconds(forward, device)
            for part, took in parts.seconds.items():
                times.setdefault(part, []).append(took)
            times.setdefault("attention", []).append(whole - sum(parts.seconds.values()))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            forward()
        row["forward_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for number in range(0 if forward_only else rounds + 1):
        out = forward()
        took = seconds(lambda out=out: torch.autograd.grad(out, inputs, grad), device)
        if number:
            times.setdefault("backward", []).append(took)
        del out
    if case.dense and not forward_only:
        for way, took in dense_seconds(q, k, v, grad, rounds, device).items():
            times[way] = took
    row |= {f"{part}_ms": round(1e3 * statistics.median(took), 3) for part, took in times.items()}
    row["of_causal_pairs"] = f"{visited_share(plan):.4%}"
    return row


def dense_seconds(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Dense causal attention by PyTorch's own op, cuDNN on a GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else SDPBackend.MATH
    tensors = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    times: dict[str, list[float]] = {"dense_forward": [], "dense_backward": []}
    for number in range(min(rounds, 2) + 1):
        kept: list[Tensor] = []

        def forwards(kept: list[Tensor] = kept) -> None:
            with sdpa_kernel(backend):
                kept.append(scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True))

        def backwards(kept: list[Tensor] = kept) -> None:
            torch.autograd.grad(kept[0], tensors, grad.transpose(1, 2))

        forward, backward = seconds(forwards, device), seconds(backwards, device)
        if number:
            times["dense_forward"].append(forward)
            times["dense_backward"].append(backward)
    return times


def visited_share(plan: Any) -> float:
    """Visited (query, key) pairs of a head over all causal ones."""
    pairs = sum(work.pairs for work in plan.work()) / plan.heads
    return float(pairs / (plan.seq_len * (plan.seq_len + 1) / 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES], metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds of each case (default 5)")
    parser.add_argument("--shrink", type=positive, default=1, help="divide lengths by this (default 1)")
    parser.add_argument("--forward-only", action="store_true", help="neither backward passes nor dense attention")
    add_output(parser)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, object]] = []
    for name in arguments.cases:
        rows.append(
            measure(name, CASES[name], arguments.rounds, arguments.shrink, arguments.forward_only, device)
            | here(arguments.commit)
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if arguments.csv:
            write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()

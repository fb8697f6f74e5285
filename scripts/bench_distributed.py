#!/usr/bin/env python3
"""Attention over a sharded sequence on several GPUs: ours beside others, in one job.

    torchrun --nproc-per-node=N scripts/bench_distributed.py [--cases NAME ...] [--scaling [NAME ...]] [--rounds 10]
        [--shrink 1] [--seconds S] [--forward-only] [--schedules NAME ...] [--without NAME ...] [--machine FILE]
        [--csv FILE [--append]] [--plot FILE.png] [--commit NAME]

Every round runs each contender once, in turn, since GPUs that are limited by power change their clocks. Before each
step all ranks wait for each other; a step's time is that of the slowest rank, from its start on an idle GPU until the
GPU is done; a row has the median of the rounds. What peers.py describes is measured beside ours.

Before a contender is timed, sampled rows of its output are checked against the float64 oracle, and those of its
gradients against ours (but of the position 0, whose gradient of the query is 0); before that, at a small length, all
outputs and gradients of ours, and of what compiles nothing, are checked against the oracle's. Errors of sampled rows
are relative to the largest number of the row and head. One that is wrong is not timed, and the exit code is 1. Where
chunks are chosen by the data, the output is checked for the chunks that were chosen, and gradients are left to the
tests. "max_error" of our gradients is that of the small length.

Columns: "tflops" a GPU counts 4 heads head_dim pairs, of attended pairs, forward, and 3.5 times that forward and
backward. "exposed_percent" is the share of the step by which it is longer than one in which the same data arrives
without a journey (recorded.py), timed in the same rounds. "host_ms" is how long the call keeps the host. "sent_mb" is
what the rank that sends most gives to torch.distributed in a step. "peak_mib" is what PyTorch allocates at the peak of
a step beyond what was there before; "held_mib" adds q, k, v and, with a backward pass, the output's gradient;
"planned_mib" is what plan.explain() says to that. NCCL's buffers are in none of them. Where ranks differ it is the
largest.

--scaling: the same on groups of 1, 2, 4, ... of the job's GPUs. All groups of a size run at the same time, each the
whole problem, and the slowest counts; so all GPUs are as warm at any size. "efficiency" is the planned FLOPs (of
visited tiles) a second and GPU, over those of groups of 1.

On CPUs it runs with gloo, in float32, and with fewer peers: --shrink 512 divides lengths and windows by 512.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
import torch.distributed as dist
from contending import (
    GRADIENTS,
    OUTPUTS,
    SHOWN,
    Checker,
    Job,
    Shares,
    Timed,
    everything,
    judged,
    line,
    measure,
    small_error,
)
from measuring import add_output, in_a_folder, positive, read_rows
from peers import Contender, Maker, Problem
from plot_distributed import draw
from sharded import Data
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import distattn
from distattn import presets
from distattn.operators import sent
from distattn.patterns import Causal, GlobalKeys, SlidingWindow
from distattn.plan import SCHEDULES, Plan
from distattn.spec import AttentionSpec

DIM = 128
HIERARCHICAL = presets.hierarchical(1024, (64, 1024), (64,), 16, "tile", global_keys=range(64))


class Case(NamedTuple):
    """What is attended. length: in all; or, if ``of`` is "gpu", on each; "work": so that a dense GPU's work is alike.

    kind: "causal", "window" (causal, and ``globals_`` global keys), "longformer" (``window`` to each side, and global
    tokens), or "hierarchical". backward: who is measured with a backward pass: "all", "ours", or "nobody". asked:
    only measured by name, or on 8 GPUs.
    """

    kind: str
    length: int
    backward: str = "nobody"
    window: int = 0
    globals_: int = 0
    heads: int = 32
    kv_heads: int = 8
    of: str = "all"
    asked: bool = False

    def on(self, ranks: int, shrink: int) -> tuple[int, Case]:
        """(tokens, what is attended) on so many ranks, with lengths and windows divided by ``shrink``."""
        length = self.length * {"all": 1.0, "gpu": ranks, "work": math.sqrt(ranks)}[self.of]
        unit = 256 * ranks  # every rank gets two runs of whole tiles, whatever the layout
        least = 2048 if self.kind == "hierarchical" else 2 * unit
        length = max(unit * round(length / shrink / unit), unit * -(-least // unit))
        return length, self._replace(window=self.window and max(self.window // shrink, 128))

    def spec(self) -> AttentionSpec:
        if self.kind == "hierarchical":
            return HIERARCHICAL
        if self.kind == "longformer":
            return presets.longformer(self.window, global_tokens=range(self.globals_))
        if self.kind == "causal":
            return AttentionSpec(Causal())
        return AttentionSpec(Causal() & (SlidingWindow(self.window - 1, 0) | GlobalKeys(range(self.globals_))))

    def problem(self, length: int, mesh: DeviceMesh, device: torch.device) -> Problem:
        """As peers take it."""
        two_sided = self.kind == "longformer"
        before = {"causal": None, "longformer": self.window}.get(self.kind, self.window - 1)
        after = self.window if two_sided else 0
        return Problem(length, self.heads, self.kv_heads, before, after, self.globals_, two_sided, mesh, device)


WINDOW = {"window": 4096, "globals_": 64}
CASES = {
    "dense causal, 128K": Case("causal", 131_072, "all"),
    "dense causal, 512K": Case("causal", 524_288, "all"),
    "window 4,096 + 64 globals, 128K": Case("window", 131_072, "all", **WINDOW),
    "window 4,096 + 64 globals, 1M": Case("window", 1_048_576, "ours", **WINDOW),
    "Longformer 2 x 2,048 + 64 globals, 1M": Case("longformer", 1_048_576, window=2048, globals_=64),
    "hierarchical, 1M": Case("hierarchical", 1_048_576, "ours"),
    "dense causal, 64/8 heads, 8K a GPU": Case("causal", 8192, "all", heads=64, of="gpu"),
    "hierarchical, 2M": Case("hierarchical", 2_097_152, "ours", asked=True),
    "dense causal, 1M": Case("causal", 1_048_576, asked=True),
}
SCALING = {
    "weak, dense causal": Case("causal", 65_536, "ours", of="work"),
    "weak, window 4,096 + 64 globals": Case("window", 131_072, "ours", of="gpu", **WINDOW),
    "weak, hierarchical": Case("hierarchical", 262_144, "ours", of="gpu"),
    "strong, dense causal, 128K": Case("causal", 131_072, "ours"),
    "strong, window 4,096 + 64 globals, 1M": Case("window", 1_048_576, "ours", **WINDOW),
    "strong, hierarchical, 512K": Case("hierarchical", 524_288, "ours"),
}
PEERS = (*peers.makers(dense=True), *peers.makers(dense=False))

SMALL = 512  # tokens a rank when all outputs and gradients are checked


def our_contender(problem: Problem, spec: AttentionSpec, schedule: str) -> tuple[Contender, Plan]:
    plan = distattn.make_plan(
        spec,
        problem.length,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        head_dim=DIM,
        mesh=problem.mesh,
        schedule=schedule,
    )
    return Contender(
        name_of(schedule), plan.segments, lambda q, k, v: distattn.attend(q, k, v, plan), sent=lambda: sent.total
    ), plan


def name_of(schedule: str) -> str:
    return "distattn" if schedule == "auto" else f"distattn, {schedule}"


class Measured:
    """One case: its contenders are made, checked, timed."""

    def __init__(self, job: Job, name: str, case: Case) -> None:
        self.job, self.name, self.case = job, name, case
        self.backward = case.backward != "nobody" and not job.arguments.forward_only
        self.shares = Shares(self.backward)
        self.contenders: list[Timed] = []
        self.small: dict[bool, list[Tensor]] = {}  # what is right at a small length, with gradients or without
        self.small_errors: dict[str, float | None] = {}

    def data(self, length: int) -> Data:
        return Data(length, self.case.heads, self.case.kv_heads, DIM, self.job.dtype, self.job.device)

    def add(self, contender: Contender, plan: Plan | None, length: int, mesh: DeviceMesh) -> None:
        self.contenders.append(self.shares.timed(contender, plan, self.data(length), mesh.size(), mesh.get_group()))

    def small_case(self, ranks: int) -> tuple[int, Case]:
        return self.case.on(ranks, max(1, self.case.length // (SMALL * ranks)))

    def wrong_when_small(self, what: str, make: Maker, mesh: DeviceMesh, gradients: bool, way: int, last: bool) -> bool:
        """Whether all of an output, and of the gradients, is not what the oracle says, or cannot be computed.

        way: the number of this way to make the contender. last: whether there is no other.
        """
        job, ranks = self.job, mesh.size()
        length, case = self.small_case(ranks)
        data, spec = self.data(length), case.spec()

        def error() -> float:
            contender = make(case.problem(length, mesh, job.device))
            timed = Shares(gradients).timed(contender, None, data, ranks, mesh.get_group())
            if gradients not in self.small:
                self.small[gradients] = everything(data, spec, gradients)
            return small_error(timed, self.small[gradients])

        key = what, way, spec.text, case.heads, gradients  # cases may be alike when they are small
        if key not in job.trials:
            job.trials[key] = judged(job, f"{what}, {length:,} tokens", error, GRADIENTS[job.dtype], last)
        self.small_errors[what] = job.trials[key]
        return job.trials[key] is None

    def time(self, checkers: dict[int, Checker], mode: str) -> None:
        """Forward, and then with a backward pass. checkers: by length."""
        job, dtype = self.job, self.job.dtype
        about: dict[str, object] = {"mode": mode, "case": self.name}
        about["heads"] = f"{self.case.heads}/{self.case.kv_heads}"
        for backward in (False, True) if self.backward else (False,):
            right: list[Timed] = []
            errors: list[float | None] = []
            for timed in self.contenders:
                if backward and timed.plan is None and self.case.backward != "all":
                    continue
                checker = checkers[timed.length]
                check, tolerance = (checker.gradient_error, GRADIENTS) if backward else (checker.output_error, OUTPUTS)
                what = f"{self.name}: {timed.name} on {timed.ranks}, {'gradients' if backward else 'output'}"
                alone = backward and not checker.has_gradients
                error = judged(job, what, lambda check=check, timed=timed: check(timed), tolerance[dtype])
                if error is not None:
                    right.append(timed)
                    errors.append(self.small_errors.get(timed.name) if alone else error)
            self.contenders = right
            if right and right[0].plan is not None:
                if not backward:
                    job.say(line({name: name for name in SHOWN}))
                measure(job, about, right, backward, errors)


def measure_beside_peers(job: Job, name: str, case: Case, mesh: DeviceMesh) -> None:
    length, case = case.on(job.ranks, job.arguments.shrink)
    measured = Measured(job, name, case)
    problem, spec = case.problem(length, mesh, job.device), case.spec()
    for schedule in ("auto", *job.arguments.schedules):
        what = name_of(schedule)

        def small(problem: Problem, schedule: str = schedule) -> Contender:
            return our_contender(problem, measured.small_case(job.ranks)[1].spec(), schedule)[0]

        if spec.is_static and measured.wrong_when_small(what, small, mesh, measured.backward, 0, True):
            continue
        found, why = job.tried(lambda schedule=schedule: our_contender(problem, spec, schedule))
        if why:
            job.say(f"  {what} is left out: {why}")
        else:
            measured.add(*found, length, mesh)
    others = {} if case.kind == "hierarchical" else peers.makers(problem.dense)
    for what, ways in others.items():
        if what in job.arguments.without:
            continue
        contender = first_that_runs(measured, what, ways, problem)
        if contender is not None:
            measured.add(contender, None, length, mesh)
    measured.time({length: Checker(measured.data(length), spec)}, "peers")


def first_that_runs(measured: Measured, what: str, ways: list[Maker], problem: Problem) -> Contender | None:
    job, mesh, reasons = measured.job, problem.mesh, []
    gradients = measured.backward and measured.case.backward == "all"
    for way, make in enumerate(ways):
        last = way == len(ways) - 1
        found, why = job.tried(lambda make=make: make(problem))
        if why:
            reasons.append(why)
        elif found.compiles or not measured.wrong_when_small(what, make, mesh, gradients, way, last):
            return found
    for why in dict.fromkeys(reasons):
        job.say(f"  {what} is left out: {why}")
    return None


def measure_scaling(job: Job, name: str, case: Case, meshes: dict[int, DeviceMesh]) -> None:
    measured, checkers = Measured(job, name, case), {}
    for ranks, mesh in meshes.items():
        length, shrunk = case.on(ranks, job.arguments.shrink)
        problem = shrunk.problem(length, mesh, job.device)
        contender, plan = our_contender(problem, shrunk.spec(), "auto")
        measured.add(contender, plan, length, mesh)
        checkers.setdefault(length, Checker(measured.data(length), shrunk.spec()))
    measured.time(checkers, "scaling")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--scaling", nargs="*", choices=[*SCALING], metavar="NAME", help="; ".join(SCALING))
    parser.add_argument("--rounds", type=positive, default=10, help="timed rounds of each case (default 10)")
    parser.add_argument("--shrink", type=positive, default=1, help="divide lengths and windows by this (default 1)")
    parser.add_argument("--seconds", type=positive, help="begin no case after so long; those left out are named")
    parser.add_argument("--forward-only", action="store_true", help="no backward passes")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=[], help="of ours, beside the chosen one")
    parser.add_argument("--without", nargs="+", choices=PEERS, default=[], metavar="NAME", help="; ".join(PEERS))
    parser.add_argument("--machine", type=Path, help="a JSON file of the machine to predict for (default: an H100)")
    add_output(parser)
    parser.add_argument("--append", action="store_true", help="keep the rows that the CSV has")
    parser.add_argument("--plot", type=in_a_folder, help="where to draw what the CSV then has, a PNG")
    arguments = parser.parse_args()
    if arguments.plot and not arguments.csv:
        parser.error("--plot draws what is in --csv, which is not given")
    job = Job(arguments)
    mesh = init_device_mesh(job.device.type, (job.ranks,), mesh_dim_names=("ranks",))
    names = arguments.cases or []
    if arguments.cases is None and arguments.scaling is None:
        names = [name for name, case in CASES.items() if not case.asked or job.ranks == 8]
    todo: list[tuple[str, Callable[[], None]]] = [
        (name, lambda name=name: measure_beside_peers(job, name, CASES[name], mesh)) for name in names
    ]
    if arguments.scaling is not None:
        sizes = [2**n for n in range(job.ranks.bit_length()) if job.ranks % 2**n == 0]
        dims = "copies", "ranks"
        meshes: dict[int, Any] = {
            n: init_device_mesh(job.device.type, (job.ranks // n, n), mesh_dim_names=dims)["ranks"] for n in sizes
        }
        for name in arguments.scaling or [*SCALING]:
            todo.append((name, lambda name=name: measure_scaling(job, name, SCALING[name], meshes)))
    job.say(f"{job.ranks} ranks, {job.where['device']}, {job.dtype}, torch {job.where['torch']}")
    for at, (name, run) in enumerate(todo):
        if not job.in_time():
            job.say(f"{arguments.seconds} s are over. Left out: {'; '.join(name for name, _ in todo[at:])}")
            break
        job.say(f"== {name}")
        _, why = job.tried(run)
        if why:
            job.wrong.append(f"{name} ended early: {why}")
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.plot and job.rank == 0:
        draw(read_rows(arguments.csv), arguments.plot)
    for why in job.wrong:
        job.say(f"WRONG: {why}")
    job.say("done")
    dist.destroy_process_group()
    return 1 if job.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""How contenders are checked and timed on all ranks of a job; what bench_distributed.py measures with."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from measuring import here, peak_since, read_rows, start_of_peak, synchronize, write_rows
from peers import CannotRun, Contender
from recorded import Recorded
from sharded import Data, Segments, assemble, error_of, oracle, sampled
from torch import Tensor

import distattn
from distattn import reference
from distattn.forecast import plan_peak_bytes, predict
from distattn.launch.ranks import prepare_nccl
from distattn.machine import Machine
from distattn.operators import sent
from distattn.plan import DEFAULT_MACHINE, Plan
from distattn.spec import AttentionSpec

TIMEOUT = timedelta(seconds=240)  # of a collective; the slowest thing between two of them is a compilation
OUTPUTS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # tolerance
GRADIENTS = {torch.bfloat16: 5e-2, torch.float32: 1e-3}  # tolerance
LONG = 10.0  # seconds: the timed steps of a contender end when they took as long, but not before there are...
FEWEST = 3
VERY_LONG, TWO = 4.0, 2  # seconds of one step, of which two will do; what such a one exposes is not asked


SHOWN = {  # columns that are printed, and how wide
    "contender": 32,
    "ranks": 6,
    "way": 17,
    "ms": 10,
    "tflops": 8,
    "ours_over_this": 15,
    "exposed_percent": 16,
    "efficiency": 11,
    "predicted_ms": 13,
    "held_mib": 9,
    "planned_mib": 12,
    "sent_mb": 10,
    "host_ms": 9,
    "max_error": 10,
    "rounds": 7,
    "note": 0,
}


def line(row: dict[str, object]) -> str:
    """Of the printed table."""
    cells = ["" if x is None else str(x) for x in row.values()]
    widths = [*SHOWN.values()]
    middle = "".join(x.rjust(n) for x, n in zip(cells[1:-1], widths[1:-1], strict=True))
    return f"{cells[0]:<{widths[0]}}{middle}  {cells[-1]}"


def machine_of(path: Path | None) -> Machine:
    """What predictions are made with: a file that scripts/calibrate.py wrote; without one the library's default."""
    return Machine.load(DEFAULT_MACHINE if path is None else path)


def predicted_ms(plan: Plan, itemsize: int, backward: bool, machine: Machine) -> float:
    """What the cost model says a step takes: a forward pass, and a backward pass after it."""
    passes = [predict(plan, machine, itemsize, backward=way) for way in ((False, True) if backward else (False,))]
    return 1e3 * float(sum(found.total for found in passes).max())


class Job:
    """This rank's part of the job: how ranks talk, and the rows so far, which rank 0 prints and writes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.began = arguments, time.perf_counter()
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
            prepare_nccl()
        backend, device_id = ("nccl", self.device) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.talk = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self.machine = machine_of(arguments.machine)
        self.where = {"gpus": self.ranks} | here(arguments.commit)
        self.earlier = read_rows(arguments.csv) if arguments.csv and arguments.append else []
        self.rows: list[dict[str, object]] = []
        self.wrong: list[str] = []
        self.trials: dict[tuple[object, ...], float | None] = {}  # errors at a small length; None: does not run

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{self.elapsed:6.1f} s] {text}", flush=True)

    def everywhere(self, x: Any) -> list[Any]:
        """What each rank has."""
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, x, group=self.talk)
        return found

    def largest(self, x: Sequence[float]) -> list[float]:
        """Number by number, over all ranks."""
        return [max(every) for every in zip(*self.everywhere([*x]), strict=True)]

    def tried(self, run: Callable[[], Any]) -> tuple[Any, str | None]:
        """(what it returns, None), or (None, why it fails on some rank): whether it fails is the same on all ranks."""
        found, why = None, None
        try:
            found = run()
            synchronize(self.device)
        except Exception as error:  # one that is not installed, does not suit the machine, or does not fit
            text = str(error).strip().partition("\n")[0] or repr(error)
            why = text if isinstance(error, CannotRun) else f"{type(error).__name__}: {text}"
        reasons = [reason for reason in self.everywhere(why) if reason is not None]
        return (None, reasons[0]) if reasons else (found, None)

    def in_time(self) -> bool:
        limit = self.arguments.seconds
        return limit is None or self.largest([self.elapsed])[0] < limit

    def add(self, row: dict[str, object]) -> None:
        """Printed and written at once, so that a job that is cut off keeps it."""
        self.say(line({name: row[name] for name in SHOWN}))
        self.rows.append(row | {"elapsed_s": round(self.elapsed, 1)} | self.where)
        if self.rank == 0 and self.arguments.csv:
            write_rows(self.arguments.csv, [*self.earlier, *self.rows])


class Timed(NamedTuple):
    """A contender with its data, on so many ranks. plan: of ours, None of a peer. grad: of the output, or None."""

    contender: Contender
    plan: Plan | None
    ranks: int
    length: int
    group: dist.ProcessGroup
    inputs: list[Tensor]
    grad: Tensor | None

    @property
    def name(self) -> str:
        return self.contender.name

    def output(self) -> Tensor:
        with self.contender.around(), torch.no_grad():
            return self.contender.attend(*self.inputs)

    def gradients(self) -> list[Tensor]:
        """(dq, dk, dv); of repeated key/value heads the sum."""
        with self.contender.around():
            dq, *rest = self._both()
        repeats = self.contender.repeats
        return [dq, *(x if repeats == 1 else x.float().unflatten(2, (-1, repeats)).sum(3) for x in rest)]

    def _both(self) -> tuple[Tensor, ...]:
        assert self.grad is not None
        return torch.autograd.grad(self.contender.attend(*self.inputs), self.inputs, self.grad)

    def step(self, job: Job, backward: bool, around: AbstractContextManager[Any] | None = None) -> tuple[float, float]:
        """Seconds from when all ranks are ready until this one's device is done; and how long the host was kept."""
        on_gpu = job.device.type == "cuda"
        with self.contender.around(), around or nullcontext(), torch.set_grad_enabled(backward):
            synchronize(job.device)
            dist.barrier(device_ids=[job.device.index] if on_gpu else None)
            synchronize(job.device)
            began = time.perf_counter()
            result = self._both() if backward else self.contender.attend(*self.inputs)
            host = time.perf_counter() - began
            synchronize(job.device)
            took = time.perf_counter() - began
            del result
        return took, host

    def input_mib(self, backward: bool) -> float:
        more = 0 if self.grad is None or not backward else self.grad.nbytes
        return (sum(x.nbytes for x in self.inputs) + more) / 2**20


class Shares:
    """Each layout's rows of q, k, v and the output's gradient, made once for all contenders that have it."""

    def __init__(self, backward: bool) -> None:
        self._backward = backward
        self._found: dict[tuple[int, Segments, int], tuple[list[Tensor], Tensor | None]] = {}

    def timed(self, contender: Contender, plan: Plan | None, data: Data, ranks: int, group: dist.ProcessGroup) -> Timed:
        key = data.length, contender.segments, contender.repeats
        if key not in self._found:
            q, k, v = (data.rows(kind, contender.segments) for kind in ("q", "k", "v"))
            if contender.repeats > 1:
                k, v = (x.repeat_interleave(contender.repeats, dim=2) for x in (k, v))
            grad = data.rows("grad", contender.segments) if self._backward else None
            self._found[key] = [x.requires_grad_(self._backward) for x in (q, k, v)], grad
        return Timed(contender, plan, ranks, data.length, group, *self._found[key])


class Checker:
    """Sampled rows of one problem: the oracle's outputs, and the gradients of the first contender, which is ours."""

    def __init__(self, data: Data, spec: AttentionSpec) -> None:
        self._data, self._spec, self._positions = data, spec, sampled(data.length)
        self._expected: Tensor | None = None
        self._gradients: list[Tensor] | None = None

    def output_error(self, timed: Timed) -> float:
        plan, chosen = timed.plan, None
        if plan is not None and plan.spec.select is not None:
            with torch.no_grad():
                out, selection = distattn.attend(*timed.inputs, plan, return_selection=True)
            size = plan.spec.select.chunk if plan.spec.select.per == "tile" else 1
            by_row = selection.chunks[0].transpose(0, 1).repeat_interleave(size, dim=0)[: plan.tokens]
            chosen = self._sampled(timed, by_row)
        else:
            out = timed.output()
        if self._expected is None:
            self._expected = oracle(self._data, self._spec, self._positions, chosen)[0]
        return error_of(self._sampled(timed, out[0]), self._expected)

    @property
    def has_gradients(self) -> bool:
        return self._gradients is not None

    def gradient_error(self, timed: Timed) -> float:
        found = [self._sampled(timed, x[0].float())[1:] for x in timed.gradients()]
        if self._gradients is None:
            self._gradients = found
        return max(error_of(x, y) for x, y in zip(found, self._gradients, strict=True))

    def _sampled(self, timed: Timed, x: Tensor) -> Tensor:
        return assemble(x, timed.contender.segments, self._positions, timed.group)


def everything(data: Data, spec: AttentionSpec, gradients: bool) -> list[Tensor]:
    """The oracle's output, and dq, dk and dv if asked for, of a short sequence."""
    whole = ((0, data.length),)
    inputs = [data.rows(kind, whole).double().requires_grad_(gradients) for kind in ("q", "k", "v")]
    out, _ = reference.attention(*inputs, spec.tokens)
    if not gradients:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, inputs, data.rows("grad", whole).double())]


def small_error(timed: Timed, expected: Sequence[Tensor]) -> float:
    """The largest error of a rank's rows of the output, and of the gradients if those are expected."""
    found = [timed.output(), *(timed.gradients() if len(expected) > 1 else [])]
    mine = [torch.cat([x[:, a:b] for a, b in timed.contender.segments], dim=1) for x in expected]
    return max(reference.max_error(x, y) for x, y in zip(found, mine, strict=True))


def measure(
    job: Job, about: dict[str, object], contenders: Sequence[Timed], backward: bool, errors: Sequence[float | None]
) -> None:
    """Times contenders round by round, the first of which is ours, and adds a row of each. All have run before.

    about: what all rows say.
    """
    steps: list[list[tuple[float, float]]] = [[] for _ in contenders]
    peaks, moved, recorded = [], [], {}
    for at, timed in enumerate(contenders):
        count = timed.contender.sent or (lambda: 0)
        sent_before, held = count(), start_of_peak(job.device)
        steps[at].append(timed.step(job, backward))
        peaks.append(peak_since(held, job.device))
        moved.append((count() - sent_before) / 1e6)
    longest = max(job.largest([took for ((took, _),) in steps]))
    for at, timed in enumerate(contenders):  # after all peaks, since what is recorded takes memory
        if timed.plan is not None and timed.ranks > 1 and longest <= VERY_LONG:
            recorded[at] = Recorded()
            timed.step(job, backward, recorded[at].recording())
    rounds = job.arguments.rounds
    if longest * rounds > LONG:
        rounds = min(rounds, max(TWO if longest > VERY_LONG else FEWEST, int(LONG / longest)))
    at_home: dict[int, list[float]] = {at: [] for at in recorded}
    for number in range(rounds):
        for at, timed in enumerate(contenders):
            if number:  # the first has been
                steps[at].append(timed.step(job, backward))
            if at not in recorded:
                continue
            took, why = job.tried(lambda at=at, timed=timed: without_journeys(job, timed, backward, recorded[at]))
            if why is None:
                at_home[at].append(took)
            else:
                job.say(f"  {timed.name}: what is exposed is not measured: {why}")
                del recorded[at], at_home[at]
    slowest = [job.largest([took for took, _ in every]) for every in steps]
    hosts = [statistics.median(job.largest([host for _, host in every])) for every in steps]
    medians = [statistics.median(every) for every in slowest]
    work = [None if timed.plan is None else timed.plan.work(timed.inputs[0].itemsize) for timed in contenders]
    tiles = [sum(w.flops for w in every or []) for every in work]
    rates = [flops / timed.ranks / took for flops, timed, took in zip(tiles, contenders, medians, strict=True)]
    scaling = about["mode"] == "scaling"
    for at, timed in enumerate(contenders):
        plan, took = timed.plan, medians[at]
        pairs = sum(w.pairs for w in work[at] or work[0] or [])  # peers attend to what our plan attends to
        dim, times = timed.inputs[0].shape[3], 3.5 if backward else 1.0
        peak, mb, held_mib = job.largest([peaks[at], moved[at], peaks[at] + timed.input_mib(backward)])
        row: dict[str, object] = about | {
            "contender": timed.name,
            "ranks": timed.ranks,
            "tokens": timed.length,
            "way": "forward+backward" if backward else "forward",
            "ms": round(1e3 * took, 3),
            "tflops": round(times * 4 * dim * pairs / timed.ranks / took / 1e12, 2),
            "ours_over_this": None if scaling else round(medians[0] / took, 3),
            "exposed_percent": None,
            "efficiency": round(rates[at] / rates[0], 4) if scaling and contenders[0].ranks == 1 else None,
            "layout": None if plan is None else plan.layout.name,
            "schedule": None if plan is None else plan.schedule,
            "predicted_ms": None,
            "planned_tflop": None if plan is None else round(times * tiles[at] / 1e12, 4),
            "planned_mib": None,
            "peak_mib": round(peak),
            "held_mib": round(held_mib),
            "host_ms": round(1e3 * hosts[at], 3),
            "sent_mb": round(mb, 2) if timed.contender.sent else None,
            "fastest_ms": round(1e3 * min(slowest[at]), 3),
            "rounds": rounds,
            "max_error": None if errors[at] is None else f"{errors[at]:.1e}",
            "note": timed.contender.note,
        }
        if at in at_home:
            home = statistics.median(job.largest(at_home[at]))
            row["exposed_percent"] = round(100 * (took - home) / took, 2)
        if plan is not None:
            itemsize = timed.inputs[0].itemsize
            row["predicted_ms"] = round(predicted_ms(plan, itemsize, backward, job.machine), 3)
            row["planned_mib"] = round(plan_peak_bytes(plan, itemsize, backward=backward).max() / 2**20)
        job.add(row)


def without_journeys(job: Job, timed: Timed, backward: bool, recorded: Recorded) -> float:
    """Seconds of a step in which nothing travels."""
    before = sent.total
    took, _ = timed.step(job, backward, recorded.delivered())
    if sent.total != before:
        raise CannotRun("it sends by other ways than those that recorded.py replaces")
    return took


def judged(job: Job, what: str, run: Callable[[], float], tolerance: float, last: bool = True) -> float | None:
    """The error, where it is small enough; else None, and why is said.

    last: whether an error that is too large counts: where another way to do the same follows, it does not.
    """
    error, why = job.tried(run)
    if why is not None:
        job.say(f"  {what} is left out: {why}")
        return None
    error = max(math.inf if math.isnan(x) else x for x in job.everywhere(error))
    if error <= tolerance:
        return float(error)
    why = f"{what}: error {error:.1e}; expected at most {tolerance:g}"
    job.say(f"  {why}: it is not timed")
    if last:
        job.wrong.append(why)
    return None

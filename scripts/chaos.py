"""Random faults in a job of forward and backward steps: each must end in the right result, or in errors that name it.

Every run is a job on ranks of this machine, started as launcher=local does; one rank of it is killed, frozen, slowed
down, and so on, at a random exchange. A run is bad if a survivor ends without a typed error, or too late, if anything
is left running, if any rank got other numbers than one rank alone gets, or if it did not end. Example:

    python scripts/chaos.py --runs 200 --seed 0 --ranks 3 --csv chaos.csv
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distattn.conf.schema import Config
    from distattn.jobs.context import Context
    from distattn.launch.device import Device

GRACE = 10.0
"""Seconds after the deadline within which a faulted run must have ended."""
STEPS = 4
LENGTH = 96
SHAPE: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 16, "block_q": 16, "block_k": 16}
SPECS = ("window", "globals", "ring", "summaries", "chosen")
TYPED = ("PeerLost", "StepTimeout", "PlanMismatch")


@dataclass(frozen=True)
class Fault:
    """What happens to one rank.

    kind: one of KINDS. rank: to which. at: at which of its exchanges, from 1; of "skip" and "extra": in which step,
    from 0. where: count only exchanges with this in their name ("bring": forward passes, "return": backward passes).
    """

    kind: str = "none"
    rank: int = 0
    at: int = 1
    where: str = ""


# Whether the job goes on in spite of it.
KINDS = {
    "none": True,
    "slow": True,  # below the deadline
    "kill": False,
    "freeze": False,
    "raise": False,
    "memory": False,
    "late": False,  # above the deadline
    "skip": False,  # leaves out the backward pass of a step
    "extra": False,  # makes the forward pass of a step twice
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    code: exit code; None: it had to be ended. seconds: from the fault, or from the start if there was none, to the end.
    struck: whether there was a fault. errors: of the ranks that failed, one line each. done: ranks that made all steps.
    left: processes that outlived it.
    """

    code: int | None
    seconds: float
    struck: bool
    errors: dict[int, str]
    done: set[int]
    left: list[int]

    def type_of(self, rank: int) -> str:
        """The name of the error of a rank, such as PeerLost; "" if it has none of ours."""
        found = re.match(r"failed: distattn\.errors\.(\w+): ", self.errors.get(rank, ""))
        return found[1] if found else ""


# The job, which runs on each rank


def work(config: Config, context: Context) -> dict[str, Any]:
    """Forward and backward steps, each compared with what one rank alone gets; job.params say what goes wrong."""
    import torch

    import distattn
    from distattn import exchange
    from distattn.watch import set_deadline

    params: dict[str, Any] = config.job.params  # type: ignore[attr-defined]
    fault = Fault(params["kind"], params["rank"], params["at"], params["where"])
    folder, deadline = context.output_dir, params.get("deadline", config.launcher.timeout)
    (folder / f"pid{context.rank}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    spec, schedule = make_spec(params["spec"])
    plan = distattn.make_plan(spec, LENGTH, mesh=context.mesh, schedule=schedule, **SHAPE)
    alone = distattn.make_plan(spec, LENGTH, **SHAPE)
    struck = folder / "struck"
    seen = 0

    def strike(rank: int, stage: str) -> None:
        nonlocal seen
        seen += fault.where in stage
        if seen == fault.at and fault.where in stage:
            struck.write_text(str(time.time()))
            harm(fault.kind, deadline)

    if params.get("warm"):
        take_step(0, plan, alone, context.device)
    set_deadline(deadline)
    if context.rank == fault.rank and fault.kind not in ("none", "skip", "extra"):
        exchange.before_stage = strike
    for step in range(params.get("steps", STEPS)):
        other = fault.kind if context.rank == fault.rank and step == fault.at else ""
        if other in ("skip", "extra"):
            struck.write_text(str(time.time()))
        take_step(step, plan, alone, context.device, other)
        context.progress("steps", step + 1, params.get("steps", STEPS))
    (folder / f"done{context.rank}").touch()
    return {"report": "all steps are right"}


def make_spec(name: str) -> tuple[Any, str]:
    """A spec and a schedule that exchange in different ways."""
    import distattn
    from distattn.patterns import Causal, GlobalTokens, SlidingWindow

    match name:
        case "window":  # with neighbours
            return distattn.AttentionSpec(Causal() & SlidingWindow(20, 0)), "auto"
        case "globals":  # rows to everyone, and queries
            return distattn.AttentionSpec(SlidingWindow(9, 9) | GlobalTokens(range(0, 60, 17))), "auto"
        case "ring":
            return distattn.presets.dense(), "ring"
        case "summaries":
            summaries = (distattn.Summaries(8, reach=2), distattn.Summaries(32))
            return distattn.AttentionSpec(distattn.chunk_window(8, 2), summaries), "auto"
        case "chosen":  # by tokens: nearly all of it, owner by owner
            summaries = (distattn.Summaries(8, reach=2), distattn.Summaries(32))
            return distattn.AttentionSpec(distattn.chunk_window(8, 2), summaries, distattn.TopChunks(3, 8)), "auto"
    raise ValueError(f"spec is {name!r}; expected one of {', '.join(SPECS)}")


def take_step(step: int, plan: Any, alone: Any, device: Any, other: str = "") -> None:
    """Raises AssertionError if outputs or gradients are not those of one rank alone; other: "skip" or "extra"."""
    import torch

    from distattn import attend

    torch.manual_seed(step)
    full = [torch.randn(1, LENGTH, heads, SHAPE["head_dim"]) for heads in (SHAPE["heads"], SHAPE["kv_heads"])]
    q, k, v, weight = full[0], full[1], torch.randn_like(full[1]), torch.randn_like(full[0])
    results = []
    for p in (plan, alone):
        mine = [p.shard(x).to(device, copy=True).requires_grad_() for x in (q, k, v)]
        out = attend(*mine, p)
        if p is plan and other == "extra":
            attend(*mine, p)
        if p is plan and other == "skip":
            return
        (out * p.shard(weight).to(device)).sum().backward()
        results.append([out.detach(), *(x.grad for x in mine)])
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        error = (ours - plan.shard(theirs)).abs().max().item() if plan.tokens else 0.0
        assert error < 1e-4, f"wrong numbers: {name} of step {step} is off by {error:g}"


def harm(kind: str, deadline: float) -> None:
    """What a fault does to the process in which it is called."""
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise ValueError("this rank is at fault")
        case "memory":
            import torch

            torch.empty(2**50)
        case "slow":
            time.sleep(deadline / 4)
        case "late":
            time.sleep(deadline + 4)


# The runs


def play(
    fault: Fault,
    spec: str,
    ranks: int,
    deadline: float,
    steps: int = STEPS,
    device: Device = "cpu",
    warm: bool | None = None,
) -> Outcome:
    """Runs the job with a fault in it.

    Args:
        deadline: seconds that an exchange may take.
        warm: whether a step comes first that has no fault and half a minute more: a GPU's ranks connect and compile at
            their first steps, and not equally fast. None: on GPUs.
    """
    from distattn.launch import local

    params = {"kind": fault.kind, "rank": fault.rank, "at": fault.at, "where": f"'{fault.where}'"}
    params |= {"spec": spec, "steps": steps, "deadline": deadline, "warm": device == "cuda" if warm is None else warm}
    config = make_config("chaos:work", deadline + 30 * (device == "cuda"), params)
    with tempfile.TemporaryDirectory(prefix="distattn-chaos-") as name:
        folder, text = Path(name), io.StringIO()
        began = time.time()
        # What ends a command ends this run, should it hang.
        timer = threading.Timer(60 + 3 * (deadline + GRACE), os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        try:
            with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
                code: int | None = local.launch(config, device, ranks, folder)
        except SystemExit:
            code = None
        finally:
            timer.cancel()
        ended = time.time()
        struck = folder / "struck"
        since = float(struck.read_text()) if struck.exists() else began
        done = {rank for rank in range(ranks) if (folder / f"done{rank}").exists()}
        pids = [int(path.read_text()) for path in folder.glob("pid*")]
        left = [pid for pid in pids if runs(pid)]
        return Outcome(code, ended - since, struck.exists(), errors_in(text.getvalue()), done, left)


def make_config(job: str, deadline: float, params: dict[str, Any]) -> Config:
    """The configuration of a job of one's own."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from distattn.conf import schema

    schema.register()
    overrides = ["job=custom", f"job.name={job}", "launcher.stop_timeout=0.5", f"launcher.timeout={deadline}"]
    overrides += [f"+job.params.{name}={value}" for name, value in params.items()]
    with initialize_config_module("distattn.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [*overrides, "output_dir=unused"]))
    assert isinstance(config, schema.Config)
    return config


def errors_in(text: str) -> dict[int, str]:
    """What the launcher printed of the ranks that failed, by rank."""
    found = re.findall(r"^distattn: rank (\d+)(?: of \d+)? (.*)$", text, re.MULTILINE)
    return {int(rank): what for rank, what in found if what != "was stopped"}


def runs(pid: int) -> bool:
    """Whether there is such a process, which is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def judge(fault: Fault, outcome: Outcome, ranks: int, deadline: float) -> list[str]:
    """What is bad about a run; empty if nothing is."""
    bad = []
    if outcome.code is None:
        bad.append("it hung")
    if outcome.left:
        bad.append(f"processes {outcome.left} are left")
    bad += [f"rank {rank} {text}" for rank, text in outcome.errors.items() if "wrong numbers" in text]
    if KINDS[fault.kind] or not outcome.struck:
        if outcome.code != 0 or len(outcome.done) < ranks:
            bad.append(f"it should have succeeded: {outcome.errors}")
        return bad
    if outcome.code == 0:
        bad.append("it should have failed")
    survivors = [rank for rank in range(ranks) if rank != fault.rank]
    bad += [
        f"rank {rank} ended by {outcome.errors.get(rank, 'the launcher')!r}"
        for rank in survivors
        if outcome.type_of(rank) not in TYPED
    ]
    if outcome.seconds > deadline + GRACE:
        bad.append(f"it took {outcome.seconds:.1f} s")
    return bad


def draw(source: random.Random, ranks: int) -> tuple[Fault, str]:
    """A fault and the spec that it happens to."""
    kind = source.choice(list(KINDS))
    at = source.randrange(STEPS) if kind in ("skip", "extra") else source.randint(1, 3 * STEPS)
    return Fault(kind, source.randrange(ranks), at), source.choice(SPECS)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # where the ranks find this module, by its name
    from measuring import in_a_folder, positive, write_rows

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=positive, default=200)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the faults; the same ones with the same number of ranks"
    )
    parser.add_argument("--ranks", type=positive, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU a rank")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds that an exchange may take")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--csv", type=in_a_folder, help="where to write the rows")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error(f"--ranks is {arguments.ranks}; expected at least 2")
    source, began, rows = random.Random(arguments.seed), time.monotonic(), []
    for number in range(arguments.runs):
        if time.monotonic() - began > 60 * arguments.minutes:
            print(f"{arguments.runs - number} runs were not begun, for want of time")
            break
        fault, spec = draw(source, arguments.ranks)
        outcome = play(fault, spec, arguments.ranks, arguments.deadline, device=arguments.device)
        bad = judge(fault, outcome, arguments.ranks, arguments.deadline)
        types = [outcome.type_of(rank) for rank in range(arguments.ranks) if rank != fault.rank]
        rows.append(
            {
                "run": number, "kind": fault.kind, "rank": fault.rank, "at": fault.at, "spec": spec,
                "struck": int(outcome.struck), "code": outcome.code, "seconds": round(outcome.seconds, 2),
                "survivors": " ".join(name or "-" for name in types), "bad": "; ".join(bad),
            }
        )  # fmt: skip
        print(
            "  ".join(f"{value!s:>{width}}" for value, width in zip(rows[-1].values(), WIDTHS, strict=True)), flush=True
        )
    failed = sum(bool(row["bad"]) for row in rows)
    print(f"{len(rows)} runs, {failed} bad, {Counter(row['kind'] for row in rows)}")
    if arguments.csv:
        write_rows(arguments.csv, rows)
    raise SystemExit(1 if failed else 0)


WIDTHS = (4, 7, 2, 3, 9, 2, 4, 6, 24, 0)


if __name__ == "__main__":
    main()

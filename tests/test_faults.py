"""What goes wrong between ranks ends in a typed error on every survivor, soon, and leaves nothing behind."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rank_pool import RankError, RankPool

import distattn
from distattn import agreement, attend, make_plan, reference
from distattn.data import open_corpus
from distattn.errors import ConfigError, PeerLost, PlanMismatch, StepTimeout
from distattn.jobs.context import Context
from distattn.launch import failures, local, processes
from distattn.patterns import Causal, SlidingWindow
from distattn.plan import Plan
from distattn.watch import set_deadline, watch_of

SCRIPTS = Path(distattn.__file__).parent.parent / "scripts"
DEADLINE = 2.0
PATIENCE = 400.0  # seconds to wait for what takes a few on an idle machine


@pytest.fixture(scope="module")
def chaos() -> Iterator[ModuleType]:
    """scripts/chaos.py, which rank processes find by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        import chaos

        yield chaos


# One fault in a job of forward and backward steps

FAULTS = {  # kind, rank, at, where, spec, the survivors' error
    "killed in a forward pass": ("kill", 1, 2, "bring", "window", "PeerLost"),
    "killed in a backward pass": ("kill", 2, 1, "return", "ring", "PeerLost"),
    "frozen in a forward pass": ("freeze", 2, 1, "bring", "window", "StepTimeout"),
    "raises": ("raise", 1, 1, "return", "summaries", "PeerLost"),
    "out of memory": ("memory", 2, 2, "return", "globals", "PeerLost"),
    "too slow": ("late", 1, 3, "bring", "ring", "StepTimeout"),
    "leaves out a backward pass": ("skip", 1, 1, "", "ring", "PlanMismatch"),
    "makes a forward pass twice": ("extra", 0, 1, "", "window", "PlanMismatch"),
    "leaves out the last backward pass": ("skip", 2, 3, "", "globals", "PlanMismatch"),
    "makes the last forward pass twice": ("extra", 0, 3, "", "globals", "PlanMismatch"),
}
IN_FULL = {"frozen in a backward pass": ("freeze", 2, 2, "return", "window", "StepTimeout")}


@pytest.mark.parametrize("case", [*FAULTS, *(pytest.param(name, marks=pytest.mark.full) for name in IN_FULL)])
def test_survivors_raise_typed_errors_in_time(chaos: ModuleType, case: str) -> None:
    kind, rank, at, where, spec, expected = (FAULTS | IN_FULL)[case]
    fault = chaos.Fault(kind, rank, at, where)
    outcome = chaos.play(fault, spec, 3, DEADLINE)
    assert outcome.struck and outcome.code == 1
    assert chaos.judge(fault, outcome, 3, DEADLINE) == []
    survivors = {0, 1, 2} - {rank}
    assert [outcome.type_of(n) for n in survivors] == [expected] * 2, outcome.errors
    assert all(f"rank {rank}" in outcome.errors[n] and "exchange" in outcome.errors[n] for n in survivors)
    own = {"kill": "was ended by SIGKILL", "raise": "failed: ValueError: this rank is at fault"}
    assert kind not in own or outcome.errors[rank] == own[kind]
    assert kind != "memory" or "memory" in outcome.errors[rank]
    assert kind != "freeze" or rank not in outcome.errors  # it was stopped


@pytest.mark.parametrize("kind", ["none", "slow"])
def test_what_keeps_to_the_deadline_succeeds(chaos: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # what an earlier job may have left, and a port in use
        stale = {"RANK": "7", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in stale.items():
            monkeypatch.setenv(name, value)
        fault = chaos.Fault(kind, 1, 3)
        outcome = chaos.play(fault, "globals", 3, 8.0)
    assert chaos.judge(fault, outcome, 3, 8.0) == []
    assert (outcome.code, outcome.done, outcome.struck) == (0, {0, 1, 2}, kind == "slow")


def test_a_few_random_faults(chaos: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["chaos", "--runs", "5", "--seed", "21", "--csv", str(tmp_path / "rows.csv")])
    with pytest.raises(SystemExit) as end:
        chaos.main()
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert (end.value.code, len(rows)) == (0, 6), rows


def test_wrong_numbers_and_hangs_are_seen(chaos: ModuleType) -> None:
    fine = dict(code=1, seconds=2.0, struck=True, done=set(), left=[])
    errors = {0: "failed: distattn.errors.PeerLost: x", 2: "failed: distattn.errors.StepTimeout: x"}
    fault = chaos.Fault("kill", 1)

    def judge(**changed: object) -> str:
        outcome = chaos.Outcome(**{**fine, "errors": errors, **changed})
        return "; ".join(chaos.judge(fault, outcome, 3, DEADLINE))

    assert judge() == ""
    assert "hung" in judge(code=None)
    assert "should have failed" in judge(code=0)
    assert "it took 12.5 s" in judge(seconds=12.5)
    assert "[123] are left" in judge(left=[123])
    assert "rank 2 ended by 'the launcher'" in judge(errors={0: errors[0]})
    assert "wrong numbers" in judge(errors={**errors, 1: "failed: AssertionError: wrong numbers: out"})
    assert "should have succeeded" in judge(struck=False)


# Ranks that do not meet


def test_a_rank_that_does_not_come_is_named(chaos: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_but_the_last(target: str, seats: list[object], *more: object, **named: float) -> processes.Processes:
        return processes.Processes(target, seats[:-1], *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "Processes", all_but_the_last)
    outcome = chaos.play(chaos.Fault(), "window", 3, DEADLINE)
    assert [outcome.type_of(rank) for rank in (0, 1)] == ["PeerLost"] * 2
    assert "of 3 ranks [2] did not come within 2 s" in outcome.errors[0]
    assert (outcome.code, outcome.left) == (1, []) and outcome.seconds < DEADLINE + 10 + 5  # and the start


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        done = subprocess.run(
            command("launcher=torchrun", "job=custom", "job.name=trial_jobs:total", "launcher.device=cpu"),
            cwd=tmp_path, env=environment() | address | alone, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
    assert done.returncode == 1
    assert (
        f"ConfigError: the ranks cannot meet at MASTER_ADDR:MASTER_PORT, which is 127.0.0.1:{address['MASTER_PORT']}"
        in (done.stderr)
    )


# Ranks that disagree


def a_plan(context: Context, window: int = 20) -> Plan:
    spec = distattn.AttentionSpec(Causal() & SlidingWindow(window, 0))
    return make_plan(spec, 64, heads=2, head_dim=32, mesh=context.mesh, block_q=16, block_k=16)


def call(plan: Plan, dtype: torch.dtype = torch.float32, **shape: int) -> torch.Tensor:
    x = torch.ones(shape.get("batch", 1), plan.tokens, shape.get("heads", 2), 32, dtype=dtype)
    return attend(x, x, x, plan)


def disagree(context: Context, what: str) -> None:
    set_deadline(DEADLINE)
    other = context.rank == 1
    plan = a_plan(context, 21 if what == "spec" and other else 20)
    dtype = torch.float64 if what == "dtype" and other else torch.float32
    batch = 2 if what == "shape" and other else 1
    if what == "versions" and other:
        agreement._versions = lambda: "torch 1.0"  # type: ignore[assignment]
    if what in ("later plan", "refusal later", "order"):
        call(plan)
    if what == "order":  # of plans that have been agreed upon, and that exchange the same rows
        plans = [plan, a_plan(context, 19)]
        call(plans[1])
        for each in reversed(plans) if other else plans:
            call(each)
    if what == "later plan" and other:
        plan = a_plan(context, 21)  # is agreed upon, while the other rank is in an exchange
    heads = 3 if what == "refusal later" and other else 2
    call(plan, dtype, batch=batch, heads=heads)
    if what == "later plan" and not other:
        call(plan)
    raise AssertionError("went on")


@pytest.mark.parametrize("what", ["spec", "shape", "dtype", "versions", "later plan", "refusal later", "order"])
def test_ranks_that_disagree_all_raise(what: str) -> None:
    pool = RankPool(size=2)
    try:
        began = time.monotonic()
        with pytest.raises(RankError) as caught:
            pool(2, disagree, what)
        seconds = time.monotonic() - began
    finally:
        pool.close()
    errors = caught.value.errors
    kinds = [PlanMismatch, ConfigError if what == "refusal later" else PlanMismatch]
    assert [type(errors[rank]) for rank in (0, 1)] == kinds, caught.value
    assert "rank 1" in str(errors[0]) and seconds < DEADLINE + 10 + 10  # and the start of the pool
    said = {
        "dtype": "float64",
        "versions": "torch 1.0",
        "shape": "batch 2",
        "refusal later": r"q has shape \(1, 32, 3, 32\)",
    }
    assert re.search(said.get(what, "plan"), str(errors[0]))


def waits_alone(context: Context, how: str) -> None:
    """Rank 1 is not there where rank 0 waits for it."""
    set_deadline(1.0)
    watch_of(context.mesh.get_group().group_name)  # type: ignore[union-attr]
    if how != "first":
        call(a_plan(context))
    if context.rank == 1:
        time.sleep(4)
        return
    call(a_plan(context, 20 if how == "exchange" else 21))


@pytest.mark.parametrize("how", ["first", "exchange", "agreement"])
def test_a_rank_that_runs_but_does_not_come(how: str) -> None:
    pool = RankPool(size=2)
    try:
        with pytest.raises(RankError) as caught:
            pool(2, waits_alone, how)
    finally:
        pool.close()
    assert isinstance(caught.value.errors[0], StepTimeout)
    assert "rank 1 has not come so far: it runs" in str(caught.value.errors[0]) or how != "exchange"


class Stuck:
    """An operation of NCCL that never ends, for which waiting only orders streams; and an event after it."""

    def wait(self) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return False


def runs_on_a_gpu(context: Context, says: str | None, starting: bool) -> list[str]:
    """What the thread does about an operation that never ends, or never starts, or when NCCL says that it failed."""
    set_deadline(1.0)
    assert context.mesh is not None
    watch = watch_of(context.mesh.get_group().group_name)
    aborted: list[float] = []
    watch._abort = lambda: aborted.append(time.monotonic())  # type: ignore[method-assign]
    watch._device_error = lambda: says and RuntimeError(says)  # type: ignore[method-assign, assignment, return-value]
    torch.cuda.Event = Stuck  # type: ignore[misc, assignment]
    began = time.monotonic()
    found = []
    if context.rank == 0:
        stage = watch.enter("bring keys", on_gpu=True)
        if not starting:
            stage.wait([Stuck()])  # type: ignore[list-item]
            assert time.monotonic() < began + 0.4 and not aborted
        with contextlib.nullcontext() if not starting else pytest.raises(StepTimeout), stage:
            while not aborted and time.monotonic() < began + 20:
                time.sleep(0.05)
            if starting:
                raise RuntimeError("NCCL communicator was aborted")
        cause = failures.cause_of(AssertionError("wrong numbers"))
        assert cause is watch.verdict and isinstance(cause.__cause__, AssertionError)
        for again in (lambda: stage.wait([]), lambda: watch.enter("more")):
            with pytest.raises(PeerLost if says else StepTimeout) as caught:
                again()
            found.append(str(caught.value))
        assert len(aborted) == 1 and (says or aborted[0] > began + 1.0)
    else:
        time.sleep(4)
    watch.close()
    return found


@pytest.mark.parametrize(
    "says, starting, expected",
    [
        (None, False, "exchange 1: bring keys: did not end within 1 s; rank 1 has not come so far"),
        (None, True, "exchange 1: bring keys: did not end within 1 s; "),
        (
            "NCCL says REMOTE_ERROR",
            False,
            "exchange 1: bring keys: failed (NCCL says REMOTE_ERROR); all other ranks run",
        ),
    ],
)
def test_the_watch_aborts_what_does_not_end_on_a_gpu(says: str | None, starting: bool, expected: str) -> None:
    pool = RankPool(size=2)
    try:
        found = pool(2, runs_on_a_gpu, says, starting, timeout=60)[0]
    finally:
        pool.close()
    assert len(found) == 2 and found[0] == found[1]
    assert expected in found[0]


# Inputs that are not finite

NOT_FINITE = {"q": 40, "k": 3, "v": 3}  # one row of each, by position


def attend_to(context: Context, which: str, value: float) -> torch.Tensor:
    plan = a_plan(context)
    tensors = {}
    for number, name in enumerate("qkv"):
        torch.manual_seed(number)
        x = torch.randn(1, 64, 2, 32)
        if name == which:
            x[:, NOT_FINITE[name]] = value
        tensors[name] = plan.shard(x).clone().requires_grad_()
    out = attend(*tensors.values(), plan)
    out.square().sum().backward()
    return torch.stack([plan.unshard(x) for x in (out.detach(), *(x.grad for x in tensors.values()))])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_spreads_alike_on_any_number_of_ranks(ranks: RankPool, which: str, value: float) -> None:
    alone = ranks(1, attend_to, which, value)[0]
    sound = ranks(1, attend_to, "nothing", value)[0]
    for n in (2, 3):
        results = ranks(n, attend_to, which, value)
        for result in results:
            assert torch.equal(result.isfinite(), alone.isfinite())
            assert reference.max_error(result[alone.isfinite()], alone[alone.isfinite()]) < 1e-5
    assert sound.isfinite().all()
    # A row that has such a query, or attends to such a key or value, is not finite; others of its tiles may be so too.
    at = NOT_FINITE[which]
    rows = range(at, at + 1) if which == "q" else range(at, at + 21)
    broken = ~alone[0, 0].isfinite().flatten(1).all(1)
    assert all(broken[row] for row in rows)
    assert not broken[48:].any() and (which != "q" or not broken[:32].any())


# The command


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distattn.launch.run", *arguments]


def environment() -> dict[str, str]:
    path = [str(Path(__file__).parent), str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
    return local.rank_environment() | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_a_command_that_ends_amid_exchanges(
    chaos: ModuleType, tmp_path: Path, number: signal.Signals
) -> None:
    params = {"kind": "none", "rank": 0, "at": 0, "where": "''", "spec": "ring", "steps": 10**6}
    arguments = [f"+job.params.{name}={value}" for name, value in params.items()]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits that a signal is ignored
    with subprocess.Popen(
        command("job=custom", "job.name=chaos:work", "launcher.device=cpu", *arguments, "output_dir=out"),
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        signal.signal(signal.SIGINT, before)
        end = time.monotonic() + PATIENCE
        while len(files := list(tmp_path.glob("out/pid*"))) < 2 and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1)  # into the exchanges
        pids = [int(path.read_text()) for path in files]
        assert len(pids) == 2 and all(chaos.runs(pid) for pid in pids)
        os.killpg(process.pid, number)
        _, text = process.communicate(timeout=PATIENCE)
    end = time.monotonic() + 10
    while any(chaos.runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(chaos.runs(pid) for pid in pids)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert number != signal.SIGINT or text == "distattn: interrupted\n"


def reads(context: Context, path: str) -> bytes:
    corpus, plan = open_corpus(path), a_plan(context)

    def meet() -> None:
        plan.unshard(torch.zeros(1, plan.tokens))

    meet()  # all have opened it
    if context.rank == 1:
        with open(path, "r+b") as file:
            file.truncate(10)  # while the job reads it
    meet()
    return corpus.read_segments(plan.segments).tobytes()


def test_a_file_that_is_cut_short_ends_in_an_error_and_no_signal(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(64))
    with pytest.raises(RankError) as caught:
        ranks(2, reads, str(tmp_path / "text"))
    assert {type(error) for error in caught.value.errors.values()} == {ConfigError}
    assert len(caught.value.errors) == 2 and "it has 10 now" in str(caught.value.errors[0])

"""Ranks come to life, are heard, and end: all of them, whatever happens."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import trial_jobs
from commanding import PATIENCE, command, config_of, environment, gone, job, run, until
from rank_pool import RankError, RankPool

from distattn.errors import PeerLost
from distattn.jobs import find_job
from distattn.jobs.context import Context
from distattn.launch import local
from distattn.launch.failures import (
    ABORTED,
    ACTOR_LOST,
    DID_NOT_START,
    Decision,
    Failure,
    decide,
    failure_of,
    order,
    run_with_restarts,
)
from distattn.launch.processes import Exit, Line, Message, Processes
from distattn.launch.ranks import Throttled
from distattn.launch.run import main
from distattn.launch.watch import ending_on_signals

# Child processes


def children(target: str, *arguments: object, **options: float) -> Processes:
    return Processes(f"trial_jobs:{target}", arguments, dict(os.environ), **options)  # type: ignore[arg-type]


def first_message(processes: Processes) -> list[int]:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for _, event in processes.poll(1.0):
            if isinstance(event, Message):
                return event.value
    raise AssertionError("no message came")


def test_messages_lines_and_exit_codes_by_child() -> None:
    events: list[list[object]] = [[], []]
    with children("chats", 20, 21) as processes:
        while sum(isinstance(event, Exit) for child in events for event in child) < 2:
            for number, event in processes.poll(PATIENCE):
                events[number].append(event)
                if isinstance(event, Message) and event.value in (40, 42):
                    processes.send(number, 100 * event.value)
        assert processes.tail(0) == ["before", "after, without a line end"]
    for number, argument in enumerate((20, 21)):
        messages = [event.value for event in events[number] if isinstance(event, Message)]
        lines = [event.text for event in events[number] if isinstance(event, Line)]
        assert messages == [2 * argument, 200 * argument + 1]
        assert lines == ["before", "after, without a line end"]
        assert events[number][-1] == Exit(argument)


def test_a_killed_child_is_noticed_and_may_be_sent_to() -> None:
    with children("dies", 0) as processes:
        end = time.monotonic() + PATIENCE
        events: list[object] = []
        while not events and time.monotonic() < end:
            events = [event for _, event in processes.poll(1.0)]
        processes.send(0, "too late")
    assert events == [Exit(-signal.SIGKILL)]


@pytest.mark.parametrize("manner", ["docile", "stubborn"])
def test_stopping_ends_a_child_and_what_it_started(manner: str) -> None:
    with children("sleeps", manner, stop_timeout=0.5) as processes:
        pids = first_message(processes)
    until(lambda: all(gone(pid) for pid in pids), f"the end of {pids}")


def test_a_frozen_child_is_ended() -> None:
    with children("sleeps", "", stop_timeout=0.2) as processes:
        pids = first_message(processes)
        os.kill(pids[0], signal.SIGSTOP)
    until(lambda: gone(pids[0]), "the end of the frozen child")


# Policies, without processes


def test_the_cause_comes_before_its_consequences() -> None:
    late = Failure(0, "failed: late", "", when=3.0)
    early = Failure(1, "failed: early", "", when=2.0)
    killed = Failure(2, "was ended by SIGKILL", "", when=4.0, killed=True)
    assert order([late, early]) == [early, late]
    assert order([late, early, killed]) == [killed, early, late]


def failure(kind: str, killed: bool = False, when: float = 1.0, summary: str = "failed: it") -> Failure:
    return Failure(0, summary, "", when, killed, kind)


BROKEN_PIPE_OF_GLOO = "failed: RuntimeError: [/src/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed"


@pytest.mark.parametrize(
    ("failures", "decision"),
    [
        ([failure("", killed=True)], Decision.RETRY),
        ([failure("PeerLost")], Decision.RETRY),
        ([failure("StepTimeout"), failure("PeerLost")], Decision.RETRY),
        ([failure(ACTOR_LOST, killed=True), failure("RuntimeError")], Decision.RETRY),
        ([failure(DID_NOT_START)], Decision.RETRY),
        ([failure("RuntimeError", summary=BROKEN_PIPE_OF_GLOO)], Decision.RETRY),
        ([failure("PeerLost"), failure(ABORTED)], Decision.RETRY),
        ([failure(ABORTED)], Decision.RAISE),
        ([failure("ConfigError")], Decision.RAISE),
        ([failure("PlanMismatch"), failure("PlanMismatch")], Decision.RAISE),
        ([failure("KeyError")], Decision.RAISE),
        ([failure("RuntimeError")], Decision.RAISE),
        ([failure("KeyboardInterrupt")], Decision.RAISE),
        ([failure("OutOfMemoryError")], Decision.RAISE),  # of a GPU: it would happen again
        ([failure("")], Decision.RAISE),  # it exited, with a code that is not 0
        # Whose clock was ahead does not matter.
        ([failure("PeerLost", when=1.0), failure("ValueError", when=2.0)], Decision.RAISE),
        ([failure("PeerLost", when=2.0), failure("ValueError", when=1.0)], Decision.RAISE),
    ],
    ids=lambda value: (
        "+".join(f.kind or ("killed" if f.killed else "exit") for f in value) if type(value) is list else ""
    ),
)
def test_what_a_restart_can_cure(failures: list[Failure], decision: Decision) -> None:
    assert decide(failures, 0, 1) is decision
    assert decide(failures, 2, 3) is decision
    assert decide(failures, 0, 0) is Decision.RAISE
    assert decide(failures, 3, 3) is Decision.RAISE


def test_there_is_no_decision_about_nothing() -> None:
    for arguments in (([], 0, 1), ([failure("PeerLost")], -1, 1), ([failure("PeerLost")], 0, -1)):
        with pytest.raises(ValueError, match="expected at least one failure, and no negative number"):
            decide(*arguments)


def test_an_exception_as_a_failure() -> None:
    try:
        raise PeerLost("rank 3 did not answer")
    except PeerLost as error:
        found = failure_of(2, error)
    assert (found.rank, found.kind, found.killed) == (2, "PeerLost", False)
    assert found.summary == "failed: distattn.errors.PeerLost: rank 3 did not answer"
    assert "in test_an_exception_as_a_failure" in found.detail


@pytest.mark.parametrize(("max_restarts", "attempts", "left"), [(0, 1, 1), (1, 2, 1), (2, 3, 0), (5, 3, 0)])
def test_restarts_are_counted_and_told(
    max_restarts: int, attempts: int, left: int, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = iter([[failure("", killed=True, summary="was ended by SIGKILL")], [failure("PeerLost")], []])
    made: list[list[Failure]] = []

    def attempt() -> list[Failure]:
        made.append(next(outcomes))
        return made[-1]

    assert len(run_with_restarts(attempt, max_restarts, 2)) == left
    assert len(made) == attempts
    told = [
        f"distattn: rank 0 of 2 was ended by SIGKILL; restart 1 of {max_restarts}",
        f"distattn: rank 0 of 2 failed: it; restart 2 of {max_restarts}",
    ]
    assert capsys.readouterr().err.splitlines() == told[: attempts - 1]


def test_progress_is_throttled_but_stages_are_not_lost() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float]] = []

        def progress(self, stage: str, done: float, total: float, info: dict[str, object]) -> None:
            self.seen.append((stage, done))

        def log(self, text: str) -> None:
            self.seen.append((text, -1))

    recorder = Recorder()
    reporter = Throttled(recorder)
    for done in range(1, 1001):
        reporter.progress("a", done, 1000, {})
    reporter.progress("b", 1, 1000, {})
    reporter.log("text")
    assert recorder.seen[0] == ("a", 1)
    assert recorder.seen[-3:] == [("a", 1000), ("b", 1), ("text", -1)]
    assert len(recorder.seen) < 100


def test_a_rank_gets_its_share_of_the_cores() -> None:
    from distattn.launch.ranks import cpu_threads

    cores = len(os.sched_getaffinity(0))
    assert cpu_threads(1) == cores
    assert cpu_threads(10 * cores) == 1


def test_ranks_do_not_see_an_earlier_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("KEPT", "7")
    environment = local.rank_environment()
    assert environment["KEPT"] == "7"
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & environment.keys()


def test_being_asked_to_end_is_tidied_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    tidied = False
    with pytest.raises(SystemExit) as end, ending_on_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            tidied = True
    assert (end.value.code, tidied) == (128 + signal.SIGTERM, True)
    assert signal.getsignal(signal.SIGTERM) is before


# The local launcher, in this process


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    def run(job: str, *overrides: str, world_size: int = 2) -> int:
        config = config_of("job=custom", f"job.name=trial_jobs:{job}", *overrides)
        return local.launch(config, "cpu", world_size, tmp_path)

    return run


def test_local_ranks_and_their_report(
    launch: Callable[..., int], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert launch("total") == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == f"sum 3 of 2 in {tmp_path}"
    assert {"[rank 0] added", "[rank 1] added", "[rank 0] printed", "[rank 1] printed"} <= {*out.splitlines()}
    assert "adding: 100 %  sum=3.0" in out.splitlines()
    assert err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0", "rank1"]


def test_the_first_error_is_on_top(launch: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("one_raises") == 1
    err = capfd.readouterr().err.splitlines()
    assert err[0] == "distattn: rank 1 of 2 failed: ValueError: rank one is at fault"
    assert any("in one_raises" in line for line in err)  # a traceback
    assert re.match("distattn: rank 0 (failed: |was stopped)", err[-1])
    assert len([line for line in err if not line.startswith("    ")]) == 2


def test_a_killed_rank_is_the_cause(launch: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("one_is_killed") == 1
    err = capfd.readouterr().err.splitlines()
    assert err[0] == "distattn: rank 1 of 2 was ended by SIGKILL"
    assert err[2] == "    last words"


def test_a_killed_rank_and_a_restart(
    launch: Callable[..., int], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert launch("is_killed_once", "launcher.max_restarts=2") == 0
    out, err = capfd.readouterr()
    assert err == "distattn: rank 1 of 2 was ended by SIGKILL; restart 1 of 2\n"
    assert out.splitlines()[-1] == "sum 3 after 2 attempts"


def test_what_a_restart_cannot_cure_is_not_tried_again(
    launch: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch("one_raises", "launcher.max_restarts=2") == 1
    out, err = capfd.readouterr()
    assert "restart" not in err and err.startswith("distattn: rank 1 of 2 failed: ValueError: rank one is at fault")


def test_restarts_end(launch: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("one_is_killed", "launcher.max_restarts=1") == 1
    err = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("    ")]
    assert err[0] == "distattn: rank 1 of 2 was ended by SIGKILL; restart 1 of 1"
    assert err[1] == "distattn: rank 1 of 2 was ended by SIGKILL"


def test_a_rank_that_does_not_start_in_time(
    launch: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "Processes", lambda target, *more, **named: children("sleeps", *more[0], **named))
    assert launch("total", "launcher.start_timeout=0.5") == 1
    assert "rank 0 of 2 did not start within 0.5 s" in capfd.readouterr().err


# The command


def torchrun(*arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "distattn.launch.run", "launcher=torchrun", *arguments),
    ]


def test_a_sweep_runs_one_job_after_the_other_despite_stale_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stale = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    for name, value in stale.items():
        monkeypatch.setenv(name, value)
    sweep = ["-m", *job("total"), "+job.params.x0=10", "launcher.num_workers=1,2", "output_dir=out"]
    monkeypatch.setattr(sys, "argv", ["distattn", *sweep])  # in this process, which has imported what it needs
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfd.readouterr()
    assert end.value.code == 0, err
    reports = [line.split(" in ")[0] for line in out.splitlines() if line.startswith("sum")]
    assert reports == ["sum 11 of 1", "sum 13 of 2"]
    written = [{path.name for path in (tmp_path / "out" / number).glob("rank?")} for number in "01"]
    assert written == [{"rank0"}, {"rank0", "rank1"}]


def test_torchrun_runs_the_same_job(tmp_path: Path) -> None:
    done = run(torchrun(*job("total"), "output_dir=out"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"sum 3 of 2 in {tmp_path / 'out'}" in done.stdout.splitlines()
    assert {"[rank 0] added", "[rank 1] added"} <= {*done.stdout.splitlines()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"rank0", "rank1"}


@pytest.mark.full
def test_torchrun_names_the_first_error(tmp_path: Path) -> None:
    done = run(torchrun(*job("one_raises")), tmp_path)
    assert done.returncode == 1
    assert "distattn: rank 1 failed: ValueError: rank one is at fault" in done.stderr
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank one is at fault" in cause


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The command, running a job that does not end by itself, and the pids of its ranks."""
    # A child inherits that a signal is ignored, as in a background job of a shell, but no handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        command(*job("waits"), "launcher.stop_timeout=1"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        signal.signal(signal.SIGINT, before)
        assert process.stdout
        pids: list[int] = []
        for line in process.stdout:
            pids += [int(text) for text in re.findall(r"pid (\d+)", line)]
            if len(pids) == 2:
                break
        assert len(pids) == 2 and not any(gone(pid) for pid in pids), process.communicate()[1]
        yield process, pids
        process.kill()


def test_ctrl_c_ends_everything_with_one_line(waiting: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, pids = waiting
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that is in its foreground
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, "distattn: interrupted\n")
    assert all(gone(pid) for pid in pids)


def test_no_rank_outlives_a_killed_command(waiting: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, pids = waiting
    process.kill()
    until(lambda: all(gone(pid) for pid in pids), f"the end of the ranks {pids}")


# The pool that other tests use


def scaled_sum(context: Context, x: torch.Tensor, factor: float = 1.0) -> tuple[int, torch.Tensor, np.ndarray]:
    x = x * (context.rank + 1)
    if context.mesh is not None:
        assert context.mesh.size() == context.world_size
        dist.all_reduce(x, group=context.mesh.get_group())
    return context.rank, x * factor, np.arange(context.rank)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pool_runs_on_the_first_ranks(ranks: RankPool, count: int) -> None:
    results = ranks(count, scaled_sum, torch.ones(2), factor=10.0)
    assert [rank for rank, _, _ in results] == list(range(count))
    for rank, x, array in results:
        assert torch.equal(x, torch.full((2,), 10.0 * count * (count + 1) / 2))
        assert array.tolist() == list(range(rank))


def raises_somewhere(context: Context, where: list[int]) -> int:
    if context.rank in where:
        raise KeyError(f"on rank {context.rank}")
    if where != [0, 1]:
        dist.barrier(group=context.mesh.get_group())  # type: ignore[union-attr]
    return context.rank


def test_pool_passes_errors_on_and_goes_on(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="on rank 0") as both:
        ranks(2, raises_somewhere, [0, 1])
    assert [type(error) for error in both.value.errors.values()] == [KeyError, KeyError]
    assert ranks(2, scaled_sum, torch.ones(1))[1][1].item() == 3


def stays(context: Context) -> None:
    time.sleep(1000)


def test_pool_starts_anew_after_one_rank_failed() -> None:
    pool = RankPool(size=2)
    try:
        with pytest.raises(RankError, match="(?s)on rank 1.*rank 0") as one:
            pool(2, raises_somewhere, [1])
        assert isinstance(one.value.errors[1], KeyError)
        assert pool(2, scaled_sum, torch.ones(1))[0][1].item() == 3
        with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 took longer than 0.1 s"):
            pool(2, stays, timeout=0.1)
    finally:
        pool.close()


def test_trial_jobs_are_found_by_their_path() -> None:
    assert find_job("trial_jobs:total").run is trial_jobs.total

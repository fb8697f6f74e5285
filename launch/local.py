"""Ranks as processes of this machine, started and watched by the command itself.

The command hosts the rendezvous store on a port that the system chose, starts the ranks, shows their
progress, and ends them all as soon as one fails. See processes.py for why none of them can outlive it.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from distattn.conf.schema import Config, LocalConfig
from distattn.errors import ConfigError
from distattn.jobs import Job, Result, find_job
from distattn.launch.device import Device
from distattn.launch.display import Display, print_result
from distattn.launch.processes import Exit, Line, Message, Processes, send

# Seconds to wait for further failures once there is one: the first to be heard may follow from another, and the others
# need some time to find out who is at fault.
_GATHER = 5.0
# Seconds that a rank may take to exit once all have done their work.
_EXIT_TIMEOUT = 30.0
_LOOPBACK = "127.0.0.1"
_SET_BY_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


class Seat(NamedTuple):
    """What a rank process is told."""

    config: Config
    rank: int
    world_size: int
    device: Device
    port: int | None
    output_dir: Path


class Started(NamedTuple):
    """The rank has joined the others."""


class Progress(NamedTuple):
    """See `Context.progress`."""

    stage: str
    done: float
    total: float
    info: dict[str, object]


class Log(NamedTuple):
    """See `Context.log`."""

    text: str


class Finished(NamedTuple):
    """The job returned this."""

    result: Result | None


@dataclass(frozen=True)
class Failure:
    """How a rank failed.

    Attributes:
        rank: which.
        summary: one line.
        detail: a traceback or the last lines of output.
        when: time.time() of the rank when it raised, of the launcher when it saw the rank gone.
        killed: ended by a signal that is no consequence of what other ranks do.
    """

    rank: int
    summary: str
    detail: str
    when: float
    killed: bool = False


def count_ranks(config: LocalConfig, device: Device, job: Job) -> int:
    """How many ranks there will be.

    Raises:
        ConfigError: there are not so many GPUs, or it is a number that cannot be meant.
    """
    import torch

    wanted = config.num_workers
    gpus = torch.cuda.device_count()
    most = gpus if device == "cuda" else max(16, 4 * (os.cpu_count() or 1))
    if wanted is not None and not 1 <= wanted <= most:
        limit = f"{most}, one a GPU" if device == "cuda" else f"{most} CPU processes on this machine"
        raise ConfigError(f"launcher.num_workers is {wanted}; expected 1 to {limit}")
    return wanted or (gpus if device == "cuda" else job.cpu_ranks)


def order(failures: list[Failure]) -> list[Failure]:
    """The likely cause of the others first: a rank that was killed, else the one that failed first."""
    return sorted(failures, key=lambda failure: (not failure.killed, failure.when))


def launch(config: Config, device: Device, world_size: int, output_dir: Path) -> int:
    """Run the job on ranks of this machine, print its report, and return the exit code.

    Returns:
        0, or "exit_code" of what rank 0 returned; 1 if a rank failed, which was then printed to stderr.

    Raises:
        KeyboardInterrupt: Ctrl-C; the ranks are gone.
        SystemExit: the command was asked to end (SIGTERM, SIGHUP); the ranks are gone.
    """
    import torch.distributed as dist

    launcher = config.launcher
    assert isinstance(launcher, LocalConfig)
    store = None
    if world_size > 1:  # this process hosts it on a port of the system's choice: no two commands can collide
        store = dist.TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False)
    seats = [
        Seat(config, rank, world_size, device, store.port if store else None, output_dir) for rank in range(world_size)
    ]
    with ending_on_signals(), Display() as display:
        with Processes(
            "distattn.launch.local:be_rank", seats, rank_environment(), stop_timeout=launcher.stop_timeout
        ) as ranks:
            watch = _Watch(ranks, display, launcher.start_timeout)
            failures = watch.until_the_end()
    if failures:
        _print_failures(failures, world_size)
        return 1
    return print_result(watch.result)


class _Watch:
    """Follows the ranks from their start to their end."""

    def __init__(self, ranks: Processes, display: Display, start_timeout: float) -> None:
        self.result: Result | None = None
        self._ranks, self._display = ranks, display
        self._start_timeout = start_timeout
        self._running = set(range(len(ranks)))
        self._starting, self._working = set(self._running), set(self._running)
        self._failures: dict[int, Failure] = {}

    def until_the_end(self) -> list[Failure]:
        """Returns when all ranks have ended, or soon after a failure: what failed, the cause first."""
        began, worked = time.monotonic(), float("inf")
        while self._running and not self._failures:
            self._poll(0.5)
            now = time.monotonic()
            if self._starting and now > began + self._start_timeout:
                for rank in self._starting:
                    self._fail(rank, f"did not start within {self._start_timeout:g} s")
            if not self._working:
                worked = min(worked, now)
                if now > worked + _EXIT_TIMEOUT:
                    for rank in self._running:
                        self._fail(rank, f"did not exit within {_EXIT_TIMEOUT:g} s of its work")
        deadline = time.monotonic() + _GATHER
        while self._failures and self._running - self._failures.keys() and time.monotonic() < deadline:
            self._poll(0.1)
        return order([*self._failures.values()])

    def _poll(self, timeout: float) -> None:
        for rank, event in self._ranks.poll(timeout):
            self._take(rank, event)

    def _take(self, rank: int, event: Message | Line | Exit) -> None:
        match event:
            case Line(text):
                self._display.log(rank, text)
            case Message(Progress() as progress):
                self._display.progress(rank, *progress)
            case Message(Log(text)):
                self._display.log(rank, text)
            case Message(Started()):
                self._starting.discard(rank)
            case Message(Finished(result)):
                self._working.discard(rank)
                if rank == 0:
                    self.result = result
            case Message(Failure() as failure):
                self._failures.setdefault(rank, failure)
            case Exit(code):
                self._running.discard(rank)
                if code != 0 or rank in self._working:
                    killed = code < 0 and code != -signal.SIGABRT  # libraries abort when a peer is gone
                    self._fail(
                        rank,
                        f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}",
                        killed,
                    )

    def _fail(self, rank: int, summary: str, killed: bool = False) -> None:
        tail = "\n".join(self._ranks.tail(rank))
        detail = f"The last lines that it printed:\n{tail}" if tail else ""
        self._failures.setdefault(rank, Failure(rank, summary, detail, time.time(), killed))


def _print_failures(failures: list[Failure], world_size: int) -> None:
    first, *others = failures
    lines = [f"distattn: rank {first.rank} of {world_size} {first.summary}"]
    lines += [f"    {line}" for line in first.detail.splitlines()]
    lines += [f"distattn: rank {other.rank} {other.summary}" for other in others]
    stopped = sorted(set(range(world_size)) - {failure.rank for failure in failures})
    lines += [f"distattn: rank {rank} was stopped" for rank in stopped]
    print("\n".join(lines), file=sys.stderr, flush=True)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP become SystemExit, so that all is tidied up; the exit code is 128 + the signal."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rank_environment() -> dict[str, str]:
    """For rank processes: this process's environment without what an earlier torchrun may have left in it."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in _SET_BY_TORCHRUN and not name.startswith("TORCHELASTIC_")
    }
    env.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")  # never a name to resolve
    return env


class _Sender:
    """A reporter that sends everything to the launcher."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def progress(self, stage: str, done: float, total: float, info: dict[str, object]) -> None:
        send(self._connection, Progress(stage, done, total, info))

    def log(self, text: str) -> None:
        send(self._connection, Log(text))


def be_rank(connection: Connection, seat: Seat) -> None:
    """What a rank process does; called by `Processes`."""
    try:
        import torch.distributed as dist

        from distattn.launch.ranks import join, leave

        timeout = seat.config.launcher.timeout
        store = None
        if seat.port is not None:
            store = dist.TCPStore(_LOOPBACK, seat.port, is_master=False, timeout=timedelta(seconds=timeout))
        context = join(
            rank=seat.rank,
            world_size=seat.world_size,
            local_rank=seat.rank,
            local_world_size=seat.world_size,
            kind=seat.device,
            store=store,
            timeout=timeout,
            output_dir=seat.output_dir,
            reporter=_Sender(connection),
        )
        send(connection, Started())
        result = find_job(seat.config.job.name).run(seat.config, context)
        leave(context)
        send(connection, Finished(result if seat.rank == 0 else None))
    except BaseException as error:
        when = time.time()
        summary = traceback.format_exception_only(error)[-1].strip()
        detail = "".join(traceback.format_exception(error, limit=-6))
        send(connection, Failure(seat.rank, f"failed: {summary}", detail.rstrip(), when))
        tell_the_others(error)
        sys.stdout.flush()
        # Not through the interpreter's end, which may wait for the very peers that wait for this rank.
        os._exit(1)


def tell_the_others(error: BaseException) -> None:
    """Says to the other ranks why this one ends, if it has met them."""
    if "distattn.watch" in sys.modules:
        from distattn.watch import fail

        fail(error)

"""Following ranks from their start to their end, wherever they run: what they say is shown, how they fail is kept."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

from distattn.conf.schema import Config
from distattn.jobs import Result, find_job
from distattn.jobs.context import Context
from distattn.launch.device import Device
from distattn.launch.display import Display
from distattn.launch.failures import ABORTED, ACTOR_LOST, DID_NOT_START, Failure, order
from distattn.launch.processes import Exit, Line, Message

# Seconds to wait for further failures once there is one: the first to be heard may follow from another, and the others
# need some time to find out who is at fault.
_GATHER = 5.0
# Seconds that a rank may take to exit once all have done their work.
_EXIT_TIMEOUT = 30.0


class Seat(NamedTuple):
    """What a rank is told.

    `address` is the host and port of the store where the ranks meet, None if there is one rank.
    """

    config: Config
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: Device
    address: tuple[str, int] | None
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


class Lost(NamedTuple):
    """The rank is gone, and why is not known from an exit status. Its last event."""

    summary: str
    detail: str


Event = Message | Line | Exit | Lost


class Ranks(Protocol):
    """Where events come from; `Processes` are such."""

    def __len__(self) -> int: ...

    def poll(self, timeout: float) -> list[tuple[int, Any]]:
        """What happened, as (rank, Event), in order; waits up to `timeout` seconds for something to happen."""

    def tail(self, number: int) -> list[str]:
        """The last lines that a rank printed."""


class Watch:
    """Follows ranks that have been started."""

    def __init__(self, ranks: Ranks, display: Display, start_timeout: float) -> None:
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
                    self._fail(rank, f"did not start within {self._start_timeout:g} s", kind=DID_NOT_START)
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

    def _take(self, rank: int, event: Event) -> None:
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
            case Lost(summary, detail):
                self._running.discard(rank)
                self._fail(rank, summary, killed=True, kind=ACTOR_LOST, detail=detail)
            case Exit(code):
                self._running.discard(rank)
                if code != 0 or rank in self._working:
                    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
                    aborted = code == -signal.SIGABRT
                    self._fail(rank, how, killed=code < 0 and not aborted, kind=ABORTED if aborted else "")

    def _fail(self, rank: int, summary: str, killed: bool = False, kind: str = "", detail: str = "") -> None:
        tail = "\n".join(self._ranks.tail(rank))
        detail += f"\nThe last lines that it printed:\n{tail}" if tail else ""
        self._failures.setdefault(rank, Failure(rank, summary, detail.lstrip(), time.time(), killed, kind))


class Sender:
    """A reporter that sends everything to the launcher."""

    def __init__(self, send: Callable[[object], None]) -> None:
        self._send = send

    def progress(self, stage: str, done: float, total: float, info: dict[str, object]) -> None:
        self._send(Progress(stage, done, total, info))

    def log(self, text: str) -> None:
        self._send(Log(text))


def work(
    seat: Seat,
    send: Callable[[object], None],
    gpu: int | None = None,
    run: Callable[[Config, Context], Result | None] | None = None,
) -> None:
    """What a rank does, with a launcher that listens: join the others, run the job, leave; raises what fails.

    Args:
        gpu: see `ranks.join`.
        run: in place of the job that the configuration names.
    """
    from datetime import timedelta

    from torch.distributed import TCPStore

    from distattn.launch.ranks import join, leave

    timeout = seat.config.launcher.timeout
    store = None
    if seat.address is not None:
        store = TCPStore(*seat.address, is_master=False, timeout=timedelta(seconds=timeout))
    context = join(
        rank=seat.rank,
        world_size=seat.world_size,
        local_rank=seat.local_rank,
        local_world_size=seat.local_world_size,
        kind=seat.device,
        store=store,
        timeout=timeout,
        output_dir=seat.output_dir,
        reporter=Sender(send),
        gpu=gpu,
    )
    send(Started())
    result = (run or find_job(seat.config.job.name).run)(seat.config, context)
    leave(context)
    send(Finished(result if seat.rank == 0 else None))


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP become SystemExit, so that all is tidied up; the exit code is 128 + the signal."""

    code = 0

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal code
        code = 128 + number
        raise SystemExit(code)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except SystemExit:
        if code:  # inside of Ray's functions it becomes a 1
            raise SystemExit(code) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

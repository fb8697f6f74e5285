"""The actor behind a service: it owns the ranks and the queue of requests, and outlives those who ask."""

import math
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distattn import errors
from distattn.conf.schema import Config, RayConfig
from distattn.errors import ConfigError, DistattnError, PeerLost, ServiceDead
from distattn.generate import Generated, Sampling, check_prompts
from distattn.jobs.context import Context
from distattn.jobs.generate import check_attention
from distattn.jobs.serve import Answer, Prompts, Request, Written, serve
from distattn.launch.device import Device
from distattn.launch.failures import Failure
from distattn.launch.processes import Exit, Line, Message
from distattn.launch.ray_actor import Channel, visible_gpu
from distattn.launch.ray_group import RayRanks, bundle_of, place
from distattn.launch.watch import Log, Lost, Seat, Started, work


@dataclass(frozen=True)
class Reading:
    """What the decoder made of a text.

    Attributes:
        bits_per_byte: mean loss of every byte but the first, given all before it.
        loss: the same in nats.
        tokens: length of the text in bytes.
        seconds: of the slowest rank.
        waited: seconds before that, in the queue.
    """

    bits_per_byte: float
    loss: float
    tokens: int
    seconds: float
    waited: float


@dataclass(frozen=True)
class Writing:
    """What the decoder wrote.

    Attributes:
        answers: of each prompt.
        seconds: of the slowest rank.
        waited: seconds before that, in the queue.
    """

    answers: tuple[Generated, ...]
    seconds: float
    waited: float


@dataclass(frozen=True)
class ServiceStatus:
    """How a service is.

    Attributes:
        state: "starting", "ready", "dead" (a rank failed) or "ended" (it was shut down).
        reason: why it is dead, else "".
        world_size: ranks.
        waiting, max_queue: requests that wait, and how many may.
        busy: whether a request is being answered.
        answered: requests that were.
    """

    state: str
    reason: str
    world_size: int
    waiting: int
    max_queue: int
    busy: bool
    answered: int


class Refusal(NamedTuple):
    """An error as the front tells it; Ray would wrap the error itself."""

    kind: str
    text: str


class _Waiting(NamedTuple):
    """A request, and where its answer goes."""

    asked: "NDArray[np.uint8] | tuple[tuple[bytes, ...], Sampling]"
    reply: "Future[Reading | Writing | Refusal]"
    since: float


class Front:
    """The actor that other processes know: it owns the ranks and the queue; many of its methods run at once."""

    def __init__(
        self, config: Config, device: Device, world_size: int, max_queue: int, environment: dict[str, Any]
    ) -> None:
        self._config, self._device, self._world_size, self._environment = config, device, world_size, environment
        self._queue: queue.Queue[_Waiting] = queue.Queue()
        self._max_queue = max_queue
        self._lock = threading.Lock()  # of what follows, but not while something is waited for
        self._state, self._refusal = "starting", Refusal("ServiceDead", "")
        self._current: _Waiting | None = None
        self._unanswered = 0
        self._answered = 0
        self._began, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> Refusal | None:
        self._began.wait()
        return None if self._state == "ready" else self._refusal

    def prefill(self, tokens: NDArray[np.uint8]) -> Reading | Writing | Refusal:
        fewest = max(2, (self._world_size - 1) * self._config.layout.block_q + 1)
        if not fewest <= len(tokens) <= self._config.seq_len:
            expected = f"{fewest:,} to {self._config.seq_len:,} (seq_len) on {self._world_size} ranks"
            return Refusal("ValueError", f"there are {len(tokens):,} tokens; expected {expected}")
        return self._wait_for(tokens)

    def generate(self, prompts: tuple[bytes, ...], how: Sampling) -> Reading | Writing | Refusal:
        try:
            check_attention(self._config)
            check_prompts(prompts, how, self._config.seq_len)
        except ConfigError as error:
            return Refusal("ConfigError", str(error))
        return self._wait_for((prompts, how))

    def _wait_for(self, asked: NDArray[np.uint8] | tuple[tuple[bytes, ...], Sampling]) -> Reading | Writing | Refusal:
        with self._lock:
            if self._state != "ready":
                return Refusal("ServiceDead", self._refusal.text or f"the service is {self._state}")
            waiting = self._unanswered - 1
            if waiting >= self._max_queue:
                return Refusal("ServiceBusy", f"{max(0, waiting)} requests wait already; expected a later request")
            self._unanswered += 1
            request = _Waiting(asked, Future(), time.monotonic())
            self._queue.put(request)
        return request.reply.result()

    def status(self) -> ServiceStatus:
        with self._lock:
            reason = self._refusal.text if self._state == "dead" else ""
            busy, waiting = self._unanswered > 0, max(0, self._unanswered - 1)
            return ServiceStatus(self._state, reason, self._world_size, waiting, self._max_queue, busy, self._answered)

    def shutdown(self) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        launcher = self._config.launcher
        assert isinstance(launcher, RayConfig)
        try:
            bundle = bundle_of(self._device, launcher.resources_per_worker)
            group = place(bundle, self._world_size, launcher.place_timeout if launcher.address else 0.0)
            with RayRanks(
                "distattn.launch.service_front:be_rank",
                self._config,
                self._device,
                Path(self._config.output_dir).absolute(),
                group,
                bundle,
                self._environment,
                launcher.stop_timeout,
            ) as ranks:
                self._start(ranks, launcher.start_timeout)
                with self._lock:
                    self._state = "ready"
                self._began.set()
                number = 0
                while not self._ending.is_set():
                    self._hear(ranks, 0.0, {})  # a rank may fail while there is nothing to do
                    try:
                        request = self._queue.get(timeout=0.05)
                    except queue.Empty:
                        continue
                    self._answer(ranks, number, request)
                    number += 1
            self._close("ended", Refusal("ServiceDead", "the service was shut down"))
        except BaseException as error:
            kind = type(error).__name__ if isinstance(error, DistattnError) else "ServiceDead"
            text = str(error) if isinstance(error, DistattnError) else f"{type(error).__name__}: {error}"
            self._close("dead", Refusal(kind, text))
        self._began.set()

    def _start(self, ranks: RayRanks, timeout: float) -> None:
        started: dict[int, object] = {}
        deadline = time.monotonic() + timeout
        while len(started) < len(ranks):
            self._hear(ranks, 0.5, started)
            if time.monotonic() > deadline:
                missing = sorted(set(range(len(ranks))) - started.keys())
                raise PeerLost(f"ranks {missing} did not start within {timeout:g} s")
            if self._ending.is_set():
                raise ServiceDead("the service was shut down")

    def _answer(self, ranks: RayRanks, number: int, request: _Waiting) -> None:
        self._current = request
        began = time.monotonic()
        asked = request.asked
        message = Prompts(number, *asked) if isinstance(asked, tuple) else Request(number, asked)
        for rank in range(len(ranks)):
            ranks.send(rank, message)
        answers: dict[int, Any] = {}
        while len(answers) < len(ranks):
            self._hear(ranks, 0.5, answers)
            if self._ending.is_set():
                raise ServiceDead("the service was shut down")
        seconds, waited = max(answer.seconds for answer in answers.values()), began - request.since
        found: Reading | Writing
        if isinstance(asked, tuple):
            found = Writing(answers[0].answers, seconds, waited)
        else:
            loss = answers[0].nats / (len(asked) - 1)
            found = Reading(loss / math.log(2), loss, len(asked), seconds, waited)
        with self._lock:
            self._current = None
            self._unanswered -= 1
            self._answered += 1
        request.reply.set_result(found)

    def _hear(self, ranks: RayRanks, timeout: float, said: dict[int, Any]) -> None:
        """Take what ranks tell: what they say for the launcher goes to `said` by rank; raises if one fails."""
        for rank, event in ranks.poll(timeout):
            match event:
                case Line(text) | Message(Log(text)):
                    print(f"[rank {rank}] {text}", flush=True)  # into Ray's log of this actor
                case Message(Started() | Answer() | Written() as value):
                    said[rank] = value
                case Message(Failure() as failure):
                    raise error_class(failure.kind, PeerLost)(f"rank {rank} {failure.summary}")
                case Lost(summary):
                    raise PeerLost(f"rank {rank} {summary}")
                case Exit():
                    raise PeerLost(f"rank {rank} ended")

    def _close(self, state: str, refusal: Refusal) -> None:
        """The end: requests under way are refused so, later ones as dead."""
        with self._lock:
            self._state, self._refusal = state, refusal
            left = [self._current] if self._current else []
            while not self._queue.empty():
                left.append(self._queue.get())
            self._current, self._unanswered = None, 0
        for request in left:
            request.reply.set_result(refusal)


def be_rank(channel: Channel, seat: Seat) -> None:
    """What a rank of a service does, as a target of `RankActor.begin`."""

    def run(config: Config, context: Context) -> None:
        serve(config, context, channel.receive, channel.send)

    work(seat, channel.send, visible_gpu(), run)


def error_class(kind: str, other: type[Exception] = ServiceDead) -> type[Exception]:
    """The exception of that name among distattn's own and ValueError; `other` for any other name."""
    found = ValueError if kind == "ValueError" else getattr(errors, kind, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else other

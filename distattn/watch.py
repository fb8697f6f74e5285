"""How ranks notice that one of them is gone, frozen, too slow, or elsewhere in the program.

Each rank counts the exchanges that it begins, and keeps a note of what it is doing. A thread of each process posts that
note to the rendezvous store twice a second, so a healthy exchange costs no traffic. When an exchange fails or outlasts
its deadline, the rank reads everybody's notes: who says nothing new is frozen or gone, who has not come so far is slow,
and who waits for something else disagrees. A rank that fails or is done says so in a last note.

On CPUs (gloo) waiting ends by itself, with an error. On GPUs (NCCL) it only orders streams, so that the thread looks
after what is under way: at the deadline it aborts the communicators, and the next exchange raises. Until then a job may
compute with rows that never came: whatever else it raises follows from that (see `aborted`). By default NCCL's own
watchdog ends a process whose communicators fail or are aborted, by SIGABRT: ranks that the launchers start are told not
to (`launch.ranks.join`).
"""

from __future__ import annotations

import atexit
import json
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from distattn.errors import DistattnError, PeerLost, PlanMismatch, StepTimeout

BEAT = 0.5
"""Seconds between two notes of a rank."""
SILENCE = 4 * BEAT
"""Seconds without a new note after which a rank counts as silent."""
_PATIENCE = 5.0  # seconds to wait for the store, once something is wrong
_LEFT = "left"


class Note(NamedTuple):
    """What a rank says of itself.

    beat: grows with every note. calls: exchanges begun. last: the last of them. waiting: what it waits for, or "".
    late: it has waited longer than the deadline. digest: of all exchanges so far. end: "", or "left", or the kind of
    error for which it ends; cause: of that error.
    """

    beat: int
    calls: int
    last: str
    waiting: str
    late: bool
    digest: int
    end: str
    cause: str


Notes = dict[int, Note | None]  # of the other ranks; None: nothing was ever posted
_Reader = Callable[[], Notes | None]  # None: the store does not answer


_deadline: float | None = None


def set_deadline(seconds: float | None) -> None:
    """How long an exchange may take in this process; None, as at first: the timeout of its process group."""
    global _deadline
    _deadline = seconds


class Stage:
    """One exchange, from its start to the end of waiting.

    tag: for messages that can have one; equal on ranks that have made the same exchanges so far, and on no others.

    The code that starts it stands in ``with stage:``, which turns errors of torch.distributed into ours; then
    ``stage.wait(works)``.
    """

    __slots__ = ("watch", "name", "tag", "on_gpu")

    def __init__(self, watch: Watch, name: str, tag: int, on_gpu: bool) -> None:
        self.watch, self.name, self.tag, self.on_gpu = watch, name, tag, on_gpu

    def __enter__(self) -> None:
        if self.on_gpu:  # NCCL connects ranks when they first exchange something: starting may wait for a peer
            self.watch.starting = self.name, time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.watch.starting = None
        if isinstance(error, RuntimeError) and not isinstance(error, DistattnError | torch.OutOfMemoryError):
            raise self.watch.explain(self.name, error) from error

    def wait(self, works: Sequence[dist.Work | None]) -> None:
        """Returns when the exchange has ended; on GPUs, when the current stream waits for it.

        Raises:
            PeerLost, StepTimeout, PlanMismatch: it did not, or an earlier one did not.
        """
        watch = self.watch
        watch.waiting = self.name
        end = time.monotonic() + watch.deadline
        with self:
            for work in works:
                if work is None:
                    continue
                if self.on_gpu:
                    work.wait()
                else:
                    work.wait(timedelta(seconds=max(end - time.monotonic(), 0.001)))
            if self.on_gpu and not _capturing():  # a graph's exchanges are under way when it runs
                watch.look_after(self.name)
        watch.waiting = ""
        if watch.verdict is not None:
            raise watch.verdict


class Watch:
    """This rank's note in one process group, and what it learns from those of others; get one from `watch_of`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.world_size = group, group.rank(), group.size()
        self.calls, self.last, self.waiting, self.late, self.digest = 0, "", "", False, 0
        self.end = self.cause = ""
        self.verdict: DistattnError | None = None
        self.starting: tuple[str, float] | None = None  # an exchange on a GPU, and since when
        self._beat = 0
        self._under_way: deque[tuple[str, torch.cuda.Event, float]] = deque()
        self._questions: queue.SimpleQueue[queue.SimpleQueue[Notes | None] | None] = queue.SimpleQueue()
        # A client of its own: one that waits for a key lets nobody else speak meanwhile.
        kinds = {device.type for device in group._device_types}
        options = getattr(group._get_backend(torch.device("cuda" if "cuda" in kinds else "cpu")), "options", None)
        self._timeout: float = getattr(options, "_timeout", dist.default_pg_timeout).total_seconds()
        store: Any = dist.distributed_c10d._get_process_group_store(group)
        self._store: dist.Store = store.clone()
        self._thread = threading.Thread(target=self._run, name="distattn watch", daemon=True)
        self._thread.start()

    @property
    def deadline(self) -> float:
        """Seconds that an exchange may take."""
        return self._timeout if _deadline is None else _deadline

    def enter(self, what: str, on_gpu: bool = False) -> Stage:
        """Counts and names an exchange that is about to begin.

        Args:
            what: equal on all ranks, whether or not they have anything to send.
            on_gpu: of tensors on a GPU, where waiting only orders streams.
        """
        if self.verdict is not None:
            raise self.verdict
        self.calls += 1
        self.last = f"exchange {self.calls}: {what}"
        self.digest = zlib.crc32(what.encode(), self.digest)
        self.end, self.late, self.waiting = "", False, ""  # of an error that the caller has survived
        return Stage(self, self.last, self.digest % 2**31, on_gpu)

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Notes what this rank waits for, where that is no exchange."""
        self.waiting = what
        yield
        self.waiting = ""

    def look_after(self, name: str) -> None:
        """Lets the thread see to it that the current stream, which has been told to wait for an exchange, gets past it
        within the deadline.

        The work of torch.distributed would tell, too, but holds what was received for as long as it is held.
        """
        event = torch.cuda.Event()
        event.record()
        self._under_way.append((name, event, time.monotonic()))

    def explain(
        self, name: str, error: BaseException | None, silent: type[DistattnError] = StepTimeout
    ) -> DistattnError:
        """Why this rank waits in vain for what is called ``name``, as an error to raise; takes up to 7 s.

        Args:
            error: of torch.distributed; None: the deadline has passed.
            silent: what it is if the deadline has passed and a rank says nothing.
        """
        if self.verdict is not None:
            return self.verdict
        self.waiting = name
        found = self._diagnose(name, error, silent, self.notes)
        self.end = type(found).__name__
        return found

    def notes(self, patience: float = _PATIENCE) -> Notes | None:
        """The other ranks' last notes, after posting this rank's; None: the store did not answer within seconds."""
        answer: queue.SimpleQueue[Notes | None] = queue.SimpleQueue()
        self._questions.put(answer)
        try:
            return answer.get(timeout=patience)
        except queue.Empty:
            return None

    def fail(self, error: BaseException) -> None:
        """Tells the others that this rank is about to end, and why. Never raises; takes up to 2 s."""
        if self.end in ("", _LEFT):  # else it is known already
            self.refuse(type(error), str(error).partition("\n")[0])
        self.notes(patience=2.0)

    def refuse(self, kind: type[BaseException], why: str) -> None:
        """Lets the others know with the next note that this rank raises an error of that kind."""
        self.end, self.cause = kind.__name__, f"rank {self.rank} failed: {kind.__name__}: {why}"

    def aborted(self) -> DistattnError | None:
        """Why exchanges on a GPU did not end as they should; None if they did. Takes up to 7 s if they did not."""
        while self.verdict is None and self._under_way and self._device_error() and self._thread.is_alive():
            time.sleep(BEAT / 10)  # the thread is about to find out
        return self.verdict

    def leave(self) -> None:
        """Returns when all ranks have left after the same exchanges; a rank that is busy elsewhere is waited for.

        Raises:
            PlanMismatch: a rank has made or awaits other exchanges than this one.
            PeerLost: a rank failed, or says nothing for the length of the deadline.
            StepTimeout: a rank failed with it, or an exchange on a GPU did not end within its deadline.
        """
        if verdict := self.aborted():
            raise verdict
        self.end = _LEFT
        heard: dict[int, tuple[int, float]] = {}
        pause = 0.02
        while (notes := self.notes()) is not None:
            now = time.monotonic()
            for peer, note in notes.items():
                beat = -1 if note is None else note.beat
                if peer not in heard or heard[peer][0] != beat:
                    heard[peer] = beat, now
                if problem := self._left_alone_by(peer, note, now - heard[peer][1]):
                    self.end, self.cause = type(problem).__name__, str(problem)
                    self.notes()
                    raise problem
            if all(note is not None and note.end == _LEFT for note in notes.values()):
                break
            time.sleep(pause)
            pause = min(2 * pause, BEAT)
        self.close()

    def close(self) -> None:
        """Ends the thread."""
        self._questions.put(None)
        self._thread.join(timeout=2.0)

    def _left_alone_by(self, peer: int, note: Note | None, silent: float) -> DistattnError | None:
        mine = f"rank {self.rank} is done after {_done(self.calls, self.last)}"
        if note is not None and note.end == _LEFT:
            if (note.calls, note.digest) == (self.calls, self.digest):
                return None
            return PlanMismatch(f"{mine}; rank {peer} after {_done(note.calls, note.last)}, by other exchanges")
        if note is not None and note.calls > self.calls:
            return PlanMismatch(f"{mine}; rank {peer} has gone on to {note.last}")
        if note is not None and note.end:
            kind, cause = _reason(peer, note)
            return kind(f"{mine}; {cause}")
        if silent > self.deadline:
            return PeerLost(f"{mine}; rank {peer} has said nothing for {silent:.1f} s: it is frozen or gone")
        return None

    def _diagnose(
        self, name: str, error: BaseException | None, silent: type[DistattnError], read: _Reader
    ) -> DistattnError:
        self.late = error is None or "timed out" in str(error).lower()
        problem = f"did not end within {self.deadline:g} s" if self.late else f"failed ({_first_sentence(error)})"
        kind, self.cause = self._cause(name, silent, read)
        return kind(f"rank {self.rank}, {name}: {problem}; {self.cause}")

    def _cause(self, name: str, silent: type[DistattnError], read: _Reader) -> tuple[type[DistattnError], str]:
        """What kind of error it is, and one sentence on the rank at fault."""
        began, first = time.monotonic(), read()
        notes = first
        while first is not None and notes is not None:
            if ended := [(peer, note) for peer, note in notes.items() if note is not None and note.end]:
                return _reason(*ended[0])
            # A rank whose deadline has passed breaks its connections to all others.
            late = self.late or any(note is not None and note.late for note in notes.values())
            quiet = [p for p, note in notes.items() if note is None or note.beat == _beat(first[p])]
            if (late and not quiet) or time.monotonic() > began + SILENCE:
                break
            time.sleep(BEAT / 4)
            notes = read()
        if first is None or notes is None:
            kind = StepTimeout if self.late else PeerLost
            return kind, "nothing is known of the other ranks, as the rendezvous store does not answer either"
        if quiet:
            who = ", ".join(f"rank {p} ({_last_of(notes[p])})" for p in quiet[:4])
            how = "it is frozen, or gone, or not there yet" if late else "it is gone"
            return silent if late else PeerLost, f"there is no sign of life of {who}: {how}"
        if not late:
            return PeerLost, "all other ranks run"
        present = {peer: note for peer, note in notes.items() if note is not None}
        if behind := {p: note for p, note in present.items() if note.calls < self.calls and not note.waiting}:
            peer, note = min(behind.items(), key=lambda item: item[1].calls)
            return StepTimeout, f"rank {peer} has not come so far: it runs, after {_done(note.calls, note.last)}"
        for peer, note in present.items():
            if note.waiting not in ("", name):
                return PlanMismatch, f"rank {self.rank} is in {name}, and rank {peer} in {note.waiting}"
            if note.calls == self.calls and note.digest != self.digest:  # on GPUs nobody waits
                return PlanMismatch, f"rank {self.rank} has come to {self.last}, and rank {peer} to {note.last}"
        return StepTimeout, "all other ranks have come so far too"

    # What follows runs in the thread.

    def _run(self) -> None:
        answer: queue.SimpleQueue[Notes | None] | None = None
        while True:
            try:
                self._beat += 1
                note = (self.calls, self.last, self.waiting, self.late, self.digest, self.end, self.cause)
                self._store.set(_key(self.rank), json.dumps((self._beat, *note)))
                notes = self._read() if answer is not None else None
                self._look_after_work()
            except RuntimeError:  # the store is gone
                notes = None
            if answer is not None:
                answer.put(notes)
            try:
                answer = self._questions.get(timeout=BEAT)
                if answer is None:
                    return
            except queue.Empty:
                answer = None
                if not self._in_use():
                    return

    def _in_use(self) -> bool:
        try:
            return dist.distributed_c10d._resolve_process_group(self.group.group_name) is self.group
        except RuntimeError:  # it was destroyed
            return False

    def _read(self) -> Notes | None:
        try:
            others = [peer for peer in range(self.world_size) if peer != self.rank]
            keys = {peer: _key(peer) for peer in others}
            return {
                p: Note(*json.loads(self._store.get(k))) if self._store.check([k]) else None for p, k in keys.items()
            }
        except RuntimeError:
            return None

    def _look_after_work(self) -> None:
        under_way, starting = self._under_way, self.starting
        if not (under_way or starting) or self.verdict is not None:
            return
        problem = self._device_error()  # first: what has failed counts as completed
        while problem is None and under_way and under_way[0][1].query():
            under_way.popleft()
        oldest = (under_way[0][0], under_way[0][2]) if under_way else starting
        if oldest is None or (problem is None and time.monotonic() < oldest[1] + self.deadline):
            return
        name = oldest[0]
        self.verdict = self._diagnose(name, problem, StepTimeout, self._read)
        self.end = type(self.verdict).__name__
        print(f"distattn: {self.verdict}", flush=True)  # should the main thread not get so far
        self._abort()

    def _device_error(self) -> RuntimeError | None:
        """What NCCL has found out by itself."""
        try:
            found = self.group._get_backend(torch.device("cuda")).get_error()
        except RuntimeError:  # another backend, which cannot say
            return None
        return None if found.name == "SUCCESS" else RuntimeError(f"NCCL says {found.name}")

    def _abort(self) -> None:
        self.group._get_backend(torch.device("cuda")).abort()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _key(rank: int) -> str:
    return f"distattn/note/{rank}"


def _beat(note: Note | None) -> int:
    return -1 if note is None else note.beat


def _done(calls: int, last: str) -> str:
    return last if calls else "no exchange"


def _last_of(note: Note | None) -> str:
    return "never heard of" if note is None else f"last heard of in {note.waiting or _done(note.calls, note.last)}"


def _first_sentence(error: BaseException | None) -> str:
    text = str(error).partition("\n")[0].partition(". This is typically")[0]
    return text.partition("] ")[2] or text  # without the place in the sources of gloo


def _reason(peer: int, note: Note) -> tuple[type[DistattnError], str]:
    """Of a rank that has ended: its reason is passed on."""
    if note.end == _LEFT:
        return PlanMismatch, f"rank {peer} has left after {_done(note.calls, note.last)}"
    kinds: tuple[type[DistattnError], ...] = (PlanMismatch, StepTimeout, PeerLost)
    return next((kind for kind in kinds if kind.__name__ == note.end), PeerLost), note.cause


_watches: dict[str, Watch] = {}


def watch_of(group_name: str) -> Watch:
    """The watch over a process group, which begins when it is first asked for."""
    watch = _watches.get(group_name)
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    if watch is None or watch.group is not group:  # names are given again
        if watch is not None:
            watch.close()
        watch = _watches[group_name] = Watch(group)
    return watch


def fail(error: BaseException) -> None:
    """Tells the other ranks, in all process groups, that this one is about to end. Never raises."""
    for watch in _watches.values():
        watch.fail(error)


def leave() -> None:
    """`Watch.leave` in all process groups, in the order in which exchanges began there: the same on all ranks."""
    for watch in [*_watches.values()]:
        if watch._in_use():
            watch.leave()


def aborted() -> DistattnError | None:
    """Why exchanges on a GPU did not end as they should, in whichever process group; None if they did."""
    return next((verdict for watch in _watches.values() if (verdict := watch.aborted())), None)


@atexit.register
def _end() -> None:
    for watch in _watches.values():  # a thread that runs while the interpreter ends can abort the process
        watch.close()

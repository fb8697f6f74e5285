"""Child processes for ranks: they are started, heard, and ended here, and they never outlive their parent.

A child calls one function. It has two ways to be heard: a connection for messages, and whatever it prints
(stdout and stderr together), by lines. It leads its own process group, so that Ctrl-C in a terminal reaches the
parent alone, and so that the parent can end it with everything that it started.

On Linux children are forked from a server (multiprocessing's forkserver) that has imported PyTorch once, which
takes seconds of CPU time and hundreds of MB otherwise spent by each; elsewhere, where forking after such
imports is unsafe, each is a fresh interpreter. The server belongs to this process and serves all its children.

If the parent dies, however it dies, the child ends too: a thread waits for the parent's end. On Linux the
kernel kills it as well when the server is gone, which ends with the parent (PR_SET_PDEATHSIG, prctl(2)); that
works even while some extension holds Python's global lock.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from types import TracebackType
from typing import Any, NamedTuple

_TAIL = 20  # lines of each child's output that are kept

_PROCESSES: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
# What every rank needs and what is slow to import. The command's own module is not among them: it is __main__.
_PROCESSES.set_forkserver_preload(
    ["torch.distributed.device_mesh", "hydra", "distattn.launch.local", "distattn.launch.ranks", "distattn.attend"]
)


def prepare() -> None:
    """Let the server of children start and import while this process goes on; returns at once."""
    if sys.platform == "linux":
        # Ctrl-C in a terminal reaches the server too, which ignores it only once it has imported everything.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Message(NamedTuple):
    """A child sent this value."""

    value: Any


class Line(NamedTuple):
    """A child printed this line."""

    text: str


class Exit(NamedTuple):
    """A child ended: its exit status, or minus the number of the signal that ended it. Its last event."""

    code: int


Event = Message | Line | Exit


class Processes:
    """Child processes numbered from 0; use it as a context manager, which ends those that are left.

    Args:
        target: "module:function", called in each child as function(connection, argument); see `send` and
            `receive`.
        arguments: one a child; pickled.
        env: environment of the children. What libraries read while they are imported is this process's own.
        path: folders that come first in the children's sys.path, which is otherwise that of this process.
        stop_timeout: seconds between asking a child to stop (SIGTERM) and killing it, on leaving the context.
    """

    def __init__(
        self,
        target: str,
        arguments: Sequence[object],
        env: Mapping[str, str],
        path: Sequence[str] = (),
        stop_timeout: float = 5.0,
    ) -> None:
        self._stop_timeout = stop_timeout
        self._children: list[_Child] = []
        prepare()
        try:
            for _ in arguments:
                self._children.append(_Child(target, dict(env), list(path)))
            for number, argument in enumerate(arguments):
                self.send(number, argument)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __len__(self) -> int:
        return len(self._children)

    def send(self, number: int, value: object) -> None:
        """Pickle a value and send it to a child; nothing happens if the child has ended."""
        try:
            send(self._children[number].connection, value)
        except (BrokenPipeError, ConnectionResetError):
            pass  # poll tells that it has ended

    def poll(self, timeout: float) -> list[tuple[int, Event]]:
        """What happened, as (child's number, event); waits up to `timeout` seconds for something to happen.

        The events of a child come in order, and all of its messages and lines before its Exit. (A line that a
        child printed before it sent a message may come after the message.)
        """
        deadline = time.monotonic() + timeout
        while True:
            # Pipes alone do not tell of an end: a process that the child started may still hold them.
            sources = [source for child in self._children for source in child.sources()]
            pause = max(0.0, min(0.1, deadline - time.monotonic()))
            ready = wait(sources, pause)
            found = [(n, event) for n, child in enumerate(self._children) for event in child.events(ready)]
            if found or time.monotonic() >= deadline:
                return found

    def tail(self, number: int) -> list[str]:
        """The last lines that a child printed."""
        return list(self._children[number].tail)

    def stop(self, timeout: float | None = None) -> None:
        """End all children and what they started: SIGTERM, then SIGKILL after a while; returns when they are gone.

        An interrupt (Ctrl-C) while it waits kills them at once, and is raised again.
        """
        deadline = time.monotonic() + (self._stop_timeout if timeout is None else timeout)
        try:
            for child in self._children:
                child.signal(signal.SIGTERM)
            while any(child.process.exitcode is None for child in self._children) and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            for child in self._children:
                child.close()


class _Child:
    """One child process, seen from its parent."""

    def __init__(self, target: str, env: dict[str, str], path: list[str]) -> None:
        self.connection, theirs = Pipe()
        output, theirs_to_write = os.pipe()
        self.output = open(output, "rb", buffering=0)
        with theirs, open(theirs_to_write, "wb", buffering=0):
            self.process: BaseProcess = _PROCESSES.Process(target=_Start(target, env, path, theirs, theirs_to_write))
            self.process.start()
        os.set_blocking(self.output.fileno(), False)
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self.code: int | None = None  # set once the Exit event was given out
        self._open = {self.connection.fileno(), self.output.fileno()}
        self._partial = b""

    def sources(self) -> list[int]:
        return sorted(self._open)

    def has_ended(self) -> bool:
        return self.code is None and self.process.exitcode is not None

    def events(self, ready: Sequence[object]) -> list[Event]:
        ended = self.has_ended()  # asked first: whatever it wrote is then already in the pipes
        found: list[Event] = []
        if self.output.fileno() in ready or ended:
            found += self._lines(ended)
        if self.connection.fileno() in ready or ended:
            found += self._messages()
        if ended:
            self._open.clear()
            self.code = self.process.exitcode
            assert self.code is not None
            found.append(Exit(self.code))
        return found

    def _messages(self) -> list[Event]:
        found: list[Event] = []
        try:
            while self.connection.fileno() in self._open and self.connection.poll():
                found.append(Message(receive(self.connection)))
        except (EOFError, ConnectionResetError):
            self._open.discard(self.connection.fileno())
        return found

    def _lines(self, ended: bool) -> list[Event]:
        text = self._partial
        while self.output.fileno() in self._open:
            try:
                block = os.read(self.output.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not block:
                self._open.discard(self.output.fileno())
            text += block
        *lines, self._partial = text.split(b"\n")
        if self._partial and (ended or self.output.fileno() not in self._open):
            lines.append(self._partial)
            self._partial = b""
        decoded = [line.decode(errors="replace") for line in lines]
        self.tail.extend(decoded)
        return [Line(line) for line in decoded]

    def signal(self, number: int) -> None:
        """Send a signal to the child and all that it started."""
        pid = self.process.pid
        assert pid is not None
        try:
            os.killpg(pid, number)
        except (ProcessLookupError, PermissionError):  # macOS answers the second for a group of zombies
            if self.process.exitcode is None:  # it does not lead its group yet
                with contextlib.suppress(ProcessLookupError):  # or it has ended, which is not known here yet
                    os.kill(pid, number)

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join()
        self._open.clear()
        self.connection.close()
        self.output.close()


def send(connection: Connection, value: object) -> None:
    """Pickle a value and send it; tensors by value, unlike `Connection.send` once torch is imported."""
    connection.send_bytes(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """Wait for a value that `send` sent. Raises EOFError when the other side is gone."""
    return pickle.loads(connection.recv_bytes())


class _Start:
    """What a child does first."""

    def __init__(self, target: str, env: dict[str, str], path: list[str], connection: Connection, output: Any) -> None:
        self.target, self.env, self.path = target, env, path
        self.connection, self.output = connection, output

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"output": DupFd(self.output)}

    def __call__(self) -> None:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `prepare`
        _die_with_the_parent()
        output: int = self.output.detach()  # what DupFd has become on the way
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.close(output)
        for stream in (sys.stdout, sys.stderr):
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(line_buffering=True, write_through=True)
        faulthandler.enable()
        os.environ.clear()
        os.environ.update(self.env)
        sys.path[:0] = self.path
        argument = receive(self.connection)
        module, _, function = self.target.partition(":")
        getattr(importlib.import_module(module), function)(self.connection, argument)


def _die_with_the_parent() -> None:
    if sys.platform == "linux":
        server = os.getppid()
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:  # it died before that call
            os.kill(os.getpid(), signal.SIGKILL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_the_end() -> None:
        parent.join()
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait_for_the_end, daemon=True).start()

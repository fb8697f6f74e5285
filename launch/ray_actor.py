"""A rank inside a Ray actor: it tells where it is, runs what it is told in a thread, and is asked for what happened.

Workers import this module by its name, so it must be importable there: from an installed package, or from the
working directory that Ray was given. Nothing of a job's data passes through Ray.
"""

import ctypes
import os
import queue
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from distattn.launch.failures import failure_of, tell_the_others
from distattn.launch.local import LOOPBACK_INTERFACE, SET_BY_TORCHRUN
from distattn.launch.processes import Exit, Line, Message
from distattn.launch.watch import Seat, work

# Seconds after which `events` answers even if nothing happened.
_LONG_POLL = 10.0
# What Ray prints for its own log files.
OF_RAY = (":job_id:", ":actor_name:", ":task_name:")


class Place(NamedTuple):
    """Where an actor is: Ray's id of the node, its address, the GPU's number there or -1, the process, its log file."""

    node: str
    ip: str
    gpu: int
    pid: int
    log: str


class Channel(NamedTuple):
    """The two ways between a rank and its launcher."""

    send: Callable[[object], None]
    receive: Callable[[], Any]


class RankActor:
    """The class of the actors; it needs max_concurrency of 4, since `events` waits while others are called."""

    def __init__(self) -> None:
        _die_with_the_raylet()
        self._events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._output = _Capture(lambda text: self._events.put(Line(text)))
        self._store: Any = None

    def place(self) -> Place:
        """Where this is."""
        import ray

        context = ray.get_runtime_context()
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), _own_gpu(), os.getpid(), self._output.log)

    def host_store(self) -> int:
        """Host the store where the ranks meet, as long as this actor lives; returns its port."""
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def begin(self, target: str, seat: Seat, one_machine: bool, ip: str) -> None:
        """Start to work, in a thread.

        Args:
            target: "module:function", called as function(channel, seat); the rank ends when it returns or raises.
            one_machine: all ranks are on one.
            ip: this node's address, to find the network interface that gloo is to use.
        """
        for name in (*SET_BY_TORCHRUN, *(name for name in os.environ if name.startswith("TORCHELASTIC_"))):
            os.environ.pop(name, None)
        interface = LOOPBACK_INTERFACE if one_machine else _interface_of(ip)
        if interface:  # never a name to resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        channel = Channel(lambda value: self._events.put(Message(value)), self._inbox.get)
        threading.Thread(target=self._work, args=(target, channel, seat), daemon=True).start()

    def events(self) -> list[object]:
        """What happened since the last call, in order; waits for something to happen, but not for long."""
        try:
            found = [self._events.get(timeout=_LONG_POLL)]
        except queue.Empty:
            return []
        while not self._events.empty():  # nobody else takes from it
            found.append(self._events.get())
        return found

    def send(self, value: object) -> None:
        """Give the rank a value, which it gets from `channel.receive()`."""
        self._inbox.put(value)

    def _work(self, target: str, channel: Channel, seat: Seat) -> None:
        try:
            module, _, function = target.partition(":")
            getattr(import_module(module), function)(channel, seat)
            code = 0
        except BaseException as error:
            channel.send(failure_of(seat.rank, error))
            tell_the_others(error)
            code = 1
        self._output.flush()
        self._events.put(Exit(code))


def be_rank(channel: Channel, seat: Seat) -> None:
    """The job of the configuration, as a target of `RankActor.begin`."""
    work(seat, channel.send, visible_gpu())


def visible_gpu() -> int:
    """This actor's GPU among those that it sees: Ray shows each actor its own alone, unless it was told not to."""
    import torch

    return 0 if torch.cuda.device_count() <= 1 else _own_gpu()


def _own_gpu() -> int:
    """The number on this machine of the GPU that Ray gave to this actor, or -1."""
    import ray

    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return int(gpus[0]) if gpus and gpus[0].isdecimal() else -1


def end_processes(pids: list[int], timeout: float) -> None:
    """Wait for actors of this node to end, and kill those that have not by then; run as a task on the node."""
    deadline = time.monotonic() + timeout
    while (left := [pid for pid in pids if _is_worker(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _is_worker(pid: int) -> bool:
    """Whether it runs and is a worker of Ray: the number may have become another process's."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def _interface_of(ip: str) -> str | None:
    """The network interface that has this IPv4 address; None if it cannot be found out."""
    if sys.platform != "linux":
        return None
    import fcntl

    siocgifaddr = 0x8915  # linux/sockios.h
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, siocgifaddr, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no such address
                continue
            if socket.inet_ntoa(answer[20:24]) == ip:
                return name
    return None


def _die_with_the_raylet() -> None:
    """Linux: the kernel kills this process when Ray's daemon of this machine, which started it, is gone.

    Ray's workers look for that themselves, but one that is frozen cannot.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


class _Capture:
    """Takes what this process prints, by lines, and writes it where it went before as well: Ray's log file."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take
        self._before = os.dup(1)
        self.log = os.path.realpath(f"/proc/self/fd/{self._before}")
        read, write = os.pipe()
        for descriptor in (1, 2):
            os.dup2(write, descriptor)
        os.close(write)
        # Ray's own objects may write elsewhere.
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        self._marker = f"end {os.urandom(8).hex()}"
        self._flushed = threading.Event()
        threading.Thread(target=self._read, args=(read,), daemon=True).start()

    def flush(self) -> None:
        """Returns when everything that was printed has been taken."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(1, f"\n{self._marker}\n".encode())
        self._flushed.wait(5.0)

    def _read(self, descriptor: int) -> None:
        held: str | None = None  # an empty line, which may be that of the marker
        with open(descriptor, errors="replace", newline="\n") as lines:
            for line in lines:
                text = line.rstrip("\n")
                if text == self._marker:
                    held = None
                    self._flushed.set()
                    continue
                if held is not None:
                    self._pass_on(held)
                    held = None
                if text:
                    self._pass_on(text)
                else:
                    held = text

    def _pass_on(self, text: str) -> None:
        try:
            os.write(self._before, f"{text}\n".encode())
        except OSError:  # its disk is full, say; the launcher still hears it
            pass
        if not text.startswith(OF_RAY):
            self._take(text)

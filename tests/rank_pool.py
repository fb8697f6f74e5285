"""Rank processes that live as long as the test run, and do what tests give them."""

import importlib.util
import inspect
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from distattn.launch.device import Device
from distattn.launch.local import rank_environment
from distattn.launch.processes import Exit, Line, Message, Processes, receive, send

START_TIMEOUT = 600.0  # seconds; importing PyTorch four times at once can be slow
AFTER_AN_ERROR = 5.0  # seconds that the other ranks get to end a call once one has failed


class RankError(Exception):
    """A function failed on a rank; `errors` has what was raised, by rank."""

    def __init__(self, message: str, errors: dict[int, BaseException]) -> None:
        super().__init__(message)
        self.errors = errors


class _Call(NamedTuple):
    path: str
    module: str
    function: str
    ranks: int
    arguments: bytes  # pickled apart, since unpickling them may need the module


class _Result(NamedTuple):
    value: Any


class _Error(NamedTuple):
    error: BaseException
    text: str


class RankPool:
    """Processes that start at the first call, and again after a call that left them in an unknown state."""

    def __init__(self, size: int = 4, device: Device = "cpu") -> None:
        self.size, self.device = size, device  # on "cuda" a GPU each
        self._processes: Processes | None = None
        self._store: Any = None

    def __call__(
        self, ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 900.0, **kwargs: Any
    ) -> list[Any]:
        """Run function(context, *args, **kwargs) on the first `ranks` ranks, which have a mesh of their own.

        Args:
            function: defined at the top of a module, which the ranks load from its file.
            timeout: seconds for all of them together.

        Returns:
            what it returned, by rank. Everything travels by pickle.

        Raises:
            RankError: it raised on some rank, or a rank ended.
            TimeoutError: it took longer than `timeout`.
        """
        if not 1 <= ranks <= self.size:
            raise ValueError(f"ranks is {ranks}; expected 1 to {self.size}")
        path = inspect.getsourcefile(function)
        assert path and "<locals>" not in function.__qualname__, f"{function} is not at the top of a module"
        call = _Call(path, function.__module__, function.__qualname__, ranks, pickle.dumps((args, kwargs)))
        try:
            processes = self._started()
            for rank in range(ranks):
                processes.send(rank, call)
            return self._collect(processes, ranks, timeout)
        except RankError as error:
            if len(error.errors) < ranks:  # some rank still waits for one that failed
                self.close()
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        if self._processes:
            self._processes.stop(timeout=0.0)
        self._processes = self._store = None

    def _started(self) -> Processes:
        if self._processes is None:
            import torch.distributed as dist

            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            seats = [(rank, self.size, self._store.port, self.device) for rank in range(self.size)]
            path = [str(Path(__file__).parent)]
            self._processes = Processes("rank_pool:serve", seats, rank_environment(), path)
            self._collect(self._processes, self.size, START_TIMEOUT)
        return self._processes

    def _collect(self, processes: Processes, ranks: int, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        errors: dict[int, _Error] = {}
        while len(results) + len(errors) < ranks:
            for rank, event in processes.poll(0.5):
                match event:
                    case Line(text):
                        print(f"[rank {rank}] {text}")
                    case Message(_Result(value)):
                        results[rank] = value
                    case Message(_Error() as error):
                        errors[rank] = error
                    case Exit(code):
                        tail = "\n".join(processes.tail(rank))
                        raise RankError(f"rank {rank} ended with exit status {code}\n{tail}", {})
                if errors:
                    deadline = min(deadline, time.monotonic() + AFTER_AN_ERROR)
            if time.monotonic() > deadline:
                break
        if errors:
            texts = [f"rank {rank} raised:\n{error.text}" for rank, error in sorted(errors.items())]
            missing = sorted(set(range(ranks)) - results.keys() - errors.keys())
            texts += [f"rank {rank} did not return" for rank in missing]
            raise RankError("\n".join(texts), {rank: error.error for rank, error in errors.items()})
        if len(results) < ranks:
            missing = sorted(set(range(ranks)) - results.keys())
            raise TimeoutError(f"ranks {missing} of {ranks} took longer than {timeout:g} s")
        return [results[rank] for rank in range(ranks)]


def serve(connection: Connection, seat: tuple[int, int, int, Device]) -> None:
    """What a process of the pool does: join the world, then one call after the other until it is ended."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from distattn.jobs.context import Context
    from distattn.launch.ranks import MESH_DIM

    rank, size, port, kind = seat
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=size,
        device_id=None if kind == "cpu" else device,
    )
    meshes: dict[int, DeviceMesh | None] = {1: None}
    for ranks in range(2, size + 1):
        group = dist.new_group(list(range(ranks)))
        if rank < ranks:
            meshes[ranks] = DeviceMesh.from_group(group, kind, mesh_dim_names=(MESH_DIM,))
    with tempfile.TemporaryDirectory() as folder:
        send(connection, _Result(None))
        while True:
            call: _Call = receive(connection)
            context = Context(rank, call.ranks, rank, device, meshes[call.ranks], Path(folder))
            try:
                function: Any = _load(call.path, call.module)
                for name in call.function.split("."):
                    function = getattr(function, name)
                args, kwargs = pickle.loads(call.arguments)
                reply: _Result | _Error = _Result(function(context, *args, **kwargs))
                pickle.dumps(reply)
            except Exception as error:
                text = traceback.format_exc()
                reply = _Error(_picklable(error), text)
            send(connection, reply)


def _load(path: str, name: str) -> ModuleType:
    """The module of that name, from its file: pytest's importlib mode leaves test modules off sys.path."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        parent, _, _ = name.rpartition(".")
        while parent:  # such as "tests", which unpickling imports first
            sys.modules.setdefault(parent, ModuleType(parent))
            parent, _, _ = parent.rpartition(".")
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _picklable(error: Exception) -> BaseException:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")

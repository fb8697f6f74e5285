"""What every launcher does inside a rank: join the others, run the job, leave."""

import ctypes
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import Store, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh

from distattn.errors import PeerLost
from distattn.jobs.context import Context, Reporter
from distattn.launch.device import Device
from distattn.watch import leave as leave_watches
from distattn.watch import set_deadline, watch_of

MESH_DIM = "sequence"
"""Name of the one dimension of the mesh that jobs get."""

_SECONDS_BETWEEN_REPORTS = 0.1
# Seconds that the process group waits longer than an exchange may take: its own errors name nobody.
_LATER = 10.0


class Throttled:
    """A reporter that passes on ten progress reports a second, and the first and last one of a stage."""

    def __init__(self, inner: Reporter) -> None:
        self._inner = inner
        self._stage: str | None = None
        self._next = 0.0

    def progress(self, stage: str, done: float, total: float, info: dict[str, object]) -> None:
        now = time.monotonic()
        if stage == self._stage and done < total and now < self._next:
            return
        self._stage, self._next = stage, now + _SECONDS_BETWEEN_REPORTS
        self._inner.progress(stage, done, total, info)

    def log(self, text: str) -> None:
        self._inner.log(text)


def cpu_threads(ranks: int) -> int:
    """Threads for each of `ranks` processes that share this machine's usable cores; at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only: the cores that this process may use
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // ranks)


def keep_freed_memory() -> None:
    """Let the C library's allocator keep what is freed for what is allocated next, instead of giving it back.

    Each layer frees what the next one allocates, and memory that comes back from the system is cleared page by page;
    in virtual machines that lend free memory to others this can take longer than computing does. Costs what lies
    unused between allocations of different sizes. Does nothing where the C library is not glibc (mallopt(3)).
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc.mallopt(trim_threshold, -1)  # never
    libc.mallopt(mmap_max, 0)  # large blocks are cut from the heap too: mapped ones are given back when freed


def prepare_nccl() -> None:
    """How NCCL, and PyTorch's part of it, should behave in this process, where the environment does not say otherwise;
    before a process group is made."""
    settings = {
        # Exchanges run beside kernels that fill the GPU: they come first when a multiprocessor is free.
        "TORCH_NCCL_HIGH_PRIORITY": "1",
        # What has failed is aborted, but does not end the process, which has an error to raise.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def join(
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    kind: Device,
    store: Store | None,
    timeout: float,
    output_dir: Path,
    reporter: Reporter,
    gpu: int | None = None,
) -> Context:
    """Make this process a rank: its device, its threads, its process group and its mesh.

    Args:
        kind: of device.
        store: where the ranks meet; not needed if world_size is 1, which makes no process group.
        timeout: seconds that an exchange may take, and that the ranks may take to meet.
        output_dir: made if it does not exist.
        gpu: which of the GPUs that this process sees; None takes the one that its local rank counts to.

    Raises:
        PeerLost: a rank did not come.
    """
    torch.set_num_threads(cpu_threads(local_world_size))
    if kind == "cuda":
        device = torch.device("cuda", local_rank if gpu is None else gpu)
        torch.cuda.set_device(device)
        prepare_nccl()
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    mesh = None
    if world_size > 1:
        assert store is not None
        _assemble(store, rank, world_size, timeout)
        set_deadline(timeout)
        init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout + _LATER),
            device_id=device if kind == "cuda" else None,
        )
        mesh = init_device_mesh(kind, (world_size,), mesh_dim_names=(MESH_DIM,))
        watch_of(mesh.get_group().group_name)
    output_dir.mkdir(parents=True, exist_ok=True)
    return Context(rank, world_size, local_rank, device, mesh, output_dir, Throttled(reporter))


def leave(context: Context) -> None:
    """Undo `join`, once all ranks have done their work.

    Raises:
        PeerLost, PlanMismatch: a rank failed meanwhile, or took part in other exchanges than this one.
    """
    if context.mesh is not None:
        leave_watches()
        destroy_process_group()


def _assemble(store: Store, rank: int, world_size: int, timeout: float) -> None:
    """Returns when all ranks have come to the store."""
    store.set(f"distattn/here/{rank}", "")
    end = time.monotonic() + timeout
    for peer in range(world_size):
        try:
            store.wait([f"distattn/here/{peer}"], timedelta(seconds=max(end - time.monotonic(), 0.001)))
        except RuntimeError as error:
            if time.monotonic() < end:
                raise PeerLost(f"rank {rank}: the rendezvous store is gone: {error}") from error
            missing = [p for p in range(peer, world_size) if not store.check([f"distattn/here/{p}"])]
            raise PeerLost(
                f"rank {rank}: of {world_size} ranks {missing} did not come within {timeout:g} s (launcher.timeout)"
            ) from error

"""Jobs and child processes for the tests of launching; rank processes import this module by its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from distattn.launch.processes import receive, send

if TYPE_CHECKING:
    from pathlib import Path

    from distattn.conf.schema import Config
    from distattn.jobs.context import Context


def total(config: Config, context: Context) -> dict[str, Any]:
    """Sum of rank + 1 over all ranks, with the values that a job can see in its report."""
    import torch
    import torch.distributed as dist

    x = torch.tensor([context.rank + 1.0], device=context.device)
    if context.mesh is not None:
        dist.all_reduce(x, group=context.mesh.get_group())
    for step in range(3):
        context.progress("adding", step + 1, 3, sum=x.item())
    context.log("added")
    print("printed", flush=True)
    (context.output_dir / f"rank{context.rank}").touch()
    x0 = config.job.params.get("x0", 0)  # type: ignore[attr-defined]
    return {"report": f"sum {x.item() + x0:g} of {context.world_size} in {context.output_dir}"}


def one_raises(config: Config, context: Context) -> None:
    import torch
    import torch.distributed as dist

    if context.rank == 1:
        raise ValueError("rank one is at fault")
    dist.all_reduce(torch.ones(1))  # fails because of the other, a little later


def one_is_killed(config: Config, context: Context) -> None:
    import torch
    import torch.distributed as dist

    if context.rank == 1:
        print("last words", flush=True)
        time.sleep(config.job.params.get("pause", 0))  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def is_killed_once(config: Config, context: Context) -> dict[str, Any]:
    """Rank 1 is killed in the first attempt; attempts are counted in output_dir."""
    import torch
    import torch.distributed as dist

    attempts = context.output_dir / f"attempts{context.rank}"
    with attempts.open("a") as file:
        file.write("x")
    if context.rank == 1 and attempts.stat().st_size == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.tensor([context.rank + 1.0])
    dist.all_reduce(x)
    return {"report": f"sum {x.item():g} after {attempts.stat().st_size} attempts"}


def waits_once(config: Config, context: Context) -> dict[str, Any]:
    """Waits for ever in the first attempt."""
    import torch.distributed as dist

    attempts = context.output_dir / f"attempts{context.rank}"
    with attempts.open("a") as file:
        file.write("x")
    context.log(f"pid {os.getpid()}")
    if attempts.stat().st_size == 1:
        time.sleep(1000)
    dist.barrier()
    return {"report": f"done after {attempts.stat().st_size} attempts"}


def where(config: Config, context: Context) -> dict[str, Any]:
    """What a rank sees of itself, by rank."""
    import torch
    import torch.distributed as dist

    every: list[Any] = [None] * context.world_size
    seen = {
        "local_rank": context.local_rank,
        "threads": torch.get_num_threads(),
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
        "stale": sorted({"RANK", "MASTER_ADDR"} & os.environ.keys()),
        "variable": os.environ.get("TRIAL", ""),
    }
    dist.all_gather_object(every, seen)
    for step in range(3):
        context.progress("looking", step + 1, 3, sum=3.0)
    context.log("looked")
    print("printed", flush=True)
    return {"report": repr(every)}


def one_freezes(config: Config, context: Context) -> None:
    import torch.distributed as dist

    dist.barrier()
    if context.rank == 0:
        context.log(f"pid {os.getpid()}")
        time.sleep(0.5)  # until that was heard
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1)
    raise RuntimeError("the other is frozen")


def disagrees(config: Config, context: Context) -> None:
    """Rank 1 has another spec, or another batch; each rank writes how many bytes it has given away."""
    import torch

    import distattn
    from distattn.operators import sent

    (context.output_dir / f"pid{context.rank}").write_text(str(os.getpid()))
    what = context.rank and config.job.params["what"]  # type: ignore[attr-defined]
    spec = distattn.presets.mistral(21 if what == "spec" else 20)
    plan = distattn.make_plan(spec, 64, heads=2, head_dim=32, mesh=context.mesh, block_q=16, block_k=16)
    x = torch.ones(2 if what == "batch" else 1, plan.tokens, 2, 32, device=context.device)
    try:
        distattn.attend(x, x, x, plan)
    finally:
        (context.output_dir / f"sent{context.rank}").write_text(str(sent.total))


def waits(config: Config, context: Context) -> None:
    context.log(f"pid {os.getpid()}")
    time.sleep(1000)


# Targets of `Processes`; none of them imports torch.


def chats(connection: Connection, argument: int) -> None:
    print("before", flush=True)
    send(connection, argument * 2)
    send(connection, receive(connection) + 1)
    os.write(1, b"after, without a line end")
    sys.exit(argument)


def sleeps(connection: Connection, argument: str) -> None:
    """Starts a process of its own, says both pids and waits; "stubborn" does not react to SIGTERM."""
    if argument == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    other = subprocess.Popen(["sleep", "1000"])
    send(connection, [os.getpid(), other.pid])
    time.sleep(1000)


def dies(connection: Connection, argument: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trains_and_stays_in_a_save(config: Config, context: Context) -> None:
    """job=train, but for a checkpoint at step 8 that is never completed: its files are written and it has no name."""
    from distattn import checkpoint
    from distattn.jobs import train

    complete = checkpoint._complete

    def stays(saved: checkpoint.Saved, aside: Any) -> None:
        if saved.step == 8:
            context.log("in the middle of a save")
            time.sleep(1000)
        complete(saved, aside)

    checkpoint._complete = stays
    context.log(f"pid {os.getpid()}")
    train.run(config, context)


def loses_a_peer_in_training(connection: Connection, seat: tuple[Config, int, int, str, Path]) -> None:
    """One of two ranks: the second leaves or freezes in an exchange or in a save; the first says what it gets."""
    import torch.distributed as dist

    from distattn import checkpoint, sharding
    from distattn.errors import DistattnError
    from distattn.jobs import train
    from distattn.launch.ranks import join

    config, rank, port, where, folder = seat
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    context = join(rank, 2, rank, 2, "cpu", store, 3.0 if where == "frozen" else 60.0, folder, _Nobody())

    def leave(*arguments: object, **options: object) -> Any:
        os._exit(9)

    def freeze(*arguments: object, **options: object) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)

    if rank == 1:
        match where:
            case "parameters":
                sharding._AllGather.__call__ = leave  # type: ignore[method-assign]
            case "gradients":
                sharding._ReduceScatter.__call__ = leave  # type: ignore[method-assign]
            case "frozen":
                sharding._ReduceScatter.__call__ = freeze  # type: ignore[method-assign]
            case "writing":
                checkpoint._Writer.write_data = leave  # type: ignore[method-assign]
            case "reading again":
                checkpoint._sums = leave
    try:
        train.run(config, context)
    except DistattnError as error:
        send(connection, (type(error).__name__, str(error)))
        os._exit(0)


class _Nobody:
    def progress(self, *arguments: object) -> None:
        pass

    def log(self, text: str) -> None:
        pass

"""Ranks as processes of this machine, started and watched by the command itself.

The command hosts the rendezvous store on a port that the system chose, starts the ranks, shows their
progress, and ends them all as soon as one fails. See processes.py for why none of them can outlive it.
"""

import os
import sys
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from distattn.conf.schema import Config, LocalConfig, RayConfig
from distattn.errors import ConfigError
from distattn.jobs import Job, Result
from distattn.launch.device import Device
from distattn.launch.display import Display, print_result
from distattn.launch.failures import Failure, failure_of, print_failures, run_with_restarts, tell_the_others
from distattn.launch.processes import Processes, send
from distattn.launch.watch import Seat, Watch, ending_on_signals, work

_LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
SET_BY_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def count_ranks(config: LocalConfig | RayConfig, device: Device, job: Job) -> int:
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


def launch(config: Config, device: Device, world_size: int, output_dir: Path) -> int:
    """Run the job on ranks of this machine, print its report, and return the exit code.

    Returns:
        0, or "exit_code" of what rank 0 returned; 1 if a rank failed, which was then printed to stderr, and
        another start was of no use or not allowed.

    Raises:
        KeyboardInterrupt: Ctrl-C; the ranks are gone.
        SystemExit: the command was asked to end (SIGTERM, SIGHUP); the ranks are gone.
    """
    launcher = config.launcher
    assert isinstance(launcher, LocalConfig)
    result: Result | None = None

    def attempt() -> list[Failure]:
        import torch.distributed as dist

        nonlocal result
        store, address = None, None
        if world_size > 1:  # this process hosts it on a port of the system's choice: no two commands can collide
            store = dist.TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False)
            address = _LOOPBACK, store.port
        seats = [
            Seat(config, rank, world_size, rank, world_size, device, address, output_dir) for rank in range(world_size)
        ]
        with (
            Display() as display,
            Processes(
                "distattn.launch.local:be_rank", seats, rank_environment(), stop_timeout=launcher.stop_timeout
            ) as ranks,
        ):
            watch = Watch(ranks, display, launcher.start_timeout)
            failures = watch.until_the_end()
        result = watch.result
        return failures

    with ending_on_signals():
        failures = run_with_restarts(attempt, launcher.max_restarts, world_size)
    if failures:
        print_failures(failures, world_size)
        return 1
    return print_result(result)


def rank_environment() -> dict[str, str]:
    """For rank processes: this process's environment without what an earlier torchrun may have left in it."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in SET_BY_TORCHRUN and not name.startswith("TORCHELASTIC_")
    }
    env.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)  # never a name to resolve
    return env


def be_rank(connection: Connection, seat: Seat) -> None:
    """What a rank process does; called by `Processes`."""
    try:
        work(seat, partial(send, connection))
    except BaseException as error:
        send(connection, failure_of(seat.rank, error))
        tell_the_others(error)
        sys.stdout.flush()
        # Not through the interpreter's end, which may wait for the very peers that wait for this rank.
        os._exit(1)

"""Ranks that torchrun started, on one machine or many: this process is one of them."""

import functools
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from distattn.conf.schema import Config
from distattn.errors import ConfigError
from distattn.jobs import Job
from distattn.launch.device import Device
from distattn.launch.display import Display, Shown, print_result

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def count_ranks(device: Device) -> int:
    """How many ranks torchrun started.

    Raises:
        ConfigError: this process was not started by torchrun, or there are more on this machine than GPUs.
    """
    import torch

    missing = [name for name in _NEEDED if not os.environ.get(name, "")]
    if missing:
        raise ConfigError(
            f"launcher=torchrun needs {', '.join(missing)} in the environment; start it with "
            "`torchrun --nproc-per-node=2 -m distattn.launch.run launcher=torchrun`, or use launcher=local"
        )
    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device == "cuda" and here > gpus:
        raise ConfigError(f"torchrun started {here} processes here; expected at most {gpus}, one a GPU")
    return int(os.environ["WORLD_SIZE"])


def is_first() -> bool:
    """Whether this process is rank 0, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"


def launch(config: Config, job: Job, device: Device, output_dir: Path, number: int) -> int:
    """Run the job on this rank; rank 0 prints its report.

    Args:
        output_dir: that of rank 0 is used on every rank.
        number: of this job in a sweep, 0 if it is not part of one; keeps the jobs' keys in the store apart.

    Returns:
        0, or "exit_code" of what the job returned on rank 0. A failing rank does not return: torchrun gets
        its error (TORCHELASTIC_ERROR_FILE), prints the first one of all ranks, and ends the others.
    """
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import record

    from distattn.launch.failures import cause_of, tell_the_others
    from distattn.launch.ranks import join, leave

    rank = int(os.environ["RANK"])

    @record
    def work(display: Display | None) -> Any:
        store = dist.PrefixStore(f"distattn job {number}", _rendezvous(config.launcher.timeout))
        if rank == 0:
            store.set("output_dir", str(output_dir))
        shared_dir = Path(store.get("output_dir").decode())
        context = join(
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            kind=device,
            store=store,
            timeout=config.launcher.timeout,
            output_dir=shared_dir,
            reporter=Shown(display, rank),
        )
        result = job.run(config, context)
        leave(context)
        return result

    try:
        if rank > 0:
            work(None)
            return 0
        with Display() as display:
            result = work(display)
        return print_result(result)
    except Exception as error:
        cause = cause_of(error)
        print(f"distattn: rank {rank} failed: {type(cause).__name__}: {cause}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        tell_the_others(error)
        # torchrun finds the first error by whole seconds, and ends the others as soon as this rank is gone: first they
        # have time to find out, too.
        time.sleep(3.0)
        # Not through the interpreter's end, which may wait for the very peers that wait for this rank.
        os._exit(1)


@functools.cache
def _rendezvous(timeout: float) -> Any:
    """The store where the ranks meet; once a process, since rank 0 may host it and a sweep has many jobs.

    Raises:
        ConfigError: rank 0 cannot listen at MASTER_PORT, or another rank finds nobody there for ``timeout`` seconds.
    """
    from torch.distributed import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(f"the ranks cannot meet at MASTER_ADDR:MASTER_PORT, which is {address}: {error}") from error
    return store

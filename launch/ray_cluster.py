"""Ranks as actors of a Ray cluster, or of a Ray that starts and stops with the command.

Ray places the ranks, starts them, and carries what they tell; their data goes through NCCL or gloo.
"""

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distattn.conf.schema import Config, RayConfig
from distattn.errors import ConfigError
from distattn.jobs import Job, Result
from distattn.jobs.settings import check_ranks
from distattn.launch import ray_guard
from distattn.launch.device import Device, choose_device
from distattn.launch.display import Display, print_result
from distattn.launch.failures import Failure, print_failures, run_with_restarts
from distattn.launch.local import count_ranks, rank_environment
from distattn.launch.watch import Watch, ending_on_signals

_OBJECT_STORE = 80 << 20  # bytes of shared memory; Ray wants 75 MiB at least, and we send it next to nothing
_SECONDS_TO_CONNECT = 10.0
_GUARD_TIMEOUT = 30.0  # seconds for the guard to end what is left


def launch(config: Config, job: Job, output_dir: Path) -> int:
    """Run the job on Ray's actors, print its report, and return the exit code.

    Returns:
        0, or "exit_code" of what rank 0 returned; 1 if a rank failed, which was then printed to stderr, and
        another start was of no use or not allowed.

    Raises:
        ConfigError: there is no such cluster, it has no room for the ranks, or its workers lack this package.
        KeyboardInterrupt, SystemExit: as `local.launch`; no actor is left.
    """
    launcher = config.launcher
    assert isinstance(launcher, RayConfig)
    result: Result | None = None
    with connected(launcher) as actor_environment, ending_on_signals():
        from distattn.launch.ray_group import RayRanks, bundle_of, place

        device, world_size = count_workers(launcher, job)
        check_ranks(config, world_size)
        bundle = bundle_of(device, launcher.resources_per_worker)

        def attempt() -> list[Failure]:
            nonlocal result
            group = place(bundle, world_size, launcher.place_timeout if launcher.address else 0.0)
            ranks = RayRanks(
                "distattn.launch.ray_actor:be_rank",
                config,
                device,
                output_dir,
                group,
                bundle,
                actor_environment,
                launcher.stop_timeout,
            )
            with ranks, Display() as display:
                watch = Watch(ranks, display, launcher.start_timeout)
                failures = watch.until_the_end()
            result = watch.result
            return failures

        failures = run_with_restarts(attempt, launcher.max_restarts, world_size)
    if failures:
        print_failures(failures, world_size)
        return 1
    return print_result(result)


def count_workers(launcher: RayConfig, job: Job) -> tuple[Device, int]:
    """The kind of device, and how many ranks there will be, on the cluster that this process is connected to.

    Raises:
        ConfigError: there is no such device, or it is a number that cannot be meant.
    """
    import ray

    if launcher.address is None:
        device = choose_device(launcher.device)
        return device, count_ranks(launcher, device, job)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if launcher.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"launcher.device is {launcher.device!r}; expected auto, cpu or cuda")
    cuda = launcher.device == "cuda" or (launcher.device == "auto" and gpus > 0)
    wanted = launcher.num_workers
    if wanted is not None and wanted < 1:
        raise ConfigError(f"launcher.num_workers is {wanted}; expected at least 1")
    if cuda and not gpus and wanted is None:
        raise ConfigError("launcher.device is 'cuda', but no node of the cluster has a GPU; expected num_workers too")
    return ("cuda", wanted or gpus) if cuda else ("cpu", wanted or job.cpu_ranks)


@contextmanager
def connected(launcher: RayConfig) -> Iterator[dict[str, Any]]:
    """A connection to the cluster that launcher.address names, or to an embedded one, which ends with it.

    A connection that this process already has is used as it is, and left open. Yields the runtime environment that
    actors are still to be given: none if the whole connection has it.

    Raises:
        ConfigError: there is no such cluster, or Ray refuses the runtime environment.
    """
    import ray

    if ray.is_initialized():
        yield dict(launcher.runtime_env)
        return
    with _embedded(launcher) if launcher.address is None else joined(launcher.address, launcher.runtime_env):
        yield {}


@contextmanager
def joined(address: str, runtime_env: Mapping[str, Any]) -> Iterator[None]:
    """A connection to a running cluster.

    Raises:
        ConfigError: there is none at this address, or Ray refuses the runtime environment.
    """
    import ray

    if "://" in address:
        raise ConfigError(
            f"launcher.address is {address!r}; expected auto or host:port of a cluster that this machine is "
            "part of (from elsewhere: ray job submit)"
        )
    host, _, port = address.rpartition(":")
    if host:  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), _SECONDS_TO_CONNECT).close()
        except (OSError, ValueError) as error:
            raise ConfigError(f"launcher.address is {address!r}, where no cluster answers: {error}") from error
    try:
        ray.init(
            address=address,
            runtime_env=dict(runtime_env) or None,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"launcher.address={address}: {error} (if the cluster wants a token: RAY_AUTH_MODE=token)"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _embedded(launcher: RayConfig) -> Iterator[None]:
    import ray

    token = os.urandom(8).hex()
    folder = Path(tempfile.mkdtemp(prefix="distattn-ray-"))
    if len(str(folder)) > 60:  # Ray's sockets lie in there, and their paths may have 107 bytes
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="distattn-ray-", dir="/tmp"))
    guard = ray_guard.start(token, folder)
    assert guard.stdin
    try:
        cpus = max(os.cpu_count() or 1, launcher.num_workers or 1)
        with _environment_of_ray(token):
            try:
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    num_gpus=0 if launcher.device == "cpu" else None,
                    runtime_env=dict(launcher.runtime_env) or None,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    object_store_memory=_OBJECT_STORE,
                    _temp_dir=str(folder),
                )
            except (ValueError, RuntimeError) as error:
                raise ConfigError(f"Ray does not start here: {error}") from error
        yield
    finally:
        try:
            ray.shutdown()
        finally:
            guard.stdin.close()
            guard.wait(_GUARD_TIMEOUT)


@contextmanager
def _environment_of_ray(token: str) -> Iterator[None]:
    """This process's environment while it starts Ray, whose processes and ranks inherit it."""
    stale = {name: os.environ[name] for name in os.environ.keys() - rank_environment().keys()}  # an earlier torchrun's
    path = [entry or os.getcwd() for entry in sys.path]  # job.name=module:function is found as it is here
    changed = {ray_guard.MARK: token, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(path)}
    before = {name: os.environ[name] for name in changed if name in os.environ}
    try:
        for name in stale:
            del os.environ[name]
        os.environ.update(changed)
        yield
    finally:  # what Ray itself has set stays, such as how later connections are to authenticate
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(stale | before)

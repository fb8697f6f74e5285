"""A decoder that stays: ranks in Ray actors that answer requests, from this process or from others by name."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayActorError

from distattn.conf import schema
from distattn.conf.schema import Config, RayConfig
from distattn.errors import ConfigError, ServiceDead
from distattn.generate import Sampling
from distattn.jobs import find_job
from distattn.jobs.settings import check, check_ranks
from distattn.launch.ray_cluster import connected, count_workers, joined
from distattn.launch.service_front import Front, Reading, Refusal, ServiceStatus, Writing, error_class

_NAMESPACE = "distattn"
_MORE_CALLS = 32  # that the front can hear at once beyond those that wait
_SECONDS_TO_ANSWER = 60.0  # for what the front answers at once


class AttentionService:
    """A handle of a service; use `start` or `connect`.

    Requests are answered one after the other, in the order in which they came, by all ranks together. Handles
    may be used by many threads, and many processes may have one.
    """

    def __init__(self, name: str, front: Any, stack: ExitStack) -> None:
        self.name = name
        self._front, self._stack = front, stack

    @classmethod
    def start(
        cls, config: Config | Sequence[str] = (), *, name: str = "attention", max_queue: int = 8
    ) -> "AttentionService":
        """Start the ranks, and return when they are ready.

        On a running cluster (launcher.address) the service lives until `shutdown` is called, by whomever; with an
        embedded Ray it ends with this process.

        Args:
            config: a configuration, or Hydra overrides; its launcher is ray. seq_len is the longest text.
            name: for `connect`; no two services of a cluster have the same.
            max_queue: requests that may wait, besides the one that is being answered; at least 0.

        Raises:
            ConfigError: the configuration cannot work, the name is taken, or the cluster has no room.
            PeerLost, ServiceDead: a rank failed while it started.
        """
        config = config if isinstance(config, Config) else compose(config)
        check(config)
        launcher = config.launcher
        if not isinstance(launcher, RayConfig):
            raise ConfigError(f"launcher is {launcher.name!r}; expected ray for a service")
        if max_queue < 0:
            raise ConfigError(f"max_queue is {max_queue}; expected at least 0")
        stack = ExitStack()
        try:
            environment = stack.enter_context(connected(launcher))
            device, world_size = count_workers(launcher, find_job("prefill"))
            check_ranks(config, world_size)
            front_class: Any = ray.remote(Front)
            try:
                front = front_class.options(
                    name=_full(name),
                    namespace=_NAMESPACE,
                    lifetime="detached" if launcher.address else None,
                    num_cpus=0,
                    max_concurrency=max_queue + _MORE_CALLS,
                    runtime_env=environment or None,
                ).remote(config, device, world_size, max_queue, environment)
            except ValueError as error:
                raise ConfigError(f"name is {name!r}, which a service has already; expected another") from error
            service = cls(name, front, stack)
            try:
                service._ask("wait_until_ready", None)
            except BaseException:
                ray.kill(front)
                raise
            return service
        except BaseException:
            stack.close()
            raise

    @classmethod
    def connect(cls, name: str = "attention", address: str | None = "auto") -> "AttentionService":
        """A handle of a service that some process has started.

        Args:
            address: of the cluster, host:port or auto; None for the one that this process is connected to. A Ray
                that `start` has started wants a token (Ray keeps it in ~/.ray): set RAY_AUTH_MODE=token.

        Raises:
            ConfigError: there is no such cluster, or no service of that name.
        """
        stack = ExitStack()
        try:
            if address is not None and not ray.is_initialized():
                stack.enter_context(joined(address, {}))
            try:
                front = ray.get_actor(_full(name), namespace=_NAMESPACE)
            except ValueError as error:
                raise ConfigError(f"name is {name!r}, but the cluster has no service of that name") from error
            return cls(name, front, stack)
        except BaseException:
            stack.close()
            raise

    @property
    def address(self) -> str:
        """host:port of the cluster, for `connect` in another process."""
        return str(ray.get_runtime_context().gcs_address)

    def prefill(
        self, tokens: bytes | Sequence[int] | NDArray[Any] | torch.Tensor, timeout: float | None = None
    ) -> Reading:
        """Have the decoder read a text.

        Args:
            tokens: bytes, or integers from 0 to 255 in one dimension; at least two, and one tile for each rank.
            timeout: seconds to wait for the answer; None waits as long as the service lives.

        Raises:
            ValueError: tokens are no such text, too short or too long.
            ServiceBusy: too many requests wait already; nothing was done.
            PeerLost, StepTimeout, ...: what befell a rank while the request waited or was answered.
            ServiceDead: the service has ended, or had lost a rank before.
            TimeoutError: there was no answer in time; it may still be worked on.
        """
        answer = self._ask("prefill", timeout, as_text(tokens))
        assert isinstance(answer, Reading)
        return answer

    def generate(
        self, prompts: bytes | Sequence[bytes], sampling: Sampling | None = None, timeout: float | None = None
    ) -> Writing:
        """Have the decoder go on with one prompt or several.

        Args:
            prompts: with their answers at most seq_len bytes each.
            sampling: how bytes are chosen, and when a text ends; None: `Sampling()`.
            timeout: seconds to wait for the answers; None waits as long as the service lives.

        Raises:
            ConfigError: (a ValueError) a prompt is empty or too long, or the attention is none that a cache can serve.
            ServiceBusy, ServiceDead, PeerLost, TimeoutError, ...: as `prefill`.
        """
        asked = (prompts,) if isinstance(prompts, bytes) else tuple(prompts)
        answer = self._ask("generate", timeout, asked, sampling or Sampling())
        assert isinstance(answer, Writing)
        return answer

    def status(self) -> ServiceStatus:
        """How it is; raises ServiceDead when it was shut down."""
        answer = self._ask("status", _SECONDS_TO_ANSWER)
        assert isinstance(answer, ServiceStatus)
        return answer

    def shutdown(self) -> None:
        """End the service and its ranks, and Ray if `start` started that; requests under way get ServiceDead.

        May be called again, and by any handle.
        """
        try:
            self._ask("shutdown", _SECONDS_TO_ANSWER)
        except (ServiceDead, TimeoutError):
            pass
        finally:
            if ray.is_initialized():
                ray.kill(self._front)
            self._stack.close()

    def __enter__(self) -> "AttentionService":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _ask(self, method: str, timeout: float | None, *arguments: object) -> object:
        if not ray.is_initialized():
            raise ServiceDead(f"service {self.name!r} was shut down")
        try:
            reply = ray.get(getattr(self._front, method).remote(*arguments), timeout=timeout)
        except GetTimeoutError as error:
            raise TimeoutError(f"service {self.name!r} did not answer within {timeout:g} s") from error
        except RayActorError as error:
            raise ServiceDead(f"service {self.name!r} has ended") from error
        if isinstance(reply, Refusal):
            raise error_class(reply.kind)(reply.text)
        return reply


def compose(overrides: Sequence[str]) -> Config:
    """The configuration that Hydra makes of overrides, with launcher=ray unless they say otherwise.

    Raises:
        ConfigError: Hydra refuses an override.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    schema.register()
    defaults = [
        default
        for default in ("launcher=ray", "output_dir=runs/service")
        if not any(override.startswith(f"{default.partition('=')[0]}=") for override in overrides)
    ]
    try:
        with initialize_config_module("distattn.conf", version_base="1.3"):
            config = OmegaConf.to_object(compose("config", [*defaults, *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"overrides are {list(overrides)}: {error}") from error
    assert isinstance(config, Config)
    return config


def as_text(tokens: bytes | Sequence[int] | NDArray[Any] | torch.Tensor) -> NDArray[np.uint8]:
    """Tokens as uint8 [tokens].

    Raises:
        ValueError: they have more than one dimension, are not integers, or one is not from 0 to 255.
    """
    if isinstance(tokens, bytes | bytearray):
        return np.frombuffer(tokens, np.uint8)
    found = tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        shape = tuple(found.shape)
        raise ValueError(
            f"tokens has the shape {shape} and the dtype {found.dtype}; expected one dimension of integers"
        )
    if found.size and not 0 <= found.min() <= found.max() <= 255:
        raise ValueError(f"tokens has values from {found.min()} to {found.max()}; expected bytes, 0 to 255")
    return found.astype(np.uint8)


def _full(name: str) -> str:
    return f"service {name}"

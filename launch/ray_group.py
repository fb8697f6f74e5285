"""A group of Ray actors that are ranks: where they are placed, how they are numbered, heard, and ended."""

import math
import os
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayError, RuntimeEnvSetupError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from distattn.conf.schema import Config
from distattn.errors import ConfigError
from distattn.launch.device import Device
from distattn.launch.processes import Exit, Line
from distattn.launch.ray_actor import OF_RAY, Place, RankActor, end_processes
from distattn.launch.watch import Event, Lost, Seat

_TAIL = 20  # lines of each rank's output that are kept
_SECONDS_TO_ANSWER = 60.0  # for what an actor answers at once
_NOT_IMPORTABLE = ("failed to import", "No module named")

Bundle = dict[str, float]
"""What one rank needs: amounts of Ray's resources by name."""


class Numbered(NamedTuple):
    """A rank's numbers, and which actor it is."""

    actor: int
    local_rank: int
    local_world_size: int


def number_ranks(places: Sequence[Place], first_node: str) -> list[Numbered]:
    """Which actor becomes which rank: node by node, so that neighbours share what is fast inside a node.

    Args:
        places: by actor.
        first_node: the node that comes first if there are actors on it: the launcher's own, where its folders are.

    Returns:
        by rank; on a node in the order of its GPUs.
    """

    def key(actor: int) -> tuple[object, ...]:
        place = places[actor]
        return place.node != first_node, place.ip, place.node, place.gpu, actor

    on_node = Counter(place.node for place in places)
    used: Counter[str] = Counter()
    ranks = []
    for actor in sorted(range(len(places)), key=key):
        node = places[actor].node
        ranks.append(Numbered(actor, used[node], on_node[node]))
        used[node] += 1
    return ranks


def bundle_of(device: Device, more: Mapping[str, float]) -> Bundle:
    """What one rank needs.

    Args:
        more: resources_per_worker; CPU there is instead of the one core that a rank has otherwise.

    Raises:
        ConfigError: an amount cannot be meant, or GPUs are asked for, of which each rank has one on device=cuda.
    """
    if "GPU" in more:
        raise ConfigError(
            "launcher.resources_per_worker has GPU; expected launcher.device, cuda for one GPU a worker, or cpu"
        )
    for name, amount in more.items():
        if not isinstance(amount, int | float) or not 0 < amount < math.inf:
            raise ConfigError(f"launcher.resources_per_worker.{name} is {amount!r}; expected a number above 0")
    return {"CPU": 1, **({"GPU": 1} if device == "cuda" else {}), **more}


def room(nodes: Sequence[Mapping[str, float]], bundle: Bundle) -> list[int]:
    """How many bundles fit into each node, given the resources that it has."""
    return [int(min(node.get(name, 0) / amount for name, amount in bundle.items())) for node in nodes]


def place(bundle: Bundle, count: int, timeout: float) -> PlacementGroup:
    """Reserve room for `count` ranks in the cluster: on one node if one is large enough, else on as few as possible.

    Args:
        timeout: seconds to wait for room; 0 if the cluster cannot grow and nothing else uses it.

    Raises:
        ConfigError: there is no room; the message has what was asked for and what the cluster has.
    """
    fits = room(_nodes(), bundle)
    asked = f"launcher=ray asks for {count} workers with {_text(bundle)} each"
    if sum(fits) < count and timeout <= 0:
        raise ConfigError(f"{asked}, but {_has(fits)}")
    strategy = "STRICT_PACK" if max(fits, default=0) >= count else "PACK"
    group: PlacementGroup = placement_group([dict(bundle)] * count, strategy=strategy)
    timeout = timeout or _SECONDS_TO_ANSWER
    try:
        if group.wait(timeout):
            return group
        fits = room(_nodes(), bundle)
        missing = (
            _has(fits) if sum(fits) < count else f"others use the cluster; free: {_text(ray.available_resources())}"
        )
        raise ConfigError(f"{asked}, but there was no room within {timeout:g} s: {missing}")
    except BaseException:
        remove_placement_group(group)
        raise


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _has(fits: list[int]) -> str:
    nodes = [f"{_text(node)} (room for {n})" for node, n in zip(_nodes(), fits, strict=False)]
    return f"the cluster has {len(nodes)} node{'s' * (len(nodes) != 1)}: {'; '.join(nodes)}"


def _text(resources: Mapping[str, float]) -> str:
    """Resources for a person: processors first, without those that only name nodes."""

    def amount(name: str, value: float) -> str:
        return f"{value / 2**30:.1f} GiB {name}" if name in ("memory", "object_store_memory") else f"{value:g} {name}"

    hidden = ("node:", "accelerator_type:", "object_store_memory")
    shown = [name for name in resources if not name.startswith(hidden)]
    shown.sort(key=lambda name: (name not in ("CPU", "GPU"), name))  # Ray keeps no order
    return ", ".join(amount(name, resources[name]) for name in shown) or "nothing"


class RayRanks:
    """Ranks in actors, to be followed as `watch.Ranks`; use it as a context manager, which ends the actors.

    The actors are numbered when all have said where they are; until then an event's rank is the actor's number.

    Args:
        target: see `RankActor.begin`.
        config, device, output_dir: for the seats.
        group: from `place`, one bundle a rank; it is removed in the end.
        bundle: that which the group was made of.
        runtime_env: Ray's, for the actors alone.
        stop_timeout: seconds that an actor may take to end before its process is killed.
    """

    def __init__(
        self,
        target: str,
        config: Config,
        device: Device,
        output_dir: Path,
        group: PlacementGroup,
        bundle: Bundle,
        runtime_env: Mapping[str, Any],
        stop_timeout: float,
    ) -> None:
        self._target, self._config, self._device, self._output_dir = target, config, device, output_dir
        self._group, self._stop_timeout = group, stop_timeout
        self._tails: list[deque[str]] = [deque(maxlen=_TAIL) for _ in range(group.bundle_count)]
        self._listening: dict[Any, int] = {}
        self._places: dict[int, Place] = {}
        self._ended: set[int] = set()
        self._lost: set[int] = set()
        resources = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU", "memory")}
        actor_class: Any = ray.remote(RankActor)
        self._actors: list[Any] = [
            actor_class.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                memory=bundle.get("memory"),
                resources=resources,
                max_concurrency=4,
                runtime_env=dict(runtime_env) or None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            ).remote()
            for index in range(group.bundle_count)
        ]
        self._starting = {actor.place.remote(): index for index, actor in enumerate(self._actors)}

    def __enter__(self) -> "RayRanks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __len__(self) -> int:
        return len(self._actors)

    def poll(self, timeout: float) -> list[tuple[int, Event]]:
        """See `watch.Ranks.poll`.

        Raises:
            ConfigError: the workers cannot import this package, or the runtime environment cannot be made.
        """
        waiting = self._starting or self._listening
        if not waiting:
            time.sleep(timeout)
            return []
        refs = list(waiting)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout)
        more, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        found: list[tuple[int, Event]] = []
        for ref in dict.fromkeys([*ready, *more]):
            number = waiting.pop(ref)
            try:
                answer = ray.get(ref)
            except RayError as error:
                if waiting is self._starting:
                    _raise_if_not_importable(error)
                    self._starting = {}  # there will not be all of them
                self._lost.add(number)
                found.append((number, _lost(error)))
                continue
            if isinstance(answer, Place):
                self._places[number] = answer
                if len(self._places) == len(self):
                    found += self._begin()
                continue
            for event in answer:
                if isinstance(event, Line):
                    self._tails[number].append(event.text)
                found.append((number, event))
            if any(isinstance(event, Exit) for event in answer):
                self._ended.add(number)
            else:
                self._listen(number)
        return found

    def tail(self, number: int) -> list[str]:
        """The last lines that a rank printed.

        Of a rank that was lost, what Ray's log file has, if that is on this machine: it has not told everything. What
        it printed in its last moment may be in neither.
        """
        place = self._places.get(number)
        if number in self._lost and place and os.path.isfile(place.log):
            with open(place.log, errors="replace") as file:
                lines = file.read().splitlines()
            return [line for line in lines if line and not line.startswith(OF_RAY)][-_TAIL:]
        return list(self._tails[number])

    def send(self, number: int, value: object) -> None:
        """Give a rank a value; `poll` tells if it is gone."""
        self._actors[number].send.remote(value)

    def stop(self) -> None:
        """End all actors; returns when they are gone, or their processes were killed."""
        actors, self._actors = self._actors, []
        if not ray.is_initialized():
            return
        for actor in actors:
            ray.kill(actor)
        by_node: dict[str, list[int]] = {}
        for number, found in self._places.items():
            if number not in self._ended:  # it may be frozen, and would not hear Ray
                by_node.setdefault(found.node, []).append(found.pid)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        task: Any = ray.remote(end_processes)
        ends = [
            task.options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(pids, self._stop_timeout)
            for node, pids in by_node.items()
            if node in alive
        ]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=self._stop_timeout + _SECONDS_TO_ANSWER)
        remove_placement_group(self._group)

    def _begin(self) -> list[tuple[int, Event]]:
        """Number the actors, and let them work."""
        places = [self._places[actor] for actor in range(len(self))]
        ranks = number_ranks(places, ray.get_runtime_context().get_node_id())
        self._actors = [self._actors[rank.actor] for rank in ranks]
        places = [places[rank.actor] for rank in ranks]
        self._places = dict(enumerate(places))
        one_machine = len({place.ip for place in places}) == 1
        address: tuple[str, int] | None = None
        if len(ranks) > 1:
            try:
                port = ray.get(self._actors[0].host_store.remote(), timeout=_SECONDS_TO_ANSWER)
            except (RayError, GetTimeoutError) as error:
                return [(0, _lost(error))]
            address = ("127.0.0.1" if one_machine else places[0].ip), port
        for number, rank in enumerate(ranks):
            seat = Seat(
                self._config,
                number,
                len(ranks),
                rank.local_rank,
                rank.local_world_size,
                self._device,
                address,
                self._output_dir,
            )
            self._actors[number].begin.remote(self._target, seat, one_machine, places[number].ip)
            self._listen(number)
        return []

    def _listen(self, number: int) -> None:
        self._listening[self._actors[number].events.remote()] = number


def _lost(error: Exception) -> Lost:
    lines = str(error).splitlines() or [type(error).__name__]
    why = next((line for line in lines if line.startswith("The actor is dead because")), lines[0])
    return Lost(f"was lost by Ray: {why.split('. ')[0].rstrip('.')}", str(error))


def _raise_if_not_importable(error: RayError) -> None:
    if isinstance(error, RuntimeEnvSetupError):
        raise ConfigError(f"Ray cannot make launcher.runtime_env: {error}") from error
    if any(sign in str(error) for sign in _NOT_IMPORTABLE):
        raise ConfigError(
            "Ray's workers cannot run distattn; expected it to be installed on every node, or in the working "
            f"directory (ray job submit --working-dir, or launcher.runtime_env.working_dir): {error}"
        ) from error

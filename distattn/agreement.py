"""How ranks compare what they are about to do, before anything is sent."""

from __future__ import annotations

import functools
import importlib.metadata
import time
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from distattn import __version__
from distattn.errors import PeerLost, PlanMismatch
from distattn.watch import Watch, watch_of


class Agreement:
    """Lets ranks compare what they are about to do before the first exchange, through the rendezvous store.

    A collective could itself mismatch; the store cannot. Each rank posts a line for its n-th agreement in a group, with
    how many exchanges it has begun and its versions, and reads everybody's. One that cannot go on posts why, and all
    raise.
    """

    def __init__(self) -> None:
        self._calls: WeakKeyDictionary[Watch, int] = WeakKeyDictionary()
        self._agreed: WeakKeyDictionary[Watch, set[str]] = WeakKeyDictionary()

    def seek(self, group_name: str, what: str) -> None:
        """Returns when all ranks of the group have said the same.

        Args:
            what: equal on ranks that agree. A text that was agreed on before is not asked again.

        Raises:
            PlanMismatch: a rank said something else, or refused, or is in an exchange.
            PeerLost: a rank said nothing within the deadline, and is not heard of.
            StepTimeout: a rank said nothing within the deadline, but runs.
        """
        watch = watch_of(group_name)
        agreed = self._agreed.setdefault(watch, set())
        if what in agreed:
            return
        line = f"{what}, after {watch.calls} exchanges, with {_versions()}"
        store, call = self._post(watch, f"+ {line}")
        end = time.monotonic() + watch.deadline
        name = f"agreement {call} on {what}"
        with watch.waiting_for(name):
            for peer in range(watch.world_size):
                key = f"distattn/{call}/{peer}"
                try:
                    store.wait([key], timedelta(seconds=max(end - time.monotonic(), 0.001)))
                    said = store.get(key).decode()
                except RuntimeError as error:
                    late = time.monotonic() >= end
                    raise watch.explain(name, None if late else error, silent=PeerLost) from error
                if said.startswith("-"):
                    raise PlanMismatch(f"rank {peer} cannot go on: {said[2:]}")
                if said != f"+ {line}":
                    raise PlanMismatch(f"rank {watch.rank} is about to run {line}; rank {peer}: {said[2:]}")
        agreed.add(what)

    def refuse(self, group_name: str, why: str) -> None:
        """Tells the others that this rank is about to raise."""
        watch = watch_of(group_name)
        self._post(watch, f"- {why}")
        watch.refuse(PlanMismatch, why)  # those who have agreed before do not ask again, and wait in an exchange

    def _post(self, watch: Watch, line: str) -> tuple[dist.Store, int]:
        store = dist.distributed_c10d._get_process_group_store(watch.group)
        call = self._calls[watch] = self._calls.get(watch, 0) + 1
        store.set(f"distattn/{call}/{watch.rank}", line)
        return store, call


@functools.cache
def _versions() -> str:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return f"distattn {__version__}, torch {torch.__version__}, triton {triton}"

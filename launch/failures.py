"""How ranks fail: which failure was the cause, what a person is told, and whether to start the job again."""

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from distattn.errors import DistattnError

DID_NOT_START = "DidNotStart"
"""The kind of a failure: the rank was not ready in time."""

ACTOR_LOST = "ActorLost"
"""The kind of a failure: Ray lost the actor, or the machine that it was on."""

ABORTED = "Aborted"
"""The kind of a failure: the rank ended itself by SIGABRT, as libraries do when a peer is gone."""

# What a restart can cure, as the names of exceptions: what befell a rank from outside. Anything else that a rank
# raises it would raise again.
_CURABLE = frozenset(
    {
        *(DID_NOT_START, ACTOR_LOST, "PeerLost", "StepTimeout"),
        *("ConnectionError", "ConnectionResetError", "BrokenPipeError", "MemoryError"),
        *("DistNetworkError", "DistStoreError", "DistBackendError"),  # torch.distributed's
    }
)
# gloo raises a plain RuntimeError when a peer is gone, with the place in its source.
_GLOO = "gloo/transport"


@dataclass(frozen=True)
class Failure:
    """How a rank failed.

    Attributes:
        rank: which.
        summary: one line.
        detail: a traceback or the last lines of output.
        when: time.time() of the rank when it raised, of the launcher when it saw the rank gone.
        killed: ended by a signal that is no consequence of what other ranks do.
        kind: name of the exception's class, DID_NOT_START, ACTOR_LOST, ABORTED, or "" if the process just ended.
    """

    rank: int
    summary: str
    detail: str
    when: float
    killed: bool = False
    kind: str = ""


class Decision(Enum):
    """What to do about failures."""

    RETRY = auto()
    """Start all ranks again."""
    RAISE = auto()
    """Tell, and end."""


def failure_of(rank: int, error: BaseException) -> Failure:
    """The failure of a rank that raised, just now."""
    when, error = time.time(), cause_of(error)
    summary = traceback.format_exception_only(error)[-1].strip()
    detail = "".join(traceback.format_exception(error, limit=-6))
    return Failure(rank, f"failed: {summary}", detail.rstrip(), when, kind=type(error).__name__)


def cause_of(error: BaseException) -> BaseException:
    """What a rank really failed with: once an exchange on a GPU was aborted, it computes with rows that never came."""
    if isinstance(error, DistattnError) or not isinstance(error, Exception) or "distattn.watch" not in sys.modules:
        return error
    from distattn.watch import aborted

    verdict = aborted()
    if verdict is None:
        return error
    verdict.__cause__ = error
    return verdict


def tell_the_others(error: BaseException) -> None:
    """Says to the other ranks why this one ends, if it has met them."""
    if "distattn.watch" in sys.modules:
        from distattn.watch import fail

        fail(error)


def order(failures: Sequence[Failure]) -> list[Failure]:
    """The likely cause of the others first: a rank that was killed, else the one that failed first."""
    return sorted(failures, key=lambda failure: (not failure.killed, failure.when))


def decide(failures: Sequence[Failure], restarts: int, max_restarts: int) -> Decision:
    """What to do after an attempt that failed.

    A rank that was killed decides for all. Else every failure must be one that a restart can cure: those that
    lost a peer say nothing of why it was lost, and clocks of different machines do not tell who was first. A rank
    that aborted says nothing beside others, and by itself that something is broken.

    Args:
        failures: of one attempt, in any order.
        restarts: how many there were before.
        max_restarts: how many there may be.

    Raises:
        ValueError: failures is empty, or a number is negative.
    """
    if not failures or restarts < 0 or max_restarts < 0:
        raise ValueError(
            f"there are {len(failures)} failures, restarts is {restarts} and max_restarts {max_restarts}; "
            "expected at least one failure, and no negative number"
        )
    if restarts >= max_restarts:
        return Decision.RAISE
    if any(failure.killed for failure in failures):
        return Decision.RETRY
    told = [failure for failure in failures if failure.kind != ABORTED]
    return Decision.RETRY if told and all(_is_curable(failure) for failure in told) else Decision.RAISE


def _is_curable(failure: Failure) -> bool:
    return failure.kind in _CURABLE or (failure.kind == "RuntimeError" and _GLOO in failure.summary)


def run_with_restarts(attempt: Callable[[], list[Failure]], max_restarts: int, world_size: int) -> list[Failure]:
    """Attempt it, and again as long as `decide` says so; a line on stderr tells of each restart.

    Args:
        attempt: runs all ranks once; returns what failed, the cause first.

    Returns:
        the failures of the last attempt; empty if it succeeded.
    """
    restarts = 0
    while failures := attempt():
        if decide(failures, restarts, max_restarts) is Decision.RAISE:
            break
        restarts += 1
        what = f"rank {failures[0].rank} of {world_size} {failures[0].summary}"
        print(f"distattn: {what}; restart {restarts} of {max_restarts}", file=sys.stderr, flush=True)
    return failures


def print_failures(failures: Sequence[Failure], world_size: int) -> None:
    """Print them to stderr, the first with its detail, and which ranks were stopped because of them."""
    first, *others = failures
    lines = [f"distattn: rank {first.rank} of {world_size} {first.summary}"]
    lines += [f"    {line}" for line in first.detail.splitlines()]
    lines += [f"distattn: rank {other.rank} {other.summary}" for other in others]
    stopped = sorted(set(range(world_size)) - {failure.rank for failure in failures})
    lines += [f"distattn: rank {rank} was stopped" for rank in stopped]
    print("\n".join(lines), file=sys.stderr, flush=True)

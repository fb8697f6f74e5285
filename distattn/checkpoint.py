"""Checkpoints that are whole or not there, on any number of ranks.

A checkpoint is a folder `step-00000050` with the files of `torch.distributed.checkpoint` and a manifest, which has the
size and the checksum of each. It is written aside as `step-00000050.tmp`, flushed, and renamed once every rank has
said that its part is written; so a folder without `.tmp` is complete, unless the disk or somebody changed it later,
which the manifest tells. The folder of checkpoints must be the same one for all ranks.

Tensors that are alike on all ranks are written once, in shares; those that are sharded (`DTensor`) by their owners.
Both can be read by another number of ranks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from distattn import __version__
from distattn.errors import CheckpointError, DistattnError, PeerLost

T = TypeVar("T")
State = dict[str, Any]
"""Tensors by name, in dictionaries of any depth."""

MANIFEST = "manifest.json"
VERSIONS = {"distattn": __version__, "torch": str(torch.__version__)}
"""Of what runs here."""

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".tmp"
_PIECE = 1 << 24  # bytes that are read at a time


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are what its manifest says.

    Attributes:
        path: its folder.
        step: after which it was saved.
        world_size: ranks that saved it.
        settings: what the run said of itself; of JSON types.
        digest: 32 hex digits, equal where the settings are equal.
        versions: of distattn and torch, by name.
        files: name -> (bytes, CRC-32).
    """

    path: Path
    step: int
    world_size: int
    settings: dict[str, Any]
    digest: str
    versions: dict[str, str]
    files: dict[str, tuple[int, int]]


def save(
    folder: Path,
    step: int,
    state: State,
    *,
    group: dist.ProcessGroup | None,
    settings: Mapping[str, Any],
    previous: Path | None,
) -> Path:
    """Write a checkpoint; called by all ranks of the group, and complete on the disk when it returns.

    Args:
        folder: of checkpoints; made if it does not exist.
        step: names the checkpoint. One of that name is replaced.
        state: what to save. Names, shapes and dtypes are alike on all ranks; so are the values, but for DTensors.
        group: None: this process alone.
        settings: for the manifest; of JSON types.
        previous: the checkpoint that is kept beside this one. All others in the folder are removed at the end.

    Raises:
        CheckpointError: some rank could not write its part, such as on a full disk. The same on every rank; what had
            been written of it is gone and the checkpoints before it are untouched.
        PeerLost: a rank ended or did not answer.
    """
    path = folder / f"step-{step:08d}"
    aside = folder / f"{path.name}{_ASIDE}"
    doing = f"checkpoint {path} cannot be written"
    rank, world_size = _place(group)
    try:
        _together(group, doing, lambda: _make_room(aside) if rank == 0 else None)
        _with_dcp(doing, lambda: dcp.save(state, storage_writer=_Writer(aside), **_among(group)))
        seen = _together(group, doing, lambda: sorted(os.listdir(aside)))
        for other, theirs in enumerate(seen):
            if lost := {*theirs} - {*seen[0]}:
                raise CheckpointError(
                    f"{doing}: rank {other} wrote {min(lost)}, which rank 0 does not see; expected a folder that all "
                    "ranks share"
                )
        # Each rank reads a share of the files again, whoever wrote them.
        shares = _together(group, doing, lambda: _sums(aside, seen[0][rank::world_size]))
        files = {name: one for share in shares for name, one in sorted(share.items())}
        plain = json.loads(json.dumps(dict(settings)))
        saved = Saved(path, step, world_size, plain, digest(plain), VERSIONS, files)
        _together(group, doing, lambda: _complete(saved, aside) if rank == 0 else None)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if rank == 0:
        _remove_others(folder, {path.name, previous.name if previous else ""})
    return path


def load(saved: Saved, state: State, *, group: dist.ProcessGroup | None) -> None:
    """Read a checkpoint into the tensors of `state`, in place; called by all ranks of the group, of any number.

    Unpickles the checkpoint's index: read only what you would also run.

    Raises:
        CheckpointError: a tensor is not in there or has another shape, or a file cannot be read; on every rank.
        PeerLost: a rank ended or did not answer.
    """
    doing = f"checkpoint {saved.path} cannot be read"
    reader = dcp.FileSystemReader(saved.path)
    _with_dcp(doing, lambda: dcp.load(state, storage_reader=reader, **_among(group)))


def latest(folder: Path, log: Callable[[str], None]) -> Saved | None:
    """The newest checkpoint of a folder that is what its manifest says; None if there is none.

    Of each one that is passed over `log` gets a sentence that says what is wrong with it. For one rank: see `on_first`.
    """
    if not folder.is_dir():
        return None
    for name in sorted(os.listdir(folder)):
        if name.endswith(_ASIDE) and _NAME.fullmatch(name.removesuffix(_ASIDE)):
            log(f"checkpoint {folder / name} is passed over: it was never completed")
    for step, path in sorted(_checkpoints(folder), reverse=True):
        try:
            saved = inspect(path)
            if saved.step != step:
                raise CheckpointError(f"checkpoint {path} is damaged: its manifest is of step {saved.step}")
        except CheckpointError as error:
            log(f"{error}; it is passed over")
        else:
            return saved
    return None


def inspect(path: Path) -> Saved:
    """What is in a checkpoint, all of whose bytes are read and compared with its manifest.

    Raises:
        CheckpointError: it is not there, a file is missing, truncated or changed, or its manifest cannot be understood.
    """
    damaged = f"checkpoint {path} is damaged"
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist; expected a folder such as step-00000050")
    try:
        said = json.loads((path / MANIFEST).read_text())
        if said["manifest_digest"] != digest({key: said[key] for key in said if key != "manifest_digest"}):
            raise CheckpointError(f"{damaged}: {MANIFEST} has been changed")
        if said["format"] != _FORMAT:
            raise CheckpointError(f"checkpoint {path} has the format {said['format']!r}; expected {_FORMAT}")
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in said["files"].items()}
        saved = Saved(path, said["step"], said["world_size"], said["settings"], said["digest"], said["versions"], files)
    except FileNotFoundError:
        raise CheckpointError(f"{damaged}: it has no {MANIFEST}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{damaged}: {MANIFEST} cannot be understood ({type(error).__name__}: {error})") from None
    for name, (size, crc) in files.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                raise CheckpointError(f"{damaged}: {name} has {found:,} bytes; expected {size:,}")
            if _crc32(path / name) != crc:
                raise CheckpointError(f"{damaged}: {name} has another checksum than when it was written")
        except FileNotFoundError:
            raise CheckpointError(f"{damaged}: {name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{damaged}: {name} cannot be read: {error}") from None
    return saved


def digest(settings: Mapping[str, Any]) -> str:
    """32 hex digits of values of JSON types, whatever the order of their keys."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def on_first(group: dist.ProcessGroup | None, work: Callable[[], T]) -> T:
    """What `work` returns on the first rank of the group, on every rank.

    Raises:
        DistattnError, OSError: what it raised there, on every rank.
        PeerLost: a rank ended or did not answer.
    """
    rank, _ = _place(group)
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            outcome = [(work(), None)]
        except (DistattnError, OSError) as error:
            outcome = [(None, error)]
    if group is not None:
        try:
            dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
        except RuntimeError as error:
            raise PeerLost(f"rank {rank}: the first rank was lost: {error}") from error
    value, failed = outcome[0]
    if failed is not None:
        raise failed
    return value  # type: ignore[no-any-return]


def gather(group: dist.ProcessGroup | None, mine: T) -> list[T]:
    """The value of each rank of the group, by rank, on every rank. Values travel by pickle.

    Raises:
        PeerLost: a rank ended or did not answer.
    """
    if group is None:
        return [mine]
    every: list[Any] = [None] * group.size()
    try:
        dist.all_gather_object(every, mine, group=group)
    except RuntimeError as error:
        raise PeerLost(f"rank {group.rank()}: a peer was lost: {error}") from error
    return every


def _together(group: dist.ProcessGroup | None, doing: str, work: Callable[[], T]) -> list[T]:
    """Does the work on every rank, and returns what each returned, by rank; if it fails on one, all raise."""
    value: Any = None
    failed: str | None = None
    try:
        value = work()
    except Exception as error:  # whatever it is: the others wait to hear of it
        failed = _reason(error)
    outcomes = gather(group, (failed, value))
    _raise_first(doing, {rank: why for rank, (why, _) in enumerate(outcomes) if why is not None})
    return [result for _, result in outcomes]


def _with_dcp(doing: str, work: Callable[[], object]) -> None:
    """Runs what torch.distributed.checkpoint does on all ranks; it lets all of them know which failed."""
    try:
        with warnings.catch_warnings():  # that one process works alone, which is what no_dist asks for
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            work()
    except CheckpointException as error:
        _raise_first(doing, {rank: _reason(cause) for rank, (cause, _) in error.failures.items()})
        raise CheckpointError(f"{doing}: {error}") from error
    except RuntimeError as error:
        raise PeerLost(f"{doing}: a peer was lost: {error}") from error


class _Writer(dcp.FileSystemWriter):
    """Says why a file could not be written: torch raises something else on top, and what lies below is not pickled."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        return self._say_why(lambda: super(_Writer, self).write_data(plan, planner))

    def finish(self, metadata: Any, results: Any) -> None:
        self._say_why(lambda: super(_Writer, self).finish(metadata, results))

    def _say_why(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:
            raise CheckpointError(_reason(error)) from error


def _raise_first(doing: str, failures: dict[int, str]) -> None:
    if failures:
        rank = min(failures)
        others = f" (and {len(failures) - 1} other ranks failed)" if len(failures) > 1 else ""
        raise CheckpointError(f"{doing}: rank {rank}: {failures[rank]}{others}")


def _reason(error: BaseException) -> str:
    """One line; of a failed write the system's own reason, whatever torch wrapped around it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{'the disk is full: ' if cause.errno in (errno.ENOSPC, errno.EDQUOT) else ''}{cause}"


def _make_room(aside: Path) -> None:
    aside.parent.mkdir(parents=True, exist_ok=True)
    if aside.exists():  # of a run that was killed while it wrote
        shutil.rmtree(aside)
    aside.mkdir()


def _complete(saved: Saved, aside: Path) -> None:
    """The manifest, last of all files; then the name that tells that all is there."""
    said = asdict(saved) | {"format": _FORMAT}
    del said["path"]
    said = json.loads(json.dumps(said))
    with open(aside / MANIFEST, "x") as file:
        json.dump(said | {"manifest_digest": digest(said)}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(aside)
    if saved.path.exists():  # one that was refused, or that the run went back behind
        shutil.rmtree(saved.path)
    os.rename(aside, saved.path)
    _flush_folder(saved.path.parent)


def _remove_others(folder: Path, keep: set[str]) -> None:
    """What cannot be removed now is tried again after the next checkpoint."""
    for name in os.listdir(folder):
        if name not in keep and _NAME.fullmatch(name.removesuffix(_ASIDE)):
            shutil.rmtree(folder / name, ignore_errors=True)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return [(int(match[1]), path) for match, path in matches if match]


def _sums(folder: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    return {name: ((folder / name).stat().st_size, _crc32(folder / name)) for name in names}


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


def _among(group: dist.ProcessGroup | None) -> dict[str, Any]:
    return {"no_dist": True} if group is None else {"process_group": group}

"""Checkpoints: whole or not there, whatever happens while they are written and whatever becomes of them later."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from rank_pool import RankError, RankPool
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from distattn import checkpoint
from distattn.checkpoint import Saved
from distattn.errors import CheckpointError
from distattn.jobs.context import Context

SETTINGS = {"seed": 3, "sizes": (2, 4), "rate": 0.1}


def state_of(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((300, 20), value), "b": torch.arange(7.0) * value},
        "more": {"n": torch.tensor(5)},
    }


def save(folder: Path, step: int, previous: Path | None = None) -> Path:
    return checkpoint.save(folder, step, state_of(step), group=None, settings=SETTINGS, previous=previous)


def latest(folder: Path) -> tuple[Saved | None, list[str]]:
    said: list[str] = []
    return checkpoint.latest(folder, said.append), said


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path / "checkpoints"
    save(folder, 2, previous=save(folder, 1))
    return folder


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert latest(folder) == (None, [])
    path = save(folder, 50)
    assert path == folder / "step-00000050"
    saved, said = latest(folder)
    assert saved is not None and not said and saved == checkpoint.inspect(path)
    assert (saved.path, saved.step, saved.world_size) == (path, 50, 1)
    assert saved.settings == {"seed": 3, "sizes": [2, 4], "rate": 0.1}
    assert saved.digest == checkpoint.digest(SETTINGS) != checkpoint.digest({**SETTINGS, "seed": 4})
    assert saved.versions["torch"] == torch.__version__
    assert {*saved.files, checkpoint.MANIFEST} == {*names(path)}
    state = state_of(0)
    checkpoint.load(saved, state, group=None)
    assert torch.equal(state["model"]["w"], state_of(50)["model"]["w"])
    assert torch.equal(state["model"]["b"], state_of(50)["model"]["b"])
    state["model"]["w"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match="step-00000050 cannot be read: rank 0: ValueError: Size mismatch"):
        checkpoint.load(saved, state, group=None)
    with pytest.raises(CheckpointError, match="cannot be read: rank 0: .*unknown"):
        checkpoint.load(saved, {"unknown": torch.zeros(1)}, group=None)


def test_the_previous_one_is_kept_and_no_other(tmp_path: Path) -> None:
    paths: list[Path | None] = [None]
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "step-00000007.tmp").mkdir()
    for step in (1, 2, 3):
        paths.append(save(tmp_path, step, paths[-1]))
    assert names(tmp_path) == ["notes.txt", "step-00000002", "step-00000003"]
    # From step 2 again: the new step 3 takes the place of the old one.
    (tmp_path / "step-00000003" / "mark").touch()
    save(tmp_path, 3, paths[2])
    assert names(tmp_path) == ["notes.txt", "step-00000002", "step-00000003"]
    assert not (tmp_path / "step-00000003" / "mark").exists()
    # One that was refused does not count as the previous one.
    save(tmp_path, 5, paths[2])
    assert names(tmp_path) == ["notes.txt", "step-00000002", "step-00000005"]


def truncate(path: Path) -> None:
    with open(path / "__0_0.distcp", "r+b") as file:
        file.truncate(100)


def flip(path: Path, name: str = "__0_0.distcp") -> None:
    with open(path / name, "r+b") as file:
        file.seek((path / name).stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def edit_manifest(path: Path, **changes: object) -> None:
    said = json.loads((path / checkpoint.MANIFEST).read_text()) | changes
    del said["manifest_digest"]
    (path / checkpoint.MANIFEST).write_text(json.dumps(said | {"manifest_digest": checkpoint.digest(said)}))


DAMAGE = {
    "truncated": (truncate, "__0_0.distcp has 100 bytes; expected "),
    "flipped bit": (flip, "__0_0.distcp has another checksum"),
    "flipped bit in the index": (lambda path: flip(path, ".metadata"), ".metadata has another checksum"),
    "missing file": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "empty manifest": (lambda path: os.truncate(path / "manifest.json", 0), "manifest.json cannot be understood"),
    "another step": (
        lambda path: (path / "manifest.json").write_text(
            (path / "manifest.json").read_text().replace('"step": 2', '"step": 3')
        ),
        "manifest.json has been changed",
    ),
    "a later format": (lambda path: edit_manifest(path, format=2), "has the format 2; expected 1"),
    "no files listed": (lambda path: edit_manifest(path, files=7), "manifest.json cannot be understood"),
    "renamed": (lambda path: edit_manifest(path, step=9), "its manifest is of step 9"),
    "not even a folder's content": (lambda path: shutil.rmtree(path) or path.mkdir(), "it has no manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_refused_and_the_previous_one_is_used(two: Path, damage: str) -> None:
    harm, reason = DAMAGE[damage]
    harm(two / "step-00000002")  # type: ignore[operator]
    saved, said = latest(two)
    assert saved is not None and saved.step == 1
    assert len(said) == 1 and "step-00000002" in said[0] and reason in said[0] and said[0].endswith("passed over")


def test_one_that_was_never_completed_is_named(two: Path) -> None:
    os.rename(two / "step-00000002", two / "step-00000002.tmp")
    saved, said = latest(two)
    assert saved is not None and saved.step == 1
    assert said == [f"checkpoint {two / 'step-00000002.tmp'} is passed over: it was never completed"]


def test_where_all_are_damaged_there_is_none(two: Path) -> None:
    for step in (1, 2):
        truncate(two / f"step-0000000{step}")
    saved, said = latest(two)
    assert saved is None and len(said) == 2
    with pytest.raises(CheckpointError, match="nowhere does not exist; expected a folder such as step-00000050"):
        checkpoint.inspect(two / "nowhere")


def kept_as_before(two: Path) -> None:
    assert names(two) == ["step-00000001", "step-00000002"]
    saved, said = latest(two)
    assert saved is not None and saved.step == 2 and not said


def save_on_small_disk(context: Context, folder: str, step: int, previous: str, where: int) -> str:
    """The error's text; files of rank `where` may have 1,000 bytes, as the kernel sees to."""
    group = context.mesh.get_group() if context.mesh is not None else None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if context.rank == where:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        checkpoint.save(Path(folder), step, state_of(step), group=group, settings=SETTINGS, previous=Path(previous))
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "saved"


@pytest.mark.parametrize(("count", "where"), [(1, 0), (3, 0), (3, 1)])
def test_a_rank_that_cannot_write_fails_all(ranks: RankPool, two: Path, count: int, where: int) -> None:
    said = ranks(count, save_on_small_disk, str(two), 3, str(two / "step-00000002"), where)
    assert len({*said}) == 1
    assert f"step-00000003 cannot be written: rank {where}: " in said[0] and "File too large" in said[0], said[0]
    kept_as_before(two)
    # And with room again it is written.
    assert ranks(count, save_on_small_disk, str(two), 3, str(two / "step-00000002"), -1) == ["saved"] * count
    assert names(two) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_full_disk_is_named(two: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match="step-00000003 cannot be written: rank 0: the disk is full: "):
            save(two, 3, two / "step-00000002")
    kept_as_before(two)


def save_where_one_cannot_read(context: Context, folder: str) -> str:
    def broken(*args: object) -> dict[str, tuple[int, int]]:
        raise OSError(5, os.strerror(5))

    assert context.mesh is not None
    sums = checkpoint._sums
    if context.rank == 1:
        checkpoint._sums = broken
    try:
        checkpoint.save(Path(folder), 3, state_of(3), group=context.mesh.get_group(), settings={}, previous=None)
    except CheckpointError as error:
        return str(error)
    finally:
        checkpoint._sums = sums
    return "saved"


def test_what_cannot_be_read_again_is_not_saved(ranks: RankPool, two: Path) -> None:
    said = ranks(3, save_where_one_cannot_read, str(two))
    assert len({*said}) == 1 and "step-00000003 cannot be written: rank 1: [Errno 5] Input/output error" in said[0]
    kept_as_before(two)


def save_apart(context: Context, folder: str) -> None:
    assert context.mesh is not None
    own = Path(folder) / str(context.rank)
    checkpoint.save(own, 1, state_of(1), group=context.mesh.get_group(), settings={}, previous=None)


def test_ranks_that_do_not_share_the_folder_are_told(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError) as failed:
        ranks(2, save_apart, str(tmp_path))
    for error in failed.value.errors.values():
        assert "rank 1 wrote __1_0.distcp, which rank 0 does not see" in str(error)
    assert not names(tmp_path / "0") and len(failed.value.errors) == 2


def save_shards(context: Context, folder: str) -> None:
    whole = torch.arange(77.0).reshape(11, 7)
    state = {"sharded": distribute_tensor(whole, context.mesh, [Shard(0)]), "alike": whole.double()}
    assert context.mesh is not None
    checkpoint.save(Path(folder), 1, state, group=context.mesh.get_group(), settings={}, previous=None)


def load_shards(context: Context, folder: str) -> list[torch.Tensor]:
    saved = checkpoint.on_first(None, lambda: checkpoint.inspect(Path(folder) / "step-00000001"))
    assert saved.world_size == 4
    empty = torch.zeros(11, 7)
    state = {"sharded": empty, "alike": empty.double()}
    if context.mesh is None:
        checkpoint.load(saved, state, group=None)
        return [state["sharded"], state["alike"]]
    sharded = state["sharded"] = distribute_tensor(empty, context.mesh, [Shard(0)])
    checkpoint.load(saved, state, group=context.mesh.get_group())
    assert isinstance(sharded, DTensor)
    return [sharded.full_tensor(), state["alike"]]


def test_what_four_ranks_saved_any_number_reads(ranks: RankPool, tmp_path: Path) -> None:
    ranks(4, save_shards, str(tmp_path))
    whole = torch.arange(77.0).reshape(11, 7)
    for count in (1, 3, 4):
        for sharded, alike in ranks(count, load_shards, str(tmp_path)):
            assert torch.equal(sharded, whole) and torch.equal(alike, whole.double())


def first_fails(context: Context, how: str) -> int:
    def work() -> int:
        assert context.rank == 0
        if how == "fails":
            raise CheckpointError("on the first")
        if how == "is refused":
            raise PermissionError("on the first")
        return 7

    return checkpoint.on_first(context.mesh.get_group(), work)  # type: ignore[union-attr]


def test_what_the_first_rank_finds_all_get(ranks: RankPool) -> None:
    assert ranks(2, first_fails, "works") == [7, 7]
    for how, kind in (("fails", CheckpointError), ("is refused", PermissionError)):
        with pytest.raises(RankError, match="on the first") as failed:
            ranks(2, first_fails, how)
        assert [type(error) for error in failed.value.errors.values()] == [kind] * 2

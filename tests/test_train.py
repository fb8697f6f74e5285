"""Training: the same curve on any number of ranks, and after any interruption."""

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rank_pool import RankPool

import distattn
from distattn import checkpoint
from distattn.conf import schema
from distattn.data import open_corpus
from distattn.errors import CheckpointError, ConfigError, DistattnError, NotFinite
from distattn.jobs import reading, train
from distattn.jobs.context import Context
from distattn.jobs.curve import Row, read
from distattn.jobs.settings import attention_spec, plan_options
from distattn.jobs.trainer import Measured
from distattn.launch.local import rank_environment
from distattn.launch.processes import Exit, Message, Processes
from distattn.model import Decoder, ModelConfig
from distattn.plan import make_plan
from distattn.sharding import local

PATIENCE = 400.0  # seconds to wait for what takes a few on an idle machine
# 301 tokens are no whole number of tiles, and 24 of 32 rows no whole number of slices of a shard.
SMALL = [
    "job=train", "data=path", f"data.path={argparse.__file__}", "seq_len=301", "layout.block_q=32", "layout.block_k=32",
    "model.width=32", "model.hidden=48", "model.heads=2",
    "model.kv_heads=1", "model.head_dim=16", "model.slice_rows=24", "job.steps=10", "job.warmup=3", "job.save_every=4",
    "job.log_every=1", "job.tensorboard=false", "job.learning_rate=0.01",
]  # fmt: skip
WINDOW = ["attention=window_global", "attention.reach=40"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a rank of the pool: quick where cores are shared, and the same sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(*overrides: str) -> schema.Config:
    """The small run, with a causal window unless an override names another attention."""
    schema.register()
    if not any(one.startswith("attention=") for one in overrides):
        overrides = (*WINDOW, *overrides)
    with initialize_config_module("distattn.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [*SMALL, *overrides, "output_dir=unused"]))
    assert isinstance(config, schema.Config)
    return config


class Lines:
    """A reporter that keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def progress(self, stage: str, done: float, total: float, info: dict[str, object]) -> None:
        assert stage == "train" and {*info} - {"mfu"} == {"loss", "tokens_per_s"} and 0 < done <= total

    def log(self, text: str) -> None:
        self.lines.append(text)


def in_folder(context: Context, folder: str | Path, reporter: Any = None) -> Context:
    return replace(context, output_dir=Path(folder), reporter=reporter or Lines())


def here(folder: Path) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(0, 1, 0, torch.device("cpu"), None, folder)


class Stop(Exception):
    """What stands for the end of a rank."""


def run(context: Context, folder: str, overrides: list[str], stop: int | None = None, how: str = "") -> dict[str, Any]:
    """Train, up to the end of step `stop`; the log, the result and what was raised."""
    reporter = Lines()
    step, complete = train.Trainer.step, checkpoint._complete

    def stopping(trainer: train.Trainer, number: int) -> Measured:
        if stop is not None and number > stop and not how:
            raise Stop
        return step(trainer, number)

    def failing(saved: checkpoint.Saved, aside: Path) -> None:
        if how == "full disk" and saved.step == stop:
            raise OSError(28, os.strerror(28))
        complete(saved, aside)

    result, error = None, None
    train.Trainer.step, checkpoint._complete = stopping, failing  # type: ignore[method-assign]
    try:
        result = train.run(config_of(*overrides), in_folder(context, folder, reporter))
    except (Stop, DistattnError) as raised:
        error = raised
    finally:
        train.Trainer.step, checkpoint._complete = step, complete  # type: ignore[method-assign]
    return {"result": result, "error": error, "lines": reporter.lines}


def step_of(trainer: train.Trainer, number: int) -> Row:
    (row,) = trainer.rows([trainer.step(number)], 1.0)
    return row


def curve_of(folder: str | Path) -> list[tuple[float, ...]]:
    """All that is reproducible and there: all but the speed."""
    return [tuple(x for x in astuple(row)[:-1] if x is not None) for row in read(Path(folder) / train.CURVE)]


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / train.CHECKPOINTS).iterdir())


def state_in(folder: Path, step: int) -> checkpoint.State:
    saved = checkpoint.inspect(folder / train.CHECKPOINTS / f"step-{step:08d}")
    state = train.Trainer(config_of(), here(folder), open_corpus(argparse.__file__)).state()
    checkpoint.load(saved, state, group=None)
    return state


@pytest.fixture(scope="module")
def whole(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """An undisturbed run of ten steps, on 1, 2 and 4 ranks."""
    folders = {}
    for count in (1, 2, 4):
        folder = folders[count] = tmp_path_factory.mktemp(f"whole{count}")
        done = ranks(count, run, str(folder), [])
        assert [one["error"] for one in done] == [None] * count and not any(one["lines"] for one in done)
        assert done[1:] == [{"result": {}, "error": None, "lines": []}] * (count - 1)
        report = done[0]["result"]
        assert report["world_size"] == count == len(report["peak_bytes"])
        assert report["steps"] == 10 and report["resumed_after"] == 0 and report["tokens_per_second"] > 0
        assert report["checkpoint"] == str(folder / "checkpoints" / "step-00000010")
        first, last = curve_of(folder)[0], curve_of(folder)[-1]
        assert report["curve"] == [(1, first[2]), (10, last[2])]
        assert f"bits per byte     {first[2]:.4f} at step 1, {last[2]:.4f} at step 10" in report["report"]
        assert steps_of(folder) == [8, 10]
    return folders


def test_the_curve_does_not_depend_on_the_number_of_ranks(whole: dict[int, Path]) -> None:
    one, two, four = (curve_of(whole[count]) for count in (1, 2, 4))
    assert [row[0] for row in one] == [*range(1, 11)]
    for row in one:
        assert row[2] == pytest.approx(row[1] / math.log(2), rel=1e-6)
    # An untrained model knows nothing of bytes: near log 256 nats; then it learns.
    assert abs(one[0][1] - math.log(256)) < 0.3 and one[-1][1] < one[0][1] - 1
    for other in (two, four):
        for mine, theirs in zip(one, other, strict=True):
            assert theirs == pytest.approx(mine, abs=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_labels_across_shards_in_every_layout(
    ranks: RankPool, whole: dict[int, Path], tmp_path: Path, layout: str
) -> None:
    done = ranks(3, run, str(tmp_path), [f"layout={layout}", "layout.block_q=32", "layout.block_k=32"], 2)
    assert all(isinstance(one["error"], Stop) for one in done)
    # One wrong label in 301 would be some 1e-3 of the loss.
    for mine, theirs in zip(curve_of(whole[1]), curve_of(tmp_path), strict=False):
        assert theirs == pytest.approx(mine, rel=1e-5)
    assert len(curve_of(tmp_path)) == 2


def test_plain_pytorch_gives_the_same_curve(tmp_path: Path) -> None:
    """All options at once, in the fewest lines; one rank, and one piece of rows."""
    options = [
        "job.accumulate=2",
        "job.clip=0.4",
        "job.weight_decay=0.3",
        "job.learning_rate=0.003",
        "data.offset=7000",
    ]
    config = config_of(*options)
    assert isinstance(config.job, schema.TrainConfig)
    corpus = open_corpus(argparse.__file__)
    trainer = train.Trainer(config, here(tmp_path), corpus)
    sizes = ModelConfig(2, 32, 2, 1, 16, 48)
    model = Decoder(sizes, config.seed)
    plans = [make_plan(attention_spec(config), **plan_options(config))] * 2
    decayed, plain = ([p for p in model.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW(decayed, betas=(0.9, 0.95), weight_decay=0.3)
    optimizer.add_param_group({"params": plain, "weight_decay": 0.0})
    rates = [0.001, 0.002, 0.003, *(0.0015 * (1 + math.cos(math.pi * n / 7)) for n in range(7))]
    clipped = 0
    for step, rate in enumerate(rates[:6], 1):
        starts = [start_of(config, len(corpus), step, part) for part in range(2)]
        texts = [torch.from_numpy(corpus.read(start, start + 302).astype("int64")) for start in starts]
        tokens = torch.stack([text[:-1] for text in texts])
        labels = torch.stack([text[1:] for text in texts])
        loss = model.loss(model(tokens, plans), labels).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))  # type: ignore[union-attr]
        clipped += norm > 0.4
        for p in model.parameters():
            p.grad *= min(1.0, 0.4 / norm)  # type: ignore[operator]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        row = step_of(trainer, step)
        assert (row.step, row.loss, row.learning_rate, row.gradient_norm) == pytest.approx(
            (step, float(loss.detach()), rate, norm), rel=2e-5
        )
    assert clipped > 3


def start_of(config: schema.Config, length: int, step: int, part: int, row: int = 0) -> int:
    return reading.window_start(config, length, reading.random_of(config, step, part, row))


def test_groups_of_ranks_with_windows_of_their_own(ranks: RankPool, tmp_path: Path) -> None:
    """Two groups that read one window each learn what one group learns of two, one after the other."""
    curves = []
    for groups, count, heads in ((1, 1, 1), (2, 2, 1), (2, 4, 1), (2, 4, 2)):
        folder = tmp_path / f"{groups} {count} {heads}"
        folder.mkdir()
        parts = [f"job.data_ranks={groups}", f"job.accumulate={2 // groups}", "job.steps=6"]
        (first, *_) = ranks(count, run, str(folder), [*parts, "model.kv_heads=2", f"layout.head_ranks={heads}"])
        assert first["error"] is None and first["result"]["tokens_per_step"] == 602
        curves.append(curve_of(folder))
    for other in curves[1:]:
        for mine, theirs in zip(curves[0], other, strict=True):
            assert theirs == pytest.approx(mine, abs=1e-4)


def test_how_often_it_is_read_back_changes_nothing(whole: dict[int, Path], tmp_path: Path) -> None:
    done = own_run(tmp_path, "job.log_every=3")
    assert done["error"] is None and curve_of(tmp_path) == curve_of(whole[1])


HIERARCHICAL = ["attention=hierarchical", "attention.window=32", "attention.chunks=[16,64]", "attention.reach=[2]"]


def test_chosen_chunks_too_are_the_same_after_a_stop(ranks: RankPool, tmp_path: Path) -> None:
    curves = {}
    for count, stop in ((1, None), (2, None), (2, 6)):
        folder = tmp_path / f"{count} {stop}"
        folder.mkdir()
        ranks(count, run, str(folder), HIERARCHICAL, stop)
        if stop:
            assert ranks(count, run, str(folder), HIERARCHICAL)[0]["result"]["resumed_after"] == 4
        curves[count, stop] = curve_of(folder)
    assert curves[2, None] == curves[2, 6]
    for mine, theirs in zip(curves[1, None], curves[2, None], strict=True):
        assert theirs == pytest.approx(mine, abs=1e-4)


@pytest.mark.parametrize("stop", [2, 4, 7, 10])
def test_a_stopped_run_resumes_bit_for_bit(ranks: RankPool, whole: dict[int, Path], tmp_path: Path, stop: int) -> None:
    ranks(2, run, str(tmp_path), [], stop)
    assert len(curve_of(tmp_path)) == stop
    resumed = ranks(2, run, str(tmp_path), [])
    saved = {2: 0, 4: 4, 7: 4, 10: 10}[stop]
    path = tmp_path / "checkpoints" / f"step-{saved:08d}"
    assert resumed[0]["lines"] == ([f"training resumes after step {saved}, from {path}"] if saved else [])
    assert not resumed[1]["lines"] and resumed[0]["result"]["resumed_after"] == saved
    assert curve_of(tmp_path) == curve_of(whole[2])
    assert steps_of(tmp_path) == [8, 10]
    torch.testing.assert_close(state_in(tmp_path, 10), state_in(whole[2], 10), rtol=0, atol=0)
    assert ("nothing was left to do" in resumed[0]["result"]["report"]) == (stop == 10)


def test_a_damaged_checkpoint_and_a_full_disk_change_nothing(
    ranks: RankPool, whole: dict[int, Path], tmp_path: Path
) -> None:
    done = ranks(2, run, str(tmp_path), [], 10, "full disk")
    for one in done:
        assert type(one["error"]) is CheckpointError
        assert "step-00000010 cannot be written: rank 0: the disk is full: " in str(one["error"])
    assert steps_of(tmp_path) == [4, 8] and len(curve_of(tmp_path)) == 10
    damaged = tmp_path / "checkpoints" / "step-00000008" / "__1_0.distcp"
    os.truncate(damaged, damaged.stat().st_size - 1)
    resumed = ranks(2, run, str(tmp_path), [])
    assert [len(one["lines"]) for one in resumed] == [2, 0]
    assert "step-00000008 is damaged: __1_0.distcp has " in resumed[0]["lines"][0]
    assert resumed[0]["lines"][1].startswith("training resumes after step 4, ")
    assert curve_of(tmp_path) == curve_of(whole[2])
    assert steps_of(tmp_path) == [8, 10]


def test_other_numbers_of_ranks_go_on_with_the_same_curve(
    ranks: RankPool, whole: dict[int, Path], tmp_path: Path
) -> None:
    ranks(4, run, str(tmp_path), ["job.save_every=1"], 3)
    ranks(2, run, str(tmp_path), ["job.save_every=1"], 6)
    assert steps_of(tmp_path) == [5, 6]
    (last, *_) = ranks(3, run, str(tmp_path), [])
    assert last["result"]["resumed_after"] == 6 and last["result"]["world_size"] == 3
    for mine, theirs in zip(curve_of(whole[1]), curve_of(tmp_path), strict=True):
        assert theirs == pytest.approx(mine, abs=1e-4)


def test_a_loss_that_is_not_finite_ends_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    done = ranks(2, run, str(tmp_path), ["job.learning_rate=1e30", "job.warmup=0"])
    assert len({str(one["error"]) for one in done}) == 1
    for one in done:
        assert type(one["error"]) is NotFinite
        assert re.match(r"step \d: the loss is .*(nan|inf).*; expected finite numbers", str(one["error"]))
    assert not (tmp_path / train.CHECKPOINTS).exists()


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_not_finite_changes_nothing(ranks: RankPool, tmp_path: Path, count: int) -> None:
    assert ranks(count, goes_on_without_a_step, str(tmp_path)) == [None] * count


def goes_on_without_a_step(context: Context, folder: str) -> None:
    """The second of three steps is not finite: the third begins where the first ended; it is told at the end."""
    trainer = train.Trainer(config_of(), in_folder(context, folder), open_corpus(argparse.__file__))
    measured = [trainer.step(1)]
    head = local(trainer.model.head.detach())
    before = [x.clone() for x in _flat(trainer.state())]
    kept = head.clone()
    head[:] = math.inf
    measured.append(trainer.step(2))
    head.copy_(kept)
    torch.testing.assert_close([*_flat(trainer.state())], before, rtol=0, atol=0)
    measured.append(trainer.step(3))
    assert trainer.rows(measured[2:], 1.0)[0].loss < trainer.rows(measured[:1], 1.0)[0].loss
    assert float(trainer.state()["optimizer"]["norm"]["step"]) == 2
    with pytest.raises(NotFinite, match="step 2: the loss is (nan|inf)"):
        trainer.rows(measured, 1.0)


def _flat(state: checkpoint.State) -> Iterator[torch.Tensor]:
    for value in state.values():
        if isinstance(value, torch.Tensor):
            yield local(value)
        else:
            yield from _flat(value)


def test_a_rank_keeps_a_share_of_parameters_and_optimiser(ranks: RankPool, tmp_path: Path) -> None:
    for held, of_all in ranks(2, shares_held, str(tmp_path)):
        assert held == {name: -(-n // 2) for name, n in of_all.items()}


def shares_held(context: Context, folder: str) -> tuple[dict[str, int], dict[str, int]]:
    trainer = train.Trainer(config_of(), in_folder(context, folder), open_corpus(argparse.__file__))
    trainer.rows([trainer.step(1)], 1.0)
    for name, p in trainer.model.named_parameters():
        moments = trainer.state()["optimizer"][name]
        assert {local(x).shape for x in (p, p.grad, moments["exp_avg"], moments["exp_avg_sq"])} == {local(p).shape}
    parameters = dict(trainer.model.named_parameters())
    return {name: len(local(p)) for name, p in parameters.items()}, {name: len(p) for name, p in parameters.items()}


def test_bfloat16_arithmetic_with_float32_parameters(whole: dict[int, Path], tmp_path: Path) -> None:
    trainer = train.Trainer(config_of("model.dtype=bfloat16"), here(tmp_path), open_corpus(argparse.__file__))
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    losses = [step_of(trainer, step).loss for step in range(1, 6)]
    expected = [row[1] for row in curve_of(whole[1])[:5]]
    assert losses == pytest.approx(expected, abs=0.03)
    assert max(abs(mine - theirs) for mine, theirs in zip(losses, expected, strict=True)) > 1e-4


@pytest.mark.parametrize(
    "where",
    [
        "writing",
        "gradients",
        *(pytest.param(where, marks=pytest.mark.full) for where in ("parameters", "frozen", "reading again")),
    ],
)
def test_a_rank_that_dies_is_named_to_the_others(tmp_path: Path, where: str) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    config = config_of("job.steps=1", "job.warmup=0")
    seats = [(config, rank, store.port, where, tmp_path) for rank in range(2)]
    events: list[tuple[int, object]] = []
    end = time.monotonic() + PATIENCE
    with Processes("trial_jobs:loses_a_peer_in_training", seats, rank_environment()) as processes:
        while sum(isinstance(event, Exit) for _, event in events) < 1 + (where != "frozen") and time.monotonic() < end:
            events += processes.poll(1.0)
    assert (0, Exit(0)) in events and ((1, Exit(9)) in events) == (where != "frozen"), events
    ((kind, text),) = [event.value for rank, event in events if rank == 0 and isinstance(event, Message)]
    assert kind == ("StepTimeout" if where == "frozen" else "PeerLost")
    assert {
        "gradients": "sum gradients: failed",
        "parameters": "gather parameters: failed",
        "frozen": "sum gradients: did not end within 3 s; there is no sign of life of rank 1",
    }.get(where, "a peer was lost") in text
    assert [path.name for path in (tmp_path / "checkpoints").glob("*")] in ([], ["step-00000001.tmp"])


# What a run begins with


def own_run(folder: Path, *overrides: str) -> dict[str, Any]:
    here(folder)
    return run(here(folder), str(folder), [*overrides])


def test_a_run_may_begin_with_another_ones_checkpoint(tmp_path: Path, whole: dict[int, Path]) -> None:
    before = whole[1] / "checkpoints" / "step-00000008"
    resume = f"job.resume={before}"
    same = own_run(tmp_path / "same", resume)
    assert same["lines"] == [f"training resumes after step 8, from {before}"]
    assert [row[0] for row in curve_of(tmp_path / "same")] == [9, 10]
    assert steps_of(tmp_path / "same") == [10] and steps_of(whole[1]) == [8, 10]
    for mine, theirs in zip(curve_of(whole[1])[8:], curve_of(tmp_path / "same"), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-6)
    # The run's own checkpoint is the one that counts from then on.
    again = own_run(tmp_path / "same", resume)
    assert "step-00000010" in again["lines"][0] and again["lines"][0].startswith("training resumes after step 10, ")
    other = own_run(tmp_path / "other", resume, "job.weight_decay=0.5", "job.steps=11")
    assert other["lines"][0].endswith(
        "is of another run: job.steps was 10 and is 11, job.weight_decay was 0.01 and is 0.5"
    )
    assert [row[0] for row in curve_of(tmp_path / "other")] == [9, 10, 11]
    past = own_run(tmp_path / "past", resume, "job.steps=5")["error"]
    assert type(past) is ConfigError and "job.steps is 5, but " in str(past) and "is of step 8" in str(past)
    wider = own_run(tmp_path / "wider", resume, "model.hidden=64")["error"]
    assert type(wider) is ConfigError and "model.hidden was 48 and is 64; expected a checkpoint of the same" in str(
        wider
    )


# The command


def command(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """On two cores at most, of which each of two ranks has one thread, as those of the pool: the same sums."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    checkout, tests = Path(distattn.__file__).parent.parent, Path(__file__).parent
    environment = rank_environment() | {"PYTHONPATH": f"{tests}{os.pathsep}{checkout}"}
    arguments = [*SMALL, *WINDOW, "launcher.device=cpu", "launcher.num_workers=2", "output_dir=out", *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "distattn.launch.run", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_job_killed_in_the_middle_of_a_save_resumes_bit_for_bit(whole: dict[int, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with command(tmp_path, "job.name=trial_jobs:trains_and_stays_in_a_save") as killed:
        assert killed.stdout
        pids: list[int] = []
        for line in killed.stdout:
            pids += [int(text) for text in re.findall(r"pid (\d+)", line)]
            if "in the middle of a save" in line:
                break
        assert len(pids) == 2 and not any(gone(pid) for pid in pids), killed.communicate()[1]
        os.killpg(killed.pid, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < end, f"ranks {pids} outlive the command"
        time.sleep(0.02)
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000008.tmp"] and len(curve_of(out)) == 8

    with command(tmp_path) as process:
        said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "training          10 steps of 301 tokens on 2 ranks" in said
    assert "step-00000008.tmp is passed over: it was never completed" in said
    assert f"[rank 0] training resumes after step 4, from {out / 'checkpoints' / 'step-00000004'}" in said
    assert steps_of(out) == [8, 10]
    assert curve_of(out) == curve_of(whole[2])
    torch.testing.assert_close(state_in(out, 10), state_in(whole[2], 10), rtol=0, atol=0)

"""What training can be asked for beside plain text: facts, held-out files, documents, compiled rows, TensorBoard."""

import argparse
import email
import math
import shutil
import sys
import types
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from test_train import HIERARCHICAL, config_of, curve_of, here, one_thread, own_run, run, start_of
from torch.utils.flop_counter import FlopCounterMode

from distattn import checkpoint, weights
from distattn.data import open_corpus
from distattn.jobs import reading, train
from distattn.jobs.curve import read
from distattn.jobs.settings import attention_spec, plan_options
from distattn.model import Decoder, ModelConfig
from distattn.plan import make_plan

__all__ = ["one_thread"]  # a fixture, for each test here too


# Facts in windows side by side, chunks whose choice is taught, files that are held out.
RECALL = [
    *HIERARCHICAL, "attention.top_k=1", "attention.per=tile", f"data.path={Path(email.__file__).parent}",
    "data.suffix=.py", "data.held_out=0.3", "seq_len=400", "job.curriculum=recall", "job.choice_weight=0.5",
    "job.batch=2", "job.steps=5", "job.validate_every=3", "job.validate_windows=3",
]  # fmt: skip


def test_facts_are_learned_alike_and_the_held_out_text_is_read(ranks: RankPool, tmp_path: Path) -> None:
    curves = {}
    for name, count, more, stop in (
        ("1", 1, [], None),
        ("2", 2, [], None),
        ("stopped", 2, [], 4),
        ("groups", 4, ["job.data_ranks=2", "job.batch=1"], None),
    ):
        folder = tmp_path / name
        folder.mkdir()
        overrides = [*RECALL, *more, f"job.export={folder / 'learned.safetensors'}"]
        (one, *_) = ranks(count, run, str(folder), overrides, stop)
        if stop:
            (one, *_) = ranks(count, run, str(folder), overrides)
            assert one["result"]["resumed_after"] == 4
        assert one["error"] is None
        curves[name] = read(folder / train.CURVE)
    assert curve_of(tmp_path / "2") == curve_of(tmp_path / "stopped")
    for mine, theirs in zip(curves["1"], curves["2"], strict=True):
        assert astuple(theirs)[:-1] == pytest.approx(astuple(mine)[:-1], abs=1e-4)
        assert mine.answer_bits is not None and mine.chosen is not None
        assert (mine.held_out_bits is not None) == (mine.step in (3, 5))

    # Groups draw other windows beside each other than one group does, but look at the same held-out ones.
    config = config_of(*RECALL)
    learned = weights.load(tmp_path / "groups" / "learned.safetensors", dtype="float32")
    assert learned.settings["training"]["job.curriculum"] == "recall"
    saved = checkpoint.inspect(tmp_path / "groups" / "checkpoints" / "step-00000005")
    trainer = train.Trainer(config, here(tmp_path), train.corpora(config)[0])
    checkpoint.load(saved, trainer.state(), group=None)
    for name, p in learned.decoder.named_parameters():
        assert torch.equal(p, trainer.state()["model"][name].bfloat16().float())
    plans = [make_plan(attention_spec(config), **plan_options(config))] * 2
    held_out = open_corpus(Path(email.__file__).parent, ".py").split(0.3)[1]
    nats = 0.0
    for first in (0, (len(held_out) - 401) // 2, len(held_out) - 401):
        text = torch.from_numpy(held_out.read(first, first + 401).astype("int64"))[None]
        with torch.no_grad():
            nats += float(trainer.model.loss(trainer.model(text[:, :-1], plans), text[:, 1:]).sum())
    assert curves["groups"][-1].held_out_bits == pytest.approx(nats / 1200 / math.log(2), rel=1e-5)


def test_training_reads_no_held_out_byte() -> None:
    config = config_of(*RECALL, "job.curriculum=text", "job.choice_weight=0", "job.accumulate=3")
    corpus, held_out = train.corpora(config)
    assert held_out is not None
    learned, kept = bytes(corpus.read(0, len(corpus))), bytes(held_out.read(0, len(held_out)))
    reader = reading.Reader(config, corpus, [])
    texts = [bytes(window.tokens) for step in range(1, 6) for part in reader.step(step) for window in part.windows]
    assert len({*texts}) == 30 and all(text in learned and text not in kept for text in texts)


def test_attention_stays_inside_files(ranks: RankPool, tmp_path: Path) -> None:
    text, place = Path(argparse.__file__).read_bytes(), 0
    (tmp_path / "texts").mkdir()
    for number, size in enumerate([40, 33, 90, 61, 150, 17, 1, 70, 200, 128]):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(text[place : place + size])
        place += size
    packed = ["attention=dense", f"data.path={tmp_path / 'texts'}", "job.documents=true"]
    curves = []
    for count in (1, 2):
        (one, *_) = ranks(count, run, str(tmp_path), [*packed, "job.accumulate=2", "job.steps=4"])
        assert one["error"] is None
        curves.append(curve_of(tmp_path))
        for path in (tmp_path / "checkpoints", tmp_path / "train.csv"):
            path.rename(tmp_path / f"{path.name} {count}")
    for mine, theirs in zip(*curves, strict=True):
        assert theirs == pytest.approx(mine, abs=1e-4)

    # The first loss, by a pass over each document alone: without positions before it, and with the label after it.
    config = config_of(*packed)
    corpus = open_corpus(tmp_path / "texts")
    model, nats, count = Decoder(ModelConfig(2, 32, 2, 1, 16, 48), config.seed), 0.0, 0
    for start in (start_of(config, len(corpus), 1, part) for part in range(2)):
        for size in corpus.document_lengths(start, start + 301).tolist():
            piece = torch.from_numpy(corpus.read(start, start + size + 1).astype("int64"))[None]
            plan = make_plan(attention_spec(config), **plan_options(config) | {"seq_len": size})
            nats += float(model.loss(model(piece[:, :-1], [plan] * 2), piece[:, 1:]).detach().sum())
            start, count = start + size, count + size
    assert count == 602 and curves[0][0][1] == pytest.approx(nats / 602, rel=1e-5)


def test_flops_are_those_of_products_and_pairs(tmp_path: Path) -> None:
    trainer = train.Trainer(config_of("attention=dense"), here(tmp_path), open_corpus(argparse.__file__))
    (part,) = trainer.reader.step(1)
    with FlopCounterMode(display=False) as counter:
        hidden = trainer.model(*_whole(part, trainer))
        trainer.model.loss(hidden, torch.zeros(1, 301, dtype=torch.int64))
    # PyTorch counts products of the forward pass, but not those inside our operators.
    pairs = 2 * 2 * 301 * 302 // 2
    assert trainer._flops(part) == 3 * (counter.get_total_flops() + pairs * 2 * (16 + 16))


def _whole(part: reading.Part, trainer: train.Trainer) -> tuple[torch.Tensor, list[Any]]:
    return reading.Shard(part.windows, part.plans[0], trainer.context.device).tokens, part.plans


def test_metrics_for_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed; here something stands for it."""
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: Path, purge_step: int) -> None:
            assert folder == tmp_path / "there" / "tensorboard" and purge_step == 1

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("close", 0, 0))

    steps = ["job.steps=2", "job.warmup=1", "job.tensorboard=true"]
    with monkeypatch.context() as patch:
        module = types.ModuleType("torch.utils.tensorboard")
        module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "torch.utils.tensorboard", module)
        assert own_run(tmp_path / "there", *steps)["lines"] == []
    rows = read(tmp_path / "there" / train.CURVE)
    names = ("loss", "bits_per_byte", "learning_rate", "gradient_norm", "tokens_per_second")
    assert written == [(name, getattr(row, name), row.step) for row in rows for name in names] + [("close", 0, 0)]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not
    path = tmp_path / "missing" / train.CURVE
    said = own_run(tmp_path / "missing", *steps)["lines"]
    assert said == [f"TensorBoard is not installed: what is measured goes to {path} alone"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.full
@pytest.mark.parametrize("count", [1, 2])
def test_compiled_rows_learn_the_same(ranks: RankPool, tmp_path: Path, count: int) -> None:
    curves = []
    for compiled in ("false", "true"):
        (tmp_path / compiled).mkdir()
        small = ["model.layers=1", "job.steps=3", f"job.compile={compiled}"]
        (one, *_) = ranks(count, run, str(tmp_path / compiled), small)
        assert one["error"] is None
        curves.append(curve_of(tmp_path / compiled))
    for mine, theirs in zip(*curves, strict=True):
        assert theirs == pytest.approx(mine, abs=1e-4)

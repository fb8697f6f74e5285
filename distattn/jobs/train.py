"""job=train: the decoder learns the bytes of a text, a window of seq_len of them at a time, sharded over the ranks.

Each rank computes the loss and the gradients of its own rows; these are summed, and parameters are sharded over all
ranks (trainer.py, sharding.py). What a step reads follows from the seed and the step's number, so a run that resumes
needs parameters and the optimiser's state, and nothing else: on CPUs and as many ranks as before it goes on bit for bit
as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distattn import checkpoint, weights
from distattn.checkpoint import Saved
from distattn.conf.schema import Config, TrainConfig
from distattn.data import Corpus, open_corpus
from distattn.errors import ConfigError
from distattn.jobs.context import Context
from distattn.jobs.curve import Curve, board, read
from distattn.jobs.machine import device_name, peak_bytes, synchronize
from distattn.jobs.settings import attention_spec, check_decoder, layer_specs
from distattn.jobs.trainer import Measured, Trainer
from distattn.sharding import whole
from distattn.windows import CURRICULA

CHECKPOINTS = "checkpoints"
CURVE = "train.csv"
BOARD = "tensorboard"
# What the shapes of parameters follow from.
_SIZES = tuple(f"model.{name}" for name in ("layers", "width", "heads", "kv_heads", "head_dim", "hidden"))


def check(config: Config) -> None:
    """Finds what cannot be trained before any process starts."""
    job = config.job
    assert isinstance(job, TrainConfig)
    for name in ("steps", "batch", "accumulate", "data_ranks", "validate_windows", "log_every", "save_every"):
        if getattr(job, name) < 1:
            raise ConfigError(f"job.{name} is {getattr(job, name)}; expected at least 1")
    if job.until is not None and not 1 <= job.until <= job.steps:
        raise ConfigError(f"job.until is {job.until}; expected 1 to job.steps, {job.steps}, or null")
    if not 0 < job.learning_rate < math.inf:
        raise ConfigError(f"job.learning_rate is {job.learning_rate}; expected more than 0")
    if not 0 <= job.warmup <= job.steps:
        raise ConfigError(f"job.warmup is {job.warmup}; expected 0 to job.steps, {job.steps}")
    if not 0 <= job.weight_decay < math.inf:
        raise ConfigError(f"job.weight_decay is {job.weight_decay}; expected at least 0")
    if job.clip is not None and not 0 < job.clip < math.inf:
        raise ConfigError(f"job.clip is {job.clip}; expected more than 0, or null")
    if job.resume is not None and not Path(job.resume).expanduser().is_dir():
        raise ConfigError(f"job.resume is {job.resume!r}, which is no folder; expected one such as step-00000050")
    if config.seed < 0:
        raise ConfigError(f"seed is {config.seed}; expected at least 0")
    if config.model.dtype == "float16":
        raise ConfigError(
            "model.dtype is 'float16', whose small gradients would vanish; expected bfloat16, float32 or float64"
        )
    spec = attention_spec(config)
    if not spec.causal or (spec.select is not None and spec.select.lookahead):
        raise ConfigError(
            f"attention={config.attention['name']} lets a token depend on those that follow it, which it is to "
            "foretell; expected attention.causal=true, and attention.lookahead=false where there is one"
        )
    check_decoder(config)
    _check_curriculum(config)
    corpus, held_out = corpora(config)
    for one, offset in ((corpus, config.data.offset), *([(held_out, 0)] if held_out else [])):
        one.require(config.seq_len, offset)
        if offset + config.seq_len == len(one):
            raise ConfigError(
                f"seq_len is {config.seq_len:,} bytes, all that {one.source} has; expected at least one byte more, "
                "which the last one is to foretell"
            )


def _check_curriculum(config: Config) -> None:
    job = config.job
    assert isinstance(job, TrainConfig)
    if job.curriculum not in CURRICULA:
        raise ConfigError(f"job.curriculum is {job.curriculum!r}; expected one of {', '.join(CURRICULA)}")
    if not 0 <= job.choice_weight < math.inf:
        raise ConfigError(f"job.choice_weight is {job.choice_weight}; expected at least 0")
    if job.choice_weight:
        selects = [spec.select for spec in layer_specs(config) if spec.select is not None]
        if job.curriculum != "recall" or not selects or any(select.score != "mean" for select in selects):
            raise ConfigError(
                f"job.choice_weight is {job.choice_weight}; expected 0, or job.curriculum=recall and attention that "
                'chooses chunks by their mean keys (attention.score="mean")'
            )
    if job.documents:
        for spec in layer_specs(config):
            if not spec.is_static or spec.correction is not None:
                raise ConfigError(
                    f"job.documents is true, and attention is {spec.text}; expected a pattern and nothing else, since "
                    "summaries, chosen chunks and corrections reach across documents"
                )
        if job.batch > 1 or job.curriculum != "text":
            raise ConfigError(
                f"job.documents is true, with job.batch={job.batch} and job.curriculum={job.curriculum}; expected "
                "job.batch=1 (job.accumulate reads more windows), as each window has documents of its own, and text"
            )
    if job.validate_every is not None:
        if job.validate_every < 1:
            raise ConfigError(f"job.validate_every is {job.validate_every}; expected at least 1, or null")
        if config.data.held_out is None:
            raise ConfigError(
                f"job.validate_every is {job.validate_every}, but data.held_out is null; expected a share"
            )


def corpora(config: Config) -> tuple[Corpus, Corpus | None]:
    """What is learned from, and what is held out, if anything is.

    Raises:
        ConfigError: data.held_out leaves no file for one of them, or the source cannot be read.
    """
    corpus = open_corpus(config.data.path, config.data.suffix)
    return (corpus, None) if config.data.held_out is None else corpus.split(config.data.held_out)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Trains from the beginning, or from the checkpoint that there is, to the last step, and reports.

    Raises:
        NotFinite: the loss or the gradient of a step is; no parameter was changed by it, and nothing saved after it.
        CheckpointError: one could not be written.
        ConfigError: the checkpoint is of a run with other settings.
    """
    job = config.job
    assert isinstance(job, TrainConfig)
    group = None if context.mesh is None else context.mesh.get_group()
    corpus, held_out = corpora(config)
    _require_one_text(corpus, group)
    settings = settings_of(config, corpus, held_out)
    trainer = Trainer(config, context, corpus, None if job.validate_every is None else held_out)
    folder, path = context.output_dir / CHECKPOINTS, context.output_dir / CURVE
    begun = checkpoint.on_first(group, lambda: beginning(folder, job, settings, context.log))
    first, previous = 0, None
    if begun is not None:
        checkpoint.load(begun, trainer.state(), group=group)
        first, previous = begun.step, begun.path if begun.path.parent == folder else None
        if context.rank == 0:
            context.log(f"training resumes after step {begun.step:,}, from {begun.path}")

    every, last = job.validate_every, job.steps if job.until is None else job.until
    seconds, began = 0.0, time.perf_counter()
    pending: list[Measured] = []
    writer = None
    if context.rank == 0 and job.tensorboard:
        writer = board(context.output_dir / BOARD, first)
        if writer is None:
            context.log(f"TensorBoard is not installed: what is measured goes to {path} alone")
    with Curve(path, first, writer) if context.rank == 0 else nullcontext() as curve:
        for step in range(first + 1, last + 1):
            pending.append(trainer.step(step))
            looks = every is not None and (step % every == 0 or step == last)
            saves = step % job.save_every == 0 or step == last
            if not (looks or saves or step % job.log_every == 0):
                continue
            # Reading waits for the device; what is not finite ends the run here, before anything is saved.
            synchronize(context)
            took = time.perf_counter() - began
            rows = trainer.rows(pending, took)
            seconds += took
            pending = []
            if looks:
                rows[-1] = replace(rows[-1], held_out_bits=trainer.validate())
            said = {"loss": f"{rows[-1].loss:.4f}", "tokens_per_s": f"{rows[-1].tokens_per_second:,.0f}"}
            if rows[-1].mfu is not None:
                said["mfu"] = f"{rows[-1].mfu:.1%}"
            context.progress("train", step, last, **said)
            if curve is not None:
                curve.add(rows)
            if saves:
                if curve is not None:
                    curve.flush()
                previous = checkpoint.save(
                    folder, step, trainer.state(), group=group, settings=settings, previous=previous
                )
            began = time.perf_counter()

    peaks = checkpoint.gather(group, peak_bytes(context))
    learned = whole(trainer.model) if job.export is not None else {}
    if context.rank:
        return {}
    if job.export is not None:
        file = Path(job.export).expanduser()
        weights.export(file, trainer.model.config, learned, exported(config, settings))
    rows = read(path)
    report = {
        "seq_len": config.seq_len,
        "world_size": context.world_size,
        "device": device_name(context),
        "dtype": config.model.dtype,
        "layout": trainer.layout.name,
        "attention": trainer.texts,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "tokens_per_step": trainer.tokens,
        "steps": last,
        "resumed_after": first,
        "curve": [(row.step, row.bits_per_byte) for row in (rows[:1] + rows[-1:])],
        "answer_bits": rows[-1].answer_bits if rows else None,
        "chosen": rows[-1].chosen if rows else None,
        "held_out_bits": rows[-1].held_out_bits if rows else None,
        "held_out": None if held_out is None else held_out.fingerprint,
        "export": job.export,
        "seconds": seconds,
        "tokens_per_second": (last - first) * trainer.tokens / seconds if seconds else None,
        "mfu": rows[-1].mfu if rows else None,
        "peak_bytes": peaks,
        "checkpoint": None if previous is None else str(previous),
    }
    (context.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return {"report": _text(report, context.output_dir), **report}


def settings_of(config: Config, corpus: Corpus, held_out: Corpus | None) -> dict[str, Any]:
    """What the curve follows from, but for rounding: name -> a value of a JSON type."""
    job = config.job
    assert isinstance(job, TrainConfig)
    model = {name: value for name, value in vars(config.model).items() if name != "slice_rows"}
    named = (
        "steps",
        "learning_rate",
        "warmup",
        "weight_decay",
        "clip",
        "data_ranks",
        "batch",
        "accumulate",
        "curriculum",
    )
    return {
        **{f"model.{name}": value for name, value in model.items()},
        **{f"job.{name}": getattr(job, name) for name in named},
        "attention": repr(attention_spec(config)),
        "seq_len": config.seq_len,
        "seed": config.seed,
        "data.offset": config.data.offset,
        "data.held_out": config.data.held_out,
        "data": corpus.fingerprint,
        "held_out": None if held_out is None else held_out.fingerprint,
    }


def exported(config: Config, settings: dict[str, Any]) -> dict[str, Any]:
    """What goes into the file of weights: how they were trained, and what overrides give the same layers."""
    layers = ("dense_layers", "window_layers", "window")
    return {
        "training": settings,
        "attention": dict(config.attention),
        "layers": {name: getattr(config.model, name) for name in layers},
    }


def beginning(folder: Path, job: TrainConfig, settings: dict[str, Any], log: Callable[[str], None]) -> Saved | None:
    """The checkpoint to go on from: the run's own latest one, else job.resume, else None. For one rank.

    Raises:
        ConfigError: the run's own is of other settings, so that the two would not be one curve; or job.resume is of
            another model, or past the last step.
        CheckpointError: job.resume is damaged.
    """
    own = checkpoint.latest(folder, log)
    saved = own
    if saved is None and job.resume is not None:
        saved = checkpoint.inspect(Path(job.resume).expanduser())
    if saved is None:
        return None
    before = saved.settings
    differ = [name for name in settings if name not in before or before[name] != settings[name]]
    said = ", ".join(f"{name} was {before.get(name)!r} and is {settings[name]!r}" for name in differ)
    if own is not None and differ:
        raise ConfigError(
            f"checkpoint {saved.path} is of a run in which {said}; expected the same settings, or another output_dir "
            "with job.resume"
        )
    if {*differ} & {*_SIZES}:
        raise ConfigError(f"job.resume is {saved.path}, in which {said}; expected a checkpoint of the same sizes")
    if saved.step > job.steps:
        raise ConfigError(f"job.steps is {job.steps}, but {saved.path} is of step {saved.step}; expected more steps")
    if differ:
        log(f"the checkpoint {saved.path} is of another run: {said}")
    if saved.versions != checkpoint.VERSIONS:
        log(f"the checkpoint {saved.path} was made with {saved.versions}, and this is {checkpoint.VERSIONS}")
    return saved


def _require_one_text(corpus: Corpus, group: dist.ProcessGroup | None) -> None:
    found = checkpoint.gather(group, corpus.fingerprint)
    differ = [rank for rank, one in enumerate(found) if one != found[0]]
    if differ:
        raise ConfigError(
            f"{corpus.source} has other files or sizes on rank {', '.join(map(str, differ))} than on rank 0; "
            "expected the same text on every machine"
        )


def _text(r: dict[str, Any], folder: Path) -> str:
    """The report for a terminal."""
    resumed = f", resumed after step {r['resumed_after']:,}" if r["resumed_after"] else ""
    speed = "nothing was left to do"
    if r["tokens_per_second"]:
        speed = f"{r['tokens_per_second']:,.0f} tokens/s, {r['seconds']:.1f} s"
        if r["mfu"] is not None:
            speed += f", {r['mfu']:.1%} of the devices' bfloat16 FLOP/s in the last steps"
    lines = [
        (
            "training",
            f"{r['steps']:,} steps of {r['tokens_per_step']:,} tokens on {r['world_size']} ranks "
            f"({r['device']}, {r['dtype']}), layout {r['layout']}{resumed}",
        ),
        ("attention", "; ".join(dict.fromkeys(r["attention"]))),
        ("parameters", f"{r['parameters']:,}"),
        ("bits per byte", ", ".join(f"{bits:.4f} at step {step:,}" for step, bits in r["curve"])),
        *([("held out", f"{r['held_out_bits']:.4f} bits per byte")] if r["held_out_bits"] is not None else []),
        *([("answers", f"{r['answer_bits']:.4f} bits per byte")] if r["answer_bits"] is not None else []),
        *([("chosen", f"{r['chosen']:.1%} of the chunks that are asked for")] if r["chosen"] is not None else []),
        ("speed", speed),
        ("peak memory", ", ".join(f"rank {i}: {x / 2**30:.2f} GiB" for i, x in enumerate(r["peak_bytes"]))),
        ("curve", str(folder / CURVE)),
        ("checkpoint", str(r["checkpoint"])),
        *([("weights", r["export"])] if r["export"] else []),
        ("report", str(folder / "report.json")),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in lines)

"""job=train: the decoder learns the bytes of a text, a window of seq_len of them at a time, sharded over the ranks.

Parameters are alike on all ranks; each computes the loss and the gradients of its own rows, and these are summed. What
a step reads follows from the seed and the step's number, so a run that resumes needs parameters and the optimiser's
state, and nothing else: on CPUs and as many ranks as before it goes on bit for bit as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from distattn import checkpoint, weights
from distattn.checkpoint import Saved
from distattn.choice_loss import choice_loss
from distattn.conf.schema import Config, TrainConfig
from distattn.data import Corpus, open_corpus
from distattn.errors import CheckpointError, ConfigError, NotFinite, PeerLost
from distattn.extras import AttentionExtras
from distattn.jobs.context import Context
from distattn.jobs.curve import Curve, Row, read
from distattn.jobs.machine import device_name, peak_bytes
from distattn.jobs.prefill import layer_plans
from distattn.jobs.reading import Reader, Shard
from distattn.jobs.settings import attention_spec, check_decoder, layer_specs, model_config
from distattn.model import Decoder
from distattn.windows import CURRICULA, Window

CHECKPOINTS = "checkpoints"
CURVE = "train.csv"
BETAS = (0.9, 0.95)
# What the shapes of parameters follow from.
_SIZES = tuple(f"model.{name}" for name in ("layers", "width", "heads", "kv_heads", "head_dim", "hidden"))


def check(config: Config) -> None:
    """Finds what cannot be trained before any process starts."""
    job = config.job
    assert isinstance(job, TrainConfig)
    for name in ("steps", "batch", "accumulate", "validate_windows", "save_every"):
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
        NotFinite: the loss or the gradient of a step is; no parameter was changed by it.
        CheckpointError: one could not be written, or the ranks' parameters have come apart.
        ConfigError: the checkpoint is of a run with other settings.
    """
    job = config.job
    assert isinstance(job, TrainConfig)
    group = None if context.mesh is None else context.mesh.get_group()
    corpus, held_out = corpora(config)
    _require_one_text(corpus, group)
    settings = settings_of(config, corpus)
    trainer = Trainer(config, context, corpus)
    folder, path = context.output_dir / CHECKPOINTS, context.output_dir / CURVE
    begun = checkpoint.on_first(group, lambda: beginning(folder, job, settings, context.log))
    first, previous = 0, None
    if begun is not None:
        checkpoint.load(begun, trainer.state(), group=group)
        first, previous = begun.step, begun.path if begun.path.parent == folder else None
        if context.rank == 0:
            context.log(f"training resumes after step {begun.step:,}, from {begun.path}")

    every, last = job.validate_every, job.steps if job.until is None else job.until
    windows = [] if held_out is None or every is None else Reader(config, held_out).held_out(job.validate_windows)
    seconds = 0.0
    with Curve(path, first) if context.rank == 0 else nullcontext() as curve:
        for step in range(first + 1, last + 1):
            row = trainer.step(step)
            seconds += trainer.tokens / row.tokens_per_second
            if every is not None and (step % every == 0 or step == last):
                row = replace(row, held_out_bits=trainer.validate(windows))
            context.progress("train", step, last, loss=f"{row.loss:.4f}", tokens_per_s=f"{row.tokens_per_second:,.0f}")
            if curve is not None:
                curve.add(row)
            if step % job.save_every == 0 or step == last:
                if curve is not None:
                    curve.flush()
                require_equal(trainer.state(), step, group)
                previous = checkpoint.save(
                    folder, step, trainer.state(), group=group, settings=settings, previous=previous
                )

    peaks = checkpoint.gather(group, peak_bytes(context))
    if context.rank:
        return {}
    if job.export is not None:
        weights.export(Path(job.export).expanduser(), trainer.model, exported(config, settings))
    rows = read(path)
    report = {
        "seq_len": config.seq_len,
        "world_size": context.world_size,
        "device": device_name(context),
        "dtype": config.model.dtype,
        "layout": trainer.plans[0].layout.name,
        "attention": [plan.spec.text for plan in trainer.plans],
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
        "peak_bytes": peaks,
        "checkpoint": None if previous is None else str(previous),
    }
    (context.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return {"report": _text(report, context.output_dir), **report}


class Trainer:
    """The decoder, its optimiser, and what one step does to them."""

    def __init__(self, config: Config, context: Context, corpus: Corpus) -> None:
        job = config.job
        assert isinstance(job, TrainConfig)
        self.config, self.job, self.context, self.corpus = config, job, context, corpus
        self.group = None if context.mesh is None else context.mesh.get_group()
        self.windows = job.accumulate * job.batch
        self.tokens = config.seq_len * self.windows
        """Of a step, over all ranks."""
        self.reader = Reader(config, corpus)
        self.plans = layer_plans(config, context)
        # What is learned stays in float32 where the arithmetic is bfloat16: small updates would be lost.
        sizes = model_config(config)
        self.mixed = sizes.dtype == "bfloat16"
        self.model = Decoder(replace(sizes, dtype="float32") if self.mixed else sizes, config.seed).to(context.device)
        self.parameters = list(self.model.parameters())
        matrices, others = ([p for p in self.parameters if (p.ndim > 1) == wanted] for wanted in (True, False))
        groups = [
            {"params": matrices, "weight_decay": job.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        fused = {"fused": True} if context.device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(groups, lr=job.learning_rate, betas=BETAS, **fused)
        for p in self.parameters:  # as AdamW itself begins, but now: there must be something to read a checkpoint into
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=p.device if fused else None),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def state(self) -> checkpoint.State:
        """All that a step changes, by name; the tensors themselves, not copies."""
        named = dict(self.model.named_parameters())
        return {
            "model": {name: p.detach() for name, p in named.items()},
            "optimizer": {name: dict(self.optimizer.state[p]) for name, p in named.items()},
        }

    def step(self, step: int) -> Row:
        """One update by the windows of that step, counted from 1; the same numbers on every rank.

        Raises:
            NotFinite: the loss or the gradient is, on every rank; parameters and optimiser are as before.
            PeerLost: a rank ended or did not answer; `attend` raises it too.
        """
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.reader.step(step)
        # The weighted sum, the nats of text and of answers, and then the choice: its loss, how many are right, of all.
        sums = torch.zeros(6, dtype=torch.float64, device=self.context.device)
        for windows in parts:
            sums += self._learn(windows)
        choice = sums[3:].clone()  # on every rank that of all
        if self.group is not None:
            try:
                dist.all_reduce(sums, group=self.group)
                sum_gradients(self.parameters, self.group)
            except RuntimeError as error:
                raise PeerLost(f"step {step}: rank {self.context.rank}: summing gradients failed: {error}") from error
        asked = sum(int(window.asked.sum()) for windows in parts for window in windows)
        most = math.inf if self.job.clip is None else self.job.clip
        total = clip_grad_norm_(self.parameters, most).double()
        weighted, text, answers, lost, chosen, lookups, norm = torch.cat((sums[:3], choice, total[None])).tolist()
        loss = weighted / self.windows + lost
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(
                f"step {step}: the loss is {loss} and the norm of its gradient {norm}; expected finite numbers "
                "(a lower job.learning_rate or a longer job.warmup may help)"
            )
        rate = learning_rate(self.job, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        seconds = time.perf_counter() - began
        return Row(
            step,
            loss,
            text / (self.tokens - asked) / math.log(2),
            answers / asked / math.log(2) if asked else None,
            chosen / lookups if lookups else None,
            None,
            rate,
            norm,
            self.tokens / seconds,
        )

    @torch.no_grad()
    def validate(self, windows: Sequence[Window]) -> float:
        """Bits a byte of windows; all ranks together, and the same on each.

        Raises:
            PeerLost: a rank ended or did not answer; `attend` raises it too.
        """
        nats = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for window in windows:
            shard = Shard([window], self.plans[0], self.context.device)
            with self._autocast():
                nats += self.model.loss(self.model(shard.tokens, self.plans), shard.labels).double().sum()
        if self.group is not None:
            try:
                dist.all_reduce(nats, group=self.group)
            except RuntimeError as error:
                raise PeerLost(f"rank {self.context.rank}: summing the held-out loss failed: {error}") from error
        return nats.item() / sum(len(window.labels) for window in windows) / math.log(2)

    def _learn(self, windows: list[Window]) -> Tensor:
        """Adds the gradients of this rank's rows of windows side by side to the parameters'.

        Returns float64 [6]: see `step`; the first three of this rank's rows, the others of all.
        """
        # By position from the text, so that the last row of a shard has the first byte of the next one.
        shard = Shard(windows, self.plans[0], self.context.device)
        choices: list[Tensor] = []
        numbers: list[Tensor] = []

        def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, extras: AttentionExtras, _: Any) -> None:
            if self.plans[layer].spec.select is None:
                return
            for row, lookups in enumerate(shard.lookups):
                one = extras._replace(pool_keys=None if extras.pool_keys is None else extras.pool_keys[row : row + 1])
                lost, found = choice_loss(q[row : row + 1], k[row : row + 1], self.plans[layer], lookups, one)
                choices.append(lost / found[1].clamp(min=1))
                numbers.append(found)

        weight = self.job.choice_weight
        with self._autocast():
            hidden = self.model(shard.tokens, self.plans, observe if weight else None)
            nats = self.model.loss(hidden, shard.labels)
        weighted = (nats * shard.weights).sum()
        loss = weighted / self.windows
        found = nats.new_zeros(3, dtype=torch.float64)
        if choices:
            choice = torch.stack(choices).mean() * weight * len(windows) / self.windows
            loss = loss + choice
            found = torch.cat((choice.detach().double()[None], torch.stack(numbers).double().sum(0)))
        loss.backward()
        text, asked = ((nats.detach().double() * there).sum() for there in (~shard.asked, shard.asked))
        return torch.cat((torch.stack((weighted.detach().double(), text, asked)), found))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.context.device.type, torch.bfloat16, enabled=self.mixed)


def sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """The sum over all ranks takes the place of each gradient, by one all-reduce: parameters are whole on every rank.

    All ranks get the same bits, and the same ones whenever they sum the same numbers.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = total.view_as(p)


def learning_rate(job: TrainConfig, step: int) -> float:
    """Of a step, counted from 1: in a line up to job.learning_rate at step job.warmup, then half a cosine down to 0."""
    if step <= job.warmup:
        return job.learning_rate * step / job.warmup
    share = (step - 1 - job.warmup) / (job.steps - job.warmup)
    return job.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def settings_of(config: Config, corpus: Corpus) -> dict[str, Any]:
    """What the curve follows from, but for rounding: name -> a value of a JSON type."""
    job = config.job
    assert isinstance(job, TrainConfig)
    model = {name: value for name, value in vars(config.model).items() if name != "slice_rows"}
    named = ("steps", "learning_rate", "warmup", "weight_decay", "clip", "batch", "accumulate", "curriculum")
    return {
        **{f"model.{name}": value for name, value in model.items()},
        **{f"job.{name}": getattr(job, name) for name in (*named, "choice_weight")},
        "attention": repr(attention_spec(config)),
        "seq_len": config.seq_len,
        "seed": config.seed,
        "data.offset": config.data.offset,
        "data.held_out": config.data.held_out,
        "data": corpus.fingerprint,
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


def require_equal(state: checkpoint.State, step: int, group: dist.ProcessGroup | None) -> None:
    """Check that all ranks hold the same parameters and optimiser state, to the bit.

    Raises:
        CheckpointError: they do not; on every rank.
    """
    found = checkpoint.gather(group, _crc32(state))
    differ = [rank for rank, one in enumerate(found) if one != found[0]]
    if differ:
        raise CheckpointError(
            f"step {step}: parameters have come apart: those of rank {', '.join(map(str, differ))} are not those of "
            "rank 0; nothing was saved"
        )


def _require_one_text(corpus: Corpus, group: dist.ProcessGroup | None) -> None:
    found = checkpoint.gather(group, corpus.fingerprint)
    differ = [rank for rank, one in enumerate(found) if one != found[0]]
    if differ:
        raise ConfigError(
            f"{corpus.source} has other files or sizes on rank {', '.join(map(str, differ))} than on rank 0; "
            "expected the same text on every machine"
        )


def _crc32(state: checkpoint.State) -> int:
    crc = 0
    for x in _tensors(state):
        crc = zlib.crc32(x.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _tensors(state: checkpoint.State) -> Iterator[Tensor]:
    for value in state.values():
        if isinstance(value, Tensor):
            yield value
        else:
            yield from _tensors(value)


def _text(r: dict[str, Any], folder: Path) -> str:
    """The report for a terminal."""
    resumed = f", resumed after step {r['resumed_after']:,}" if r["resumed_after"] else ""
    speed = "nothing was left to do"
    if r["tokens_per_second"]:
        speed = f"{r['tokens_per_second']:,.0f} tokens/s, {r['seconds']:.1f} s"
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

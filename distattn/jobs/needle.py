"""job=needle: how often a trained decoder answers what is asked about a long text, and what its attention loses.

A prompt and the right answer after it are read in one pass. Greedy decoding gives just that answer if and only if each
of its bytes is the likeliest one after the prompt and the bytes before it: so one pass tells what decoding would.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from distattn import tasks, weights
from distattn.conf.schema import Config, NeedleConfig
from distattn.data import Corpus, open_corpus
from distattn.errors import ConfigError, PeerLost
from distattn.jobs import fidelity
from distattn.jobs.context import Context
from distattn.jobs.generate import check_weights, load_decoder
from distattn.jobs.machine import device_name, synchronize
from distattn.jobs.prefill import layer_plans
from distattn.jobs.settings import attention_spec, check_decoder
from distattn.model import Decoder, Observer
from distattn.plan import Plan

TRAINED, WINDOW = "trained", "window"
# A run of at most so many prompts shows each of them.
_SHOWN = 4


@dataclass(frozen=True)
class Row:
    """Prompts of one task, length, attention and depth.

    Attributes:
        attention: of the layers that are no window layers.
        depth: where the first fact is, 0 to 1. prompts: how many. right: with the whole answer. bytes_right: share of
            the answers' bytes.
        bits_per_byte: of what is read before the question.
        pairs: share of the causal pairs that are attended in the layers with this attention.
        seconds: of a pass, the fastest.
    """

    task: str
    length: int
    attention: str
    depth: float
    prompts: int
    right: int
    bytes_right: float
    bits_per_byte: float
    pairs: float
    seconds: float


def check(config: Config) -> None:
    """Finds what cannot be asked before any process starts."""
    job = _job(config)
    for name in ("depths", "samples"):
        value = getattr(job, name)
        if value is not None and value < 1:
            raise ConfigError(f"job.{name} is {value}; expected at least 1")
    if job.fidelity_rows < 0:
        raise ConfigError(f"job.fidelity_rows is {job.fidelity_rows}; expected at least 0")
    for name in ("tasks", "lengths", "attention"):
        if not getattr(job, name):
            raise ConfigError(f"job.{name} is empty; expected at least one")
    for task in job.tasks:
        if task not in tasks.TASKS:
            raise ConfigError(f"job.tasks has {task!r}; expected of {', '.join(tasks.TASKS)}")
    least = config.layout.block_q
    if min(job.lengths) < max(least, 1024):
        raise ConfigError(f"job.lengths has {min(job.lengths)}; expected at least {max(least, 1024)}")
    for name in job.attention:
        one = with_attention(config, name, max(job.lengths))
        check_decoder(one)
        spec = attention_spec(one)
        if not spec.causal or (spec.select is not None and spec.select.lookahead):
            raise ConfigError(f"job.attention has {name!r}, which lets a token depend on what follows; expected none")
    check_weights(config, weights_of(job))
    haystack(config)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Asks, and reports."""
    job = _job(config)
    text = haystack(config)
    model = load_decoder(config, context, weights_of(job))
    rows: list[Row] = []
    fidelities: list[fidelity.Fidelity] = []
    asked: list[str] = []
    total = len(job.lengths) * len(job.attention) * len(job.tasks) * (job.depths or 1) * job.samples
    done = 0
    for length in job.lengths:
        for name in job.attention:
            plans = layer_plans(with_attention(config, name, length), context)
            for number, task in enumerate(job.tasks):
                observer = None
                if job.fidelity_rows and not number:
                    layers = {*range(config.model.layers)} - {*config.model.window_layers}
                    observer = fidelity.Comparison(plans, layers, name, job.fidelity_rows, config.seed, context)
                for depth in depths_of(config, length):
                    found = []
                    for seed in range(job.samples):
                        rng = np.random.default_rng((config.seed, length, seed, int(depth * 1e6)))
                        sample = tasks.sample(task, length, text, rng, depth)
                        answered = ask(model, plans, sample, context, observer.observe if observer else None)
                        if observer is not None:
                            fidelities += observer.found
                            answered = replace(answered, seconds=answered.seconds - observer.seconds)
                            observer = None
                        found.append(answered)
                        if len(asked) < _SHOWN:
                            asked.append(_said(name, sample, answered, len(text)))
                        done += 1
                        context.progress("needle", done, total, length=f"{length:,}", attention=name)
                    rows.append(_row(task, length, name, depth, found, plans, config))
    if context.rank:
        return {}
    folder = context.output_dir
    _write(folder / "needle.csv", rows)
    if fidelities:
        _write(folder / "fidelity.csv", fidelities)
    report = {
        "device": device_name(context),
        "world_size": context.world_size,
        "dtype": config.model.dtype,
        "checkpoint": job.checkpoint,
        "rows": [vars(row) for row in rows],
        "fidelity": [vars(one) for one in fidelities],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [_table(rows)]
    if total <= _SHOWN:
        lines = [*asked, *lines]
    if fidelities:
        lines.append(fidelity.table(fidelities))
    if job.picture:
        lines.append(_pictures(rows, folder))
    lines.append(f"report            {folder / 'report.json'}; needle.csv beside it")
    return {"report": "\n\n".join(lines), **report}


@dataclass(frozen=True)
class Answered:
    """right: of the answer's bytes, the likeliest ones. size: bytes of the answer. bits: a byte before the question.

    said: what greedy decoding gives, up to the first byte that is wrong: from there on it would read its own bytes.
    """

    right: int
    size: int
    bits: float
    seconds: float
    said: bytes


@torch.no_grad()
def ask(
    model: Decoder, plans: Sequence[Plan], sample: tasks.Sample, context: Context, observe: Observer | None = None
) -> Answered:
    """One prompt with its answer, over all ranks; the same on each.

    Raises:
        PeerLost: a rank ended or did not answer; `attend` raises it too.
    """
    text = np.frombuffer(sample.prompt + sample.answer, np.uint8)
    plan, first = plans[0], len(sample.prompt)
    rows = plan.positions.numpy()
    tokens = torch.from_numpy(text[rows]).unsqueeze(0).to(context.device)
    labels = (
        torch.from_numpy(text[np.minimum(rows + 1, len(text) - 1)].astype(np.int64)).unsqueeze(0).to(context.device)
    )
    synchronize(context)
    began = time.perf_counter()
    hidden = model(tokens, plans, observe)
    foretells = np.flatnonzero((rows >= first - 1) & (rows < len(text) - 1))
    likeliest = model.logits(hidden[0, torch.from_numpy(foretells).to(context.device)]).argmax(-1).double()
    synchronize(context)
    seconds = time.perf_counter() - began
    before = torch.from_numpy(rows < first - 256).to(context.device)
    nats = model.loss(hidden, labels)[0, before].double().sum()
    sums = torch.zeros(2 + len(sample.answer), dtype=torch.float64, device=context.device)
    sums[0], sums[1] = nats, before.sum()
    sums[torch.from_numpy(rows[foretells] - first + 3).to(context.device)] = likeliest  # one rank has each
    if context.mesh is not None:
        try:
            dist.all_reduce(sums, group=context.mesh.get_group())
        except RuntimeError as error:
            raise PeerLost(f"rank {context.rank}: adding up answers failed: {error}") from error
    answer = np.array(sums[2:].tolist()).astype(np.uint8)
    hits = answer == np.frombuffer(sample.answer, np.uint8)
    said = answer[: np.append(hits, False).argmin() + 1].tobytes()
    return Answered(int(hits.sum()), len(hits), float(sums[0] / sums[1] / math.log(2)), seconds, said)


def depths_of(config: Config, length: int) -> list[float]:
    """The middles of job.depths equal parts; null: one depth, drawn for the seed and the length."""
    depths = _job(config).depths
    if depths is None:
        return [float(np.random.default_rng((config.seed, length)).random())]
    return [(n + 0.5) / depths for n in range(depths)]


def weights_of(job: NeedleConfig) -> str:
    """The path of job.checkpoint, or of the shipped weights."""
    return job.checkpoint or str(weights.SHIPPED)


def with_attention(config: Config, name: str, length: int) -> Config:
    """The configuration of a sequence of that length, with what an entry of job.attention stands for.

    Raises:
        ConfigError: there is no such file in conf/attention.
    """
    if name == TRAINED:
        return replace(config, seq_len=length)
    if name == WINDOW:
        return replace(config, seq_len=length, attention={"name": "mistral", "window": config.model.window})
    folder = files("distattn.conf") / "attention"
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name not in names:
        raise ConfigError(f"job.attention has {name!r}; expected of {', '.join((TRAINED, WINDOW, *names))}")
    around = {"seq_len": length, "seed": config.seed, "model": {"heads": config.model.heads}}
    loaded = OmegaConf.create({**around, "attention": OmegaConf.load(str(folder / f"{name}.yaml"))})
    values: Any = OmegaConf.to_container(loaded.attention, resolve=True)
    return replace(config, seq_len=length, attention=dict(values))


def haystack(config: Config) -> tasks.Bytes:
    """The text that facts are planted in: the held-out files, where there are some.

    Raises:
        ConfigError: the source cannot be read.
    """
    corpus: Corpus = open_corpus(config.data.path, config.data.suffix)
    if config.data.held_out is not None:
        corpus = corpus.split(config.data.held_out)[1]
    return corpus.read(min(config.data.offset, len(corpus) - 1), len(corpus))


def _row(
    task: str, length: int, attention: str, depth: float, found: list[Answered], plans: list[Plan], config: Config
) -> Row:
    own = [plan for layer, plan in enumerate(plans) if layer not in config.model.window_layers]
    pairs = sum(work.pairs for plan in own for work in plan.work())
    causal = sum(plan.heads * length * (length + 1) / 2 for plan in own)
    return Row(
        task,
        length,
        attention,
        round(depth, 4),
        len(found),
        sum(one.right == one.size for one in found),
        sum(one.right for one in found) / sum(one.size for one in found),
        sum(one.bits for one in found) / len(found),
        pairs / max(causal, 1),
        min(one.seconds for one in found),
    )


def _said(attention: str, sample: tasks.Sample, answered: Answered, available: int) -> str:
    """What was planted and asked, and what greedy decoding says, for a terminal."""

    def shown(text: bytes) -> str:
        return text.decode("utf-8", "replace").rstrip("\n")

    length = len(sample.prompt)
    stated = [f"{shown(sample.prompt[first:stop])}   (byte {first:,})" for first, stop in sample.evidence]
    right = answered.right == answered.size
    said = (
        f"{shown(answered.said)!r}, right" if right else f"{shown(answered.said)!r}..., wrong: {shown(sample.answer)!r}"
    )
    text = f"{length:,} bytes of a text of {available:,}" + (", which is repeated" if available < length else "")
    lines = [("read", text), *(("planted", line) for line in stated)]
    lines += [("asked", shown(sample.prompt).rpartition("\n")[2]), (attention, f"says {said}")]
    lines.append(("bits per byte", f"{answered.bits:.4f}, in {answered.seconds:.1f} s"))
    return "\n".join(f"{name:<18}{value}" for name, value in lines)


def _write(path: Path, rows: Sequence[Row] | Sequence[fidelity.Fidelity]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(vars(rows[0]))
        writer.writerows(vars(row).values() for row in rows)


def _table(rows: Sequence[Row]) -> str:
    """Accuracy by length; depths together."""
    lines = [
        f"{'task':<16}{'attention':<14}{'length':>10}{'right':>12}{'bytes':>8}{'bits/byte':>11}{'pairs':>9}{'s':>8}",
    ]
    for key in dict.fromkeys((row.task, row.attention, row.length) for row in rows):
        some = [row for row in rows if (row.task, row.attention, row.length) == key]
        right, prompts = sum(row.right for row in some), sum(row.prompts for row in some)
        share, bits = (sum(getattr(row, x) for row in some) / len(some) for x in ("bytes_right", "bits_per_byte"))
        lines.append(
            f"{key[0]:<16}{key[1]:<14}{key[2]:>10,}{f'{right} of {prompts}':>12}{share:>8.0%}{bits:>11.3f}"
            f"{some[0].pairs:>9.2%}{min(row.seconds for row in some):>8.2f}"
        )
    return "\n".join(lines)


def _pictures(rows: Sequence[Row], folder: Path) -> str:
    """Draws a heat map of each task and attention, and says where they are, or why not."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "pictures          not drawn: matplotlib is not installed (pip install distattn[plot])"
    paths = []
    for task, attention in dict.fromkeys((row.task, row.attention) for row in rows):
        some = [row for row in rows if (row.task, row.attention) == (task, attention)]
        lengths, depths = (sorted({getattr(row, x) for row in some}) for x in ("length", "depth"))
        share = np.full((len(depths), len(lengths)), np.nan)
        for row in some:
            share[depths.index(row.depth), lengths.index(row.length)] = row.right / row.prompts
        figure, axes = pyplot.subplots(
            figsize=(1.2 * len(lengths) + 2.5, 0.4 * len(depths) + 1.5), layout="constrained"
        )
        image = axes.imshow(share, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
        for (y, x), value in np.ndenumerate(share):
            shade = "white" if abs(value - 0.5) > 0.35 else "black"
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8, color=shade)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel="length (bytes)", ylabel="depth of the fact", title=f"{task}, {attention}")
        figure.colorbar(image, label="answers that are right")
        path = folder / f"{task}_{attention}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        paths.append(path.name)
    if len({row.attention for row in rows}) > 2:
        paths.append(_frontier(rows, folder, pyplot).name)
    return f"pictures          {', '.join(paths)} in {folder}"


def _frontier(rows: Sequence[Row], folder: Path, pyplot: Any) -> Path:
    """Draws accuracy by the time of a pass at the greatest length, a point for each attention, and returns the path."""
    length = max(row.length for row in rows)
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    points = []
    for name in dict.fromkeys(row.attention for row in rows):
        some = [row for row in rows if (row.attention, row.length) == (name, length)]
        seconds, right = min(row.seconds for row in some), sum(row.right for row in some)
        points.append((seconds * 1e3, right / sum(row.prompts for row in some), name))
    best = -1.0
    for number, (x, y, name) in enumerate(sorted(points, key=lambda point: (point[0], -point[1]))):
        label = f"{name}: {x:.1f} ms, {y:.0%}"
        marker = "osD^vP*X"[number % 8]
        axes.scatter(x, y, s=70, marker=marker, label=label, zorder=3, edgecolors="black" if y > best else "none")
        best = max(best, y)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    axes.set(xlabel="milliseconds of a pass", ylabel="answers that are right", ylim=(-0.05, 1.15), xscale="log")
    axes.set_title(f"{length:,} bytes; with an edge: none is both faster and better")
    axes.grid(alpha=0.3)
    path = folder / "frontier.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _job(config: Config) -> NeedleConfig:
    assert isinstance(config.job, NeedleConfig)
    return config.job

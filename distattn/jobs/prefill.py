"""job=prefill: a decoder reads a long text, sharded over ranks, and its attention is checked against the oracle."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn import hierarchy_rows, reference
from distattn.attend import Selection
from distattn.conf.schema import Config, PrefillConfig
from distattn.data import IGNORE, open_corpus
from distattn.errors import ConfigError
from distattn.extras import AttentionExtras
from distattn.jobs.context import Context
from distattn.jobs.machine import device_name, peak_bytes, synchronize
from distattn.jobs.sampled import Sampled
from distattn.jobs.settings import attention_spec, check_decoder, layer_specs, model_config, plan_options
from distattn.layout import Layout
from distattn.model import DTYPES, Decoder
from distattn.operators import sent
from distattn.patterns import Documents
from distattn.plan import Plan, make_plan
from distattn.spans import Ints

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}


def check(config: Config) -> None:
    """Finds a text that is missing or too short before any process starts."""
    open_corpus(config.data.path, config.data.suffix).require(config.seq_len, config.data.offset)
    check_decoder(config)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Reads, runs the model, and reports. The exit code is 1 if a sampled row is not what the oracle says."""
    job = config.job
    assert isinstance(job, PrefillConfig)
    started = time.perf_counter()
    corpus = open_corpus(config.data.path, config.data.suffix)
    plans = layer_plans(config, context)
    plan = plans[0]
    tokens = torch.from_numpy(corpus.read_segments(plan.segments, config.data.offset)).unsqueeze(0).to(context.device)
    labels = torch.from_numpy(corpus.labels(plan.segments, config.data.offset)).unsqueeze(0).to(context.device)
    model = Decoder(model_config(config), config.seed).to(context.device)
    itemsize = DTYPES[config.model.dtype].itemsize
    checker = _Checker(plans, context, min(job.sample_rows, config.seq_len), config.seed)
    planned, sent_before = sum(p.sent_bytes(itemsize) for p in plans), dict(sent.sent)
    planning = time.perf_counter() - started

    context.progress("prefill", 0, config.model.layers + 1)
    synchronize(context)
    start = time.perf_counter()
    with torch.no_grad(), _trace(job.trace, context) as save_trace:
        hidden = model(tokens, plans, observe=checker.observe)
        context.progress("loss", config.model.layers, config.model.layers + 1)
        nats = model.loss(hidden, labels).double().sum()
    synchronize(context)
    seconds = time.perf_counter() - start - checker.seconds
    save_trace()
    context.progress("done", config.model.layers + 1, config.model.layers + 1)

    totals = torch.stack((nats.cpu(), (labels != IGNORE).sum().cpu().double()))
    travelled = {kind: n - sent_before.get(kind, 0) for kind, n in sent.sent.items()}
    chosen = travelled.pop("selected", 0)
    mine = _Rank(plan.tokens, planned, sum(travelled.values()), chosen, peak_bytes(context), seconds)
    ranks = [mine]
    if context.mesh is not None:
        group = context.mesh.get_group()
        totals = totals.to(context.device)
        dist.all_reduce(totals, group=group)
        every: list[Any] = [None] * context.world_size
        dist.all_gather_object(every, mine, group=group)
        ranks = every
    if context.rank:
        return {}
    errors = checker.errors
    tolerance = TOLERANCE[config.model.dtype]
    report = {
        "seq_len": config.seq_len,
        "world_size": context.world_size,
        "device": device_name(context),
        "dtype": config.model.dtype,
        "layout": plan.layout.name,
        "attention": [p.spec.text for p in plans],
        "selects": any(p.spec.select is not None for p in plans),
        "bits_per_byte": float(totals[0] / totals[1] / math.log(2)),
        "seconds": max(r.seconds for r in ranks),
        "tokens_per_second": config.seq_len / max(r.seconds for r in ranks),
        "planning_and_loading_seconds": planning,
        "checking_seconds": checker.seconds,
        **_arithmetic(plans),
        "bytes_planned": [r.planned for r in ranks],
        "bytes_sent": [r.sent for r in ranks],
        "bytes_chosen": [r.chosen for r in ranks],
        "peak_bytes": [r.peak for r in ranks],
        "sampled_rows": len(checker.positions),
        "max_error": errors,
        "tolerance": tolerance,
        "exact": bool(max(errors, default=math.inf) <= tolerance),
    }
    context.output_dir.mkdir(parents=True, exist_ok=True)
    (context.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    text = _text(report, context.output_dir)
    if job.picture:
        text = f"{text}\npicture           {_picture(plan, context.output_dir / 'pattern.png')}"
    agree = report["bytes_planned"] == report["bytes_sent"]
    verdict = "exact to the pattern" if report["exact"] else "NOT exact to the pattern"
    text += f"\n\n{verdict}" + ("" if agree else "; bytes sent are NOT the bytes planned")
    return {"report": text, "exit_code": 0 if report["exact"] and agree else 1, **report}


def _picture(plan: Plan, path: Path) -> str:
    """Where it is, or why it is not: the numbers of a job that is done are told without matplotlib, too."""
    try:
        return str(plan.picture(path))
    except ConfigError as error:
        return f"not drawn: {error}"


def layer_plans(
    config: Config,
    context: Context,
    data_ranks: int = 1,
    documents: Ints | None = None,
    layout: Layout | None = None,
) -> list[Plan]:
    """One plan a layer, all with the layout that suits `attention`.

    Args:
        data_ranks: into how many groups the ranks are divided; of this rank's group.
        documents: lengths of what lies in the sequence, if attention is not to leave it.
        layout: of other plans, whose rows these take; None: chosen.
    """
    options, mesh = plan_options(config), context.mesh_for(config.layout.head_ranks, data_ranks)
    specs = layer_specs(config)
    if layout is None:
        layout = make_plan(attention_spec(config), mesh=mesh, **options).layout
    if documents is not None:
        inside = Documents(documents)
        specs = [replace(spec, tokens=spec.tokens & inside) for spec in specs]
    return [make_plan(spec, mesh=mesh, **options | {"layout": layout}) for spec in specs]


@dataclass(frozen=True)
class _Rank:
    tokens: int
    planned: int
    sent: int
    chosen: int
    peak: int
    seconds: float


@dataclass
class _Checker:
    """Compares sampled query rows of every layer with the float64 oracle, each rank over the keys that it owns."""

    plans: list[Plan]
    context: Context
    rows: int
    seed: int
    errors: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        seq_len = self.plans[0].seq_len
        # One row from each of `rows` equal depths, the first and the last position among them.
        edges = np.linspace(0, seq_len, self.rows + 1).astype(np.int64)
        random = np.random.default_rng(self.seed)
        self.positions = edges[:-1] + random.integers(0, np.maximum(np.diff(edges), 1))
        self.positions[0], self.positions[-1] = 0, seq_len - 1

    def observe(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        extras: AttentionExtras,
        selection: Selection | None,
    ) -> None:
        synchronize(self.context)
        start = time.perf_counter()
        plan = self.plans[layer]
        sampled = Sampled(plan, self.positions, self.context)
        rows, got = (sampled.everywhere(x[0, sampled.mine]).unsqueeze(0) for x in (q, out))
        more: list[reference.Part] = []
        if plan.spec.is_static:
            part, part_lse = reference.attention_rows(
                rows, torch.from_numpy(self.positions), k, v, plan.spec.tokens, key_positions=plan.positions
            )
        else:
            chosen = None
            if selection is not None:
                spec = selection.spec
                tile = 1 if spec is None or spec.per == "token" else spec.chunk
                chosen = sampled.chosen(selection.chunks, tile).cpu()
            (part, part_lse), summaries = hierarchy_rows.attention_rows(
                rows,
                self.positions.tolist(),
                k,
                v,
                plan.spec,
                plan.seq_len,
                key_positions=plan.positions,
                chosen=chosen,
                extras=extras,
                total=sampled.total,
            )
            more.append(summaries)
        expected, _ = sampled.merged(part, part_lse, more)
        self.errors.append(reference.max_error(got, expected))
        self.context.progress("prefill", layer + 1, len(self.plans) + 1)
        self.seconds += time.perf_counter() - start


def _arithmetic(plans: list[Plan]) -> dict[str, float]:
    """Attended pairs and floating-point operations of all layers and ranks, beside those of dense causal attention."""
    per_pair = 2 * (plans[0].head_dim + plans[0].value_dim)
    pairs = sum(w.pairs for p in plans for w in p.work())
    causal = sum(p.heads * p.seq_len * (p.seq_len + 1) / 2 for p in plans)
    matrix = sum(float(p.heads) * p.seq_len**2 for p in plans)
    return {
        "share_of_score_matrix": pairs / matrix,
        "share_of_causal_pairs": pairs / causal,
        "attention_flops": pairs * per_pair,
        "visited_tile_flops": sum(w.flops for p in plans for w in p.work()),
        "dense_causal_flops": causal * per_pair,
    }


def _trace(wanted: bool, context: Context) -> Any:
    """A context manager that gives a function which writes the Chrome trace of what ran inside."""
    if not wanted:
        return nullcontext(lambda: None)
    return _Trace(context.output_dir / f"trace_rank{context.rank}.json")


class _Trace:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.profiler = torch.profiler.profile()

    def __enter__(self) -> Callable[[], None]:
        self.profiler.__enter__()
        return lambda: self.profiler.export_chrome_trace(str(self.path))

    def __exit__(self, *error: Any) -> None:
        self.profiler.__exit__(*error)


def _text(r: dict[str, Any], folder: Path) -> str:
    """The report for a terminal."""
    by_rank = [f"{p / 1e6:,.2f} / {s / 1e6:,.2f}" for p, s in zip(r["bytes_planned"], r["bytes_sent"], strict=True)]
    lines = [
        ("tokens", f"{r['seq_len']:,} on {r['world_size']} ranks ({r['device']}, {r['dtype']}), layout {r['layout']}"),
        ("attention", "; ".join(dict.fromkeys(r["attention"]))),
        ("bits per byte", f"{r['bits_per_byte']:.4f}"),
        ("speed", f"{r['tokens_per_second']:,.0f} tokens/s, {r['seconds']:.1f} s"),
        (
            "attended",
            f"{r['share_of_score_matrix']:.4%} of the score matrix, "
            f"{r['share_of_causal_pairs']:.4%} of its causal half",
        ),
        (
            "attention FLOPs",
            f"{r['attention_flops']:.3g} (in visited tiles {r['visited_tile_flops']:.3g}), "
            f"dense causal {r['dense_causal_flops']:.3g}: "
            f"{r['dense_causal_flops'] / max(r['visited_tile_flops'], 1):,.0f} times more",
        ),
        ("MB planned / sent", ", ".join(f"rank {i}: {x}" for i, x in enumerate(by_rank))),
        *(
            [("MB chosen", ", ".join(f"rank {i}: {n / 1e6:,.2f}" for i, n in enumerate(r["bytes_chosen"])))]
            if r["selects"]
            else []
        ),
        ("peak memory", ", ".join(f"rank {i}: {x / 2**30:.2f} GiB" for i, x in enumerate(r["peak_bytes"]))),
        (
            "oracle",
            f"{r['sampled_rows']} rows a layer at every depth, float64: error "
            f"{', '.join(f'{e:.1e}' for e in r['max_error'])} by layer (tolerance {r['tolerance']:g})",
        ),
        ("report", str(folder / "report.json")),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in lines)

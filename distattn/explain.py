"""What `Plan.explain` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from distattn.cost import Prediction, Work
from distattn.forecast import plan_peak_bytes, predict
from distattn.heads import HeadsPlan
from distattn.kernels.attention import choose_by_shape
from distattn.machine import Machine
from distattn.prediction import assumptions

if TYPE_CHECKING:
    from distattn.plan import Plan

# More ranks than this are summed up.
_RANKS_SHOWN = 16
# Stages of more ranks than this are not listed.
_STAGES_SHOWN = 64


def explain(plan: Plan, itemsize: int, machine: Machine) -> str:
    """A table of all ranks, one of this rank's stages, and what was assumed."""
    work = plan.work(itemsize)
    forward, backward = (predict(plan, machine, itemsize, backward=way) for way in (False, True))
    tokens = plan.layout.tokens().tolist()
    peaks = [plan_peak_bytes(plan, itemsize, backward=way) for way in (False, True)]
    rows = [
        _row(rank, tokens[rank], work[rank], [float(peak[rank]) for peak in peaks], forward, plan)
        for rank in _shown(forward)
    ]
    header = (
        "rank",
        "tokens",
        "tiles",
        "pairs",
        "of dense",
        "TFLOP",
        "sent MB",
        "received MB",
        "peak MB",
        "with backward",
        "time ms",
        "bound by",
    )
    pairs = sum(w.pairs for w in work)
    flops = sum(w.flops for w in work)
    dense = float(plan.heads) * plan.seq_len * plan.seq_len
    mean = sum(w.flops for w in work) / plan.world_size
    text = [
        plan.spec.text if len(plan.spec.text) < 400 else f"{plan.spec.text[:397]}...",
        f"{plan.seq_len:,} tokens on {plan.world_size:,} ranks, "
        + (f"of which each {len(plan.plans)} exchange heads, " if isinstance(plan, HeadsPlan) else "")
        + f"layout {plan.layout.name}, schedule {plan.schedule}, "
        f"{plan.heads} query and {plan.kv_heads} key/value heads of {plan.head_dim}, "
        f"tiles of {plan.block_q} x {plan.block_k}",
        "",
        *table(header, rows),
        "",
        f"All ranks: {pairs:,.0f} pairs, {pairs / dense:.4%} of the score matrix; {flops / 1e12:,.3f} TFLOP in visited "
        f"tiles; {sum(w.bytes_sent for w in work) / 1e6:,.1f} MB travel.",
        f"Balance: the busiest rank has {max(w.flops for w in work) / max(mean, 1e-30):.3f} times the mean work.",
        f"Predicted forward pass, one layer: {_parts(forward)}.",
        f"Predicted backward pass: {_parts(backward)}.",
        *(f"  {line}" for line in assumptions(machine, plan.world_size)),
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {2: torch.bfloat16, 4: torch.float32}.get(itemsize, torch.float64)
    kernel, why = choose_by_shape(device, dtype, plan.block_q, plan.block_k, plan.head_dim, plan.value_dim)
    text.append(f"Kernels on this machine for {str(dtype).removeprefix('torch.')}: {kernel}, since {why}.")
    if 1 < plan.world_size <= _STAGES_SHOWN:
        text += ["", *_stages(plan, itemsize)]
    return "\n".join(text)


def _shown(time: Prediction) -> list[int]:
    """All ranks; of many the first, the last, and the slowest."""
    world_size = len(time.total)
    if world_size <= _RANKS_SHOWN:
        return [*range(world_size)]
    return sorted({*range(4), time.slowest, *range(world_size - 4, world_size)})


def _parts(time: Prediction) -> str:
    """The slowest rank's time, and of what it is made."""
    rank = time.slowest
    names = ("compute", "copies", "exposed", "exchange", "host")
    ms = {name: 1e3 * float(getattr(time, name)[rank]) for name in names}
    return (
        f"{1e3 * time.seconds:,.3f} ms on rank {rank}, bound by {time.bound(rank)}: {ms['compute']:,.3f} ms of "
        f"kernels, {ms['copies']:,.3f} of copies, {ms['exposed']:,.3f} of waiting for exchanges, which take "
        f"{ms['exchange']:,.3f}; the host is busy for {ms['host']:,.3f}"
    )


def _row(rank: int, tokens: int, work: Work, peaks: Sequence[float], time: Prediction, plan: Plan) -> tuple[str, ...]:
    dense = float(plan.heads) * tokens * plan.seq_len
    return (
        str(rank),
        f"{tokens:,}",
        f"{work.tiles:,.0f}",
        f"{work.pairs:,.0f}",
        f"{work.pairs / max(dense, 1):.3%}",
        f"{work.flops / 1e12:,.4f}",
        f"{work.bytes_sent / 1e6:,.2f}",
        f"{work.bytes_received / 1e6:,.2f}",
        *(f"{peak / 1e6:,.1f}" for peak in peaks),
        f"{1e3 * float(time.total[rank]):,.3f}",
        time.bound(rank),
    )


def _stages(plan: Plan, itemsize: int) -> list[str]:
    said = f"Stages of rank {plan.rank}"
    if isinstance(plan, HeadsPlan):
        said, plan = f"{said}, among the ranks that have its heads", plan.inner
    row_bytes = itemsize * (plan.head_dim + plan.value_dim)
    rows = []
    for number, stage in enumerate(plan.stages):
        kinds = ", ".join(dict.fromkeys(t.kind for t in stage.transfers if t.sends or t.receives)) or "none"
        sent = sum(t.sent_bytes(row_bytes, plan.rank, plan.world_size) for t in stage.transfers)
        received = sum(t.received_bytes(row_bytes, plan.rank, plan.world_size) for t in stage.transfers)
        visits = stage.table
        tiles = (visits.full_pages + visits.part_pages).reshape(visits.tables, -1).sum(axis=1)
        total = int((visits.heads_by_table * tiles).sum())
        rows.append((str(number), kinds, f"{sent / 1e6:,.2f}", f"{received / 1e6:,.2f}", f"{total:,}"))
    return [f"{said}:"] + table(("stage", "exchange", "sent MB", "received MB", "tiles"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are flush right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    return ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in (header, *rows)]

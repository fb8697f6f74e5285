"""What `Plan.explain` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from distattn.cost import Machine, Prediction, Work, step_time
from distattn.heads import HeadsPlan
from distattn.kernels.attention import choose_by_shape

if TYPE_CHECKING:
    from distattn.plan import Plan

# More ranks than this are summed up.
_RANKS_SHOWN = 16
# Stages of more ranks than this are not listed.
_STAGES_SHOWN = 64


def explain(plan: Plan, itemsize: int, machine: Machine) -> str:
    """A table of all ranks, one of this rank's stages, and what was assumed."""
    work = plan.work(itemsize)
    times = [step_time(machine, w) for w in work]
    tokens = plan.layout.tokens().tolist()
    memory = [peak_bytes(plan, rank, w, itemsize) for rank, w in enumerate(work)]
    rows = [_row(str(r), tokens[r], work[r], memory[r], times[r], plan) for r in range(plan.world_size)]
    if plan.world_size > _RANKS_SHOWN:
        slowest = max(range(plan.world_size), key=lambda r: times[r].total)
        shown = [*range(4), slowest, *range(plan.world_size - 4, plan.world_size)]
        rows = [rows[r] for r in dict.fromkeys(sorted(shown))]
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
        "time ms",
        "bound by",
    )
    pairs = sum(w.pairs for w in work)
    flops = sum(w.flops for w in work)
    dense = float(plan.heads) * plan.seq_len * plan.seq_len
    worst = max(t.total for t in times)
    mean = sum(w.flops for w in work) / plan.world_size
    text = [
        plan.spec.text if len(plan.spec.text) < 400 else f"{plan.spec.text[:397]}...",
        f"{plan.seq_len:,} tokens on {plan.world_size:,} ranks, "
        + (f"of which each {len(plan.plans)} exchange heads, " if isinstance(plan, HeadsPlan) else "")
        + f"layout {plan.layout.name}, schedule {plan.schedule}, "
        f"{plan.heads} query and {plan.kv_heads} key/value heads of {plan.head_dim}, "
        f"tiles of {plan.block_q} x {plan.block_k}",
        "",
        *_table(header, rows),
        "",
        f"All ranks: {pairs:,.0f} pairs, {pairs / dense:.4%} of the score matrix; {flops / 1e12:,.3f} TFLOP in visited "
        f"tiles; {sum(w.bytes_sent for w in work) / 1e6:,.1f} MB travel.",
        f"Balance: the busiest rank has {max(w.flops for w in work) / max(mean, 1e-30):.3f} times the mean work.",
        f"Predicted forward pass, one layer: {worst * 1e3:,.3f} ms on {machine.name}: "
        f"{machine.flops / 1e12:g} TFLOP/s, {machine.bandwidth / 1e9:g} GB/s, {machine.latency * 1e6:g} us a rank.",
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {2: torch.bfloat16, 4: torch.float32}.get(itemsize, torch.float64)
    kernel, why = choose_by_shape(device, dtype, plan.block_q, plan.block_k, plan.head_dim, plan.value_dim)
    text.append(f"Kernels on this machine for {str(dtype).removeprefix('torch.')}: {kernel}, since {why}.")
    if 1 < plan.world_size <= _STAGES_SHOWN:
        text += ["", *_stages(plan, itemsize)]
    return "\n".join(text)


def peak_bytes(plan: Plan, rank: int, work: Work, itemsize: int) -> float:
    """Bytes that a rank holds in a forward pass: q, k, v, out, lse, guests, and a ring's float32 output."""
    wide = max(itemsize, 4)
    tokens = int(plan.layout.tokens()[rank])
    per_pair = (plan.head_dim + plan.value_dim) * itemsize
    held = tokens * (plan.heads + plan.kv_heads) * per_pair + tokens * plan.heads * wide
    if isinstance(plan, HeadsPlan):
        shard, at = divmod(rank, len(plan.plans))
        return held + peak_bytes(plan.plans[at], shard, work, itemsize)
    guest_rows = work.guest_rows
    if plan.schedule == "ring":
        guest_rows = min(guest_rows, 2 * int(plan.layout.tokens().max()))
        held += tokens * plan.heads * plan.value_dim * wide
    queries = len(plan.outline.sharing.queries) * plan.heads
    return (
        held
        + guest_rows * plan.kv_heads * per_pair
        + queries * (plan.head_dim * itemsize + (plan.value_dim + 1) * wide)
    )


def _row(name: str, tokens: int, work: Work, memory: float, time: Prediction, plan: Plan) -> tuple[str, ...]:
    dense = float(plan.heads) * tokens * plan.seq_len
    return (
        name,
        f"{tokens:,}",
        f"{work.tiles:,.0f}",
        f"{work.pairs:,.0f}",
        f"{work.pairs / max(dense, 1):.3%}",
        f"{work.flops / 1e12:,.4f}",
        f"{work.bytes_sent / 1e6:,.2f}",
        f"{work.bytes_received / 1e6:,.2f}",
        f"{memory / 1e6:,.1f}",
        f"{time.total * 1e3:,.3f}",
        time.bound,
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
        table = stage.table
        share = [table.head_table.count(i) for i in range(table.tables)]
        tiles = (table.full_pages + table.part_pages).reshape(table.tables, -1).sum(axis=1)
        total = sum(n * int(t) for n, t in zip(share, tiles, strict=True))
        rows.append((str(number), kinds, f"{sent / 1e6:,.2f}", f"{received / 1e6:,.2f}", f"{total:,}"))
    return [f"{said}:"] + _table(("stage", "exchange", "sent MB", "received MB", "tiles"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    return ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in (header, *rows)]

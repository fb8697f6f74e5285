"""job=verify: every preset and layout on 1 to 4 ranks, forward and gradients, against the float64 oracle.

Where a preset is a pattern and no more, also on ranks that exchange heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distattn import presets, reference
from distattn.attend import attend
from distattn.conf.schema import Config, VerifyConfig
from distattn.extras import AttentionExtras, Mlp, MlpPool
from distattn.heads import refusal
from distattn.hierarchy_reference import hierarchical
from distattn.jobs.context import Context
from distattn.layout import LAYOUTS
from distattn.operators import sent
from distattn.plan import SCHEDULES, make_plan
from distattn.spec import AttentionSpec

CPU_RANKS = 4

# Odd, so that no tile, page or shard divides it.
LENGTH = 211
BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32
BLOCK = 16
# In which ranks exchange heads along the second dimension.
MESHES = ((1, 2), (1, 4), (2, 2))

CASES: dict[str, AttentionSpec] = {
    "dense": presets.dense(),
    "dense, not causal": presets.dense(causal=False),
    "mistral": presets.mistral(40),
    "longformer": presets.longformer(16, global_tokens=(0, 70, 150)),
    "longformer, dilated": presets.longformer(8, dilation=3, global_tokens=range(4), causal=True),
    "bigbird": presets.bigbird(16, 3, 2, 1, 0, LENGTH),
    "sparse_transformer_strided": presets.sparse_transformer_strided(24),
    "sparse_transformer_fixed": presets.sparse_transformer_fixed(24, 2),
    "etc": presets.etc((50, 61, 40, 60), 12),
    "streaming_llm": presets.streaming_llm(4, 30),
    "spattention": presets.spattention(HEADS, LENGTH),
    "combiner": presets.combiner(32, (16, 64), (2,)),
    "hierarchical": presets.hierarchical(32, (16, 64), (2,), 3, global_tokens=(0, 100), global_keys=(70,)),
    "hierarchical, by tile": presets.hierarchical(32, (16, 64), (2,), 3, "tile", "mass", causal=False),
    "moba": presets.moba(16, 3),
    "nsa": presets.nsa(16, 8, 16, 5, 24),
    "delta": presets.with_delta(presets.streaming_llm(4, 30), 16),
}


@dataclass
class Row:
    """The largest errors of one preset on one mesh."""

    forward: float = 0.0
    gradient: float = 0.0
    low_precision: float = 0.0
    bytes_agree: bool = True


def run(config: Config, context: Context) -> dict[str, Any]:
    """Prints a table of errors. The exit code is 1 if any is over its tolerance, or if bytes are not as planned."""
    job = config.job
    assert isinstance(job, VerifyConfig)
    meshes = _meshes(context)
    rows: dict[tuple[str, str], Row] = {}
    for done, (name, spec) in enumerate(CASES.items()):
        context.progress("verify", done, len(CASES))
        inputs = _inputs(config.seed + done)
        expected = _oracle(spec, inputs) if context.rank == 0 else None
        for shape, mesh in meshes.items():
            if refusal(spec, HEADS, KV_HEADS, math.prod(shape[1:])):
                continue
            row = rows.setdefault((name, " x ".join(map(str, shape))), Row())
            for layout, schedule in _arrangements(shape):
                for dtype in (torch.float32, torch.bfloat16):
                    # Low precision does not depend on where rows lie: one layout stands for all. But choices
                    # depend on precision: the oracle's would be others.
                    if dtype == torch.float32 or (layout == LAYOUTS[0] and spec.select is None):
                        _check(row, spec, inputs, expected, layout, schedule, mesh, math.prod(shape), dtype, context)
    context.progress("verify", len(CASES), len(CASES))
    if context.rank:
        return {}
    failed = [
        row
        for row in rows.values()
        if max(row.forward, row.gradient) > job.tolerance_float32
        or row.low_precision > job.tolerance_bfloat16
        or not row.bytes_agree
    ]
    text = [f"{'preset':<28}ranks  forward   gradients  bfloat16  bytes as planned"]
    for (name, on), row in rows.items():
        low = f"{row.low_precision:.1e}" if CASES[name].select is None else "-      "
        errors = f"{row.forward:.1e}   {row.gradient:.1e}    {low}"
        text.append(f"{name:<28}{on:>5}  {errors}   {'yes' if row.bytes_agree else 'NO'}")
    text.append(
        "\nRanks of n x m exchange heads by m. "
        f"Error is max|x - oracle| / max(1, max|oracle|), the largest over {len(LAYOUTS)} layouts and "
        f"{len(SCHEDULES)} schedules. "
        f"Tolerance {job.tolerance_float32:g} in float32, {job.tolerance_bfloat16:g} in bfloat16, "
        "which is not tried where chunks are chosen: rounded inputs choose others."
    )
    text.append(
        "all within tolerance" if not failed else f"{len(failed)} of {len(rows)} lines are NOT within tolerance"
    )
    return {"report": "\n".join(text), "exit_code": 1 if failed else 0}


def _meshes(context: Context) -> dict[tuple[int, ...], DeviceMesh | None]:
    """By shape; of the first ranks, but None where this rank is not among them or is alone."""
    meshes: dict[tuple[int, ...], DeviceMesh | None] = {(1,): None}
    for shape in [*((ranks,) for ranks in range(2, context.world_size + 1)), *MESHES]:
        ranks = torch.arange(math.prod(shape)).view(shape)
        if ranks.numel() > context.world_size:
            continue
        mine = []
        for dim, size in enumerate(shape):
            for members in ranks.movedim(dim, -1).reshape(-1, size).tolist():
                group = dist.new_group(members)  # all ranks take part in making each
                if context.rank in members:
                    mine.append(group)
        names = ("sequence", "heads")[: len(shape)]
        inside = context.rank < ranks.numel()
        meshes[shape] = (
            DeviceMesh.from_group(mine, context.device.type, ranks, mesh_dim_names=names) if inside else None
        )
    return meshes


def _arrangements(shape: tuple[int, ...]) -> list[tuple[str, str]]:
    """Layouts and schedules to try: all pairs of them, but each layout with one schedule where heads are exchanged."""
    if shape[0] == 1:
        return [(LAYOUTS[0], "direct")]
    return list(product(LAYOUTS, SCHEDULES) if len(shape) == 1 else zip(LAYOUTS, cycle(SCHEDULES), strict=False))


def _inputs(seed: int) -> list[Tensor]:
    """q, k, v, and what the outputs are multiplied by; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _extras(spec: AttentionSpec) -> AttentionExtras:
    """Gates and parameters of an MLP, where the spec asks for them; the same on every rank."""
    if spec.merge != "gate":
        return AttentionExtras()
    generator = torch.Generator().manual_seed(0)
    members, hidden = spec.summaries[0].chunk, 16
    shapes = ((members, HEAD_DIM), (hidden, members * HEAD_DIM), (hidden,), (HEAD_DIM, hidden))
    mlps = [Mlp(*(0.1 * torch.randn(shape, generator=generator) for shape in shapes)) for _ in range(2)]
    return AttentionExtras(torch.randn(BATCH, LENGTH, HEADS, 3, generator=generator), (MlpPool(*mlps),))


def _oracle(spec: AttentionSpec, inputs: list[Tensor]) -> list[Tensor]:
    """out, dq, dk, dv in float64."""
    q, k, v, weight = (x.double() for x in inputs)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    out = hierarchical(q, k, v, spec, _extras(spec)).out
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), qkv)]


def _check(
    row: Row,
    spec: AttentionSpec,
    inputs: list[Tensor],
    expected: list[Tensor] | None,
    layout: str,
    schedule: str,
    mesh: DeviceMesh | None,
    ranks: int,
    dtype: torch.dtype,
    context: Context,
) -> None:
    if context.rank >= ranks:
        return
    plan = make_plan(
        spec,
        LENGTH,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        mesh=mesh,
        layout=layout,
        schedule=schedule,
        block_q=BLOCK,
        block_k=BLOCK,
    )
    q, k, v, weight = (plan.shard(x).to(context.device, dtype) for x in inputs)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    before = sent.total - sent.sent.get("selected", 0)
    extras = _extras(spec)
    if extras.gates is not None:
        parameters = [Mlp(*(x.to(context.device, dtype) for x in mlp)) for mlp in extras.pool[0] or ()]
        gates = plan.shard(extras.gates).to(context.device, dtype)
        extras = AttentionExtras(gates, (MlpPool(*parameters),))
    out = attend(q, k, v, plan, extras=extras)
    grads = torch.autograd.grad((out * weight).sum(), qkv)
    planned = plan.sent_bytes(dtype.itemsize, BATCH) + plan.sent_bytes_backward(dtype.itemsize, BATCH)
    row.bytes_agree &= sent.total - sent.sent.get("selected", 0) - before == planned
    got = [plan.unshard(x.detach()).cpu() for x in (out, *grads)]
    if expected is None:
        return
    errors = [reference.max_error(x, y) for x, y in zip(got, expected, strict=True)]
    if dtype == torch.bfloat16:
        row.low_precision = max(row.low_precision, *errors)
    else:
        row.forward, row.gradient = max(row.forward, errors[0]), max(row.gradient, *errors[1:])

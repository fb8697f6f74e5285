"""Ranks that exchange heads: forward and gradients on meshes of two dimensions against the oracle; bytes; errors."""

import functools
import math
from typing import Any, NamedTuple

import pytest
import torch
from rank_pool import RankError, RankPool
from torch.distributed.device_mesh import DeviceMesh

from distattn import presets, reference
from distattn.attend import attend
from distattn.errors import ConfigError, PlanMismatch
from distattn.heads import HeadsPlan
from distattn.hierarchy_reference import hierarchical
from distattn.jobs.context import Context
from distattn.operators import sent
from distattn.patterns import Causal, Dense, GlobalTokens, PerHead, SlidingWindow
from distattn.plan import Plan, make_plan
from distattn.spec import AttentionSpec

WINDOW = Causal() & (SlidingWindow(40, 0) | GlobalTokens((0, 90)))
SPECS = {
    "window": AttentionSpec(WINDOW),
    "dense": presets.dense(),
    "per_head": AttentionSpec(
        PerHead((Causal(), SlidingWindow(9, 0), SlidingWindow(9, 9) | GlobalTokens([50]), Dense()))
    ),
    "delta": presets.with_delta(presets.streaming_llm(4, 30), 16),
}


class Case(NamedTuple):
    spec: str
    mesh: tuple[int, int]
    kv_heads: int
    layout: str
    schedule: str
    length: int
    dtype: torch.dtype = torch.float32


MESHES = [(1, 2), (2, 1), (1, 4), (2, 2), (1, 3)]
CASES = [
    Case("window", (1, 2), 4, "contiguous", "direct", 149),
    Case("window", (1, 2), 1, "contiguous", "direct", 150, torch.bfloat16),
    Case("per_head", (1, 2), 2, "striped", "direct", 151),
    Case("delta", (1, 2), 2, "contiguous", "direct", 152),
    Case("per_head", (2, 1), 2, "zigzag", "ring", 153),
    Case("dense", (1, 4), 1, "contiguous", "direct", 154),
    Case("window", (1, 4), 2, "contiguous", "direct", 155),
    Case("per_head", (1, 4), 4, "contiguous", "direct", 35),  # fewer tiles than ranks: one has no rows
    Case("window", (2, 2), 4, "contiguous", "direct", 157),
    Case("window", (2, 2), 2, "striped", "ring", 158),
    Case("dense", (2, 2), 4, "zigzag", "slices", 159),
    Case("dense", (2, 2), 2, "zigzag", "ring", 160, torch.bfloat16),
    Case("dense", (2, 2), 1, "contiguous", "slices", 161),
    Case("per_head", (2, 2), 4, "striped", "direct", 162),
    Case("per_head", (2, 2), 2, "zigzag", "ring", 163),
    Case("per_head", (2, 2), 1, "contiguous", "slices", 164),
    Case("delta", (2, 2), 2, "balanced", "direct", 165),
]
SIZES: dict[str, Any] = {"heads": 4, "head_dim": 32, "value_dim": 16, "block_q": 16, "block_k": 16}


@functools.cache
def mesh_of(shape: tuple[int, int]) -> DeviceMesh:
    """Of the first ranks; all ranks take part in making it."""
    return DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape), mesh_dim_names=("sequence", "heads"))


def plan_of(case: Case, mesh: DeviceMesh | None) -> Plan:
    more = SIZES | {"kv_heads": case.kv_heads, "layout": case.layout, "schedule": case.schedule}
    return make_plan(SPECS[case.spec], case.length, mesh=mesh, **more)


def inputs_of(case: Case) -> list[torch.Tensor]:
    """q, k, v, and the weights of out and lse in the loss."""
    generator = torch.Generator().manual_seed(case.length)
    heads = ((4, 32), (case.kv_heads, 32), (case.kv_heads, 16), (4, 16), (4, 1))
    *tensors, lse = (torch.randn((2, case.length, *size), generator=generator) for size in heads)
    return [*tensors, lse.squeeze(-1)]


def results(context: Context, cases: list[Case]) -> list[dict[str, Any]]:
    """out, lse (if there is one) and gradients of each case, whole, and the bytes planned and sent."""
    found = []
    for case in cases:
        mesh = mesh_of(case.mesh)
        if context.rank >= mesh.size():
            continue
        plan = plan_of(case, mesh)
        assert isinstance(plan, HeadsPlan) == (case.mesh[1] > 1)
        *qkv, weight, lse_weight = (plan.shard(x) for x in inputs_of(case))
        qkv = [x.to(case.dtype).requires_grad_() for x in qkv]
        lse = plan.spec.correction is None
        options: dict[str, Any] = {"lse": lse} if isinstance(plan, HeadsPlan) else {}
        start = sent.total
        got = attend(*qkv, plan, return_lse=True) if lse else (attend(*qkv, plan),)
        middle = sent.total
        grads = torch.autograd.grad(sum((x * w).sum() for x, w in zip(got, (weight, lse_weight))), qkv)
        size = case.dtype.itemsize
        whole = [plan.unshard(x.detach()) for x in (*got, *grads)]
        found.append(
            {
                "tensors": whole if context.rank == 0 else None,
                "forward": (plan.sent_bytes(size, 2, **options), middle - start),
                "backward": (plan.sent_bytes_backward(size, 2, **options), sent.total - middle),
            }
        )
    return found


def expected(case: Case) -> list[torch.Tensor]:
    *qkv, weight, lse_weight = inputs_of(case)
    qkv = [x.to(case.dtype).double().requires_grad_() for x in qkv]
    spec = SPECS[case.spec]
    if spec.correction is None:
        got = reference.attention(*qkv, spec.tokens)
    else:
        got = (hierarchical(*qkv, spec).out,)
    grads = torch.autograd.grad(sum((x * w).sum() for x, w in zip(got, (weight, lse_weight))), qkv)
    return [*(x.detach() for x in got), *grads]


@pytest.mark.parametrize("shape", sorted({case.mesh for case in CASES}))
def test_forward_and_gradients_match_the_oracle(ranks: RankPool, shape: tuple[int, int]) -> None:
    cases = [case for case in CASES if case.mesh == shape]
    by_rank = [found for found in ranks(4, results, cases) if found]
    assert len(by_rank) == math.prod(shape)
    for i, case in enumerate(cases):
        tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-5
        for number, (x, y) in enumerate(zip(by_rank[0][i]["tensors"], expected(case), strict=True)):
            assert reference.max_error(x, y) <= tolerance, f"{case}: result {number}"
        for rank, result in enumerate(by_rank):
            for way in ("forward", "backward"):
                assert result[i][way][0] == result[i][way][1], f"{case}: bytes planned and sent {way} on rank {rank}"

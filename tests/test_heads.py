"""Ranks that exchange heads: forward and gradients on meshes of two dimensions against the oracle; bytes; errors."""

import functools
import math
from typing import Any, NamedTuple

import pytest
import torch
from rank_pool import RankError, RankPool
from torch.distributed.device_mesh import DeviceMesh

import distattn
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
    batch: int = 2  # rows of one sequence are received where they belong


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
    Case("per_head", (1, 2), 1, "contiguous", "direct", 166, batch=1),
    Case("per_head", (1, 4), 2, "contiguous", "direct", 167, batch=1),
    Case("window", (1, 4), 4, "contiguous", "direct", 168, torch.bfloat16, batch=1),
    Case("dense", (2, 2), 1, "zigzag", "ring", 169, batch=1),
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
    *tensors, lse = (torch.randn((case.batch, case.length, *size), generator=generator) for size in heads)
    return [*tensors, lse.squeeze(-1)]


def gradients(results: Any, weights: Any, inputs: Any) -> tuple[torch.Tensor, ...]:
    """Of the weighted sum of results, of which there may be fewer than weights."""
    loss = sum((x * w).sum() for x, w in zip(results, weights, strict=False))
    return torch.autograd.grad(loss, inputs)


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
        grads = gradients(got, (weight, lse_weight), qkv)
        size = case.dtype.itemsize
        whole = [plan.unshard(x.detach()) for x in (*got, *grads)]
        found.append(
            {
                "tensors": whole if context.rank == 0 else None,
                "forward": (plan.sent_bytes(size, case.batch, **options), middle - start),
                "backward": (plan.sent_bytes_backward(size, case.batch, **options), sent.total - middle),
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
    return [*(x.detach() for x in got), *gradients(got, (weight, lse_weight), qkv)]


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


def window_out(context: Context, shape: tuple[int, int] | None) -> torch.Tensor:
    """By a dense plan's layout, as layers of one model have it."""
    case = Case("window", (2, 2), 2, "zigzag", "direct", 170)
    mesh = None if shape is None else mesh_of(shape)
    plan = plan_of(case, mesh)
    dense = make_plan(presets.dense(), 170, kv_heads=2, mesh=mesh, layout=plan.layout, **SIZES)
    assert dense.segments == plan.segments
    q, k, v = (plan.shard(x) for x in inputs_of(case)[:3])
    once = attend(q, k, v, plan)
    assert torch.equal(once, attend(q, k, v, plan)), "two runs differ"
    return plan.unshard(once + attend(q, k, v, dense))


def test_any_mesh_gives_the_same_result(ranks: RankPool) -> None:
    one = ranks(1, window_out, None)[0]
    for shape in ((1, 4), (2, 2), (4, 1)):
        for other in ranks(4, window_out, shape):
            assert reference.max_error(other, one) < 1e-6


def disagree(context: Context, what: str) -> None:
    last = context.rank == 3
    spec = presets.mistral(21 if what == "plan" and last else 20)
    plan = make_plan(spec, 64, heads=4, head_dim=32, mesh=mesh_of((2, 2)), block_q=16, block_k=16)
    x = torch.ones(2 if what == "batch" and last else 1, plan.tokens, 3 if what == "shape" and last else 4, 32)
    start = sent.total
    try:
        attend(x, x, x, plan)
    finally:
        assert sent.total == start, "something was sent"


@pytest.mark.parametrize("what", ["plan", "batch", "shape"])
def test_all_ranks_raise_where_one_disagrees(ranks: RankPool, what: str) -> None:
    with pytest.raises(RankError) as caught:
        ranks(4, disagree, what)
    kinds = {rank: type(error) for rank, error in caught.value.errors.items()}
    assert kinds == {
        0: PlanMismatch,
        1: PlanMismatch,
        2: PlanMismatch,
        3: ConfigError if what == "shape" else PlanMismatch,
    }


def compiled(context: Context) -> None:
    mesh = mesh_of((1, 2))
    if context.rank >= 2:
        return
    plan = plan_of(Case("window", (1, 2), 1, "contiguous", "direct", 61), mesh)
    assert isinstance(plan, HeadsPlan)
    qkv = [plan.shard(x).requires_grad_() for x in inputs_of(Case("window", (1, 2), 1, "", "", 61))[:3]]
    torch.library.opcheck(torch.ops.distattn.exchange_heads.default, (qkv[:1], qkv[1:], plan.name))
    inner = [
        x.detach().requires_grad_()
        for part in torch.ops.distattn.exchange_heads(qkv[:1], qkv[1:], plan.name)
        for x in part
    ]
    torch.library.opcheck(torch.ops.distattn.return_heads.default, (inner[:1], inner[1:], plan.name))
    both = (
        torch.compile(lambda q, k, v: attend(q * 2, k, v, plan).sin(), backend="aot_eager", fullgraph=True),
        (lambda q, k, v: attend(q * 2, k, v, plan).sin()),
    )
    ours, theirs = (fn(*qkv) for fn in both)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), qkv) for x in (ours, theirs)))


@pytest.mark.full  # imports the compiler, which can take minutes
def test_operators_pass_opcheck_and_compile_into_one_graph(ranks: RankPool) -> None:
    ranks(4, compiled)


def test_what_ranks_send_is_foretold_on_paper() -> None:
    for spec, kv_heads in ((SPECS["window"], 1), (SPECS["per_head"], 2), (presets.mistral(50), 4)):
        made = [
            make_plan(
                spec, 1024, world_size=8, rank=rank, head_ranks=2, kv_heads=kv_heads, layout="contiguous", **SIZES
            )
            for rank in range(8)
        ]
        assert len({plan.key for plan in made}) == 1
        work = made[0].work(2)
        assert [w.bytes_sent for w in work] == [plan.sent_bytes(2) for plan in made]
        assert sum(w.bytes_received for w in work) == sum(w.bytes_sent for w in work)
        whole = make_plan(spec, 1024, world_size=4, kv_heads=kv_heads, layout="contiguous", **SIZES)
        assert sum(w.pairs for w in work) == sum(w.pairs for w in whole.work(2))
        rows = torch.cat([plan.positions for plan in made])
        assert torch.equal(rows.sort().values, torch.arange(1024))


def test_explain_says_who_exchanges_heads() -> None:
    plan = make_plan(presets.dense(), 1000, world_size=8, rank=5, head_ranks=2, schedule="ring", **SIZES)
    text = plan.explain()
    assert "8 ranks, of which each 2 exchange heads" in text
    assert "Stages of rank 5, among the ranks that have its heads" in text and len(plan.stages) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_ranks": 3}, "head_ranks.* is 3; expected a divisor of world_size, 8"),
        ({"head_ranks": 8}, "is 8; expected a divisor of heads, 4"),
        ({"heads": 12, "kv_heads": 6, "head_ranks": 4}, "is 4; expected a divisor or a multiple of kv_heads, 6"),
        (
            {"spec": presets.moba(16, 3), "head_ranks": 2},
            "mesh.* is 2; expected 1, since the spec has summaries or a sel",
        ),
        (
            {
                "spec": AttentionSpec(PerHead((Causal(), Dense(), Causal(), Dense())), correction=distattn.Delta(16)),
                "head_ranks": 4,
            },
            "expected 1, since the spec has a correction",
        ),
        (
            {"layout": make_plan(presets.dense(), 999, world_size=8, **SIZES).layout, "head_ranks": 2},
            "layout is .*expected that of a plan on such a mesh",
        ),
    ],
)
def test_impossible_heads_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"spec": presets.dense(), "seq_len": 999, "world_size": 8, **SIZES} | change
    with pytest.raises(ConfigError, match=message):
        make_plan(arguments.pop("spec"), **arguments)

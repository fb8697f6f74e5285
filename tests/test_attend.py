"""Forward and gradients on 1 to 4 ranks against the float64 oracle; bytes; errors."""

from typing import Any, NamedTuple

import pytest
import torch
from rank_pool import RankError, RankPool

from distattn import presets, reference
from distattn.attend import attend
from distattn.errors import PlanMismatch
from distattn.jobs.context import Context
from distattn.operators import sent
from distattn.patterns import (
    BlockSparse,
    Causal,
    Chunked,
    Dense,
    Dilated,
    DistanceBand,
    Documents,
    FixedStride,
    GlobalKeys,
    GlobalQueries,
    GlobalTokens,
    Pattern,
    PerHead,
    RandomBlocks,
    SlidingWindow,
    Strided,
)
from distattn.plan import Plan, make_plan
from distattn.spec import AttentionSpec

PATTERNS: dict[str, Pattern] = {
    "dense": Dense(),
    "causal": Causal(),
    "window": SlidingWindow(20, 7),
    "dilated": Dilated(30, 30, 3),
    "strided": Causal() & (SlidingWindow(9, 0) | Strided(24)),
    "fixed_stride": Causal() & (Chunked(24) | FixedStride(24, 2)),
    "global_keys": SlidingWindow(9, 9) | GlobalKeys([3, 60, 61, 130]),
    "global_queries": SlidingWindow(9, 9) | GlobalQueries(range(6)),
    "global_tokens": SlidingWindow(9, 9) | GlobalTokens(range(0, 160, 37)),
    "causal_globals": Causal() & (SlidingWindow(20, 0) | GlobalTokens(range(5))),
    "random_blocks": Chunked(16) | RandomBlocks(2, 16, 0, 170),
    "documents": Documents((30, 1, 77, 20)),  # the rows beyond attend to nothing
    "band": DistanceBand(10, 50),  # nor do the first rows
    "block_sparse": BlockSparse((0, 2, 2, 5), (0, 3, 1, 2, 5), 24),
    "not_causal": ~Causal(),
    "per_head": PerHead((Causal(), SlidingWindow(10, 0), SlidingWindow(4, 4) | GlobalTokens([9, 50, 130]), Dense())),
}
SPECS: dict[str, AttentionSpec] = {
    **{name: AttentionSpec(pattern) for name, pattern in PATTERNS.items()},
    "preset_longformer": presets.longformer(8, dilation=2, global_tokens=(0, 90)),
    "preset_bigbird": presets.bigbird(16, 3, 2, 1, 0, 170),
    "preset_etc": presets.etc((50, 61, 40), 12),
    "preset_streaming_llm": presets.streaming_llm(4, 30),
    "preset_spattention": presets.spattention(4, 150),
}


class Case(NamedTuple):
    spec: str
    ranks: int
    layout: str
    schedule: str
    heads: tuple[int, int]
    head_dim: int
    blocks: tuple[int, int]
    length: int
    dtype: torch.dtype = torch.float32


HEADS = [(4, 4), (4, 1), (4, 2)]
LAYOUTS = ["contiguous", "zigzag", "striped", "balanced"]
SCHEDULES = ["direct", "slices", "ring"]
BLOCKS = [(16, 16), (16, 8), (8, 32)]


def covering(all_ranks: bool = False) -> list[Case]:
    """Every spec on two numbers of ranks, or on all four; all choices go round so that all pairs of them occur."""
    cases = []
    for i, spec in enumerate(SPECS):
        for ranks in (1, 2, 3, 4) if all_ranks else (1 + i // 5 % 4, 1 + (i // 5 + 1 + i % 3) % 4):
            n = i + 5 * ranks
            cases.append(
                Case(
                    spec,
                    ranks,
                    LAYOUTS[(i + ranks) % 4],
                    SCHEDULES[(i // 2 + ranks // 2) % 3],
                    HEADS[n % 3],
                    (32, 48, 128)[(n // 3) % 3] if ranks == 1 else 32,
                    BLOCKS[(n // 2) % 3],
                    149 + n,
                    torch.bfloat16 if n % 5 == 0 else torch.float32,
                )
            )
    return cases


def product() -> list[Case]:
    return [
        Case(spec, ranks, layout, schedule, HEADS[i % 3], 32, BLOCKS[i % 3], 150 + i)
        for i, spec in enumerate(SPECS)
        for ranks in (3, 4)
        for layout in LAYOUTS
        for schedule in SCHEDULES
    ]


def plan_of(case: Case, context: Context) -> Plan:
    return make_plan(
        SPECS[case.spec],
        case.length,
        heads=case.heads[0],
        kv_heads=case.heads[1],
        head_dim=case.head_dim,
        value_dim=case.head_dim // 2,
        mesh=context.mesh,
        layout=case.layout,
        schedule=case.schedule,
        block_q=case.blocks[0],
        block_k=case.blocks[1],
    )


def inputs_of(case: Case) -> list[torch.Tensor]:
    """q, k, v, and the weights of out and lse in the loss."""
    generator = torch.Generator().manual_seed(len(case.spec) + case.length)
    (heads, kv_heads), dim, n = case.heads, case.head_dim, case.length
    shapes = [
        (2, n, heads, dim),
        (2, n, kv_heads, dim),
        (2, n, kv_heads, dim // 2),
        (2, n, heads, dim // 2),
        (2, n, heads),
    ]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def results(context: Context, cases: list[Case]) -> list[dict[str, Any]]:
    """out, lse and gradients of each case, whole, and the bytes planned and sent."""
    found = []
    for case in cases:
        plan = plan_of(case, context)
        *qkv, weight, lse_weight = (plan.shard(x) for x in inputs_of(case))
        qkv = [x.to(case.dtype).requires_grad_() for x in qkv]
        start = sent.total
        out, lse = attend(*qkv, plan, return_lse=True)
        middle = sent.total
        some = torch.isfinite(lse)
        loss = (out * weight).sum() + (lse.masked_fill(~some, 0.0) * lse_weight).sum()
        grads = torch.autograd.grad(loss, qkv)
        size = case.dtype.itemsize
        whole = [plan.unshard(x.detach()) for x in (out, lse, *grads)]
        found.append(
            {
                "tensors": whole if context.rank == 0 else None,
                "forward": (plan.sent_bytes(size, 2), middle - start),
                "backward": (plan.sent_bytes_backward(size, 2), sent.total - middle),
            }
        )
    return found


def expected(case: Case) -> list[torch.Tensor]:
    *qkv, weight, lse_weight = inputs_of(case)
    qkv = [x.to(case.dtype).double().requires_grad_() for x in qkv]
    out, lse = reference.attention(*qkv, SPECS[case.spec].tokens)
    loss = (out * weight).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * lse_weight).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, qkv)]


def check(case: Case, by_rank: list[dict[str, Any]]) -> None:
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-5
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), by_rank[0]["tensors"], expected(case), strict=True):
        if name == "lse":
            assert (torch.isfinite(x) == torch.isfinite(y)).all(), f"{case}: which rows are empty"
            x, y = x.masked_fill(~torch.isfinite(x), 0.0), y.masked_fill(~torch.isfinite(y), 0.0)
        assert reference.max_error(x, y) <= tolerance, f"{case}: {name}"
    for rank, result in enumerate(by_rank):
        for way in ("forward", "backward"):
            assert result[way][0] == result[way][1], f"{case}: bytes planned and sent {way} on rank {rank}"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_forward_and_gradients_match_the_oracle(ranks: RankPool, count: int) -> None:
    cases = [case for case in covering() if case.ranks == count]
    by_rank = ranks(count, results, cases, timeout=900)
    for i, case in enumerate(cases):
        check(case, [result[i] for result in by_rank])


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_whole_product(ranks: RankPool, count: int) -> None:
    cases = [case for case in [*covering(all_ranks=True), *product()] if case.ranks == count]
    by_rank = ranks(count, results, cases, timeout=1800)
    for i, case in enumerate(cases):
        check(case, [result[i] for result in by_rank])


@pytest.mark.parametrize("group", [(6, 1), (12, 2)])
def test_six_query_heads_a_key_head(ranks: RankPool, group: tuple[int, int]) -> None:
    case = Case("causal_globals", 2, "contiguous", "direct", group, 32, (16, 16), 101)
    check(case, [r[0] for r in ranks(2, results, [case])])


def window_bytes(context: Context, length: int) -> tuple[int, int]:
    plan = make_plan(
        presets.mistral(33), length, heads=2, kv_heads=1, head_dim=32, mesh=context.mesh, block_q=16, block_k=16
    )
    start = sent.total
    q, k, v = (torch.ones(1, plan.tokens, heads, 32) for heads in (2, 1, 1))
    attend(q, k, v, plan)
    return sent.total - start, plan.sent_bytes(4)


def test_a_window_sends_its_halo_and_not_the_sequence(ranks: RankPool) -> None:
    for length in (256, 2048):
        # Two pages of 16 rows reach 32 tokens back; K and V have 32 float32 each.
        halo = 2 * 16 * 2 * 32 * 4
        assert ranks(3, window_bytes, length) == [(halo, halo), (halo, halo), (0, 0)]


def same_bits(context: Context) -> torch.Tensor:
    case = Case("global_tokens", context.world_size, "contiguous", "direct", (4, 2), 32, (16, 16), 150)
    plan = plan_of(case, context)
    q, k, v = (plan.shard(x) for x in inputs_of(case)[:3])
    first, second = attend(q, k, v, plan), attend(q, k, v, plan)
    assert torch.equal(first, second), "two runs differ"
    return plan.unshard(first)


def test_any_number_of_ranks_gives_the_same_result(ranks: RankPool) -> None:
    one, *others = [ranks(n, same_bits)[0] for n in (1, 2, 3, 4)]
    for other in others:
        assert reference.max_error(other, one) < 1e-6


def disagree(context: Context, what: str) -> str:
    window = 20 + (context.rank if what == "plan" else 0)
    plan = make_plan(presets.mistral(window), 64, heads=2, head_dim=32, mesh=context.mesh, block_q=16, block_k=16)
    batch = 2 if what == "batch" and context.rank else 1
    heads = 3 if what == "shape" and context.rank else 2
    x = torch.ones(batch, plan.tokens, heads, 32)
    start = sent.total
    try:
        attend(x, x, x, plan)
    finally:
        assert sent.total == start, "something was sent"
    return "went on"


@pytest.mark.parametrize("what", ["plan", "batch", "shape"])
def test_ranks_that_disagree_all_raise_before_anything_is_sent(ranks: RankPool, what: str) -> None:
    with pytest.raises(RankError) as caught:
        ranks(2, disagree, what)
    errors = caught.value.errors
    assert isinstance(errors[0], PlanMismatch)
    assert isinstance(errors[1], ValueError if what == "shape" else PlanMismatch)
    assert "rank 1" in str(errors[0])


def tensors(plan: Plan, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(1, plan.tokens, heads, plan.head_dim, dtype=dtype, requires_grad=True)
        for heads in (plan.heads, plan.kv_heads, plan.kv_heads)
    ]


@pytest.fixture
def plan() -> Plan:
    spec = AttentionSpec(SlidingWindow(9, 9) | GlobalTokens(range(0, 60, 17)))
    return make_plan(spec, 61, heads=4, kv_heads=2, head_dim=32, block_q=16, block_k=16)


@pytest.mark.full  # this and the next import the compiler, which can take minutes
def test_operators_pass_opcheck(plan: Plan) -> None:
    torch.library.opcheck(torch.ops.distattn.attend.default, (*tensors(plan), *[None] * 6, True, plan.name, 0.2))
    spec = presets.hierarchical(16, (8, 16), (2,), 2)
    plan = make_plan(spec, 61, heads=4, kv_heads=2, head_dim=32, block_q=16, block_k=16)
    q, k, v = tensors(plan)
    assert plan.hierarchy is not None
    torch.library.opcheck(torch.ops.distattn.chunk_means.default, (k, None, 8))
    torch.library.opcheck(torch.ops.distattn.gather_rows.default, ([k[:, :8], v[:, :8]], plan.name, "summaries"))
    chosen = torch.zeros(1, 2, plan.hierarchy.chunks, 1, dtype=torch.int32)
    torch.library.opcheck(torch.ops.distattn.attend.default, (q, k, v, *[None] * 5, chosen, False, plan.name, 0.2))


@pytest.mark.full
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_compiles_into_one_graph(schedule: str) -> None:
    spec = AttentionSpec(SlidingWindow(9, 9) | GlobalTokens(range(0, 60, 17)))
    plan = make_plan(spec, 61, heads=4, kv_heads=2, head_dim=32, block_q=16, block_k=16, schedule=schedule)
    q, k, v = tensors(plan)
    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v, plan).sin(), backend="aot_eager", fullgraph=True)
    plain = attend(q * 2, k, v, plan).sin()
    torch.testing.assert_close(compiled(q, k, v), plain)
    ours, theirs = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (compiled(q, k, v), plain))
    torch.testing.assert_close(ours, theirs)


def test_float64_is_kept(plan: Plan) -> None:
    q, k, v = tensors(plan, torch.float64)
    out, lse = attend(q, k, v, plan, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    assert reference.max_error(out, reference.attention(q, k, v, plan.spec.tokens)[0]) < 1e-13


def test_strides_do_not_matter(plan: Plan) -> None:
    q, k, v = (x.detach() for x in tensors(plan))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(attend(*turned, plan), attend(q, k, v, plan))


def test_many_pages_are_visited_in_steps() -> None:
    spec = AttentionSpec(Causal() & (SlidingWindow(300, 0) | Strided(7)))
    plan = make_plan(spec, 700, heads=2, kv_heads=1, head_dim=32, block_q=16, block_k=16)
    q, k, v = tensors(plan)
    out, _ = reference.attention(q, k, v, spec.tokens)
    ours = attend(q, k, v, plan)
    assert reference.max_error(ours, out) < 1e-5
    for x, y in zip(
        torch.autograd.grad(ours.square().sum(), (q, k, v)),
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        strict=True,
    ):
        assert reference.max_error(x, y) < 1e-5


def test_large_scores_do_not_overflow(plan: Plan) -> None:
    q, k, v = (x.detach() * 60 for x in tensors(plan))
    out, _ = reference.attention(q, k, v, plan.spec.tokens)
    assert reference.max_error(attend(q, k, v, plan), out) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:, :-1], k, v), "q has shape .*expected"),
        (lambda q, k, v: (q, k.double(), v), "k is torch.float64; expected"),
        (lambda q, k, v: (q, k, v[0]), "dimensions; expected"),
        (lambda q, k, v: (q, k[:, :, :1], v), "k has shape"),
    ],
)
def test_wrong_tensors_are_named(plan: Plan, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(*change(*tensors(plan)), plan)


def test_a_plan_on_paper_does_not_run() -> None:
    plan = make_plan(presets.dense(), 64, heads=2, head_dim=32, world_size=2, rank=1)
    x = torch.zeros(1, plan.tokens, 2, 32)
    with pytest.raises(ValueError, match="on paper"):
        attend(x, x, x, plan)


@pytest.mark.parametrize("name", ["window", "hierarchical"])
def test_autocast_changes_nothing(name: str) -> None:
    """Sums stay in float32, forward and backward, also where few rows of a tile see a page."""
    spec = {"window": presets.mistral(100), "hierarchical": presets.hierarchical(32, (8, 32), (2,), 3, "tile")}[name]
    plan = make_plan(spec, 300, heads=4, kv_heads=2, head_dim=16)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 300, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2, 4))
    found = []
    for enabled in (False, True):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attend(*given, plan)
            found.append((out, *torch.autograd.grad(out, given, grad)))
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)

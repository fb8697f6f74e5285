"""The hierarchical pass on 1 to 4 ranks against the float64 oracle; what it counts, chooses, sends and refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from papers import naive_moba, naive_nsa
from rank_pool import RankPool
from torch import Tensor

from distattn import passes, presets, reference
from distattn.attend import Selection, attend, select
from distattn.exchange import Exchange, Pending
from distattn.extras import AttentionExtras, AttentionPool, Mlp, MlpPool
from distattn.hierarchy_reference import hierarchical
from distattn.jobs.context import Context
from distattn.operators import sent
from distattn.patterns import Causal, SlidingWindow
from distattn.plan import Plan, make_plan
from distattn.presets import with_delta
from distattn.spec import AttentionSpec, Summaries, TopChunks, chunk_window

TWO = Summaries(4, reach=2), Summaries(16)
THREE = Summaries(4, reach=2), Summaries(8, reach=3), Summaries(16)
GLOBALS = {"global_tokens": (0, 9, 33), "global_keys": (20, 21, 22, 23, 41)}
BOTH_SIDES = chunk_window(4, 2, causal=False, global_tokens=(0, 21, 22))
ALWAYS = ("first", "own", "previous")

SPECS: dict[str, AttentionSpec] = {
    "one level": AttentionSpec(chunk_window(8, 2), (Summaries(8),)),
    "two levels": AttentionSpec(chunk_window(4, 2), TWO),
    "three levels and globals": AttentionSpec(chunk_window(4, 2, **GLOBALS), THREE),
    "both sides": AttentionSpec(BOTH_SIDES, TWO),
    "attention": AttentionSpec(
        chunk_window(4, 2, global_keys=(3,)),
        (Summaries(4, pool="attention", reach=2), Summaries(8, pool="attention", bias="learned")),
    ),
    "mlp": AttentionSpec(
        chunk_window(4, 2, global_keys=(3,)),
        (Summaries(4, pool="mlp", bias="none", reach=2), Summaries(8, pool="mlp")),
    ),
    "gates": AttentionSpec(SlidingWindow(9, 0), (Summaries(8, 4, "mlp", "none"),), merge="gate"),
    "gates, both sides": AttentionSpec(SlidingWindow(9, 5), (Summaries(8),), merge="gate"),
    "tokens choose": AttentionSpec(chunk_window(4, 2, **GLOBALS), TWO, TopChunks(3, 4)),
    "tokens choose, both sides": AttentionSpec(BOTH_SIDES, TWO, TopChunks(3, 4)),
    "tokens choose by mass": AttentionSpec(chunk_window(4, 2), TWO, TopChunks(3, 4, "mass", heads="q")),
    "tiles choose": AttentionSpec(chunk_window(4, 2, **GLOBALS), THREE, TopChunks(3, 4, per="tile")),
    "tiles choose by mass": AttentionSpec(chunk_window(4, 2), TWO, TopChunks(3, 4, "mass", "tile", "q")),
    "tiles look ahead": AttentionSpec(chunk_window(4, 2), TWO, TopChunks(3, 4, per="tile", lookahead=True)),
    "tiles choose, both sides": AttentionSpec(BOTH_SIDES, TWO, TopChunks(3, 4, per="tile", heads="q")),
    "moba": presets.moba(8, 3),
    "nsa": presets.nsa(8, 4, 8, 4, 10),
    "gates and choice": AttentionSpec(SlidingWindow(9, 0), (), TopChunks(3, 8, always=("own",)), "gate"),
    "gates and choice, both sides": AttentionSpec(
        SlidingWindow(9, 3), (Summaries(4),), TopChunks(3, 8, "mass", always=("own",), heads="q"), "gate"
    ),
    "corrected window": with_delta(AttentionSpec(SlidingWindow(9, 0)), 16),
    "corrected levels": with_delta(AttentionSpec(chunk_window(4, 2, causal=False), (Summaries(4),)), 8),
    "registers": AttentionSpec(chunk_window(4, 2), TWO, TopChunks(2, 4), registers=3),
}
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
HEADS = ((4, 2), (3, 1), (2, 2))
DIM, VALUE_DIM, BATCH = 8, 6, 2
CPU = torch.device("cpu")


class Case(NamedTuple):
    spec: str
    ranks: int
    layout: str
    schedule: str
    heads: tuple[int, int]
    length: int
    turned: bool  # keys are pooled before they are rotated


def covering() -> list[Case]:
    """Every spec on one rank and on two, three or four; the other choices go round."""
    return [
        Case(
            spec,
            ranks,
            LAYOUTS[(i + ranks) % 4],
            ("direct", "slices", "ring")[(i + ranks // 2) % 3],
            HEADS[(i + ranks) % 3],
            69 + (7 * i + ranks) % 16,
            (i + ranks) % 3 == 0,
        )
        for i, spec in enumerate(SPECS)
        for ranks in (1, 2 + i % 3)
    ]


def product() -> list[Case]:
    return [
        Case(spec, ranks, layout, schedule, HEADS[i % 3], 70 + i, i % 2 == 0)
        for i, spec in enumerate(SPECS)
        for ranks in (2, 3, 4)
        for layout in LAYOUTS
        for schedule in ("direct", "slices", "ring")
    ]


def turn(keys: Tensor, positions: Tensor) -> Tensor:
    angle = (0.1 * positions.double()).to(keys.dtype)[None, :, None, None]
    first, second = keys.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)


def inputs(
    case: Case, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[list[Tensor], AttentionExtras]:
    """(q, k, v, what out is multiplied by), and extras, over the whole sequence; the same on all ranks."""
    spec, (heads, kv_heads) = SPECS[case.spec], case.heads
    generator = torch.Generator().manual_seed(len(case.spec) + case.length)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    rows = (BATCH, case.length)
    tensors = [
        random(*rows, n, d) for n, d in ((heads, DIM), (kv_heads, DIM), (kv_heads, VALUE_DIM), (heads, VALUE_DIM))
    ]
    pools: list[AttentionPool | MlpPool | None] = []
    for number, level in enumerate(spec.summaries):
        members = level.chunk // (spec.summaries[number - 1].chunk if number else 1)
        pool: AttentionPool | MlpPool | None = None
        if level.pool == "attention":
            pool = AttentionPool(random(kv_heads, DIM))
        elif level.pool == "mlp":
            both = ((DIM, 5), (VALUE_DIM, 7))
            parts = [(random(members, d), random(h, members * d), random(h), random(d, h)) for d, h in both]
            pool = MlpPool(*(Mlp(*(0.3 * x for x in part)) for part in parts))
        pools.append(pool)
    sources = 1 + bool(spec.summaries) + (spec.select is not None)
    return tensors, AttentionExtras(
        gates=random(*rows, heads, sources) if spec.merge == "gate" else None,
        pool=tuple(pools),
        key_bias=random(len(pools), kv_heads) if any(x.bias == "learned" for x in spec.summaries) else None,
        pool_keys=random(*rows, kv_heads, DIM) if case.turned and not spec.is_static else None,
        rotate=turn if case.turned and not spec.is_static else None,
    )


def parameters(extras: AttentionExtras) -> list[Tensor]:
    found = [] if extras.key_bias is None else [extras.key_bias]
    for pool in extras.pool:
        if isinstance(pool, AttentionPool):
            found.append(pool.query)
        elif pool is not None:
            found += [*pool.keys, *pool.values]
    return found


def has_lse(spec: AttentionSpec) -> bool:
    return spec.merge == "softmax" and spec.correction is None


def loss_of(out: Tensor, lse: Tensor | None, weight: Tensor) -> Tensor:
    loss = (out * weight).sum()
    return loss if lse is None else loss + (0.3 * lse.masked_fill(lse == -torch.inf, 0.0)).sum()


def plan_of(case: Case, context: Context) -> Plan:
    return make_plan(
        SPECS[case.spec],
        case.length,
        heads=case.heads[0],
        kv_heads=case.heads[1],
        head_dim=DIM,
        value_dim=VALUE_DIM,
        mesh=context.mesh,
        layout=case.layout,
        schedule=case.schedule,
        block_q=8,
        block_k=8,
    )


def run(context: Context, case: Case) -> dict[str, Any]:
    """out, lse, gradients and choices of the whole sequence; bytes planned and sent."""
    spec, plan = SPECS[case.spec], plan_of(case, context)
    (q, k, v, weight), extras = inputs(case, device=context.device)
    rows = [plan.shard(x).requires_grad_() for x in (q, k, v)]
    by_row = [name for name in ("gates", "pool_keys") if getattr(extras, name) is not None]
    extras = extras._replace(**{name: plan.shard(getattr(extras, name)).requires_grad_() for name in by_row})
    learned = [x.requires_grad_() for x in parameters(extras)]
    sharded = [*rows, *(getattr(extras, name) for name in by_row)]
    before, chosen_before = sent.total, sent.sent.get("selected", 0)
    result = attend(*rows, plan, extras=extras, return_lse=has_lse(spec))
    out, lse = result if isinstance(result, tuple) else (result, None)
    grads = torch.autograd.grad(
        loss_of(out, lse, plan.shard(weight)), [*sharded, *learned], allow_unused=True, materialize_grads=True
    )
    travelled = sent.total - before - (sent.sent.get("selected", 0) - chosen_before)
    planned = plan.sent_bytes(4, BATCH) + plan.sent_bytes_backward(4, BATCH)
    summed = list(grads[len(sharded) :])
    if context.mesh is not None:
        for x in summed:
            torch.distributed.all_reduce(x, group=context.mesh.get_group())
    whole = [plan.unshard(x.detach()) for x in (out, *grads[: len(sharded)])]
    chosen = None
    if spec.select is not None:
        chosen = everywhere(select(*(x.detach() for x in rows), plan, extras=extras), plan, spec.select)
    if context.rank:
        return {}
    return {"got": [*whole, *summed], "lse": lse if context.mesh is None else None, "chosen": chosen} | {
        "bytes": (planned, travelled)
    }


def everywhere(selection: Selection, plan: Plan, by: TopChunks) -> Tensor:
    """The choices of all positions: [batch, positions, tables, n]."""
    chosen = selection.chunks if by.per == "token" else selection.chunks.repeat_interleave(by.chunk, 2)
    return plan.unshard(chosen[:, :, : plan.tokens].transpose(1, 2).contiguous())


def expected(case: Case) -> tuple[list[Tensor], Any]:
    (q, k, v, weight), extras = inputs(case, torch.float64)
    learned = parameters(extras)
    by_row = [x for x in (extras.gates, extras.pool_keys) if x is not None]
    leaves = [x.requires_grad_() for x in (q, k, v, *by_row, *learned)]
    answer = hierarchical(q, k, v, SPECS[case.spec], extras)
    grads = torch.autograd.grad(
        loss_of(answer.out, answer.lse, weight), leaves, allow_unused=True, materialize_grads=True
    )
    return [answer.out.detach(), *grads], answer


def check(case: Case, ranks: RankPool) -> None:
    compare(case, ranks(case.ranks, run, case)[0])


def compare(case: Case, found: dict[str, Any]) -> None:
    spec = SPECS[case.spec]
    wanted, answer = expected(case)
    for number, (x, y) in enumerate(zip(found["got"], wanted, strict=True)):
        assert reference.max_error(x, y) <= 1e-5, f"result {number}"
    if found["lse"] is not None:
        assert reference.max_error(found["lse"], answer.lse) <= 1e-5
    planned, travelled = found["bytes"]
    assert planned == travelled
    if spec.select is not None:
        share = case.heads[0] // found["chosen"].shape[2]
        skip = spec.window.global_tokens if spec.window and spec.merge == "softmax" else ()
        for b, h, i in np.ndindex(BATCH, case.heads[0], case.length):
            if i not in skip:
                row = found["chosen"][b, i, h // share]
                assert tuple(row[row >= 0].tolist()) == answer.chosen[b][h][i]


@pytest.mark.parametrize("case", covering(), ids=str)
def test_forward_gradients_and_choices_match_the_oracle(case: Case, ranks: RankPool) -> None:
    check(case, ranks)


@pytest.mark.full
@pytest.mark.parametrize("case", product(), ids=str)
def test_the_product_matches_the_oracle(case: Case, ranks: RankPool) -> None:
    check(case, ranks)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_a_gpu_matches_the_oracle(name: str) -> None:
    """Choices included: scores of random inputs do not come close enough to be told apart otherwise."""
    case = Case(name, 1, "contiguous", "direct", (4, 2), 75, True)
    context = Context(0, 1, 0, torch.device("cuda"), None, Path())
    compare(case, {key: on_cpu(value) for key, value in run(context, case).items()})


def on_cpu(x: Any) -> Any:
    if isinstance(x, list):
        return [on_cpu(y) for y in x]
    return x.cpu() if isinstance(x, Tensor) else x


def one_rank(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, extras: AttentionExtras | None = None, block: int = 8
) -> Tensor:
    plan = make_plan(
        spec, q.shape[1], heads=q.shape[2], kv_heads=k.shape[2], head_dim=q.shape[3], block_q=block, block_k=block
    )
    return attend(q, k, v, plan, extras=extras)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def levels(draw: st.DrawFn) -> AttentionSpec:
    """Causal specs of one to three levels, with and without globals and a choice."""
    chunk, reach = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    sizes = [chunk]
    for _ in range(draw(st.integers(0, 2))):
        sizes.append(sizes[-1] * draw(st.integers(1, 4)))
    reaches, before = [], (reach - 1) * chunk
    for size in sizes[1:]:
        reaches.append(-(-before // size) + draw(st.integers(1, 3)))
        before = (reaches[-1] - 1) * size
    summaries = [Summaries(n, reach=far) for n, far in zip(sizes, [*reaches, None], strict=True)]
    positions = st.lists(st.integers(0, 70), max_size=4, unique=True)
    window = chunk_window(chunk, reach, global_tokens=draw(positions), global_keys=draw(positions))
    choice = draw(st.sampled_from([None, "token", "tile"]))
    return AttentionSpec(
        window, tuple(summaries), None if choice is None else TopChunks(draw(st.integers(1, 4)), chunk, per=choice)
    )


@given(levels(), st.integers(1, 70))
def test_every_token_counts_once(spec: AttentionSpec, length: int) -> None:
    """Equal keys: the weights are the tokens that a key stands for, so that out is the mean of what is counted."""
    q, k = random(1, length, 2, 4), torch.ones(1, length, 1, 4)
    v = random(1, length, 1, 4, seed=1)
    out, lse = attend(
        q,
        k,
        v,
        make_plan(spec, length, heads=2, kv_heads=1, head_dim=4, block_q=8, block_k=8),
        return_lse=True,
    )
    counted = torch.arange(1, length + 1)
    score = (q * 0.5).sum(-1)
    torch.testing.assert_close((lse - score).exp(), counted[None, :, None].expand_as(lse).float(), rtol=1e-5, atol=1e-5)
    mean = v.cumsum(1) / counted[:, None, None]
    assert reference.max_error(out, mean.expand_as(out)) <= 1e-5


@pytest.mark.parametrize(
    "name", [name for name, spec in SPECS.items() if spec.causal and not (spec.select and spec.select.lookahead)]
)
def test_no_row_depends_on_what_follows(name: str) -> None:
    case = Case(name, 1, "contiguous", "direct", (4, 2), 75, False)
    (q, k, v, _), extras = inputs(case)
    v = random(*k.shape, seed=3)
    if extras.pool and any(isinstance(pool, MlpPool) for pool in extras.pool):
        extras = extras._replace(pool=tuple(pool and MlpPool(pool.keys, pool.keys) for pool in extras.pool))
    out = one_rank(SPECS[name], q, k, v, extras)
    for last in (0, 17, 40, 73):
        changed = [x.clone() for x in (q, k, v)]
        for number, x in enumerate(changed):
            x[:, last + 1 :] = random(*x[:, last + 1 :].shape, seed=10 + number)
        kept = last + 1
        if SPECS[name].correction is not None:  # the rows of the sequence's end are made otherwise
            kept = min(kept, 75 - 16)
        assert torch.equal(one_rank(SPECS[name], *changed, extras)[:, :kept], out[:, :kept])


def test_moba_is_what_its_paper_says() -> None:
    q, k, v = random(1, 70, 6, 8), random(1, 70, 2, 8, seed=1), random(1, 70, 2, 8, seed=2)
    expected = naive_moba(q, k, v, 8, 3, 8**-0.5)
    assert reference.max_error(one_rank(presets.moba(8, 3), q, k, v), expected) <= 1e-5


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
def test_nsa_is_what_its_paper_says(heads: int, kv_heads: int) -> None:
    length = 75
    q, k, v = (
        random(1, length, heads, 8),
        random(1, length, kv_heads, 8, seed=1),
        random(1, length, kv_heads, 8, seed=2),
    )
    gates = random(1, length, heads, 3, seed=3)
    mlps = [Mlp(*(0.3 * random(*n, seed=s + i) for i, n in enumerate(((8, 8), (5, 64), (5,), (8, 5))))) for s in (4, 8)]
    pool = MlpPool(*mlps)
    expected = naive_nsa(q, k, v, gates, pool, 8, 4, 16, 4, 12, 8**-0.5)
    out = one_rank(presets.nsa(8, 4, 16, 4, 12), q, k, v, AttentionExtras(gates, (pool,)))
    assert reference.max_error(out, expected) <= 1e-5


def test_the_last_chunk_may_be_short_and_all_global() -> None:
    """No candidate is short then, but the page that it lies in is."""
    spec = AttentionSpec(chunk_window(4, 2, global_keys=(72, 73, 74)), TWO, TopChunks(3, 4))
    q, k, v = random(1, 75, 2, 8), random(1, 75, 1, 8, seed=1), random(1, 75, 1, 8, seed=2)
    expected = hierarchical(q.double(), k.double(), v.double(), spec, AttentionExtras()).out
    assert reference.max_error(one_rank(spec, q, k, v), expected) <= 1e-5


def test_a_selection_can_be_given_again() -> None:
    spec = SPECS["tokens choose"]
    plan = make_plan(spec, 70, heads=4, kv_heads=2, head_dim=8, block_q=8, block_k=8)
    q, k, v = random(2, 70, 4, 8), random(2, 70, 2, 8, seed=1), random(2, 70, 2, 8, seed=2)
    chosen = select(q, k, v, plan)
    assert torch.equal(attend(q, k, v, plan, selection=chosen), attend(q, k, v, plan))
    other = random(2, 70, 4, 8, seed=5)
    assert not torch.equal(attend(other, k, v, plan, selection=chosen), attend(other, k, v, plan))


@pytest.mark.parametrize("length", [16_384, pytest.param(262_144, marks=pytest.mark.gpu)])
def test_a_needle_is_found(length: int) -> None:
    """Random keys, at 50 depths one that gives its query a logit of 50: what dense attention answers comes out."""
    dim, depths = 64, 50
    spec = presets.hierarchical(1024, (64, 1024), (16,), 16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (random(1, length, 1, dim, seed=seed).to(device) for seed in range(3))
    asking = torch.arange(length - depths, length)
    at = torch.linspace(64, length - 2 * 1024, depths).long()
    k[0, at, 0] = 50 * dim**0.5 * q[0, asking, 0] / q[0, asking, 0].square().sum(-1, keepdim=True)
    dense, _ = reference.attention_rows(q[:, asking], asking, k, v, Causal())
    found, missed = (one_rank(s, q, k, v, block=128)[:, asking] for s in (spec, AttentionSpec(spec.tokens)))
    assert (found - dense).abs().max() <= 1e-3
    assert (missed - dense).abs().amax(-1).min() > 0.1


def log_of(context: Context, spec: str) -> list[str]:
    """What a rank does, in order, with the journey of summaries and with tiles."""
    plan = plan_of(Case(spec, 2, "contiguous", "direct", (2, 2), 80, False), context)
    log: list[str] = []
    bring, forward = Exchange.bring, passes.attention_forward
    assert plan.hierarchy is not None
    gather = plan.hierarchy.gather

    def logged_bring(self: Exchange, what: str, transfer: Any, *arguments: Any) -> Pending:
        pending = bring(self, what, transfer, *arguments)
        if transfer is not gather:
            return pending
        log.append("sent")

        def wait() -> None:
            pending.wait()
            log.append("arrived")

        return Pending(wait)

    def logged_forward(*arguments: Any, **more: Any) -> None:
        log.append("tiles")
        forward(*arguments, **more)

    Exchange.bring, passes.attention_forward = logged_bring, logged_forward  # type: ignore[method-assign]
    try:
        attend(*(random(1, plan.tokens, 2, dim) for dim in (DIM, DIM, VALUE_DIM)), plan)
    finally:
        Exchange.bring, passes.attention_forward = bring, forward  # type: ignore[method-assign]
    return log


def test_tiles_are_attended_while_summaries_travel(ranks: RankPool) -> None:
    for log in ranks(2, log_of, "two levels"):
        assert log[0] == "sent"
        assert "tiles" in log[1 : log.index("arrived")]


REFUSED = {
    "tokens": lambda: AttentionSpec(SlidingWindow(9, 0), TWO),
    "select.chunk": lambda: AttentionSpec(chunk_window(4, 2), TWO, TopChunks(2, 8)),
    "summaries[0].chunk": lambda: AttentionSpec(chunk_window(8, 2), TWO),
    "summaries[0].reach": lambda: AttentionSpec(chunk_window(4, 20), TWO),
    "summaries[1].reach": lambda: AttentionSpec(chunk_window(4, 2), (Summaries(4, reach=2), Summaries(8, reach=1))),
    "stride": lambda: Summaries(8, 3),
    "summaries[0].stride": lambda: AttentionSpec(chunk_window(8, 2), (Summaries(8, 4),)),
    "select.always": lambda: AttentionSpec(chunk_window(4, 2), TWO, TopChunks(2, 4, always=("own",))),
    "select.score": lambda: AttentionSpec(chunk_window(4, 2), (), TopChunks(2, 4, "mass")),
    "always": lambda: TopChunks(2, 4, per="tile", always=("own",)),
    "lookahead": lambda: TopChunks(2, 4, lookahead=True),
    "merge": lambda: AttentionSpec(Causal(), merge="gate"),
    "pool": lambda: Summaries(4, pool="max"),  # type: ignore[arg-type]
    "every": lambda: with_delta(AttentionSpec(Causal()), 0),
    "window": lambda: presets.hierarchical(100, (64,), ()),
    "reach": lambda: presets.hierarchical(128, (64, 1024), ()),
    "seq_len": lambda: make_plan(presets.nsa(), 20, heads=2, head_dim=8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name.replace('[', '.').replace(']', '.')} is "):
        REFUSED[name]()


def test_extras_that_do_not_fit_are_refused() -> None:
    q, k, v = random(1, 40, 2, 8), random(1, 40, 2, 8, seed=1), random(1, 40, 2, 8, seed=2)
    with pytest.raises(ValueError, match=r"extras.gates has the shape None; expected \(1, 40, 2, 3\)"):
        one_rank(presets.nsa(8, 4, 8, 4, 10), q, k, v)
    with pytest.raises(ValueError, match=r"extras.pool\[0\] is NoneType; expected AttentionPool"):
        one_rank(replace(SPECS["attention"]), q, k, v, AttentionExtras(key_bias=torch.zeros(2, 2)))
    plan = make_plan(SPECS["corrected window"], 40, heads=2, head_dim=8)
    with pytest.raises(ValueError, match="return_lse is True; expected False"):
        attend(q, k, v, plan, return_lse=True)
    with pytest.raises(ValueError, match="return_selection is True; expected False"):
        attend(q, k, v, plan, return_selection=True)
    with pytest.raises(ValueError, match="expected a spec with select"):
        select(q, k, v, plan)
    chooses = [make_plan(SPECS[name], 40, heads=2, head_dim=8) for name in ("moba", "tiles choose")]
    with pytest.raises(ValueError, match=r"selection was made for .*; expected one for"):
        attend(q, k, v, chooses[1], selection=select(q, k, v, chooses[0]))

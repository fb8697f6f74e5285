"""How chosen chunks travel: in one round or a round for each owner, each chunk once, and beside what is computed."""

from typing import Any

import pytest
import torch
from rank_pool import RankPool

from distattn import chosen, passes, reference
from distattn.attend import attend, select
from distattn.chosen import wanted_chunks
from distattn.exchange import Exchange, Pending
from distattn.hierarchy_reference import hierarchical
from distattn.jobs.context import Context
from distattn.operators import sent
from distattn.plan import Plan, make_plan
from distattn.presets import hierarchical as levels
from distattn.spec import AttentionSpec, Summaries, TopChunks, chunk_window

LENGTH, CHUNK, HEADS, KV_HEADS, DIM = 94, 4, 4, 2, 8
SPECS = {
    "tokens": AttentionSpec(
        chunk_window(CHUNK, 2, global_keys=(3, 50)), (Summaries(CHUNK, reach=2), Summaries(16)), TopChunks(5, CHUNK)
    ),
    "tiles, both sides": AttentionSpec(
        chunk_window(CHUNK, 2, causal=False), (Summaries(CHUNK),), TopChunks(2, CHUNK, per="tile", heads="q")
    ),
}


def inputs(plan: Plan, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return [
        torch.randn(2, LENGTH, heads, DIM, generator=made).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]


def plan_of(name: str, context: Context | None, layout: str = "contiguous") -> Plan:
    mesh = context.mesh if context else None
    return make_plan(
        SPECS[name],
        LENGTH,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        mesh=mesh,
        layout=layout,
        block_q=8,
        block_k=8,
    )


def run(context: Context, name: str, layout: str, share: float) -> dict[str, Any]:
    """Forward and backward, with rounds from that share on: results, how many rounds, and bytes of chosen chunks."""
    plan, rounds = plan_of(name, context, layout), set[int]()

    class Watched(chosen.ChosenChunks):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            rounds.add(len(self.rounds))

    kept, before = (chosen._MUCH, passes.ChosenChunks), sent.sent.get("selected", 0)
    chosen._MUCH, passes.ChosenChunks = share, Watched  # type: ignore[misc]
    try:
        q, k, v, weight = inputs(plan)
        rows = [plan.shard(x).requires_grad_() for x in (q, k, v)]
        out = attend(*rows, plan)
        forward = sent.sent.get("selected", 0) - before
        grads = torch.autograd.grad((out * plan.shard(weight)).sum(), rows)
    finally:
        chosen._MUCH, passes.ChosenChunks = kept  # type: ignore[misc]
    assert plan.hierarchy is not None
    wanted = wanted_chunks(select(*(x.detach() for x in rows), plan).chunks, plan.hierarchy)
    wanted[:, plan.hierarchy.chunk_owner == plan.rank] = False
    return {
        "results": [plan.unshard(x.detach()) for x in (out, *grads)],
        "rounds": rounds,
        "forward": forward,
        "backward": sent.sent.get("selected", 0) - before - forward,
        "taken": int(wanted.sum()),
    }


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("world", "layout"), [(2, "contiguous"), (3, "striped"), (4, "contiguous")])
def test_one_round_and_several_give_the_same(name: str, world: int, layout: str, ranks: RankPool) -> None:
    once, often = (ranks(world, run, name, layout, share) for share in (1.0, 0.0))
    assert {n for rank in once for n in rank["rounds"]} == {1}
    assert {n for rank in often for n in rank["rounds"]} == {world - 1}
    for x, y in zip(once[0]["results"], often[0]["results"], strict=True):
        assert reference.max_error(x, y) < 1e-6
    q, k, v, weight = inputs(plan_of(name, None), torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = hierarchical(*leaves, SPECS[name]).out
    wanted = [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
    for x, y in zip(often[0]["results"], wanted, strict=True):
        assert reference.max_error(x, y) < 1e-5
    # Each chunk once a rank that wants it; asks are a byte for each chunk and head of another, and two numbers.
    taken, batch = sum(rank["taken"] for rank in once), 2
    rows, asked = taken * batch * CHUNK * 2 * DIM * 4, (world - 1) * (world * 16 + KV_HEADS * -(-LENGTH // CHUNK))
    assert sum(rank["forward"] for rank in once) == sum(rank["forward"] for rank in often) == rows + asked
    assert sum(rank["backward"] for rank in once) == rows
    several = world > 2  # these bring chunks again
    assert sum(rank["backward"] for rank in often) == rows * (1 + several)


def in_16_bits(context: Context) -> float:
    """The error of a result that the last launch writes in 16 bits, and in which some tiles choose nothing."""
    plan = plan_of("tokens", context)
    half = [plan.shard(x) for x in inputs(plan, torch.bfloat16)[:3]]
    wide = [x.float() for x in half]
    chosen = select(*half, plan)
    assert (chosen.chunks < 0).all(3).any() or plan.rank
    out = attend(*half, plan, selection=chosen)
    assert out.dtype == torch.bfloat16
    return reference.max_error(out, attend(*wide, plan, selection=chosen).double())


def test_the_last_launch_writes_16_bits(ranks: RankPool) -> None:
    assert max(ranks(2, in_16_bits)) < 2e-2


def rounds_by_share(context: Context, k: int) -> tuple[int, float]:
    """Rounds of a choice of k chunks a token, and what share of what others have the greediest rank wants."""
    spec = levels(8, (4, 16), (3,), k, "token")
    plan = make_plan(spec, 96, heads=2, head_dim=DIM, mesh=context.mesh, layout="contiguous", block_q=8, block_k=8)
    q, x, v = (torch.randn(1, plan.tokens, 2, DIM, generator=torch.Generator().manual_seed(n)) for n in range(3))
    chunks = select(q, x, v, plan).chunks
    assert plan.hierarchy is not None
    wanted = wanted_chunks(chunks, plan.hierarchy)
    wanted[:, plan.hierarchy.chunk_owner == plan.rank] = False
    most = wanted.double().sum()
    assert context.mesh is not None
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=context.mesh.get_group())
    asked = chosen.Asks(plan, Exchange(plan.group_name, plan.rank, sent), chunks).wait()
    made = chosen.ChosenChunks(plan, chunks, asked)
    return len(made.rounds), most.item() / wanted[:, plan.hierarchy.chunk_owner != plan.rank].numel()


def test_much_comes_owner_by_owner(ranks: RankPool) -> None:
    few, many = (ranks(4, rounds_by_share, k) for k in (1, 12))
    assert all(rounds == 1 and share <= 0.5 for rounds, share in few)
    assert all(rounds == 3 and share > 0.5 for rounds, share in many)


def log_of(context: Context, name: str, share: float) -> list[str]:
    """What happens to asks, chosen chunks and query tiles in a forward pass, with rounds from that share on."""
    log: list[str] = []
    send, attention = Exchange.send, passes.attention_forward

    def noted(self: Exchange, way: str, *arguments: Any) -> Pending:
        pending = send(self, way, *arguments)
        if way not in ("ask for chunks", "bring chosen keys and values"):
            return pending
        what = "asks" if way == "ask for chunks" else f"round {sum(line.startswith('sent round') for line in log)}"
        log.append(f"sent {what}")

        def wait() -> None:
            pending.wait()
            log.append(f"here {what}")

        return Pending(wait)

    def attended(*arguments: Any, **options: Any) -> None:
        log.append("tiles")
        attention(*arguments, **options)

    plan, much = plan_of(name, context), chosen._MUCH
    chosen._MUCH, Exchange.send, passes.attention_forward = share, noted, attended  # type: ignore[method-assign]
    try:
        q, k, v, _ = (plan.shard(x)[:1] for x in inputs(plan))
        attend(q, k, v, plan)
    finally:
        chosen._MUCH, Exchange.send, passes.attention_forward = much, send, attention  # type: ignore[method-assign]
    return log


def test_asks_and_rounds_travel_while_tiles_are_attended(ranks: RankPool) -> None:
    """As the host sees it: on a GPU, where launches do not wait, all of it travels beside the tiles."""
    before = ["tiles", "tiles", "sent asks", "tiles", "here asks", "sent round 0"]  # of the window, and of summaries
    for log in ranks(3, log_of, "tokens", 1.0):
        assert log == [*before, "here round 0", "tiles"]
    for log in ranks(3, log_of, "tokens", 0.0):
        assert log == [*before, "sent round 1", "here round 0", "tiles", "here round 1", "tiles"]

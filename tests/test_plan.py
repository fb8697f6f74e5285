"""Plans on paper: what they say, and what they refuse."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distattn import presets
from distattn.kernels.rows import pack_rows
from distattn.machine import Machine
from distattn.messages import Message, Parcel, Transfer
from distattn.patterns import Causal, Documents, GlobalTokens, SlidingWindow
from distattn.plan import Plan, make_plan
from distattn.spec import AttentionSpec

SIZES: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 64}


def on_paper(spec: AttentionSpec, length: int, world_size: int, rank: int = 0, **more: Any) -> Plan:
    return make_plan(spec, length, world_size=world_size, rank=rank, **SIZES | more)


def test_equal_arguments_give_the_same_plan() -> None:
    first = on_paper(presets.mistral(100), 1000, 2)
    assert on_paper(presets.mistral(100), 1000, 2) is first
    other = on_paper(presets.mistral(101), 1000, 2)
    assert other.key != first.key
    assert on_paper(presets.mistral(100), 1000, 2, rank=1).key == first.key


def test_plans_made_in_two_ways_are_one_object() -> None:
    first = on_paper(presets.mistral(100), 1000, 2)
    assert on_paper(presets.mistral(100), 1000, 2, layout=first.layout) is first


def test_what_ranks_send_is_what_the_others_receive() -> None:
    for schedule in ("direct", "slices", "ring"):
        plans = [
            on_paper(presets.longformer(300, global_tokens=range(0, 5000, 700)), 5000, 4, r, schedule=schedule)
            for r in range(4)
        ]
        for stage in range(len(plans[0].stages)):
            sends = {
                (plan.rank, m.peer, m.kv_heads, t): m.count
                for plan in plans
                for t, transfer in enumerate(plan.stages[stage].transfers)
                for m in transfer.sends
                if transfer.kind != "all_gather"
            }
            receives = {
                (m.peer, plan.rank, m.kv_heads, t): m.count
                for plan in plans
                for t, transfer in enumerate(plan.stages[stage].transfers)
                for m in transfer.receives
                if transfer.kind != "all_gather"
            }
            assert sends == receives


def test_work_on_paper_agrees_with_the_plan_of_each_rank() -> None:
    spec = AttentionSpec(Causal() & SlidingWindow(700, 0))
    work = on_paper(spec, 10_000, 4).work(itemsize=2)
    for rank in range(4):
        plan = on_paper(spec, 10_000, 4, rank)
        assert plan.sent_bytes(2) == work[rank].bytes_sent
        table = plan.stages[0].table
        assert int((table.full_pages + table.part_pages).sum()) * plan.heads == work[rank].tiles
    assert sum(w.pairs for w in work) == 4 * sum(min(i, 700) + 1 for i in range(10_000))


def test_heads_with_other_patterns_fetch_other_pages() -> None:
    plan = on_paper(presets.spattention(4, 8192), 8192, 4, rank=3, kv_heads=4, layout="contiguous")
    rows = [m.count for t in plan.stages[0].transfers for m in t.receives if m.kv_heads == (0,)]
    far = [m.count for t in plan.stages[0].transfers for m in t.receives if m.kv_heads == (3,)]
    # Head 0 looks at most 2,048 tokens back, into its neighbour; head 3 at least 6,144.
    assert sum(rows) == 2048 and sum(far) == 2048
    assert {m.peer for t in plan.stages[0].transfers for m in t.receives if m.kv_heads == (3,)} == {0}


def test_layouts_are_chosen_by_cost() -> None:
    assert on_paper(presets.mistral(4096), 1 << 20, 8).layout.name == "contiguous"
    assert on_paper(presets.dense(), 1 << 18, 8).layout.name in ("zigzag", "striped", "balanced")


def test_schedules_are_chosen_by_what_travels() -> None:
    def chosen(spec: AttentionSpec, seq_len: int, world_size: int, kv_heads: int = 8) -> Plan:
        sizes = {"heads": 8, "kv_heads": kv_heads, "head_dim": 128, "world_size": world_size, "rank": 1}
        return make_plan(spec, seq_len, **sizes)

    assert chosen(presets.mistral(1000), 1 << 18, 8).schedule == "direct"
    assert chosen(presets.dense(), 1 << 12, 4).schedule == "direct"  # little travels
    slices = chosen(presets.dense(), 1 << 18, 4)
    assert slices.schedule == "slices" and [s.kv_heads for s in slices.stages] == [range(h, h + 1) for h in range(8)]
    ring = chosen(presets.dense(), 1 << 18, 16)  # two slots of a slice would hold nearly four times its own rows
    assert ring.schedule == "ring" and len(ring.stages) == 16
    # Two slots: no stage holds more than one other rank's rows.
    assert max(stage.guest_rows for stage in ring.stages) <= (1 << 18) // 16
    assert chosen(presets.dense(), 1 << 19, 4, kv_heads=1).schedule == "ring"


@pytest.mark.full
def test_a_thousand_ranks_and_a_hundred_million_tokens_are_explained() -> None:
    plan = on_paper(AttentionSpec(Causal() & (SlidingWindow(4095, 0) | GlobalTokens(range(64)))), 100_000_000, 1024, 17)
    text = plan.explain()
    assert "100,000,000 tokens on 1,024 ranks" in text and "Predicted" in text
    assert len(text.splitlines()) < 40


def test_explain_lists_ranks_and_stages() -> None:
    lines = (
        on_paper(presets.dense(), 4096, 4, rank=1, schedule="ring")
        .explain(itemsize=4, machine=Machine.load("cpu"))
        .splitlines()
    )
    assert sum(line.split()[:1] == [str(r)] for r in range(4) for line in lines) >= 4
    assert any("Stages of rank 1" in line for line in lines)
    assert any(line.startswith("Kernels on this machine for float32: ") and " since " in line for line in lines)


def test_shards_hold_every_row_once() -> None:
    x = torch.arange(1001)[None, :, None]
    parts = [on_paper(presets.dense(), 1001, 3, r, layout="zigzag").shard(x) for r in range(3)]
    assert sorted(torch.cat(parts, 1).flatten().tolist()) == list(range(1001))
    plan = on_paper(presets.dense(), 1001, 3, 1, layout="zigzag")
    assert torch.equal(parts[1].flatten(), plan.positions)


def test_a_plan_can_share_the_layout_of_another() -> None:
    first = on_paper(AttentionSpec(Documents((100, 5000, 100, 900))), 6000, 3, layout="balanced")
    second = on_paper(presets.mistral(50), 6000, 3, layout=first.layout)
    assert second.segments == first.segments
    with pytest.raises(ValueError, match="layout is for 6000 tokens"):
        on_paper(presets.mistral(50), 6001, 3, layout=first.layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads is 3, which kv_heads 2 does not divide"),
        ({"head_dim": 0}, "head_dim is 0; expected a positive"),
        ({"world_size": 2, "rank": 2}, "rank is 2; expected 0 to 1"),
        ({"layout": "spiral"}, "layout is 'spiral'; expected one of"),
        ({"schedule": "spiral"}, "schedule is 'spiral'; expected one of"),
        ({"block_q": 48, "block_k": 32}, "expected one to divide the other"),
    ],
)
def test_impossible_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(presets.dense(), 100, **SIZES | change)
    with pytest.raises(ValueError, match="mesh has 3 dimensions; expected one or two"):
        make_plan(presets.dense(), 100, mesh=SimpleNamespace(ndim=3), **SIZES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        make_plan(presets.dense(), 100, mesh=SimpleNamespace(ndim=1), world_size=2, **SIZES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected an AttentionSpec"):
        make_plan(Causal(), 100, **SIZES)  # type: ignore[arg-type]


def test_what_goes_to_several_ranks_is_packed_at_once_where_heads_are_the_same() -> None:
    def message(peer: int, heads: tuple[int, ...], *runs: tuple[int, int]) -> Message:
        return Message(peer, heads, np.array(runs, np.int64))

    alike = message(0, (0, 1), (3, 5)), message(1, (0, 1), (4, 9)), message(3, (0, 1), (0, 1), (7, 9))
    x = torch.randn(2, 9, 2, 3)
    transfer = Transfer("all_to_all", alike, (), ())
    assert transfer.parcel("sends", 1) is transfer.parcel("sends", 1)
    for but, sent in ((1, (0, 2)), (None, (0, 1, 2))):
        parcel = transfer.parcel("sends", but)
        assert parcel.rows == {alike[n].peer: 2 * alike[n].count for n in sent}
        (places,) = parcel.places
        assert torch.equal(pack_rows([x], places), torch.cat([pack_rows([x], alike[n].places) for n in sent]))
    others = Parcel.of([message(0, (0,), (3, 5)), message(0, (1,), (2, 3)), message(2, (0,), (0, 1))])
    assert others.rows == {0: 3, 2: 1} and [part.heads for part in others.places] == [(0,), (1,), (0,)]
    assert Parcel.of([]).places == () and Parcel.of([]).rows == {}


@pytest.mark.full
def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = on_paper(presets.longformer(50, global_tokens=(0, 900)), 2000, 3).picture(tmp_path / "plan.png")
    from matplotlib import image

    pixels = image.imread(path)
    assert pixels.shape[0] > 300 and np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10

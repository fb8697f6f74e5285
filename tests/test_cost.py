"""Predictions, the machines that they are made for, and the script that measures one."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distattn import presets
from distattn.cost import Timeline
from distattn.forecast import predict
from distattn.heads import HeadsPlan
from distattn.jobs.plan import check, run
from distattn.kernels.chunks import summary_pages
from distattn.loads import stage_loads
from distattn.machine import Curve, Machine
from distattn.patterns import Causal, GlobalKeys, SlidingWindow
from distattn.plan import Plan, make_plan
from distattn.spec import AttentionSpec

SIZES: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 128}
H100 = Machine.load("h100")
WINDOW = AttentionSpec(Causal() & (SlidingWindow(700, 0) | GlobalKeys(range(0, 16384, 1024))))
HIERARCHICAL = presets.hierarchical(1024, (64, 1024), (16,), 8, "tile")


def on_paper(spec: AttentionSpec, length: int, world_size: int, **more: Any) -> Plan:
    return make_plan(spec, length, **SIZES | {"world_size": world_size, "rank": 0} | more)


def seconds(spec: AttentionSpec, length: int, world_size: int, machine: Machine = H100, **more: Any) -> list[float]:
    plan = on_paper(spec, length, world_size, **more)
    return [predict(plan, machine, backward=backward).seconds for backward in (False, True)]


def with_exchanges(times: float, latency: float = 0.0) -> Machine:
    """H100s between which everything takes so many times as long, and so many seconds more."""
    curves = {
        kind: Curve(curve.nbytes, tuple(times * x + latency for x in curve.seconds))
        for kind, curve in H100.exchanges.items()
    }
    return replace(H100, exchanges=curves)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("schedule", ["direct", "slices", "ring"])
@pytest.mark.parametrize("spec", [presets.dense(), WINDOW], ids=["dense", "window"])
def test_loads_are_those_of_the_stages_of_each_rank(spec: AttentionSpec, schedule: str, layout: str) -> None:
    for rank in range(4):
        plan = on_paper(spec, 16_384, 4, rank=rank, schedule=schedule, layout=layout)
        loads = stage_loads(plan.outline, plan.layout, plan.kv_heads, plan.schedule, plan.slices)
        for load, stage in zip(loads, plan.stages, strict=True):
            for tiles, table in ((load.alone, stage.alone), (load.guests, stage.with_guests)):
                heads = table.heads_by_table[:, None]
                full, part = (x.reshape(table.tables, -1) for x in (table.full_pages, table.part_pages))
                assert tiles.visits[rank] == (heads * (full + part)).sum()
                assert tiles.masked[rank] == (heads * part).sum()
                rows = (heads * (full + part > 0)).sum()
                assert tiles.rows[rank] == rows or (schedule == "ring" and rows <= tiles.rows[rank])
            shared, every = load.shared
            sent = sum(x.sent_bytes(1, rank, 4) for x in stage.transfers)
            received = sum(x.received_bytes(1, rank, 4) for x in stage.transfers)
            assert sent == load.sent[rank] + 3 * shared[rank]
            assert received == load.received[rank] + every - shared[rank]
            assert stage.guest_rows == load.guest_rows[rank]


@pytest.mark.parametrize("spec", [presets.dense(), WINDOW, HIERARCHICAL], ids=["dense", "window", "hierarchical"])
def test_longer_sequences_and_fewer_ranks_take_longer(spec: AttentionSpec) -> None:
    times = np.array([[seconds(spec, length, world) for world in (1, 2, 4)] for length in (1 << 19, 1 << 21)])
    assert (times[1] > times[0]).all()
    assert (times[1, :-1] > times[1, 1:]).all()


def test_a_slow_network_is_what_binds_and_a_backward_pass_takes_longer() -> None:
    plan = on_paper(presets.dense(), 1 << 17, 4)
    fast = predict(plan, H100)
    slow = predict(plan, with_exchanges(100.0))
    assert fast.bound(fast.slowest) == "compute" and slow.bound(slow.slowest) == "exchange"
    assert slow.seconds > 5 * fast.seconds and (slow.compute == fast.compute).all()
    assert predict(plan, H100, backward=True).seconds > 2 * fast.seconds
    # Whatever the machine: no pass ends before its kernels and copies, nor before what it waits for.
    for found in (fast, slow):
        assert (found.total >= found.compute + found.copies).all()
        assert (found.exposed <= found.total).all()


def test_summaries_asks_and_chunks_travel_behind_tiles() -> None:
    """Nothing is waited for: neither gathered keys, while the host launches, nor summaries, asks and chunks."""
    plan = make_plan(HIERARCHICAL, 1 << 20, heads=32, kv_heads=8, head_dim=128, world_size=2, rank=0)
    lost = predict(plan, with_exchanges(1.0, latency=1e-3)).seconds - predict(plan, H100).seconds
    assert 0 <= lost < 1e-4


def test_pages_that_chosen_chunks_open_are_foretold() -> None:
    """Against what is visited once chunks were drawn."""
    plan = make_plan(HIERARCHICAL, 1 << 18, heads=4, kv_heads=1, head_dim=64, world_size=1, rank=0)
    hierarchy, generator = plan.hierarchy, torch.Generator().manual_seed(0)
    assert hierarchy is not None
    first, _, _, chosen = hierarchy.visited()
    found = hierarchy.opened(first, chosen)
    runs = np.arange(len(first) // 16, len(first), len(first) // 16)
    exists, k = hierarchy.on(torch.device("cpu"), "row_bits"), int(chosen.max()) // hierarchy.chunk
    pages = []
    for some in (True, False):
        every = torch.full((1, 1, len(runs), k), -1, dtype=torch.int32)
        for row, at in enumerate(first[runs].tolist()):
            before = at // hierarchy.chunk
            every[0, 0, row] = torch.randperm(before, generator=generator)[:k].sort()[0].int() if some else -1
        position = torch.from_numpy(first[runs]).int()
        pages.append((summary_pages(every, position, exists, hierarchy.ladder)[0] >= 0).sum(-1).double().mean().item())
    assert found[0] == 0 and pages[0] - pages[1] == pytest.approx(found[runs].mean(), rel=0.2)


def test_a_ring_pays_for_every_stage_what_a_direct_plan_pays_once() -> None:
    late = with_exchanges(1.0, latency=0.1)
    took = {name: seconds(presets.dense(), 1 << 16, 8, late, schedule=name)[0] for name in ("direct", "ring")}
    # Of seven others or at once.
    assert took["ring"] - took["direct"] == pytest.approx(0.6, rel=0.1)


def test_stages_of_many_ranks_that_are_alike_are_not_gone_through_one_by_one() -> None:
    many = seconds(presets.dense(), 1 << 21, 1024, schedule="ring", layout="zigzag")
    late = seconds(presets.dense(), 1 << 21, 1024, with_exchanges(1.0, latency=0.1), schedule="ring", layout="zigzag")
    assert late[0] - many[0] == pytest.approx(102.3, rel=0.05)


def test_ranks_that_exchange_heads_pay_for_each_tensor_once_and_attend_as_their_plans_do() -> None:
    late = with_exchanges(1.0, latency=0.1)
    for head_ranks in (2, 4):
        plan = on_paper(presets.dense(), 1 << 17, 4, head_ranks=head_ranks, schedule="direct")
        assert isinstance(plan, HeadsPlan)
        for backward in (False, True):
            found, inner = (predict(x, H100, backward=backward) for x in (plan, plan.inner))
            lost, lost_within = (
                predict(x, late, backward=backward).seconds - before.seconds
                for x, before in ((plan, found), (plan.inner, inner))
            )
            assert lost - lost_within == pytest.approx(0.4, rel=3e-3)  # q, k, v and out, or their gradients
            assert found.compute.max() == inner.compute.max() and found.seconds > inner.seconds


def test_heads_are_exchanged_within_nodes_and_keys_travel_between_them() -> None:
    pair = replace(H100, gpus_per_node=2)
    plan = on_paper(presets.dense(), 1 << 17, 4, head_ranks=2, schedule="direct")
    far = replace(pair, between_latency=1.0)
    # K and V together, but neither q nor out.
    assert predict(plan, far).seconds - predict(plan, pair).seconds == pytest.approx(1.0, rel=0.05)
    alone = on_paper(presets.dense(), 1 << 17, 2, head_ranks=2)
    assert predict(alone, far).seconds == predict(alone, pair).seconds


def test_ranks_that_exchange_heads_wait_for_the_slowest_of_their_group_only() -> None:
    time = Timeline(with_exchanges(0.0, 1.0), 4, group=2)
    time.compute(np.array([1.0, 3.0, 2.0, 2.0]), host=0.0)
    time.wait(time.start("all_to_all", np.ones(4)))
    assert time.end(0.0).total == pytest.approx([4.0, 4.0, 3.0, 3.0])


def test_a_host_that_is_too_slow_is_what_binds() -> None:
    plan = on_paper(WINDOW, 16_384, 4)
    found = predict(plan, replace(H100, host={name: 1.0 for name in H100.host}))
    assert found.bound(0) == "host" and found.seconds > 3.0


def test_kernels_lose_what_exchanges_beside_them_take() -> None:
    times = []
    for drag in (0.0, 1.0):
        machine = replace(with_exchanges(0.0, 2.0), drag=dict.fromkeys(H100.drag, drag), gpus_per_node=2)
        time = Timeline(replace(machine, host=dict.fromkeys(H100.host, 0.0)), 2)
        done = time.start("neighbours", np.ones(2), 1)
        time.compute(np.full(2, 3.0), host=0.0)
        time.wait(done)
        times.append(time.end(0.0).seconds)
    assert times == pytest.approx([3.0, 5.0])


def test_curves_pass_through_what_was_measured() -> None:
    curve = Curve((1e3, 1e6, 1e9), (1e-4, 2e-4, 1e-2))
    assert curve(np.array([0.0, 1.0, 1e3, 1e6, 1e9])).tolist() == pytest.approx([0.0, 1e-4, 1e-4, 2e-4, 1e-2])
    assert 2e-4 < curve(np.array([1e7]))[0] < 1e-2
    assert curve(np.array([2e9]))[0] == pytest.approx(1e-2 + 1e9 * (1e-2 - 2e-4) / (1e9 - 1e6))


def test_between_nodes_it_takes_longer() -> None:
    nbytes = np.array([1e9])
    near, far = (H100.with_nodes(gpus).travels("all_to_all", nbytes, 8)[0] for gpus in (8, 4))
    assert far == pytest.approx(H100.between_latency + 1e9 / H100.between_nodes) and far > near


def test_a_machine_is_read_as_it_was_written(tmp_path: Path) -> None:
    H100.save(tmp_path / "again.json")
    assert Machine.load(tmp_path / "again.json") == H100
    assert "assumed" in json.dumps(H100.assumed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"copy": 0}, "copy of .* is 0; expected a number above 0"),
        ({"matmul": "fast"}, "matmul of .* is 'fast'; expected a number"),
        ({"drag": {"forward": 0.5}}, "drag of .* expected forward, backward"),
        ({"kernels": []}, r"kernels of .* is \[\]; expected a list"),
        ({"kernels": [{"kind": "pattern"}]}, "kernels of .* has kind; expected kind, way, itemsize"),
        ({"speed": 1}, "expected name, conditions, kernels"),
        (
            {"exchanges": {kind: {"nbytes": [2.0, 1.0], "seconds": [1.0, 1.0]} for kind in H100.exchanges}},
            "expected as many, ascending sizes",
        ),
    ],
)
def test_files_that_are_not_machines_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(asdict(H100) | change))
    with pytest.raises(ValueError, match=message):
        Machine.load(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"machine is 'h1000'; expected a file .* or one of cpu, h100"):
        Machine.load("h1000")
    (tmp_path / "not.json").write_text("h100")
    with pytest.raises(ValueError, match="is not JSON"):
        Machine.load(tmp_path / "not.json")


def test_least_squares_find_what_launches_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    from calibrate import split  # type: ignore[import-not-found]

    rows = [(100.0, 10.0, 0.0), (400.0, 10.0, 5.0), (1000.0, 80.0, 80.0), (300.0, 80.0, 0.0)]
    found, told = split(rows, [2.0 * a + 3.0 * b + 5.0 * c for a, b, c in rows])
    assert found == pytest.approx([2.0, 3.0, 5.0]) and told[0] == pytest.approx(230.0)
    # None is below 0, whatever was measured.
    assert min(split(rows, [1.0, 9.0, 2.0, 4.0])[0]) >= 0


def test_job_plan_tells_of_several_numbers_of_ranks_and_what_was_assumed() -> None:
    from test_jobs import config_of

    config = config_of(["job=plan", "job.world_sizes=[2,64]", "seq_len=1048576", "cluster.gpus_per_node=4"])
    check(config)
    report = run(config, None)["report"]  # type: ignore[arg-type]
    lines = report.splitlines()
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()][1:] == ["2", "64"]
    assert "nodes of 4 have 50 GB/s" in report and "between_latency: " in report
    by_heads = config_of(["job=plan", "job.world_sizes=[4]", "attention=dense", "layout.head_ranks=2"])
    check(by_heads)
    assert "each 2 ranks exchange heads" in run(by_heads, None)["report"]  # type: ignore[arg-type]
    for change, message in (
        ("job.world_sizes=[2,100000]", "100000 ranks are too many"),
        ("layout.head_ranks=2", "expected a divisor of the number of ranks, 1"),
        ("cluster.gpus_per_node=0", "cluster.gpus_per_node is 0; expected at least 1"),
        ("job.machine=nothing", "machine is 'nothing'; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            check(config_of(["job=plan", "seq_len=1048576", "attention=dense", change]))

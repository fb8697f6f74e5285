"""Two GPUs through NCCL: the choices and the numbers of one GPU, typed errors in time, the same bits through Ray."""

import itertools
import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import test_train
import torch
from commanding import command, environment
from rank_pool import RankPool
from test_hierarchy import Case, compare, everywhere, on_cpu, run

import distattn
from distattn import presets, reference
from distattn.attend import attend, select
from distattn.heads import HeadsPlan
from distattn.hierarchy_reference import hierarchical
from distattn.jobs.context import Context
from distattn.operators import sent
from distattn.patterns import Causal, Dense, GlobalTokens, SlidingWindow
from distattn.plan import make_plan
from distattn.spec import AttentionSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
CPU = Context(0, 1, 0, torch.device("cpu"), None, Path())


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    pool = RankPool(2, "cuda")
    yield pool
    pool.close()


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


# Choices

LENGTH, CHUNK, K, DIM = 1000, 32, 4, 64  # the last chunk is short
HEADS, KV_HEADS = 4, 2


class Choice(NamedTuple):
    per: str
    score: str
    dtype: torch.dtype


CHOICES = [
    *itertools.starmap(Choice, itertools.product(("token", "tile"), ("mean", "mass"), (torch.float32, torch.bfloat16)))
]


def qkv(dtype: torch.dtype) -> list[torch.Tensor]:
    return [random(LENGTH, n, DIM, seed=seed).to(dtype) for seed, n in enumerate((HEADS, KV_HEADS, KV_HEADS))]


def choices(context: Context, layout: str) -> list[torch.Tensor]:
    """What each of CHOICES chooses: [1, positions, tables, n]."""
    found = []
    for per, score, dtype in CHOICES:
        spec = presets.hierarchical(2 * CHUNK, (CHUNK, 4 * CHUNK), (4,), K, per, score)  # type: ignore[arg-type]
        plan = make_plan(
            spec, LENGTH, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, mesh=context.mesh, layout=layout,
            block_q=64, block_k=64,
        )  # fmt: skip
        assert spec.select is not None
        chosen = select(*(plan.shard(x).to(context.device) for x in qkv(dtype)), plan)
        found.append(everywhere(chosen, plan, spec.select).cpu())
    return found


def scores_of(choice: Choice) -> torch.Tensor:
    """[positions, key/value heads, chunks], in float64, by the definition (`spec.TopChunks`)."""
    q, k, _ = (x[0].double() for x in qkv(choice.dtype))
    count = -(-LENGTH // CHUNK)
    ends = (torch.arange(1, count + 1) * CHUNK).clamp_max(LENGTH)
    keys, queries = (torch.stack([part.mean(0) for part in x.split(CHUNK)]) for x in (k, q))
    before = torch.arange(1, LENGTH + 1)
    if choice.per == "tile":  # by the mean query of the tile before
        queries = torch.cat((torch.zeros_like(queries[:1]), queries[:-1])).repeat_interleave(CHUNK, 0)[:LENGTH]
        before = (before - 1) // CHUNK * CHUNK
    else:
        queries = q
        if choice.score == "mass":  # queries that are not averaged meet keys of their own dtype
            keys = keys.to(choice.dtype).double()
    keys = keys.repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("ihd,jhd->ihj", queries, keys) * DIM**-0.5
    if choice.score == "mass":
        sizes = ends.diff(prepend=torch.zeros(1, dtype=torch.long)).double()
        seen = (ends <= before[:, None])[:, None]
        scores = (scores + sizes.log()).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return scores.unflatten(1, (KV_HEADS, -1)).sum(2)


def differing(a: torch.Tensor, b: torch.Tensor, scores: torch.Tensor) -> tuple[int, float]:
    """Rows in which two choices differ, and how far apart the scores of what they differ in are at most."""
    assert a.shape == b.shape == (1, LENGTH, KV_HEADS, K) and (a >= 0).any()
    rows, furthest = (a != b).any(-1).nonzero().tolist(), 0.0
    for _, i, h in rows:
        apart = sorted({*a[0, i, h].tolist()} ^ {*b[0, i, h].tolist()})
        assert -1 not in apart, f"position {i}, head {h}: {a[0, i, h]}, {b[0, i, h]}"
        furthest = max(furthest, float(scores[i, h, apart].max() - scores[i, h, apart].min()))
    return len(rows), furthest


def check_choices(alone: list[torch.Tensor], by_layout: dict[str, list[torch.Tensor]]) -> None:
    """On one device as on two; on a CPU too, where scores are more than 1e-4 apart."""
    for number, choice in enumerate(CHOICES):
        for layout, found in by_layout.items():
            same = torch.equal(found[number], alone[number])
            assert same, f"{choice}, {layout}: {int((found[number] != alone[number]).any(-1).sum())} rows choose others"
    for choice, there, here in zip(CHOICES, alone, choices(CPU, "contiguous"), strict=True):
        rows, apart = differing(there, here, scores_of(choice))
        assert apart <= 1e-4, f"{choice}: {rows} rows differ from the CPU's, by scores that are up to {apart:g} apart"
        assert rows <= LENGTH * KV_HEADS // 50, f"{choice}: {rows} rows differ from the CPU's"


def test_choices_do_not_depend_on_the_number_of_gpus(gpus: RankPool) -> None:
    alone = gpus(1, choices, "contiguous")[0]
    check_choices(alone, {layout: gpus(2, choices, layout)[0] for layout in ("contiguous", "striped")})


# Numbers


class Numbers(NamedTuple):
    spec: AttentionSpec
    dtype: torch.dtype
    schedule: str
    layout: str
    length: int = 333
    block: int = 32
    head_dim: int = 64


WINDOW = AttentionSpec(Causal() & (SlidingWindow(300, 0) | GlobalTokens(range(3))))
LEVELS = presets.combiner(128, (64, 256), (2,))
HOPPER = {"length": 1000, "block": 128, "head_dim": 128}
NUMBERS = {
    f"{name}, {schedule}, {dtype}".replace("torch.", ""): Numbers(spec, dtype, schedule, layout, **sizes)
    for name, spec, layout, sizes in (
        ("window and globals", WINDOW, "contiguous", {}),
        ("dense", AttentionSpec(Dense()), "zigzag", {}),
        ("levels", LEVELS, "striped", {"block": 64}),
        ("window and globals, large tiles", WINDOW, "contiguous", HOPPER),
        ("causal, large tiles", AttentionSpec(Causal()), "zigzag", HOPPER),
        ("levels, large tiles", LEVELS, "contiguous", HOPPER),
    )
    for schedule, dtype in (("direct", torch.float32), ("ring", torch.bfloat16), ("slices", torch.bfloat16))
    if not (sizes is HOPPER and dtype == torch.float32)
}


def inputs_of(case: Numbers) -> list[torch.Tensor]:
    """q, k, v, and what out is multiplied by in the loss."""
    shapes = [(heads, case.head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [random(case.length, *shape, seed=seed).to(case.dtype) for seed, shape in enumerate(shapes)]


def numbers(context: Context, cases: list[Numbers]) -> list[tuple[list[torch.Tensor], set[str]]]:
    """out, dq, dk and dv of the whole sequence, and the kernels that were chosen."""
    from distattn.kernels import attention

    found, choose = [], attention.choose
    for case in cases:
        kernels = set[str]()

        def noted(*arguments: Any, kernels: set[str] = kernels, **more: Any) -> Any:
            choice = choose(*arguments, **more)
            kernels.add(choice.kernel)
            return choice

        plan = make_plan(
            case.spec, case.length, heads=HEADS, kv_heads=KV_HEADS, head_dim=case.head_dim, mesh=context.mesh,
            layout=case.layout, schedule=case.schedule, block_q=case.block, block_k=case.block,
        )  # fmt: skip
        q, k, v, weight = (plan.shard(x).to(context.device) for x in inputs_of(case))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        attention.choose = noted  # type: ignore[assignment]
        try:
            out = attend(q, k, v, plan)
            grads = torch.autograd.grad((out * weight).sum(), leaves)
        finally:
            attention.choose = choose
        found.append(([plan.unshard(x.detach()).cpu() for x in (out, *grads)], kernels))
    return found


def test_numbers_match_the_oracle_and_one_gpu(gpus: RankPool) -> None:
    cases = [*NUMBERS.values()]
    check_numbers(gpus(1, numbers, cases)[0], gpus(2, numbers, cases)[0])


def check_numbers(alone: list[Any], together: list[Any]) -> None:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    for (name, case), (one, _), (two, kernels) in zip(NUMBERS.items(), alone, together, strict=True):
        *leaves, weight = (x.double() for x in inputs_of(case))
        leaves = [x.requires_grad_() for x in leaves]
        # The other oracle goes row by row, and takes summaries too.
        static = reference.attention(*leaves, case.spec.tokens)[0] if case.spec.is_static else None
        out = hierarchical(*leaves, case.spec).out if static is None else static
        wanted = [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
        tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
        for what, x, y, z in zip(("out", "dq", "dk", "dv"), one, two, wanted, strict=True):
            assert reference.max_error(y, z) <= tolerance, f"{name}: {what} of two GPUs and of the oracle"
            assert reference.max_error(y, x.double()) <= tolerance, f"{name}: {what} of two GPUs and of one"
        assert "hopper" in kernels or not hopper or case.block != 128, f"{name}: computed by {kernels}"


def replayed(context: Context, spec: AttentionSpec, schedule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A step on inputs that a CUDA graph got after it was captured with others, and the same step without a graph."""
    plan = make_plan(spec, 1024, heads=4, kv_heads=2, head_dim=128, mesh=context.mesh, schedule=schedule)
    inputs, others = (
        [plan.shard(random(1024, heads, 128, seed=seed + n).to(torch.bfloat16)).to(context.device) for n, heads in
         enumerate((4, 2, 2))]
        for seed in (0, 10)
    )  # fmt: skip
    with torch.no_grad():
        attend(*inputs, plan)  # what is made at the first call is made
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = attend(*inputs, plan)
        expected = attend(*others, plan)
        for x, y in zip(inputs, others, strict=True):
            x.copy_(y)
        graph.replay()
    torch.cuda.synchronize()
    return out.cpu(), expected.cpu()


@pytest.mark.parametrize(("spec", "schedule"), [(WINDOW, "direct"), (AttentionSpec(Dense()), "slices")])
def test_a_planned_step_can_be_captured_in_a_graph(gpus: RankPool, spec: AttentionSpec, schedule: str) -> None:
    for out, expected in gpus(2, replayed, spec, schedule):
        assert torch.equal(out, expected)


HIERARCHIES = [
    Case(name, 2, layout, schedule, (4, 2), 75 + n, n % 2 == 0)
    for n, (name, layout, schedule) in enumerate(
        [
            ("three levels and globals", "contiguous", "direct"),
            ("attention", "striped", "ring"),
            ("gates and choice", "zigzag", "direct"),
            ("tokens choose", "striped", "direct"),
            ("tokens choose by mass", "contiguous", "ring"),
            ("tiles choose by mass", "balanced", "direct"),
            ("nsa", "contiguous", "direct"),
            ("corrected window", "contiguous", "ring"),
            ("registers", "zigzag", "direct"),
        ]
    )
]


def hierarchies(context: Context, cases: list[Case]) -> list[dict[str, Any]]:
    return [{key: on_cpu(value) for key, value in run(context, case).items()} for case in cases]


def test_hierarchies_and_their_choices_match_the_oracle(gpus: RankPool) -> None:
    for case, found in zip(HIERARCHIES, gpus(2, hierarchies, HIERARCHIES)[0], strict=True):
        try:
            compare(case, found)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def again(context: Context) -> tuple[bool, list[float]]:
    """Whether steps that follow one another at once give the same bits, and how far they are from one GPU's.

    They are long enough for asks, chunks and tiles to be under way at the same time.
    """
    spec = presets.hierarchical(1024, (64, 1024), (16,), 8, "tile", global_keys=range(64))
    sizes: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 128}
    plan, alone = (make_plan(spec, 65_536, **sizes, mesh=mesh) for mesh in (context.mesh, None))
    every = [random(65_536, n, 128, seed=n).to(context.device, torch.bfloat16) for n in (8, 2, 2)]
    steps = []
    for some in (plan, alone):
        rows = [some.shard(x).clone().requires_grad_() for x in every]
        outs = [attend(*rows, some) for _ in range(6)]
        steps.append([[out.detach(), *torch.autograd.grad(out.float().square().sum(), rows)] for out in outs])
    mine, theirs = steps
    same = all(torch.equal(x, y) for step in mine[1:] for x, y in zip(step, mine[0], strict=True))
    return same, [reference.max_error(x, plan.shard(y).double()) for x, y in zip(mine[0], theirs[0], strict=True)]


def test_steps_that_follow_at_once_give_the_same_bits(gpus: RankPool) -> None:
    for same, errors in gpus(2, again):
        assert same and max(errors) < 2e-2, errors


# Training


def learn(context: Context, folder: str, overrides: list[str]) -> str:
    return str(test_train.run(context, folder, overrides)["error"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus_learn_what_one_learns(gpus: RankPool, tmp_path: Path, dtype: str) -> None:
    """Parameters in shards, groups of ranks with windows of their own, and losses that are read back late."""
    curves = []
    for count, groups in ((1, 1), (2, 1), (2, 2)):
        folder = tmp_path / f"{count} {groups}"
        folder.mkdir()
        windows = [f"job.data_ranks={groups}", f"job.accumulate={2 // groups}", "job.log_every=4"]
        said = gpus(count, learn, str(folder), [*windows, f"model.dtype={dtype}", "model.head_dim=64"])
        assert said == ["None"] * count
        curves.append(test_train.curve_of(folder))
    assert len(curves[0]) == 10 and curves[0][-1][1] < curves[0][0][1] - 1
    for other in curves[1:]:
        for mine, theirs in zip(curves[0], other, strict=True):
            # Loss and bits a byte; norms of gradients in 16 bits are further apart.
            assert theirs[:3] == pytest.approx(mine[:3], abs=1e-3 if dtype == "float32" else 0.03)


# Faults

DEADLINE = 1.5  # the launcher waits 5 s for the others once a rank is dead, and these look for it after the deadline
FAULTS = {  # kind, at, where, spec, errors that the survivor may raise
    "killed in a forward pass": ("kill", 2, "bring", "window", "PeerLost StepTimeout"),
    "killed in a backward pass": ("kill", 2, "return", "ring", "PeerLost StepTimeout"),
    "frozen in a forward pass": ("freeze", 2, "bring", "summaries", "StepTimeout"),
    "frozen in a backward pass": ("freeze", 1, "return", "window", "StepTimeout"),
    "leaves out a backward pass": ("skip", 1, "", "window", "PlanMismatch"),
}


@pytest.fixture(scope="module")
def chaos() -> Iterator[ModuleType]:
    """scripts/chaos.py, which rank processes find by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(distattn.__file__).parent.parent / "scripts")
        import chaos

        yield chaos


@pytest.mark.parametrize("name", FAULTS)
def test_the_survivor_raises_a_typed_error_in_time(chaos: ModuleType, name: str) -> None:
    kind, at, where, spec, expected = FAULTS[name]
    fault = chaos.Fault(kind, 1, at, where)
    outcome = chaos.play(fault, spec, 2, DEADLINE, device="cuda")
    assert chaos.judge(fault, outcome, 2, DEADLINE) == [], outcome
    assert outcome.struck and outcome.code == 1
    assert outcome.type_of(0) in expected.split() and "rank 1" in outcome.errors[0], outcome
    assert kind != "kill" or outcome.errors[1] == "was ended by SIGKILL"


def test_a_rank_that_freezes_before_the_gpus_have_met(chaos: ModuleType) -> None:
    """NCCL connects two ranks when they first exchange something, and the one that begins waits in that call."""
    fault = chaos.Fault("freeze", 1, 1, "bring")
    outcome = chaos.play(fault, "window", 2, 6.0, device="cuda", warm=False)
    assert chaos.judge(fault, outcome, 2, 6.0) == [], outcome
    assert outcome.struck and outcome.type_of(0) == "StepTimeout", outcome


def test_sound_ranks_end_well(chaos: ModuleType) -> None:
    outcome = chaos.play(chaos.Fault(), "window", 2, DEADLINE, device="cuda")
    assert chaos.judge(chaos.Fault(), outcome, 2, DEADLINE) == [], outcome
    assert (outcome.code, outcome.done) == (0, {0, 1})


@pytest.mark.parametrize("what", ["spec", "batch"])
def test_ranks_that_disagree_send_nothing(tmp_path: Path, what: str) -> None:
    launcher = ("launcher.device=cuda", "launcher.num_workers=2", "launcher.timeout=30", "launcher.stop_timeout=0.5")
    job = ("job=custom", "job.name=trial_jobs:disagrees", f"+job.params.what={what}", "output_dir=out")
    code, text = ended(command(*job, *launcher), tmp_path, 90)
    assert code == 1, text
    for rank in (0, 1):
        assert re.search(rf"^distattn: rank {rank} .*failed: distattn\.errors\.PlanMismatch: ", text, re.M), text
    sent, pids = ([*tmp_path.glob(f"out/{name}*")] for name in ("sent", "pid"))
    assert [path.read_text() for path in sent] == ["0", "0"]
    assert len(pids) == 2 and not any(Path(f"/proc/{path.read_text()}").exists() for path in pids)
    assert time.time() - max(path.stat().st_mtime for path in sent) < 30 + 10


def ended(arguments: list[str], folder: Path, seconds: float) -> tuple[int, str]:
    """Exit code and stderr of a command, which is interrupted if it takes too long."""
    with subprocess.Popen(
        arguments, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, text = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            _, text = process.communicate(timeout=60)
            raise AssertionError(f"not done within {seconds:g} s: {text}") from None
    return process.returncode, text


# Launchers


def test_ray_gives_the_bits_of_local_ranks(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    reports = []
    for name in ("local", "ray"):
        code, text = ended(
            command(
                *("job=prefill", "attention=mistral", "seq_len=4096", "attention.window=1000", "job.picture=false"),
                *(f"launcher={name}", "launcher.num_workers=2", "launcher.device=cuda", f"output_dir={name}"),
            ),
            tmp_path,
            180,
        )
        assert code == 0, text
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    for key in ("bits_per_byte", "max_error", "bytes_sent", "world_size", "device"):
        assert reports[0][key] == reports[1][key], key
    assert reports[0]["world_size"] == 2


# Exchanging heads


def by_heads(context: Context, kv_heads: int) -> tuple[list[torch.Tensor], list[int]]:
    """out, lse, dq, dk and dv of ranks that exchange heads, and the bytes planned and sent."""
    mesh = context.mesh_for(2)
    plan = make_plan(
        presets.mistral(100), LENGTH, heads=HEADS, kv_heads=kv_heads, head_dim=DIM, mesh=mesh, block_q=64, block_k=64
    )
    assert isinstance(plan, HeadsPlan)
    x = [random(LENGTH, n, DIM, seed=n) for n in (HEADS, kv_heads, kv_heads)]
    inputs = [plan.shard(y).to(context.device).requires_grad_() for y in x]
    start = sent.total
    out, lse = attend(*inputs, plan, return_lse=True)
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), inputs)
    planned = plan.sent_bytes(4, lse=True) + plan.sent_bytes_backward(4, lse=True)
    counted = [planned, sent.total - start]
    return [plan.unshard(y.detach()).cpu() for y in (out, lse, *grads)], counted


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_ranks_exchange_heads(gpus: RankPool, kv_heads: int) -> None:
    x = [random(LENGTH, n, DIM, seed=n).double().requires_grad_() for n in (HEADS, kv_heads, kv_heads)]
    out, lse = reference.attention(*x, presets.mistral(100).tokens)
    wanted = [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), x)]
    for found, (planned, counted) in gpus(2, by_heads, kv_heads):
        assert planned == counted > 0
        for ours, theirs in zip(found, wanted, strict=True):
            assert reference.max_error(ours, theirs.detach()) < 1e-5

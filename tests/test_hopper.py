"""The kernels for Hopper GPUs against the float64 oracle; they run on no other device."""

import math

import pytest
import selected_cases
import torch
from kernel_cases import DEVICE, Case, check, inputs, run, split, table_of

from distattn import presets, reference
from distattn.attend import attend, select
from distattn.kernels import work
from distattn.kernels.attention import Pages, attention_backward, attention_forward, choose, row_deltas
from distattn.patterns import Causal, Dense, Documents, GlobalTokens, Pattern, PerHead, SlidingWindow
from distattn.plan import make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
WINDOW = Causal() & (SlidingWindow(300, 0) | GlobalTokens(range(3)))


def case(pattern: Pattern, length: int, **others: object) -> Case:
    sizes = dict(block_q=128, block_k=128, head_dim=128, value_dim=128, dtype=torch.bfloat16, scale=0.09)
    return Case(pattern, length, tokens_first=True, **sizes | others)  # type: ignore[arg-type]


CASES = {
    "window": case(WINDOW, 1000, batch=2),
    "dense, whole tiles": case(Dense(), 1024, heads=8),
    "causal, heads of 64": case(Causal(), 777, head_dim=64, value_dim=64, dtype=torch.float16),
    "three heads a key head": case(Causal(), 500, heads=3, kv_heads=1),
    "rows that see nothing": case(Documents([400, 200]) & Causal() & ~SlidingWindow(130, 0), 600),
    "a table a head": case(PerHead([Causal(), WINDOW, Dense(), SlidingWindow(99, 99)]), 650),
    "one token": case(Causal(), 1),
    "several items a program": case(WINDOW, 2500, heads=32, kv_heads=4),
    "several items a program, no masks": case(Dense(), 1280, heads=32, kv_heads=8),
}


@pytest.mark.parametrize(
    ("name", "cut"), [*((name, False) for name in CASES), ("window", True), ("a table a head", True)]
)
def test_hopper_matches_the_oracle(name: str, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut:  # every row of more than two visits leaves partial results
        monkeypatch.setattr(work, "_SHORTEST", 2)
        monkeypatch.setattr(work, "_LONGEST", 0.0)
    it = CASES[name]
    q, k, v, grad, _ = inputs(it)
    own, guests = (Pages(*pair) for pair in zip(split(it, k), split(it, v), strict=True))
    assert choose(q, own, guests, table_of(it), grad, it.scale).kernel == "hopper"
    check(it)


@pytest.mark.parametrize("name", ["window", "a table a head"])
@pytest.mark.parametrize("cut", [False, True])
def test_hopper_resumes(name: str, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut:
        monkeypatch.setattr(work, "_SHORTEST", 2)
        monkeypatch.setattr(work, "_LONGEST", 0.0)
    it = CASES[name]
    table = table_of(it)
    q, k, v, grad, _ = inputs(it)
    own, guests = (Pages(*pair) for pair in zip(split(it, k), split(it, v), strict=True))
    out, lse = torch.zeros(grad.shape, device=q.device), torch.full(q.shape[:3], -torch.inf, device=q.device)
    attention_forward(q, own, guests, table, out, lse, scale=it.scale)
    assert choose(q, own, guests, table, out, it.scale).kernel == "hopper"
    twice, twice_lse = out.clone(), lse.clone()
    attention_forward(q, own, guests, table, twice, twice_lse, scale=it.scale, before=twice)
    # Every key counted twice: the same mean, and log 2 more.
    torch.testing.assert_close(twice, out, atol=1e-5, rtol=0)
    torch.testing.assert_close(twice_lse, lse + 0.6931472, atol=1e-5, rtol=0)
    half = torch.full_like(out, torch.nan, dtype=q.dtype)
    attention_forward(q, own, guests, table, half, lse, scale=it.scale, before=out)
    assert torch.equal(half, twice.to(q.dtype)) and torch.equal(lse, twice_lse)


@pytest.mark.parametrize("name", ["window", "rows that see nothing", "a table a head"])
@pytest.mark.parametrize("cut", [False, True])
def test_gradients_of_16_bits(name: str, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written instead of added to, they are those of 32 bits, rounded once."""
    if cut:
        monkeypatch.setattr(work, "_SHORTEST", 2)
        monkeypatch.setattr(work, "_LONGEST", 0.0)
    it = CASES[name]
    table = table_of(it)
    q, k, v, grad, grad_lse = inputs(it)
    wide = run(it, q, k, v, grad, grad_lse)
    own, guests = (Pages(*pair) for pair in zip(split(it, k), split(it, v), strict=True))
    dq, d_own, d_guests = torch.zeros_like(q), Pages(*map(torch.zeros_like, own)), Pages(*map(torch.zeros_like, guests))
    delta = row_deltas(wide.out, grad, grad_lse)
    attention_backward(q, own, guests, table, grad, wide.lse, delta, dq, d_own, d_guests, scale=it.scale)
    for found, expected in zip((dq, *d_own, *d_guests), (wide.dq, *wide.d_own, *wide.d_guests), strict=True):
        torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=1e-2)


SELECTED = {
    "short pages with masks": selected_cases.Case(300, 64, 32, 4, 2, (0, 0, 1, 1), 5, True, one_row=True),
    "guests, a bias and a batch": selected_cases.Case(1000, 64, 32, 8, 2, (0,) * 4 + (1,) * 4, 9, True, True, True),
    "whole pages": selected_cases.Case(640, 64, 64, 6, 1, (0,) * 6, 5, False),
    "long pages": selected_cases.Case(1024, 64, 128, 2, 1, (0, 0), 3, False),
    "several items a program": selected_cases.Case(
        2560, 64, 64, 32, 8, tuple(n // 4 for n in range(32)), 16, True, one_row=True
    ),
    "short whole pages, guests and a bias": selected_cases.Case(1024, 64, 32, 4, 2, (0, 0, 1, 1), 7, False, True),
    "long pages with masks": selected_cases.Case(1000, 64, 128, 4, 2, (0, 0, 1, 1), 3, True, True, True),
    "many visits, several items a program": selected_cases.Case(
        2000, 64, 32, 16, 4, (0,) * 8 + (1,) * 8, 41, True, True, True
    ),
}


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", SELECTED)
def test_what_is_selected_is_attended(name: str, dim: int, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, so that the second time goes on from the first: each key counts twice."""
    if cut:
        monkeypatch.setattr(work, "_SHORTEST", 2)
        monkeypatch.setattr(work, "_LONGEST", 0.0)
        monkeypatch.setattr("distattn.kernels.attention_hopper_selected.programs_at_once", lambda _: 10_000)
    case = SELECTED[name]
    table, allowed = selected_cases.table_of(case)
    q, k, v, _, _, bias, own, guests, biases = selected_cases.inputs(case, table, dim, torch.bfloat16)
    out, lse = torch.zeros(q.shape, device=DEVICE), torch.full(q.shape[:3], -torch.inf, device=DEVICE)
    assert choose(q, own, guests, table, out, 0.3, biases).kernel == "hopper"
    attention_forward(q, own, guests, table, out, lse, scale=0.3, bias=biases)
    half, half_lse = torch.full_like(q, torch.nan), lse.clone()
    attention_forward(q, own, guests, table, half, half_lse, scale=0.3, before=out, bias=biases)
    attention_forward(q, own, guests, table, out, lse, scale=0.3, before=out, bias=biases)
    assert torch.equal(half, out.to(q.dtype)) and torch.equal(half_lse, lse)
    if cut:
        assert {key[0]: found.slots for key, found in table.cache.items()}["query"]  # type: ignore[index]
    expected, expected_lse = selected_cases.dense(*(x.double() for x in (q, k, v, bias)), allowed, 0.3)
    seen = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert reference.max_error(out, expected) < 2e-2
    assert reference.max_error(lse[seen], expected_lse[seen] + math.log(2)) < 1e-3


@pytest.mark.parametrize("length", [4096, 4000])  # chunks that are all whole need no masks
def test_16_bits_agree_with_32_where_tiles_choose(length: int) -> None:
    """By the same choices; on a Hopper GPU by kernels of its own."""
    spec = presets.hierarchical(256, (64, 512), (4,), 4, "tile", global_keys=range(8))
    plan = make_plan(spec, length, heads=8, kv_heads=2, head_dim=128)

    def made(seed: int, heads: int) -> torch.Tensor:
        return torch.randn(1, length, heads, 128, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")

    q, k, v = (made(n, heads).bfloat16() for n, heads in enumerate((8, 2, 2)))
    chosen, weight = select(q, k, v, plan), made(3, 8)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, plan, selection=chosen, return_lse=True)
        found.append([out.detach(), lse.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
    for number, (x, y) in enumerate(zip(*found, strict=True)):
        assert reference.max_error(x, y) < 2e-2, f"result {number}"


def test_large_scores() -> None:
    """Scores of some thousands: nothing overflows, and rows attend to one key."""
    it = CASES["window"]
    check(it._replace(scale=9.0))


def test_the_result_does_not_depend_on_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_SHORTEST", 2)
    monkeypatch.setattr(work, "_LONGEST", 0.0)
    it = CASES["a table a head"]
    made = inputs(it)
    first, second = (run(it, *made) for _ in range(2))
    assert torch.equal(first.out, second.out) and torch.equal(first.dq, second.dq)
    assert all(torch.equal(a, b) for a, b in zip(first.d_own, second.d_own, strict=True))

"""Tables that were made on the device, against the definition, for the kernels in PyTorch operations and in Triton."""

import math

import pytest
import torch
from kernel_cases import DEVICE
from selected_cases import Case, dense, inputs, table_of

from distattn import reference
from distattn.kernels import work
from distattn.kernels.attention import Biases, Choice, Pages, attention_backward, attention_forward, row_deltas
from distattn.kernels.selected import SelectedTable

DIM = 16


CASES = {
    "a token's heads choose together": Case(21, 1, 8, 6, 2, (0, 0, 0, 1, 1, 1), 2, True),
    "whole pages": Case(24, 1, 4, 4, 2, (0, 0, 1, 1), 4, False),
    "tiles of tokens, a table for all": Case(90, 16, 16, 4, 1, (0, 0, 0, 0), 4, True),
    "guests, a bias and a batch": Case(90, 16, 16, 4, 2, (0, 0, 1, 1), 4, True, True),
    "several pages at a time": Case(100, 12, 32, 3, 1, (0, 0, 0), 3, True, True),
    "several whole pages at a time": Case(96, 12, 32, 4, 2, (0, 0, 1, 1), 3, False),
    "a mask of one row": Case(90, 16, 32, 4, 2, (0, 0, 1, 1), 3, True, True, True),
    "full shapes": Case(600, 1, 64, 32, 2, (0,) * 16 + (1,) * 16, 6, True),
    "a table a head": Case(60, 8, 12, 3, 3, (0, 1, 2), 2, False),
}


# Only compiled kernels cut long rows.
@pytest.mark.parametrize(("kernel", "cut"), [("torch", False), ("triton", False), ("triton", True)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.gpu) if name == "full shapes" else name for name in CASES]
)
def test_what_is_selected_is_attended(name: str, cut: bool, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr("distattn.kernels.attention.choose", lambda *_, **__: Choice(kernel, "a test of it"))
    if cut:
        monkeypatch.setattr(work, "_SHORTEST", 2)
        monkeypatch.setattr(work, "_LONGEST", 0.0)
        for module in ("attention_triton", "attention_triton_backward"):  # partial results are no more than programs
            monkeypatch.setattr(f"distattn.kernels.{module}.programs_at_once", lambda _: 10_000)
    case = CASES[name]
    table, allowed = table_of(case)
    q, k, v, grad, grad_lse, bias, own, guests, biases = inputs(case, table, DIM)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=DEVICE)
    attention_forward(q, own, guests, table, out, lse, scale=0.3, bias=biases)
    delta = row_deltas(out, grad, grad_lse)
    dq = torch.zeros_like(q)
    d_own, d_guests = (Pages(*map(torch.zeros_like, pages)) for pages in (own, guests))
    d_biases = Biases(*map(torch.zeros_like, biases)) if biases else None
    attention_backward(
        q, own, guests, table, grad, lse, delta, dq, d_own, d_guests, scale=0.3, bias=biases, d_bias=d_biases
    )
    joined = [torch.cat(pair, 1)[:, : case.length] for pair in zip(d_own, d_guests, strict=True)]
    if d_biases:
        joined.append(torch.cat(d_biases, 1)[:, : case.length])

    double = [x.double().requires_grad_() for x in (q, k, v, bias)]
    expected, expected_lse = dense(*double, allowed, 0.3)
    seen = expected_lse > -torch.inf
    assert not seen.all() and torch.equal(lse > -torch.inf, seen)
    wanted = torch.autograd.grad((expected * grad).sum() + (expected_lse * grad_lse)[seen].sum(), double)
    # On from what is there, elsewhere and in 16 bits: each key counts twice, and who visits nothing has what was there.
    half, twice_lse = torch.full_like(q, torch.nan, dtype=torch.bfloat16), lse.clone()
    attention_forward(q, own, guests, table, half, twice_lse, scale=0.3, before=out, bias=biases)
    torch.testing.assert_close(half.float(), out, atol=1e-5, rtol=1 / 128)
    torch.testing.assert_close(twice_lse, lse + math.log(2), atol=1e-5, rtol=0)
    if cut:
        slots = {key[0]: found.slots for key, found in table.cache.items()}  # type: ignore[index]
        assert slots["key"] and (slots["query"] or case.selected <= 2)
    assert len(joined) == 2 + case.more
    pairs = [(out, expected), (lse[seen], expected_lse[seen]), *zip((dq, *joined), wanted, strict=False)]
    assert all(reference.max_error(found, right) < 1e-5 for found, right in pairs)


@pytest.mark.gpu
def test_the_host_does_not_wait() -> None:
    case = CASES["full shapes"]
    q, k = (torch.zeros(1, case.length, heads, DIM, device=DEVICE) for heads in (case.heads, case.kv_heads))
    pages, nobody = Pages(k, k), Pages(k[:, :0], k[:, :0])
    for mode in (0, 2):  # what stays on the device for later tables is put there by the first
        out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=DEVICE)
        grads, d_pages = torch.zeros_like(q), Pages(torch.zeros_like(k), torch.zeros_like(k))
        table, _ = table_of(case)
        torch.cuda.set_sync_debug_mode(mode)  # 2: an error where the host would wait
        try:
            attention_forward(q, pages, nobody, table, out, lse, scale=0.3)
            delta = row_deltas(out, q, torch.zeros_like(lse))
            attention_backward(q, pages, nobody, table, q, lse, delta, grads, d_pages, nobody, scale=0.3)
        finally:
            torch.cuda.set_sync_debug_mode(0)


def test_what_does_not_fit_is_refused() -> None:
    selected = torch.zeros(1, 6, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"selected is torch.int32 \[1, 6, 2\]; expected torch.int32 \[2, 6, n\]"):
        SelectedTable(16, 16, 6, 6, 0, (0, 1), selected)
    with pytest.raises(ValueError, match=r"masks is torch.int64 \[1, 6, 2, 16, 1\]; expected torch.int32"):
        SelectedTable(16, 16, 6, 6, 0, (0,), selected, torch.zeros(1, 6, 2, 16, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="masks is on meta; expected cpu, like selected"):
        words = torch.zeros(1, 6, 2, 16, 1, dtype=torch.int32, device="meta")
        SelectedTable(16, 16, 6, 6, 0, (0,), selected, words)
    with pytest.raises(ValueError, match="selected has 268435456 entries; expected fewer than 268435456"):
        SelectedTable(16, 16, 1 << 14, 6, 0, (0,), selected[:, :1, :1].expand(1, 1 << 14, 1 << 14))
    with pytest.raises(ValueError, match="masks has strides"):
        SelectedTable(16, 16, 6, 6, 0, (0,), selected, torch.zeros(1, 6, 16, 2, 1, dtype=torch.int32).transpose(2, 3))
    q = torch.zeros(1, 90, 1, DIM)
    table, pages, nobody = SelectedTable(16, 16, 6, 6, 0, (0,), selected), Pages(q, q), Pages(q[:, :0], q[:, :0])
    with pytest.raises(ValueError, match="own has 90 rows; expected 96, whole pages of 16"):
        attention_forward(q, pages, nobody, table, q.clone(), q[..., 0].clone(), scale=1.0)


def test_nothing_to_select_writes_nothing() -> None:
    q = torch.zeros(1, 96, 1, DIM)
    table = SelectedTable(16, 16, 6, 6, 0, (0,), torch.zeros(1, 6, 0, dtype=torch.int32))
    out, lse = torch.full_like(q, 7.0), torch.full((1, 96, 1), 7.0)
    attention_forward(q, Pages(q, q), Pages(q[:, :0], q[:, :0]), table, out, lse, scale=1.0)
    assert (out == 7.0).all() and (lse == 7.0).all()

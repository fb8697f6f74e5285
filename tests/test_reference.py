"""The oracle against PyTorch's own attention, against a loop over pairs, and against itself in pieces."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distattn import reference
from distattn.patterns import Causal, DistanceBand, GlobalKeys, GlobalTokens, Pattern, PerHead, SlidingWindow

EMPTY_ROWS = Causal() & DistanceBand(3, 9)  # rows 0, 1 and 2 may attend to nothing

PATTERNS: dict[str, Pattern] = {
    "causal": Causal(),
    "window_and_globals": Causal() & (SlidingWindow(5, 0) | GlobalKeys((0, 11))),
    "two_sided_globals": SlidingWindow(2, 3) | GlobalTokens((7,)),
    "empty_rows": EMPTY_ROWS,
    "per_head": PerHead((Causal(), SlidingWindow(1, 1), EMPTY_ROWS, ~Causal())),
}


def make_qkv(length: int, heads: int = 4, kv_heads: int = 2, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def draw(count: int, dim: int) -> Tensor:
        return torch.randn(batch, length, count, dim, generator=generator, dtype=torch.float64)

    return draw(heads, 8), draw(kv_heads, 8), draw(kv_heads, 6)


def dense_mask(pattern: Pattern, heads: int, length: int) -> Tensor:
    rows, columns = np.arange(length)[:, None], np.arange(length)[None, :]
    masks = [np.broadcast_to(p.allows(rows, columns), (length, length)) for p in pattern.by_head(heads)]
    return torch.from_numpy(np.stack(masks))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_equals_the_definition_row_by_row(pattern: Pattern, kv_heads: int) -> None:
    length, heads = 12, 4
    q, k, v = make_qkv(length, heads, kv_heads)
    out, lse = reference.attention(q, k, v, pattern)
    masks = dense_mask(pattern, heads, length)
    for h in range(heads):
        kv = h // (heads // kv_heads)
        for i in range(length):
            keys = masks[h, i].nonzero().squeeze(1)
            weights = torch.exp(torch.einsum("bd,bnd->bn", q[:, i, h], k[:, keys, kv]) / math.sqrt(8))
            total = weights.sum(1)
            mean = torch.einsum("bn,bnd->bd", weights, v[:, keys, kv]) / total.clamp(min=1e-300).unsqueeze(1)
            assert reference.max_error(out[:, i, h], mean) < 1e-13
            assert reference.max_error(lse[:, i, h], total.log()) < 1e-13


@pytest.mark.parametrize("name", ["causal", "window_and_globals"])
def test_output_and_gradients_equal_torch(name: str) -> None:
    pattern = PATTERNS[name]
    q, k, v = (x.requires_grad_() for x in make_qkv(21))
    weight = torch.randn(2, 21, 4, 6, dtype=torch.float64)
    out, _ = reference.attention(q, k, v, pattern, scale=0.2)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    theirs_out = F.scaled_dot_product_attention(
        *heads_first, attn_mask=dense_mask(pattern, 4, 21), scale=0.2, enable_gqa=True
    ).transpose(1, 2)
    theirs = torch.autograd.grad((theirs_out * weight).sum(), (q, k, v))
    for x, y in zip((out, *ours), (theirs_out, *theirs), strict=True):
        assert reference.max_error(x, y) < 1e-12


@pytest.mark.parametrize(("heads", "kv_heads", "pattern"), [(2, 1, EMPTY_ROWS), (1, 1, PATTERNS["causal"])])
def test_gradients_of_out_and_lse_are_derivatives(heads: int, kv_heads: int, pattern: Pattern) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(6, heads=heads, kv_heads=kv_heads, batch=1))

    def results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.attention(q, k, v, pattern)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(results, (q, k, v), fast_mode=True)


def test_rows_without_keys_are_zero_and_have_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(12))
    out, lse = reference.attention(q, k, v, EMPTY_ROWS)
    assert (out[:, :3] == 0).all() and (lse[:, :3] == -math.inf).all()
    assert out[:, 3:].ne(0).all() and lse[:, 3:].isfinite().all()
    dq, dk, dv = torch.autograd.grad((out.exp().sum() + lse.sum()), (q, k, v))
    assert (dq[:, :3] == 0).all() and dq[:, 3:].ne(0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert (dk[:, 9:] == 0).all() and (dv[:, 9:] == 0).all()  # keys that no later query may see

    nowhere = Causal() & ~Causal()
    out, lse = reference.attention(q, k, v, nowhere)
    assert (out == 0).all() and (lse == -math.inf).all()
    assert all((x == 0).all() for x in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))


def test_large_scores_stay_finite() -> None:
    q, k, v = make_qkv(9)
    out, lse = reference.attention(1e4 * q, 1e4 * k, v, Causal())
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("slice_keys", [1, 4, 37, 1000])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_chosen_rows_in_slices_equal_the_whole(pattern: Pattern, slice_keys: int) -> None:
    q, k, v = make_qkv(37)
    rows = torch.tensor([36, 0, 5, 2, 20])
    out, lse = reference.attention(q, k, v, pattern)
    some = reference.attention_rows(q[:, rows], rows, k, v, pattern, slice_keys=slice_keys)
    assert reference.max_error(some[0], out[:, rows]) < 1e-13
    assert reference.max_error(some[1], lse[:, rows]) < 1e-13


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_shards_of_keys_merge_to_the_whole_with_gradients(pattern: Pattern) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(37))
    rows = torch.tensor([36, 0, 5, 2, 20])
    shards = [torch.arange(37)[rank::4] for rank in range(3)] + [torch.arange(3, 37, 4), torch.arange(0)]
    parts = [
        reference.attention_rows(q[:, rows], rows, k[:, own], v[:, own], pattern, key_positions=own, slice_keys=5)
        for own in shards
    ]
    out, lse = reference.merge(parts)
    whole_out, whole_lse = reference.attention(q, k, v, pattern)
    whole_out, whole_lse = whole_out[:, rows], whole_lse[:, rows]
    assert reference.max_error(out, whole_out) < 1e-13
    assert reference.max_error(lse, whole_lse) < 1e-13

    def gradients(out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        finite = lse.masked_fill(lse == -math.inf, 0.0)
        return torch.autograd.grad((out**2).sum() + finite.sin().sum(), (q, k, v))

    for x, y in zip(gradients(out, lse), gradients(whole_out, whole_lse), strict=True):
        assert reference.max_error(x, y) < 1e-12


def test_rows_of_a_long_sequence_use_bounded_memory() -> None:
    length, rows = 50_000, torch.tensor([0, 12_345, 49_999])
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, length, 1, 8, generator=generator)
    q = torch.randn(1, 3, 2, 8, generator=generator)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.is_floating_point():
                largest = max(largest, result.numel())
            return result

    with Watch():
        out, lse = reference.attention_rows(q, rows, k, k, Causal(), slice_keys=2000)
    assert largest <= 2000 * 8  # never more than a slice of keys
    scores = (q[0, 2, 1].double() @ k[0, :, 0].double().T) / math.sqrt(8)
    assert lse[0, 2, 1].item() == pytest.approx(torch.logsumexp(scores, 0).item(), abs=1e-12)
    assert reference.max_error(out[0, 2, 1], torch.softmax(scores, 0) @ k[0, :, 0].double()) < 1e-13


def test_max_error() -> None:
    ref = torch.tensor([0.5, -4.0])
    assert reference.max_error(ref, ref) == 0.0
    assert reference.max_error(torch.tensor([0.5, -3.0]), ref) == pytest.approx(0.25)
    assert reference.max_error(torch.tensor([0.75, 0.0]), torch.tensor([0.5, 0.0])) == pytest.approx(0.25)
    empty_row = torch.tensor([-math.inf, 1.0])
    assert reference.max_error(empty_row, empty_row) == 0.0
    assert reference.max_error(torch.tensor([0.0, 1.0]), empty_row) == math.inf
    assert reference.max_error(torch.tensor([math.nan, 1.0]), ref) == math.inf
    assert reference.max_error(ref, torch.tensor([math.nan, 1.0])) == math.inf
    assert reference.max_error(torch.empty(0, 3), torch.empty(0, 3)) == 0.0
    with pytest.raises(ValueError, match=r"x has the shape \(2,\).*\(1,\)"):
        reference.max_error(ref, ref[:1])


def test_wrong_shapes_are_named() -> None:
    q, k, v = make_qkv(6)
    rows = torch.arange(6)
    with pytest.raises(ValueError, match="q has the shape"):
        reference.attention(q[0], k, v, Causal())
    with pytest.raises(ValueError, match="k has 5 rows"):
        reference.attention(q, k[:, :5], v, Causal())
    with pytest.raises(ValueError, match="v has the shape"):
        reference.attention(q, k, v[:, :5], Causal())
    with pytest.raises(ValueError, match="q has 3 heads"):
        reference.attention(q[:, :, :3], k, v, Causal())
    with pytest.raises(ValueError, match="k has the shape"):
        reference.attention(q[..., :4], k, v, Causal())
    with pytest.raises(ValueError, match="positions has the shape"):
        reference.attention_rows(q[:, :2], rows, k, v, Causal())
    with pytest.raises(ValueError, match="key_positions has the shape"):
        reference.attention_rows(q, rows, k, v, Causal(), key_positions=rows[:3])
    with pytest.raises(ValueError, match="slice_keys is 0"):
        reference.attention_rows(q, rows, k, v, Causal(), slice_keys=0)
    with pytest.raises(ValueError, match="parts is empty"):
        reference.merge([])
    with pytest.raises(ValueError, match="parts have the shapes"):
        reference.merge([reference.attention(*x, Causal()) for x in ((q, k, v), (q[:1], k[:1], v[:1]))])

"""The decoder: slices change nothing, attention inside it is exact, parameters follow the seed."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distattn import model as model_module
from distattn import reference
from distattn.data import IGNORE
from distattn.errors import ConfigError
from distattn.hierarchy_reference import hierarchical as oracle
from distattn.model import Decoder, ModelConfig, _Lookup
from distattn.patterns import Causal, GlobalKeys, SlidingWindow
from distattn.plan import Plan, make_plan
from distattn.presets import hierarchical
from distattn.rotary import rotary_table, rotate
from distattn.spec import AttentionSpec

SMALL = ModelConfig(width=24, heads=4, kv_heads=2, head_dim=8, hidden=40, dtype="float64", slice_rows=64)
WINDOW = AttentionSpec(Causal() & (SlidingWindow(9, 0) | GlobalKeys((0, 1))))
DENSE = AttentionSpec(Causal())
LENGTH = 45


def make(spec: AttentionSpec, config: ModelConfig = SMALL, length: int = LENGTH) -> Plan:
    sizes = {"heads": config.heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    return make_plan(spec, length, **sizes, block_q=16, block_k=16)


def make_batch(batch: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    text = torch.randint(256, (batch, length + 1), generator=torch.Generator().manual_seed(1))
    labels = text[:, 1:].clone()
    labels[:, -1] = IGNORE
    return text[:, :-1], labels


def mean_loss(model: Decoder, tokens: Tensor, labels: Tensor, plans: list[Plan]) -> Tensor:
    return model.loss(model(tokens, plans), labels).sum() / (labels != IGNORE).sum()


def plain_forward(model: Decoder, tokens: Tensor, specs: list[AttentionSpec]) -> Tensor:
    """The same decoder written without slices, plans or kernels."""
    c = model.config
    cos, sin = rotary_table(torch.arange(tokens.shape[1]), c.head_dim, c.rope_theta, torch.float64)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    x = model.embedding[tokens]
    for layer, (block, spec) in enumerate(zip(model.blocks, specs, strict=True)):
        parameters = dict(block.named_parameters())
        heads = (norm(x, parameters["attention_norm"]) @ parameters["qkv"].T).unflatten(2, (-1, c.head_dim))
        q, k, v = heads[:, :, : c.heads], heads[:, :, c.heads : -c.kv_heads], heads[:, :, -c.kv_heads :]
        if layer not in c.unrotated_layers:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        elif c.grow_from is not None:
            growth = [max(1.0, math.log(p + 1, c.grow_from)) for p in range(q.shape[1])]
            q = q * torch.tensor(growth, dtype=torch.float64)[:, None, None]
        out, _ = reference.attention(q, k, v, spec.tokens)
        x = x + out.flatten(2) @ parameters["attention_out"].T
        gate, up = (norm(x, parameters["mlp_norm"]) @ parameters["gate_up"].T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ parameters["down"].T
    return norm(x, model.norm) @ model.head.T


@pytest.mark.parametrize("more", [{}, {"unrotated_layers": (1,)}, {"unrotated_layers": (0, 1), "grow_from": 8}])
def test_equals_a_plain_decoder_with_gradients(more: dict[str, Any]) -> None:
    model, (tokens, labels) = Decoder(dataclasses.replace(SMALL, **more), seed=3), make_batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)  # norms away from 1
    ours = mean_loss(model, tokens, labels, [make(WINDOW), make(DENSE)])
    scores = plain_forward(model, tokens, [WINDOW, DENSE])
    theirs = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    assert abs(ours.item() - theirs.item()) < 1e-10
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, theirs)]
    for x, y in zip(*gradients, strict=True):
        assert y.abs().max() > 1e-6
        assert reference.max_error(x / y.abs().max(), y / y.abs().max()) < 1e-8


@pytest.mark.parametrize("slice_rows", [6, 14, 64])
def test_slices_change_nothing(slice_rows: int) -> None:
    tokens, labels = make_batch()
    plans = [make(WINDOW), make(DENSE)]
    results = []
    for rows in (10_000, slice_rows):
        model = Decoder(dataclasses.replace(SMALL, slice_rows=rows), seed=5)
        loss = mean_loss(model, tokens, labels, plans)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            results.append((model(tokens, plans), mean_loss(model, tokens, labels, plans), loss, *gradients))
    for x, y in zip(*results, strict=True):
        assert reference.max_error(x, y) < 1e-12


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_wide_is_larger_than_a_slice(grad: bool) -> None:
    config = dataclasses.replace(SMALL, layers=1, width=8, heads=1, kv_heads=1, hidden=48, slice_rows=16)
    length = 160
    model, (tokens, labels) = Decoder(config), make_batch(1, length)
    wide = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal wide
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1:] in {(2 * config.hidden,), (config.vocab,)}:
                wide = max(wide, result[..., 0].numel())
            return result

    with torch.set_grad_enabled(grad), Watch():
        mean_loss(model, tokens, labels, [make(DENSE, config, length)])
    assert wide == config.slice_rows


def test_observer_sees_what_attention_did() -> None:
    specs = [WINDOW, DENSE]
    seen = []
    model, (tokens, _) = Decoder(SMALL), make_batch()
    with torch.no_grad():
        model(tokens, [make(spec) for spec in specs], observe=lambda *args: seen.append(args))
    assert [layer for layer, *_ in seen] == [0, 1]
    for (_, q, k, v, out, *_), spec in zip(seen, specs, strict=True):
        assert q.shape == (2, LENGTH, 4, 8) and k.shape == v.shape == (2, LENGTH, 2, 8)
        assert reference.max_error(out, reference.attention(q, k, v, spec.tokens)[0]) < 1e-12


@pytest.mark.parametrize("select_from", [None, 0])
def test_layers_may_share_a_choice(select_from: int | None) -> None:
    spec = hierarchical(16, (8, 16), (2,), 2, "token")
    seen: list[tuple] = []
    model, (tokens, _) = Decoder(dataclasses.replace(SMALL, select_from=select_from)), make_batch()
    with torch.no_grad():
        model(tokens, [make(spec)] * 2, observe=lambda *args: seen.append(args))
    for _, q, k, v, out, extras, selection in seen:
        if select_from is None:
            assert reference.max_error(out, oracle(q, k, v, spec, extras).out) < 1e-12
        else:
            assert selection is seen[0][-1]
    assert torch.equal(seen[0][-1].chunks, seen[1][-1].chunks) == (select_from is not None)
    if select_from is not None:
        with pytest.raises(ValueError, match=r"plans\[0\] is for .*; expected a spec with select"):
            model(tokens, [make(WINDOW), make(spec)])


def test_a_rank_computes_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without attention rows are independent: shards of the sequence give the rows of the whole."""
    tokens, _ = make_batch()
    monkeypatch.setattr(model_module, "attend", lambda q, k, v, plan, **_: q + k.repeat_interleave(2, dim=2))
    model = Decoder(SMALL)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 8, "block_q": 8, "block_k": 8}
    with torch.no_grad():
        whole = model(tokens, [make(DENSE)] * 2)
        for rank in range(3):
            plan = make_plan(DENSE, LENGTH, world_size=3, rank=rank, layout="zigzag", **sizes)
            own = model(tokens[:, plan.positions], [plan] * 2)
            assert reference.max_error(own, whole[:, plan.positions]) < 1e-12


def test_training_lowers_the_loss() -> None:
    config = dataclasses.replace(SMALL, dtype="float32", slice_rows=32)
    model, (tokens, labels) = Decoder(config), make_batch()
    plans = [make(WINDOW), make(DENSE)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = mean_loss(model, tokens, labels, plans)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(256)) < 0.2  # starts near 8 bits a byte
    assert losses[-1] < 0.9 * losses[0]


def test_low_precision_follows_float64() -> None:
    tokens, labels = make_batch()
    exact = None
    for dtype, tolerance in (("float64", 0.0), ("float32", 1e-5), ("bfloat16", 5e-2)):
        config = dataclasses.replace(SMALL, dtype=dtype, head_dim=32)
        model = Decoder(config, seed=2)
        with torch.no_grad():
            hidden = model(tokens, [make(DENSE, config)] * 2)
            loss = model.loss(hidden, labels)
        assert hidden.dtype == model_module.DTYPES[dtype]
        assert loss.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        assert (loss[:, -1] == 0).all()
        exact = loss if exact is None else exact
        assert reference.max_error(loss, exact) <= tolerance


def test_parameters_depend_on_the_seed_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, same, other = Decoder(SMALL, seed=1), Decoder(SMALL, seed=1), Decoder(SMALL, seed=2)
    assert torch.equal(torch.rand(3), expected)  # the global random state was left alone
    for (name, x), y, z in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y) and x.isfinite().all()
        assert torch.equal(x, z) == name.endswith("norm")


def test_rotary_scores_depend_on_the_distance_only() -> None:
    """Also a million tokens on, where angles in float32 would be far off."""
    q, k = torch.randn(2, 1, 1, 64, dtype=torch.float64)
    scores = []
    for start in (0, 1_000_000):
        cos, sin = rotary_table(torch.tensor([start + 17, start]), 64, 1e6, torch.float32)
        turned = rotate(q, cos[:1].double(), sin[:1].double()), rotate(k, cos[1:].double(), sin[1:].double())
        scores.append((turned[0] * turned[1]).sum().item())
        for x, y in zip((q, k), turned, strict=True):
            assert abs(x.norm().item() - y.norm().item()) < 1e-5
    assert abs(scores[0] - scores[1]) < 1e-4
    pairs = torch.view_as_complex(torch.stack(q.squeeze().chunk(2), dim=-1))
    angles = 17 * 1e6 ** (-torch.arange(32, dtype=torch.float64) / 32)
    cos, sin = rotary_table(torch.tensor([17]), 64, 1e6, torch.float64)
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(32, dtype=torch.float64), angles))
    assert reference.max_error(rotate(q, cos, sin).squeeze(), expected.T.flatten()) < 1e-14


def test_wrong_calls_are_named() -> None:
    model, (tokens, labels) = Decoder(SMALL), make_batch()
    plan = make(DENSE)
    with pytest.raises(ValueError, match="plans has 1 plans; expected one a layer, 2"):
        model(tokens, [plan])
    with pytest.raises(ValueError, match=r"plans\[1\] has 44 of 44 rows"):
        model(tokens, [plan, make(DENSE, length=44)])
    with pytest.raises(ValueError, match=r"tokens has the shape \(2, 44\); expected \[batch, 45\]"):
        model(tokens[:, 1:], [plan, plan])
    with pytest.raises(ValueError, match=r"labels has the shape \(2, 44\)"):
        model.loss(torch.zeros(2, 45, 24), labels[:, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "model.heads is 3; expected a multiple of model.kv_heads, 2"),
        ({"layers": 0}, "model.layers is 0"),
        ({"head_dim": 7}, "model.head_dim is 7; expected an even number"),
        ({"dtype": "int8"}, "model.dtype is 'int8'; expected one of float32"),
        ({"rope_theta": 0.0}, "model.rope_theta is 0.0"),
        ({"slice_rows": 0}, "model.slice_rows is 0"),
        ({"unrotated_layers": [2]}, "model.unrotated_layers has 2; expected a layer from 0 to 1"),
        ({"grow_from": 1}, "model.grow_from is 1; expected at least 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_sizes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookups_have_the_gradient_of_an_embedding(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr("distattn.model._LOOKED_UP", 5)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (2, 6), generator=generator)
    table = torch.randn(7, 3, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(2, 6, 3, generator=generator).to(dtype)
    found = _Lookup.apply(tokens, table)
    assert torch.equal(found, table[tokens])
    (grad,) = torch.autograd.grad((found * weight).sum(), table)
    expected = torch.zeros(7, 3, dtype=torch.float64).index_add_(0, tokens.flatten(), weight.double().flatten(0, 1))
    torch.testing.assert_close(grad, expected.to(dtype))

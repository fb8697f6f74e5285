"""The modules against plain float64 code, on 1 to 3 ranks; compiled; sharded by FSDP; wrong arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from torch import Tensor, nn

from distattn.extras import AttentionExtras, AttentionPool, Mlp, MlpPool
from distattn.hierarchy_reference import hierarchical
from distattn.jobs.context import Context
from distattn.nn import Attention, Registers
from distattn.patterns import Causal, GlobalKeys, SlidingWindow
from distattn.plan import Plan, make_plan
from distattn.reference import max_error
from distattn.spec import AttentionSpec, Summaries, TopChunks, chunk_window

D_MODEL, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 24, 4, 2, 8, 75


class Case(NamedTuple):
    spec: AttentionSpec
    settings: dict[str, Any] = {}


TWO_LEVELS = AttentionSpec(chunk_window(8, 2), (Summaries(8, reach=2), Summaries(16)), TopChunks(2, 8, per="tile"))
STATIC = AttentionSpec(Causal() & (SlidingWindow(9, 0) | GlobalKeys([3])))
CASES = {
    "two levels": Case(TWO_LEVELS),
    "attention pooling": Case(
        AttentionSpec(
            chunk_window(8, 2, causal=False),
            (Summaries(8, pool="attention", bias="learned", reach=2), Summaries(16, pool="mlp")),
        ),
        {"qk_norm": True, "pool_hidden": 5},
    ),
    "gates": Case(
        AttentionSpec(
            SlidingWindow(9, 0),
            (Summaries(8, stride=4, pool="mlp", bias="none"),),
            TopChunks(4, 8, score="mass", always=("first", "own", "previous")),
            merge="gate",
        )
    ),
    "selection alone": Case(AttentionSpec(chunk_window(8, 1), select=TopChunks(3, 8))),
    "static": Case(STATIC, {"qk_norm": True}),
    "no rotation": Case(AttentionSpec(chunk_window(8, 2), (Summaries(8),)), {"rope_theta": None}),
}


def module_of(case: Case, dtype: torch.dtype = torch.float64) -> Attention:
    """Every parameter is moved from where it begins, since zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    settings = {"head_dim": HEAD_DIM, "rope_theta": 100.0} | case.settings
    module = Attention(D_MODEL, HEADS, KV_HEADS, case.spec, dtype=dtype, generator=generator, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return module


def plan_of(spec: AttentionSpec, context: Context | None = None, length: int = LENGTH) -> Plan:
    return make_plan(
        spec,
        length,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        mesh=None if context is None else context.mesh,
        layout="zigzag",
        block_q=8,
        block_k=8,
    )


def inputs(length: int = LENGTH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x, and the weights of the output in the loss."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 2, length, D_MODEL, dtype=torch.float64, generator=generator).to(dtype)
    return x, weight


def answers(module: nn.Module, x: Tensor, weight: Tensor, *plan: Plan) -> list[Tensor]:
    """The output, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    out = module(x, *plan)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])]


# Plain code


def turned(x: Tensor, positions: Tensor, theta: float | None) -> Tensor:
    """Features i and i + dim / 2 as a complex number, turned by p theta^(-2 i / dim)."""
    if theta is None:
        return x
    half = x.shape[-1] // 2
    angles = [[p * theta ** (-i / half) for i in range(half)] for p in positions.tolist()]
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))[:, None]
    return torch.cat([z.real, z.imag], dim=-1)


def plain(module: Attention, x: Tensor) -> Tensor:
    def heads(weight: Tensor, norm: Tensor | None = None) -> Tensor:
        y = (x @ weight.T).reshape(*x.shape[:2], -1, HEAD_DIM)
        return y if norm is None else y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm

    def mlp(of: Any) -> Mlp:
        return Mlp(of.positions, of.w1, of.b1, of.w2)

    theta, positions = module.rope_theta, torch.arange(x.shape[1])
    q, k, v = heads(module.query, module.query_norm), heads(module.key, module.key_norm), heads(module.value)
    pools: list[AttentionPool | MlpPool | None] = []
    for number, level in enumerate(module.spec.summaries):
        pool: Any = None if level.pool == "mean" else module.pools[str(number)]
        if level.pool == "attention":
            pools.append(AttentionPool(pool.query))
        else:
            pools.append(None if pool is None else MlpPool(mlp(pool.keys), mlp(pool.values)))
    gates = None if module.gate is None else (x @ module.gate.T).reshape(*x.shape[:2], HEADS, -1)
    extras = AttentionExtras(gates, tuple(pools), module.key_bias, k, lambda y, p: turned(y, p, theta))
    out = hierarchical(turned(q, positions, theta), turned(k, positions, theta), v, module.spec, extras).out
    return out.reshape(*x.shape[:2], -1) @ module.out.T


class Plain(nn.Module):
    def __init__(self, module: Attention) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return plain(self.module, x)


# On ranks


def on_ranks(context: Context, names: list[str]) -> list[list[Tensor]]:
    """Outputs and gradients of each case, whole."""
    found = []
    for name in names:
        module, plan = module_of(CASES[name]), plan_of(CASES[name].spec, context)
        x, weight = (plan.shard(y) for y in inputs())
        out, dx, *grads = answers(module, x, weight, plan)
        found.append([plan.unshard(out), plan.unshard(dx), *summed(context, grads)])
    return found


def summed(context: Context, grads: list[Tensor]) -> list[Tensor]:
    if context.mesh is not None:
        for grad in grads:
            dist.all_reduce(grad, group=context.mesh.get_group())
    return grads


def check(found: list[Tensor], wanted: list[Tensor], what: str, tolerance: float = 1e-9) -> None:
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert x.shape == y.shape and y.abs().max() > 1e-3, f"{what}, {i}: nothing is compared"
        assert max_error(x, y) < tolerance, f"{what}, {i}"


def test_outputs_and_gradients_are_those_of_plain_code(ranks: RankPool) -> None:
    wanted = [answers(Plain(module_of(case)), *inputs()) for case in CASES.values()]
    for count in (1, 2, 3):
        for result in ranks(count, on_ranks, list(CASES)):
            for name, found, right in zip(CASES, result, wanted, strict=True):
                check(found, right, f"{name} on {count} ranks")


@pytest.mark.parametrize("name", CASES)
def test_parameters_begin_as_promised(name: str) -> None:
    spec = CASES[name].spec

    def made(seed: int) -> Attention:
        generator = torch.Generator().manual_seed(seed)
        return Attention(D_MODEL, HEADS, KV_HEADS, spec, qk_norm=True, generator=generator)

    state = torch.get_rng_state()
    module = made(0)
    assert torch.equal(torch.get_rng_state(), state), "the global state was drawn from"
    assert module.head_dim == D_MODEL // HEADS
    assert all(map(torch.equal, module.parameters(), made(0).parameters()))
    assert not torch.equal(module.query, made(1).query)
    assert module.gate is None or not module.gate.any()
    if spec.merge == "gate":
        assert module.gate is not None
    for number, level in enumerate(spec.summaries):
        if level.bias == "learned":
            assert module.key_bias is not None
            torch.testing.assert_close(module.key_bias[number].exp(), torch.full((KV_HEADS,), float(level.chunk)))
    with torch.device("meta"):
        empty = Attention(D_MODEL, HEADS, KV_HEADS, spec, qk_norm=True)
    empty.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(0))
    assert all(map(torch.equal, module.parameters(), empty.parameters()))


def test_attention_pooling_begins_as_the_mean() -> None:
    def out(pool: Any, bias: Any) -> Tensor:
        spec = AttentionSpec(chunk_window(8, 2), (Summaries(8, pool=pool, bias=bias),))
        generator = torch.Generator().manual_seed(0)
        module = Attention(D_MODEL, HEADS, KV_HEADS, spec, head_dim=HEAD_DIM, dtype=torch.float64, generator=generator)
        return module(inputs(72)[0], plan_of(spec, length=72))

    torch.testing.assert_close(out("attention", "learned"), out("mean", "count"))


def test_bfloat16_is_kept() -> None:
    dtypes = torch.float32, torch.bfloat16
    for case in CASES.values():
        single, half = (answers(module_of(case, d), *inputs(dtype=d), plan_of(case.spec)) for d in dtypes)
        assert all(x.dtype == torch.bfloat16 for x in half)
        # Choices may differ, so that only most rows are the same.
        assert ((half[0] - single[0]).norm(dim=-1) < 0.1 * single[0].norm(dim=-1)).float().mean() > 0.5


# Selections


def shared_selection(context: Context) -> list[Tensor]:
    module, plan = module_of(CASES["two levels"]), plan_of(TWO_LEVELS, context)
    alone = AttentionSpec(TWO_LEVELS.tokens, TWO_LEVELS.summaries)
    without = module_of(Case(alone))
    without.load_state_dict(module.state_dict())
    x, _ = (plan.shard(y) for y in inputs())
    out, selection = module(x, plan, return_selection=True)
    again, same = module(x, plan, selection=selection, return_selection=True)
    assert same is selection
    chosen = module(x, plan)
    selection.chunks.fill_(-1)  # nothing: summaries alone are left
    nothing, expected = module(x, plan, selection=selection), without(x, plan_of(alone, context))
    return [plan.unshard(y.detach()) for y in (out, again, chosen, nothing, expected)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_selection_can_be_shared(ranks: RankPool, count: int) -> None:
    out, again, chosen, nothing, expected = ranks(count, shared_selection)[0]
    assert torch.equal(out, chosen) and torch.equal(again, chosen)
    torch.testing.assert_close(nothing, expected)
    assert max_error(nothing, chosen) > 0.01


# Registers

REGISTERS = 19  # more than a page, so that two ranks can own some
WITH_REGISTERS = AttentionSpec(chunk_window(8, 2), (Summaries(8),), registers=REGISTERS)


class Registered(nn.Module):
    """Attention with registers: of the rows without them to rows without them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = module_of(Case(WITH_REGISTERS))
        self.registers = Registers(REGISTERS, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        return self.registers.strip(self.attention(self.registers(x, plan), plan), plan)


def registered(context: Context, layout: str) -> tuple[list[Tensor], int]:
    plan = make_plan(
        WITH_REGISTERS,
        LENGTH + REGISTERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        mesh=context.mesh,
        layout=layout,
        block_q=8,
        block_k=8,
    )
    module = Registered()
    rows = module.registers.rows(plan)
    x, weight = (y[:, rows] for y in inputs())
    full = module.registers(x, plan)
    assert full.shape[1] == plan.tokens and torch.equal(module.registers.strip(full, plan), x)
    own = plan.tokens - len(rows)
    assert torch.equal(full[0, :own], module.registers.tokens[plan.positions[:own]])
    out, dx, *grads = answers(module, x, weight, plan)
    whole = []
    for part in (out, dx):
        y = torch.zeros(2, LENGTH, D_MODEL, dtype=torch.float64)
        y[:, rows] = part
        whole.append(y)
    summed(context, [*whole, *grads])
    return [*whole, *grads], own


def test_registers_on_ranks_give_what_one_rank_gives(ranks: RankPool) -> None:
    ((wanted, own),) = ranks(1, registered, "contiguous")
    assert own == REGISTERS
    for count, layout, owned in ((2, "contiguous", [19, 0]), (2, "striped", [11, 8]), (3, "zigzag", [16, 3, 0])):
        results = ranks(count, registered, layout)
        assert [own for _, own in results] == owned
        for found, _ in results:
            check(found, wanted, f"{layout} on {count} ranks")


def without_registers(context: Context) -> Tensor | None:
    """The gradient of registers on each rank, when they are put there and not attended to."""
    plan = plan_of(WITH_REGISTERS, context)
    registers = Registers(REGISTERS, D_MODEL)
    x = torch.zeros(1, len(registers.rows(plan)), D_MODEL)
    registers(x, plan).sum().backward()
    return registers.tokens.grad


def test_ranks_without_registers_have_a_gradient_of_zeros(ranks: RankPool) -> None:
    first, second = ranks(2, without_registers)
    assert first is not None and torch.equal(first, torch.ones(REGISTERS, D_MODEL))
    assert second is not None and torch.equal(second, torch.zeros(REGISTERS, D_MODEL))


# Compiled


@pytest.mark.parametrize("name", ["static", "two levels"])
def test_compiled_is_the_same(name: str) -> None:
    case = CASES[name]
    module = module_of(case)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager")
    # For what is not compiled quickly, one plan must do.
    for length in (LENGTH, LENGTH - 9) if name == "static" else (LENGTH,):
        given, plan = inputs(length), plan_of(case.spec, length=length)
        for x, y in zip(answers(compiled, *given, plan), answers(module, *given, plan), strict=True):
            torch.testing.assert_close(x, y)


# Sharded parameters


class Layer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.attention = module_of(case, torch.float32)
        self.linear = nn.utils.skip_init(nn.Linear, D_MODEL, D_MODEL)
        with torch.no_grad():
            for i, parameter in enumerate(self.linear.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        return self.linear(self.attention(x, plan))


def fully_sharded(context: Context, names: list[str]) -> list[list[Tensor]]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    found = []
    for name in names:
        layer, plan = Layer(CASES[name]), plan_of(CASES[name].spec, context)
        for module in (layer.attention, layer):
            fully_shard(module, mesh=context.mesh)
            # The loss is a sum over the ranks, and so are its gradients: they are no mean.
            module.set_gradient_divide_factor(1.0)  # type: ignore[attr-defined]
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[attr-defined]  # all that Gloo can
        x, weight = (plan.shard(y) for y in inputs(dtype=torch.float32))
        x.requires_grad_()
        out = layer(x, plan)
        (out * weight).sum().backward()
        assert x.grad is not None
        whole = [plan.unshard(out.detach()), plan.unshard(x.grad)]
        for parameter in layer.parameters():
            assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
            assert parameter.to_local().numel() < parameter.numel() or parameter.shape[0] == 1
            whole.append(parameter.grad.full_tensor())
        found.append(whole)
    return found


def test_fully_sharded_parameters_give_what_whole_ones_give(ranks: RankPool) -> None:
    names = ["two levels", "attention pooling", "gates"]
    for result in ranks(2, fully_sharded, names):
        for name, found in zip(names, result, strict=True):
            wanted = answers(Layer(CASES[name]), *inputs(dtype=torch.float32), plan_of(CASES[name].spec))
            check(found, wanted, name, 2e-5)


def made_on_meta(context: Context) -> list[bool]:
    from torch.distributed.fsdp import fully_shard

    case = CASES["gates"]
    with torch.device("meta"):
        module = Attention(D_MODEL, HEADS, KV_HEADS, case.spec, head_dim=HEAD_DIM)
    fully_shard(module, mesh=context.mesh)
    module.to_empty(device="cpu")
    module.reset_parameters()
    plan = plan_of(case.spec, context)
    x = plan.shard(inputs(dtype=torch.float32)[0])
    whole = [parameter.full_tensor() for parameter in module.parameters()]  # type: ignore[attr-defined]
    return [bool(torch.isfinite(y).all()) for y in (module(x, plan), *whole)]


def test_what_was_made_on_meta_can_be_sharded_and_drawn(ranks: RankPool) -> None:
    assert all(all(found) for found in ranks(2, made_on_meta))


# Wrong arguments


def attention(spec: AttentionSpec = STATIC, **settings: Any) -> Attention:
    sizes = {"d_model": D_MODEL, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return Attention(spec=spec, **(sizes | settings))


def run(spec: AttentionSpec = STATIC, width: int = D_MODEL, **settings: Any) -> Callable[[], Any]:
    plan = plan_of(STATIC)
    return lambda: attention(spec, **settings)(torch.zeros(1, plan.tokens, width), plan)


def registers(x_rows: int, number: int = REGISTERS, width: int = D_MODEL) -> Callable[[], Any]:
    return lambda: Registers(number, D_MODEL)(torch.zeros(1, x_rows, width), plan_of(WITH_REGISTERS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (run(TWO_LEVELS), "plan is for .*; expected one for AttentionSpec"),
        (run(heads=8), "plan has heads 4; expected 8"),
        (run(kv_heads=4), "plan has kv_heads 2; expected 4"),
        (run(head_dim=16), "plan has head_dim 8; expected 16"),
        (run(width=D_MODEL + 1), r"x has shape \(1, 75, 25\); expected \[batch, 75, 24\] on rank 0"),
        (lambda: attention()(torch.zeros(1, 74, D_MODEL), plan_of(STATIC)), r"x has shape \(1, 74, 24\)"),
        (lambda: attention()(torch.zeros(75, D_MODEL), plan_of(STATIC)), r"x has shape \(75, 24\)"),
        (
            lambda: attention()(torch.zeros(1, 75, D_MODEL), plan_of(STATIC), return_selection=True),
            "return_selection is True; expected False",
        ),
        (lambda: attention(heads=0), "heads is 0; expected"),
        (lambda: attention(heads=3), "heads is 3; expected a multiple of kv_heads, 2"),
        (lambda: attention(d_model=26, head_dim=None), "d_model is 26; expected a multiple of heads"),
        (lambda: attention(head_dim=7), "head_dim is 7; expected an even number"),
        (lambda: attention(rope_theta=0.0), "rope_theta is 0.0; expected more than 0"),
        (lambda: attention(pool_hidden=0), "pool_hidden is 0; expected"),
        (lambda: attention(SlidingWindow(3, 3)), "spec is .*; expected an AttentionSpec"),  # type: ignore[arg-type]
        (registers(LENGTH), r"x has shape \(1, 75, 24\); expected \[batch, 56, 24\]"),
        (registers(LENGTH - REGISTERS, width=3), r"x has shape \(1, 56, 3\); expected \[batch, 56, 24\]"),
        (registers(LENGTH - 4, 4), "plan has 19 registers; expected 4"),
        (lambda: Registers(0, 4), "registers is 0; expected"),
        (
            lambda: Registers(REGISTERS, 4).strip(torch.zeros(1, 9, 4), plan_of(WITH_REGISTERS)),
            r"y has shape \(1, 9, 4\); expected \[batch, 75, ...\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def wrong_on_one_rank(context: Context) -> str:
    plan = plan_of(TWO_LEVELS, context)
    width = D_MODEL + context.rank
    with pytest.raises(Exception, match=r"x has shape \(1, [0-9]+, 25\)") as caught:
        attention(TWO_LEVELS)(torch.zeros(1, plan.tokens, width), plan)
    return type(caught.value).__name__


def test_all_ranks_learn_of_wrong_arguments(ranks: RankPool) -> None:
    assert ranks(2, wrong_on_one_rank) == ["PlanMismatch", "ConfigError"]

"""Modules around `attend`: an attention layer with all that its spec lets it learn, and register tokens.

Parameters are ordinary ones, whole and alike on all ranks, so that optimizers, FSDP and data parallelism handle them
as any others. A rank's gradient is that of its own rows: it is complete once it is summed over the ranks of the plan.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distattn import operators
from distattn.attend import Selection, attend
from distattn.errors import ConfigError
from distattn.extras import AttentionExtras, AttentionPool, Mlp, MlpPool
from distattn.plan import Plan
from distattn.rotary import rotary_table, rotate
from distattn.spec import AttentionSpec

# The size that the last matrix of a pooling MLP and its positions begin with: small, so that attention to tokens leads.
_SMALL = 0.02


class Attention(nn.Module):
    """Attention over a sharded sequence, with its projections, rotary positions, and whatever its spec learns.

    Query head h reads key/value head ``h // (heads // kv_heads)``. Where the spec has summaries or a selection, keys
    are pooled as they were before their rotation, and then turned to the centres of their chunks.

    Parameters, all in ``dtype``; those in brackets only where they are asked for:
        query [heads * head_dim, d_model], key and value [kv_heads * head_dim, d_model], out [d_model, heads *
            head_dim]: the projections, without biases.
        (query_norm, key_norm) [head_dim]: weights of an RMS norm of each head, before the rotation.
        (gate) [heads * sources, d_model]: the gates before the sigmoid (Yuan et al., "Native Sparse Attention", 2025,
            equation 5), a head, then a source of ``AttentionExtras.gates`` after the other. It begins with zeros: every
            gate is a half.
        (key_bias) [levels, kv_heads]: it begins with the log of each level's chunk, which ``bias="count"`` would be.
        (pools.0, pools.1, ..): of the levels that pool by attention (``query`` [kv_heads, head_dim]; it begins with
            zeros, which is the mean) or by an MLP (Yuan et al., 2025, equation 7; its last matrix begins small).

    Args:
        d_model: features of a row.
        heads, kv_heads: query heads, and key/value heads that divide them.
        spec: who attends to whom; that of every plan that :meth:`forward` is given.
        head_dim: features of a head, of values too; default ``d_model // heads``.
        rope_theta: base of the rotary wavelengths, see :func:`rotary_table`; None: no rotation.
        qk_norm: whether queries and keys are normalized.
        pool_hidden: inner features of pooling MLPs; default ``2 * head_dim``.
        dtype: of the parameters.
        generator: parameters are drawn from it, on the default device; None: from PyTorch's own.

    Raises:
        ValueError: a size is below 1, kv_heads does not divide heads, heads does not divide d_model where head_dim is
            None, head_dim is odd where there is a rotation, rope_theta is not positive, or spec is no AttentionSpec.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        spec: AttentionSpec,
        *,
        head_dim: int | None = None,
        rope_theta: float | None = 1_000_000.0,
        qk_norm: bool = False,
        pool_hidden: int | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(d_model=d_model, heads=heads, kv_heads=kv_heads)
        if heads % kv_heads:
            raise ConfigError(f"heads is {heads}; expected a multiple of kv_heads, {kv_heads}")
        if head_dim is None:
            if d_model % heads:
                raise ConfigError(f"d_model is {d_model}; expected a multiple of heads, {heads}, or a head_dim")
            head_dim = d_model // heads
        pool_hidden = 2 * head_dim if pool_hidden is None else pool_hidden
        _check_sizes(head_dim=head_dim, pool_hidden=pool_hidden)
        if rope_theta is not None and not rope_theta > 0:
            raise ConfigError(f"rope_theta is {rope_theta}; expected more than 0, or None")
        if rope_theta is not None and head_dim % 2:
            raise ConfigError(f"head_dim is {head_dim}; expected an even number, or rope_theta=None")
        if not isinstance(spec, AttentionSpec):
            raise ConfigError(f"spec is {spec!r}; expected an AttentionSpec")
        self.d_model, self.heads, self.kv_heads, self.head_dim = d_model, heads, kv_heads, head_dim
        self.spec, self.rope_theta = spec, rope_theta

        self.query = nn.Parameter(torch.empty(heads * head_dim, d_model, dtype=dtype))
        self.key = nn.Parameter(torch.empty(kv_heads * head_dim, d_model, dtype=dtype))
        self.value = nn.Parameter(torch.empty(kv_heads * head_dim, d_model, dtype=dtype))
        self.out = nn.Parameter(torch.empty(d_model, heads * head_dim, dtype=dtype))
        self.query_norm = nn.Parameter(torch.empty(head_dim, dtype=dtype)) if qk_norm else None
        self.key_norm = nn.Parameter(torch.empty(head_dim, dtype=dtype)) if qk_norm else None
        sources = 1 + bool(spec.summaries) + (spec.select is not None)
        gated, biased = spec.merge == "gate", any(level.bias == "learned" for level in spec.summaries)
        self.gate = nn.Parameter(torch.empty(heads * sources, d_model, dtype=dtype)) if gated else None
        levels = len(spec.summaries)
        self.key_bias = nn.Parameter(torch.empty(levels, kv_heads, dtype=dtype)) if biased else None
        self.pools = nn.ModuleDict()
        below = 1
        for number, level in enumerate(spec.summaries):
            if level.pool == "attention":
                self.pools[str(number)] = _AttentionPool(kv_heads, head_dim, dtype)
            elif level.pool == "mlp":
                self.pools[str(number)] = _MlpPool(level.chunk // below, head_dim, pool_hidden, dtype)
            below = level.chunk
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all parameters again, as after ``to_empty`` of a module that was made on the device "meta".

        Matrices are drawn from N(0, 1 / inputs), so that rows of size 1 begin with scores of about that size.

        Args:
            generator: of the parameters' device; None: PyTorch's own.
        """
        for matrix in (self.query, self.key, self.value, self.out):
            _draw(matrix, matrix.shape[1] ** -0.5, generator)
        for weight in (self.query_norm, self.key_norm):
            if weight is not None:
                weight.fill_(1.0)
        if self.gate is not None:
            self.gate.zero_()
        if self.key_bias is not None:
            for row, level in zip(self.key_bias, self.spec.summaries, strict=True):
                row.fill_(math.log(level.chunk))
        for pool in self.pools.values():
            assert isinstance(pool, _AttentionPool | _MlpPool)
            pool.reset_parameters(generator)

    def forward(
        self, x: Tensor, plan: Plan, selection: Selection | None = None, return_selection: bool = False
    ) -> Tensor | tuple[Tensor, Selection]:
        """Attention of this rank's rows to those of all ranks of the plan, which call this together.

        Args:
            x: [batch, plan.tokens, d_model], this rank's rows, in the dtype of the parameters.
            plan: made by :func:`make_plan` for this rank, with this module's spec, heads and head_dim.
            selection: of another layer, whose choice this one shares; None: chosen here.
            return_selection: also return the selection, for other layers.

        Returns:
            [batch, plan.tokens, d_model] in the dtype of x; and if asked for, the selection.

        Raises:
            ConfigError: (a ValueError) x or the plan is not what this module takes, or a selection is asked for where
                the spec selects nothing. The other ranks are told.
            PlanMismatch, PeerLost: see :func:`attend`.
        """
        why = self._refusal(x, plan, return_selection)
        if why:
            operators.refuse(plan, why)
            raise ConfigError(why)
        q = F.linear(x, self.query).unflatten(2, (self.heads, self.head_dim))
        k = F.linear(x, self.key).unflatten(2, (self.kv_heads, self.head_dim))
        v = F.linear(x, self.value).unflatten(2, (self.kv_heads, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = _rms_norm(q, self.query_norm), _rms_norm(k, self.key_norm)
        extras = self._extras(x, k)
        if self.rope_theta is not None:
            positions = plan.positions.to(x.device)
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        if not return_selection:
            attended = attend(q, k, v, plan, extras=extras, selection=selection)
            return F.linear(attended.flatten(2), self.out)
        attended, selection = attend(q, k, v, plan, extras=extras, selection=selection, return_selection=True)
        return F.linear(attended.flatten(2), self.out), selection

    def extra_repr(self) -> str:
        sizes = f"d_model={self.d_model}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
        return f"{sizes}, rope_theta={self.rope_theta}, spec={self.spec!r}"

    def _extras(self, x: Tensor, k: Tensor) -> AttentionExtras:
        """k: the keys before their rotation."""
        if self.spec.is_static:
            return AttentionExtras()
        pools: list[AttentionPool | MlpPool | None] = []
        for number in range(len(self.spec.summaries)):
            pool = self.pools[str(number)] if str(number) in self.pools else None
            assert pool is None or isinstance(pool, _AttentionPool | _MlpPool)
            pools.append(None if pool is None else pool.parameters_by_name())
        gates = None if self.gate is None else F.linear(x, self.gate).unflatten(2, (self.heads, -1))
        turned = self.rope_theta is not None
        return AttentionExtras(
            gates=gates,
            pool=tuple(pools),
            key_bias=self.key_bias,
            pool_keys=k if turned else None,
            rotate=self._rotate if turned else None,
        )

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [batch, n, heads, head_dim]; positions: int64 or float64 [n]."""
        assert self.rope_theta is not None
        cos, sin = rotary_table(positions, self.head_dim, self.rope_theta, torch.promote_types(x.dtype, torch.float32))
        return rotate(x, cos, sin)

    def _refusal(self, x: Tensor, plan: Plan, return_selection: bool) -> str | None:
        """Why these arguments do not go with this module; None if they do."""
        if plan.spec != self.spec:
            return f"plan is for {plan.spec!r}; expected one for {self.spec!r}"
        for name, found, expected in (
            ("heads", plan.heads, self.heads),
            ("kv_heads", plan.kv_heads, self.kv_heads),
            ("head_dim", plan.head_dim, self.head_dim),
            ("value_dim", plan.value_dim, self.head_dim),
        ):
            if found != expected:
                return f"plan has {name} {found}; expected {expected}"
        if x.ndim != 3 or x.shape[1:] != (plan.tokens, self.d_model):
            return f"x has shape {tuple(x.shape)}; expected [batch, {plan.tokens}, {self.d_model}] on rank {plan.rank}"
        if return_selection and self.spec.select is None:
            return f"return_selection is True; expected False, since {self.spec!r} selects nothing"
        return None


class Registers(nn.Module):
    """Learned tokens before the sequence, for plans whose spec has ``registers`` (``seq_len`` counts them).

    They are positions 0 to registers - 1, and so the first rows of the ranks that own these. On a rank that owns none
    the gradient of ``tokens`` is zeros.

    Parameter:
        tokens [registers, d_model], drawn from N(0, 1).

    Args:
        registers: how many, as the spec says.
        d_model: features of a row.
        dtype: of the parameter.
        generator: it is drawn from this, on the default device; None: from PyTorch's own.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        registers: int,
        d_model: int,
        *,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(registers=registers, d_model=d_model)
        self.registers, self.d_model = registers, d_model
        self.tokens = nn.Parameter(torch.empty(registers, d_model, dtype=dtype))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the registers again. generator: of the parameter's device; None: PyTorch's own."""
        _draw(self.tokens, 1.0, generator)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """Puts the registers before this rank's rows, as far as it owns them.

        Args:
            x: [batch, n, d_model], the rows of this rank that are no registers: those of :meth:`rows`.
            plan: made by :func:`make_plan` for this rank.

        Returns:
            [batch, plan.tokens, d_model] in the dtype of x.

        Raises:
            ConfigError: (a ValueError) the plan has another number of registers, or x another shape.
        """
        own = self._own(plan)
        if x.ndim != 3 or x.shape[1:] != (plan.tokens - own, self.d_model):
            expected = f"[batch, {plan.tokens - own}, {self.d_model}] on rank {plan.rank}"
            self._refuse(plan, f"x has shape {tuple(x.shape)}; expected {expected}")
        # Taken on every rank, if only no rows of it: so the parameter has a gradient on every rank.
        mine = self.tokens[plan.positions[:own].to(x.device)].to(x.dtype)
        return torch.cat((mine.expand(x.shape[0], -1, -1), x), dim=1)

    def strip(self, y: Tensor, plan: Plan) -> Tensor:
        """Takes the rows of the registers out again.

        Args:
            y: [batch, plan.tokens, ...].
            plan: that of :meth:`forward`.

        Returns:
            [batch, n, ...], the rows of this rank that are no registers.

        Raises:
            ConfigError: (a ValueError) the plan has another number of registers, or y other rows.
        """
        own = self._own(plan)
        if y.ndim < 2 or y.shape[1] != plan.tokens:
            found = f"y has shape {tuple(y.shape)}"
            self._refuse(plan, f"{found}; expected [batch, {plan.tokens}, ...] on rank {plan.rank}")
        return y[:, own:]

    def rows(self, plan: Plan) -> Tensor:
        """int64 [n]: which rows of the sequence without registers this rank owns, in their order.

        Raises:
            ConfigError: (a ValueError) the plan has another number of registers.
        """
        return plan.positions[self._own(plan) :] - self.registers

    def extra_repr(self) -> str:
        return f"registers={self.registers}, d_model={self.d_model}"

    def _own(self, plan: Plan) -> int:
        """How many registers this rank owns. Its rows ascend, so they are the first."""
        if plan.spec.registers != self.registers:
            self._refuse(plan, f"plan has {plan.spec.registers} registers; expected {self.registers}")
        return sum(max(0, min(stop, self.registers) - first) for first, stop in plan.segments)

    def _refuse(self, plan: Plan, why: str) -> None:
        operators.refuse(plan, why)
        raise ConfigError(why)


class _AttentionPool(nn.Module):
    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(kv_heads, head_dim, dtype=dtype))

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.query)

    def parameters_by_name(self) -> AttentionPool:
        return AttentionPool(self.query)


class _MlpPool(nn.Module):
    def __init__(self, members: int, dim: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.keys = _Mlp(members, dim, hidden, dtype)
        self.values = _Mlp(members, dim, hidden, dtype)

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        self.keys.reset_parameters(generator)
        self.values.reset_parameters(generator)

    def parameters_by_name(self) -> MlpPool:
        return MlpPool(self.keys.parameters_by_name(), self.values.parameters_by_name())


class _Mlp(nn.Module):
    def __init__(self, members: int, dim: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(members, dim, dtype=dtype))
        self.w1 = nn.Parameter(torch.empty(hidden, members * dim, dtype=dtype))
        self.b1 = nn.Parameter(torch.empty(hidden, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(dim, hidden, dtype=dtype))

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        _draw(self.positions, _SMALL, generator)
        _draw(self.w1, self.w1.shape[1] ** -0.5, generator)
        nn.init.zeros_(self.b1)
        _draw(self.w2, _SMALL, generator)

    def parameters_by_name(self) -> Mlp:
        return Mlp(self.positions, self.w1, self.b1, self.w2)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps=1e-6)


def _draw(parameter: nn.Parameter, std: float, generator: torch.Generator | None) -> None:
    """From N(0, std^2) in float32, so that every dtype begins with the same values, as far as it can hold them."""
    parameter.copy_(nn.init.normal_(torch.empty_like(parameter, dtype=torch.float32), std=std, generator=generator))


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{name} is {size!r}; expected an integer of at least 1")

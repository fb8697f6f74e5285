"""Attention on this rank's shard, by whatever a spec says: the way in."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from distattn import operators
from distattn.aside import after_aside, aside, mark
from distattn.errors import ConfigError
from distattn.extras import AttentionExtras, AttentionPool, MlpPool
from distattn.heads import HeadsPlan
from distattn.plan import Plan
from distattn.selection import choose, scorers_of, summary_table
from distattn.summaries import buffer_of, gather_summaries, make_summaries, pool_own

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Selection:
    """What a call chose, to be given to another: layers that share it need not choose again.

    chunks: int32 [batch, tables, tiles, n], on this rank: chunk numbers, ascending, then -1.
    """

    def __init__(self, plan: Plan, chunks: Tensor) -> None:
        self.spec, self.rows, self.chunks = plan.spec.select, plan.segments, chunks

    def fits(self, plan: Plan, batch: int) -> bool:
        same = (self.spec, self.rows) == (plan.spec.select, plan.segments)
        return same and self.chunks.shape[0] == batch and self.chunks.shape[1] == _tables(plan)


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = ...,
    extras: AttentionExtras | None = ...,
    selection: Selection | None = ...,
    return_lse: Literal[False] = ...,
    return_selection: Literal[False] = ...,
) -> Tensor: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = ...,
    extras: AttentionExtras | None = ...,
    selection: Selection | None = ...,
    return_lse: bool = ...,
    return_selection: bool = ...,
) -> Any: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    extras: AttentionExtras | None = None,
    selection: Selection | None = None,
    return_lse: bool = False,
    return_selection: bool = False,
) -> Any:
    """Attention of this rank's queries to the keys that the plan's spec allows, on all ranks. Differentiable.

    Query head h reads key/value head ``h // (heads // kv_heads)``. All ranks of the plan call this together.

    Args:
        q: [batch, plan.tokens, heads, head_dim], this rank's rows; float32, bfloat16, float16 or float64.
        k: [batch, plan.tokens, kv_heads, head_dim].
        v: [batch, plan.tokens, kv_heads, value_dim].
        plan: made by :func:`make_plan` for this rank.
        scale: factor of the scores; default ``head_dim ** -0.5``.
        extras: gates and parameters of pooling, where the spec asks for them.
        selection: of :func:`select` or another layer; None: chosen here.
        return_lse: also return the log-sum-exp of the scores.
        return_selection: also return the selection.

    Returns:
        out [batch, plan.tokens, heads, value_dim] in the dtype of q, or a tuple of it and what is asked for: lse
        [batch, plan.tokens, heads], natural logarithm, float32 (float64 for float64 inputs), and then the Selection. A
        query that may attend to nothing has out 0, lse -inf.

    Raises:
        ConfigError: (a ValueError) a shape, dtype or device is not what the plan says, the extras are not those that
            its spec needs, or an LSE is asked for where there is none: of several softmaxes, or of a corrected result.
        PlanMismatch: ranks disagree on the plan, the shapes, the dtypes or the versions, and nothing has been sent; or
            on which exchange comes next.
        PeerLost: a rank is gone.
        StepTimeout: a rank is frozen or too slow; see :func:`distattn.watch.set_deadline`.
    """
    extras = extras or AttentionExtras()
    why = _refusal(q, k, v, plan) or _extras_refusal(q, k, plan, extras, selection, return_lse)
    if why is None and return_selection and plan.spec.select is None:
        why = "return_selection is True; expected False, since the spec selects nothing"
    if why:
        operators.refuse(plan, why)
        raise ConfigError(why)
    scale = plan.head_dim**-0.5 if scale is None else scale
    lse: Tensor | None
    # What is computed in which dtype follows from the inputs' alone: autocast would round sums that must not be.
    with torch.autocast(q.device.type, enabled=False):
        if isinstance(plan, HeadsPlan):
            out, lse = _by_heads(q, k, v, plan, scale, return_lse)
        elif plan.spec.is_static:
            out, lse = _static(q, k, v, plan, scale)
        else:
            out, lse, selection = _hierarchical(q, k, v, plan, scale, extras, selection)
            out = _corrected(out, q, k, v, plan, scale)
    asked = [x for x, wanted in ((lse, return_lse), (selection, return_selection)) if wanted]
    return (out, *asked) if asked else out


def select(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None, extras: AttentionExtras | None = None
) -> Selection:
    """What :func:`attend` would choose, for it and for other layers. Arguments and errors as there."""
    extras = extras or AttentionExtras()
    why = _refusal(q, k, v, plan)
    if plan.spec.select is None:
        why = f"plan is for {plan.spec!r}; expected a spec with select"
    if why:
        operators.refuse(plan, why)
        raise ConfigError(why)
    operators.agree(plan, q.shape[0], q.dtype)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        gathered = gather_summaries(pool_own(k, v, plan, extras), plan)
        scale = plan.head_dim**-0.5 if scale is None else scale
        return Selection(plan, choose(scorers_of(q, plan), k, gathered, plan, extras, scale))


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    summaries: tuple[Tensor | None, ...] = (),
    summary_table: tuple[Tensor, ...] = (),
    chosen: Tensor | None = None,
    tokens: bool = True,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of what is given, and of the plan's pattern if ``tokens``."""
    more = *(summaries or (None,) * 3), *(summary_table or (None,) * 2), chosen
    out, lse, *_ = torch.ops.distattn.attend(q, k, v, *more, tokens, plan.name, scale)
    return out, lse


def _static(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """By a spec that has a pattern, and perhaps a correction."""
    out, lse = _run(q, k, v, plan, scale)
    return _corrected(out, q, k, v, plan, scale), lse


def _by_heads(
    q: Tensor, k: Tensor, v: Tensor, plan: HeadsPlan, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    (q,), (k, v) = torch.ops.distattn.exchange_heads([q], [k, v], plan.name)
    out, lse = _static(q, k, v, plan.inner, scale)
    results = [out, lse.unsqueeze(-1)] if return_lse else [out]
    (out, *asked), _ = torch.ops.distattn.return_heads(results, [], plan.name)
    return out, asked[0].squeeze(-1) if asked else None


def _hierarchical(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, extras: AttentionExtras, selection: Selection | None
) -> tuple[Tensor, Tensor, Selection | None]:
    spec, hierarchy = plan.spec, plan.hierarchy
    assert hierarchy is not None
    if not torch.compiler.is_compiling():
        operators.agree(plan, q.shape[0], q.dtype)
    pooled = pool_own(k, v, plan, extras)
    with operators.Begun(plan) as begun:
        begun.start(q, k, v)
        if spec.select is None:
            begun.bring(pooled)
        there = mark(q.device)
        begun.attend(q, k, v, scale, more=spec.merge == "softmax")
        # On a GPU, what follows is small and is done beside it, so that nobody waits for what is chosen. Where that is
        # much, bringing summaries is launched after it, too: for what the host launches before it, the GPU waits.
        with aside(q.device, there):
            if spec.select is not None:
                begun.bring(pooled)
            begun.arrive(pooled)
        gathered = gather_summaries(pooled, plan)
        after_aside(q.device, *gathered)
        table: tuple[Tensor, ...] = ()
        chosen: Tensor | None = None
        if spec.select is not None:
            with torch.no_grad(), aside(q.device, there):
                if selection is None:
                    selection = Selection(plan, choose(scorers_of(q, plan), k, gathered, plan, extras, scale))
                chosen = selection.chunks
                begun.ask(chosen)
                if gathered and spec.merge == "softmax":
                    table = summary_table(chosen, plan)
            after_aside(q.device, chosen, *table)
        levels = make_summaries(gathered, plan, extras)
        summaries: tuple[Tensor | None, ...] = buffer_of(levels, hierarchy, q.dtype) if levels else ()
        if spec.merge == "softmax":
            return *_run(q, k, v, plan, scale, summaries, table, chosen), selection
        parts = [_run(q, k, v, plan, scale)]
        if summaries:
            parts.append(_run(q, k, v, plan, scale, summaries, tokens=False))
        if chosen is not None:
            parts.append(_run(q, k, v, plan, scale, chosen=chosen, tokens=False))
    out: Tensor = torch.ops.distattn.gate([part[0] for part in parts], extras.gates)
    return out, parts[0][1], selection


def _corrected(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """Adds to rows what dense attention adds to the first row of each run of ``every``, if the spec has a Delta."""
    if plan.spec.correction is None:
        return out
    assert plan.correction is not None
    dense = _run(q, k, v, plan.correction, scale)[0]
    wide = torch.promote_types(out.dtype, torch.float32)
    moved = out.to(wide) + (dense.to(wide) - out.to(wide))[:, plan.on(q.device, "corrected_by")]
    last = plan.on(q.device, "stays_dense")
    return torch.where(last[:, None, None], dense.to(wide), moved).to(out.dtype)


def _tables(plan: Plan) -> int:
    assert plan.hierarchy is not None
    return max(plan.hierarchy.head_table) + 1


def _refusal(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> str | None:
    """Why these tensors cannot be attended with this plan; None if they can."""
    if plan.world_size > 1 and plan.group_name is None:
        return f"plan is for {plan.world_size} ranks on paper; expected one that was made with a mesh"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions; expected [batch, tokens, heads, dim]"
    batch = q.shape[0]
    for name, x, heads, dim in (
        ("q", q, plan.heads, plan.head_dim),
        ("k", k, plan.kv_heads, plan.head_dim),
        ("v", v, plan.kv_heads, plan.value_dim),
    ):
        expected = (batch, plan.tokens, heads, dim)
        if tuple(x.shape) != expected:
            return f"{name} has shape {tuple(x.shape)}; expected {expected} on rank {plan.rank}"
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            return f"{name} is {x.dtype}; expected q, k and v in one of float32, bfloat16, float16, float64"
        if x.device != q.device:
            return f"{name} is on {x.device} and q on {q.device}; expected one device"
    return None


def _extras_refusal(
    q: Tensor, k: Tensor, plan: Plan, extras: AttentionExtras, selection: Selection | None, return_lse: bool
) -> str | None:
    """Why these extras do not go with the plan's spec; None if they do."""
    spec = plan.spec
    if return_lse and (spec.merge == "gate" or spec.correction is not None):
        what = "several softmaxes" if spec.merge == "gate" else "a corrected result"
        return f"return_lse is True; expected False, since {what} has no log-sum-exp"
    sources = 1 + bool(spec.summaries) + (spec.select is not None)
    wanted = (*q.shape[:3], sources) if spec.merge == "gate" else None
    shapes = [("gates", extras.gates, wanted)]
    learned = any(level.bias == "learned" for level in spec.summaries)
    shapes.append(("key_bias", extras.key_bias, (len(spec.summaries), plan.kv_heads) if learned else None))
    if extras.pool_keys is not None:
        shapes.append(("pool_keys", extras.pool_keys, tuple(k.shape)))
    for name, x, shape in shapes:
        if (x is None) != (shape is None) or (x is not None and tuple(x.shape) != shape):
            given = None if x is None else tuple(x.shape)
            return f"extras.{name} has the shape {given}; expected {shape} with this spec"
    if len(extras.pool) > len(spec.summaries):
        return f"extras.pool has {len(extras.pool)} entries; expected at most one a level, {len(spec.summaries)}"
    kinds = {"mean": type(None), "attention": AttentionPool, "mlp": MlpPool}
    for number, level in enumerate(spec.summaries):
        pool = extras.pool[number] if number < len(extras.pool) else None
        if not isinstance(pool, kinds[level.pool]):
            found, expected = type(pool).__name__, kinds[level.pool].__name__
            return f"extras.pool[{number}] is {found}; expected {expected}, as pool is {level.pool!r}"
    if selection is not None and (spec.select is None or not selection.fits(plan, q.shape[0])):
        return f"selection was made for {selection.spec!r}; expected one for {spec.select!r} on these rows and heads"
    return None

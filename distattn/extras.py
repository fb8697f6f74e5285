"""AttentionExtras: what a spec needs beside q, k and v, mostly learned parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class AttentionPool(NamedTuple):
    """Of ``pool="attention"``. query: [kv_heads, head_dim]."""

    query: Tensor


class Mlp(NamedTuple):
    """W2 silu(W1 x + b1) of the members of a chunk, one after the other, each with its position added.

    positions: [members, dim]. w1: [hidden, members * dim]. b1: [hidden]. w2: [dim, hidden].
    """

    positions: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor


class MlpPool(NamedTuple):
    """Of ``pool="mlp"``, the same for all heads."""

    keys: Mlp
    values: Mlp


class AttentionExtras(NamedTuple):
    """What goes with q, k and v, this rank's rows as theirs; None where the spec does not ask for it.

    gates: [batch, tokens, heads, sources], before the sigmoid; sources are the tokens, then the summaries, then the
        chosen chunks, as far as the spec has them.
    pool: a level each; None for a level of ``pool="mean"``.
    key_bias: [levels, kv_heads]; only levels of ``bias="learned"`` are read.
    pool_keys: [batch, tokens, kv_heads, head_dim], pooled instead of k: keys before their rotation, since the mean of
        rotated keys cancels high frequencies.
    rotate: rotate(keys [batch, n, kv_heads, head_dim], positions float64 [n]) turns pooled keys to the centres of their
        chunks, the mean of the first and the last position; None: they stay as they are.
    """

    gates: Tensor | None = None
    pool: tuple[AttentionPool | MlpPool | None, ...] = ()
    key_bias: Tensor | None = None
    pool_keys: Tensor | None = None
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None

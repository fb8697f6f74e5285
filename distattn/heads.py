"""Plans on a mesh of two dimensions: groups of ranks that exchange heads, of which each holds one shard.

The ranks of a group divide the rows of their shard among them, with all heads. Before attention each rank gives every
other one that one's share of the heads, and so gets all rows of the shard for its own heads; then it attends by an
ordinary plan, together with the ranks that have the same heads of other shards, and the results go back as the inputs
came (Jacobs et al., "DeepSpeed Ulysses", 2023). So it takes part in no more than its share of the heads, and ranks
that are close, such as those of one machine, exchange heads, while keys travel only between groups. With few
key/value heads one goes to all ranks whose query heads read it.

For a mesh of 2 groups of 2 ranks, 8 query heads and 2 key/value heads:

    rank 0  first half of shard 0  ->  shard 0, query heads 0-3, key/value head 0   attends with rank 2
    rank 1  second half            ->  shard 0, query heads 4-7, key/value head 1   attends with rank 3
    rank 2  first half of shard 1  ->  shard 1, query heads 0-3, key/value head 0
    rank 3  second half            ->  shard 1, query heads 4-7, key/value head 1
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from distattn.algebra import PerHead
from distattn.arena import GuestQueries, Stage
from distattn.cost import Work
from distattn.errors import ConfigError
from distattn.layout import Layout
from distattn.messages import Message, Transfer
from distattn.outline import make_outline
from distattn.plan import Plan, choose_layout, plan_rows, plans
from distattn.spec import AttentionSpec


@dataclass(frozen=True, eq=False)
class HeadsPlan(Plan):
    """What one rank does where groups of ranks exchange heads. Made by :func:`make_plan`.

    Ranks are numbered group by group. ``group_name`` is the process group of those that exchange heads.

    Attributes:
        plans: by rank of the group, what it does with the rows of the whole shard and its share of the heads; that of
            this rank has a process group, of the ranks with the same heads, unless there is one shard only.
    """

    plans: tuple[Plan, ...]

    @property
    def inner(self) -> Plan:
        """The plan by which this rank attends."""
        return self.plans[self.head_rank]

    @property
    def head_rank(self) -> int:
        """This rank among those that exchange heads."""
        return self.rank % len(self.plans)

    @property
    def group_names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.group_name, self.inner.group_name) if name is not None)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return self.inner.stages

    @cached_property
    def guest_queries(self) -> GuestQueries | None:
        return self.inner.guest_queries

    @cached_property
    def correction(self) -> Plan | None:
        """None: what corrects is a part of the inner plan."""
        return None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows of each rank of the group, in the order in which they make up the shard."""
        first = self.rank - self.head_rank
        return tuple(self.layout.tokens()[first : first + len(self.plans)].tolist())

    @cached_property
    def queries(self) -> Transfer:
        """Brings this rank's query heads of all rows of the shard; its reverse takes their results home."""
        share = self.heads // len(self.plans)
        return self._transfer([tuple(range(i * share, (i + 1) * share)) for i in range(len(self.plans))])

    @cached_property
    def keys(self) -> Transfer:
        """Brings the key/value heads that this rank's query heads read."""
        return self._transfer(
            [_kv_heads(self.heads, self.kv_heads, len(self.plans), i) for i in range(len(self.plans))]
        )

    def _transfer(self, heads: list[tuple[int, ...]]) -> Transfer:
        """heads: by rank of the group, those that it gets."""
        here, stop = np.array([[0, self.tokens]]), np.cumsum(self.counts)
        sends = [Message(peer, theirs, here) for peer, theirs in enumerate(heads) if self.tokens]
        mine = tuple(range(len(heads[self.head_rank])))
        receives = [
            Message(peer, mine, np.array([[end - count, end]]))
            for peer, (end, count) in enumerate(zip(stop.tolist(), self.counts, strict=True))
            if count
        ]
        return Transfer("all_to_all", tuple(sends), tuple(receives), tuple(sends))

    def unshard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        if x.shape[dim] != self.tokens:
            raise ConfigError(f"x has {x.shape[dim]} rows along dim {dim}, this rank owns {self.tokens} tokens")
        from distattn.exchange import gather_rows

        parts = gather_rows(x.movedim(dim, 0), list(self.counts), self.group_name)
        return self.inner.unshard(torch.cat(parts).movedim(0, dim), dim)

    def sent_bytes(self, itemsize: int, batch: int = 1, lse: bool = False) -> int:
        """As :meth:`Plan.sent_bytes`; ``lse``: whether it is asked for, since then it travels, too."""
        back = itemsize * self.value_dim + max(itemsize, 4) * lse
        sent = self._away(self.queries, itemsize * self.head_dim) + self._home(self.queries, back)
        sent += self._away(self.keys, itemsize * (self.head_dim + self.value_dim))
        return sent * batch + self.inner.sent_bytes(itemsize, batch)

    def sent_bytes_backward(self, itemsize: int, batch: int = 1, lse: bool = False) -> int:
        """As :meth:`Plan.sent_bytes_backward`; gradients of heads go home as what they are gradients of."""
        there = itemsize * self.value_dim + max(itemsize, 4) * lse
        sent = self._away(self.queries, there) + self._home(self.queries, itemsize * self.head_dim)
        sent += self._home(self.keys, itemsize * (self.head_dim + self.value_dim))
        return sent * batch + self.inner.sent_bytes_backward(itemsize, batch)

    def _away(self, transfer: Transfer, row_bytes: int) -> int:
        return transfer.sent_bytes(row_bytes, self.head_rank, len(self.plans))

    def _home(self, transfer: Transfer, row_bytes: int) -> int:
        return transfer.returned_bytes(row_bytes, self.head_rank)

    def work(self, itemsize: int = 2) -> list[Work]:
        by_key = {key: plan.work(itemsize) for key, plan in {plan.key: plan for plan in self.plans}.items()}
        inner = [by_key[plan.key] for plan in self.plans]
        tokens, shards, ranks = self.layout.tokens(), self.inner.layout.tokens(), len(self.plans)
        heads, kv_heads = self.inner.heads, self.inner.kv_heads
        come = itemsize * (heads * self.head_dim + kv_heads * (self.head_dim + self.value_dim))  # of a row, from a rank
        back = itemsize * heads * self.value_dim
        found = []
        for rank in range(self.world_size):
            mine, others = float(tokens[rank]), float(shards[rank // ranks] - tokens[rank])
            sent, received = mine * (ranks - 1) * come + others * back, others * come + mine * (ranks - 1) * back
            found.append(inner[rank % ranks][rank // ranks].plus(Work(0, 0, 0, sent, received, 0)))
        return found

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, heads exchanged by {len(self.plans)})"


def refusal(spec: AttentionSpec, heads: int, kv_heads: int, ranks: int) -> str | None:
    """What so many ranks of a group that exchange heads are to be instead; None if they can be as many."""
    if ranks == 1:
        return None
    if not spec.is_static:
        return "expected 1, since the spec has summaries or a selection, which need all heads"
    if heads % ranks:
        return f"expected a divisor of heads, {heads}"
    if kv_heads % ranks and ranks % kv_heads:
        return f"expected a divisor or a multiple of kv_heads, {kv_heads}"
    parts = {_part(spec, heads, ranks, i).causal for i in range(ranks)}
    if spec.correction is not None and parts != {spec.causal}:
        return "expected 1, since the spec has a correction, and heads of which some only are causal"
    return None


@lru_cache(maxsize=16)
def plan_heads(
    spec: AttentionSpec,
    numbers: tuple[tuple[str, int], ...],
    head_ranks: int,
    rank: int,
    layout: str | Layout,
    schedule: str,
    groups: tuple[str | None, ...],
) -> HeadsPlan:
    """The plan of a rank where groups of ``head_ranks`` exchange heads.

    Args:
        numbers: of :func:`make_plan`, for all ranks and heads.
        layout: a name, or one for all ranks.
        groups: process groups of the ranks with the same heads, and of those that exchange heads; None on paper.

    Raises:
        ConfigError: the heads cannot be divided so.
    """
    n: dict[str, Any] = dict(numbers)
    said = f"the second dimension of mesh (head_ranks, on paper) is {head_ranks}"
    if n["world_size"] % head_ranks:
        raise ConfigError(f"{said}; expected a divisor of world_size, {n['world_size']}")
    if why := refusal(spec, n["heads"], n["kv_heads"], head_ranks):
        raise ConfigError(f"{said}; {why}")
    shards, blocks = n["world_size"] // head_ranks, (n["block_q"], n["block_k"])
    outline = make_outline(spec.tokens.by_head(n["heads"]), n["seq_len"], blocks, shards)
    if isinstance(layout, Layout):
        whole = layout.joined(head_ranks)
    else:
        whole = choose_layout(layout, spec, outline, n | {"world_size": shards}, schedule)
        layout = whole.divided(head_ranks)
    share = {"heads": n["heads"] // head_ranks, "kv_heads": max(n["kv_heads"] // head_ranks, 1), "world_size": shards}
    shard, mine = divmod(rank, head_ranks)
    inner = tuple(
        plan_rows(
            _part(spec, n["heads"], head_ranks, i),
            tuple((n | share).items()),
            shard,
            whole,
            schedule,
            groups[0] if i == mine else None,
        )
        for i in range(head_ranks)
    )
    told = repr((numbers, *(plan.key for plan in inner))).encode() + layout.start.tobytes() + layout.owner.tobytes()
    plan = HeadsPlan(
        spec=spec,
        seq_len=n["seq_len"],
        heads=n["heads"],
        kv_heads=n["kv_heads"],
        head_dim=n["head_dim"],
        value_dim=n["value_dim"],
        world_size=n["world_size"],
        rank=rank,
        group_name=groups[1],
        layout=layout,
        schedule=inner[mine].schedule,
        slices=inner[mine].slices,
        block_q=blocks[0],
        block_k=blocks[1],
        outline=outline,
        tokens=int(layout.tokens()[rank]),
        key=hashlib.blake2b(told, digest_size=16).hexdigest(),
        plans=inner,
    )
    found = plans.setdefault(plan.name, plan)
    assert isinstance(found, HeadsPlan)
    return found


def _part(spec: AttentionSpec, heads: int, ranks: int, rank: int) -> AttentionSpec:
    """The spec of one rank's share of the heads."""
    share = heads // ranks
    patterns = spec.tokens.by_head(heads)[rank * share : (rank + 1) * share]
    tokens = patterns[0] if len({*patterns}) == 1 else PerHead(patterns)
    return replace(spec, tokens=tokens, registers=0)  # whose pattern has them already


def _kv_heads(heads: int, kv_heads: int, ranks: int, rank: int) -> tuple[int, ...]:
    """Those that one rank's query heads read."""
    share, group = heads // ranks, heads // kv_heads
    return tuple(range(rank * share // group, -(-(rank + 1) * share // group)))

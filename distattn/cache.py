"""A paged cache of keys and values that is sharded over ranks, and attention of new tokens to it.

Every rank holds some blocks of pages (pages.py), the same ones in all layers. In a step (decoding.py) some sequences
get new tokens: one each, or slices of prompts. Each rank computes some of these rows; its queries go to the ranks that
hold pages which they visit, its keys and values to where they stay, all in one exchange, and partial results come back
in a second one, and are merged by their log-sum-exp. A query attends to what its spec allows of the positions up to its
own: in a cache every pattern is causal.

    cache = Cache(specs, tokens=100_000, heads=32, kv_heads=8, head_dim=128, mesh=mesh)
    sequence = cache.add()
    step = cache.begin({sequence: 4096})
    out = step.attend(layer, q, k, v)       # for each layer, with the rows of step.positions
    step.end()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from distattn import operators
from distattn.algebra import Pattern
from distattn.cached_levels import CachedLevels, LevelPlan, Sizes
from distattn.decoding import Step
from distattn.errors import CacheFull, ConfigError
from distattn.outlook import Outlook, causal, outlook_of
from distattn.pages import PageTables
from distattn.policies import HeaviestPages, Mass, Policy
from distattn.presets import dense
from distattn.retrieval import PageBounds, Quest
from distattn.spans import Bools
from distattn.spec import AttentionSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


RETRIEVED = dense()
"""Layers of this spec may retrieve pages."""
_LENGTHS = 64
"""Of so many it is kept which pages some later query may visit."""


def plan_levels(specs: Sequence[AttentionSpec], sizes: Sizes) -> dict[AttentionSpec, LevelPlan]:
    """Those of the specs that are more than a pattern. Raises ConfigError for one that no cache can serve."""
    for spec in specs:
        if spec.correction is not None:
            raise ConfigError(f"specs has {spec!r}; expected none with a correction, which depends on what follows")
    return {spec: LevelPlan(spec, sizes) for spec in dict.fromkeys(specs) if not spec.is_static}


class Cache:
    """Keys and values of a decoder's layers, for any number of sequences. All ranks make the same calls.

    Args:
        specs: one a layer. Pages that none of them visits again are let go as soon as a step ends.
        retrieve: dense layers attend to so many pages in steps of few tokens; None: to all.
        keep: what else is let go then; None: nothing, and a full cache refuses.
        tokens: room for so many, on all ranks together, in whole blocks.
        heads, kv_heads, head_dim, value_dim: as in :func:`make_plan`.
        max_len: of a sequence; default: ``tokens``.
        sequences: how many there may be at a time, where a spec has summaries or chooses chunks, or pages are
            retrieved: each has buffers then.
        block_k: rows of a page.
        mesh: a one-dimensional DeviceMesh, the ranks that share the cache; None: one rank.

    Attributes:
        tables: who has which pages.
        k, v: by layer, [slots, kv_heads, dim], this rank's.
        mass: by sequence, the attention that was paid to each page, where ``keep`` asks for it.
        released, lost: by sequence, how many positions were let go: since no query visits them again, and though one
            would.

    Raises:
        ConfigError: an argument, or a spec, that cannot work.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        *,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        max_len: int | None = None,
        sequences: int = 1,
        block_k: int = 128,
        retrieve: Quest | None = None,
        keep: Policy | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mesh: DeviceMesh | None = None,
    ) -> None:
        value_dim, max_len = head_dim if value_dim is None else value_dim, tokens if max_len is None else max_len
        sizes = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
        for name, value in {**sizes, "max_len": max_len, "sequences": sequences, "block_k": block_k}.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        if heads % kv_heads:
            raise ConfigError(f"heads is {heads}, which kv_heads {kv_heads} does not divide")
        self.specs, self.max_len, self.block_k, self.dtype = tuple(specs), max_len, block_k, dtype
        self.heads, self.kv_heads, self.head_dim, self.value_dim = heads, kv_heads, head_dim, value_dim
        self.rank, self.world_size, self.group_name = 0, 1, None
        if mesh is not None and mesh.size() > 1:
            self.rank, self.world_size = mesh.get_local_rank(), mesh.size()
            self.group_name = mesh.get_group().group_name
            said = f"{sizes}, {max_len}, {sequences}, {block_k}, {dtype}, {retrieve}, {keep}, {list(specs)}"
            operators.agree_on(self.group_name, f"a cache of {said}")
        self.device = torch.device(device)
        self.tables = PageTables(self.world_size, -(-tokens // (block_k * self.world_size)), block_k)
        slots = self.tables.blocks * block_k
        self.k, self.v = (
            [torch.zeros(slots, kv_heads, dim, dtype=dtype, device=device) for _ in specs]
            for dim in (head_dim, value_dim)
        )
        if isinstance(keep, HeaviestPages) and not (retrieve is None and all(spec.is_static for spec in specs)):
            raise ConfigError(f"keep is {keep}; expected patterns of tokens alone with it, and no retrieval")
        self.keep = keep
        self.mass: dict[int, Mass] = {}
        self.released: dict[int, int] = {}
        self.lost: dict[int, int] = {}
        self.sequences, self.slot_of = sequences, dict[int, int]()
        share = self.rank, self.world_size
        wide = Sizes(heads, kv_heads, head_dim, value_dim, max_len, sequences, block_k, dtype, self.device, share)
        self.sizes, self.level_plans = wide, plan_levels(specs, wide)
        self.retrieval = None if retrieve is None else retrieve.plan(wide)
        if retrieve is not None and RETRIEVED not in specs:
            raise ConfigError(f"retrieve is {retrieve}; expected None, or a spec that is {RETRIEVED!r}")
        self.levels = tuple(self._levels_of(spec) for spec in specs)
        self._needed: dict[int, Bools] = {}

    @cached_property
    def kind_of(self) -> tuple[int, ...]:
        """Of each layer the number of its spec among the distinct ones."""
        kinds = {spec: number for number, spec in enumerate(dict.fromkeys(self.specs))}
        return tuple(kinds[spec] for spec in self.specs)

    @cached_property
    def outlooks(self) -> dict[bool, list[Outlook]]:
        """Of the distinct specs, for steps with few tokens (True) and with many."""
        found: dict[bool, list[Outlook]] = {True: [], False: []}
        for spec in dict.fromkeys(self.specs):
            retrieval = self.retrieval if spec == RETRIEVED else None
            for few, some in found.items():
                some.append(outlook_of(spec, self.level_plans.get(spec), retrieval, self.sizes, few))
        return found

    def add(self) -> int:
        """A new, empty sequence. Raises CacheFull if there may be no more."""
        return self._known(self.tables.add, None)

    def fork(self, sequence: int) -> int:
        """A new sequence that begins with all tokens of another; what they share is there once, but for summaries.

        Raises CacheFull if there may be no more.
        """
        return self._known(lambda: self.tables.fork(sequence), sequence)

    def free(self, sequence: int) -> None:
        """Ends a sequence."""
        self.tables.free(sequence)
        del self.released[sequence], self.lost[sequence]
        self.slot_of.pop(sequence, None)
        self.mass.pop(sequence, None)

    def begin(self, counts: Mapping[int, int]) -> Step:
        """Makes room for new tokens, and plans what they visit.

        Args:
            counts: how many, by sequence; at least 1 each.

        Raises:
            ConfigError: there is no such sequence, no token, or a sequence would be longer than ``max_len``.
            CacheFull: there is no room for all of them; nothing was written.
        """
        if not counts or min(counts.values()) < 1:
            raise ConfigError(f"counts is {dict(counts)}; expected at least one token of each of some sequences")
        start = np.asarray([self.tables.length(sequence) for sequence in counts])
        for sequence, first in zip(counts, start.tolist(), strict=True):
            if first + counts[sequence] > self.max_len:
                found = f"sequence {sequence} would have {first + counts[sequence]:,} tokens"
                raise ConfigError(f"{found}; expected at most max_len, {self.max_len:,}")
        pages = {sequence: len(self.tables.pages(sequence)[0]) for sequence in counts}
        written = self.tables.append(counts)
        for rank, old, new in written.copies:
            if rank == self.rank:
                self._copy_block(old, new)
        for sequence, before in pages.items():
            self._clear_last(sequence, before)
        return Step(self, counts, start, written)

    def release(self, sequence: int) -> None:
        """Lets go the pages that no query visits any more, whatever comes, and those that ``keep`` does not keep."""
        length, (owner, _) = self.tables.length(sequence), self.tables.pages(sequence)
        there = owner[: length // self.block_k] >= 0
        if length not in self._needed:
            if len(self._needed) == _LENGTHS:
                self._needed.clear()
            self._needed[length] = self._pages_needed(length)
        dead = there & ~self._needed[length]
        self.released[sequence] += int(dead.sum()) * self.block_k
        if self.keep is not None:
            mass = np.zeros(len(there)) if sequence not in self.mass else self.mass[sequence][: len(there)]
            more = there & ~dead & ~self.keep.keeps(there & ~dead, length, self.block_k, mass)
            self.lost[sequence] += int(more.sum()) * self.block_k
            dead |= more
        self.tables.evict(sequence, np.flatnonzero(dead))

    def _pages_needed(self, length: int) -> Bools:
        """bool [whole pages]: which of a sequence of this length some later query of some layer may visit."""
        found = np.zeros(length // self.block_k, np.bool_)
        if length >= self.max_len or any(spec.select is not None for spec in self.specs):
            return ~found  # nothing comes, or any chunk may be chosen
        for pattern in self._patterns:
            support, _ = pattern.spans([length], [self.max_len], self.max_len, self.block_k)
            for first, stop in zip(support.start.tolist(), support.stop.tolist(), strict=True):
                found[first // self.block_k : -(-stop // self.block_k)] = True
        return found

    @cached_property
    def _patterns(self) -> list[Pattern]:
        """The distinct ones of all layers and heads, as they are in a cache."""
        every = {pattern for spec in dict.fromkeys(self.specs) for pattern in spec.tokens.by_head(self.heads)}
        return [causal(pattern) for pattern in every]

    def _levels_of(self, spec: AttentionSpec) -> CachedLevels | PageBounds | None:
        if spec == RETRIEVED and self.retrieval is not None:
            return PageBounds(self.retrieval)
        plan = self.level_plans.get(spec)
        return None if plan is None else CachedLevels(plan)

    def _known(self, make: Callable[[], int], old: int | None) -> int:
        """A new sequence, with a slot for its summaries; like ``old``."""
        free = sorted(set(range(self.sequences)) - set(self.slot_of.values()))
        wanted = any(levels is not None for levels in self.levels)
        if wanted and not free:
            raise CacheFull(f"there are {self.sequences} sequences already; expected one to be freed before another")
        found = make()
        if old is not None and old in self.mass:
            self.mass[found] = self.mass[old].copy()
        for counted in (self.released, self.lost):
            counted[found] = 0 if old is None else counted[old]
        if wanted:
            self.slot_of[found] = free[0]
            for levels in self.levels:
                if levels is not None and old is not None:
                    levels.copy(self.slot_of[old], free[0])
                elif levels is not None:
                    levels.clear(free[0])
        return found

    def _copy_block(self, old: int, new: int) -> None:
        for pool in (*self.k, *self.v):
            blocks = pool.unflatten(0, (-1, self.block_k))
            blocks[new] = blocks[old]

    def _clear_last(self, sequence: int, before: int) -> None:
        """Of a new page that is not full, values that are there from a sequence before: 0 times NaN is no 0."""
        owner, block = self.tables.pages(sequence)
        if len(owner) > before and self.tables.length(sequence) % self.block_k and owner[-1] == self.rank:
            for pool in self.v:
                pool.unflatten(0, (-1, self.block_k))[int(block[-1])] = 0.0

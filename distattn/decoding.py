"""One step of a cache: sequences get new tokens, whose queries visit pages wherever these lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distattn import operators
from distattn import spans as sp
from distattn.cached_levels import FEW, Asking, CachedLevels, LevelPlan
from distattn.errors import ConfigError
from distattn.exchange import Exchange, gather_rows
from distattn.extras import AttentionExtras, AttentionPool, MlpPool
from distattn.kernels.attention import Biases, Pages, accumulator_dtype, attention_forward
from distattn.kernels.decode import Source, decode_attention
from distattn.kernels.rows import gate, store_rows
from distattn.kernels.selected import AnyTable, SelectedTable
from distattn.kernels.table import TileTable
from distattn.kernels.uploads import upload
from distattn.levels import OnDevices, bring
from distattn.outlook import Outlook
from distattn.paged import Line, Tiles
from distattn.pages import Written
from distattn.policies import HeaviestPages, page_logs
from distattn.routes import Part, Routes, rows_of
from distattn.spans import Ints
from distattn.spec import AttentionSpec
from distattn.tiles import assemble

if TYPE_CHECKING:
    from distattn.cache import Cache


@dataclass(frozen=True, eq=False)
class _Group:
    """What layers of one spec share in a step.

    outlook: that of the spec. choosing: the tiles that choose. asking: these by sequence. table: of tokens. summaries:
    of summaries, where these follow from positions alone; else buffers: int32 [tiles that choose], the page with which
    the summaries of their sequence begin. blind: int64, rows of this rank's query tiles that attend to tokens alone;
    None if there is none.
    """

    outlook: Outlook
    tiles: Tiles
    routes: Routes
    table: TileTable
    choosing: Tiles | None = None
    asking: tuple[Asking, ...] = ()
    summaries: TileTable | None = None
    buffers: Tensor | None = None
    blind: Tensor | None = None


class Step:
    """New tokens of some sequences, one after the other: made by ``Cache.begin``.

    Attributes:
        counts: how many new tokens, by sequence, in the order of the rows.
        rows: of all ranks.
        mine: (first, stop), those that this rank computes.
        positions: int64 tensor, of these.
    """

    def __init__(self, cache: Cache, counts: Mapping[int, int], start: Ints, stay: Written) -> None:
        self.cache, self.counts, self.start = cache, dict(counts), start
        self.count = np.fromiter(counts.values(), np.int64)
        self.rows = int(self.count.sum())
        self._stay = stay
        self.mine = rows_of(cache.rank, cache.world_size, self.rows)
        said = repr((list(counts.items()), start.tolist())).encode()
        name = hashlib.blake2b(said, digest_size=4).hexdigest()
        self._exchange = Exchange(cache.group_name, cache.rank, operators.sent, name)
        self._observed: dict[int, tuple[Ints, list[Tensor]]] = {}
        self._chosen: dict[int, tuple[AnyTable | None, AnyTable]] = {}
        self._small: dict[int, tuple[Tensor, Tensor]] = {}
        few = bool(self.count.max() <= FEW)
        self._groups = [self._group(outlook) for outlook in cache.outlooks[few]]

    @cached_property
    def positions(self) -> Tensor:
        at = sp.concat_ranges(self.start, self.count)
        return torch.from_numpy(at[slice(*self.mine)])

    def home(self, row: int) -> int:
        """The rank that computes a row."""
        return row * self.cache.world_size // self.rows

    def last_rows(self) -> dict[int, int]:
        """By sequence, its last new row."""
        return dict(zip(self.counts, (self.count.cumsum() - 1).tolist(), strict=True))

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        extras: AttentionExtras | None = None,
        choice_of: int | None = None,
    ) -> Tensor:
        """Attention of this rank's new rows to the cache and to each other; their keys and values are kept.

        All ranks call it, once for each layer.

        Args:
            q: [1, rows, heads, head_dim] of this rank's rows, in the cache's dtype. k, v: [1, rows, kv_heads, dim].
            scale: factor of the scores; default ``head_dim ** -0.5``.
            extras: what the spec needs beside these, as in :func:`attend`.
            choice_of: an earlier layer, of the same spec, whose chosen chunks this one takes over; None: its own.

        Returns:
            out [1, rows of this rank, heads, value_dim], in the dtype of q.

        Raises:
            ConfigError: a shape or a dtype is not what the cache has, or the extras are not those that the spec needs.
            PeerLost, StepTimeout, PlanMismatch: as every exchange.
        """
        cache = self.cache
        scale = cache.head_dim**-0.5 if scale is None else scale
        spec, extras = cache.specs[layer], extras or AttentionExtras()
        self._check(q, k, v, spec, extras)
        group = self._groups[cache.kind_of[layer]]
        plain = k if extras.pool_keys is None else extras.pool_keys
        asks, (slots, kept_k, kept_v), everyone = group.routes.go(q[0], k[0], v[0], plain[0])
        pool_k, pool_v = cache.k[layer], cache.v[layer]
        store_rows((pool_k, pool_v), slots, (kept_k, kept_v))
        sources = [Source(pool_k, pool_v, group.table)]
        if isinstance(cache.keep, HeaviestPages):
            self._observe(layer, group, asks, cache.keep.observed, scale)
        if everyone is not None:
            sources += self._beside_tokens(layer, group, everyone, extras, scale, choice_of)
        gated = spec.merge == "gate"
        softmaxes = [[source] for source in sources] if gated else [sources]
        dtype = q.dtype if group.routes.stays_here else accumulator_dtype(q.dtype)
        parts = [attend_tiles(asks, some, scale, dtype, group.blind) for some in softmaxes]
        merged = [out.to(q.dtype).unsqueeze(0) for out, _ in group.routes.come_back(parts, q.shape[1])]
        if not gated:
            return merged[0]
        assert extras.gates is not None  # it was checked
        return gate(merged, extras.gates)

    def _beside_tokens(
        self,
        layer: int,
        group: _Group,
        everyone: tuple[Tensor, ...],
        extras: AttentionExtras,
        scale: float,
        choice_of: int | None,
    ) -> list[Source]:
        """This rank's pages of summaries, and its pages of chosen chunks, after what is new was pooled.

        everyone: queries, and what is pooled, of all new rows.
        """
        cache, levels = self.cache, self.cache.levels[layer]
        assert levels is not None
        chosen: list[Tensor] = []
        for number, rows in enumerate(zip(*(x.split(self.count.tolist()) for x in everyone), strict=True)):
            slot, start = int(self._slots[number]), int(self.start[number])
            levels.pool(slot, start, rows[1], rows[2], extras)
            if group.asking and choice_of is None:
                chosen.append(levels.choose(slot, group.asking[number], rows[0], extras, scale))
        of_summaries: AnyTable | None = group.summaries
        of_tokens: AnyTable | None = None
        if chosen:
            choice = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)
            self._chosen[layer] = self._tables_of(group, choice)
        source = layer if choice_of is None else choice_of
        if source in self._chosen:
            of_summaries, of_tokens = self._chosen[source]
        sources: list[Source] = []
        if of_summaries is not None:
            assert isinstance(levels, CachedLevels)
            sources.append(Source(levels.k, levels.v, of_summaries, levels.bias))
        if of_tokens is not None:
            sources.append(Source(cache.k[layer], cache.v[layer], of_tokens))
        return sources

    def _tables_of(self, group: _Group, choice: Tensor) -> tuple[AnyTable | None, AnyTable]:
        """What is visited of summaries, and of tokens, where this was chosen: int32 [tables, tiles, n]. The same in all
        layers that choose it, whose pages lie alike."""
        plan, tiles = group.outlook.plan, group.choosing
        assert plan is not None and tiles is not None
        summaries: AnyTable | None = group.summaries
        if group.buffers is not None:
            summaries = plan.summary_table(choice, tiles, group.buffers)
        own = self.cache.tables.blocks * self.cache.block_k // plan.sub_page
        return summaries, plan.chosen_table(choice, tiles, *self._sub_pages(plan.sub_page), own)

    def _observe(self, layer: int, group: _Group, q: Tensor, observed: int, scale: float) -> None:
        """Keeps what the scores of this rank's pages sum up to, for the last new rows of each sequence."""
        cache, (first, owner, block) = self.cache, self._line
        patterns = [group.outlook.patterns[number] for number in group.outlook.head_table]
        for number, stop in enumerate(self.count.cumsum().tolist()):
            rows = np.arange(stop - min(int(self.count[number]), observed), stop)
            mine = np.flatnonzero(owner[first[number] : first[number + 1]] == cache.rank)
            asked = group.routes.asked[rows, cache.rank]
            logs = q.new_full((len(rows), cache.heads, len(mine)), -torch.inf, dtype=accumulator_dtype(q.dtype))
            at = self.start[number] + self.count[number] - stop + rows[asked]
            place = torch.from_numpy(group.routes.place[rows[asked]]).to(q.device)
            blocks = block[first[number] : first[number + 1]][mine]
            there = page_logs(q[place], at, cache.k[layer], mine, blocks, cache.block_k, patterns, scale)
            logs[torch.from_numpy(asked).to(q.device)] = there
            self._observed.setdefault(number, (mine, []))[1].append(logs)

    def _weigh(self) -> None:
        """Adds the attention that was paid to pages to their masses: in two exchanges, whatever was observed."""
        cache = self.cache
        logs = {number: torch.stack(layers) for number, (_, layers) in self._observed.items()}
        totals = torch.cat([x.logsumexp(-1).flatten() for x in logs.values()])
        if cache.group_name is not None:
            counts = [len(totals)] * cache.world_size
            totals = torch.stack(gather_rows(totals, counts, cache.group_name)).logsumexp(0)
        at, weights = 0, []
        for number, x in logs.items():
            base = totals[at : (at := at + x[..., 0].numel())].view(x.shape[:-1])
            base = base.masked_fill(base == -torch.inf, 0.0)  # a query that attends to nothing
            found = x.new_zeros(-(-(int(self.start[number] + self.count[number])) // cache.block_k))
            found[torch.from_numpy(self._observed[number][0]).to(x.device)] = (x - base[..., None]).exp().sum((0, 1, 2))
            weights.append(found)
        every = torch.cat(weights)
        if cache.group_name is not None:  # each page is one rank's, so that no order of summing matters
            every = torch.stack(gather_rows(every, [len(every)] * cache.world_size, cache.group_name)).sum(0)
        for sequence, mass in zip(self.counts, every.double().cpu().split([len(x) for x in weights]), strict=True):
            before = cache.mass.get(sequence, np.zeros(0))
            cache.mass[sequence] = mass.numpy() + np.pad(before, (0, len(mass) - len(before)))

    def end(self) -> None:
        """After the last layer: lets go what no later query visits."""
        if self._observed:
            self._weigh()
        for sequence, start, count in zip(self.counts, self.start.tolist(), self.count.tolist(), strict=True):
            if (start + count) // self.cache.block_k > start // self.cache.block_k:
                self.cache.release(sequence)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> None:
        cache, rows = self.cache, self.mine[1] - self.mine[0]
        keys = 1, rows, cache.kv_heads, cache.head_dim
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
            "q": (q, (1, rows, cache.heads, cache.head_dim)),
            "k": (k, keys),
            "v": (v, (1, rows, cache.kv_heads, cache.value_dim)),
        }
        sources = 1 + bool(spec.summaries) + (spec.select is not None)
        gates = (1, rows, cache.heads, sources) if spec.merge == "gate" else None
        learned = any(level.bias == "learned" for level in spec.summaries)
        wanted["extras.gates"] = extras.gates, gates
        wanted["extras.key_bias"] = extras.key_bias, (len(spec.summaries), cache.kv_heads) if learned else None
        if extras.pool_keys is not None:
            wanted["extras.pool_keys"] = extras.pool_keys, keys
        why = None
        for name, (x, shape) in wanted.items():
            found = None if x is None else tuple(x.shape)
            if found != shape or (x is not None and name in "qkv" and x.dtype != cache.dtype):
                dtype = None if x is None else x.dtype
                why = why or f"{name} is {dtype} {found}; expected {cache.dtype} {shape} on rank {cache.rank}"
        kinds = {"mean": type(None), "attention": AttentionPool, "mlp": MlpPool}
        for number, level in enumerate(spec.summaries):
            pool = extras.pool[number] if number < len(extras.pool) else None
            if not isinstance(pool, kinds[level.pool]):
                kind = kinds[level.pool].__name__
                why = (
                    why or f"extras.pool[{number}] is {type(pool).__name__}; expected {kind}, as pool is {level.pool!r}"
                )
        if why is not None:
            if cache.group_name is not None:
                operators.refuse_in(cache.group_name, why)
            raise ConfigError(why)

    @cached_property
    def _line(self) -> Line:
        found = [self.cache.tables.pages(sequence) for sequence in self.counts]
        first = np.cumsum([0, *(len(owner) for owner, _ in found)])
        owner, block = (np.concatenate(x).astype(np.int64) for x in zip(*found, strict=True))
        return Line(first, owner, block)

    @cached_property
    def _slots(self) -> Ints:
        """int64 [sequences]: which buffers of summaries are theirs."""
        return np.asarray([self.cache.slot_of[sequence] for sequence in self.counts])

    def _sub_pages(self, rows: int) -> tuple[Tensor, Tensor]:
        """Where pages of so many rows of all sequences are on this rank, or -1; where each sequence's begin."""
        if rows not in self._small:
            first, owner, block = self._line
            pieces = self.cache.block_k // rows
            at = block[:, None] * pieces + np.arange(pieces)
            at[owner != self.cache.rank] = -1
            pages, begin = upload([at.ravel(), first * pieces], self.cache.device)
            self._small[rows] = pages, begin
        return self._small[rows]

    def _group(self, outlook: Outlook) -> _Group:
        cache, plan, everywhere = self.cache, outlook.plan, outlook.everywhere
        tiles = outlook.tiles(self.start, self.count)
        seen = outlook.seen(self.start, self.count, tiles)
        visits = [self._line.moved(one, tiles) for one in seen.tokens]
        # One rank has every query, whether it finds a page or not.
        asked = np.full((len(tiles), cache.world_size), everywhere or cache.world_size == 1)
        if not asked.all():
            asked |= np.logical_or.reduce([self._line.asked(one, cache.world_size) for one in visits])
        routes = Routes(self._exchange, self.rows, self._stay, tiles, asked, everywhere, cache.device)
        mine, extents = asked[:, cache.rank], self._line.of_rank(cache.rank)
        if not mine.all():
            visits = [one.rows(np.flatnonzero(mine)) for one in visits]
        parts, blocks = [[(one, extents)] for one in visits], (tiles.block, cache.block_k)
        table = assemble(parts, outlook.head_table, int(mine.sum()), blocks, cache.tables.blocks, 0, keep_masks=True)
        group = _Group(outlook, tiles, routes, table)
        if plan is None:
            return group
        (summaries,) = [plan.visited_table(one, tiles, self._slots) for one in seen.summaries] or (None,)
        blind = plan.blind(tiles)
        (on_device,) = upload([blind], cache.device) if len(blind) else (None,)
        group = replace(group, summaries=summaries, blind=on_device)
        return group if plan.spec.select is None else self._choosing(group, plan)

    def _choosing(self, group: _Group, plan: LevelPlan) -> _Group:
        """The group with the tiles that choose, and all that is needed of them on the device."""
        choosing = plan.choice_tiles(group.tiles, self.start + self.count)
        of = [choosing.first[choosing.sequence == number] for number in range(len(self.start))]
        asking = tuple(plan.asking(start, one) for start, one in zip(self.start.tolist(), of, strict=True))
        wanted: list[tuple[OnDevices, str]] = [(choosing, "sequence"), (choosing, "first")]
        wanted += [(one, name) for one in asking for name in ("own", "until")]
        others: list[Ints] = []
        if plan.spec.summaries and group.summaries is None:
            wanted.append((choosing, "positions"))
            others.append(self._slots[choosing.sequence] * plan.hierarchy.ladder.pages)
        (buffers,) = bring(self.cache.device, wanted, [x.astype(np.int32) for x in others]) or (None,)
        return replace(group, choosing=choosing, asking=asking, buffers=buffers)


def attend_tiles(
    q: Tensor, sources: Sequence[Source], scale: float, dtype: torch.dtype, blind: Tensor | None = None
) -> Part:
    """(out [rows, heads, value_dim] in a dtype, lse [rows, heads]) of query tiles: one softmax over all sources.

    q: [rows, heads, head_dim]. sources: all of tiles of one query, or none. blind: int64, rows that attend to the first
    source alone.
    """
    first, *more = sources
    if first.table.block_q == 1:
        part = decode_attention(q, sources, scale=scale, dtype=dtype)
        if more and blind is not None:
            alone = decode_attention(q, [first], scale=scale, dtype=dtype)
            part[0][blind], part[1][blind] = alone[0][blind], alone[1][blind]
        return part
    wide = accumulator_dtype(q.dtype)
    out = q.new_empty((q.shape[0], q.shape[1], first.v.shape[2]), dtype=wide if more else dtype)
    lse = q.new_empty(out.shape[:2], dtype=wide)
    if isinstance(first.table, SelectedTable) or first.table.has_empty_rows:  # rows that visit nothing are left alone
        out.zero_()
        lse.fill_(-torch.inf)
    _attend_pages(q, first, out, lse, scale)
    seen = None if blind is None else (out[blind], lse[blind])
    for number, source in enumerate(more):
        before, last = out, number + 1 == len(more)
        out = before if not last or dtype == wide else q.new_empty(before.shape, dtype=dtype)
        _attend_pages(q, source, out, lse, scale, before)
    if seen is not None:
        out[blind], lse[blind] = seen[0].to(dtype), seen[1]
    return out, lse


def _attend_pages(
    q: Tensor, source: Source, out: Tensor, lse: Tensor, scale: float, before: Tensor | None = None
) -> None:
    """Writes out and lse of query tiles; with ``before``, under one softmax with that and what lse is."""
    k, v, table, bias = source
    own, nothing = Pages(k.unsqueeze(0), v.unsqueeze(0)), Pages(k[:0].unsqueeze(0), v[:0].unsqueeze(0))
    biases = None if bias is None else Biases(bias.unsqueeze(0), bias[:0].unsqueeze(0))
    outs = out.unsqueeze(0)
    so_far = outs if before is out else None if before is None else before.unsqueeze(0)
    attention_forward(
        q.unsqueeze(0), own, nothing, table, outs, lse.unsqueeze(0), scale=scale, before=so_far, bias=biases
    )

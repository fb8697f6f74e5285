"""A spec, a sequence and a mesh become a plan: what one rank computes, sends and receives.

Planning is pure. It needs no process group, so that a laptop can plan for a thousand ranks, and it looks at the whole
sequence, so that all ranks come to the same answer without talking.

A rank runs a plan in stages. A stage brings pages of other ranks into the arena's guest buffer and then runs the query
tiles that need them. Schedule ``direct`` has one stage: every guest page lies in the arena at once, and each query
tile runs once. Schedule ``ring`` has as many stages as ranks: in stage s the rank holds what it needs of rank - s, in
one of two slots, while the next stage's pages travel; its output is kept in float32 between stages. Only pages that
some query of the receiver visits travel, in either. (Ring attention as published forwards whole shards from neighbour
to neighbour. Fetching from the owner moves no more, and for causal attention half.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from distattn import __version__
from distattn import spans as sp
from distattn.algebra import Pattern
from distattn.cost import Machine, Work, step_time
from distattn.errors import ConfigError
from distattn.kernels.table import TileTable
from distattn.layout import LAYOUTS, Layout, make_layout
from distattn.messages import Message, Transfer, join_runs
from distattn.sharing import Sharing, find_sharing
from distattn.spans import Spans
from distattn.spec import AttentionSpec
from distattn.tiles import Axis, Extents, Visits, assemble, union_rows, visit

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

Ints = NDArray[np.int64]
SCHEDULES = ("direct", "ring")
# A direct plan holds all guest pages at once; above this many times the rank's own rows, a ring is chosen instead.
MAX_DIRECT_GUESTS = 2.0
_NONE = np.zeros(0, np.int64)

# A custom operator takes tensors, numbers and text, so it finds its plan here by name. Plans live as long as they
# are used.
plans: WeakValueDictionary[str, Plan] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Stage:
    """One exchange and the tiles that it completes.

    transfers: what to bring into the guest buffer, of ``guest_rows`` rows.
    table: what the rank's query tiles visit in this stage.
    """

    transfers: tuple[Transfer, ...]
    guest_rows: int
    table: TileTable


@dataclass(frozen=True, eq=False)
class GuestQueries:
    """Global query rows, which every rank attends with over the pages that it owns.

    positions: int64 [n], ascending: all of them.
    mine: int64 [m]: those that this rank owns, as rows of its own tokens.
    transfer: brings all rows' queries; its reverse takes partial results home.
    table: what the gathered rows visit among this rank's own pages.
    """

    positions: Ints
    mine: Ints
    transfer: Transfer
    table: TileTable


@dataclass(frozen=True, eq=False)
class Outline:
    """What does not depend on the layout: the visits of the whole sequence, by distinct pattern.

    sharing: what was taken out. main: Visits of all query tiles and pages, by distinct main pattern.
    gathered: Visits of all query tiles and gathered pages, by distinct pattern. whole: Visits of guest queries.
    table_of: by head, its distinct pattern.
    """

    sharing: Sharing
    main: tuple[Visits, ...]
    gathered: tuple[Visits, ...]
    whole: tuple[Visits, ...]
    table_of: tuple[int, ...]
    grid_q: Axis
    grid_k: Axis
    guest_q: Axis
    tiles: Ints
    pairs: Ints
    guest_pairs: Ints


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank does. Made by :func:`make_plan`, immutable, reused by every layer and step.

    Attributes:
        tokens: rows that this rank owns; may differ by a unit of the layout between ranks.
        segments: ((first, stop), ...) positions that this rank owns, ascending.
        positions: int64 tensor [tokens].
        key: a digest of everything that determines the plan except the rank; equal on all ranks.
        group_name: the process group that exchanges go through, None for one rank or a plan on paper.
    """

    spec: AttentionSpec
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    world_size: int
    rank: int
    group_name: str | None
    layout: Layout
    schedule: str
    block_q: int
    block_k: int
    outline: Outline
    tokens: int
    key: str

    @property
    def name(self) -> str:
        """The name under which operators find the plan."""
        return f"{self.key}/{self.rank}/{self.group_name}"

    @cached_property
    def _arena(self) -> _ArenaBuilder:
        return _ArenaBuilder(self.outline, self.layout, self.kv_heads, self.rank)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What the rank does, in order. Made when first asked for: a plan on paper need not."""
        return self._arena.stages(self.schedule)

    @cached_property
    def guest_queries(self) -> GuestQueries | None:
        """The global queries of all ranks, or None."""
        return self._arena.guest_queries()

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        return self.layout.segments(self.rank)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [tokens]: the position of each local row."""
        runs = [torch.arange(first, stop) for first, stop in self.segments]
        return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64)

    def shard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's rows of a full tensor.

        Args:
            x: any tensor with ``seq_len`` rows along ``dim``.
        """
        if x.shape[dim] != self.seq_len:
            raise ConfigError(f"x has {x.shape[dim]} rows along dim {dim}, the plan is for seq_len {self.seq_len}")
        parts = [x.narrow(dim, first, stop - first) for first, stop in self.segments]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def unshard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The full tensor, on every rank, from the ranks' rows. A collective, for small tensors and checks."""
        if x.shape[dim] != self.tokens:
            raise ConfigError(f"x has {x.shape[dim]} rows along dim {dim}, this rank owns {self.tokens} tokens")
        if self.world_size == 1:
            return x
        from distattn.exchange import gather_rows

        parts = gather_rows(x.movedim(dim, 0), self.layout.tokens().tolist(), self.group_name)
        full = x.new_empty((self.seq_len, *parts[0].shape[1:]))
        for rank, part in enumerate(parts):
            at = 0
            for first, stop in self.layout.segments(rank):
                full[first:stop] = part[at : at + stop - first]
                at += stop - first
        return full.movedim(0, dim)

    def sent_bytes(self, itemsize: int, batch: int = 1) -> int:
        """Bytes that this rank sends in a forward pass, with inputs of ``itemsize`` bytes an element."""
        row = itemsize * (self.head_dim + self.value_dim)
        sent = sum(t.sent_bytes(row, self.rank, self.world_size) for s in self.stages for t in s.transfers)
        if self.guest_queries is not None:
            transfer, wide = self.guest_queries.transfer, 8 if itemsize == 8 else 4
            sent += transfer.sent_bytes(itemsize * self.head_dim, self.rank, self.world_size)
            sent += transfer.returned_bytes(wide * (self.value_dim + 1), self.rank)
        return sent * batch

    def sent_bytes_backward(self, itemsize: int, batch: int = 1) -> int:
        """Bytes that this rank sends in a backward pass: gradients go home in float32 (float64 for float64)."""
        wide = 8 if itemsize == 8 else 4
        row = self.head_dim + self.value_dim
        transfers = [t for s in self.stages for t in s.transfers]
        sent = sum(t.returned_bytes(wide * row, self.rank) for t in transfers)
        if len(self.stages) > 1:
            # A ring does not keep its guests: it brings them again.
            sent += sum(t.sent_bytes(itemsize * row, self.rank, self.world_size) for t in transfers)
        if self.guest_queries is not None:
            transfer = self.guest_queries.transfer
            sent += transfer.sent_bytes(itemsize * self.value_dim + wide * 2, self.rank, self.world_size)
            sent += transfer.returned_bytes(wide * self.head_dim, self.rank)
        return sent * batch

    def work(self, itemsize: int = 2) -> list[Work]:
        """What each rank computes, sends and receives in a forward pass, with elements of ``itemsize`` bytes."""
        return rank_work(self.outline, self.layout, self.kv_heads, self.head_dim, self.value_dim, itemsize)

    def explain(self, itemsize: int = 2, machine: Machine | None = None) -> str:
        """A table of what every rank computes, sends and holds, and a prediction of the time.

        Args:
            itemsize: bytes of an element of q, k and v.
            machine: speeds to predict with; default: an H100.
        """
        from distattn.explain import explain

        return explain(self, itemsize, machine or Machine.h100())

    def picture(self, path: str | Path) -> Path:
        """Writes a PNG of the pattern, its tiles and the ranks that own them. Needs matplotlib."""
        from distattn.pictures import draw_plan

        return draw_plan(self, path)

    def __repr__(self) -> str:
        return (
            f"Plan({self.spec!r}, seq_len={self.seq_len}, heads={self.heads}/{self.kv_heads}, rank {self.rank} of "
            f"{self.world_size}, {self.layout.name}, {self.schedule})"
        )


def make_plan(
    spec: AttentionSpec,
    seq_len: int,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    value_dim: int | None = None,
    mesh: DeviceMesh | None = None,
    world_size: int | None = None,
    rank: int | None = None,
    layout: str | Layout = "auto",
    schedule: str = "auto",
    block_q: int = 128,
    block_k: int = 128,
) -> Plan:
    """Plans attention by ``spec`` over ``seq_len`` tokens. Plans are cached by value.

    Args:
        heads, kv_heads: query heads, and key/value heads that divide them (default: as many).
        head_dim, value_dim: of queries and keys, and of values (default: the same).
        mesh: a one-dimensional DeviceMesh, the ranks that share the sequence. None: one rank, or with ``world_size``
            and ``rank`` a plan on paper, which explains but does not run.
        layout: who owns which tokens: one of ``layout.LAYOUTS``, or auto: the cheapest by the cost model; or the layout
            of another plan, which this one must share if the same tensors go through both.
        schedule: direct, ring, or auto: direct where the guest pages fit (see MAX_DIRECT_GUESTS).
        block_q, block_k: rows of a query tile and of a page.

    Raises:
        ConfigError: (a ValueError) an argument, or a combination of them, that cannot work.
    """
    group_name = None
    if mesh is not None:
        if mesh.ndim != 1:
            raise ConfigError(f"mesh has {mesh.ndim} dimensions; expected one: take mesh['name'] of a larger one")
        if world_size is not None or rank is not None:
            raise ConfigError("give mesh, or world_size and rank, not both")
        world_size, rank = mesh.size(), mesh.get_local_rank()
        group_name = mesh.get_group().group_name if world_size > 1 else None
    if not isinstance(spec, AttentionSpec):
        raise ConfigError(f"spec is {spec!r}; expected an AttentionSpec")
    numbers = {
        "seq_len": seq_len,
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "value_dim": head_dim if value_dim is None else value_dim,
        "world_size": 1 if world_size is None else world_size,
        "block_q": block_q,
        "block_k": block_k,
    }
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r}; expected a positive integer")
    rank = 0 if rank is None else rank
    if not isinstance(rank, int) or not 0 <= rank < numbers["world_size"]:
        raise ConfigError(f"rank is {rank!r}; expected 0 to {numbers['world_size'] - 1}")
    if numbers["heads"] % numbers["kv_heads"]:
        raise ConfigError(f"heads is {heads}, which kv_heads {kv_heads} does not divide")
    if block_q % block_k and block_k % block_q:
        raise ConfigError(f"block_q is {block_q} and block_k is {block_k}; expected one to divide the other")
    if isinstance(layout, Layout):
        unit = max(block_q, block_k)
        if (layout.seq_len, layout.world_size) != (seq_len, numbers["world_size"]) or layout.unit % unit:
            raise ConfigError(
                f"layout is for {layout.seq_len} tokens on {layout.world_size} ranks in units of "
                f"{layout.unit}; expected {seq_len} on {numbers['world_size']} in a multiple of {unit}"
            )
    elif layout not in (*LAYOUTS, "auto"):
        raise ConfigError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}, auto, or a Layout")
    if schedule not in (*SCHEDULES, "auto"):
        raise ConfigError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}, auto")
    return _plan(spec, tuple(numbers.items()), rank, layout, schedule, group_name)


@lru_cache(maxsize=64)
def _plan(
    spec: AttentionSpec,
    numbers: tuple[tuple[str, int], ...],
    rank: int,
    layout: str | Layout,
    schedule: str,
    group_name: str | None,
) -> Plan:
    n: dict[str, Any] = dict(numbers)
    world_size, blocks = n["world_size"], (n["block_q"], n["block_k"])
    outline = make_outline(spec.tokens.by_head(n["heads"]), n["seq_len"], blocks, world_size)
    if not isinstance(layout, Layout):
        layout = _choose_layout(layout, outline, n)
    if schedule == "auto":
        owned = np.maximum(_count(_owned_pages(layout, blocks[1])), 1)
        most = max(float((_count(guests) / owned).max()) for _, guests in guest_pages(outline, layout, n["kv_heads"]))
        schedule = "ring" if most > MAX_DIRECT_GUESTS else "direct"
    said = repr((spec, numbers, schedule, __version__)).encode() + layout.start.tobytes() + layout.owner.tobytes()
    digest = hashlib.blake2b(said, digest_size=16).hexdigest()
    plan = Plan(
        spec=spec,
        seq_len=n["seq_len"],
        heads=n["heads"],
        kv_heads=n["kv_heads"],
        head_dim=n["head_dim"],
        value_dim=n["value_dim"],
        world_size=world_size,
        rank=rank,
        group_name=group_name,
        layout=layout,
        schedule=schedule,
        block_q=blocks[0],
        block_k=blocks[1],
        outline=outline,
        tokens=int(layout.tokens()[rank]),
        key=digest,
    )
    plans[plan.name] = plan
    return plan


@lru_cache(maxsize=16)
def make_outline(patterns: tuple[Pattern, ...], length: int, blocks: tuple[int, int], world_size: int) -> Outline:
    """Sorts the tiles of the whole sequence, for every distinct pattern among the heads."""
    sharing = find_sharing(patterns, length, blocks, world_size)
    distinct = list(dict.fromkeys(patterns))
    sample = [patterns.index(pattern) for pattern in distinct]
    table_of = tuple(distinct.index(pattern) for pattern in patterns)
    grid_q, grid_k = Axis.grid(length, blocks[0], sharing.queries), Axis.grid(length, blocks[1], sharing.keys)
    gathered_k = Axis(length, blocks[1], gathered=sharing.keys)
    guest_q = Axis(length, blocks[0], gathered=sharing.queries)
    all_k = Axis.grid(length, blocks[1])
    main = tuple(visit(sharing.main[i], grid_q, grid_k) for i in sample)
    gathered = tuple(visit(sharing.gathered[i], grid_q, gathered_k) for i in sample) if len(sharing.keys) else ()
    whole = tuple(visit(sharing.whole[i], guest_q, all_k) for i in sample) if len(sharing.queries) else ()
    share = np.bincount(table_of, minlength=len(distinct))
    tiles = sum((n * v.tiles for part in (main, gathered) for n, v in zip(share, part, strict=False)), np.int64(0))
    pairs = sum(
        (n * v.pairs(grid_q, blocks[1]) for part in (main, gathered) for n, v in zip(share, part, strict=False)),
        np.int64(0),
    )
    guest_pairs = sum((n * v.pairs(guest_q, blocks[1]) for n, v in zip(share, whole, strict=False)), np.int64(0))
    return Outline(
        sharing,
        main,
        gathered,
        whole,
        table_of,
        grid_q,
        grid_k,
        guest_q,
        np.atleast_1d(tiles),
        np.atleast_1d(pairs),
        np.atleast_1d(guest_pairs),
    )


def _choose_layout(name: str, outline: Outline, n: dict[str, Any]) -> Layout:
    unit = max(n["block_q"], n["block_k"])
    per_unit = unit // n["block_q"]
    padded = np.zeros(-(-len(outline.tiles) // per_unit) * per_unit, np.int64)
    padded[: len(outline.tiles)] = outline.tiles
    work = padded.reshape(-1, per_unit).sum(axis=1)
    if name != "auto":
        return make_layout(name, n["seq_len"], n["world_size"], unit, work)
    if n["world_size"] == 1:
        return make_layout("contiguous", n["seq_len"], 1, unit)
    sizes = n["kv_heads"], n["head_dim"], n["value_dim"]
    best: tuple[float, Layout] | None = None
    for candidate in LAYOUTS:
        layout = make_layout(candidate, n["seq_len"], n["world_size"], unit, work)
        time = max(step_time(Machine.h100(), part).total for part in rank_work(outline, layout, *sizes, itemsize=2))
        # Layouts come in the order of preference: a later one must be better, not equal.
        if best is None or time < best[0] * 0.99:
            best = (time, layout)
    assert best is not None
    return best[1]


def rank_work(
    outline: Outline, layout: Layout, kv_heads: int, head_dim: int, value_dim: int, itemsize: int
) -> list[Work]:
    """What each rank computes, sends and receives in a forward pass of a batch of one."""
    world_size, heads = layout.world_size, len(outline.table_of)
    tile_owner, page_owner = layout.owners(outline.grid_q.block), layout.owners(outline.grid_k.block)
    share = layout.tokens() / layout.seq_len
    guest_tiles = sum(int(v.tiles.sum()) * outline.table_of.count(i) for i, v in enumerate(outline.whole))
    tiles = np.bincount(tile_owner, outline.tiles, world_size) + guest_tiles * share
    pairs = np.bincount(tile_owner, outline.pairs, world_size) + float(outline.guest_pairs.sum()) * share
    sent, received, guest_rows = np.zeros((3, world_size))
    row_bytes = itemsize * (head_dim + value_dim)
    for group, guests in guest_pages(outline, layout, kv_heads):
        page_bytes = len(group) * outline.grid_k.block * row_bytes
        received += _count(guests) * page_bytes
        guest_rows = np.maximum(guest_rows, _count(guests) * outline.grid_k.block)
        # How many ranks need each page, from the ends of the intervals: linear in intervals and pages.
        begin = np.bincount(guests.start, minlength=len(page_owner) + 1)
        needed = np.cumsum(begin - np.bincount(guests.stop, minlength=len(page_owner) + 1))[:-1]
        sent += np.bincount(page_owner, needed, world_size) * page_bytes
    if world_size > 1:
        keys, queries = outline.sharing.keys, outline.sharing.queries
        for positions, there, back in (
            (keys, kv_heads * row_bytes, 0),
            (queries, heads * itemsize * head_dim, heads * 4 * (value_dim + 1)),
        ):
            owned = np.bincount(layout.owner_of(positions), minlength=world_size)
            others = len(positions) - owned
            sent += owned * (world_size - 1) * there + others * back
            received += others * there + owned * (world_size - 1) * back
    guest_rows += len(outline.sharing.keys)
    tile_flops = 2 * outline.grid_q.block * outline.grid_k.block * (head_dim + value_dim)
    return [
        Work(
            tiles=float(tiles[r]),
            pairs=float(pairs[r]),
            flops=float(tiles[r]) * tile_flops,
            bytes_sent=float(sent[r]),
            bytes_received=float(received[r]),
            guest_rows=float(guest_rows[r]),
        )
        for r in range(world_size)
    ]


def _kv_groups(table_of: Sequence[int], kv_heads: int) -> list[tuple[int, ...]]:
    """Key/value heads whose query heads have the same patterns: they need the same pages."""
    share = len(table_of) // kv_heads
    groups: dict[frozenset[int], list[int]] = {}
    for head in range(kv_heads):
        groups.setdefault(frozenset(table_of[head * share : (head + 1) * share]), []).append(head)
    return [tuple(heads) for heads in groups.values()]


def guest_pages(outline: Outline, layout: Layout, kv_heads: int) -> list[tuple[tuple[int, ...], Spans]]:
    """By group of key/value heads, the pages that each rank visits and does not own. A row for each rank."""
    share = len(outline.table_of) // kv_heads
    tile_owner = layout.owners(outline.grid_q.block)
    absent = sp.complement(_owned_pages(layout, outline.grid_k.block), outline.grid_k.blocks)
    out = []
    for heads in _kv_groups(outline.table_of, kv_heads):
        need = sp.empty(layout.world_size)
        for table in sorted({outline.table_of[h * share + i] for h in heads for i in range(share)}):
            visits = outline.main[table]
            single = sp.from_sorted(visits.row, visits.page, visits.page + 1, visits.full.rows)
            for part in (visits.full, single):
                need = sp.union(need, union_rows(part, tile_owner, layout.world_size))
        out.append((heads, sp.intersect(need, absent)))
    return out


def _owned_pages(layout: Layout, block: int) -> Spans:
    """Pages of each rank, a row for each."""
    order = np.lexsort((layout.start, layout.owner))
    return sp.from_sorted(
        layout.owner[order], layout.start[order] // block, -(-layout.stop[order] // block), layout.world_size
    )


def _count(spans: Spans) -> Ints:
    """int64 [rows]: positions in the intervals of each row."""
    return np.bincount(spans.row_of(), spans.stop - spans.start, spans.rows).astype(np.int64)


def _row(spans: Spans, row: int) -> Ints:
    """Every position in the intervals of one row."""
    part = slice(spans.ptr[row], spans.ptr[row + 1])
    return sp.concat_ranges(spans.start[part], spans.stop[part] - spans.start[part])


class _ArenaBuilder:
    """Lays out one rank's arena, stage by stage."""

    def __init__(self, outline: Outline, layout: Layout, kv_heads: int, rank: int) -> None:
        self.outline, self.layout, self.kv_heads, self.rank = outline, layout, kv_heads, rank
        self.blocks = (outline.grid_q.block, outline.grid_k.block)
        self.world_size = layout.world_size
        groups = guest_pages(outline, layout, kv_heads)
        self.kv_groups = [heads for heads, _ in groups]
        self.guests = [guests for _, guests in groups]
        self.page_owner = layout.owners(self.blocks[1])
        self.my_tiles = np.flatnonzero(layout.owners(self.blocks[0]) == rank)
        self.my_pages = np.flatnonzero(self.page_owner == rank)
        self.own = Extents.of(self.my_pages, 0)
        self.heads = len(outline.table_of)
        self.gathered_pages = -(-len(outline.sharing.keys) // self.blocks[1])

    def stages(self, schedule: str) -> tuple[Stage, ...]:
        shared = self._gather(self.outline.sharing.keys, tuple(range(self.kv_heads)))
        everyone = [r for r in range(self.world_size) if r != self.rank]
        if schedule == "direct":
            return (self._stage(everyone, own=True, shared=shared, bulk=True),)
        first = self._stage([], own=True, shared=shared, bulk=False)
        # In stage s this rank receives from the one s before it, and sends to the one s after it.
        rest = [
            self._stage([(self.rank - s) % self.world_size], False, None, False, s) for s in range(1, self.world_size)
        ]
        return (first, *rest)

    def guest_queries(self) -> GuestQueries | None:
        positions = self.outline.sharing.queries
        if not len(positions):
            return None
        transfer = self._gather(positions, tuple(range(self.heads)))
        assert transfer is not None
        parts = [[(visits, self.own)] for visits in self.outline.whole]
        table = assemble(parts, self.outline.table_of, self.outline.guest_q.blocks, self.blocks, len(self.my_pages), 0)
        mine = self._local(positions[self.layout.owner_of(positions) == self.rank])
        return GuestQueries(positions, mine, transfer, table)

    def _stage(
        self, sources: list[int], own: bool, shared: Transfer | None, bulk: bool, distance: int | None = None
    ) -> Stage:
        """The stage in which this rank holds guest pages of ``sources``."""
        base = self.gathered_pages if own else 0
        sends: list[Message] = []
        receives: list[Message] = []
        extents: list[Extents] = []
        guest_pages = base
        for group, guests in zip(self.kv_groups, self.guests, strict=True):
            pages = _row(guests, self.rank)
            pages = pages[np.isin(self.page_owner[pages], sources)]
            guest = Extents.of(pages, len(self.my_pages) + base)
            extents.append(self.own.joined(guest) if own else guest)
            guest_pages = max(guest_pages, base + len(pages))
            for peer in sources:
                which = np.flatnonzero(self.page_owner[pages] == peer)
                if len(which):
                    receives.append(Message(peer, group, self._page_rows(base + which, pages[which])))
            targets = sources if distance is None else [(self.rank + distance) % self.world_size]
            for peer in targets:
                wanted = _row(guests, peer)
                wanted = wanted[self.page_owner[wanted] == self.rank]
                if len(wanted):
                    sends.append(Message(peer, group, self._page_rows(np.searchsorted(self.my_pages, wanted), wanted)))
        sends.sort(key=lambda m: m.peer)
        receives.sort(key=lambda m: m.peer)
        transfers = [] if shared is None or not own else [shared]
        if self.world_size > 1 and (sources or distance is not None):
            transfers.append(Transfer(self._kind(bulk), tuple(sends), tuple(receives)))
        return Stage(tuple(transfers), guest_pages * self.blocks[1], self._table(extents, own, guest_pages))

    def _kind(self, bulk: bool) -> str:
        """Pairs where every rank talks to few others, a collective otherwise; the same answer on all ranks."""
        if not bulk:
            return "neighbours"
        talks = np.zeros((self.world_size, self.world_size), np.bool_) if self.world_size <= 4096 else None
        if talks is None:
            return "all_to_all"
        for guests in self.guests:
            row = guests.row_of()
            first = np.searchsorted(self.layout.stop, guests.start * self.blocks[1], side="right")
            last = np.searchsorted(self.layout.start, guests.stop * self.blocks[1], side="left")
            count = last - first
            talks[np.repeat(row, count), self.layout.owner[sp.concat_ranges(first, count)]] = True
        return "neighbours" if talks.sum(axis=1).max() <= 2 and talks.sum(axis=0).max() <= 2 else "all_to_all"

    def _table(self, extents: list[Extents], own: bool, guest_pages: int) -> TileTable:
        """Tables by (distinct pattern, group of key/value heads), since a group has its own guest pages."""
        share = self.heads // self.kv_heads
        group_of = {head: g for g, heads in enumerate(self.kv_groups) for head in heads}
        pairs = [(table, group_of[h // share]) for h, table in enumerate(self.outline.table_of)]
        distinct = list(dict.fromkeys(pairs))
        mine = [visits.rows(self.my_tiles) for visits in self.outline.main]
        gathered = [visits.rows(self.my_tiles) for visits in self.outline.gathered] if own else []
        at_gathered = Extents.of(np.arange(self.gathered_pages), len(self.my_pages))
        parts = []
        for table, group in distinct:
            part = [(mine[table], extents[group])]
            if gathered:
                part.append((gathered[table], at_gathered))
            parts.append(part)
        return assemble(
            parts,
            [distinct.index(pair) for pair in pairs],
            len(self.my_tiles),
            self.blocks,
            len(self.my_pages),
            guest_pages,
        )

    def _page_rows(self, at: Ints, pages: Ints) -> Ints:
        """Runs of buffer rows of pages that lie at page slots ``at``; the sequence's last page may be short."""
        block = self.blocks[1]
        length = np.minimum(block, self.layout.seq_len - pages * block)
        return join_runs(at * block, at * block + length)

    def _local(self, positions: Ints) -> Ints:
        """Positions that this rank owns, as rows of its own tokens."""
        mine = self.layout.owner == self.rank
        start, size = self.layout.start[mine], (self.layout.stop - self.layout.start)[mine]
        segment = np.searchsorted(start, positions, side="right") - 1
        return (np.cumsum(size) - size)[segment] + positions - start[segment] if len(positions) else _NONE

    def _gather(self, positions: Ints, heads: tuple[int, ...]) -> Transfer | None:
        """Brings rows of scattered positions to every rank, in order, to the front of a buffer."""
        if not len(positions):
            return None
        owner = self.layout.owner_of(positions)
        counts = np.bincount(owner, minlength=self.world_size)
        local = self._local(positions[owner == self.rank])
        send_rows = join_runs(local, local + 1)
        receives = []
        for peer in np.flatnonzero(counts):
            at = np.flatnonzero(owner == peer)
            receives.append(Message(int(peer), heads, join_runs(at, at + 1)))
        # Padding is cheap where ranks hold similarly many rows; otherwise each sends just its own.
        if counts.max() * self.world_size <= 2 * counts.sum():
            return Transfer("all_gather", (Message(self.rank, heads, send_rows),), tuple(receives), int(counts.max()))
        sends = [Message(peer, heads, send_rows) for peer in range(self.world_size)] if len(local) else []
        return Transfer("all_to_all", tuple(sends), tuple(receives))

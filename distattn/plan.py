"""A spec, a sequence and a mesh become a plan: what one rank computes, sends and receives.

Planning is pure. It needs no process group, so that a laptop can plan for a thousand ranks, and it looks at the whole
sequence, so that all ranks come to the same answer without talking.

A rank runs a plan in stages. A stage brings pages of other ranks into the arena's guest buffer and then runs the query
tiles that need them. Schedule ``direct`` has one stage: every guest page lies in the arena at once, and each query
tile runs once. Schedule ``slices`` has a stage for each of several slices of the key/value heads: two slots hold one
slice each, of which one is computed while the other travels, and each query tile still runs once. Schedule ``ring`` has
as many stages as ranks: in stage s the rank holds what it needs of rank - s, in one of two slots; its output is kept in
float32 between stages. In each, only pages that some query of the receiver visits travel. (Ring attention as published
forwards whole shards from neighbour to neighbour. Fetching from the owner moves no more; for causal attention half.)
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from distattn import __version__
from distattn.algebra import Pattern
from distattn.arena import ArenaBuilder, GuestQueries, Stage
from distattn.cost import Work
from distattn.errors import ConfigError
from distattn.hierarchy import Hierarchy
from distattn.layout import LAYOUTS, Layout, make_layout
from distattn.levels import OnDevices
from distattn.machine import Machine
from distattn.outline import Outline, count_rows, guest_pages, make_outline, owned_pages, rank_work
from distattn.patterns import Causal, GlobalQueries
from distattn.prediction import predict_task
from distattn.spans import Bools, Ints
from distattn.spec import AttentionSpec
from distattn.task import Task

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

SCHEDULES = ("direct", "slices", "ring")
# Two slots hold at most this many times the rank's own rows; if slices of heads would need more, a ring is chosen.
MAX_GUESTS = 2.0
# A plan is direct where fewer bytes than this come to a rank, or fewer guests than this share of its own rows, since
# then few tiles need them; a slice has at least half as many bytes, since short messages are slow.
FEW_BYTES, FEW_GUESTS = 128 << 20, 0.5

# The machine for which layouts are chosen: equal on all ranks, whatever they run on.
DEFAULT_MACHINE = "h100"

# A custom operator takes tensors, numbers and text, so it finds its plan here by name. Plans live as long as they
# are used.
plans: WeakValueDictionary[str, Plan] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Plan(OnDevices):
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
    slices: int
    block_q: int
    block_k: int
    outline: Outline
    tokens: int
    key: str

    @property
    def group_names(self) -> tuple[str, ...]:
        """All process groups that exchanges go through."""
        return () if self.group_name is None else (self.group_name,)

    @property
    def name(self) -> str:
        """The name under which operators find the plan."""
        return "/".join((self.key, str(self.rank), *self.group_names))

    @cached_property
    def _arena(self) -> ArenaBuilder:
        return ArenaBuilder(self.outline, self.layout, self.kv_heads, self.rank)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What the rank does, in order. Made when first asked for: a plan on paper need not."""
        return self._arena.stages(self.schedule, self.slices)

    @cached_property
    def guest_queries(self) -> GuestQueries | None:
        """The global queries of all ranks, or None."""
        return self._arena.guest_queries()

    @cached_property
    def hierarchy(self) -> Hierarchy | None:
        """Levels and chunks; None where the spec has a pattern and nothing else."""
        if self.spec.is_static:
            return None
        blocks = self.block_q, self.block_k
        return Hierarchy(self.spec, self.layout, self.heads, self.kv_heads, blocks, self.rank)

    @cached_property
    def correction(self) -> Plan | None:
        """The plan of the dense rows that correct a result; None where nothing is corrected."""
        if self.spec.correction is None:
            return None
        rows = range(0, self.seq_len, self.spec.correction.every)
        last = range(max(self.seq_len - self.spec.correction.every, 0), self.seq_len)
        pattern: Pattern = GlobalQueries(sorted({*rows, *last}))
        numbers = {name: getattr(self, name) for name in ("seq_len", "heads", "kv_heads", "head_dim", "value_dim")}
        numbers |= {name: getattr(self, name) for name in ("world_size", "block_q", "block_k")}
        spec = AttentionSpec(Causal() & pattern if self.spec.causal else pattern)
        return plan_rows(spec, tuple(numbers.items()), self.rank, self.layout, "auto", self.group_name)

    @property
    def corrected_by(self) -> Ints:
        """int64 [tokens]: the local row whose dense result corrects each row; segments begin with such rows."""
        assert self.spec.correction is not None
        return np.asarray(np.arange(self.tokens) - self.positions.numpy() % self.spec.correction.every)

    @property
    def stays_dense(self) -> Bools:
        """bool [tokens]: whether a row's result is the dense one, where others are corrected."""
        assert self.spec.correction is not None
        return self.positions.numpy() >= self.seq_len - self.spec.correction.every

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
        """Bytes that this rank sends in a forward pass, with inputs of ``itemsize`` bytes an element.

        Chunks that are chosen by the data are not among them: what they take is known when they are chosen.
        """
        row = itemsize * (self.head_dim + self.value_dim)
        sent = sum(t.sent_bytes(row, self.rank, self.world_size) for s in self.stages for t in s.transfers)
        if self.guest_queries is not None:
            transfer, wide = self.guest_queries.transfer, max(itemsize, 4)
            sent += transfer.sent_bytes(itemsize * self.head_dim, self.rank, self.world_size)
            sent += transfer.returned_bytes(wide * (self.value_dim + 1), self.rank)
        if self.hierarchy is not None:
            sent += self.hierarchy.sent_bytes(itemsize, self.head_dim, self.value_dim)
        if self.correction is not None:
            sent += self.correction.sent_bytes(itemsize)
        return sent * batch

    def sent_bytes_backward(self, itemsize: int, batch: int = 1) -> int:
        """Bytes that this rank sends in a backward pass: gradients go home in float32 (float64 for float64)."""
        wide = max(itemsize, 4)
        row = self.head_dim + self.value_dim
        transfers = [t for s in self.stages for t in s.transfers]
        sent = sum(t.returned_bytes(wide * row, self.rank) for t in transfers)
        if len(self.stages) > 1:
            # Several stages do not keep their guests: they bring them again.
            sent += sum(t.sent_bytes(itemsize * row, self.rank, self.world_size) for t in transfers)
        if self.guest_queries is not None:
            transfer = self.guest_queries.transfer
            sent += transfer.sent_bytes(itemsize * self.value_dim + wide * 2, self.rank, self.world_size)
            sent += transfer.returned_bytes(wide * self.head_dim, self.rank)
        if self.hierarchy is not None:
            sent += self.hierarchy.sent_bytes_backward(itemsize, self.head_dim, self.value_dim)
        if self.correction is not None:
            sent += self.correction.sent_bytes_backward(itemsize)
        return sent * batch

    def work(self, itemsize: int = 2) -> list[Work]:
        """What each rank computes, sends and receives in a forward pass, with elements of ``itemsize`` bytes."""
        work = rank_work(self.outline, self.layout, self.kv_heads, self.head_dim, self.value_dim, itemsize)
        more = [work]
        if self.hierarchy is not None:
            more.append(self.hierarchy.work(itemsize, self.head_dim, self.value_dim))
        if self.correction is not None:
            more.append(self.correction.work(itemsize))
        return [reduce(Work.plus, parts) for parts in zip(*more, strict=True)]

    def explain(self, itemsize: int = 2, machine: Machine | None = None) -> str:
        """A table of what every rank computes, sends and holds, and a prediction of the time.

        Args:
            itemsize: bytes of an element of q, k and v.
            machine: speeds to predict with; default: those of an H100.
        """
        from distattn.explain import explain

        return explain(self, itemsize, machine or Machine.load(DEFAULT_MACHINE))

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
    head_ranks: int | None = None,
    layout: str | Layout = "auto",
    schedule: str = "auto",
    block_q: int = 128,
    block_k: int = 128,
) -> Plan:
    """Plans attention by ``spec`` over ``seq_len`` tokens. Plans are cached by value.

    Args:
        heads, kv_heads: query heads, and key/value heads that divide them (default: as many).
        head_dim, value_dim: of queries and keys, and of values (default: the same).
        mesh: the ranks that share the sequence, a DeviceMesh of one dimension; or of two, along the second of which
            they exchange heads (see heads.py), the ranks of one machine, say. None: one rank, or with ``world_size``,
            ``rank`` and ``head_ranks`` (the size of the second dimension) a plan on paper, which explains but does not
            run.
        layout: who owns which tokens: one of ``layout.LAYOUTS``, or auto: the cheapest by the cost model; or the layout
            of another plan, which this one must share if the same tensors go through both.
        schedule: direct, slices, ring, or auto: direct where few pages travel, else slices where these fit, else ring.
        block_q, block_k: rows of a query tile and of a page.

    Raises:
        ConfigError: (a ValueError) an argument, or a combination of them, that cannot work.
    """
    groups: tuple[str | None, ...] = (None, None)
    if mesh is not None:
        if mesh.ndim not in (1, 2):
            raise ConfigError(
                f"mesh has {mesh.ndim} dimensions; expected one or two: take mesh['name'] or mesh['name', 'name'] of a "
                "larger one"
            )
        if world_size is not None or rank is not None or head_ranks is not None:
            raise ConfigError("give mesh, or world_size, rank and head_ranks, not both")
        world_size, head_ranks = mesh.size(), mesh.size(1) if mesh.ndim == 2 else 1
        places = [mesh.get_local_rank(dim) for dim in range(mesh.ndim)]
        rank = places[0] * head_ranks + (places[1] if mesh.ndim == 2 else 0)
        groups = tuple(mesh.get_group(d).group_name if mesh.size(d) > 1 else None for d in range(mesh.ndim))
    if not isinstance(spec, AttentionSpec):
        raise ConfigError(f"spec is {spec!r}; expected an AttentionSpec")
    numbers = {
        "seq_len": seq_len,
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "value_dim": head_dim if value_dim is None else value_dim,
        "world_size": 1 if world_size is None else world_size,
        "head_ranks": 1 if head_ranks is None else head_ranks,
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
        unit = _unit(spec, block_q, block_k)
        if (layout.seq_len, layout.world_size) != (seq_len, numbers["world_size"]) or layout.unit % unit:
            raise ConfigError(
                f"layout is for {layout.seq_len} tokens on {layout.world_size} ranks in units of "
                f"{layout.unit}; expected {seq_len} on {numbers['world_size']} in a multiple of {unit}"
            )
    elif layout not in (*LAYOUTS, "auto"):
        raise ConfigError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}, auto, or a Layout")
    if schedule not in (*SCHEDULES, "auto"):
        raise ConfigError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}, auto")
    head_ranks = numbers.pop("head_ranks")
    if head_ranks == 1:
        return plan_rows(spec, tuple(numbers.items()), rank, layout, schedule, groups[0])
    from distattn.heads import plan_heads

    return plan_heads(spec, tuple(numbers.items()), head_ranks, rank, layout, schedule, groups)


@lru_cache(maxsize=16)
def plan_rows(
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
        layout = choose_layout(layout, spec, outline, n, schedule)
    schedule, slices = _choose_schedule(schedule, outline, layout, n)
    said = repr((spec, numbers, schedule, slices, __version__)).encode()
    said += layout.start.tobytes() + layout.owner.tobytes()
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
        slices=slices,
        block_q=blocks[0],
        block_k=blocks[1],
        outline=outline,
        tokens=int(layout.tokens()[rank]),
        key=digest,
    )
    _ = plan.hierarchy  # raises what does not fit the length
    # Equal plans are one object, so that a name never outlives the plan that it was given to.
    return plans.setdefault(plan.name, plan)


def _choose_schedule(name: str, outline: Outline, layout: Layout, n: dict[str, Any]) -> tuple[str, int]:
    """The schedule, and into how many slices it cuts the key/value heads; the same on all ranks."""
    kv_heads = n["kv_heads"]
    owned = np.maximum(count_rows(owned_pages(layout, n["block_k"])), 1)
    guests = [(len(heads), count_rows(pages)) for heads, pages in guest_pages(outline, layout, kv_heads)]
    share = max(float((pages / owned).max()) for _, pages in guests)
    row_bytes = 2 * n["block_k"] * (n["head_dim"] + n["value_dim"])
    bytes_come = float(max(np.sum([heads * pages for heads, pages in guests], axis=0))) * row_bytes
    wanted = min(max(int(2 * bytes_come / FEW_BYTES), 2), kv_heads)
    slices = max(size for size in range(1, wanted + 1) if kv_heads % size == 0)
    if name == "auto":
        few = bytes_come < FEW_BYTES or share < FEW_GUESTS
        name = "direct" if few else "slices" if 2 * share <= MAX_GUESTS * slices else "ring"
    return name, slices if name == "slices" else 1


def _unit(spec: AttentionSpec, block_q: int, block_k: int) -> int:
    """What segments are whole multiples of: tiles, pages, and whatever of a spec never crosses ranks."""
    unit = max(block_q, block_k)
    if spec.summaries:
        unit = math.lcm(unit, spec.summaries[0].step)
    if spec.select is not None:
        unit = math.lcm(unit, spec.select.chunk)
    return unit if spec.correction is None else math.lcm(unit, spec.correction.every)


def choose_layout(name: str, spec: AttentionSpec, outline: Outline, n: dict[str, Any], schedule: str) -> Layout:
    blocks = n["block_q"], n["block_k"]
    unit = _unit(spec, *blocks)
    per_unit = unit // blocks[0]
    padded = np.zeros(-(-len(outline.tiles) // per_unit) * per_unit, np.int64)
    padded[: len(outline.tiles)] = outline.tiles
    work = padded.reshape(-1, per_unit).sum(axis=1)

    def levels(layout: Layout) -> Hierarchy | None:
        return None if spec.is_static else Hierarchy(spec, layout, n["heads"], n["kv_heads"], blocks, 0)

    whole = levels(make_layout("contiguous", n["seq_len"], 1, unit))
    if whole is not None:
        work = work + whole.pairs(unit) // (blocks[0] * blocks[1])
    if name != "auto":
        return make_layout(name, n["seq_len"], n["world_size"], unit, work)
    if n["world_size"] == 1:
        return make_layout("contiguous", n["seq_len"], 1, unit)
    sizes = n["kv_heads"], n["head_dim"], n["value_dim"]
    machine = Machine.load(DEFAULT_MACHINE)
    best: tuple[float, Layout] | None = None
    for candidate in LAYOUTS:
        layout = make_layout(candidate, n["seq_len"], n["world_size"], unit, work)
        how = _choose_schedule(schedule, outline, layout, n)
        time = predict_task(Task(outline, layout, levels(layout), *how, *sizes, itemsize=2), machine).seconds
        # Layouts come in the order of preference: a later one must be better, not equal.
        if best is None or time < best[0] * 0.99:
            best = (time, layout)
    assert best is not None
    return best[1]

"""The account of memory beside what the allocator of a CPU says of the same passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from torch.profiler import ProfilerActivity, profile

from distattn import exchange, guest_queries, memory, passes, presets, rounds, selection, summaries
from distattn.attend import attend
from distattn.extras import AttentionExtras
from distattn.forecast import plan_peak_bytes
from distattn.heads import HeadsPlan
from distattn.kernels import chunks
from distattn.kernels.chunks import Ladder
from distattn.kernels.rows import Places, split_rows
from distattn.kernels.selected import SelectedTable
from distattn.memory import peak_bytes
from distattn.patterns import Causal, GlobalKeys, SlidingWindow
from distattn.plan import make_plan
from distattn.spec import AttentionSpec
from distattn.task import Task

SIZES: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 64}
WINDOW = Causal() & (SlidingWindow(511, 0) | GlobalKeys(range(64)))
HIERARCHICAL = presets.hierarchical(256, (64, 512), (8,), 4, "tile", global_keys=range(16))
CASES: dict[str, tuple[AttentionSpec, int, dict[str, Any]]] = {
    "window": (AttentionSpec(WINDOW), 4096, {}),
    "dense, direct": (presets.dense(), 4096, {"schedule": "direct"}),
    "dense, slices": (presets.dense(), 4096, {"schedule": "slices"}),
    "dense, ring": (presets.dense(), 4096, {"schedule": "ring"}),
    "global queries": (presets.longformer(512, global_tokens=range(64)), 4096, {"schedule": "direct"}),
    "hierarchical": (HIERARCHICAL, 8192, {}),
    "heads": (presets.dense(), 4096, {"head_ranks": 2}),
    "two levels": (presets.combiner(256, (64, 512), (8,)), 8192, {}),
}


def means(x: torch.Tensor, chunk: int, left_out: object = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As a kernel's: float32, and nothing beside."""
    found = x.new_zeros((x.shape[0], x.shape[1] // chunk, *x.shape[2:]), dtype=torch.float32)
    for first in range(chunk):
        found += x[:, first::chunk]
    found /= chunk
    return found, found.new_zeros(found.shape[1])


def packed(tensors: Sequence[torch.Tensor], places: Places) -> torch.Tensor:
    """As a kernel's: one tensor, and nothing beside."""
    flat = tensors[0].new_empty(places.size(tensors))
    parts = places.parts or (places,)
    for some, whole in zip(parts, flat.split([part.size(tensors) for part in parts]), strict=True):
        for x, part in zip(tensors, split_rows(tensors, some, whole), strict=True):
            for to, head in enumerate(some.heads):
                at = 0
                for first, stop in some.runs.tolist():
                    part[:, at : at + stop - first, to] = x[:, first:stop, head]
                    at += stop - first
    return flat


def pages(chosen: torch.Tensor, position: object, exists: object, ladder: Ladder) -> tuple[torch.Tensor, torch.Tensor]:
    """As a kernel's: what is visited, and nothing beside."""
    found = torch.zeros((*chosen.shape[:3], ladder.most), dtype=torch.int32)
    return found, found.new_zeros((*found.shape, 1, ladder.words))


def taken(
    tensors: tuple[torch.Tensor, torch.Tensor], page: torch.Tensor, head: torch.Tensor, chunk: int
) -> torch.Tensor:
    """As a kernel's: one tensor, and nothing beside."""
    x, y = tensors
    return x.new_zeros((len(page), x.shape[0], chunk, x.shape[3] + y.shape[3]))


def added(*_: object) -> None:
    """As a kernel's: nothing beside."""


@contextmanager
def without_kernels() -> Iterator[None]:
    """What PyTorch operations need in place of kernels says nothing of a GPU."""
    replaced = {
        **{(module, "attention_forward"): lambda *_, **__: None for module in (passes, guest_queries)},
        **{(module, "attention_backward"): lambda *_, **__: None for module in (passes, guest_queries)},
        (passes, "row_deltas"): lambda out, grad_out, grad_lse: grad_lse.clone(),
        (exchange, "pack_rows"): packed,
        (summaries, "chunk_means"): means,
        (selection, "chunk_means"): means,
        (selection, "summary_pages"): pages,
        (rounds, "take_chunks"): taken,
        (rounds, "add_chunks"): added,
        (chunks, "_SCRATCH"): 1 << 14,
    }
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in replaced.items():
            patch.setattr(module, name, value)
        yield


def most_allocated(run: Callable[[], object]) -> int:
    """Bytes of the CPU's allocator at their peak, less those at the beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    assert found.profiler is not None
    events = found.profiler.kineto_results.events()
    changes = [(x.start_ns(), x.nbytes()) for x in events if x.name() == "[memory]"]
    return int(np.cumsum([nbytes for _, nbytes in sorted(changes, key=lambda x: x[0])]).max(initial=0))


def peaks(context: Any, name: str) -> tuple[int, int]:
    """Bytes of a forward pass, and of one with a backward pass, inputs included, on this rank."""
    spec, length, more = CASES[name]
    more = dict(more)
    mesh = None if context is None else context.mesh_for(more.pop("head_ranks", 1))
    plan = make_plan(spec, length, **SIZES, **more, mesh=mesh)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, plan.tokens, heads, 64, generator=generator).bfloat16() for heads in (8, 4, 4, 8))
    inputs = sum(x.nbytes for x in (q, k, v))

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, plan, extras=AttentionExtras())

    def both() -> None:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(forward(*leaves), leaves, grad)

    with without_kernels():
        both()  # what is kept with a plan is there
        alone = most_allocated(lambda: forward(q.detach(), k.detach(), v.detach()))
        return inputs + alone, inputs + grad.nbytes + most_allocated(both)


def check(found: list[tuple[int, int]], name: str, world_size: int) -> None:
    spec, length, more = CASES[name]
    plan = make_plan(spec, length, **SIZES, **more, world_size=world_size, rank=0)
    for number, backward in enumerate((False, True)):
        if isinstance(plan, HeadsPlan):  # two by two, between which it is the same on CPUs and GPUs
            told = plan_peak_bytes(plan, 2, backward=backward)
        else:
            told = peak_bytes(Task.of(plan, 2), backward=backward, on_gpu=False)
        for rank in range(world_size):
            assert found[rank][number] == pytest.approx(told[rank], rel=0.1), (rank, backward, plan)


@pytest.mark.parametrize("name", ["window", "global queries", "hierarchical", "two levels"])
def test_the_account_is_what_is_allocated_on_one_rank(name: str) -> None:
    check([peaks(None, name)], name, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_account_is_what_is_allocated_on_several_ranks(name: str, ranks: RankPool) -> None:
    count = 2 * CASES[name][2].get("head_ranks", 1)
    if count > 2:  # PyTorch numbers new groups by process: those of ranks that made others before would be mixed up
        ranks.close()
    check(ranks(count, peaks, name), name, count)


@pytest.mark.parametrize("tiles", [12, 600])
def test_partial_gradients_of_pages_are_in_the_account(tiles: int) -> None:
    """As many as the kernels for a table of chosen chunks make, on a GPU that runs as many programs as an H100."""
    spec = presets.hierarchical(256, (64,), (), 4, "tile")
    plan = make_plan(spec, tiles * 64, heads=8, kv_heads=4, head_dim=64, world_size=1, rank=0)
    assert plan.hierarchy is not None
    held, most = memory._Held(Task.of(plan, 2), on_gpu=True), plan.hierarchy.choosing.most
    chosen = torch.zeros((4, tiles, most), dtype=torch.int32)
    table = SelectedTable(64, 64, tiles, tiles, 0, plan.hierarchy.head_table, chosen)
    slots = table.key_work(memory._PROGRAMS, 2).slots
    assert held._parts(4, 64, most, 64).tolist() == [slots * 4 * 64 * 128 * 4]
    assert (slots > 0) == (tiles == 600)

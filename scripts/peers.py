"""Other ways to compute attention over a sharded sequence, that ours is measured beside.

Each is a `Contender`: it says which rows a rank owns, and attends with them. What each is:

- torch context_parallel: PyTorch's ring attention, head-tail balanced, on cuDNN's kernels; keys and values go round by
  all-to-all ("alltoall") or are gathered after the first step ("allgather").
- FlexAttention after all-gather: every rank gathers all keys and values, and its rows attend to them under a block mask
  of these rows. In the backward pass gradients of keys and values are reduced and scattered.
- Ulysses (Jacobs et al., "DeepSpeed Ulysses", 2023): an all-to-all turns shards of the sequence into shards of the
  heads, a rank attends with its heads to the whole sequence on cuDNN's kernels, another one turns the result back.
- ring-flash-attn zigzag: the package of this name, on FlashAttention-2's kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from measuring import peak_since, start_of_peak, synchronize
from sharded import Segments, contiguous
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from distattn.exchange import Counter

# PyTorch 2.13 renamed them, and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_torch_sdpa = torch.nn.functional.scaled_dot_product_attention  # context_parallel replaces it while it is entered

sent = Counter()
"""Bytes that the peers written here have given to torch.distributed."""


class CannotRun(Exception):
    """Why a contender is left out."""


class Problem(NamedTuple):
    """What is to be computed: causal attention; or with a window of positions back and ahead, and global tokens.

    before, after: how far a query sees, None: as far as there is something. globals_: how many first positions are
    global keys, and if ``global_queries`` also global queries.
    """

    length: int
    heads: int
    kv_heads: int
    before: int | None
    after: int
    globals_: int
    global_queries: bool
    mesh: DeviceMesh
    device: torch.device

    @property
    def dense(self) -> bool:
        return self.before is None

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def ranks(self) -> int:
        return self.mesh.size()

    def even(self, parts: int) -> None:
        if self.length % parts:
            raise CannotRun(f"{self.length:,} tokens are not {parts} equal parts")


class Contender(NamedTuple):
    """What is measured. attend: q, k, v of this rank's rows, [1, tokens, heads, dim], to the output.

    segments: which rows those are. repeats: how many times each key/value head must be there, made before. around: what
    must be entered when it runs. sent: how many bytes it has sent so far, where that is known. compiles: whether its
    first run compiles something for the shape, so that a small trial would not be one.
    """

    name: str
    segments: Segments
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    repeats: int = 1
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    sent: Callable[[], int] | None = None
    note: str = ""
    compiles: bool = False


Maker = Callable[[Problem], Contender]


def makers(dense: bool) -> dict[str, list[Maker]]:
    """Peers for dense causal problems, or for windows; of each, ways to make it: the first that runs is taken."""
    if not dense:
        return {"FlexAttention after all-gather": [flex_after_gather]}
    found: dict[str, list[Maker]] = {}
    for method in ("alltoall", "allgather"):
        found[f"torch context_parallel, {method}"] = [
            lambda problem, grouped=grouped, method=method: context_parallel(problem, method, grouped)
            for grouped in (True, False)
        ]
    return found | {"Ulysses": [ulysses], "ring-flash-attn zigzag": [ring_flash_attn]}


def zigzag(problem: Problem) -> Segments:
    """A piece of the first half of the sequence and the one that mirrors it."""
    rank, pieces = problem.rank, 2 * problem.ranks
    problem.even(pieces)
    size = problem.length // pieces
    first, last = rank * size, (pieces - 1 - rank) * size
    return ((first, first + size), (last, last + size))


def context_parallel(problem: Problem, method: str, grouped: bool) -> Contender:
    """grouped: with as many key/value heads as there are; else each is repeated before, which is not timed."""
    if problem.device.type != "cuda":
        raise CannotRun("torch's context_parallel has no kernels for CPUs")
    from torch.distributed.tensor.experimental import context_parallel as parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    @contextmanager
    def around() -> Iterator[None]:
        set_rotate_method(method)
        # Of what is to be sharded it wants to know at least one thing. Our rows are sharded already.
        some = torch.zeros(2 * problem.ranks, device=problem.device)
        within = parallel(problem.mesh, buffers=[some], buffer_seq_dims=[0], no_restore_buffers={some})
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), within:
            yield

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        more = {"enable_gqa": True} if grouped else {}
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, **more).transpose(1, 2)

    repeats = 1 if grouped else problem.heads // problem.kv_heads
    if problem.heads == problem.kv_heads and grouped:
        raise CannotRun("no heads share keys")
    note = "" if repeats == 1 else f"key/value heads repeated {repeats} times beforehand"
    return Contender(f"torch context_parallel, {method}", zigzag(problem), attend, repeats, around, note=note)


def flex_after_gather(problem: Problem) -> Contender:
    problem.even(problem.ranks)
    from torch.nn.attention import flex_attention as flex

    ((first, stop),) = segments = contiguous(problem.length, problem.rank, problem.ranks)
    before, after, globals_ = problem.before or 0, problem.after, problem.globals_
    global_queries = problem.global_queries

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q + first
        near = (q - k <= before) & (k - q <= after)
        if global_queries:
            return near | (k < globals_) | (q < globals_)
        return near | ((k < globals_) & (k <= q))

    on_gpu = problem.device.type == "cuda"
    create, run = flex.create_block_mask, flex.flex_attention
    if on_gpu:
        torch._dynamo.reset()  # what was compiled for other lengths counts against a limit
        create, run = torch.compile(create, dynamic=False), torch.compile(run, dynamic=False)
    synchronize(problem.device)
    held, began = start_of_peak(problem.device), time.perf_counter()
    mask = create(allowed, None, None, stop - first, problem.length, device=str(problem.device))
    synchronize(problem.device)
    how = " with compilation" if on_gpu else ""
    note = f"mask {time.perf_counter() - began:.1f} s{how}, {peak_since(held, problem.device):,.0f} MiB"
    group = problem.mesh.get_group()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        every = _GatherTokens.apply(group, k, v)
        heads_first = [x.transpose(1, 2) for x in (q, *every)]
        out: Tensor = run(*heads_first, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    name = "FlexAttention after all-gather"
    return Contender(name, segments, attend, sent=lambda: sent.total, note=note, compiles=on_gpu)


def ulysses(problem: Problem) -> Contender:
    problem.even(problem.ranks)
    if problem.kv_heads % problem.ranks:
        raise CannotRun(f"{problem.kv_heads} key/value heads on {problem.ranks} ranks")
    backend = SDPBackend.CUDNN_ATTENTION if problem.device.type == "cuda" else SDPBackend.MATH
    group = problem.mesh.get_group()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = [_Turn.apply(group, True, x).transpose(1, 2) for x in (q, k, v)]
        with sdpa_kernel(backend):
            out = _torch_sdpa(*heads_first, is_causal=True, enable_gqa=True)
        turned: Tensor = _Turn.apply(group, False, out.transpose(1, 2))
        return turned

    segments = contiguous(problem.length, problem.rank, problem.ranks)
    return Contender("Ulysses", segments, attend, sent=lambda: sent.total)


def ring_flash_attn(problem: Problem) -> Contender:
    if problem.device.type != "cuda":
        raise CannotRun("ring-flash-attn has no kernels for CPUs")
    try:
        from ring_flash_attn import zigzag_ring_flash_attn_func
    except ImportError as error:
        raise CannotRun(str(error)) from error
    group = problem.mesh.get_group()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = zigzag_ring_flash_attn_func(q, k, v, causal=True, group=group)
        return out

    return Contender("ring-flash-attn zigzag", zigzag(problem), attend)


class _GatherTokens(torch.autograd.Function):
    """Tensors [1, tokens, heads, dim] of all ranks, one after the other: [1, all tokens, heads, dim]."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        every = [x.new_empty(x.shape[0], x.shape[1] * group.size(), *x.shape[2:]) for x in shards]
        pairs = zip(every, shards, strict=True)
        works = [_all_gather(to[0], x[0].contiguous(), group=group, async_op=True) for to, x in pairs]
        sent.add("all-gather", sum(x.nbytes for x in shards) * (group.size() - 1))
        for work in works:
            work.wait()
        return tuple(every)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group = ctx.group
        mine = [x.new_empty(1, x.shape[1] // group.size(), *x.shape[2:]) for x in grads]
        pairs = zip(mine, grads, strict=True)
        works = [_reduce_scatter(to[0], x[0].contiguous(), group=group, async_op=True) for to, x in pairs]
        sent.add("reduce-scatter", sum(x.nbytes for x in mine) * (group.size() - 1))
        for work in works:
            work.wait()
        return None, *mine


class _Turn(torch.autograd.Function):
    """Shards of the sequence [1, tokens, heads, dim] into shards of the heads, [1, all tokens, heads / ranks, dim].

    Or back, if not ``to_heads``; the gradient goes the other way.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, to_heads: bool, x: Tensor) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _turn(group, to_heads, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, _turn(ctx.group, not ctx.to_heads, grad)


def _turn(group: dist.ProcessGroup, to_heads: bool, x: Tensor) -> Tensor:
    ranks = group.size()
    x = x[0]
    parts = x.unflatten(1, (ranks, -1)).transpose(0, 1) if to_heads else x.unflatten(0, (ranks, -1))
    parts = parts.contiguous()  # [ranks, tokens, heads, dim], by who gets it
    got = torch.empty_like(parts)
    dist.all_to_all_single(got, parts, group=group)
    sent.add("all-to-all", parts.nbytes * (ranks - 1) // ranks)
    return (got.flatten(0, 1) if to_heads else got.transpose(0, 1).flatten(1, 2)).unsqueeze(0)

"""Parameters in shards: a rank keeps a share of each, of its gradient and of its optimiser state (FSDP2, ZeRO-3).

A layer's parameters are gathered before the layer computes and dropped after it, and again in the backward pass; its
gradients are summed over all ranks, of which each keeps its share. Both are exchanges like those of attention: a rank
that is gone or frozen is named within the deadline, on the other ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distattn.exchange import begin
from distattn.model import Decoder
from distattn.watch import watch_of

# PyTorch 2.13 renamed them, and warns of the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Cut the parameters into shares along their first dimension: they become DTensors, one share a rank.

    After a pass without gradients, call ``decoder.reshard()``: what belongs to no layer stays gathered until a backward
    pass ends.

    Args:
        decoder: with the same parameters on all ranks. Only its `forward`, and `loss` after it, can be called then.
        mesh: of one dimension, all ranks.
    """
    for module in (*decoder.blocks, decoder):
        # `loss` uses parameters after `forward`: those of no layer stay.
        sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=module is not decoder)
        sharded.set_gradient_divide_factor(1.0)  # each rank has the gradient of its own rows: a sum, not a mean
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_custom_all_gather(_AllGather())
        sharded.set_custom_reduce_scatter(_ReduceScatter())


def local(x: Tensor) -> Tensor:
    """This rank's share of a parameter or a gradient, not a copy; all of it where it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(module: nn.Module) -> dict[str, Tensor]:
    """All parameters by name, in whole, on every rank; all ranks ask together."""
    return {
        name: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in module.named_parameters()
    }


def add_up(x: Tensor, group: dist.ProcessGroup | None, what: str) -> None:
    """Sum x over the ranks of a group, in place.

    Raises:
        PeerLost, StepTimeout, PlanMismatch: as every exchange.
    """
    if group is not None:
        stage = begin(watch_of(group.group_name), f"sum {what}", x.is_cuda)
        with stage:
            work = dist.all_reduce(x, group=group, async_op=True)
        stage.wait([work])


class _Comm:
    """What FSDP2 asks of whoever replaces its collectives."""

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Comm):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        stage = begin(watch_of(group.group_name), "gather parameters", input_tensor.is_cuda)
        with stage:
            work = _all_gather_single(output_tensor, input_tensor, group=group, async_op=True)
        stage.wait([work])


class _ReduceScatter(_Comm):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        stage = begin(watch_of(group.group_name), "sum gradients", input_tensor.is_cuda)
        with stage:
            work = _reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=True)
        stage.wait([work])

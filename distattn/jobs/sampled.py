"""A few rows of a sharded sequence, looked at by all ranks together: each over the keys that it owns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from distattn import reference
from distattn.exchange import gather_rows
from distattn.jobs.context import Context
from distattn.plan import Plan


class Sampled:
    """Rows of a plan's sequence.

    Args:
        positions: int64 [rows], ascending, of the whole sequence; the same on every rank.

    Attributes:
        mine: int64 [own rows]: which of this rank's rows are among them.
    """

    def __init__(self, plan: Plan, positions: NDArray[np.int64], context: Context) -> None:
        self.plan, self.positions, self._context = plan, positions, context
        owner = plan.layout.owner_of(positions)
        mine = np.searchsorted(plan.positions.numpy(), positions[owner == plan.rank])
        self.mine = torch.from_numpy(mine).to(context.device)
        self._order = torch.from_numpy(np.argsort(np.argsort(owner, kind="stable"), kind="stable"))
        self._counts = np.bincount(owner, minlength=plan.world_size).tolist()

    def everywhere(self, x: Tensor) -> Tensor:
        """The rows of all ranks, in the order of positions: [own rows, ...] -> [rows, ...]."""
        return torch.cat(self._gather(x, self._counts))[self._order.to(x.device)]

    def chosen(self, chunks: Tensor, tile: int) -> Tensor:
        """What the rows chose, [rows, tables, chunks]; chunks: [1, tables, own tiles, chunks], of `tile` rows each."""
        return self.everywhere(chunks[0, :, self.mine // tile].transpose(0, 1))

    def merged(self, out: Tensor, lse: Tensor, more: Iterable[reference.Part] = ()) -> reference.Part:
        """Attention over the keys of all ranks, from each rank's part over its own keys.

        Args:
            out, lse: [1, rows, ...], of all rows. more: parts that all ranks have alike.
        """
        ranks = [1] * self.plan.world_size
        parts = zip(self._gather(out, ranks), self._gather(lse, ranks), strict=True)
        return reference.merge([*parts, *more])

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self._context.mesh is not None:
            dist.all_reduce(x, group=self._context.mesh.get_group())
        return x

    def _gather(self, x: Tensor, counts: list[int]) -> list[Any]:
        """All ranks' rows along dim 0."""
        mesh = self._context.mesh
        return [x] if mesh is None else gather_rows(x.contiguous(), counts, mesh.get_group().group_name)

"""What an attention keeps of dense attention to the same keys and values, in the layers of a pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distattn import reference
from distattn.attend import Selection
from distattn.extras import AttentionExtras
from distattn.jobs.context import Context
from distattn.jobs.machine import synchronize
from distattn.jobs.sampled import Sampled
from distattn.patterns import Causal, Pattern
from distattn.plan import Plan


@dataclass(frozen=True)
class Fidelity:
    """A layer's attention beside dense attention to the same keys and values.

    Attributes:
        error: norm of the difference by the norm of the dense output, the mean over rows and heads.
        mass: of dense attention that lies on tokens which are attended exactly, the mean over rows and heads.
    """

    length: int
    attention: str
    layer: int
    rows: int
    error: float
    mass: float


class Comparison:
    """Observes the layers of a pass, and compares rows of the text's second half with dense attention, in float64.

    Args:
        plans: of the layers. layers: which are compared. attention: its name. rows: how many, drawn for the seed.

    Attributes:
        found: a `Fidelity` for each layer that was compared, the same on every rank.
        seconds: what comparing took.
    """

    def __init__(
        self, plans: Sequence[Plan], layers: set[int], attention: str, rows: int, seed: int, context: Context
    ) -> None:
        self.plans, self.layers, self.attention, self.found = plans, layers, attention, list[Fidelity]()
        self.seconds = 0.0
        length = plans[0].seq_len
        self._rows = np.unique(np.random.default_rng(seed).integers(length // 2, length, rows))
        self._context = context

    def observe(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        extras: AttentionExtras,
        selection: Selection | None,
    ) -> None:
        """See `distattn.model.Observer`."""
        if layer not in self.layers:
            return
        synchronize(self._context)
        began = time.perf_counter()
        plan, rows = self.plans[layer], Sampled(self.plans[layer], self._rows, self._context)
        queries, got = (rows.everywhere(x[0, rows.mine]).unsqueeze(0).double() for x in (q, out))
        positions = torch.from_numpy(self._rows)

        def over(pattern: Pattern) -> reference.Part:
            part = reference.attention_rows(queries, positions, k, v, pattern, key_positions=plan.positions)
            return rows.merged(*part)

        dense, lse = over(Causal())
        mass = (over(plan.spec.tokens)[1] - lse).exp()[0]  # [rows, heads]
        if selection is not None and plan.spec.select is not None:
            mass = mass + self._chosen_mass(queries[0], k[0], lse[0], rows, selection)
        error = (got - dense).norm(dim=-1) / dense.norm(dim=-1).clamp(min=1e-30)
        numbers = float(error.mean()), float(mass.mean())
        self.found.append(Fidelity(plan.seq_len, self.attention, layer, len(self._rows), *numbers))
        self.seconds += time.perf_counter() - began

    def _chosen_mass(self, q: Tensor, k: Tensor, lse: Tensor, rows: Sampled, selection: Selection) -> Tensor:
        """[rows, heads] of dense attention on the chosen chunks' tokens, but for those that are attended anyway."""
        plan, select = rows.plan, rows.plan.spec.select
        assert select is not None
        chosen = rows.chosen(selection.chunks, 1 if select.per == "token" else select.chunk).cpu().numpy()
        heads, tables = q.shape[1], chosen.shape[1]
        share, mass = heads // k.shape[1], torch.zeros_like(lse)
        own = plan.positions.numpy()
        for n, row in enumerate(self._rows.tolist()):
            for head in range(heads):
                chunks = chosen[n, head * tables // heads]
                keys = (chunks[chunks >= 0, None] * select.chunk + np.arange(select.chunk)).flatten()
                keys = np.intersect1d(keys[keys <= row], own)
                keys = keys[~plan.spec.tokens.allows(np.full(len(keys), row), keys)]
                there = torch.from_numpy(np.searchsorted(own, keys)).to(k.device)
                scores = k[there, head // share].double() @ q[n, head] * q.shape[2] ** -0.5
                mass[n, head] = (scores - lse[n, head]).exp().sum()
        return rows.total(mass)


def table(found: Sequence[Fidelity]) -> str:
    """For a terminal."""
    lines = [f"{'attention':<14}{'length':>10}{'layer':>7}{'error':>10}{'mass':>8}"]
    lines += [f"{x.attention:<14}{x.length:>10,}{x.layer:>7}{x.error:>10.1%}{x.mass:>8.1%}" for x in found]
    return "\n".join(lines)

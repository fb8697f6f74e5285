"""The loss of choices: that of its definition, with the gradients of all ranks' rows together."""

from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from torch import Tensor
from torch.nn import functional as F

from distattn import presets
from distattn.choice_loss import choice_loss
from distattn.extras import AttentionExtras
from distattn.jobs.context import Context
from distattn.plan import make_plan
from distattn.rotary import rotary_table, rotate

LENGTH, CHUNK, WINDOW, HEADS, KV_HEADS, DIM = 300, 16, 32, 4, 2, 8  # the last chunk is short
# Rows and what they must find. The third is in the window and does not count; for tiles the first, second and fifth are
# one.
LOOKUPS = np.array([[90, 20], [91, 30], [150, 140], [150, 120], [92, 21], [200, 3], [299, 260], [295, 100]])
SPECS = {
    "tile": {"per": "tile"},
    "token": {"per": "token"},
    "each head": {"per": "token", "heads": "q"},
}


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, LENGTH, heads, DIM) for heads in (HEADS, KV_HEADS))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def turn(x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, *rotary_table(positions.unsqueeze(0), DIM, 100.0, torch.float64))


def by_definition(q: Tensor, k: Tensor, per: str, heads: str, rotated: bool) -> tuple[Tensor, int]:
    """The sum of the losses and their number, a lookup at a time."""
    starts = range(0, LENGTH, CHUNK)
    means = torch.stack([k[0, at : at + CHUNK].mean(0) for at in starts])  # [chunks, kv_heads, dim]
    if rotated:
        centres = torch.tensor([(at + min(at + CHUNK, LENGTH) - 1) / 2 for at in starts], dtype=torch.float64)
        means = turn(means.unsqueeze(0), centres)[0]
    pairs = {}
    for row, found in LOOKUPS.tolist():
        candidates = row // CHUNK - WINDOW // CHUNK + 1
        if found // CHUNK < candidates:
            pairs[row // CHUNK if per == "tile" else row, found // CHUNK] = candidates
    losses = []
    for (who, target), candidates in pairs.items():
        asks = q[0, who] if per == "token" else q[0, (who - 1) * CHUNK : who * CHUNK].mean(0)
        scores = torch.einsum("gsd,cgd->gsc", asks.unflatten(0, (KV_HEADS, -1)), means[:candidates]) * DIM**-0.5
        scores = scores.sum(1) if heads == "kv" else scores.flatten(0, 1)
        losses += [F.cross_entropy(one, torch.tensor(target)) for one in scores]
    return torch.stack(losses).sum(), len(losses)


def ours(context: Context, name: str, rotated: bool) -> tuple[float, list[float], Tensor, Tensor]:
    """The loss, the counts, and the gradients of this rank's rows, at their places among all."""
    spec = presets.hierarchical(WINDOW, [CHUNK], [], 3, **SPECS[name])
    sizes: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
    plan = make_plan(spec, LENGTH, **sizes, mesh=context.mesh, block_q=32, block_k=32, layout="zigzag")
    q, k = (x[:, plan.positions].requires_grad_() for x in inputs())
    extras = AttentionExtras(pool_keys=k, rotate=turn) if rotated else AttentionExtras()
    loss, counts = choice_loss(q, k.detach() if rotated else k, plan, LOOKUPS, extras)
    loss.backward()
    found = []
    for x in (q, k):
        assert x.grad is not None
        found.append(torch.zeros(1, LENGTH, *x.shape[2:], dtype=x.dtype).index_copy(1, plan.positions, x.grad))
    return float(loss), counts.tolist(), found[0], found[1]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_equals_its_definition_on_any_number_of_ranks(ranks: RankPool, name: str, rotated: bool) -> None:
    q, k = (x.requires_grad_() for x in inputs())
    expected, number = by_definition(q, k, SPECS[name]["per"], SPECS[name].get("heads", "kv"), rotated)
    expected.backward()
    assert number == {"tile": 5 * KV_HEADS, "token": 7 * KV_HEADS, "each head": 7 * HEADS}[name]
    for count in (1, 3):
        found = ranks(count, ours, name, rotated)
        for loss, counts, *_ in found:
            assert loss == pytest.approx(float(expected), rel=1e-12)
            assert counts == found[0][1] and counts[1] == number and 0 <= counts[0] <= number
        for number_of, x in ((2, q), (3, k)):
            total = sum(one[number_of] for one in found)
            torch.testing.assert_close(total, x.grad, rtol=1e-10, atol=1e-12)


def test_a_choice_that_is_right_counts() -> None:
    """Queries that are a chunk's own mean key choose it; with the keys turned round, they choose others."""
    spec = presets.hierarchical(WINDOW, [CHUNK], [], 2, "token")
    plan = make_plan(spec, LENGTH, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, block_q=32, block_k=32)
    _, k = inputs()
    target = k[0, 96:112].mean(0)
    q = (100 * target / target.norm()).repeat_interleave(HEADS // KV_HEADS, 0).expand(1, LENGTH, HEADS, DIM)
    lookups = np.array([[250, 100]])
    for sign, right in ((1, 2), (-1, 0)):
        _, counts = choice_loss(sign * q, k, plan, lookups, AttentionExtras())
        assert counts.tolist() == [right, 2]

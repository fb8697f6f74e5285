"""Drawings of patterns, as text, and of plans, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distattn.algebra import Pattern, as_int
from distattn.errors import ConfigError
from distattn.spans import Ints, Spans

if TYPE_CHECKING:
    from distattn.plan import Plan

Floats = NDArray[np.float64]

_SHADES = np.array(["· ", "░░", "▒▒", "▓▓", "██"])

# At most this many queries of a cell are looked at.
_SAMPLES = 16


def draw_text(pattern: Pattern, length: int = 64, size: int = 32) -> str:
    """A text drawing of the first `length` positions, queries from top to bottom, keys from left to right.

    It has `size` lines of `size` cells (`length` if that is less); a cell is two characters wide, which
    looks square in a terminal. Cells stand for equally many positions, give or take one, and are shaded by
    the share of their pairs that are allowed: "· " where none is, "██" where all are. If a line stands for
    more than 16 queries, a fixed random sample of them decides the share; where it has none, but another
    query of the line may have some, the cell is "░░". A pattern by head is drawn head by head, each under its
    number.

    Raises ValueError if length or size is < 1.
    """
    as_int("length", length, 1)
    as_int("size", size, 1)
    if pattern.heads is not None:
        heads = enumerate(pattern.by_head(pattern.heads))
        return "\n\n".join(f"head {h}\n{draw_text(head, length, size)}" for h, head in heads)
    edges = np.linspace(0, length, min(size, length) + 1).astype(np.int64)
    random = np.random.default_rng(0)
    lines = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        queries = np.arange(low, high, dtype=np.int64)
        may = np.zeros(edges.size - 1, np.bool_)
        if queries.size > _SAMPLES:
            support, _ = pattern.spans(queries[:1], queries[-1:] + 1, length)
            may = _covered(support, edges) > 0
            queries = random.choice(queries, _SAMPLES, replace=False)
        allowed, _ = pattern.spans(queries, queries + 1, length)
        share = _covered(allowed, edges) / (queries.size * np.diff(edges))
        shade = np.where(share > 0, 1 + np.minimum(share * 3, 2).astype(np.int64), may)
        lines.append("".join(_SHADES[np.where(share == 1, 4, shade)]))
    return "\n".join(lines)


def _covered(spans: Spans, edges: Ints) -> Ints:
    """How many positions of each cell `[edges[i], edges[i + 1])` the intervals of all rows hold, summed."""
    return np.diff(_lengths_before(spans.start, edges) - _lengths_before(spans.stop, edges))


def _lengths_before(points: Ints, edges: Ints) -> Ints:
    """The sum of `edge - point` over the points before each edge."""
    points = np.sort(points)
    count = np.searchsorted(points, edges)
    sums: Ints = count * edges - np.append(0, np.cumsum(points))[count]
    return sums


def draw_plan(plan: Plan, path: str | Path, size: int = 256) -> Path:
    """Writes a PNG: the score matrix with its tiles, and the ranks that own the queries and the keys.

    The whole matrix is drawn in `size` x `size` cells, shaded by the share of pairs that are attended and coloured
    by the rank that owns the queries; beside it the first tiles in detail. Needs matplotlib (the `plot` extra).

    Raises ConfigError if matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ConfigError(
            "pictures need matplotlib, which is not installed; expected the extra distattn[plot]"
        ) from error
    path = Path(path)
    pattern = plan.spec.tokens.by_head(plan.heads)[0]
    colours = np.array(matplotlib.colormaps["tab10"](np.arange(plan.world_size) % 10))[:, :3]
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.6), layout="constrained")
    detail = min(plan.seq_len, 24 * plan.block_q)
    views = ((0, plan.seq_len, "the whole sequence"), (0, detail, "its beginning, with tiles"))
    for axis, (first, last, title) in zip(axes, views, strict=True):
        edges = np.unique(np.linspace(first, last, size + 1).astype(np.int64))
        share = _shares(pattern, edges, first, last)
        owner = plan.layout.owner_of(edges[:-1])
        # Thin lines stay visible: any attended pair shows at a third of the full colour.
        strength = np.where(share > 0, 0.35 + 0.65 * np.sqrt(share), 0.0)[:, :, None]
        image = 1 - strength * (1 - colours[owner][:, None, :])
        axis.imshow(image, extent=(first, last, last, first), interpolation="nearest", aspect="equal")
        axis.set(title=title, xlabel="key position", ylabel="query position")
        band = (last - first) * 0.015
        for start, stop, rank in zip(
            plan.layout.start.tolist(), plan.layout.stop.tolist(), plan.layout.owner.tolist(), strict=True
        ):
            low, high = max(start, first), min(stop, last)
            if low < high:
                axis.add_patch(plt.Rectangle((low, last), high - low, band, color=colours[rank], clip_on=False))
                axis.add_patch(plt.Rectangle((first - band, low), band, high - low, color=colours[rank], clip_on=False))
    axes[1].set_xticks(np.arange(0, detail, plan.block_k), minor=True)
    axes[1].set_yticks(np.arange(0, detail, plan.block_q), minor=True)
    axes[1].grid(which="minor", color="0.85", linewidth=0.4)
    for axis in axes:
        axis.ticklabel_format(style="plain")
        axis.tick_params(axis="x", rotation=30)
    shown = min(plan.world_size, 10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[r]) for r in range(shown)]
    figure.legend(handles, [f"rank {r}" for r in range(shown)], loc="outside lower center", ncols=shown, frameon=False)
    text = repr(plan.spec.tokens)
    if not plan.spec.is_static:
        text = f"level 0, without summaries and chosen chunks: {text}"
    figure.suptitle(text if len(text) <= 110 else f"{text[:107]}...", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _shares(pattern: Pattern, edges: Ints, first: int, last: int) -> Floats:
    """float64 [cells, cells]: the share of each cell's pairs that are allowed, from a sample of its queries."""
    random = np.random.default_rng(0)
    out = np.zeros((edges.size - 1, edges.size - 1))
    for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        queries = np.arange(low, high, dtype=np.int64)
        if queries.size > _SAMPLES:
            queries = np.sort(random.choice(queries, _SAMPLES, replace=False))
        allowed, _ = pattern.spans(queries, queries + 1, int(last))
        out[i] = _covered(allowed, edges) / (queries.size * np.diff(edges))
    return out

"""Published attention patterns by name; each function returns an AttentionSpec.

Bad parameters raise ValueError, which names the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise

from distattn.algebra import as_int
from distattn.patterns import (
    Causal,
    Chunked,
    Dense,
    Dilated,
    DistanceBand,
    Documents,
    FixedStride,
    GlobalKeys,
    GlobalQueries,
    GlobalTokens,
    Pattern,
    PerHead,
    RandomBlocks,
    SlidingWindow,
    Strided,
)
from distattn.spec import AttentionSpec


def dense(causal: bool = True) -> AttentionSpec:
    """Full attention (Vaswani et al., "Attention Is All You Need", 2017); `k <= q` if causal."""
    return AttentionSpec(Causal() if causal else Dense())


def mistral(window: int) -> AttentionSpec:
    """Causal sliding window (Jiang et al., "Mistral 7B", 2023, section 2): `q - window < k <= q`.

    window: how many tokens a query attends to, itself included; >= 1.
    """
    return AttentionSpec(SlidingWindow(as_int("window", window, 1) - 1, 0))


def longformer(reach: int, dilation: int = 1, global_tokens: Iterable[int] = (), causal: bool = False) -> AttentionSpec:
    """Dilated sliding window and global tokens (Beltagy et al., "Longformer", 2020, section 3.1).

    A query attends to `q + j * dilation` for `-reach <= j <= reach` and to the global tokens, which attend to
    every token. If causal, only to those that are not ahead.

    reach: how many tokens a query attends to on each side, besides itself (w/2 in the paper); >= 0.
    dilation: the distance from one of them to the next; >= 1.
    global_tokens: their positions.
    """
    side = as_int("reach", reach, 0) * as_int("dilation", dilation, 1)
    ahead = 0 if causal else side
    window: Pattern = SlidingWindow(side, ahead) if dilation == 1 else Dilated(side, ahead, dilation)
    tokens = GlobalTokens(global_tokens)
    if not tokens.positions:
        return AttentionSpec(window)
    return AttentionSpec(Causal() & (window | tokens) if causal else window | tokens)


def bigbird(
    block: int, window_blocks: int, random_blocks: int, global_blocks: int, seed: int, length: int
) -> AttentionSpec:
    """Window, random and global blocks (Zaheer et al., "Big Bird", 2020, section 2, appendix D: BigBird-ITC).

    A query in block I = q // block attends to the blocks J with `|I - J| <= (window_blocks - 1) / 2`, to
    `random_blocks` blocks drawn for I among all of the sequence, and to the first `global_blocks` blocks,
    whose queries attend to every key. Not causal.

    block: tokens in a block; >= 1.
    window_blocks: odd, >= 1; its own block is one of them.
    random_blocks, global_blocks: >= 0.
    seed: of the random blocks, >= 0.
    length: of the sequence, in tokens; >= 1.
    """
    if as_int("window_blocks", window_blocks, 1) % 2 == 0:
        raise ValueError(f"window_blocks is {window_blocks}; expected an odd number")
    as_int("block", block, 1)
    as_int("seed", seed, 0)
    as_int("length", length, 1)
    side = window_blocks // 2
    pattern: Pattern = Chunked(block, side, side)
    if as_int("random_blocks", random_blocks, 0):
        pattern = pattern | RandomBlocks(random_blocks, block, seed, length)
    if as_int("global_blocks", global_blocks, 0):
        pattern = pattern | GlobalTokens(range(global_blocks * block))
    return AttentionSpec(pattern)


def sparse_transformer_strided(stride: int) -> AttentionSpec:
    """Strided attention (Child et al., "Sparse Transformers", 2019, section 4.3).

    Both factors in one head: causal, `q - k <= stride` or `(q - k) % stride == 0`. stride >= 1.
    """
    return AttentionSpec(Causal() & (SlidingWindow(as_int("stride", stride, 1), 0) | Strided(stride)))


def sparse_transformer_fixed(stride: int, summary: int) -> AttentionSpec:
    """Fixed attention (Child et al., "Sparse Transformers", 2019, section 4.3).

    Both factors in one head: causal, `q // stride == k // stride` or `k % stride >= stride - summary`.

    stride: tokens in a block (l in the paper); >= 1.
    summary: how many of a block's last tokens all later queries attend to (c in the paper); 1 to stride.
    """
    columns = FixedStride(stride, summary)
    return AttentionSpec(Causal() & (Chunked(stride) | columns))


def etc(segments: Iterable[int], radius: int) -> AttentionSpec:
    """Segments with a global token each (Ainslie et al., "ETC", 2020, section 3 and figure 3b).

    The first token of each segment is its global token. Of the paper's four pieces,
    long-to-long: `|q - k| <= radius`, across segments;
    long-to-global: every token attends to all global tokens;
    global-to-global: all of them;
    global-to-long: a global token attends to all tokens of its own segment.
    In the paper global tokens are a second input; here they are tokens of the sequence, and keep their local
    window as well. Not causal.

    segments: the lengths of the segments, which follow each other from position 0; each >= 1.
    radius: the reach of the local window on either side; >= 0.
    """
    lengths = tuple(as_int("segments", length, 1) for length in segments)
    starts = tuple(accumulate(lengths, initial=0))[:-1]
    window = SlidingWindow(as_int("radius", radius, 0), radius)
    return AttentionSpec(window | GlobalKeys(starts) | GlobalQueries(starts) & Documents(lengths))


def streaming_llm(sinks: int, window: int) -> AttentionSpec:
    """Attention sinks and a causal window (Xiao et al., "Efficient Streaming Language Models with Attention
    Sinks", 2023, section 3).

    `k <= q`, and `k < sinks` or `q - window < k`.

    sinks: how many first tokens every query attends to; >= 0.
    window: how many of the latest tokens a query attends to, itself included; >= 1.
    """
    latest = SlidingWindow(as_int("window", window, 1) - 1, 0)
    if as_int("sinks", sinks, 0) == 0:
        return AttentionSpec(latest)
    return AttentionSpec(Causal() & (latest | GlobalKeys(range(sinks))))


def spattention(heads: int, reach: int) -> AttentionSpec:
    """One causal distance band a head (Zhao et al., "Making Every Head Count" (SPAttention), 2025).

    Head h attends to the distances `reach * h // heads <= q - k < reach * (h + 1) // heads`. The bands do not
    overlap, differ in width by at most one, and together cover every distance below `reach`.

    heads: of the model; >= 1. reach: usually the sequence length; >= heads, so that no band is empty.
    """
    as_int("heads", heads, 1)
    as_int("reach", reach, heads)
    edges = [reach * h // heads for h in range(heads + 1)]
    return AttentionSpec(PerHead(DistanceBand(*band) for band in pairwise(edges)))


PRESETS: dict[str, Callable[..., AttentionSpec]] = {
    "dense": dense,
    "mistral": mistral,
    "longformer": longformer,
    "bigbird": bigbird,
    "sparse_transformer_strided": sparse_transformer_strided,
    "sparse_transformer_fixed": sparse_transformer_fixed,
    "etc": etc,
    "streaming_llm": streaming_llm,
    "spattention": spattention,
}
"""Every preset by its name."""

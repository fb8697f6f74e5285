"""Published attention patterns by name; each function returns an AttentionSpec.

Bad parameters raise ValueError, which names the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Literal

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
from distattn.spec import AttentionSpec, Delta, Summaries, TopChunks, chunk_window


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


def hierarchical(
    window: int,
    chunks: Iterable[int] = (64, 1024),
    reach: Iterable[int] = (64,),
    top_k: int = 0,
    per: Literal["token", "tile"] = "token",
    score: Literal["mean", "mass"] = "mean",
    heads: Literal["kv", "q"] = "kv",
    pool: Literal["mean", "attention", "mlp"] = "mean",
    global_tokens: Iterable[int] = (),
    global_keys: Iterable[int] = (),
    causal: bool = True,
    lookahead: bool = False,
) -> AttentionSpec:
    """A window of tokens, summaries of chunks further back, of longer ones for the rest, and the best chunks exactly.

    All under one softmax, in which every token counts once; see spec.py for the levels.

    window: tokens, a multiple of ``chunks[0]``: its own chunk, up to the query, and those before it (if not causal,
        those after it as well).
    chunks: tokens of a summary, level by level, each dividing the next.
    reach: of each level but the last, how many chunks of the next level it reaches.
    top_k: chunks of ``chunks[0]`` tokens that are attended token by token, the first of the sequence among them; 0:
        none. per, score, heads, lookahead: how they are chosen, see :class:`TopChunks`.
    pool: see :class:`Summaries`. global_tokens, global_keys: positions, see :func:`chunk_window`.
    """
    sizes, reaches = [as_int("chunks", size, 1) for size in chunks], list(reach)
    if not sizes or len(reaches) != len(sizes) - 1:
        raise ValueError(f"reach is {reaches}; expected one less than chunks, {sizes}, has entries")
    if as_int("window", window, 1) % sizes[0]:
        raise ValueError(f"window is {window}; expected a multiple of chunks[0], {sizes[0]}")
    level0 = chunk_window(
        sizes[0],
        window // sizes[0],
        causal=causal,
        global_tokens=list(global_tokens),
        global_keys=list(global_keys),
    )
    levels = tuple(Summaries(size, pool=pool, reach=far) for size, far in zip(sizes, [*reaches, None], strict=True))
    select = None
    if as_int("top_k", top_k, 0):
        select = TopChunks(top_k, sizes[0], score, per, heads, lookahead=lookahead)
    return AttentionSpec(level0, levels, select)


def combiner(window: int, chunks: Iterable[int] = (64, 1024), reach: Iterable[int] = (64,)) -> AttentionSpec:
    """Full attention factorized into a window and two levels of summaries, no choice (after Ren et al., "Combiner",
    2021, section 4; there the levels are conditional expectations, here they are mean keys with the bias log n).

    window, chunks, reach: see :func:`hierarchical`.
    """
    return hierarchical(window, chunks, reach)


def moba(chunk: int, top_k: int) -> AttentionSpec:
    """Mixture of block attention (Lu et al., "MoBA", 2025, section 2.2): each query head chooses its blocks.

    A query attends to its own block, up to itself, and to the top_k - 1 earlier blocks whose mean key has the largest
    product with it.

    chunk: tokens of a block; >= 1. top_k: blocks, the own one included; >= 1.
    """
    others = as_int("top_k", top_k, 1) - 1
    select = TopChunks(others, chunk, heads="q", always=()) if others else None
    return AttentionSpec(chunk_window(chunk, 1), select=select)


def nsa(block: int = 32, stride: int = 16, select_block: int = 64, top_n: int = 16, window: int = 512) -> AttentionSpec:
    """Native sparse attention (Yuan et al., 2025, section 3.3): three softmaxes, added with sigmoid gates.

    block, stride: compressed blocks, by an MLP. select_block, top_n: chosen blocks, the first, the query's own and the
    one before it included, by the compressed blocks' weights, one choice for the heads of a group. window: latest
    tokens, the query included. The gates and the MLP's parameters are ``AttentionExtras`` (nn.Attention has them).
    """
    return AttentionSpec(
        SlidingWindow(as_int("window", window, 1) - 1, 0),
        (Summaries(block, stride, "mlp", "none"),),
        TopChunks(top_n, select_block, "mass", always=("first", "own", "previous")),
        "gate",
    )


def with_delta(spec: AttentionSpec, every: int = 64) -> AttentionSpec:
    """The spec, its result corrected by dense rows (Willette et al., "Delta Attention", 2025); see :class:`Delta`."""
    return replace(spec, correction=Delta(every))


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
    "hierarchical": hierarchical,
    "combiner": combiner,
    "moba": moba,
    "nsa": nsa,
}
"""Every preset by its name."""

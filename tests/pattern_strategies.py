"""Patterns of all kinds for hypothesis to draw, and their masks by definition."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from distattn.patterns import (
    BlockSparse,
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
    RandomBlocks,
    SlidingWindow,
    Strided,
)

Masks = NDArray[np.bool_]

small = st.integers(0, 12)
positive = st.integers(1, 12)
position_sets = st.one_of(
    st.lists(st.integers(0, 50), max_size=8),
    st.builds(range, st.integers(0, 30), st.integers(0, 50), st.integers(1, 5)),
)


@st.composite
def block_tables(draw: st.DrawFn) -> BlockSparse:
    rows = draw(st.lists(st.lists(st.integers(0, 8), max_size=5), max_size=8))
    ptr = np.cumsum([0] + [len(row) for row in rows])
    return BlockSparse(ptr, [column for row in rows for column in row], draw(positive))


leaves = st.one_of(
    st.builds(Dense),
    st.builds(Causal),
    st.builds(SlidingWindow, small, small),
    st.builds(Dilated, small, small, positive),
    st.builds(Strided, positive),
    st.builds(lambda summary, more: FixedStride(summary + more, summary), positive, small),
    st.builds(GlobalKeys, position_sets),
    st.builds(GlobalQueries, position_sets),
    st.builds(GlobalTokens, position_sets),
    st.builds(RandomBlocks, st.integers(1, 4), positive, small, st.none() | st.integers(1, 60)),
    st.builds(Chunked, positive),
    st.builds(Chunked, positive, st.integers(0, 2), st.integers(0, 2)),
    st.builds(Chunked, positive, st.integers(2, 4), st.integers(-2, -1)),
    st.builds(Documents, st.lists(small, max_size=10)),
    st.builds(lambda near, width: DistanceBand(near, near + width), st.integers(-9, 12), positive),
    block_tables(),
)

trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=5,
)


def mask_of(pattern: Pattern, length: int) -> Masks:
    at = np.arange(length)
    mask = pattern.allows(at[:, None], at)
    assert mask.shape == (length, length) and mask.dtype == np.bool_
    return mask

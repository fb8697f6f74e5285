"""Patterns: everything that planning derives from a pattern, against its definition `allows`."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distattn import block_patterns
from distattn import patterns as all_patterns
from distattn.patterns import (
    And,
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
    Not,
    Or,
    Pattern,
    PerHead,
    RandomBlocks,
    SlidingWindow,
    Strided,
)
from distattn.spans import Ints, Spans

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


@st.composite
def runs(draw: st.DrawFn) -> tuple[Ints, Ints, int]:
    """(start, stop, length) of runs that cover `[0, length)`, of any sizes."""
    length = draw(st.integers(1, 48))
    if draw(st.booleans()):
        start = np.arange(0, length, draw(st.integers(1, 16)))
    else:
        start = np.array(sorted({0, *draw(st.lists(st.integers(0, length - 1), max_size=8))}))
    return start, np.append(start[1:], length), length


def mask_of(pattern: Pattern, length: int) -> Masks:
    at = np.arange(length)
    mask = pattern.allows(at[:, None], at)
    assert mask.shape == (length, length) and mask.dtype == np.bool_
    return mask


def to_masks(spans: Spans, length: int) -> Masks:
    """Rows of booleans; checks that intervals are sorted, disjoint, inside, not empty, and do not touch."""
    assert all(array.dtype == np.int64 for array in spans)
    assert spans.ptr[0] == 0 and spans.ptr[-1] == spans.start.size == spans.stop.size
    masks = np.zeros((spans.rows, length), np.bool_)
    for row in range(spans.rows):
        end = -1
        for i in range(spans.ptr[row], spans.ptr[row + 1]):
            assert end < spans.start[i] < spans.stop[i] <= length
            end = spans.stop[i]
            masks[row, spans.start[i] : end] = True
    return masks


def by_run(reduce: Callable[..., Masks], mask: Masks, start: Ints, stop: Ints) -> Masks:
    return np.stack([reduce(mask[a:b], axis=0) for a, b in zip(start, stop, strict=True)])


@settings(deadline=None, max_examples=70)
@given(trees, runs(), st.integers(1, 20))
def test_support_and_full_bound_the_mask(pattern: Pattern, where: tuple[Ints, Ints, int], grain: int) -> None:
    start, stop, length = where
    mask = mask_of(pattern, length)
    support, full = (to_masks(spans, length) for spans in pattern.spans(start, stop, length, grain))
    assert not (by_run(np.any, mask, start, stop) & ~support).any()
    assert not (full & ~by_run(np.all, mask, start, stop)).any()


@settings(deadline=None, max_examples=50)
@given(trees, st.integers(1, 48))
def test_single_queries_are_exact(pattern: Pattern, length: int) -> None:
    mask = mask_of(pattern, length)
    start = np.arange(length)
    for spans in pattern.spans(start, start + 1, length):
        np.testing.assert_array_equal(to_masks(spans, length), mask)


@settings(deadline=None, max_examples=70)
@given(leaves, runs(), st.integers(1, 20))
def test_leaves_are_as_tight_as_promised(leaf: Pattern, where: tuple[Ints, Ints, int], grain: int) -> None:
    start, stop, length = where
    some = by_run(np.any, mask_of(leaf, length), start, stop)
    every = by_run(np.all, mask_of(leaf, length), start, stop)
    support, full = (to_masks(spans, length) for spans in leaf.spans(start, stop, length))
    np.testing.assert_array_equal(support, some)
    np.testing.assert_array_equal(full, every)
    support, full = (to_masks(spans, length) for spans in leaf.spans(start, stop, length, grain))
    assert longest_run(support & ~some) < grain
    assert longest_run(every & ~full) < grain


def longest_run(masks: Masks) -> int:
    """The most neighbouring True values in any row."""
    edges = np.flatnonzero(np.diff(np.pad(masks, ((0, 0), (1, 1))).ravel().astype(np.int64)))
    return int(np.diff(edges)[::2].max(initial=0))


def test_longest_run() -> None:
    assert longest_run(np.array([[1, 1, 0, 1], [1, 1, 1, 0]], np.bool_)) == 3
    assert longest_run(np.zeros((2, 3), np.bool_)) == 0


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Ints, Ints, int, int]:
    """(q0, k0, block_q, block_k): every tile of a grid, or tiles anywhere."""
    block_q, block_k = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        q0, k0 = (x.ravel() for x in np.meshgrid(np.arange(0, 45, block_q), np.arange(0, 45, block_k)))
    else:
        pairs = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=30))
        q0, k0 = np.array(pairs, np.int64).reshape(-1, 2).T
    return q0, k0, block_q, block_k


def check_labels(pattern: Pattern, where: tuple[Ints, Ints, int, int]) -> tuple[Ints, Masks]:
    q0, k0, block_q, block_k = where
    labels = pattern.labels(q0, k0, block_q, block_k)
    assert labels.shape == q0.shape and labels.dtype == np.int64
    q = q0[:, None, None] + np.arange(block_q)[:, None]
    masks = pattern.allows(q, k0[:, None, None] + np.arange(block_k))
    assert not masks[labels == 0].any()
    assert masks[labels == 1].all()
    partial = np.unique(labels[labels >= 2])
    assert partial.tolist() == list(range(2, partial.size + 2))
    for label in partial:
        same = masks[labels == label]
        assert (same == same[0]).all()
    return labels, masks


@settings(deadline=None, max_examples=40)
@given(trees, tiles())
def test_equal_labels_mean_equal_masks(pattern: Pattern, where: tuple[Ints, Ints, int, int]) -> None:
    check_labels(pattern, where)


@settings(deadline=None, max_examples=40)
@given(leaves, tiles())
def test_labels_of_leaves_know_empty_and_full(leaf: Pattern, where: tuple[Ints, Ints, int, int]) -> None:
    labels, masks = check_labels(leaf, where)
    np.testing.assert_array_equal(labels == 0, ~masks.any((1, 2)))
    np.testing.assert_array_equal(labels == 1, masks.all((1, 2)))


@pytest.mark.parametrize(
    "pattern, most",
    [
        (Causal(), 1),
        (SlidingWindow(50, 3), 4),
        (Causal() & (SlidingWindow(63, 0) | GlobalTokens(range(5))), 6),
        (Chunked(64), 0),
        (Chunked(20), 40),
        (Strided(12), 6),
        (FixedStride(16, 3), 1),
        (Documents([64, 128] * 40), 0),
        (Documents([100] * 80), 76),
        (GlobalKeys([3, 8, 2000]), 2),
        (RandomBlocks(3, 16, seed=1), 0),
    ],
    ids=repr,
)
def test_masks_are_shared_along_a_sequence(pattern: Pattern, most: int) -> None:
    at = np.arange(0, 8000, 16)
    q0, k0 = np.repeat(at, at.size), np.tile(at, at.size)
    assert pattern.labels(q0, k0, 16, 16).max() <= 1 + most


@settings(deadline=None, max_examples=40)
@given(trees, st.integers(1, 48))
def test_row_interval(pattern: Pattern, length: int) -> None:
    for q in (np.arange(length), np.arange(length)[::-1], np.arange(length)[:: length // 2 + 1]):
        interval = pattern.row_interval(q)
        if interval is None:
            # Only bands, chunks, documents, and what & makes of them, promise an interval.
            intervals = Causal | Dense | SlidingWindow | DistanceBand | Chunked | Documents
            assert not isinstance(pattern, intervals)
            return
        low, high = interval
        keys = np.arange(length)
        assert (low >= 0).all()
        within = (keys >= low[:, None]) & (keys < high[:, None])
        np.testing.assert_array_equal(within, pattern.allows(q[:, None], keys))


def test_and_of_intervals_is_an_interval() -> None:
    pattern = Causal() & Documents([3, 4]) & SlidingWindow(1, 0)
    interval = pattern.row_interval(np.arange(9))
    assert interval is not None
    low, high = interval
    assert [(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True) if b > a] == [
        (0, 1), (0, 2), (1, 3), (3, 4), (3, 5), (4, 6), (5, 7)
    ]  # fmt: skip
    assert (Causal() | Documents([3])).row_interval(np.arange(3)) is None


@settings(deadline=None, max_examples=40)
@given(trees)
def test_repr_builds_an_equal_pattern(pattern: Pattern) -> None:
    again = eval(repr(pattern), vars(all_patterns).copy())
    assert again == pattern and hash(again) == hash(pattern)
    assert pickle.loads(pickle.dumps(pattern)) == pattern


def test_repr_shows_parentheses_where_needed() -> None:
    a, b, c = Causal(), Strided(2), Chunked(3)
    chunked = "Chunked(size=3, before=0, after=0)"
    assert repr(a & (b | c)) == f"Causal() & (Strided(stride=2) | {chunked})"
    assert repr(a & b | ~c) == f"Causal() & Strided(stride=2) | ~{chunked}"
    assert repr(~(a & b)) == "~(Causal() & Strided(stride=2))"
    assert repr(GlobalTokens(range(64))) == "GlobalTokens(positions=range(0, 64))"
    assert repr(GlobalKeys([9, 2, 2])) == "GlobalKeys(positions=range(2, 10, 7))"


def test_equal_values_are_equal() -> None:
    assert GlobalKeys([2, 0, 1, 1]) == GlobalKeys(range(3)) == GlobalKeys(np.array([0, 1, 2]))
    assert GlobalKeys(range(3)) != GlobalQueries(range(3))
    assert Documents(np.array([3, 4])) == Documents(iter([3, 4]))
    assert BlockSparse([0, 2], [3, 1], 4) == BlockSparse((0, 2), np.array([1, 3]), 4)
    assert SlidingWindow(np.int64(3), 0) == SlidingWindow(3, 0)
    assert isinstance(SlidingWindow(np.int64(3), 0).before, int)


@settings(deadline=None, max_examples=50)
@given(trees, st.integers(1, 40))
def test_combined_with_everything_and_nothing(pattern: Pattern, length: int) -> None:
    everything, nothing = Dense(), ~Dense()
    assert everything & pattern == pattern == pattern & everything
    assert nothing | pattern == pattern == pattern | nothing
    assert everything | pattern == everything == pattern | everything
    assert nothing & pattern == nothing == pattern & nothing
    assert ~~pattern == pattern
    assert not mask_of(nothing, length).any()


@settings(deadline=None, max_examples=40)
@given(trees, st.integers(1, 40))
def test_map_leaves(pattern: Pattern, length: int) -> None:
    np.testing.assert_array_equal(
        mask_of(pattern.map_leaves(lambda leaf, positive: leaf), length), mask_of(pattern, length)
    )
    # What grows at positive leaves and shrinks at others can only grow as a whole.
    grown = pattern.map_leaves(lambda leaf, positive: leaf | Strided(3) if positive else leaf & Strided(3))
    assert not (mask_of(pattern, length) & ~mask_of(grown, length)).any()
    constants = (Dense(), ~Dense())
    assert pattern.map_leaves(lambda leaf, positive: Dense()) in constants


def test_map_leaves_drops_what_becomes_constant() -> None:
    pattern = Causal() & (SlidingWindow(9, 0) | GlobalTokens(range(4))) & ~GlobalKeys([7])
    seen: list[tuple[Pattern, bool]] = []

    def without_keys(leaf: Pattern, positive: bool) -> Pattern:
        seen.append((leaf, positive))
        return leaf if leaf.key_columns(100) is None else ~Dense()

    assert pattern.map_leaves(without_keys) == Causal() & (SlidingWindow(9, 0) | GlobalQueries(range(4)))
    assert seen == [
        (Causal(), True),
        (SlidingWindow(9, 0), True),
        (GlobalKeys(range(4)), True),
        (GlobalQueries(range(4)), True),
        (GlobalKeys([7]), False),
    ]


@settings(deadline=None, max_examples=40)
@given(leaves, st.integers(1, 60))
def test_columns_and_rows_that_all_share(leaf: Pattern, length: int) -> None:
    mask = mask_of(leaf, length)
    columns, rows = leaf.key_columns(length), leaf.query_rows(length)
    assert (columns is not None) == isinstance(leaf, GlobalKeys | FixedStride)
    assert (rows is not None) == isinstance(leaf, GlobalQueries)
    at = np.arange(length)
    if columns is not None:
        np.testing.assert_array_equal(mask, np.broadcast_to(np.isin(at, columns), mask.shape))
    if rows is not None:
        np.testing.assert_array_equal(mask, np.broadcast_to(np.isin(at, rows)[:, None], mask.shape))


DEFINITIONS: list[tuple[Pattern, Callable[[int, int], bool]]] = [
    (Dense(), lambda q, k: True),
    (Causal(), lambda q, k: k <= q),
    (SlidingWindow(5, 2), lambda q, k: q - 5 <= k <= q + 2),
    (Dilated(7, 4, 3), lambda q, k: q - 7 <= k <= q + 4 and (q - k) % 3 == 0),
    (Strided(4), lambda q, k: (q - k) % 4 == 0),
    (FixedStride(5, 2), lambda q, k: k % 5 >= 3),
    (GlobalKeys([1, 17]), lambda q, k: k in (1, 17)),
    (GlobalQueries([1, 17]), lambda q, k: q in (1, 17)),
    (GlobalTokens([1, 17]), lambda q, k: q in (1, 17) or k in (1, 17)),
    (Chunked(7), lambda q, k: q // 7 == k // 7),
    (Chunked(7, 1, 2), lambda q, k: q // 7 - 1 <= k // 7 <= q // 7 + 2),
    (Documents([2, 0, 9]), lambda q, k: any(a <= q < b and a <= k < b for a, b in ((0, 2), (2, 11)))),
    (DistanceBand(-1, 4), lambda q, k: -1 <= q - k < 4),
    (BlockSparse([0, 1, 1, 3], [2, 0, 9], 4), lambda q, k: (q // 4, k // 4) in ((0, 2), (2, 0), (2, 9))),
    (Causal() & Strided(3), lambda q, k: k <= q and (q - k) % 3 == 0),
    (Causal() | Strided(3), lambda q, k: k <= q or (q - k) % 3 == 0),
    (~Causal(), lambda q, k: k > q),
]


@pytest.mark.parametrize("pattern, definition", DEFINITIONS, ids=[repr(case[0]) for case in DEFINITIONS])
def test_definitions(pattern: Pattern, definition: Callable[[int, int], bool]) -> None:
    wanted = [[definition(q, k) for k in range(40)] for q in range(40)]
    np.testing.assert_array_equal(mask_of(pattern, 40), wanted)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**70), st.none() | st.integers(1, 60))
def test_random_blocks_draws_distinct_blocks(per_row: int, block: int, seed: int, length: int | None) -> None:
    pattern = RandomBlocks(per_row, block, seed, length)
    n = 60 // block
    blocks = pattern.allows(np.arange(n)[:, None] * block, np.arange(n) * block)
    # Every position of a block stands for the block, whatever is asked for at the same time.
    at = np.arange(n * block)
    np.testing.assert_array_equal(pattern.allows(at[:, None], at), blocks[at[:, None] // block, at // block])
    choices = np.arange(n) + 1 if length is None else np.full(n, -(-length // block))
    np.testing.assert_array_equal(blocks.sum(1), np.minimum(choices, per_row))
    assert not blocks[np.arange(n) >= choices[:, None]].any()


def test_splitmix64_is_the_published_one() -> None:
    # The first two numbers of the reference implementation seeded with 0, whose state grows by the constant.
    states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert block_patterns._splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_random_blocks_is_uniform_and_fixed() -> None:
    rows, blocks = 20_000, 10
    pattern = RandomBlocks(2, 1, seed=5, length=blocks)
    picked = pattern.allows(np.arange(rows)[:, None], np.arange(blocks)).astype(np.float64)
    counts = picked.T @ picked
    # Each of the 45 pairs is drawn 444 times on average, with a standard deviation of 21.
    pairs = counts[np.triu_indices(blocks, 1)]
    assert pairs.sum() == rows and np.abs(pairs - rows / 45).max() < 100
    # A change of these links would change every model trained with them.
    assert [np.flatnonzero(row).tolist() for row in picked[:5]] == [[1, 9], [1, 7], [4, 5], [2, 9], [2, 3]]
    other = RandomBlocks(2, 1, seed=6, length=blocks).allows(np.arange(rows)[:, None], np.arange(blocks))
    assert (other != picked).any(1).mean() > 0.9


def test_strided_stays_linear_in_pages() -> None:
    start = np.arange(0, 2**16, 128)
    support, full = Strided(8).spans(start, start + 128, 2**16, 128)
    assert support.start.size == start.size and full.start.size == 0
    one = np.arange(64)
    support, full = Strided(100).spans(one, one + 1, 2**16, 128)
    assert support.start.size == 64 and full.start.size == 0
    support, full = Strided(1000).spans(start, start + 128, 2**16, 128)
    assert support.start.size <= start.size * 67
    support, full = FixedStride(16, 2).spans(start, start + 128, 2**16, 128)
    assert support.start.size == start.size and full.start.size == 0


def test_huge_positions_do_not_overflow() -> None:
    q = np.array([10**12, 10**12 + 1])
    support, full = (Causal() & SlidingWindow(3, 0) | Strided(10**11)).spans(q, q + 1, 2 * 10**12, 128)
    assert support.ptr.tolist() == [0, 20, 40] and full.start.min() == 0
    assert (Causal().labels(q, q, 128, 128) == 2).all()
    assert Chunked(10**11).labels(q - 64, q - 64, 128, 128).max() == 3


def test_per_head() -> None:
    heads = PerHead([Causal(), Strided(2)])
    assert heads.by_head(2) == (Causal(), Strided(2))
    assert (heads & SlidingWindow(3, 0)).by_head(2) == (
        Causal() & SlidingWindow(3, 0), Strided(2) & SlidingWindow(3, 0)
    )  # fmt: skip
    assert (SlidingWindow(3, 0) | ~heads).by_head(2) == (
        SlidingWindow(3, 0) | ~Causal(), SlidingWindow(3, 0) | ~Strided(2)
    )  # fmt: skip
    plain = Causal() & Strided(2)
    assert all(one is plain for one in plain.by_head(3)) and len(plain.by_head(3)) == 3
    assert (heads | plain).heads == 2 and plain.heads is None
    assert heads.map_leaves(lambda leaf, positive: ~leaf) == PerHead([~Causal(), ~Strided(2)])
    assert eval(repr(~heads & plain), vars(all_patterns).copy()) == ~heads & plain
    for wrong in (1, 3):
        with pytest.raises(ValueError, match=f"heads is {wrong}; expected 2"):
            (Causal() | ~heads).by_head(wrong)
    at = np.arange(4)
    for ask in (
        lambda: heads.allows(at, at),
        lambda: (Causal() & heads).spans(at, at + 1, 4),
        lambda: heads.labels(at, at, 2, 2),
    ):
        with pytest.raises(ValueError, match="by_head"):
            ask()


def test_truth_value_is_refused() -> None:
    with pytest.raises(TypeError, match="& | ~"):
        bool(Causal())
    with pytest.raises(TypeError, match="& | ~"):
        assert Causal() and Strided(2)
    with pytest.raises(TypeError):
        Causal() & True  # type: ignore[operator]
    with pytest.raises(TypeError):
        True | Causal()  # type: ignore[operator]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: SlidingWindow(-1, 0), "before is -1"),
        (lambda: SlidingWindow(0, -1), "after is -1"),
        (lambda: SlidingWindow(1.5, 0), "before is 1.5; expected an integer"),  # type: ignore[arg-type]
        (lambda: Dilated(-1, 0, 1), "before is -1"),
        (lambda: Dilated(1, -1, 1), "after is -1"),
        (lambda: Dilated(1, 1, 0), "step is 0"),
        (lambda: Strided(0), "stride is 0"),
        (lambda: FixedStride(0, 1), "stride is 0"),
        (lambda: FixedStride(4, 0), "summary is 0"),
        (lambda: FixedStride(4, 5), "summary is 5"),
        (lambda: GlobalKeys([3, -1]), "positions contains -1"),
        (lambda: GlobalTokens([0.5]), "positions is"),  # type: ignore[list-item]
        (lambda: RandomBlocks(0, 1, 1), "per_row is 0"),
        (lambda: RandomBlocks(1, 0, 1), "block is 0"),
        (lambda: RandomBlocks(1, 1, -1), "seed is -1"),
        (lambda: RandomBlocks(1, 1, 1, 0), "length is 0"),
        (lambda: Chunked(0), "size is 0"),
        (lambda: Chunked(1, -1), "before is -1"),
        (lambda: Documents([3, -2]), "lengths contains -2"),
        (lambda: Documents([0.5]), "lengths is"),  # type: ignore[list-item]
        (lambda: DistanceBand(3, 3), "far is 3"),
        (lambda: BlockSparse([0, 2, 1, 3], [0, 0, 0], 4), "row_ptr is"),
        (lambda: BlockSparse([0, 1], [0, 1], 4), "row_ptr is"),
        (lambda: BlockSparse([], [], 4), "row_ptr is"),
        (lambda: BlockSparse([0, 1], [-1], 4), "col contains -1"),
        (lambda: BlockSparse([0, 1], [1], 0), "block is 0"),
        (lambda: PerHead([]), "patterns is empty"),
        (lambda: PerHead([Causal(), 3]), "patterns contains 3"),  # type: ignore[list-item]
        (lambda: PerHead([~PerHead([Causal()])]), "itself made of a PerHead"),
        (lambda: Causal().by_head(0), "heads is 0"),
        (lambda: Causal().spans([0], [0], 4), "stop is not after start"),
        (lambda: Causal().spans([0], [1, 2], 4), "expected one shape"),
        (lambda: Causal().spans([0], [1], 4, 0), "grain is 0"),
        (lambda: Causal().spans([0], [1], -1), "length is -1"),
        (lambda: Causal().picture(0), "length is 0"),
        (lambda: Causal().picture(4, 0), "size is 0"),
    ],
)
def test_bad_values_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_nodes_keep_what_they_were_built_of() -> None:
    a, b = Causal(), Strided(2)
    assert a & b == And(a, b) and a | b == Or(a, b) and ~a == Not(a)


def test_picture() -> None:
    assert Causal().picture(4, 4) == "██· · · \n████· · \n██████· \n████████"
    assert Causal().picture(8, 2) == "▒▒· \n██▒▒"
    assert Strided(8).picture(16, 2) == "░░░░\n░░░░"
    assert PerHead([Dense(), ~Dense()]).picture(2) == "head 0\n████\n████\n\nhead 1\n· · \n· · "


def test_picture_of_a_long_sequence_shows_rare_rows() -> None:
    pattern = Causal() & (SlidingWindow(10, 0) | GlobalTokens([0, 700_000]))
    lines = pattern.picture(1_000_000, 8).splitlines()
    assert len(lines) == 8 and all(len(line) == 16 for line in lines)
    assert lines[0] == "░░" + "· " * 7
    assert lines[4] == "░░" + "· " * 2 + "░░░░" + "· " * 3
    assert lines[5] == "░░" * 6 + "· " * 2
    assert lines[7] == "░░" + "· " * 4 + "░░░░░░"
